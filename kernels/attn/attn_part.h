/* Attention by vectors: the way of a call. The including file has one of attn_vec_*.h, codec_vec_*.h of the same
 * instruction set, and says what ATTN_CODEC is.
 *
 * Blocks are taken in chunks of up to 64 tokens. For each chunk: scores of all rows (attn_code.h from kc4 codes,
 * attn_plain.h from codes that one conversion turns into numbers, attn_any.h from decoded tokens of any codec),
 * weights relative to the chunk's largest score, and their sum of values onto the rows' outputs (attn_code.h from
 * tq4 codes, the others as for scores). Scores are kept in base 2.
 *
 * tq4's values are summed in the rotated domain, and rotated back once at the end. So a row has two partials, one of
 * each domain, merged at the end: with a first block of another codec both are in use. */
#ifndef KVD_KERNELS_ATTN_PART_H
#define KVD_KERNELS_ATTN_PART_H

#include <math.h>
#include <stdbool.h>

#include "kernels/attn/attn_int.h"
#include "kernels/codec/codec_num.h"
#include "kernels/codec/codec_tab.h"

#define LOG2E 1.44269504f
#define LN2 0.69314718f
#define FAR (-3.4e38f) /* below every score that fp32 has, and finite */

/* Sums of exponentials of the rows: sum * 2^max. [rows_up] */
struct levels {
    float *max, *sum;
};

struct part {
    const struct attn_params *params;
    const struct attn_rows *rows;
    const struct attn_out *out;
    const struct codec_ops *codec;
    uint32_t n, rows_up; /* rows; in whole registers */
    uint32_t dim_k, dim_o;
    uint32_t n_pieces;   /* 32 channels of keys each, the last one perhaps half */
    uint32_t n_slabs;    /* WIDTH * 8 channels of values each, the last one perhaps in part */
    uint32_t q_first, q_last; /* positions */
    float unit;          /* of scores: before the cap if there is one, else base 2 */
    float *s[2];         /* [rows][64] scores, then weights, of two chunks in hand */
    int16_t *w;          /* [rows][64] weights times norms */
    float *q_pairs;      /* [rows][pieces][32] even channels, odd channels */
    uint8_t *q_bytes;    /* [rows / 4][pieces][4][4 rows]: high bytes of 4 even, odd channels; low bytes */
    float *step, *middle; /* [pieces][32] as q_pairs */
    float *q_top;        /* [rows] largest magnitude of query * step */
    float *alpha, *beta; /* [rows] score = alpha * integer + beta */
    float *max, *sum;    /* [rows] of the chunk: largest score (plus logarithm of norm), sum of weights relative to it */
    float *keep, *gain;  /* [rows] factors of what was summed and of the chunk */
    struct levels plain, code, block;
    float *o_code;       /* [rows][slabs][8][WIDTH] in the rotated domain */
    uint8_t *sub;        /* ATTN_SUB_BYTES */
    uint8_t *pad;        /* ATTN_PAD_BYTES: codes of keys at the end of a block */
    float norm_log[ATTN_CHUNK], norm_inverse[ATTN_CHUNK]; /* of the tokens of the chunk, values by code */
    float norm_whole[ATTN_CHUNK]; /* WEIGHT_MAX, or 0 where the norm is 0 */
    const uint8_t *ahead[2], *ahead_end[2]; /* what will be read next */
    bool ahead_far; /* three chunks do not fit into the first-level cache: to the second */
};

/* A chunk: tokens t0 .. t0 + n - 1 of a block, at position pos. */
struct chunk {
    const struct tile_layout *layout;
    const uint8_t *tile;
    size_t block;
    uint32_t t0, n, pos;
    bool all_seen; /* every row sees all of it */
    float *s;      /* [rows][64] scores, then weights */
};

#define UNROLL _Pragma("GCC unroll 8")

