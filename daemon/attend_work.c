/* Pieces of a job, and the way of a result to its worker. */
#include <errno.h>
#include <linux/futex.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "daemon/attend-internal.h"
#include "daemon/fault.h"
#include "daemon/probes.h"

/* ---- what has gone wrong with a request ---- */

void attend_request_fail(struct attend_request *rq, enum ring_reason reason, uint64_t given, uint64_t allowed)
{
    if (atomic_exchange_explicit(&rq->failing, true, memory_order_relaxed))
        return;
    rq->given = given;
    rq->allowed = allowed;
    atomic_store_explicit(&rq->reason, reason, memory_order_release);
}

bool attend_request_over(struct attend_request *rq, uint64_t now_usec)
{
    bool dead, cancelled;

    if (atomic_load_explicit(&rq->reason, memory_order_relaxed))
        return true;
    pthread_mutex_lock(&rq->ring->done_lock);
    dead = rq->ring->dead;
    cancelled = !dead && atomic_load_explicit(rq->cancelled, memory_order_relaxed) != 0;
    pthread_mutex_unlock(&rq->ring->done_lock);
    if (dead || cancelled)
        attend_request_fail(rq, RING_CANCELLED, 0, 0);
    else if (rq->deadline_usec && now_usec > rq->deadline_usec)
        attend_request_fail(rq, RING_DEADLINE, now_usec - rq->taken_usec,
                            rq->deadline_usec > rq->taken_usec ? rq->deadline_usec - rq->taken_usec : 0);
    else
        return false;
    return true;
}

/* ---- pieces ---- */

/* Where the parts of a thread's numbers are, for a piece of n rows and n_blocks blocks. */
struct numbers {
    float *q, *o, *lse, *block_lse;
};

static size_t rounded(size_t n)
{
    return (n + 15) / 16 * 16;
}

static int prepare(struct attend_scratch *s, const struct attend_kind *k, uint32_t n_rows, uint32_t n_blocks, bool mass,
                   struct numbers *ret)
{
    size_t q = rounded((size_t)n_rows * k->dim_k), o = rounded((size_t)n_rows * k->params.dim_o), lse = rounded(n_rows),
           sums = mass ? rounded((size_t)n_rows * n_blocks) : 0,
           work = attn_work_bytes(n_rows, k->space->block_tokens, k->dim_k, k->params.dim_o);

    if (!s->pos)
        s->pos = malloc(ATTEND_ROWS_MAX * sizeof(*s->pos));
    if (!s->blocks)
        s->blocks = malloc(ATTEND_PIECE_BLOCKS_MAX * sizeof(*s->blocks));
    if (s->n_numbers < q + o + lse + sums) {
        free(s->numbers);
        s->n_numbers = q + o + lse + sums;
        s->numbers = aligned_alloc(64, s->n_numbers * sizeof(float));
    }
    if (s->work_bytes < work) {
        free(s->work);
        s->work_bytes = (work + 63) / 64 * 64;
        s->work = aligned_alloc(64, s->work_bytes);
    }
    if (!s->numbers)
        s->n_numbers = 0;
    if (!s->work)
        s->work_bytes = 0;
    if (!s->pos || !s->blocks || !s->numbers || (work && !s->work))
        return -ENOMEM;
    *ret = (struct numbers){.q = s->numbers, .o = s->numbers + q, .lse = s->numbers + q + o,
                            .block_lse = mass ? s->numbers + q + o + lse : NULL};
    return 0;
}

void attend_scratch_deinit(struct attend_scratch *s)
{
    free(s->work);
    free(s->numbers);
    free(s->pos);
    free(s->blocks);
    *s = (struct attend_scratch){0};
}

/* A run of a piece's rows that belong to one member. */
struct run {
    struct attend_request *rq;
    uint32_t row;  /* in the piece */
    uint32_t from; /* in the member's rows of a KV head */
    uint32_t n;
};

