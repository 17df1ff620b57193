/* Rings of a worker's page: where they are, and why a request for attention was not served.
 *
 * Layout and meaning of the words are in shm.h; docs/shared-memory.md has the protocol. Both ends use what is here: the worker
 * produces submissions and consumes completions, the daemon the other way round. Nothing here waits or makes a system call.
 *
 * Any thread. Includes: shm.h. */
#ifndef KVD_PROTO_RING_H
#define KVD_PROTO_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "shm.h"

/* Addresses of the rings in a mapped page. n is what the page's maker said when it was made: never what the page says now. */
struct ring_view {
    struct shm_rings *words;
    struct shm_submission *submissions;
    struct shm_completion *completions;
    uint32_t n; /* power of two */
};

/* Bytes of both rings of n entries. */
static inline uint64_t ring_bytes(uint32_t n)
{
    return sizeof(struct shm_rings) + (uint64_t)n * (sizeof(struct shm_submission) + sizeof(struct shm_completion));
}
/* at: of struct shm_rings, a multiple of 64. */
static inline void ring_view_init(struct ring_view *v, void *at, uint32_t n)
{
    v->words = at;
    v->submissions = (struct shm_submission *)((char *)at + sizeof(struct shm_rings));
    v->completions = (struct shm_completion *)(v->submissions + n);
    v->n = n;
}

/* REASON(name, number, error, text): number is for ever; error is one of enum kvd_error; text takes given and allowed, in this order
 * (printf's %llu, at most two). */
#define RING_REASONS(REASON)                                                                                                       \
    REASON(DONE, 0, 0, "no error")                                                                                                 \
    REASON(CANCELLED, 1, 17, "cancelled")                                                                                          \
    REASON(DEADLINE, 2, 17, "its time was over after %llu us; allowed: %llu us")                                                   \
    REASON(QUEUE, 3, 7, "the daemon's queue holds %llu bytes of requests; allowed: %llu, option attend_queue_bytes")               \
    REASON(PLACE, 4, 2, "the request lies at %llu of a memory of %llu bytes, or is not aligned")                                   \
    REASON(BYTES, 5, 7, "the request takes %llu bytes; allowed: %llu, option attend_request_bytes")                                \
    REASON(HEADER, 6, 2, "the request's header of %llu bytes, a reserved field or a flag is not known; allowed: %llu bytes")       \
    REASON(PART, 7, 2, "a part of the request begins at %llu; allowed: aligned and within its %llu bytes")                         \
    REASON(SPACE, 8, 11, "no space %llu in this tenant")                                                                           \
    REASON(LAYER, 9, 2, "layer %llu; allowed: below %llu")                                                                         \
    REASON(HEADS, 10, 2, "n_heads is %llu; allowed: a multiple of the layer's %llu KV heads, at most 4096")                        \
    REASON(TOKENS, 11, 2, "n_tokens is %llu; allowed: 1 to %llu")                                                                  \
    REASON(DTYPE, 12, 2, "dtype %llu of the queries is not known")                                                                 \
    REASON(DIM, 13, 2, "dim_o is %llu; allowed for this layer: multiples of 16 up to %llu")                                                        \
    REASON(NUMBERS, 14, 2, "scale or softcap is not a finite number, or softcap is negative")                                      \
    REASON(REFS, 15, 7, "%llu blocks; allowed: %llu, option attend_blocks")                                                        \
    REASON(POSITION, 16, 2, "the blocks end at position %llu; allowed: up to %llu")                                                \
    REASON(QUERY, 17, 2, "number %llu of the queries is not finite")                                                               \
    REASON(STALE, 18, 22, "block %llu of the request is not in the cache as it was leased")                                        \
    REASON(FOREIGN, 19, 2, "block %llu of the request is of another space or layer group")                                         \
    REASON(MEMORY, 20, 23, "the daemon has no memory for %llu bytes")                                                              \
    REASON(ENDING, 21, 4, "the daemon is ending")                                                                                  \
    REASON(RANGE, 22, 14, "%llu of %llu rows have no result within fp32: their queries or the scale are too large")

enum ring_reason {
#define REASON(name, number, error, text) RING_##name = number,
    RING_REASONS(REASON)
#undef REASON
};
enum { RING_REASON_COUNT = 23 };

/* enum kvd_error of a reason; 23 (internal) for a number that is none. */
int ring_reason_error(uint32_t reason);
/* A sentence to buf (n bytes, always ended). Returns buf. */
char *ring_reason_text(uint32_t reason, uint64_t given, uint64_t allowed, char *buf, size_t n);

/* ---- The worker's half ---- */

/* Submissions that the ring still has room for, when the worker has written tail of them. More than n (nonsense in the page): 0. */
static inline uint32_t ring_room(const struct ring_view *v, uint32_t tail)
{
    uint32_t used = tail - atomic_load_explicit(&v->words->submit_head, memory_order_acquire);

    return used <= v->n ? v->n - used : 0;
}

/* ---- The daemon's half ---- */

/* Submissions that wait, when the daemon has taken head of them. More than n: the worker has written nonsense. */
static inline uint32_t ring_waiting(const struct ring_view *v, uint32_t head)
{
    return atomic_load_explicit(&v->words->submit_tail, memory_order_acquire) - head;
}
/* Completions that the worker has not read, when the daemon has written tail of them; never more than n. */
static inline uint32_t ring_unread(const struct ring_view *v, uint32_t tail)
{
    uint32_t unread = tail - atomic_load_explicit(&v->words->done_head, memory_order_acquire);

    return unread < v->n ? unread : v->n;
}

#endif