VEC uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* 2^x for x <= 0, relative error 3e-6; never below 2^-126; no number if x is none. */
VEC wf wf_exp2_quick(wf x)
{
    wf v = wf_max(wf_set1(-126), x), n = wf_round(v), f = wf_sub(v, n);
    wf y = wf_fma(wf_set1(0.00958285260f), f, wf_set1(0.0559064347f));

    y = wf_fma(y, f, wf_set1(0.240240987f));
    y = wf_fma(y, f, wf_set1(0.693124192f));
    return wf_scale_normal(wf_fma(y, f, wf_set1(1)), n);
}

/* log2 of a positive normal number, error 4e-7. */
VEC wf wf_log2(wf x)
{
    wf n, t = wf_sub(wf_mantissa(x, &n), wf_set1(1));
    wf y = wf_fma(wf_set1(0.114521843f), t, wf_set1(-0.240703109f));

    y = wf_fma(y, t, wf_set1(0.299766229f));
    y = wf_fma(y, t, wf_set1(-0.362009714f));
    y = wf_fma(y, t, wf_set1(0.480521133f));
    y = wf_fma(y, t, wf_set1(-0.721309382f));
    y = wf_fma(y, t, wf_set1(1.44269843f));
    return wf_fma(y, t, n);
}

/* 2^x for x <= 0; 0 below 2^-126; no number if x is none. Relative error 2e-7. */
VEC wf wf_exp2(wf x)
{
    wf v = wf_max(wf_set1(-200), x), n = wf_round(v), f = wf_sub(v, n);
    wf y = wf_fma(wf_set1(0.00132647258f), f, wf_set1(0.00967151345f));

    y = wf_fma(y, f, wf_set1(0.0555073375f));
    y = wf_fma(y, f, wf_set1(0.240222421f));
    y = wf_fma(y, f, wf_set1(0.693146978f));
    return wf_scale(wf_fma(y, f, wf_set1(1)), n);
}

/* Asks for the next n bytes of keys (0) or values (1) that will be read next. */
VEC void part_ahead(struct part *p, uint32_t which, uint32_t n)
{
    const uint8_t *at = p->ahead[which], *end = at + n < p->ahead_end[which] ? at + n : p->ahead_end[which];

    if (p->ahead_far)
        for (; at < end; at += 64)
            _mm_prefetch((const char *)at, _MM_HINT_T1);
    for (; at < end; at += 64)
        _mm_prefetch((const char *)at, _MM_HINT_T0);
    p->ahead[which] = at;
}

/* The same for a loop whose turns each take n_lines of them, if there are any; it may ask for a little beyond. */
VEC const uint8_t *ahead_lines(const uint8_t *at, uint32_t n_lines)
{
    if (!at)
        return NULL;
    UNROLL
    for (uint32_t i = 0; i < n_lines; i++)
        _mm_prefetch((const char *)at + 64 * i, _MM_HINT_T0);
    return at + 64 * n_lines;
}

#include "kernels/attn/attn_any.h"
#include "kernels/attn/attn_code.h"
#include "kernels/attn/attn_plain.h"

static bool keys_by_code(const struct tile_layout *l)
{
    return l->k.id == CODEC_KC4 && l->k.grid == CODEC_GRID_INT;
}

static bool values_by_code(const struct tile_layout *l)
{
    return l->dim_v && l->v.id == CODEC_TQ4;
}

/* ---- weights ---- */

/* softcap * tanh(s / softcap), in base 2. */
VEC wf wf_cap(wf s, float softcap)
{
    wf e = wf_exp2(wf_mul(wf_abs(s), wf_set1(-2 * LOG2E / softcap))), one = wf_set1(1);
    wf y = wf_mul(wf_div(wf_sub(one, e), wf_add(one, e)), wf_set1(softcap * LOG2E));

    return wf_copysign(y, s);
}

/* Scores of a row: capped, hidden ones made -infinity; the largest by lanes, with values by code of the sums with
 * the norms' logarithms. */