/* The next run; false: there is none. io_member, io_row: where to go on (of the segment), 0 at first. */
static bool next_run(const struct attend_job *j, const struct attend_piece *p, uint32_t *io_member, uint32_t *io_row, struct run *ret)
{
    const struct attend_segment *s = &j->segments[p->segment];

    while (*io_member < s->n_members) {
        uint32_t number = j->order[s->member0 + *io_member], lo = *io_row, hi = lo + j->n_rows[number], from = lo > p->row0 ? lo : p->row0,
                 to = hi < p->row1 ? hi : p->row1;

        ++*io_member;
        *io_row = hi;
        if (from < to) {
            *ret = (struct run){.rq = j->members[number], .row = from - p->row0, .from = from - lo, .n = to - from};
            return true;
        }
    }
    return false;
}

/* Blocks of the piece for one KV head. Returns their number; ret_bytes: of their tiles. */
static uint32_t list_blocks(const struct attend_job *j, const struct attend_piece *p, uint32_t head, struct attn_block *ret,
                            uint64_t *ret_bytes)
{
    const struct attend_segment *s = &j->segments[p->segment];
    const struct attend_kind *k = &j->kind;
    uint32_t n = 0;

    *ret_bytes = 0;
    for (uint32_t b = p->block0; b < p->block1; b++) {
        const struct attend_block *from = &j->blocks[s->block0 + b];
        const struct payload_part *part = from->first ? k->part_first : k->part;

        if (!from->payload)
            continue;
        ret[n++] = (struct attn_block){.tile = from->payload + part->off + (uint64_t)head * part->tile.bytes,
                                       .layout = &part->tile,
                                       .pos = k->first_pos + (s->from + b) * k->space->block_tokens,
                                       .n_tokens = k->space->block_tokens};
        *ret_bytes += part->tile.bytes;
    }
    return n;
}

/* Sums of blocks of one run go to where the member keeps them: block_lse is [row][those that are not left out]. */
static void keep_block_sums(const struct attend_job *j, const struct attend_piece *p, uint32_t head, const struct run *run,
                            const float *block_lse, uint32_t n_listed)
{
    const struct attend_segment *s = &j->segments[p->segment];
    struct attend_request *rq = run->rq;

    for (uint32_t r = 0; r < run->n; r++) {
        float *to = rq->block_lse + ((size_t)head * rq->n_rows + run->from + r) * rq->n_refs + s->from;
        uint32_t at = 0;

        for (uint32_t b = p->block0; b < p->block1; b++)
            if (j->blocks[s->block0 + b].payload)
                to[b] = block_lse[(size_t)(run->row + r) * n_listed + at++];
    }
}

static void merge(struct attend_job *j, const struct attend_piece *p, uint32_t head, const struct numbers *n, uint32_t n_listed)
{
    uint32_t member = 0, row = 0;
    struct run run;

    pthread_mutex_lock(&j->head[head]);
    while (next_run(j, p, &member, &row, &run)) {
        uint32_t dim = run.rq->kind.params.dim_o;
        size_t at = (size_t)head * run.rq->n_rows + run.from;

        for (uint32_t r = 0; r < run.n; r++)
            attn_merge(run.rq->o + (at + r) * dim, &run.rq->lse[at + r], n->o + (size_t)(run.row + r) * dim, n->lse[run.row + r], dim);
        if (run.rq->block_lse)
            keep_block_sums(j, p, head, &run, n->block_lse, n_listed);
    }
    pthread_mutex_unlock(&j->head[head]);
}

/* All that a piece is for has failed or been given up: it need not be computed. */
static bool nobody_waits(const struct attend_job *j, const struct attend_piece *p)
{
    uint64_t now = attend_now_usec();
    uint32_t member = 0, row = 0;
    struct run run;

    while (next_run(j, p, &member, &row, &run))
        if (!attend_request_over(run.rq, now))
            return false;
    return true;
}

