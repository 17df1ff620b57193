/* Attention for workers: threads that take requests from the rings in workers' pages, compute what belongs together as one, and
 * answer into the workers' own memory. The loop thread has no part in a request.
 *
 *     worker                      a thread of ours                                                worker
 *     submission --ring, bell-->  taken, checked, copied --queue--> job: leases, pieces --ring, futex-->  completion
 *
 * The threads are readers of the index like any worker (rule I6): they hold what they read by leases of their own, in a table that
 * the evictor scans as it scans a worker's, so that blocks stay also when the worker that asked dies.
 *
 * Requests of any workers over the same chain of blocks become one job: what they share is read once for all their queries, and each
 * has its own rest (attend_job.c). Who is next is decided by fair queueing between workers and tenants, a piece of bounded time after
 * another, so that a small request does not wait for large ones (attend_queue.c). Everything in a page, a ring or a request is hostile
 * (attend_take.c).
 *
 * Loop thread, but for attend_measure(): any. Includes: proto/ring.h. */
#ifndef KVD_DAEMON_ATTEND_H
#define KVD_DAEMON_ATTEND_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/attn/attn.h"
#include "proto/ring.h"

struct attend;
struct attend_ring;
struct attend_tenant;
struct cache;
struct metrics;

struct attend_limits {
    uint64_t request_bytes; /* of one request, in the worker's memory and in ours */
    uint64_t worker_bytes;  /* of one worker's requests in our memory */
    uint64_t queue_bytes;   /* of all; beyond it a worker keeps its equal share */
    uint64_t memory_bytes;  /* attend memory of one worker */
    uint64_t spin_usec;     /* looking at the rings after work before sleeping; 0 on a single processor */
    uint64_t slice_usec;    /* of a piece of work, about */
    uint32_t n_blocks;      /* of one request */
};
struct attend_config {
    unsigned n_threads;     /* they start with the first ring; 0: attend_turn() does their work, in tests */
    unsigned n_cpus;        /* that this process may use */
    uint32_t n_words;       /* leases of one tenant's requests that are computed at the same time */
    const struct attn_ops *ops;
    const struct codec_ops *codec;
    struct attend_limits limits;
};

/* Errors: -ENOMEM, -errno of epoll and eventfd. */
int attend_create(const struct attend_config *config, struct attend **ret);
/* Ends the threads. Rings and tenants must be gone. NULL allowed; returns NULL. */
struct attend *attend_destroy(struct attend *attend);
/* From now on; what is in the queue stays. */
void attend_set_limits(struct attend *attend, const struct attend_limits *limits);
/* Brings counts and gauges into the metrics. */
void attend_measure(struct attend *attend, struct metrics *m);

/* A tenant's lease table, added to its cache (borrowed until destroyed). -ENOMEM. */
int attend_tenant_create(struct attend *attend, struct cache *cache, struct attend_tenant **ret);
/* Waits for what is being computed of it (a piece), its rings being closed. NULL allowed; returns NULL. */
struct attend_tenant *attend_tenant_destroy(struct attend_tenant *tenant);

/* The rings of n entries at `at` in a worker's page (borrowed until closed). Errors: -ENOMEM, -errno of threads and eventfd. */
int attend_ring_open(struct attend *attend, struct attend_tenant *tenant, void *at, uint32_t n, struct attend_ring **ret);
/* Takes back page and memories: when it returns, no thread looks at them any more. What waits is dropped, what is being computed for
 * it is thrown away. NULL allowed; returns NULL. */
struct attend_ring *attend_ring_close(struct attend_ring *ring);
/* The worker's bell, borrowed. */
int attend_ring_bell(const struct attend_ring *ring);
/* fd: an eventfd (borrowed until the ring is closed) that is told of each completion, for a ring of the daemon's own. */
void attend_ring_tell(struct attend_ring *ring, int fd);
/* Maps fd (borrowed), a memfd of exactly bytes, for reading and writing. Errors: -EINVAL with ret_reason (a constant sentence), -ENOSPC
 * (limits.memory_bytes or too many), -errno of mmap. */
int attend_ring_add(struct attend_ring *ring, int fd, uint64_t bytes, uint32_t *ret_memory, const char **ret_reason);

#endif
