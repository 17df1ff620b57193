/* kvd.v1.Cache/Load and LoadStream: blocks of a held prefix, decoded or as they are, a message at a time.
 *
 * Helper threads write the messages in protobuf's wire form as they decode, so that no byte of K and V is held twice but for a small
 * piece of it. Of a stream, one message is under way: the next is made when the library has passed it on (flow control), so a client
 * that does not read costs this one message. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/prefix.h"
#include "daemon/rpc-internal.h"
#include "proto/kvd.pb-c.h"

/* A stream's messages: large enough that their cost is small beside that of the bytes, small enough to be in the cache twice. */
enum { STREAM_BYTES = 1 << 20, HEADER_MAX = 80, SCRATCH_BYTES = 64 << 10 };

struct load {
    struct rpc_work work;
    struct prefix *prefix;     /* referenced */
    uint32_t first, end;       /* blocks */
    uint32_t groups;           /* bits */
    enum codec_dtype dtype;    /* 0: encoded */
    uint64_t bytes;            /* of all blocks, with headers: an upper bound */
    /* where it is */
    uint32_t block, group;
    uint64_t off;
    /* of the message that is being made */
    size_t size;
    uint8_t *out;
    size_t n_out;
    uint64_t n_charged, n_data, n_blocks;
};

static void load_end(struct rpc_work *work)
{
    struct load *l = (struct load *)work;

    if (l->out) {
        free(l->out);
        rpc_total_give(&l->prefix->daemon->rpc->total, l->n_charged);
    }
    prefix_unref(l->prefix);
    free(l);
}

static const struct payload_layout *layout_of(const struct load *l, const struct prefix_block *b, uint32_t group)
{
    return space_layout(l->prefix->space, group, b->first);
}

static uint64_t block_bytes(const struct load *l, const struct prefix_block *b, uint32_t group)
{
    const struct payload_layout *layout = layout_of(l, b, group);

    return l->dtype ? layout->raw_bytes[l->dtype] : layout->bytes;
}

/* The block at or after the place that is asked for and held; NULL: that was the last. */
static const struct prefix_block *next_block(struct load *l)
{
    for (; l->block < l->end; l->block++, l->group = 0)
        for (; l->group < l->prefix->space->n_groups; l->group++) {
            const struct prefix_block *b = l->groups >> l->group & 1 ? prefix_block(l->prefix, l->group, l->block) : NULL;

            if (b)
                return b;
        }
    return NULL;
}

/* ---- helper threads ---- */

/* Where in a raw block a byte is: a run of rows (a token's heads) of K or V of one layer. */
struct raw_run {
    uint32_t part;
    enum codec_role role;
    uint64_t row_bytes, off; /* of the byte in the run */
};

static struct raw_run find_run(const struct payload_layout *layout, enum codec_dtype dtype, uint64_t off)
{
    uint32_t part = 0;
    const struct payload_part *p;
    uint64_t k_row, k_bytes;

    while (part + 1 < layout->n_parts && layout->parts[part + 1].raw_off[dtype] <= off)
        part++;
    p = &layout->parts[part];
    k_row = (uint64_t)p->n_kv_heads * p->tile.dim_k * codec_dtype_bytes(dtype);
    k_bytes = k_row * layout->n_tokens;
    off -= p->raw_off[dtype];
    if (off < k_bytes)
        return (struct raw_run){.part = part, .role = CODEC_K, .row_bytes = k_row, .off = off};
    return (struct raw_run){.part = part, .role = CODEC_V, .off = off - k_bytes,
                            .row_bytes = (uint64_t)p->n_kv_heads * p->tile.dim_v * codec_dtype_bytes(dtype)};
}