static void fail_piece(const struct attend_job *j, const struct attend_piece *p, uint64_t bytes)
{
    uint32_t member = 0, row = 0;
    struct run run;

    while (next_run(j, p, &member, &row, &run))
        attend_request_fail(run.rq, RING_MEMORY, bytes, 0);
}

uint64_t attend_piece_run(const struct attend *a, struct attend_job *j, const struct attend_piece *p, struct attend_scratch *scratch,
                          bool *ret_skipped)
{
    const struct attend_kind *k = &j->kind;
    uint32_t n_rows = p->row1 - p->row0;
    uint64_t bytes = 0;
    struct numbers n;

    FAULT_POINT("attend-piece");
    *ret_skipped = nobody_waits(j, p);
    if (*ret_skipped)
        return 0;
    if (prepare(scratch, k, n_rows, p->block1 - p->block0, j->wants_mass, &n) < 0) {
        fail_piece(j, p, scratch->n_numbers * sizeof(float));
        return 0;
    }
    for (uint32_t head = p->head0; head < p->head1; head++) {
        struct attn_rows rows = {.n = n_rows, .q = n.q, .q_pos = scratch->pos};
        struct attn_out out = {.o = n.o, .lse = n.lse, .block_lse = n.block_lse};
        uint32_t member = 0, row = 0, n_blocks;
        uint64_t head_bytes;
        struct run run;

        while (next_run(j, p, &member, &row, &run)) {
            memcpy(n.q + (size_t)run.row * k->dim_k, run.rq->q + ((size_t)head * run.rq->n_rows + run.from) * k->dim_k,
                   (size_t)run.n * k->dim_k * sizeof(float));
            for (uint32_t r = 0; r < run.n; r++)
                scratch->pos[run.row + r] = run.rq->positions[(run.from + r) / run.rq->ratio];
        }
        n_blocks = list_blocks(j, p, head, scratch->blocks, &head_bytes);
        if (attn_partial(a->config.ops, &k->params, scratch->blocks, n_blocks, &rows, &out, scratch->work) < 0) {
            fail_piece(j, p, 0); /* the request was checked: this is a defect of ours, and no reason to end the daemon */
            return bytes;
        }
        merge(j, p, head, &n, n_blocks);
        bytes += p->row0 ? 0 : head_bytes; /* for the rows that come after, they are in the cache */
    }
    return bytes;
}

double attend_piece_units(const struct attend_job *j, const struct attend_piece *p)
{
    const struct attend_kind *k = &j->kind;

    return attend_units((uint64_t)(p->block1 - p->block0) * k->space->block_tokens, p->head1 - p->head0, p->row1 - p->row0,
                        k->dim_k + k->params.dim_o);
}

/* ---- completion ---- */

/* By done_lock, the ring not being dead. Returns true if the worker is to be woken. */
static bool post(struct attend_ring *ring, const struct shm_completion *c)
{
    struct shm_rings *words = ring->view.words;
    uint32_t tail = atomic_load_explicit(&ring->done, memory_order_relaxed);

    memcpy(&ring->view.completions[tail % ring->view.n], c, sizeof(*c));
    atomic_store_explicit(&ring->done, tail + 1, memory_order_release);
    /* seq_cst, and a fence between the two: partner of a worker that counts itself among the sleepers and then looks at done_tail. */
    atomic_store_explicit(&words->done_tail, tail + 1, memory_order_seq_cst);
    atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(&words->sleepers, memory_order_relaxed) != 0;
}

