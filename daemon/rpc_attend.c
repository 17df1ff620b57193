/* kvd.v1.Cache/Attend: a partial attention over blocks of a held prefix. The connection is a worker of the attention threads like any
 * other (rpc_batch.h): here its messages become requests as they lie in a worker's memory (struct shm_request), and back.
 *
 *   message: rows by query token, head          request: rows by KV head, query token, head of its group */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/prefix.h"
#include "daemon/rpc-internal.h"
#include "daemon/rpc_batch.h"
#include "proto/kvd.pb-c.h"
#include "proto/ring.h"

/* Up to so many bytes of queries and results are copied where they come, a helper does more. */
enum { COPY_INLINE = 16 << 10, HEADS_MAX = 4096 };

struct attention {
    struct rpc_work work;
    struct rpc_call *call;
    struct prefix *prefix;           /* referenced */
    const Kvd__V1__AttentionRequest *m; /* in the call's arena */
    const struct payload_layer *layer;
    enum codec_dtype dtype;
    uint32_t window, dim_o, ratio;
    uint32_t first, end;             /* blocks */
    uint32_t lo, hi;                 /* least and greatest position of a query */
    struct rpc_region region;
    struct shm_request head;
    uint64_t n_charged;
    float *o, *lse;                  /* of the reply, in its order */
};

static void attention_end(struct rpc_work *work)
{
    struct attention *a = (struct attention *)work;

    rpc_region_give(&a->region);
    rpc_total_give(&a->prefix->daemon->rpc->total, a->n_charged);
    prefix_unref(a->prefix);
    free(a->o);
    free(a);
}

/* ---- what is asked ---- */

static bool sizes_good(struct rpc_call *c, struct attention *a)
{
    const Kvd__V1__AttentionRequest *m = a->m;
    const struct payload_layer *layer = a->layer;
    uint64_t values = (uint64_t)m->n_tokens * m->n_heads, q_bytes = values * layer->dim_k * codec_dtype_bytes(a->dtype);
    uint64_t most = c->conn->rpc->message_bytes;

    if (m->n_heads == 0 || m->n_heads % layer->n_kv_heads != 0 || m->n_heads > HEADS_MAX)
        rpc_fail(c, ERROR_LAYOUT, "a multiple of the layer's KV heads, at most 4096", "n_heads is %" PRIu32 ", the layer has %" PRIu32
                 " KV heads", m->n_heads, layer->n_kv_heads);
    else if (m->n_tokens == 0 || m->q.len != q_bytes)
        rpc_fail(c, ERROR_LAYOUT, "n_tokens * n_heads * dim_k numbers", "q has %zu bytes, and %" PRIu32 " tokens of %" PRIu32
                 " heads of %" PRIu32 " numbers are %" PRIu64, m->q.len, m->n_tokens, m->n_heads, layer->dim_k, q_bytes);
    else if (layer->dim_v ? m->dim_o != 0 : m->dim_o == 0 || m->dim_o % 16 != 0 || m->dim_o > layer->dim_k)
        rpc_fail(c, ERROR_LAYOUT, layer->dim_v ? "0 for a layer that has V" : "multiples of 16 up to the layer's dim_k",
                 "dim_o is %" PRIu32, m->dim_o);
    else if (values * (a->dim_o + 1) * sizeof(float) + (m->mass ? (a->end - a->first) * sizeof(float) : 0) + 64 > most)
        rpc_fail(c, ERROR_LIMIT, "fewer query tokens, or a greater grpc_message_bytes", "the reply would be above %" PRIu64 " bytes", most);
    else if (m->n_position && m->n_position != m->n_tokens)
        rpc_fail(c, ERROR_LAYOUT, "a position a query token, or none", "%zu positions for %" PRIu32 " tokens", m->n_position, m->n_tokens);
    else if (!m->n_position && m->first_position > UINT32_MAX - (m->n_tokens - 1))
        rpc_fail(c, ERROR_LAYOUT, "positions below 2^32", "first_position is %" PRIu32 " for %" PRIu32 " tokens", m->first_position,
                 m->n_tokens);
    else if (!isfinite(m->scale) || !isfinite(m->softcap) || m->softcap < 0)
        rpc_fail(c, ERROR_VALUE, "finite numbers, a softcap of at least 0", "scale is %g, softcap %g", (double)m->scale, (double)m->softcap);
    else
        return true;
    return false;
}

