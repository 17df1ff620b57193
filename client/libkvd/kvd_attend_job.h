/* One attention of the local form, cut into tasks.
 *
 *   unit   the rows of one KV head, in chunks of at most ATTEND_CHUNK_ROWS: an output of its own
 *   run    a run of the blocks that are seen: units with few rows for many threads are cut along the tokens as well
 *   task   one run of one unit; task = unit * n_runs + run. Whoever ends the last run of a unit merges them, in order
 *   seat   memory that a running task needs; as many as tasks may run at once
 *
 * All memory is one piece that grows and is kept: the second attention of the same shape allocates nothing.
 *
 * One thread prepares and finishes; tasks run on any threads, one a seat. Includes: kvd_attend_impl.h, kernels/attn. */
#ifndef KVD_ATTEND_JOB_H
#define KVD_ATTEND_JOB_H

#include "kernels/attn/attn.h"
#include "kvd_attend_impl.h"

enum { ATTEND_CHUNK_ROWS = 128, ATTEND_PARTS_MAX = 1024 };

/* A block that is seen. */
struct attend_source {
    const uint8_t *tile; /* of KV head 0; head h's is h * layout->bytes further on */
    const struct tile_layout *layout;
    uint32_t block; /* of the sequence */
};

struct attend_job {
    struct attend_call call;
    uint32_t chunk_rows, n_chunks, n_units, n_runs, n_tasks, n_seats;
    size_t n_used;  /* blocks that are seen */
    uint64_t bytes; /* of the layer in them, as they are packed */
    bool trial;     /* only a measurement: the result is dropped, and notes are left to who asked for it */

    void *memory;
    size_t memory_bytes;
    float *q;                       /* [n_kv_heads][n_rows][dim_k] */
    uint32_t *pos;                  /* [n_rows] */
    struct attend_source *sources;  /* [n_used] */
    float *o, *lse;                 /* a slot's [chunk_rows][dim_o], [chunk_rows]; a slot a seat, or a task if n_runs > 1 */
    float *block_lse;               /* a slot's [chunk_rows][n_used]; a slot a seat, or a unit if n_runs > 1; none without mass */
    double *mass;                   /* [n_seats][n_used] */
    uint64_t *n_seen;               /* [n_seats]: rows that saw anything */
    _Atomic uint32_t *runs_left;    /* [n_units] */
    struct attn_block *seat_blocks; /* [n_seats][n_used] */
    uint8_t *seat_work;             /* [n_seats][work_bytes] */
    size_t work_bytes;
    _Atomic uint32_t n_bad; /* rows whose result is no number */
    _Atomic int error;
};

/* Checks, and makes it ready for up to n_parts tasks at once. Maps blocks (a round trip where one was never mapped).
 * Errors: those of kvd_attend(). */
int attend_job_prepare(struct attend_job *job, struct kvd_prefix *prefix, const struct kvd_attention *attention,
                       uint32_t n_parts);
/* Runs a task below n_tasks in a seat below n_seats. True: it was the last of its unit. */
bool attend_job_run(struct attend_job *job, uint32_t task, uint32_t seat);
/* After all tasks: mass, and whether the result counts. */
int attend_job_finish(struct attend_job *job);
void attend_job_deinit(struct attend_job *job);

/* The prefix's own one, made when first needed. NULL: no memory. */
struct attend_job *attend_job_of(struct kvd_prefix *prefix);

#endif
