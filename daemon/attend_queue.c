/* Who is next: fair queueing between tenants and between the workers of each, and what belongs together.
 *
 * Work is measured in units (attend_units(): about proportional to time), and done in pieces. Before each piece:
 *
 * 1. The tenant is chosen that was served least. One that has asked for nothing for a while starts level with the least served of the
 *    others: it gets its share from then on, and no more for having waited.
 * 2. Among its workers' requests the smallest tag is next. A request gets it when it arrives:
 *
 *      start = max(virtual time of the tenant, tag of the worker's last request)          tag = start + cost
 *
 *    also in the middle of a job: a request with a smaller tag than the job at work goes first. Virtual time is the start of the latest request
 *    that has begun. So a small request of a worker that asked for little lately has a smaller tag than a large one that runs, and waits for a
 *    piece at most; a worker that asks for much gets its share, as its tags run ahead of virtual time; and nobody waits for ever, as
 *    later tags grow with it. What was saved by sharing is given back to the tags of those who shared. Start-time fair queueing:
 *    Goyal, Vin, Cheng, SIGCOMM 1996.
 *
 * Requests are in a heap by tag and in buckets by what they have in common; a request costs O(log n) in the one and O(1) in the other. */
#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/attend-internal.h"

/* Cost of a token of one KV head: reading it, and using it for each row. Measured with the AVX-512 variant: about so many rows cost as
 * much as the first look at a token's codes. */
#define ROWS_PER_LOOK 2.0
#define TOKENS_A_READ 4 /* about as many as it costs to take a request in and to write its answer, row by row */
#define ALIKE 4.0 /* costs of requests that are computed together are within this factor */

double attend_units(uint64_t n_tokens, uint32_t n_kv_heads, uint32_t n_rows, uint32_t dims)
{
    return (double)n_tokens * n_kv_heads * dims * (1.0 + n_rows / ROWS_PER_LOOK);
}

/* ---- heap ---- */

static bool before(const struct attend_request *a, const struct attend_request *b)
{
    return a->tag < b->tag || (a->tag == b->tag && a->taken_usec < b->taken_usec);
}

static void heap_put(struct attend_tenant *t, uint32_t at, struct attend_request *rq)
{
    t->heap[at] = rq;
    rq->heap_at = at;
}

static void heap_up(struct attend_tenant *t, uint32_t at, struct attend_request *rq)
{
    for (; at > 0 && before(rq, t->heap[(at - 1) / 2]); at = (at - 1) / 2)
        heap_put(t, at, t->heap[(at - 1) / 2]);
    heap_put(t, at, rq);
}

static void heap_down(struct attend_tenant *t, uint32_t at, struct attend_request *rq)
{
    for (uint32_t child; (child = 2 * at + 1) < t->n_heap; at = child) {
        if (child + 1 < t->n_heap && before(t->heap[child + 1], t->heap[child]))
            child++;
        if (!before(t->heap[child], rq))
            break;
        heap_put(t, at, t->heap[child]);
    }
    heap_put(t, at, rq);
}

static void heap_remove(struct attend_tenant *t, struct attend_request *rq)
{
    uint32_t at = rq->heap_at;
    struct attend_request *last = t->heap[--t->n_heap];

    assert(t->heap[at] == rq || last == rq);
    if (last == rq)
        return;
    if (at > 0 && before(last, t->heap[(at - 1) / 2]))
        heap_up(t, at, last);
    else
        heap_down(t, at, last);
}

/* ---- buckets ---- */

/* What requests must have in common to be computed together: all that attn_partial() is given once, and the first block. Hashed with
 * a seed, so that no worker can choose who shares a bucket. */
static uint64_t hash_of(const struct attend *a, const struct attend_request *rq)
{
    uint32_t scale, softcap;
    uint64_t words[6], h = a->hash_seed;

    memcpy(&scale, &rq->kind.params.scale, sizeof(scale));
    memcpy(&softcap, &rq->kind.params.softcap, sizeof(softcap));
    words[0] = (uint64_t)(uintptr_t)rq->ring->tenant;
    words[1] = (uint64_t)rq->kind.space->id << 32 | rq->kind.layer;
    words[2] = (uint64_t)scale << 32 | softcap;
    words[3] = (uint64_t)rq->kind.params.window << 32 | rq->kind.params.sink_tokens;
    words[4] = (uint64_t)rq->kind.params.dim_o << 32 | rq->kind.first_pos;
    words[5] = rq->n_refs ? rq->refs[0] : 0;
    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        h = (h ^ words[i]) * UINT64_C(0x9e3779b97f4a7c15);
        h ^= h >> 29;
    }
    return h;
}

bool attend_same_kind(const struct attend_request *a, const struct attend_request *b)
{
    return a->hash == b->hash && a->ring->tenant == b->ring->tenant && a->kind.space == b->kind.space && a->kind.layer == b->kind.layer &&
           a->kind.first_pos == b->kind.first_pos && a->n_refs && b->n_refs && a->refs[0] == b->refs[0] &&
           a->kind.params.scale == b->kind.params.scale && a->kind.params.softcap == b->kind.params.softcap && a->kind.params.window == b->kind.params.window &&
           a->kind.params.sink_tokens == b->kind.params.sink_tokens && a->kind.params.dim_o == b->kind.params.dim_o;
}

