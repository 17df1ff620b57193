/* What attend.c (threads, rings), attend_take.c (requests from rings), attend_queue.c (who is next), attend_job.c (requests that belong
 * together) and attend_work.c (pieces, results) share. Nobody else includes this, but tests.
 *
 * Locks, in the order in which they are taken:
 *   rings_lock      the list of rings and tenants, and reading worker memory: a thread that polls holds it. Taken by the loop to open and
 *                   close; a pass is bounded (POLL_*), and pollers stand back when knocks says that the loop waits
 *   lock            queue, jobs, counts, all fields below that say so. Held for as long as a few list operations take
 *   tenant.words_lock, ring.done_lock, job.head[].lock: leaves. done_lock is what keeps worker memory mapped while results are written
 *
 * States of a request:
 *
 *   (in its ring) --take--> WAITING --its turn--> WORKING --its last piece--> completed, freed
 *        |                     |                     |
 *        | refused             | ring closed         | failed (stale, cancelled, late): its pieces are skipped
 *        +--> completed        +--> freed            +--> completed */
#ifndef KVD_DAEMON_ATTEND_INTERNAL_H
#define KVD_DAEMON_ATTEND_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "daemon/attend.h"
#include "daemon/metrics.h"
#include "kernels/codec/payload.h"
#include "proto/lookup.h"
#include "store/cache.h"

enum {
    ATTEND_HEADS_MAX = 4096,
    ATTEND_TOKENS_MAX = 65536,  /* query tokens of one request */
    ATTEND_MEMORIES_MAX = 16,
    ATTEND_BUCKETS = 1 << 14,
    ATTEND_MEMBERS_MAX = 256,   /* requests in one job */
    ATTEND_JOBS_MAX = 16,       /* of a tenant that have begun: a job is put off for a smaller one at most so often */
    ATTEND_ROWS_MAX = 16,       /* of one call of the kernel */
    ATTEND_PIECE_BLOCKS_MAX = 1024,
    ATTEND_POLL_REQUESTS = 256, /* taken in one pass over the rings */
    ATTEND_POLL_BYTES = 1 << 20,
    ATTEND_BATCH_CLASSES = 5,
};

struct attend_memory {
    uint8_t *map;
    uint64_t bytes;
};

struct attend_tenant {
    struct attend *attend;
    struct attend_tenant *next;      /* changed by rings_lock and lock, read by either */
    struct cache *cache;
    _Atomic uint32_t *awake;
    pthread_mutex_t words_lock;
    _Atomic uint64_t *words;         /* the lease table */
    uint32_t *free_words, n_free;    /* by words_lock */
    struct shm_page_header *header;  /* of the table's page: an empty one */
    struct cache_page page;
    uint32_t n_active;               /* by lock: rings with a request */
    uint32_t n_jobs;                 /* by lock: these, and those being formed */
    bool blocked;                    /* by lock: no lease words for another job before one ends */
    struct attend_request **heap;    /* by lock: what waits, by tag */
    uint32_t n_heap, heap_room;
    double now;                      /* by lock: virtual time among its workers */
    double served;                   /* by lock: units that were computed for it, or would have been had it always asked */
    struct attend_job *jobs;         /* by lock: that have pieces left, or are being computed */
};

struct attend_ring {
    struct attend *attend;
    struct attend_tenant *tenant;
    struct ring_view view;
    int bell;
    struct attend_memory memories[ATTEND_MEMORIES_MAX]; /* by rings_lock */
    uint32_t n_memories;
    uint64_t memory_bytes;
    uint32_t head;                   /* by rings_lock: submissions taken */
    bool broken;                     /* by rings_lock: the worker wrote nonsense; it is not looked at any more */
    _Atomic uint32_t n_open;         /* requests taken and not completed */
    pthread_mutex_t done_lock;
    bool dead;                       /* by done_lock: page and memories are gone */
    int tell_fd;                     /* by done_lock: an eventfd to be told of completions; -1: none */
    _Atomic uint32_t done;           /* completions written; written by done_lock */
    uint32_t n_refs;                 /* by lock: one of the session, one a request */
    struct attend_request *requests; /* by lock: all of it that live */
    uint64_t bytes;                  /* by lock: of them */
    double finish;                   /* by lock: tag of the last */
};

/* What requests must have in common to be computed together, besides their first blocks. */
struct attend_kind {
    const struct space *space;
    const struct payload_part *part, *part_first; /* of the layer, in plain and in first blocks */
    uint32_t group, layer;
    uint32_t n_kv_heads, dim_k;
    uint32_t first_pos;
    struct attn_params params;
};

enum attend_state { ATTEND_WAITING, ATTEND_WORKING };

/* One request, checked, in our own memory. */
struct attend_request {
    struct attend_request *next, *prev;                /* by lock: of its ring */
    struct attend_request *bucket_next, *bucket_prev;  /* by lock: while WAITING */
    struct attend_ring *ring;
    enum attend_state state;         /* by lock */
    uint32_t heap_at;                /* by lock, while WAITING */
    uint64_t hash;
    double tag, start, cost;         /* by lock; see attend_queue.c. In units */
    double read_cost;                /* of it: taking its queries and answering */
    double shared_cost;              /* what it cost, with what it shared */
    uint64_t ticket;
    uint64_t bytes;                  /* of this allocation */

