/* From a worker's ring to a request of our own.
 *
 * Everything that is read here belongs to the worker, and it may change while it is read. So each word is copied once, what was copied
 * is checked, and only the copy is used. Where a number of the worker is an offset or a length, here is where it is bounded:
 *
 *   submission   number of the memory < n_memories; [off, off + bytes) within the memory; off aligned
 *   request      each part [x_off, x_off + its size) within [128, bytes), aligned; its size follows from bounded counts
 *   refs         compared with the index when the request's turn comes (attend_job.c)
 *   positions    any number: only compared
 *   q            any bits: a number that is not finite is an error of this request */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/attend-internal.h"
#include "daemon/fault.h"
#include "daemon/probes.h"

uint64_t attend_now_usec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* Copies from memory that another process may be writing: bytes come as they are at some moment, each once. */
static void copy_once(void *to, const void *from, size_t n)
{
    memcpy(to, from, n);
    __asm__ volatile("" : : "r"(to) : "memory"); /* what was copied is not read again from where it came */
}

static enum ring_reason why(struct attend_why *ret, enum ring_reason reason, uint64_t given, uint64_t allowed)
{
    *ret = (struct attend_why){given, allowed};
    return reason;
}

/* ---- checks of the copied header ---- */

struct reading {
    const struct attend_limits *limits;
    const struct cache *cache;
    struct shm_request h;
    uint64_t room;
    const struct space *space;
    const struct payload_layer *layer;
    uint32_t ratio, n_rows, all_rows; /* rows of a KV head, of all heads */
};

static enum ring_reason check_header(const struct reading *r, struct attend_why *ret)
{
    static const uint8_t zeros[sizeof(r->h.reserved)];

    if (r->h.header_bytes != sizeof(r->h) || (r->h.flags & ~(uint32_t)SHM_REQUEST_MASS) != 0 ||
        memcmp(r->h.reserved, zeros, sizeof(zeros)) != 0)
        return why(ret, RING_HEADER, r->h.header_bytes, sizeof(r->h));
    if (r->room > r->limits->request_bytes)
        return why(ret, RING_BYTES, r->room, r->limits->request_bytes);
    return RING_DONE;
}

static enum ring_reason check_shape(struct reading *r, struct attend_why *ret)
{
    const struct shm_request *h = &r->h;
    uint32_t dim_most;

    r->space = cache_space_find(r->cache, h->space);
    if (!r->space)
        return why(ret, RING_SPACE, h->space, 0);
    if (h->layer >= r->space->n_layers)
        return why(ret, RING_LAYER, h->layer, r->space->n_layers);
    r->layer = &r->space->layers[h->layer];
    if (h->n_heads == 0 || h->n_heads > ATTEND_HEADS_MAX || h->n_heads % r->layer->n_kv_heads != 0)
        return why(ret, RING_HEADS, h->n_heads, r->layer->n_kv_heads);
    if (h->n_tokens == 0 || h->n_tokens > ATTEND_TOKENS_MAX)
        return why(ret, RING_TOKENS, h->n_tokens, ATTEND_TOKENS_MAX);
    if (codec_dtype_bytes((enum codec_dtype)h->dtype) == 0)
        return why(ret, RING_DTYPE, h->dtype, 0);
    dim_most = r->layer->dim_v ? r->layer->dim_v : r->layer->dim_k;
    if (h->dim_o == 0 || h->dim_o % 16 || h->dim_o > dim_most || (r->layer->dim_v && h->dim_o != r->layer->dim_v))
        return why(ret, RING_DIM, h->dim_o, dim_most);
    if (!isfinite(h->scale) || !isfinite(h->softcap) || h->softcap < 0)
        return why(ret, RING_NUMBERS, 0, 0);
    if (h->n_refs > r->limits->n_blocks)
        return why(ret, RING_REFS, h->n_refs, r->limits->n_blocks);
    if (h->first_pos + (uint64_t)h->n_refs * r->space->block_tokens > UINT32_MAX)
        return why(ret, RING_POSITION, h->first_pos + (uint64_t)h->n_refs * r->space->block_tokens, UINT32_MAX);
    r->ratio = h->n_heads / r->layer->n_kv_heads;
    r->n_rows = h->n_tokens * r->ratio;
    r->all_rows = h->n_tokens * h->n_heads; /* at most 2^28 */
    return RING_DONE;
}