/* Writes a completion, with results written by write() (NULL: none), and wakes the worker's threads if some sleep. */
static void answer(struct attend_ring *ring, const struct shm_completion *c, void (*write)(const struct attend_request *rq),
                   const struct attend_request *rq)
{
    bool wake = false;

    pthread_mutex_lock(&ring->done_lock);
    if (!ring->dead) {
        if (write)
            write(rq);
        wake = post(ring, c);
        if (wake) /* the page is mapped for as long as the lock is held */
            syscall(SYS_futex, &ring->view.words->done_tail, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
        if (ring->tell_fd >= 0)
            eventfd_write(ring->tell_fd, 1);
    }
    pthread_mutex_unlock(&ring->done_lock);
    /* release: after the completion has been counted (attend_ring_ready()). */
    atomic_fetch_sub_explicit(&ring->n_open, 1, memory_order_release);
}

void attend_refuse(struct attend_ring *ring, uint64_t ticket, enum ring_reason reason, const struct attend_why *why)
{
    struct shm_completion c = {.ticket = ticket, .reason = reason, .n_together = 1, .given = why->given, .allowed = why->allowed};

    answer(ring, &c, NULL, NULL);
}

/* Share of all attention of the request that went to each block: the mean over the rows that saw anything. It takes the place of the first
 * row's sums, so that worker memory is not held while it is computed. */
static void compute_mass(struct attend_request *rq)
{
    uint32_t n = rq->kind.n_kv_heads * rq->n_rows, n_seen = 0;

    for (uint32_t r = 0; r < n; r++)
        n_seen += isfinite(rq->lse[r]) != 0;
    for (uint32_t b = 0; b < rq->n_refs; b++) {
        double sum = 0;

        for (uint32_t r = 0; r < n; r++)
            if (isfinite(rq->lse[r]))
                sum += exp((double)rq->block_lse[(size_t)r * rq->n_refs + b] - (double)rq->lse[r]);
        rq->block_lse[b] = n_seen ? (float)(sum / n_seen) : 0;
    }
}

static void write_results(const struct attend_request *rq)
{
    size_t n = (size_t)rq->kind.n_kv_heads * rq->n_rows;

    memcpy(rq->at + rq->o_off, rq->o, n * rq->kind.params.dim_o * sizeof(float));
    memcpy(rq->at + rq->lse_off, rq->lse, n * sizeof(float));
    if (rq->block_lse)
        memcpy(rq->at + rq->mass_off, rq->block_lse, rq->n_refs * sizeof(float));
}

/* Scores beyond fp32 have no result, and that is not to look like one. */
static void check_range(struct attend_request *rq)
{
    uint32_t n = rq->kind.n_kv_heads * rq->n_rows, n_bad = 0;

    for (uint32_t r = 0; r < n; r++)
        n_bad += !(rq->lse[r] < INFINITY);
    if (n_bad)
        attend_request_fail(rq, RING_RANGE, n_bad, n);
}

void attend_complete(struct attend_request *rq)
{
    if (!atomic_load_explicit(&rq->reason, memory_order_acquire))
        check_range(rq);

    uint64_t now = attend_now_usec(), begun = rq->begun_usec ? rq->begun_usec : now;
    struct shm_completion c = {
        .ticket = rq->ticket,
        .reason = atomic_load_explicit(&rq->reason, memory_order_acquire),
        .n_together = rq->n_together ? rq->n_together : 1,
        .waited_usec = (uint32_t)(begun - rq->taken_usec),
        .took_usec = (uint32_t)(now - begun),
    };

    if (c.reason != RING_DONE) {
        c.given = rq->given;
        c.allowed = rq->allowed;
    } else if (rq->block_lse) {
        compute_mass(rq);
    }
    FAULT_POINT("attend-complete");
    PROBE3(attend_completion, rq->ticket, c.reason, c.took_usec);
    answer(rq->ring, &c, c.reason == RING_DONE ? write_results : NULL, rq);
}

void attend_request_end(struct attend *a, struct attend_request *rq)
{
    struct attend_ring *ring = rq->ring;

    if (rq->prev)
        rq->prev->next = rq->next;
    else
        ring->requests = rq->next;
    if (rq->next)
        rq->next->prev = rq->prev;
    if (!ring->requests)
        ring->tenant->n_active--;
    ring->bytes -= rq->bytes;
    a->bytes -= rq->bytes;
    free(rq);
    if (--ring->n_refs == 0) {
        pthread_mutex_destroy(&ring->done_lock);
        free(ring);
    }
}