    uint8_t *at;                     /* in worker memory: only while ring.done_lock is held and the ring is not dead */
    uint64_t o_off, lse_off, mass_off;
    const _Atomic uint32_t *cancelled;

    struct attend_kind kind;
    uint32_t n_heads, ratio, n_tokens, n_rows, n_refs; /* n_rows: of one KV head */
    uint64_t deadline_usec, taken_usec, begun_usec;

    _Atomic uint32_t reason;         /* enum ring_reason: set once, by whoever comes first (attend_request_fail()) */
    _Atomic bool failing;            /* somebody has come */
    uint64_t given, allowed;         /* of the reason, there once it is seen */
    uint64_t n_left;                 /* by lock: pieces */
    uint32_t n_together;
    uint64_t needed_bytes;           /* of blocks that it needs */

    uint64_t *refs;                  /* [n_refs] */
    uint32_t *positions;             /* [n_tokens] */
    float *q, *o, *lse;              /* [n_kv_heads][n_rows]... */
    float *block_lse;                /* [n_kv_heads][n_rows][n_refs], or NULL: no masses are wanted */
};

/* What requests were computed together share: blocks [from, from + n) of their chains, the same for all its members. */
struct attend_segment {
    uint32_t from, n;
    uint32_t member0, n_members;     /* in job.order */
    uint32_t n_rows;                 /* of one KV head, of all members */
    uint32_t block0;                 /* in job.blocks */
    uint32_t piece_heads, piece_blocks, piece_rows; /* of a piece, at most */
    uint64_t piece0, n_pieces;       /* numbers of its pieces in the job; blocks by heads by rows, rows innermost */
};
struct attend_block {
    const uint8_t *payload;          /* NULL: left out */
    bool first;
};
/* A bounded piece of work: KV heads [head0, head1), blocks [block0, block1) and rows [row0, row1) of a segment. */
struct attend_piece {
    uint32_t segment, head0, head1, block0, block1, row0, row1;
};

struct attend_job {
    struct attend_job *next;
    struct attend_tenant *tenant;
    double tag;                                         /* by lock: smallest of those that are not answered */
    double tags[ATTEND_MEMBERS_MAX];                    /* by lock: theirs, infinite once they are */
    struct attend_kind kind;
    struct attend_request *members[ATTEND_MEMBERS_MAX]; /* one that has been answered is gone: then its pieces are done */
    uint32_t n_rows[ATTEND_MEMBERS_MAX];                /* theirs */
    uint32_t n_members;
    uint32_t *order, n_order;        /* members of the segments, by their number */
    struct attend_segment *segments;
    uint32_t n_segments;
    struct attend_block *blocks;
    uint32_t n_blocks;
    uint32_t *words, n_words;        /* of the lease table */
    uint64_t n_pieces, next_piece;   /* by lock: the first that nobody has taken */
    uint32_t next_segment;           /* by lock: where it was last */
    uint64_t n_left;                 /* by lock: not done */
    bool wants_mass, ready;
    pthread_mutex_t *head;           /* a KV head's results are merged by one thread at a time */
};

/* A thread's own memory. */
struct attend_scratch {
    void *work;
    size_t work_bytes;
    float *numbers;                  /* queries, outputs, sums, sums of blocks */
    size_t n_numbers;
    uint32_t *pos;
    struct attn_block *blocks;
};

struct attend_stats {
    uint64_t n_requests, n_done, n_failed, n_cancelled, n_late, n_refused, n_stale, n_broken;
    uint64_t n_jobs, n_together, batch[ATTEND_BATCH_CLASSES];
    uint64_t n_pieces, read_bytes, needed_bytes, n_put_off, n_bells, n_wakes;
    struct histogram wait, took;
};

struct attend {
    struct attend_config config;
    struct attend_limits limits;     /* by lock; a copy in use by pollers is taken under it */

    pthread_mutex_t rings_lock;
    struct attend_ring **rings;      /* by rings_lock */
    uint32_t n_rings, rings_room, next_ring;
    struct attend_tenant *tenants;   /* changed by rings_lock and lock */
    _Atomic uint32_t knocks;         /* the loop waits for rings_lock */
    int epoll_fd, stop_fd;

    pthread_mutex_t lock;
    pthread_cond_t work;             /* helpers wait for pieces */
    pthread_cond_t job_ended;
    bool stopping;                   /* by lock */
    bool watched;                    /* by lock: a thread looks at the rings or sleeps on the bells */
    uint32_t n_vain;                 /* the watcher's: looks in a row at which nothing came */
    uint32_t n_idle;                 /* by lock: helpers that wait */
    struct { struct attend_request *first, *last; } *buckets; /* by lock */
    uint64_t hash_seed;
    uint64_t bytes;                  /* by lock: of all requests */
    uint32_t n_waiting;              /* by lock */
    double nsec_per_unit;            /* by lock: measured */
    struct attend_stats stats;       /* by lock */