static void bucket_add(struct attend *a, struct attend_request *rq)
{
    struct attend_request **first = &a->buckets[rq->hash % ATTEND_BUCKETS].first, **last = &a->buckets[rq->hash % ATTEND_BUCKETS].last;

    rq->bucket_next = NULL;
    rq->bucket_prev = *last;
    if (*last)
        (*last)->bucket_next = rq;
    else
        *first = rq;
    *last = rq;
}

static void bucket_remove(struct attend *a, struct attend_request *rq)
{
    if (rq->bucket_prev)
        rq->bucket_prev->bucket_next = rq->bucket_next;
    else
        a->buckets[rq->hash % ATTEND_BUCKETS].first = rq->bucket_next;
    if (rq->bucket_next)
        rq->bucket_next->bucket_prev = rq->bucket_prev;
    else
        a->buckets[rq->hash % ATTEND_BUCKETS].last = rq->bucket_prev;
}

/* ---- queue ---- */

static int heap_room(struct attend_tenant *t)
{
    uint32_t least = t->n_heap + 1 + ATTEND_JOBS_MAX * ATTEND_MEMBERS_MAX, room = t->heap_room;
    struct attend_request **grown;

    /* Requests that are being worked on may come back: each has its place. */
    if (least <= room)
        return 0;
    while (room < least)
        room = room ? room * 2 : 1024;
    grown = realloc(t->heap, room * sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    t->heap = grown;
    t->heap_room = room;
    return 0;
}

static bool active(const struct attend_tenant *t)
{
    return t->n_heap || t->n_jobs;
}

/* A tenant asks again: level with the least served of those that ask. */
static void catch_up(const struct attend *a, struct attend_tenant *t)
{
    double least = INFINITY;

    for (const struct attend_tenant *other = a->tenants; other; other = other->next)
        if (other != t && active(other) && other->served < least)
            least = other->served;
    if (isfinite(least) && t->served < least)
        t->served = least;
}

static void wait_again(struct attend *a, struct attend_request *rq)
{
    struct attend_tenant *t = rq->ring->tenant;

    rq->state = ATTEND_WAITING;
    heap_up(t, t->n_heap++, rq);
    bucket_add(a, rq);
    a->n_waiting++;
}

int attend_queue_add(struct attend *a, struct attend_request *rq)
{
    struct attend_ring *ring = rq->ring;
    struct attend_tenant *t = ring->tenant;
    const struct attend_kind *k = &rq->kind;

    if (heap_room(t) < 0)
        return -ENOMEM;
    if (!active(t))
        catch_up(a, t);
    if (!ring->requests)
        t->n_active++;
    rq->prev = NULL;
    rq->next = ring->requests;
    if (rq->next)
        rq->next->prev = rq;
    ring->requests = rq;
    ring->n_refs++;
    ring->bytes += rq->bytes;
    a->bytes += rq->bytes;
    rq->read_cost = attend_units(TOKENS_A_READ, k->n_kv_heads, rq->n_rows, k->dim_k + k->params.dim_o);
    rq->cost = rq->read_cost + attend_units((uint64_t)rq->n_refs * k->space->block_tokens, k->n_kv_heads, rq->n_rows, k->dim_k + k->params.dim_o);
    rq->start = ring->finish > t->now ? ring->finish : t->now;
    rq->tag = ring->finish = rq->start + rq->cost;
    rq->hash = hash_of(a, rq);
    wait_again(a, rq);
    return 0;
}

void attend_queue_return(struct attend *a, struct attend_request *rq)
{
    wait_again(a, rq);
}

void attend_queue_remove(struct attend *a, struct attend_request *rq)
{
    heap_remove(rq->ring->tenant, rq);
    bucket_remove(a, rq);
    rq->state = ATTEND_WORKING;
    a->n_waiting--;
}

struct attend_job *attend_queue_job(const struct attend_tenant *t)
{
    struct attend_job *best = NULL;

    for (struct attend_job *j = t->jobs; j; j = j->next)
        if (j->next_piece < j->n_pieces && (!best || j->tag < best->tag))
            best = j;
    return best;
}

bool attend_queue_first(const struct attend_tenant *t, const struct attend_job *job)
{
    return t->n_heap && !t->blocked && t->n_jobs < ATTEND_JOBS_MAX && (!job || t->heap[0]->tag < job->tag);
}

struct attend_tenant *attend_queue_tenant(const struct attend *a)
{
    struct attend_tenant *best = NULL;

    for (struct attend_tenant *t = a->tenants; t; t = t->next)
        if ((!best || t->served < best->served) && (attend_queue_first(t, NULL) || attend_queue_job(t)))
            best = t;
    return best;
}

uint32_t attend_queue_take(struct attend *a, struct attend_tenant *t, struct attend_request **ret)
{
    struct attend_request *first = t->heap[0], *next;
    uint32_t n = 0;

    if (first->start > t->now)
        t->now = first->start;
    ret[n++] = first;
    next = a->buckets[first->hash % ATTEND_BUCKETS].first;
    attend_queue_remove(a, first);
    while (next && n < ATTEND_MEMBERS_MAX) {
        struct attend_request *rq = next;

        next = rq->bucket_next;
        /* Those of about its size: a small one that took large ones along would wait for them, and they need it least. */
        if (rq == first || !attend_same_kind(rq, first) || rq->cost > first->cost * ALIKE || rq->cost * ALIKE < first->cost)
            continue;
        attend_queue_remove(a, rq);
        ret[n++] = rq;
    }
    return n;
}