/* Sizes are products of counts that check_shape() has bounded: below 2^44. */
static enum ring_reason check_parts(const struct reading *r, struct attend_why *ret)
{
    const struct shm_request *h = &r->h;
    const struct {
        uint64_t off, bytes;
    } parts[] = {
        {h->positions_off, (uint64_t)h->n_tokens * sizeof(uint32_t)},
        {h->refs_off, (uint64_t)h->n_refs * sizeof(uint64_t)},
        {h->q_off, (uint64_t)r->all_rows * r->layer->dim_k * codec_dtype_bytes((enum codec_dtype)h->dtype)},
        {h->o_off, (uint64_t)r->all_rows * h->dim_o * sizeof(float)},
        {h->lse_off, (uint64_t)r->all_rows * sizeof(float)},
        {h->mass_off, h->flags & SHM_REQUEST_MASS ? (uint64_t)h->n_refs * sizeof(float) : 0},
    };

    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
        if (parts[i].bytes && (parts[i].off % SHM_ATTEND_ALIGN || parts[i].off < sizeof(*h) || parts[i].bytes > r->room ||
                               parts[i].off > r->room - parts[i].bytes))
            return why(ret, RING_PART, parts[i].off, r->room);
    return RING_DONE;
}

/* ---- our own copy ---- */

static uint64_t aligned(uint64_t n)
{
    return (n + 63) / 64 * 64;
}

static enum ring_reason allocate(const struct reading *r, struct attend_request **ret, struct attend_why *ret_why)
{
    const struct shm_request *h = &r->h;
    bool mass = (h->flags & SHM_REQUEST_MASS) && h->n_refs;
    uint64_t refs = aligned(sizeof(struct attend_request)), positions = refs + aligned(h->n_refs * sizeof(uint64_t)),
             q = positions + aligned(h->n_tokens * sizeof(uint32_t)),
             o = q + aligned((uint64_t)r->all_rows * r->layer->dim_k * sizeof(float)),
             lse = o + aligned((uint64_t)r->all_rows * h->dim_o * sizeof(float)),
             block_lse = lse + aligned(r->all_rows * sizeof(float)),
             bytes = block_lse + (mass ? aligned((uint64_t)r->all_rows * h->n_refs * sizeof(float)) : 0);
    struct attend_request *rq;

    if (bytes > r->limits->request_bytes)
        return why(ret_why, RING_BYTES, bytes, r->limits->request_bytes);
    rq = aligned_alloc(64, bytes);
    if (!rq)
        return why(ret_why, RING_MEMORY, bytes, 0);
    memset(rq, 0, sizeof(*rq));
    rq->bytes = bytes;
    rq->refs = (void *)((char *)rq + refs);
    rq->positions = (void *)((char *)rq + positions);
    rq->q = (void *)((char *)rq + q);
    rq->o = (void *)((char *)rq + o);
    rq->lse = (void *)((char *)rq + lse);
    rq->block_lse = mass ? (void *)((char *)rq + block_lse) : NULL;
    memset(rq->o, 0, (uint64_t)r->all_rows * h->dim_o * sizeof(float));
    for (uint32_t i = 0; i < r->all_rows; i++)
        rq->lse[i] = -INFINITY;
    for (uint64_t i = 0; mass && i < (uint64_t)r->all_rows * h->n_refs; i++)
        rq->block_lse[i] = -INFINITY;
    *ret = rq;
    return RING_DONE;
}

static void fill(const struct reading *r, uint8_t *at, struct attend_request *rq)
{
    const struct shm_request *h = &r->h;
    uint32_t part = 0;
    const struct payload_layout *plain = space_layout(r->space, r->layer->group, false);

    while (plain->parts[part].layer != h->layer)
        part++;
    rq->at = at;
    rq->cancelled = &((const struct shm_request *)(const void *)at)->cancelled;
    rq->o_off = h->o_off;
    rq->lse_off = h->lse_off;
    rq->mass_off = h->mass_off;
    rq->kind.space = r->space;
    rq->kind.layer = h->layer;
    rq->kind.group = r->layer->group;
    rq->kind.part = &plain->parts[part];
    rq->kind.part_first = &space_layout(r->space, r->layer->group, true)->parts[part];
    rq->kind.params = (struct attn_params){.scale = h->scale, .softcap = h->softcap, .window = h->window,
                                      .sink_tokens = h->sink_tokens, .dim_o = h->dim_o};
    rq->n_heads = h->n_heads;
    rq->kind.n_kv_heads = r->layer->n_kv_heads;
    rq->ratio = r->ratio;
    rq->n_tokens = h->n_tokens;
    rq->n_rows = r->n_rows;
    rq->kind.dim_k = r->layer->dim_k;
    rq->n_refs = h->n_refs;
    rq->kind.first_pos = h->first_pos;
    rq->deadline_usec = h->deadline_usec;
    rq->taken_usec = attend_now_usec();
}

