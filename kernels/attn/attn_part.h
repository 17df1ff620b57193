/* Attention by vectors: the way of a call. The including file has one of attn_vec_*.h and says what ATTN_NAME is.
 *
 * Blocks are taken in chunks of up to 64 tokens. For each chunk: scores of all rows (attn_code.h from kc4 codes, attn_any.h from
 * decoded tokens of any codec), weights relative to the chunk's largest score, and their sum of values onto the rows' outputs
 * (attn_code.h from tq4 codes, attn_any.h else). Scores are kept in base 2.
 *
 * tq4's values are summed in the rotated domain, and rotated back once at the end. So a row has two partials, one of each domain,
 * merged at the end: with a first block of another codec both are in use. */
#ifndef KVD_KERNELS_ATTN_PART_H
#define KVD_KERNELS_ATTN_PART_H

#include <math.h>
#include <stdbool.h>

#include "kernels/attn/attn_int.h"
#include "kernels/codec/codec_tab.h"

#define LOG2E 1.44269504f
#define LN2 0.69314718f
#define FAR (-1e30f) /* below every score, and finite */

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
    float *s;            /* [rows][64] scores, then weights */
    int16_t *w;          /* [rows][64] weights times norms */
    float *q_pairs;      /* [rows][pieces][32] even channels, odd channels */
    uint8_t *q_bytes;    /* [rows][pieces] even high, odd high, even low, odd low: 16 bytes each */
    float *step, *middle; /* [pieces][32] as q_pairs */
    float *alpha, *beta; /* [rows] score = alpha * integer + beta */
    float *max, *sum, *top; /* [rows] of the chunk: largest score, sum of weights, largest weight times norm */
    float *keep, *gain;  /* [rows] factors of what was summed and of the chunk */
    struct levels plain, code, block;
    float *o_code;       /* [rows][slabs][8][WIDTH] in the rotated domain */
    uint8_t *sub;        /* ATTN_SUB_BYTES */
    float norm[ATTN_CHUNK];
    const uint8_t *bytes_of; /* the tile that q_bytes, alpha and beta are for */
    const uint8_t *ahead, *ahead_end; /* what will be read next */
};

/* A chunk: tokens t0 .. t0 + n - 1 of a block, at position pos. */
struct chunk {
    const struct tile_layout *layout;
    const uint8_t *tile;
    uint32_t t0, n, pos;
    bool all_seen; /* every row sees all of it */
};

#define UNROLL _Pragma("GCC unroll 4")

VEC uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* 2^x for x <= 0; 0 below 2^-126. Relative error 2e-7. */
VEC wf wf_exp2(wf x)
{
    wf v = wf_max(x, wf_set1(-200)), n = wf_round(v), f = wf_sub(v, n);
    wf y = wf_fma(wf_set1(0.00132647258f), f, wf_set1(0.00967151345f));

    y = wf_fma(y, f, wf_set1(0.0555073375f));
    y = wf_fma(y, f, wf_set1(0.240222421f));
    y = wf_fma(y, f, wf_set1(0.693146978f));
    return wf_scale(wf_fma(y, f, wf_set1(1)), n);
}

/* Asks for the next n bytes of what will be read next. */
VEC void part_ahead(struct part *p, uint32_t n)
{
    for (uint32_t i = 0; i < n && p->ahead < p->ahead_end; i += 64, p->ahead += 64)
        _mm_prefetch((const char *)p->ahead, _MM_HINT_T0);
}

#include "kernels/attn/attn_any.h"
#include "kernels/attn/attn_code.h"

/* ---- weights ---- */

/* softcap * tanh(s / softcap), in base 2. */
VEC wf wf_cap(wf s, float softcap)
{
    wf e = wf_exp2(wf_mul(wf_abs(s), wf_set1(-2 * LOG2E / softcap))), one = wf_set1(1);
    wf y = wf_mul(wf_div(wf_sub(one, e), wf_add(one, e)), wf_set1(softcap * LOG2E));

    return wf_copysign(y, s);
}