VEC wf row_scores(struct part *p, const struct chunk *c, uint32_t row, bool by_code)
{
    float *s = c->s + (size_t)row * ATTN_CHUNK, cap = p->params->softcap;
    bool as_is = c->all_seen && c->n == ATTN_CHUNK && cap == 0;
    struct attn_sight sight = {0};
    wf max = wf_set1(-INFINITY);

    if (!as_is)
        sight = attn_sight(p->params, c->pos, c->n, p->rows->q_pos[row]);
    for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH) {
        wf v = wf_load(s + t);

        if (!as_is)
            v = wf_see(cap > 0 ? wf_cap(v, cap) : v, t, sight.head, sight.from, sight.to);
        if (!as_is)
            wf_store(s + t, v);
        max = wf_max(max, by_code ? wf_add(v, wf_load(p->norm_log + t)) : v);
    }
    return max;
}

/* Scores to weights relative to max; their sum by lanes. */
VEC wf row_weights(const struct chunk *c, uint32_t row, wf max)
{
    float *s = c->s + (size_t)row * ATTN_CHUNK;
    wf sum = wf_set1(0);

    for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH) {
        wf v = wf_exp2(wf_sub(wf_load(s + t), max));

        sum = wf_add(sum, v);
        wf_store(s + t, v);
    }
    return sum;
}

/* The same for values by code: weights times norms as whole numbers, relative to the largest. */
VEC wf row_integers(const struct part *p, const struct chunk *c, uint32_t row, wf max)
{
    const float *s = c->s + (size_t)row * ATTN_CHUNK;
    wf sum = wf_set1(0);

    UNROLL
    for (uint32_t t = 0; t < ATTN_CHUNK; t += 2 * WIDTH) {
        wf v[2];

        UNROLL
        for (uint32_t i = 0; i < 2; i++) {
            uint32_t at = t + i * WIDTH;

            v[i] = wf_exp2_quick(wf_add(wf_load(s + at), wf_sub(wf_load(p->norm_log + at), max)));
            sum = wf_fma(v[i], wf_load(p->norm_inverse + at), sum);
            v[i] = wf_mul(v[i], wf_load(p->norm_whole + at));
        }
        wf_store_int16(p->w + (size_t)row * ATTN_CHUNK + t, v[0], v[1]);
    }
    return sum;
}

VEC void tops_of(struct part *p, const struct chunk *c, bool by_code, uint32_t row, uint32_t n)
{
    wf v[4], max[4];

    UNROLL
    for (uint32_t i = 0; i < 4; i++)
        v[i] = i < n ? row_scores(p, c, row + i, by_code) : v[0];
    wf_max4(v, max);
    UNROLL
    for (uint32_t i = 0; i < n; i++)
        p->max[row + i] = wf_first(max[i]);
}

VEC void weights_of(struct part *p, const struct chunk *c, bool by_code, uint32_t row, uint32_t n)
{
    wf v[4];

    UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        wf max = wf_max(wf_set1(p->max[row + (i < n ? i : 0)]), wf_set1(FAR));

        if (i < n)
            v[i] = by_code ? row_integers(p, c, row + i, max) : row_weights(c, row + i, max);
        else
            v[i] = wf_set1(0);
    }
    wf_sum4(v, v);
    UNROLL
    for (uint32_t i = 0; i < n; i++)
        p->sum[row + i] = wf_first(v[i]);
}

/* The largest scores of all rows. */
static void chunk_tops(struct part *p, const struct chunk *c)
{
    bool by_code = values_by_code(c->layout);

    if (by_code)
        code_norms(p, c);
    for (uint32_t row = 0; row < p->n; row += 4) {
        if (by_code)
            BY_ROWS(p->n - row, tops_of, p, c, true, row);
        else
            BY_ROWS(p->n - row, tops_of, p, c, false, row);
    }
}

