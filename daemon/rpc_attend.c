/* kvd.v1.Cache/Attend: a partial attention over blocks of a held prefix, computed by a helper thread from the packed codes
 * (kernels/attn/attn.h). The rows of a KV head are those of its query heads, token after token. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/prefix.h"
#include "daemon/rpc-internal.h"
#include "proto/kvd.pb-c.h"

enum { HEADS_MAX = CODEC_TOKENS_MAX };

struct attend {
    struct rpc_work work;
    struct prefix *prefix;         /* referenced */
    const Kvd__V1__AttentionRequest *m; /* in the call's arena */
    const struct payload_layer *layer;
    enum codec_dtype dtype;
    struct attn_params params;
    uint32_t ratio, n_rows;        /* query heads of a KV head; rows of one */
    uint32_t first, end;           /* blocks */
    uint32_t lo, hi;               /* least and greatest position of a query */
    uint64_t n_charged;
    void *memory;
    /* in memory */
    float *q;                      /* [n_tokens][n_heads][dim_k] */
    float *head_q, *head_o, *head_lse; /* of one KV head: [n_rows][dim_k], [n_rows][dim_o], [n_rows] */
    float *block_lse;              /* [n_rows][blocks] */
    uint32_t *pos;                 /* [n_rows] */
    float *o, *lse;                /* the reply */
    double *mass;                  /* [blocks] */
    float *mass_out;
    struct attn_block *blocks;     /* those that are needed */
    uint32_t *block_at;            /* which they are, from first on */
    uint32_t n_blocks;
    void *scratch;
};

static void attend_end(struct rpc_work *work)
{
    struct attend *a = (struct attend *)work;

    if (a->memory)
        rpc_total_give(&a->prefix->daemon->rpc->total, a->n_charged);
    free(a->memory);
    prefix_unref(a->prefix);
    free(a);
}

/* ---- what is asked ---- */

static bool sizes_good(struct rpc_call *c, struct attend *a)
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
    else if (layer->dim_v ? m->dim_o != 0 : m->dim_o < 1 || m->dim_o > layer->dim_k)
        rpc_fail(c, ERROR_LAYOUT, layer->dim_v ? "0 for a layer that has V" : "1 to the layer's dim_k", "dim_o is %" PRIu32, m->dim_o);
    else if (values * (a->params.dim_o + 1) * sizeof(float) + (m->mass ? (a->end - a->first) * sizeof(float) : 0) + 64 > most)
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

/* False: answered, the request is wrong. */
static bool take_request(struct rpc_call *c, struct attend *a)
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
    a->params = (struct attn_params){.scale = m->scale, .softcap = m->softcap, .sink_tokens = m->sink_tokens,
                                     .window = m->window_tokens ? m->window_tokens : p->space->window_tokens[a->layer->group],
                                     .dim_o = a->layer->dim_v ? a->layer->dim_v : m->dim_o};
    if (!sizes_good(c, a))
        return false;
    a->ratio = m->n_heads / a->layer->n_kv_heads;
    a->n_rows = m->n_tokens * a->ratio;
    a->lo = m->n_position ? UINT32_MAX : m->first_position;
    a->hi = m->n_position ? 0 : m->first_position + (m->n_tokens - 1);
    for (size_t i = 0; i < m->n_position; i++) {
        a->lo = m->position[i] < a->lo ? m->position[i] : a->lo;
        a->hi = m->position[i] > a->hi ? m->position[i] : a->hi;
    }
    return true;
}

/* ---- memory: all of it at once, charged ---- */

struct cut {
    uint8_t *base; /* NULL: only counts */
    uint64_t used;
};

static void *cut(struct cut *from, uint64_t n, uint64_t size)
{
    void *at = from->base ? from->base + from->used : NULL;

    from->used += (n * size + 63) / 64 * 64;
    return at;
}

static uint64_t place(struct attend *a, uint8_t *base)
{
    const Kvd__V1__AttentionRequest *m = a->m;
    uint64_t values = (uint64_t)m->n_tokens * m->n_heads, blocks = a->end - a->first, rows = a->n_rows;
    uint32_t dim_k = a->layer->dim_k, dim_o = a->params.dim_o;
    struct cut from = {.base = base};

    a->q = cut(&from, values * dim_k, sizeof(float));
    a->head_q = cut(&from, rows * dim_k, sizeof(float));
    a->head_o = cut(&from, rows * dim_o, sizeof(float));
    a->head_lse = cut(&from, rows, sizeof(float));
    a->block_lse = cut(&from, m->mass ? rows * blocks : 0, sizeof(float));
    a->pos = cut(&from, rows, sizeof(uint32_t));
    a->o = cut(&from, values * dim_o, sizeof(float));
    a->lse = cut(&from, values, sizeof(float));
    a->mass = cut(&from, m->mass ? blocks : 0, sizeof(double));
    a->mass_out = cut(&from, m->mass ? blocks : 0, sizeof(float));
    a->blocks = cut(&from, blocks, sizeof(struct attn_block));
    a->block_at = cut(&from, blocks, sizeof(uint32_t));
    a->scratch = cut(&from, 1, attn_work_bytes(a->n_rows, a->prefix->space->block_tokens, dim_k, dim_o));
    return from.used + 64;
}

