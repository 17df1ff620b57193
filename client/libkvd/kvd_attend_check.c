/* The checks of an attention, its queries as rows, its result from rows. */
#include <math.h>
#include <string.h>

#include "kvd_attend_impl.h"

static int check_pointers(const struct kvd_prefix *p, const struct kvd_attention *a)
{
    uint64_t cookie = p ? p->space->session->cookie : 0;

    if (!p || !a)
        return error_set(cookie, KVD_E_ARG, "prefix or attention is NULL");
    if (session_forked(p->space->session))
        return session_error_forked(p->space->session);
    if (a->size < sizeof(*a))
        return error_set(cookie, KVD_E_ARG, "attention.size is %zu; allowed: at least %zu (use KVD_ATTENTION_INIT)",
                         a->size, sizeof(*a));
    if (!a->q || !a->o || !a->lse)
        return error_set(cookie, KVD_E_ARG, "%s is NULL", !a->q ? "q" : !a->o ? "o" : "lse");
    return 0;
}

/* Layer, heads, types and numbers; fills in what follows from the layer. */
static int check_shape(struct attend_call *c)
{
    const struct kvd_space *space = c->prefix->space;
    const struct kvd_attention *a = &c->a;
    uint64_t cookie = space->session->cookie, n_rows;
    const struct payload_layer *layer;
    uint32_t dim_most;

    if (a->layer >= space->n_layers)
        return error_set(cookie, KVD_E_ARG, "layer %u; allowed: below %u", a->layer, space->n_layers);
    layer = &space->layers[a->layer];
    if (a->n_heads == 0 || a->n_heads % layer->n_kv_heads != 0 || a->n_heads > ATTEND_HEADS_MAX)
        return error_set(cookie, KVD_E_ARG, "n_heads is %u; allowed: a multiple of layer %u's %u KV heads, at most %d",
                         a->n_heads, a->layer, layer->n_kv_heads, ATTEND_HEADS_MAX);
    if (!codec_dtype_bytes(dtype_of(a->dtype)))
        return error_set(cookie, KVD_E_ARG, "dtype is none of KVD_F16, KVD_BF16, KVD_F32");
    if (layer->dim_v && a->dim_o != 0)
        return error_set(cookie, KVD_E_ARG, "dim_o is %u; allowed for layer %u, which has V: 0", a->dim_o, a->layer);
    if (!layer->dim_v && (a->dim_o < 16 || a->dim_o % 16 != 0 || a->dim_o > layer->dim_k))
        return error_set(cookie, KVD_E_ARG, "dim_o is %u; allowed for layer %u, which has no V: multiples of 16 up to %u",
                         a->dim_o, a->layer, layer->dim_k);
    c->group = layer->group;
    c->part = space->layer_index[a->layer];
    c->n_kv_heads = layer->n_kv_heads;
    c->ratio = a->n_heads / layer->n_kv_heads;
    c->dim_k = layer->dim_k;
    c->a.dim_o = layer->dim_v ? layer->dim_v : a->dim_o;
    dim_most = c->dim_k > c->a.dim_o ? c->dim_k : c->a.dim_o;
    n_rows = (uint64_t)a->n_tokens * a->n_heads;
    if (a->n_tokens == 0 || n_rows * dim_most > ATTEND_NUMBERS_MAX)
        return error_set(cookie, KVD_E_ARG, "n_tokens is %u; allowed with %u heads of %u: 1 to %u", a->n_tokens,
                         a->n_heads, dim_most, ATTEND_NUMBERS_MAX / (a->n_heads * dim_most));
    c->n_rows = a->n_tokens * c->ratio;
    if (!isfinite(a->scale) || !isfinite(a->softcap) || a->softcap < 0)
        return error_set(cookie, KVD_E_ARG, "scale is %g, softcap %g; allowed: finite numbers, softcap not below 0",
                         (double)a->scale, (double)a->softcap);
    if (a->window_tokens == 0)
        c->a.window_tokens = space->group[c->group].window_tokens;
    return 0;
}

/* Bytes from the first to behind the last row of a tensor; false: more than can be addressed. */
static bool extent(size_t n_tokens, size_t n_heads, size_t token_stride, size_t head_stride, size_t row, size_t *ret)
{
    size_t tokens, heads, sum;

    if (__builtin_mul_overflow(n_tokens - 1, token_stride, &tokens) ||
        __builtin_mul_overflow(n_heads - 1, head_stride, &heads) || __builtin_add_overflow(tokens, heads, &sum) ||
        __builtin_add_overflow(sum, row, &sum) || sum > PTRDIFF_MAX)
        return false;
    *ret = sum;
    return true;
}