/* Bytes [off, off + n) of the raw block, by way of scratch, which holds scratch_bytes and at least one row. */
static int decode_bytes(const struct load *l, const struct payload_layout *layout, const void *payload, uint64_t off, uint64_t n,
                        uint8_t *dst, uint8_t *scratch, uint64_t scratch_bytes)
{
    const struct codec_ops *ops = l->prefix->daemon->codec;
    int r = 0;

    while (n > 0 && r == 0) {
        struct raw_run run = find_run(layout, l->dtype, off);
        const struct payload_part *p = &layout->parts[run.part];
        uint64_t row = run.off / run.row_bytes, skip = run.off % run.row_bytes;
        uint64_t rows = scratch_bytes / run.row_bytes, wanted = (skip + n + run.row_bytes - 1) / run.row_bytes, take;
        struct payload_dst to = {0};

        rows = rows < wanted ? rows : wanted;
        rows = rows < layout->n_tokens - row ? rows : layout->n_tokens - row;
        if (run.role == CODEC_K)
            to = (struct payload_dst){.k = scratch, .k_token_stride = run.row_bytes, .k_head_stride = run.row_bytes / p->n_kv_heads};
        else
            to = (struct payload_dst){.v = scratch, .v_token_stride = run.row_bytes, .v_head_stride = run.row_bytes / p->n_kv_heads};
        r = payload_decode(layout, ops, run.part, payload, (uint32_t)row, (uint32_t)(row + rows), l->dtype, &to);
        take = rows * run.row_bytes - skip;
        take = take < n ? take : n;
        memcpy(dst, scratch + skip, take);
        dst += take;
        off += take;
        n -= take;
    }
    return r;
}

static uint64_t largest_row(const struct load *l)
{
    uint64_t most = SCRATCH_BYTES;

    for (uint32_t i = 0; i < l->prefix->space->n_layers; i++) {
        const struct payload_layer *layer = &l->prefix->space->layers[i];
        uint64_t dim = layer->dim_k > layer->dim_v ? layer->dim_k : layer->dim_v, row = layer->n_kv_heads * dim * sizeof(float);

        most = row > most ? row : most;
    }
    return most;
}

static uint8_t *put(uint8_t *at, uint64_t v)
{
    for (; v > 0x7f; v >>= 7)
        *at++ = (uint8_t)(v | 0x80);
    *at++ = (uint8_t)v;
    return at;
}

/* LoadPiece but for its data, whose length comes last. */
static size_t put_piece(const struct load *l, const struct prefix_block *b, uint64_t n, uint8_t *at)
{
    uint8_t head[HEADER_MAX], *h = head, *begin = at;

    h = put(put(h, 1 << 3), l->block);
    h = put(put(h, 2 << 3), l->group);
    h = put(put(h, 3 << 3), b->first);
    if (!l->dtype)
        h = put(put(h, 4 << 3), b->crc32c);
    h = put(put(h, 5 << 3), block_bytes(l, b, l->group));
    h = put(put(h, 6 << 3), l->off);
    h = put(put(h, 7 << 3 | 2), n);
    at = put(put(at, 1 << 3 | 2), (uint64_t)(h - head) + n); /* LoadReply.piece */
    memcpy(at, head, (size_t)(h - head));
    return (size_t)(at + (h - head) - begin);
}

/* One more piece of the message. 1: there was no room or nothing left. */
static int add_piece(struct load *l, uint8_t *scratch, uint64_t scratch_bytes)
{
    const struct prefix_block *b = next_block(l);
    const struct payload_layout *layout;
    uint64_t all, n;
    int r = 0;

    if (!b || l->n_out + HEADER_MAX >= l->size)
        return 1;
    layout = layout_of(l, b, l->group);
    all = block_bytes(l, b, l->group);
    n = all - l->off < l->size - l->n_out - HEADER_MAX ? all - l->off : l->size - l->n_out - HEADER_MAX;
    l->n_out += put_piece(l, b, n, l->out + l->n_out);
    if (l->dtype)
        r = decode_bytes(l, layout, b->payload, l->off, n, l->out + l->n_out, scratch, scratch_bytes);
    else
        memcpy(l->out + l->n_out, (const uint8_t *)b->payload + l->off, n);
    l->n_out += n;
    l->n_data += n;
    l->off += n;
    if (l->off == all) {
        l->off = 0;
        l->group++;
        l->n_blocks++;
    }
    return r;
}

static void load_run(struct job *job)
{
    struct load *l = (struct load *)rpc_call_of_job(job)->work;
    uint64_t scratch_bytes = l->dtype ? largest_row(l) : 0;
    uint8_t *scratch = NULL;

    job->result = -ENOMEM;
    l->n_out = l->n_data = l->n_blocks = l->n_charged = 0;
    if (!rpc_total_charge(&l->prefix->daemon->rpc->total, l->size))
        return;
    l->n_charged = l->size;
    l->out = malloc(l->size ? l->size : 1);
    if (!l->out) {
        rpc_total_give(&l->prefix->daemon->rpc->total, l->n_charged);
        return;
    }
    if (l->dtype && posix_memalign((void **)&scratch, 64, scratch_bytes) != 0)
        return;
    do
        job->result = add_piece(l, scratch, scratch_bytes);
    while (job->result == 0);
    job->result = job->result == 1 ? 0 : job->result;
    free(scratch);
}

