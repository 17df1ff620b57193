/* Staging memory: a worker's own, mapped read-only by the daemon. What is in it is hostile and may change at any time; that it
 * stays mapped and whole is what the checks here make sure of.
 *
 * Counted references: the session has one, each publish that reads it another; the last one unmaps. Loop thread only (jobs read
 * the bytes while a publish holds its reference). */
#ifndef KVD_DAEMON_STAGING_H
#define KVD_DAEMON_STAGING_H

#include <stdint.h>

struct staging {
    uint32_t id; /* in its session */
    uint32_t n_refs;
    uint32_t drop_request; /* the session wants it gone, and this is the request to answer then; 0: it is in use */
    const uint8_t *map;
    uint64_t bytes;
    uint64_t *total_bytes; /* the daemon's sum of all that is mapped */
};

/* Is fd a memfd of exactly bytes that cannot shrink? Errors: -EINVAL with ret_reason. */
int staging_check(int fd, uint64_t bytes, const char **ret_reason);

/* Maps fd (borrowed) of exactly bytes. Errors: -EINVAL with ret_reason (a constant sentence: what is wrong and what is allowed),
 * -ENOMEM, -errno of mmap (ret_reason is set too). */
int staging_create(int fd, uint64_t bytes, uint32_t id, uint64_t *total_bytes, struct staging **ret, const char **ret_reason);
/* The daemon's own memory in place of a worker's, for data that comes in messages: zeroed, at least bytes, and *ret_data is where to
 * write. -ENOMEM. */
int staging_create_own(uint64_t bytes, uint32_t id, uint64_t *total_bytes, struct staging **ret, uint8_t **ret_data);
struct staging *staging_ref(struct staging *staging);
struct staging *staging_unref(struct staging *staging);

#endif