/* Queries become fp32; those that are not finite are found in the copy. */
static enum ring_reason copy_queries(const struct attend *a, const struct reading *r, const uint8_t *at, struct attend_request *rq,
                                     struct attend_why *ret)
{
    struct codec_spec raw = codec_spec_raw((enum codec_dtype)r->h.dtype);
    uint64_t n = (uint64_t)r->all_rows * rq->kind.dim_k;
    uint32_t bad = 0;

    if (r->h.dtype == CODEC_F32)
        copy_once(rq->q, at + r->h.q_off, n * sizeof(float));
    else
        for (uint32_t row = 0; row < r->all_rows; row += CODEC_TOKENS_MAX) {
            uint32_t here = r->all_rows - row < CODEC_TOKENS_MAX ? r->all_rows - row : CODEC_TOKENS_MAX;

            codec_decode(a->config.codec, &raw, NULL, NULL, at + r->h.q_off + (uint64_t)row * rq->kind.dim_k * 2, here, rq->kind.dim_k, 0, here,
                         CODEC_F32, rq->q + (uint64_t)row * rq->kind.dim_k, rq->kind.dim_k * sizeof(float));
        }
    for (uint64_t i = 0; i < n; i++) {
        uint32_t bits;

        memcpy(&bits, &rq->q[i], sizeof(bits));
        bad |= (bits & UINT32_C(0x7f800000)) == UINT32_C(0x7f800000);
    }
    for (uint64_t i = 0; bad && i < n; i++)
        if (!isfinite(rq->q[i]))
            return why(ret, RING_QUERY, i, 0);
    return RING_DONE;
}

enum ring_reason attend_request_read(const struct attend *a, const struct attend_limits *limits, const struct cache *cache,
                                     uint8_t *at, uint64_t room, struct attend_request **ret, struct attend_why *ret_why)
{
    struct reading r = {.limits = limits, .cache = cache, .room = room};
    struct attend_request *rq;
    enum ring_reason reason;

    if (room < sizeof(r.h))
        return why(ret_why, RING_HEADER, room, sizeof(r.h));
    copy_once(&r.h, at, sizeof(r.h));
    reason = check_header(&r, ret_why);
    if (reason == RING_DONE)
        reason = check_shape(&r, ret_why);
    if (reason == RING_DONE)
        reason = check_parts(&r, ret_why);
    if (reason == RING_DONE)
        reason = allocate(&r, &rq, ret_why);
    if (reason != RING_DONE)
        return reason;
    fill(&r, at, rq);
    copy_once(rq->refs, at + r.h.refs_off, rq->n_refs * sizeof(uint64_t));
    copy_once(rq->positions, at + r.h.positions_off, rq->n_tokens * sizeof(uint32_t));
    reason = copy_queries(a, &r, at, rq, ret_why);
    if (reason != RING_DONE) {
        free(rq);
        return reason;
    }
    *ret = rq;
    return RING_DONE;
}

/* ---- rings ---- */

bool attend_ring_ready(const struct attend_ring *ring)
{
    uint32_t n_open;

    if (ring->broken || ring_waiting(&ring->view, ring->head) == 0)
        return false;
    /* acquire: whoever took one from n_open has counted its completion before, so that it is in one of the two at least. */
    n_open = atomic_load_explicit(&ring->n_open, memory_order_acquire);
    return n_open + ring_unread(&ring->view, atomic_load_explicit(&ring->done, memory_order_acquire)) < ring->view.n;
}

