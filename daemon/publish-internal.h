/* What publish_request.c (check, reserve) and publish.c (encode, conclude) share. Nobody else includes this. */
#ifndef KVD_DAEMON_PUBLISH_INTERNAL_H
#define KVD_DAEMON_PUBLISH_INTERNAL_H

#include <stdatomic.h>
#include <stdbool.h>

#include "daemon/daemon.h"
#include "daemon/errors.h"
#include "daemon/publish.h"
#include "store/cache.h"

enum { PUBLISH_BUCKETS = 4096, PUBLISH_REASON_MAX = 128 };

/* What is to become of a block. */
enum block_state {
    BLOCK_FAILED,    /* error says why; no entry */
    BLOCK_PRESENT,   /* was in the cache */
    BLOCK_ENCODING,  /* has a slot; its jobs run, or have ended */
    BLOCK_ELSEWHERE, /* another request (or an earlier block of this one) encodes it */
    BLOCK_DONE,      /* was committed */
};

struct publish_block {
    struct publish *publish;
    uint8_t key[KEY_BYTES], parent[KEY_BYTES];
    uint8_t group;
    bool first;
    enum block_state state;
    enum error_code error;
    char reason[PUBLISH_REASON_MAX];

    const uint8_t *raw;              /* in the staging */
    uint64_t raw_bytes;
    struct cache_slot slot;
    struct publish_block *next_hash; /* while ENCODING: blocks in progress, by key */

    struct publish_block *waits_on;  /* a block in progress whose end this one needs to know: its parent, or itself elsewhere */
    struct publish_block *next_waiter, *waiters;

    _Atomic uint32_t n_parts_left;   /* jobs that have not ended; the last one computes the CRC */
    _Atomic int result;              /* the first failure of a part */
    struct payload_fault fault;      /* written by the part that set result to -EDOM */
};

struct publish_part {
    struct job job;
    struct publish_block *block;
    uint32_t part0, part1; /* of the payload's layout */
};

struct publish {
    struct publish *next, **at;      /* among the session's; at NULL: the session is gone */
    struct publish *next_ready;
    struct daemon *daemon;
    struct session *session;         /* NULL: gone */
    struct tenant *tenant;           /* referenced */
    struct staging *staging;         /* referenced */
    struct space *space;             /* lives as long as the cache */
    enum codec_dtype dtype;
    uint32_t request_id;
    uint64_t begin_usec;
    uint32_t n_jobs;                 /* not yet done */
    uint32_t n_waits;                /* blocks of other requests that are not yet concluded */
    struct publish_part *parts;
    uint32_t n_parts;
    uint32_t n_blocks;
    struct publish_block blocks[];
};

struct publishing {
    struct publish_block *buckets[PUBLISH_BUCKETS];
    uint64_t n_blocks;
    struct publish *ready;           /* to be concluded by the publish_conclude() that runs */
    bool concluding;
};

__attribute__((format(printf, 3, 4))) void block_fail(struct publish_block *b, enum error_code code, const char *format, ...);

struct publish_block *publishing_find(const struct publishing *p, uint32_t tenant, uint32_t space, uint8_t group,
                                      const uint8_t *key);
/* b is ENCODING from now on and found under its key. */
void publishing_add(struct publishing *p, struct publish_block *b);
/* b is to be told when other, which is in progress, ends. Nothing for a block of the same request: order is enough. */
void publish_wait_on(struct publish_block *b, struct publish_block *other);

/* Sends the encoding out, or concludes at once if there is none. Owns publish from here on. */
void publish_start(struct publish *publish);

#endif