/* Adds the chunk to sums; keep and gain become the factors that outputs need. */
static void levels_add(struct part *p, struct levels l)
{
    for (uint32_t r = 0; r < p->n; r += WIDTH) {
        wf old = wf_load(l.max + r), new = wf_load(p->max + r), max = wf_max(old, new), safe = wf_max(max, wf_set1(FAR));
        wf keep = wf_exp2(wf_sub(old, safe)), gain = wf_exp2(wf_sub(new, safe));

        wf_store(l.sum + r, wf_fma(wf_load(l.sum + r), keep, wf_mul(wf_load(p->sum + r), gain)));
        wf_store(l.max + r, max);
        wf_store(p->keep + r, keep);
        wf_store(p->gain + r, gain);
    }
}

static void levels_reset(struct part *p, struct levels l)
{
    for (uint32_t r = 0; r < p->rows_up; r++) {
        l.max[r] = -INFINITY;
        l.sum[r] = 0;
    }
}

/* ---- blocks ---- */

/* Does any row see a token of these; *ret_all: does every row see every one. */
static bool part_sees(const struct part *p, uint32_t pos, uint32_t n, bool *ret_all)
{
    const struct attn_params *params = p->params;
    uint64_t end = (uint64_t)pos + n;
    bool head = end <= params->sink_tokens;

    *ret_all = (uint64_t)p->q_first + 1 >= end &&
               (!params->window || head || (uint64_t)p->q_last < (uint64_t)pos + params->window);
    if (pos > p->q_last)
        return false;
    return !params->window || pos < params->sink_tokens || (uint64_t)p->q_first < end - 1 + params->window;
}

static void chunk_scores(struct part *p, const struct chunk *c)
{
    struct plain plain;

    if (keys_by_code(c->layout))
        code_scores(p, c);
    else if (plain_of(c, false, &plain))
        plain_scores(p, c, &plain);
    else
        any_scores(p, c);
}

static void chunk_weights(struct part *p, const struct chunk *c)
{
    bool by_code = values_by_code(c->layout);

    for (uint32_t row = 0; row < p->n; row += 4) {
        if (by_code)
            BY_ROWS(p->n - row, weights_of, p, c, true, row);
        else
            BY_ROWS(p->n - row, weights_of, p, c, false, row);
    }
    if (p->out->block_lse)
        levels_add(p, p->block);
    levels_add(p, by_code ? p->code : p->plain);
}

static void chunk_values(struct part *p, const struct chunk *c)
{
    struct plain plain;

    if (values_by_code(c->layout))
        code_values(p, c);
    else if (plain_of(c, true, &plain))
        plain_values(p, c, &plain);
    else
        any_values(p, c);
}

/* The next chunk that a row sees. */
struct walk {
    const struct attn_block *blocks;
    size_t n_blocks, at;
    uint32_t t;
};

static bool walk_next(const struct part *p, struct walk *w, struct chunk *ret_chunk)
{
    for (; w->at < w->n_blocks; w->at++, w->t = 0) {
        const struct attn_block *b = w->blocks + w->at;

        for (; w->t < b->n_tokens; w->t += ATTN_CHUNK) {
            uint32_t n = min_u32(ATTN_CHUNK, b->n_tokens - w->t), pos = b->pos + w->t;

            if (!part_sees(p, pos, n, &ret_chunk->all_seen))
                continue;
            ret_chunk->layout = b->layout;
            ret_chunk->tile = b->tile;
            ret_chunk->block = w->at;
            ret_chunk->t0 = w->t;
            ret_chunk->n = n;
            ret_chunk->pos = pos;
            w->t += ATTN_CHUNK;
            return true;
        }
    }
    return false;
}