/* Scores of a row: capped, hidden ones made -infinity; the largest by lanes. */
VEC wf row_scores(struct part *p, const struct chunk *c, uint32_t row)
{
    float *s = p->s + (size_t)row * ATTN_CHUNK, cap = p->params->softcap;
    wf max = wf_set1(-INFINITY);

    if (c->all_seen && c->n == ATTN_CHUNK && cap == 0) {
        for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH)
            max = wf_max(max, wf_load(s + t));
        return max;
    }
    struct attn_sight sight = attn_sight(p->params, c->pos, c->n, p->rows->q_pos[row]);

    for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH) {
        wf v = wf_load(s + t);

        v = wf_see(cap > 0 ? wf_cap(v, cap) : v, t, sight.head, sight.from, sight.to);
        wf_store(s + t, v);
        max = wf_max(max, v);
    }
    return max;
}

/* Scores to weights relative to max; with values by code the largest weight times norm, by lanes. */
VEC wf row_weights(struct part *p, uint32_t row, wf max, bool by_code, wf *ret_sum)
{
    float *s = p->s + (size_t)row * ATTN_CHUNK;
    wf sum = wf_set1(0), top = wf_set1(0);

    max = wf_max(max, wf_set1(FAR));
    for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH) {
        wf v = wf_exp2(wf_sub(wf_load(s + t), max));

        sum = wf_add(sum, v);
        if (by_code) {
            v = wf_mul(v, wf_load(p->norm + t));
            top = wf_max(top, wf_abs(v));
        }
        wf_store(s + t, v);
    }
    *ret_sum = sum;
    return top;
}

VEC void row_integers(struct part *p, uint32_t row, wf top)
{
    const float *s = p->s + (size_t)row * ATTN_CHUNK;
    wf by = wf_div(wf_set1(WEIGHT_MAX), wf_max(top, wf_set1(1e-30f)));

    for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH)
        wf_store_int16(p->w + (size_t)row * ATTN_CHUNK + t, wf_mul(wf_load(s + t), by));
}

VEC void weights_of(struct part *p, const struct chunk *c, uint32_t row, uint32_t n, bool by_code)
{
    wf v[4], max[4], sum[4], top[4];

    UNROLL
    for (uint32_t i = 0; i < 4; i++)
        v[i] = i < n ? row_scores(p, c, row + i) : v[0];
    wf_max4(v, max);
    UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        if (i < n)
            top[i] = row_weights(p, row + i, max[i], by_code, v + i);
        else
            top[i] = v[i] = wf_set1(0);
    }
    wf_sum4(v, sum);
    if (by_code) {
        wf_max4(top, v);
        UNROLL
        for (uint32_t i = 0; i < n; i++) {
            row_integers(p, row + i, v[i]);
            p->top[row + i] = wf_first(v[i]);
        }
    }
    UNROLL
    for (uint32_t i = 0; i < n; i++) {
        p->max[row + i] = wf_first(max[i]);
        p->sum[row + i] = wf_first(sum[i]);
    }
}

static void weights(struct part *p, const struct chunk *c, bool by_code)
{
    uint32_t row = 0;

    for (; row + 4 <= p->n; row += 4) {
        if (by_code)
            weights_of(p, c, row, 4, true);
        else
            weights_of(p, c, row, 4, false);
    }
    for (; row < p->n; row++)
        weights_of(p, c, row, 1, by_code);
}

/* Adds the chunk to sums; keep and gain become the factors that outputs need. */
VEC void levels_add(struct part *p, struct levels l)
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

    *ret_all = (uint64_t)p->q_first + 1 >= end && (!params->window || head || (uint64_t)p->q_last < (uint64_t)pos + params->window);
    if (pos > p->q_last)
        return false;
    return !params->window || pos < params->sink_tokens || (uint64_t)p->q_first < end - 1 + params->window;
}

