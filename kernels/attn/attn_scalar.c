/* The specification: tokens are decoded by the scalar codec to fp32, everything else is fp64. */
#include <math.h>
#include <string.h>

#include "kernels/attn/attn_int.h"

/* A sum of exponentials, as sum * exp(max). */
struct level {
    double max, sum;
};

/* A call's scratch. o is relative to the row's own level.max. */
struct scalar_state {
    double *o;                 /* [rows][dim_o] */
    struct level *row, *block; /* [rows], of all and of the block in hand */
    float *k, *v;              /* [ATTN_SUBTILE] tokens */
};

/* Adds exp(s) and returns what all that was added before must be multiplied by. */
static double level_add(struct level *l, double s)
{
    double by = 1;

    if (s > l->max) {
        by = exp(l->max - s); /* 0 if nothing was there */
        l->sum *= by;
        l->max = s;
    }
    l->sum += exp(s - l->max);
    return by;
}

static float level_log(const struct level *l)
{
    return l->sum > 0 ? (float)(l->max + log(l->sum)) : -INFINITY;
}

static double score(const struct attn_params *params, const float *q, const float *k, uint32_t dim)
{
    double s = 0;

    for (uint32_t i = 0; i < dim; i++)
        s += (double)q[i] * (double)k[i];
    s *= (double)params->scale;
    return params->softcap > 0 ? (double)params->softcap * tanh(s / (double)params->softcap) : s;
}

static void see(struct scalar_state *st, uint32_t row, uint32_t dim, double s, const float *v)
{
    double *o = st->o + (size_t)row * dim, by, weight;

    if (s == -HUGE_VAL)
        return;
    level_add(st->block + row, s);
    by = level_add(st->row + row, s);
    weight = exp(s - st->row[row].max);
    for (uint32_t i = 0; i < dim; i++)
        o[i] = by * o[i] + weight * (double)v[i];
}

static void block_partial(const struct attn_params *params, const struct attn_block *block,
                          const struct attn_rows *rows, struct scalar_state *st)
{
    const struct tile_layout *l = block->layout;

    for (uint32_t t0 = 0; t0 < block->n_tokens; t0 += ATTN_SUBTILE) {
        uint32_t t1 = t0 + ATTN_SUBTILE < block->n_tokens ? t0 + ATTN_SUBTILE : block->n_tokens;
        const float *v = l->dim_v ? st->v : st->k;
        uint32_t v_stride = l->dim_v ? l->dim_v : l->dim_k;

        (void)tile_decode(&codec_ops_scalar, l, NULL, NULL, block->tile, t0, t1, CODEC_F32, st->k,
                          sizeof(float) * l->dim_k, st->v, sizeof(float) * l->dim_v);
        for (uint32_t row = 0; row < rows->n; row++) {
            struct attn_sight sight = attn_sight(params, block->pos, block->n_tokens, rows->q_pos[row]);

            for (uint32_t t = t0; t < t1; t++)
                if (t < sight.head || (t >= sight.from && t < sight.to))
                    see(st, row, params->dim_o,
                        score(params, rows->q + (size_t)row * l->dim_k, st->k + (t - t0) * l->dim_k, l->dim_k),
                        v + (t - t0) * v_stride);
        }
    }
}

static void scalar_partial(const struct attn_params *params, const struct attn_block *blocks, size_t n_blocks,
                           const struct attn_rows *rows, const struct attn_out *out, void *work)
{
    uint32_t dim = params->dim_o, dim_k = n_blocks ? blocks[0].layout->dim_k : 16;
    uint8_t *at = work;
    struct scalar_state st;

    st.o = attn_take(&at, sizeof(double) * rows->n * dim);
    st.row = attn_take(&at, sizeof(struct level) * rows->n);
    st.block = attn_take(&at, sizeof(struct level) * rows->n);
    st.k = attn_take(&at, sizeof(float) * ATTN_SUBTILE * dim_k);
    st.v = attn_take(&at, sizeof(float) * ATTN_SUBTILE * dim);
    memset(st.o, 0, sizeof(double) * rows->n * dim);
    for (uint32_t r = 0; r < rows->n; r++)
        st.row[r] = (struct level){-HUGE_VAL, 0};
    for (size_t b = 0; b < n_blocks; b++) {
        for (uint32_t r = 0; r < rows->n; r++)
            st.block[r] = (struct level){-HUGE_VAL, 0};
        block_partial(params, blocks + b, rows, &st);
        for (uint32_t r = 0; out->block_lse && r < rows->n; r++)
            out->block_lse[r * n_blocks + b] = level_log(st.block + r);
    }
    for (uint32_t r = 0; r < rows->n; r++) {
        double by = st.row[r].sum > 0 ? 1 / st.row[r].sum : 0;

        out->lse[r] = level_log(st.row + r);
        for (uint32_t i = 0; i < dim; i++)
            out->o[(size_t)r * dim + i] = (float)(st.o[(size_t)r * dim + i] * by);
    }
}

const struct attn_ops attn_ops_scalar = {"scalar", scalar_partial};