/* What is to be asked for: side data at the begin of a block, at once; then keys' codes and values' codes. */
static void ahead_set(struct part *p, const struct chunk *c)
{
    const struct tile_layout *l;
    uint32_t k_row, v_row;

    p->ahead[0] = p->ahead[1] = p->ahead_end[0] = p->ahead_end[1] = NULL;
    if (!c)
        return;
    l = c->layout;
    p->ahead_far = l->bytes / l->n_tokens * c->n > 16384;
    k_row = l->k_codes_bytes / l->n_tokens;
    v_row = l->v_codes_bytes / l->n_tokens;
    if (c->t0 == 0) {
        p->ahead[0] = c->tile;
        p->ahead_end[0] = c->tile + l->k_codes_off;
        part_ahead(p, 0, l->k_codes_off);
    }
    p->ahead[0] = c->tile + l->k_codes_off + (size_t)c->t0 * k_row;
    p->ahead_end[0] = p->ahead[0] + (size_t)c->n * k_row;
    p->ahead[1] = c->tile + l->v_codes_off + (size_t)c->t0 * v_row;
    p->ahead_end[1] = p->ahead[1] + (size_t)c->n * v_row;
}

static void block_end(struct part *p, size_t block, size_t n_blocks)
{
    for (uint32_t r = 0; r < p->n; r++)
        p->out->block_lse[r * n_blocks + block] = (p->block.max[r] + log2f(p->block.sum[r])) * LN2;
    levels_reset(p, p->block);
}

/* What of the queries depends on the block, in two steps; done when a chunk begins a block of its codec. */
static bool begins_block(const struct chunk *c, const struct chunk *before)
{
    return keys_by_code(c->layout) && (!before || before->block != c->block);
}

/* Each turn does one step of several chunks, and steps that wait for each other have others between them: scores of
 * this chunk, the queries of the one after, weights and values of the one before; the second one after is asked for. */
static void part_walk(struct part *p, const struct attn_block *blocks, size_t n_blocks)
{
    struct walk w = {blocks, n_blocks, 0, 0};
    struct chunk ring[4];
    bool more = true;

    for (size_t i = 0, n = 0; i <= n; i++) { /* n: chunks so far */
        struct chunk *before = ring + (i + 3) % 4, *this = ring + i % 4, *after = ring + (i + 1) % 4;
        bool queries;

        for (; more && n < i + 3; n += more) {
            more = walk_next(p, &w, ring + n % 4);
            ring[n % 4].s = p->s[n % 2];
        }
        if (i == 0 && n && begins_block(this, NULL)) {
            code_tops(p, this);
            code_bytes(p);
        }
        ahead_set(p, i + 2 < n ? ring + (i + 2) % 4 : NULL);
        if (i < n)
            chunk_scores(p, this);
        queries = i + 1 < n && begins_block(after, this);
        if (queries)
            code_tops(p, after);
        if (i)
            chunk_tops(p, before);
        if (queries)
            code_bytes(p);
        if (i) {
            chunk_weights(p, before);
            if (p->out->block_lse && (i == n || this->block != before->block))
                block_end(p, before->block, n_blocks);
            chunk_values(p, before);
        }
    }
}

/* ---- the call ---- */

/* Both partials of a row: the plain one is in o, relative to its level; becomes the output. */
static void row_end(struct part *p, uint32_t row)
{
    float *o = p->out->o + (size_t)row * p->dim_o, *lse = p->out->lse + row, *rotated = (float *)p->sub;
    float plain = p->plain.sum[row], code = p->code.sum[row];

    *lse = -INFINITY;
    if (plain != 0) { /* one that is no number, of scores beyond fp32, becomes a log-sum-exp that is none */
        wf by = wf_set1(1 / plain);

        *lse = (p->plain.max[row] + log2f(plain)) * LN2;
        for (uint32_t i = 0; i < p->dim_o; i += WIDTH)
            wf_store(o + i, wf_mul(wf_load(o + i), by));
    }
    if (code != 0) {
        code_rotate_back(p, row, 1 / code, rotated);
        attn_merge(o, lse, rotated, (p->code.max[row] + log2f(code)) * LN2, p->dim_o);
    }
}

static float *take_rows(const struct part *p, uint8_t **at, size_t each)
{
    return attn_take(at, sizeof(float) * p->rows_up * each);
}