/* ---- the loop ---- */

static void load_done(struct rpc_call *c)
{
    struct load *l = (struct load *)c->work;
    struct metrics *m = &c->conn->rpc->daemon->metrics;
    bool more = next_block(l) != NULL;
    uint8_t *out = l->out;

    if (c->job.result < 0) {
        if (c->job.result == -ENOMEM)
            rpc_fail(c, ERROR_FULL, "later, or a greater grpc_memory", "the daemon has no memory for this reply");
        else
            rpc_fail(c, ERROR_INTERNAL, "", "a block cannot be decoded");
        return;
    }
    m->loads += l->dtype ? l->n_blocks : 0;
    m->load_bytes += l->dtype ? l->n_data : 0;
    l->out = NULL;
    rpc_answer_bytes(c, out, l->n_out, l->n_charged, more);
}

static void load_next(struct rpc_call *c)
{
    rpc_job(c, load_run, load_done);
}

/* Sums up what will be sent. */
static uint64_t sum_bytes(struct load *l)
{
    const struct prefix_block *b;
    uint64_t sum = 0;

    while ((b = next_block(l))) {
        sum += block_bytes(l, b, l->group) + HEADER_MAX;
        l->group++;
    }
    l->block = l->first;
    l->group = 0;
    return sum;
}

/* False: answered, the request is wrong. */
static bool take_request(struct rpc_call *c, const Kvd__V1__LoadRequest *m, const struct prefix *p, struct load *ret)
{
    uint32_t n_groups = p->space->n_groups;

    *ret = (struct load){.work = {.next = load_next, .end = load_end}, .first = m->first_block, .block = m->first_block};
    ret->end = m->n_blocks ? m->first_block + m->n_blocks : p->n_blocks;
    ret->groups = m->n_group ? 0 : (1u << n_groups) - 1;
    for (size_t i = 0; i < m->n_group; i++) {
        if (m->group[i] >= n_groups) {
            rpc_fail(c, ERROR_LAYOUT, "groups of the space", "group %" PRIu32 " is none of %" PRIu32, m->group[i], n_groups);
            return false;
        }
        ret->groups |= 1u << m->group[i];
    }
    if (*m->dtype && codec_dtype_parse(m->dtype, &ret->dtype) < 0)
        rpc_fail(c, ERROR_LAYOUT, "f16, bf16, f32, or nothing for the encoded bytes", "dtype \"%.20s\" is not known", m->dtype);
    else if (m->first_block > p->n_blocks || ret->end < m->first_block || ret->end > p->n_blocks)
        rpc_fail(c, ERROR_NOT_FOUND, "blocks of the prefix", "blocks %" PRIu32 " to %" PRIu32 " of a prefix of %" PRIu32, m->first_block,
                 ret->end, p->n_blocks);
    else
        return true;
    return false;
}

void rpc_load(struct rpc_call *c)
{
    const Kvd__V1__LoadRequest *m = c->message;
    struct prefix *p = rpc_prefix_find(c->conn, m->prefix);
    uint32_t most = c->conn->rpc->message_bytes;
    struct load *l, want;

    if (!p) {
        rpc_fail(c, ERROR_NOT_FOUND, "one that Match gave on this connection", "there is no prefix %" PRIu64, m->prefix);
        return;
    }
    if (!take_request(c, m, p, &want))
        return;
    l = malloc(sizeof(*l));
    if (!l) {
        rpc_fail(c, ERROR_FULL, "", "the daemon has no memory for this load");
        return;
    }
    *l = want;
    l->prefix = prefix_ref(p);
    rpc_work_begin(c, &l->work);
    l->bytes = sum_bytes(l);
    l->size = l->bytes;
    if (c->method->kind == RPC_OUT_STREAM && l->size > (most < STREAM_BYTES ? most : STREAM_BYTES))
        l->size = most < STREAM_BYTES ? most : STREAM_BYTES;
    if (c->method->kind == RPC_UNARY && l->size > most)
        rpc_fail(c, ERROR_LIMIT, "fewer blocks, LoadStream, or a greater grpc_message_bytes",
                 "the reply would be %" PRIu64 " bytes, and %" PRIu32 " are allowed", l->bytes, most);
    else
        load_next(c);
}