static uint32_t position_of(const struct attention *a, uint32_t t)
{
    return a->m->n_position ? a->m->position[t] : a->m->first_position + t;
}

/* False: answered, the request is wrong. */
static bool take_request(struct rpc_call *c, struct attention *a)
{
    const Kvd__V1__AttentionRequest *m = a->m;
    const struct prefix *p = a->prefix;

    if (m->layer >= p->space->n_layers) {
        rpc_fail(c, ERROR_LAYOUT, "layers of the space", "layer %" PRIu32 " of %" PRIu32, m->layer, p->space->n_layers);
        return false;
    }
    if (codec_dtype_parse(m->dtype, &a->dtype) < 0) {
        rpc_fail(c, ERROR_LAYOUT, "f16, bf16, f32", "dtype \"%.20s\" is not known", m->dtype);
        return false;
    }
    a->layer = &p->space->layers[m->layer];
    a->first = m->first_block;
    a->end = m->n_blocks ? m->first_block + m->n_blocks : p->n_blocks;
    if (a->first > p->n_blocks || a->end < a->first || a->end > p->n_blocks) {
        rpc_fail(c, ERROR_NOT_FOUND, "blocks of the prefix", "blocks %" PRIu32 " to %" PRIu32 " of a prefix of %" PRIu32, a->first, a->end,
                 p->n_blocks);
        return false;
    }
    a->window = m->window_tokens ? m->window_tokens : p->space->window_tokens[a->layer->group];
    a->dim_o = a->layer->dim_v ? a->layer->dim_v : m->dim_o;
    if (!sizes_good(c, a))
        return false;
    a->ratio = m->n_heads / a->layer->n_kv_heads;
    a->lo = UINT32_MAX;
    for (uint32_t t = 0; t < m->n_tokens; t++) {
        uint32_t pos = position_of(a, t);

        a->lo = pos < a->lo ? pos : a->lo;
        a->hi = pos > a->hi ? pos : a->hi;
    }
    return true;
}

/* ---- the request in a region ---- */

static uint64_t part(uint64_t *io_bytes, uint64_t n, uint64_t size)
{
    uint64_t at = *io_bytes;

    *io_bytes += (n * size + SHM_ATTEND_ALIGN - 1) / SHM_ATTEND_ALIGN * SHM_ATTEND_ALIGN;
    return at;
}

/* Fills in the header. Returns the bytes of all. */
static uint64_t lay_out(struct attention *a)
{
    const Kvd__V1__AttentionRequest *m = a->m;
    uint64_t rows = (uint64_t)m->n_tokens * m->n_heads, bytes = sizeof(a->head);
    uint32_t n_refs = a->end - a->first;

    a->head = (struct shm_request){.header_bytes = sizeof(a->head),
                                   .flags = m->mass ? SHM_REQUEST_MASS : 0,
                                   .space = a->prefix->space->id,
                                   .layer = m->layer,
                                   .n_heads = m->n_heads,
                                   .n_tokens = m->n_tokens,
                                   .n_refs = n_refs,
                                   .dtype = a->dtype,
                                   .dim_o = a->dim_o,
                                   .first_pos = a->first * a->prefix->space->block_tokens,
                                   .window = a->window,
                                   .sink_tokens = m->sink_tokens,
                                   .scale = m->scale,
                                   .softcap = m->softcap,
                                   .deadline_usec = a->call->deadline_usec == UINT64_MAX ? 0 : a->call->deadline_usec};
    a->head.positions_off = part(&bytes, m->n_tokens, sizeof(uint32_t));
    a->head.refs_off = part(&bytes, n_refs, sizeof(uint64_t));
    a->head.q_off = part(&bytes, rows * a->layer->dim_k, codec_dtype_bytes(a->dtype));
    a->head.o_off = part(&bytes, rows * a->dim_o, sizeof(float));
    a->head.lse_off = part(&bytes, rows, sizeof(float));
    a->head.mass_off = part(&bytes, m->mass ? n_refs : 0, sizeof(float));
    return bytes;
}

/* Does some query see a token of the block? */
static bool is_seen(const struct attention *a, uint64_t from, uint64_t to)
{
    return from <= a->hi && (a->window == 0 || from < a->m->sink_tokens || to + a->window > (uint64_t)a->lo + 1);
}

