/* Staging: memory of ours, shared with the daemon, where publish puts K and V. A pool of chunks; each is a memfd,
 * reserved when made (a full system is an error then, not a SIGBUS later), sealed against shrinking and growing, and
 * known to the daemon by a number in the current life.
 *
 *            staging_take()                    staging_give()
 *   FREE ----------------------> TAKEN -----------------------------> FREE
 *    |  room is needed             |  staging_discard(): the daemon may still read it
 *    +-----------> gone <----------+
 *
 * Any thread. lock is not held over requests. */
#ifndef KVD_STAGING_H
#define KVD_STAGING_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct kvd;
struct life;

struct staging_chunk {
    struct staging_chunk *next;
    int fd;
    void *map;
    uint64_t bytes;
    bool taken;
    uint32_t serial; /* of the life that knows it; 0: none */
    uint32_t id;     /* its number there */
};

struct staging {
    pthread_mutex_t lock;
    pthread_cond_t freed;
    struct staging_chunk *chunks;
    uint64_t total_bytes;
    uint64_t limit_bytes; /* the caller's wish; 0: the daemon's limit alone */
    uint32_t full_serial; /* the life whose daemon takes no more of them */
};

void staging_init(struct staging *staging, uint64_t limit_bytes);
/* No chunk is taken. forked: a child frees what it inherited. */
void staging_deinit(struct staging *staging, bool forked);

/* Takes a chunk that the life knows, of at least least_bytes, and of most_bytes if that is possible without waiting.
 * Waits until another publish gives one back when there is no room for one more: the caller holds none, so that two
 * cannot wait for each other. Errors: KVD_E_LIMIT (more than may ever be), KVD_E_NOMEM, those of a request. */
int staging_take(struct kvd *session, struct life *life, uint64_t least_bytes, uint64_t most_bytes,
                 struct staging_chunk **ret);
void staging_give(struct kvd *session, struct staging_chunk *chunk);
/* A request about it ended without an answer: the daemon may still be reading, so its bytes must not change any
 * more. */
void staging_discard(struct kvd *session, struct life *life, struct staging_chunk *chunk);

#endif