static int check_strides(struct attend_call *c)
{
    struct kvd_attention *a = &c->a;
    uint64_t cookie = c->prefix->space->session->cookie;
    size_t q_row = c->dim_k * codec_dtype_bytes(dtype_of(a->dtype)), o_row = a->dim_o * sizeof(float), bytes;
    size_t tokens_apart, heads_apart;

    a->q_head_stride = a->q_head_stride ? a->q_head_stride : q_row;
    a->q_token_stride = a->q_token_stride ? a->q_token_stride : a->q_head_stride * a->n_heads;
    a->o_head_stride = a->o_head_stride ? a->o_head_stride : o_row;
    a->o_token_stride = a->o_token_stride ? a->o_token_stride : a->o_head_stride * a->n_heads;
    if (!extent(a->n_tokens, a->n_heads, a->q_token_stride, a->q_head_stride, q_row, &bytes) ||
        bytes > UINTPTR_MAX - (uintptr_t)a->q)
        return error_set(cookie, KVD_E_ARG,
                         "q's strides of %zu bytes a token and %zu a head lead out of the address space",
                         a->q_token_stride, a->q_head_stride);
    if (!extent(a->n_tokens, a->n_heads, a->o_token_stride, a->o_head_stride, o_row, &bytes) ||
        bytes > UINTPTR_MAX - (uintptr_t)a->o)
        return error_set(cookie, KVD_E_ARG,
                         "o's strides of %zu bytes a token and %zu a head lead out of the address space",
                         a->o_token_stride, a->o_head_stride);
    /* Rows of the output must not overlap, whichever of the two strides is the outer one. */
    tokens_apart = a->n_tokens > 1 ? a->o_token_stride : SIZE_MAX;
    heads_apart = a->n_heads > 1 ? a->o_head_stride : SIZE_MAX;
    if (tokens_apart < o_row || heads_apart < o_row ||
        (tokens_apart != SIZE_MAX && heads_apart != SIZE_MAX &&
         tokens_apart < (a->n_heads - 1) * heads_apart + o_row && heads_apart < (a->n_tokens - 1) * tokens_apart + o_row))
        return error_set(cookie, KVD_E_ARG,
                         "o's strides of %zu bytes a token and %zu a head let rows of %zu bytes overlap",
                         a->o_token_stride, a->o_head_stride, o_row);
    if (a->o_token_stride % sizeof(float) != 0 || a->o_head_stride % sizeof(float) != 0 ||
        ((uintptr_t)a->o | (uintptr_t)a->lse | (uintptr_t)a->mass) % sizeof(float) != 0)
        return error_set(cookie, KVD_E_ARG, "o, lse, mass or o's strides are no multiples of %zu bytes", sizeof(float));
    return 0;
}

static int check_positions(struct attend_call *c)
{
    const struct kvd_attention *a = &c->a;

    if (!a->positions) {
        if (a->first_position > UINT32_MAX - (a->n_tokens - 1))
            return error_set(c->prefix->space->session->cookie, KVD_E_ARG,
                             "first_position is %u; allowed for %u tokens: up to %u", a->first_position, a->n_tokens,
                             UINT32_MAX - (a->n_tokens - 1));
        c->pos_lo = a->first_position;
        c->pos_hi = a->first_position + (a->n_tokens - 1);
        return 0;
    }
    c->pos_lo = UINT32_MAX;
    c->pos_hi = 0;
    for (uint32_t t = 0; t < a->n_tokens; t++) {
        c->pos_lo = a->positions[t] < c->pos_lo ? a->positions[t] : c->pos_lo;
        c->pos_hi = a->positions[t] > c->pos_hi ? a->positions[t] : c->pos_hi;
    }
    return 0;
}

bool attend_needs(const struct attend_call *c, size_t block)
{
    const struct kvd_attention *a = &c->a;
    uint64_t lo = (uint64_t)block * c->prefix->space->block_tokens, hi = lo + c->prefix->space->block_tokens - 1;

    if (lo > c->pos_hi)
        return false;
    if (a->window_tokens == 0 || lo < a->sink_tokens)
        return true;
    if (hi + a->window_tokens <= c->pos_lo)
        return false;
    for (uint32_t t = 0; a->positions && t < a->n_tokens; t++)
        if (lo <= a->positions[t] && hi + a->window_tokens > a->positions[t])
            return true;
    return !a->positions; /* positions in a row leave no gap between their windows */
}