/* The blocks by entry and generation; 0 for those that no query sees. False: answered; one that is seen is not held. */
static bool put_refs(struct rpc_call *c, struct attention *a)
{
    uint64_t *refs = (uint64_t *)(void *)((char *)rpc_region_at(&a->region) + a->head.refs_off);
    uint32_t group = a->layer->group, tokens = a->prefix->space->block_tokens;

    for (uint32_t i = a->first; i < a->end; i++) {
        const struct prefix_block *b = prefix_block(a->prefix, group, i);
        bool seen = is_seen(a, (uint64_t)i * tokens, (uint64_t)(i + 1) * tokens);

        if (seen && !b) {
            rpc_fail(c, ERROR_NOT_FOUND, "a window within that of the layer's group",
                     "block %" PRIu32 " is seen by a query, and the prefix does not hold it: its group slides", i);
            return false;
        }
        refs[i - a->first] = seen ? shm_ref(b->entry, b->gen) : 0;
    }
    return true;
}

/* Header, positions, queries. Any thread. */
static void put_queries(struct attention *a)
{
    const Kvd__V1__AttentionRequest *m = a->m;
    uint8_t *at = rpc_region_at(&a->region), *q = at + a->head.q_off;
    size_t run = (size_t)a->ratio * a->layer->dim_k * codec_dtype_bytes(a->dtype); /* the heads of one group, of one token */
    uint32_t groups = a->layer->n_kv_heads;

    memcpy(at, &a->head, sizeof(a->head));
    for (uint32_t t = 0; t < m->n_tokens; t++)
        ((uint32_t *)(void *)(at + a->head.positions_off))[t] = position_of(a, t);
    for (uint32_t kv = 0; kv < groups; kv++)
        for (uint32_t t = 0; t < m->n_tokens; t++)
            memcpy(q + ((size_t)kv * m->n_tokens + t) * run, m->q.data + ((size_t)t * groups + kv) * run, run);
}

/* Output and log-sum-exp in the message's order. Any thread. */
static void take_results(struct attention *a)
{
    const Kvd__V1__AttentionRequest *m = a->m;
    const uint8_t *at = rpc_region_at(&a->region);
    uint32_t groups = a->layer->n_kv_heads;

    for (uint32_t kv = 0; kv < groups; kv++)
        for (uint32_t t = 0; t < m->n_tokens; t++) {
            size_t from = ((size_t)kv * m->n_tokens + t) * a->ratio, to = ((size_t)t * groups + kv) * a->ratio;

            memcpy(a->o + to * a->dim_o, at + a->head.o_off + from * a->dim_o * sizeof(float), a->ratio * a->dim_o * sizeof(float));
            memcpy(a->lse + to, at + a->head.lse_off + from * sizeof(float), a->ratio * sizeof(float));
        }
}

/* ---- the way back ---- */

static ProtobufCBinaryData floats(const void *from, uint64_t n)
{
    return (ProtobufCBinaryData){.len = n * sizeof(float), .data = (uint8_t *)from};
}

static void reply_results(struct rpc_call *c)
{
    struct attention *a = (struct attention *)c->work;
    Kvd__V1__AttentionReply out = KVD__V1__ATTENTION_REPLY__INIT;
    uint64_t rows = (uint64_t)a->m->n_tokens * a->m->n_heads;

    out.o = floats(a->o, rows * a->dim_o);
    out.lse = floats(a->lse, rows);
    if (a->m->mass)
        out.mass = floats((uint8_t *)rpc_region_at(&a->region) + a->head.mass_off, a->head.n_refs);
    c->conn->rpc->daemon->metrics.grpc_attentions++;
    rpc_answer(c, &out.base, false);
}

static void take_run(struct job *job)
{
    take_results((struct attention *)rpc_call_of_job(job)->work);
}

/* Where a reason's number is not one of those that the daemon tells (libkvd's own), the nearest. */
static enum error_code error_of(uint32_t reason)
{
    switch (reason) {
    case RING_STALE: return ERROR_NOT_FOUND;
    case RING_MEMORY: return ERROR_FULL;
    case RING_ENDING: return ERROR_DRAINING;
    case RING_QUERY: return ERROR_VALUE;
    default: return ring_reason_error(reason) == 2 ? ERROR_LAYOUT : (enum error_code)ring_reason_error(reason);
    }
}