static void part_init(struct part *p, const struct attn_params *params, const struct tile_layout *layout,
                      const struct attn_rows *rows, const struct attn_out *out, void *work)
{
    uint8_t *at = work;

    *p = (struct part){.params = params, .rows = rows, .out = out, .codec = &ATTN_CODEC, .n = rows->n, .dim_o = params->dim_o};
    p->dim_k = layout ? layout->dim_k : 16;
    p->rows_up = (rows->n + 15) & ~15u;
    p->n_pieces = (p->dim_k + 31) / 32;
    p->n_slabs = (p->dim_o + 8 * WIDTH - 1) / (8 * WIDTH);
    p->unit = params->softcap > 0 ? params->scale : params->scale * LOG2E;
    p->s[0] = take_rows(p, &at, ATTN_CHUNK);
    p->s[1] = take_rows(p, &at, ATTN_CHUNK);
    p->w = (int16_t *)take_rows(p, &at, ATTN_CHUNK / 2);
    p->q_pairs = take_rows(p, &at, p->n_pieces * 32);
    p->q_bytes = (uint8_t *)take_rows(p, &at, p->n_pieces * 16);
    p->step = attn_take(&at, sizeof(float) * p->n_pieces * 32);
    p->middle = attn_take(&at, sizeof(float) * p->n_pieces * 32);
    p->o_code = take_rows(p, &at, p->n_slabs * 8 * WIDTH);
    p->sub = attn_take(&at, ATTN_SUB_BYTES);
    p->pad = attn_take(&at, ATTN_PAD_BYTES);
    p->q_top = take_rows(p, &at, 1);
    p->alpha = take_rows(p, &at, 1);
    p->beta = take_rows(p, &at, 1);
    p->max = take_rows(p, &at, 1);
    p->sum = take_rows(p, &at, 1);
    p->keep = take_rows(p, &at, 1);
    p->gain = take_rows(p, &at, 1);
    p->plain = (struct levels){take_rows(p, &at, 1), take_rows(p, &at, 1)};
    p->code = (struct levels){take_rows(p, &at, 1), take_rows(p, &at, 1)};
    p->block = (struct levels){take_rows(p, &at, 1), take_rows(p, &at, 1)};
    p->q_first = p->q_last = rows->q_pos[0];
    for (uint32_t r = 1; r < rows->n; r++) {
        p->q_first = min_u32(p->q_first, rows->q_pos[r]);
        p->q_last = rows->q_pos[r] > p->q_last ? rows->q_pos[r] : p->q_last;
    }
}

static void part_clear(struct part *p, size_t n_blocks)
{
    memset(p->out->o, 0, sizeof(float) * p->n * p->dim_o);
    memset(p->o_code, 0, sizeof(float) * p->n * p->n_slabs * 8 * WIDTH);
    memset(p->max, 0, sizeof(float) * p->rows_up);
    memset(p->sum, 0, sizeof(float) * p->rows_up);
    levels_reset(p, p->plain);
    levels_reset(p, p->code);
    levels_reset(p, p->block);
    for (size_t i = 0; p->out->block_lse && i < p->n * n_blocks; i++)
        p->out->block_lse[i] = -INFINITY;
}

static void vector_partial(const struct attn_params *params, const struct attn_block *blocks, size_t n_blocks,
                           const struct attn_rows *rows, const struct attn_out *out, void *work)
{
    struct part p;
    bool by_code = false;

    part_init(&p, params, n_blocks ? blocks[0].layout : NULL, rows, out, work);
    part_clear(&p, n_blocks);
    for (size_t b = 0; b < n_blocks && !by_code; b++)
        by_code = blocks[b].layout->k.id == CODEC_KC4;
    if (by_code)
        code_queries(&p);
    part_walk(&p, blocks, n_blocks);
    for (uint32_t row = 0; row < p.n; row++)
        row_end(&p, row);
}

#endif
