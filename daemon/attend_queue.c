/* Who is next: fair queueing between workers, and what belongs together.
 *
 * Each request has a cost (attend_units(): about proportional to its time) and gets a tag when it arrives:
 *
 *   start = max(virtual time, tag of its worker's last request)      tag = start + cost * workers of its tenant that have requests
 *
 * The smallest tag is next, also in the middle of another job: jobs are cut into pieces, and between two pieces a request with a smaller
 * tag goes first. Virtual time is the start of the latest request that has begun. So
 *   - a small request of a worker that asked for nothing lately has a smaller tag than a large one that runs, and waits for a piece at most;
 *   - a worker that asks for much gets its share and no more: its tags run ahead of virtual time;
 *   - a tenant does not get more by having more workers;
 *   - nobody waits for ever: tags of those that come later grow with virtual time.
 * What was saved by sharing is given back to the tags of those that shared (attend_job.c says how much). Start-time fair queueing: Goyal,
 * Vin, Cheng, SIGCOMM 1996.
 *
 * Requests are in a heap by tag and in buckets by what they have in common; a request costs O(log n) in the one and O(1) in the other. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/attend-internal.h"

/* Cost of a token of one KV head: reading it, and using it for each row. Measured with the AVX-512 variant: about so many rows cost as
 * much as the first look at a token's codes. */
#define ROWS_PER_LOOK 8.0

double attend_units(uint64_t n_tokens, uint32_t n_kv_heads, uint32_t n_rows, uint32_t dims)
{
    return (double)n_tokens * n_kv_heads * dims * (1.0 + n_rows / ROWS_PER_LOOK);
}

/* ---- heap ---- */

static bool before(const struct attend_request *a, const struct attend_request *b)
{
    return a->tag < b->tag || (a->tag == b->tag && a->taken_usec < b->taken_usec);
}

static void heap_put(struct attend *a, uint32_t at, struct attend_request *rq)
{
    a->heap[at] = rq;
    rq->heap_at = at;
}

static void heap_up(struct attend *a, uint32_t at, struct attend_request *rq)
{
    for (; at > 0 && before(rq, a->heap[(at - 1) / 2]); at = (at - 1) / 2)
        heap_put(a, at, a->heap[(at - 1) / 2]);
    heap_put(a, at, rq);
}

static void heap_down(struct attend *a, uint32_t at, struct attend_request *rq)
{
    for (uint32_t child; (child = 2 * at + 1) < a->n_heap; at = child) {
        if (child + 1 < a->n_heap && before(a->heap[child + 1], a->heap[child]))
            child++;
        if (!before(a->heap[child], rq))
            break;
        heap_put(a, at, a->heap[child]);
    }
    heap_put(a, at, rq);
}

static void heap_remove(struct attend *a, struct attend_request *rq)
{
    uint32_t at = rq->heap_at;
    struct attend_request *last = a->heap[--a->n_heap];

    assert(a->heap[at] == rq || last == rq);
    if (last == rq)
        return;
    if (at > 0 && before(last, a->heap[(at - 1) / 2]))
        heap_up(a, at, last);
    else
        heap_down(a, at, last);
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

static int heap_room(struct attend *a)
{
    uint32_t room = a->heap_room ? a->heap_room * 2 : 256;
    struct attend_request **grown;

    /* Requests that are being worked on may come back: each has its place. */
    if (a->n_heap + ATTEND_JOBS_MAX * ATTEND_MEMBERS_MAX < a->heap_room)
        return 0;
    if (room < a->n_heap + 2 * ATTEND_JOBS_MAX * ATTEND_MEMBERS_MAX)
        room = a->n_heap + 2 * ATTEND_JOBS_MAX * ATTEND_MEMBERS_MAX;
    grown = realloc(a->heap, room * sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    a->heap = grown;
    a->heap_room = room;
    return 0;
}

static void wait_again(struct attend *a, struct attend_request *rq)
{
    rq->state = ATTEND_WAITING;
    heap_up(a, a->n_heap++, rq);
    bucket_add(a, rq);
}

int attend_queue_add(struct attend *a, struct attend_request *rq)
{
    struct attend_ring *ring = rq->ring;

    if (heap_room(a) < 0)
        return -ENOMEM;
    if (!ring->requests)
        ring->tenant->n_active++;
    rq->prev = NULL;
    rq->next = ring->requests;
    if (rq->next)
        rq->next->prev = rq;
    ring->requests = rq;
    ring->n_refs++;
    ring->bytes += rq->bytes;
    a->bytes += rq->bytes;
    rq->cost = attend_units((uint64_t)rq->n_refs * rq->kind.space->block_tokens, rq->kind.n_kv_heads, rq->n_rows, rq->kind.dim_k + rq->kind.params.dim_o);
    rq->weight = ring->tenant->n_active;
    rq->start = ring->finish > a->now ? ring->finish : a->now;
    rq->tag = ring->finish = rq->start + rq->cost * rq->weight;
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
    heap_remove(a, rq);
    bucket_remove(a, rq);
    rq->state = ATTEND_WORKING;
}

uint32_t attend_queue_take(struct attend *a, struct attend_request **ret)
{
    struct attend_request *first = a->heap[0], *next;
    uint32_t n = 0;

    if (first->start > a->now)
        a->now = first->start;
    ret[n++] = first;
    next = a->buckets[first->hash % ATTEND_BUCKETS].first;
    attend_queue_remove(a, first);
    while (next && n < ATTEND_MEMBERS_MAX) {
        struct attend_request *rq = next;

        next = rq->bucket_next;
        if (rq == first || !attend_same_kind(rq, first))
            continue;
        attend_queue_remove(a, rq);
        ret[n++] = rq;
    }
    return n;
}