    unsigned n_threads;
    pthread_t *threads;
};

uint64_t attend_now_usec(void);

/* ---- attend.c ---- */

/* Polls, and computes a piece if there is one. False: there was none. Any thread, each with a scratch of its own. */
bool attend_turn(struct attend *attend, struct attend_scratch *scratch);

/* ---- attend_take.c ---- */

/* Reads and checks a request of `room` bytes at `at` in worker memory, copying every word once. On success *ret is the caller's, without
 * a ring. On failure returns the reason, with what was given and allowed. */
struct attend_why {
    uint64_t given, allowed;
};
enum ring_reason attend_request_read(const struct attend *attend, const struct attend_limits *limits, const struct cache *cache,
                                     uint8_t *at, uint64_t room, struct attend_request **ret, struct attend_why *why);
/* One pass over the rings; takes what waits, within bounds. By rings_lock. Returns how many entries it took. */
unsigned attend_poll(struct attend *attend);
/* A submission can be taken. By rings_lock. */
bool attend_ring_ready(const struct attend_ring *ring);

/* ---- attend_queue.c: all by lock ---- */

double attend_units(uint64_t n_tokens, uint32_t n_kv_heads, uint32_t n_rows, uint32_t dims);
/* -ENOMEM. */
int attend_queue_add(struct attend *attend, struct attend_request *rq);
/* Puts back what could not begin, with the tag that it had. There is room: it was in before. */
void attend_queue_return(struct attend *attend, struct attend_request *rq);
void attend_queue_remove(struct attend *attend, struct attend_request *rq);
/* Whose turn it is among those that wait or have a job with pieces left; NULL: nobody. */
struct attend_tenant *attend_queue_tenant(const struct attend *attend);
/* Takes a tenant's next request and those that wait for the same chain with the same parameters out of the queue. Returns how many, at most
 * ATTEND_MEMBERS_MAX; the first is the one whose turn it is. */
uint32_t attend_queue_take(struct attend *attend, struct attend_tenant *tenant, struct attend_request **ret);
/* The tenant's job with the smallest tag that has a piece left; NULL: none. */
struct attend_job *attend_queue_job(const struct attend_tenant *tenant);
/* Its next request may begin a job, and goes before job (NULL: none). */
bool attend_queue_first(const struct attend_tenant *tenant, const struct attend_job *job);
bool attend_same_kind(const struct attend_request *a, const struct attend_request *b);

/* ---- attend_job.c ---- */

/* Makes a job of members (taken out of the queue, n >= 1): leases, segments, pieces. Those for whom the lease table has no room now are
 * moved to the end of members, *ret_n is how many are in. Members that fail are in it with their reason. No lock may be held.
 * Errors: -ENOMEM, -EAGAIN (no lease words for the first; nothing was done). */
int attend_job_create(struct attend_request **members, uint32_t n, double nsec_per_unit, uint64_t slice_usec,
                      struct attend_job **ret, uint32_t *ret_n);
/* The next piece; there is one (next_piece < n_pieces). By lock. */
struct attend_piece attend_job_next(struct attend_job *job);
/* Nobody waited for this piece, which has been skipped. If that is so for all that is left of its segment, it is taken off the counts of its
 * members and of the job. By lock. */
void attend_job_skip(struct attend_job *job, const struct attend_piece *piece);
/* Gives its leases back. The members are not its own. */
struct attend_job *attend_job_destroy(struct attend_job *job);

/* ---- attend_work.c ---- */

/* The first to say so names the reason. Any thread. */
void attend_request_fail(struct attend_request *rq, enum ring_reason reason, uint64_t given, uint64_t allowed);
/* It is not to be computed any further. Looks at its deadline and at the worker's word. No lock may be held. */
bool attend_request_over(struct attend_request *rq, uint64_t now_usec);
/* Computes a piece and merges it into its members' results. Returns the bytes of codes that it read, 0 for rows whose codes the piece before
 * has read. *ret_skipped: nobody waited for it, and nothing was done. */
uint64_t attend_piece_run(const struct attend *attend, struct attend_job *job, const struct attend_piece *piece,
                          struct attend_scratch *scratch, bool *ret_skipped);
double attend_piece_units(const struct attend_job *job, const struct attend_piece *piece);
void attend_scratch_deinit(struct attend_scratch *scratch);
/* Writes a request's results and its completion, unless the worker is gone. No lock may be held but rings_lock. */
void attend_complete(struct attend_request *rq);
/* The same for a submission that never became a request. By rings_lock. */
void attend_refuse(struct attend_ring *ring, uint64_t ticket, enum ring_reason reason, const struct attend_why *why);
/* Takes it out of its ring and frees it, and the ring if that was the last. By lock. */
void attend_request_end(struct attend *attend, struct attend_request *rq);

#endif