static bool take_memory(struct rpc_call *c, struct attend *a)
{
    struct rpc_total *total = &c->conn->rpc->total;
    uint64_t bytes = place(a, NULL);

    if (rpc_total_charge(total, bytes)) {
        a->n_charged = bytes;
        if (posix_memalign(&a->memory, 64, bytes) == 0) {
            place(a, a->memory);
            return true;
        }
        a->memory = NULL;
        rpc_total_give(total, bytes);
    }
    rpc_fail(c, ERROR_FULL, "fewer query tokens, later, or a greater grpc_memory", "%" PRIu64 " bytes are not to be had for this attention",
             bytes);
    return false;
}

/* Does some query see a token of the block? */
static bool is_seen(const struct attend *a, uint64_t from, uint64_t to)
{
    return from <= a->hi && (a->params.window == 0 || from < a->params.sink_tokens || to + a->params.window > (uint64_t)a->lo + 1);
}

/* The tiles of the layer's first KV head. False: answered; a block that is seen is not held. */
static bool find_blocks(struct rpc_call *c, struct attend *a)
{
    const struct space *space = a->prefix->space;
    uint32_t group = a->layer->group, tokens = space->block_tokens;

    for (uint32_t i = a->first; i < a->end; i++) {
        const struct prefix_block *b = prefix_block(a->prefix, group, i);
        const struct payload_layout *layout;
        uint32_t part = 0;

        if (!is_seen(a, (uint64_t)i * tokens, (uint64_t)(i + 1) * tokens))
            continue;
        if (!b) {
            rpc_fail(c, ERROR_NOT_FOUND, "a window within that of the layer's group",
                     "block %" PRIu32 " is seen by a query, and the prefix does not hold it: its group slides", i);
            return false;
        }
        layout = space_layout(space, group, b->first);
        while (layout->parts[part].layer != a->m->layer)
            part++;
        a->block_at[a->n_blocks] = i - a->first;
        a->blocks[a->n_blocks++] = (struct attn_block){.tile = (const uint8_t *)b->payload + layout->parts[part].off,
                                                       .layout = &layout->parts[part].tile,
                                                       .pos = i * tokens,
                                                       .n_tokens = tokens};
    }
    return true;
}

/* ---- the helper thread ---- */

static bool take_queries(struct attend *a)
{
    const Kvd__V1__AttentionRequest *m = a->m;
    struct codec_spec raw = codec_spec_raw(a->dtype);
    uint32_t dim = a->layer->dim_k;
    uint64_t row = (uint64_t)m->n_heads * dim;

    for (uint32_t t = 0; t < m->n_tokens; t++)
        if (codec_decode(a->prefix->daemon->codec, &raw, NULL, NULL, m->q.data + t * row * codec_dtype_bytes(a->dtype), m->n_heads, dim, 0,
                         m->n_heads, CODEC_F32, a->q + t * row, dim * sizeof(float)) < 0)
            return false;
    for (uint64_t i = 0; i < row * m->n_tokens; i++)
        if (!isfinite(a->q[i]))
            return false;
    return true;
}

static void gather(struct attend *a, uint32_t head)
{
    const Kvd__V1__AttentionRequest *m = a->m;
    size_t dim = a->layer->dim_k;

    for (uint32_t t = 0; t < m->n_tokens; t++) {
        size_t row = (size_t)t * a->ratio;

        memcpy(a->head_q + row * dim, a->q + ((size_t)t * m->n_heads + (size_t)head * a->ratio) * dim, a->ratio * dim * sizeof(float));
        for (uint32_t i = 0; i < a->ratio; i++)
            a->pos[row + i] = m->n_position ? m->position[t] : m->first_position + t;
    }
}