static int check_lease(const struct attend_call *c)
{
    const struct kvd_prefix *p = c->prefix;
    const struct kvd_attention *a = &c->a;
    uint64_t cookie = p->space->session->cookie;

    if (!p->life && a->n_blocks)
        return error_set(cookie, KVD_E_STALE, "nothing is leased");
    if (a->n_blocks > p->n_matched || a->first_block > p->n_matched - a->n_blocks)
        return error_set(cookie, KVD_E_STALE, "%zu blocks from block %zu on, of %zu that are matched", a->n_blocks,
                         a->first_block, p->n_matched);
    if (p->held[c->group].lo == 0)
        return 0;
    for (size_t b = a->first_block; b < a->first_block + a->n_blocks; b++)
        if (!prefix_holds(p, c->group, b) && attend_needs(c, b))
            return error_set(cookie, KVD_E_ARG,
                             "block %zu is seen with a window of %u tokens and %u first ones, and layer %u's group %u "
                             "holds blocks %zu to %zu only",
                             b, a->window_tokens, a->sink_tokens, a->layer, c->group, p->held[c->group].lo,
                             p->held[c->group].hi - 1);
    return 0;
}

int attend_check(struct kvd_prefix *prefix, const struct kvd_attention *attention, struct attend_call *ret)
{
    int r = check_pointers(prefix, attention);

    if (r != 0)
        return r;
    *ret = (struct attend_call){.prefix = prefix, .a = *attention};
    r = check_shape(ret);
    if (r == 0)
        r = check_strides(ret);
    if (r == 0)
        r = check_positions(ret);
    return r != 0 ? r : check_lease(ret);
}

/* ---- Rows ---- */

/* Index of the first that is infinite or no number, or n. */
static size_t find_not_finite(const float *x, size_t n)
{
    uint32_t bad = 0;

    for (size_t i = 0; i < n; i++) {
        uint32_t bits;

        memcpy(&bits, &x[i], sizeof(bits));
        bad |= (bits & UINT32_C(0x7f800000)) == UINT32_C(0x7f800000);
    }
    if (!bad)
        return n;
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return i;
    return n;
}

int attend_gather(const struct attend_call *c, float *rows, uint32_t *pos)
{
    const struct kvd_attention *a = &c->a;
    const struct kvd *s = c->prefix->space->session;
    struct codec_spec raw = codec_spec_raw(dtype_of(a->dtype));
    size_t row_bytes = c->dim_k * codec_dtype_bytes(dtype_of(a->dtype));
    /* Heads of a group that lie side by side are converted at once. */
    uint32_t run = a->q_head_stride == row_bytes ? c->ratio : 1;

    for (uint32_t kv = 0; kv < c->n_kv_heads; kv++)
        for (uint32_t t = 0; t < a->n_tokens; t++)
            for (uint32_t g = 0; g < c->ratio; g += run) {
                uint32_t head = kv * c->ratio + g;
                const char *q = (const char *)a->q + t * a->q_token_stride + head * a->q_head_stride;
                float *row = rows + ((size_t)kv * c->n_rows + (size_t)t * c->ratio + g) * c->dim_k;
                size_t bad;

                if (codec_decode(s->codecs, &raw, NULL, NULL, q, run, c->dim_k, 0, run, CODEC_F32, row,
                                 c->dim_k * sizeof(float)) < 0)
                    return error_set(s->cookie, KVD_E_INTERNAL, "queries of %u numbers cannot be read", c->dim_k);
                bad = find_not_finite(row, (size_t)run * c->dim_k);
                if (bad < (size_t)run * c->dim_k)
                    return error_set(s->cookie, KVD_E_ARG, "q of token %u, head %zu, channel %zu is %g", t,
                                     head + bad / c->dim_k, bad % c->dim_k, (double)row[bad]);
            }
    for (uint32_t i = 0; pos && i < c->n_rows; i++)
        pos[i] = attend_position(c, i / c->ratio);
    return 0;
}

void attend_scatter(const struct attend_call *c, uint32_t kv, uint32_t row0, uint32_t n, const float *o, const float *lse)
{
    const struct kvd_attention *a = &c->a;

    for (uint32_t r = 0; r < n; r++) {
        uint32_t t = (row0 + r) / c->ratio, head = kv * c->ratio + (row0 + r) % c->ratio;

        memcpy((char *)a->o + t * a->o_token_stride + head * a->o_head_stride, o + (size_t)r * a->dim_o,
               a->dim_o * sizeof(*o));
        a->lse[(size_t)t * a->n_heads + head] = lse[r];
    }
}