/* The request that a submission names. On a failure it has been answered. Adds to *io_bytes what was read and made for it. */
static struct attend_request *read_submission(struct attend *a, struct attend_ring *ring, const struct attend_limits *limits,
                                              const struct shm_submission *s, uint64_t *io_bytes)
{
    const struct attend_memory *m = s->memory < ring->n_memories ? &ring->memories[s->memory] : NULL;
    struct attend_request *rq = NULL;
    struct attend_why w = {s->off, m ? m->bytes : 0};
    enum ring_reason reason = RING_PLACE;

    if (m && s->off % SHM_ATTEND_ALIGN == 0 && s->bytes <= m->bytes && s->off <= m->bytes - s->bytes)
        reason = attend_request_read(a, limits, ring->tenant->cache, m->map + s->off, s->bytes, &rq, &w);
    PROBE3(attend_request, s->ticket, s->bytes, reason);
    *io_bytes += 4096; /* a refusal is work too */
    if (reason == RING_QUERY) /* the only one that is found when all has been copied */
        *io_bytes += limits->request_bytes < ATTEND_POLL_BYTES ? limits->request_bytes : ATTEND_POLL_BYTES;
    if (reason == RING_DONE) {
        *io_bytes += rq->bytes;
        rq->ring = ring;
        rq->ticket = s->ticket;
        return rq;
    }
    attend_refuse(ring, s->ticket, reason, &w);
    pthread_mutex_lock(&a->lock);
    a->stats.n_requests++;
    a->stats.n_failed++;
    a->stats.n_refused++;
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

/* Into the queue, within the worker's bytes and everybody's. */
static void enqueue(struct attend *a, struct attend_request *rq)
{
    struct attend_ring *ring = rq->ring;
    const struct attend_limits *l = &a->limits;
    struct attend_why w = {0};
    int r = 0;

    pthread_mutex_lock(&a->lock);
    a->stats.n_requests++;
    if (ring->bytes + rq->bytes > l->worker_bytes)
        w = (struct attend_why){ring->bytes + rq->bytes, l->worker_bytes};
    else if (a->bytes + rq->bytes > l->queue_bytes && ring->bytes + rq->bytes > l->queue_bytes / (a->n_rings ? a->n_rings : 1))
        w = (struct attend_why){a->bytes + rq->bytes, l->queue_bytes};
    else
        r = FAULT_DUE("attend-queue") ? -ENOMEM : attend_queue_add(a, rq);
    if (w.given || r < 0) {
        a->stats.n_failed++;
        a->stats.n_refused++;
    }
    pthread_mutex_unlock(&a->lock);
    if (!w.given && r == 0)
        return;
    if (r < 0)
        w = (struct attend_why){rq->bytes, 0};
    attend_refuse(ring, rq->ticket, r < 0 ? RING_MEMORY : RING_QUEUE, &w);
    free(rq);
}

/* Takes one ring's submissions until a bound. Returns how many. */
static unsigned poll_ring(struct attend *a, struct attend_ring *ring, const struct attend_limits *limits, unsigned n_most,
                          uint64_t *io_bytes)
{
    unsigned n = 0;

    if (ring_waiting(&ring->view, ring->head) > ring->view.n) {
        if (!ring->broken) {
            pthread_mutex_lock(&a->lock);
            a->stats.n_broken++;
            pthread_mutex_unlock(&a->lock);
        }
        ring->broken = true;
    }
    while (n < n_most && *io_bytes < ATTEND_POLL_BYTES && attend_ring_ready(ring)) {
        struct attend_request *rq;
        struct shm_submission s;

        copy_once(&s, &ring->view.submissions[ring->head % ring->view.n], sizeof(s));
        ring->head++;
        atomic_store_explicit(&ring->view.words->submit_head, ring->head, memory_order_release);
        atomic_fetch_add_explicit(&ring->n_open, 1, memory_order_relaxed);
        rq = read_submission(a, ring, limits, &s, io_bytes);
        n++;
        if (rq)
            enqueue(a, rq);
    }
    return n;
}

unsigned attend_poll(struct attend *a)
{
    struct attend_limits limits;
    uint64_t bytes = 0;
    unsigned n = 0;
    bool any = false;

    for (uint32_t i = 0; i < a->n_rings && !any; i++) /* the usual case costs no lock */
        any = attend_ring_ready(a->rings[i]) || ring_waiting(&a->rings[i]->view, a->rings[i]->head) > a->rings[i]->view.n;
    if (!any)
        return 0;
    pthread_mutex_lock(&a->lock);
    limits = a->limits;
    pthread_mutex_unlock(&a->lock);
    /* From another ring each time, a few of each, so that none is always last. */
    for (uint32_t i = 0; i < a->n_rings && n < ATTEND_POLL_REQUESTS && bytes < ATTEND_POLL_BYTES; i++)
        n += poll_ring(a, a->rings[(a->next_ring + i) % a->n_rings], &limits, 16, &bytes);
    if (a->n_rings)
        a->next_ring = (a->next_ring + 1) % a->n_rings;
    return n;
}