static void scatter(struct attend *a, uint32_t head)
{
    const Kvd__V1__AttentionRequest *m = a->m;
    size_t dim = a->params.dim_o;

    for (uint32_t t = 0; t < m->n_tokens; t++) {
        size_t to = (size_t)t * m->n_heads + (size_t)head * a->ratio, row = (size_t)t * a->ratio;

        memcpy(a->o + to * dim, a->head_o + row * dim, a->ratio * dim * sizeof(float));
        memcpy(a->lse + to, a->head_lse + row, a->ratio * sizeof(float));
    }
}

/* Adds a head's attention up by blocks. Returns rows that saw anything. */
static uint64_t weigh(struct attend *a)
{
    uint64_t seen = 0;

    for (uint32_t r = 0; r < a->n_rows; r++) {
        if (isinf(a->head_lse[r]))
            continue;
        seen++;
        for (uint32_t i = 0; i < a->n_blocks; i++)
            a->mass[a->block_at[i]] += exp((double)a->block_lse[(size_t)r * a->n_blocks + i] - (double)a->head_lse[r]);
    }
    return seen;
}

static void attend_run(struct job *job)
{
    struct rpc_call *c = rpc_call_of_job(job);
    struct attend *a = (struct attend *)c->work;
    const struct attn_ops *ops = c->conn->rpc->attn;
    uint32_t blocks = a->end - a->first;
    uint64_t seen = 0;
    int r = take_queries(a) ? 0 : -EDOM;

    for (uint32_t i = 0; a->m->mass && i < blocks; i++)
        a->mass[i] = 0;
    for (uint32_t h = 0; h < a->layer->n_kv_heads && r == 0; h++) {
        struct attn_rows rows = {.n = a->n_rows, .q = a->head_q, .q_pos = a->pos};
        struct attn_out out = {.o = a->head_o, .lse = a->head_lse, .block_lse = a->m->mass ? a->block_lse : NULL};

        if (atomic_load(&c->cancelled)) {
            r = -ECANCELED;
            break;
        }
        gather(a, h);
        r = attn_partial(ops, &a->params, a->blocks, a->n_blocks, &rows, &out, a->scratch);
        scatter(a, h);
        if (a->m->mass)
            seen += weigh(a);
        for (uint32_t i = 0; i < a->n_blocks; i++) /* the next head's tiles */
            a->blocks[i].tile = (const uint8_t *)a->blocks[i].tile + a->blocks[i].layout->bytes;
    }
    for (uint32_t i = 0; a->m->mass && i < blocks; i++)
        a->mass_out[i] = seen ? (float)(a->mass[i] / (double)seen) : 0;
    job->result = r;
}

/* ---- the loop ---- */

static ProtobufCBinaryData floats(const float *from, uint64_t n)
{
    return (ProtobufCBinaryData){.len = n * sizeof(float), .data = (uint8_t *)from};
}

static void attend_done(struct rpc_call *c)
{
    struct attend *a = (struct attend *)c->work;
    Kvd__V1__AttentionReply out = KVD__V1__ATTENTION_REPLY__INIT;
    uint64_t values = (uint64_t)a->m->n_tokens * a->m->n_heads;

    if (c->job.result == -EDOM) {
        rpc_fail(c, ERROR_VALUE, "finite queries", "q holds a NaN or an infinity");
        return;
    }
    if (c->job.result < 0) {
        rpc_fail(c, ERROR_INTERNAL, "", "the attention failed");
        return;
    }
    out.o = floats(a->o, values * a->params.dim_o);
    out.lse = floats(a->lse, values);
    if (a->m->mass)
        out.mass = floats(a->mass_out, a->end - a->first);
    c->conn->rpc->daemon->metrics.grpc_attentions++;
    rpc_answer(c, &out.base, false);
}

static void attend_next(struct rpc_call *c)
{
    rpc_fail(c, ERROR_PROTOCOL, "one message", "an attention is one message");
}

void rpc_attend(struct rpc_call *c)
{
    const Kvd__V1__AttentionRequest *m = c->message;
    struct prefix *p = rpc_prefix_find(c->conn, m->prefix);
    struct attend *a;

    if (!p) {
        rpc_fail(c, ERROR_NOT_FOUND, "one that Match gave on this connection", "there is no prefix %" PRIu64, m->prefix);
        return;
    }
    a = calloc(1, sizeof(*a));
    if (!a) {
        rpc_fail(c, ERROR_FULL, "", "the daemon has no memory for this attention");
        return;
    }
    a->work = (struct rpc_work){.next = attend_next, .end = attend_end};
    a->prefix = prefix_ref(p);
    a->m = m;
    rpc_work_begin(c, &a->work);
    if (take_request(c, a) && take_memory(c, a) && find_blocks(c, a))
        rpc_job(c, attend_run, attend_done);
}