static void set_cancel_word(struct rpc_call *c, _Atomic uint32_t *word)
{
    struct rpc *rpc = c->conn->rpc;

    pthread_mutex_lock(&rpc->lock);
    c->cancel_word = word;
    pthread_mutex_unlock(&rpc->lock);
}

static void region_done(struct rpc_region *region, const struct shm_completion *completion)
{
    struct attention *a = (struct attention *)((char *)region - offsetof(struct attention, region));
    struct rpc_call *c = a->call;
    uint64_t rows = (uint64_t)a->m->n_tokens * a->m->n_heads;
    char text[200];

    set_cancel_word(c, NULL);
    a->work.busy = false;
    if (!completion) {
        rpc_fail(c, ERROR_DRAINING, "", "the connection is closed");
        return;
    }
    if (completion->reason) {
        rpc_fail(c, error_of(completion->reason), "", "%s",
                 ring_reason_text(completion->reason, completion->given, completion->allowed, text, sizeof(text)));
        return;
    }
    a->o = malloc(rows * (a->dim_o + 1) * sizeof(float));
    if (!a->o) {
        rpc_fail(c, ERROR_FULL, "", "the daemon has no memory for this reply");
        return;
    }
    a->lse = a->o + rows * a->dim_o;
    if (rows * a->dim_o * sizeof(float) > COPY_INLINE) {
        rpc_job(c, take_run, reply_results);
        return;
    }
    take_results(a);
    reply_results(c);
}

/* ---- the way there ---- */

static void submit(struct rpc_call *c)
{
    struct attention *a = (struct attention *)c->work;
    struct shm_request *at = rpc_region_at(&a->region);

    set_cancel_word(c, &at->cancelled);
    if (atomic_load(&c->cancelled)) /* before there was a word */
        atomic_store(&at->cancelled, 1);
    a->work.busy = true;
    if (rpc_region_submit(&a->region))
        return;
    a->work.busy = false;
    set_cancel_word(c, NULL);
    rpc_fail(c, ERROR_LIMIT, "fewer at once", "too many attentions of this connection wait to be computed");
}

static void put_run(struct job *job)
{
    put_queries((struct attention *)rpc_call_of_job(job)->work);
}

static bool take_region(struct rpc_call *c, struct attention *a)
{
    struct rpc_conn *conn = c->conn;
    uint64_t bytes = lay_out(a);
    int r = conn->batch ? 0 : rpc_batch_create(conn, &conn->batch);

    if (r < 0) {
        rpc_fail(c, ERROR_FULL, "fewer connections, or more memory and descriptors for the daemon", "the daemon cannot serve attention: %s",
                 strerror(-r));
        return false;
    }
    if (rpc_total_charge(&conn->rpc->total, bytes)) {
        a->n_charged = bytes;
        if (rpc_region_take(conn->batch, bytes, &a->region))
            return true;
    }
    rpc_fail(c, ERROR_LIMIT, "fewer at once, or with fewer query tokens", "%" PRIu64 " bytes for this attention are not free", bytes);
    return false;
}

static void attention_next(struct rpc_call *c)
{
    rpc_fail(c, ERROR_PROTOCOL, "one message", "an attention is one message");
}

void rpc_attend(struct rpc_call *c)
{
    const Kvd__V1__AttentionRequest *m = c->message;
    struct prefix *p = rpc_prefix_find(c->conn, m->prefix);
    struct attention *a;

    if (!p) {
        rpc_fail(c, ERROR_NOT_FOUND, "one that Match gave on this connection", "there is no prefix %" PRIu64, m->prefix);
        return;
    }
    a = calloc(1, sizeof(*a));
    if (!a) {
        rpc_fail(c, ERROR_FULL, "", "the daemon has no memory for this attention");
        return;
    }
    *a = (struct attention){.work = {.next = attention_next, .end = attention_end}, .call = c, .prefix = prefix_ref(p), .m = m,
                            .region.done = region_done};
    rpc_work_begin(c, &a->work);
    if (!take_request(c, a) || !take_region(c, a) || !put_refs(c, a))
        return;
    if (m->q.len > COPY_INLINE) {
        rpc_job(c, put_run, submit);
        return;
    }
    put_queries(a);
    submit(c);
}