static void chunk_add(struct part *p, const struct chunk *c)
{
    bool by_code = c->layout->dim_v && c->layout->v.id == CODEC_TQ4;

    if (c->layout->k.id == CODEC_KC4 && c->layout->k.grid == CODEC_GRID_INT)
        code_scores(p, c);
    else
        any_scores(p, c);
    if (by_code)
        code_norms(p, c);
    weights(p, c, by_code);
    if (p->out->block_lse)
        levels_add(p, p->block);
    levels_add(p, by_code ? p->code : p->plain);
    if (by_code)
        code_values(p, c);
    else
        any_values(p, c);
}

static void block_add(struct part *p, const struct attn_block *block, size_t at, size_t n_blocks)
{
    if (p->out->block_lse)
        levels_reset(p, p->block);
    for (uint32_t t = 0; t < block->n_tokens; t += ATTN_CHUNK) {
        struct chunk c = {block->layout, block->tile, t, min_u32(ATTN_CHUNK, block->n_tokens - t), block->pos + t, false};

        if (part_sees(p, c.pos, c.n, &c.all_seen))
            chunk_add(p, &c);
    }
    for (uint32_t r = 0; p->out->block_lse && r < p->n; r++)
        p->out->block_lse[r * n_blocks + at] = (p->block.max[r] + log2f(p->block.sum[r])) * LN2;
}

/* ---- the call ---- */

/* Both partials of a row: the plain one is in o, relative to its level; becomes the output. */
static void row_end(struct part *p, uint32_t row)
{
    float *o = p->out->o + (size_t)row * p->dim_o, *lse = p->out->lse + row;
    float plain = p->plain.sum[row], code = p->code.sum[row];

    *lse = plain > 0 ? (p->plain.max[row] + log2f(plain)) * LN2 : -INFINITY;
    for (uint32_t i = 0; i < p->dim_o; i++)
        o[i] = plain > 0 ? o[i] / plain : 0;
    if (code > 0) {
        float *rotated = (float *)p->sub;

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
    p->s = take_rows(p, &at, ATTN_CHUNK);
    p->w = (int16_t *)take_rows(p, &at, ATTN_CHUNK / 2);
    p->q_pairs = take_rows(p, &at, p->n_pieces * 32);
    p->q_bytes = (uint8_t *)take_rows(p, &at, p->n_pieces * 16);
    p->step = attn_take(&at, sizeof(float) * p->n_pieces * 32);
    p->middle = attn_take(&at, sizeof(float) * p->n_pieces * 32);
    p->o_code = take_rows(p, &at, p->n_slabs * 8 * WIDTH);
    p->sub = attn_take(&at, ATTN_SUB_BYTES);
    p->alpha = take_rows(p, &at, 1);
    p->beta = take_rows(p, &at, 1);
    p->max = take_rows(p, &at, 1);
    p->sum = take_rows(p, &at, 1);
    p->top = take_rows(p, &at, 1);
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

static void part_clear(struct part *p)
{
    memset(p->out->o, 0, sizeof(float) * p->n * p->dim_o);
    memset(p->o_code, 0, sizeof(float) * p->n * p->n_slabs * 8 * WIDTH);
    memset(p->max, 0, sizeof(float) * p->rows_up);
    memset(p->sum, 0, sizeof(float) * p->rows_up);
    memset(p->top, 0, sizeof(float) * p->rows_up);
    levels_reset(p, p->plain);
    levels_reset(p, p->code);
}

static void vector_partial(const struct attn_params *params, const struct attn_block *blocks, size_t n_blocks,
                           const struct attn_rows *rows, const struct attn_out *out, void *work)
{
    struct part p;
    bool by_code = false;

    part_init(&p, params, n_blocks ? blocks[0].layout : NULL, rows, out, work);
    part_clear(&p);
    for (size_t b = 0; b < n_blocks && !by_code; b++)
        by_code = blocks[b].layout->k.id == CODEC_KC4;
    if (by_code)
        code_queries(&p);
    for (size_t b = 0; b < n_blocks; b++) {
        if (b + 1 < n_blocks) {
            p.ahead = blocks[b + 1].tile;
            p.ahead_end = p.ahead + blocks[b + 1].layout->bytes;
        }
        block_add(&p, blocks + b, b, n_blocks);
    }
    for (uint32_t row = 0; row < p.n; row++)
        row_end(&p, row);
}

#endif
