/* Attention over encoded blocks: partial outputs and their log-sum-exp, straight from the packed codes.
 *
 * What is computed, for each query row r of one KV head and the tokens t of a list of blocks:
 *
 *   s[t] = cap(scale * dot(q[r], K[t]))           cap(x) = softcap * tanh(x / softcap), or x if softcap is 0
 *   visible(t):  pos(t) <= q_pos[r]  and  (window == 0 or q_pos[r] - pos(t) < window or pos(t) < sink_tokens)
 *   lse[r] = log(sum over visible t of exp(s[t]))
 *   o[r]   = sum over visible t of exp(s[t] - lse[r]) * V[t]
 *
 * K and V are the decoded values of the tile (kernels/codec/tile.h). A row that sees nothing has lse -infinity and o zero.
 * Partials over disjoint token sets merge exactly (attn_merge()); learned sinks are one more partial there: lse = the sink's
 * logit, o = 0. Source: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022, section 3.1; the merge as in Ye et al.,
 * FlashInfer, 2025, section 2.2 (attention states).
 *
 * The scalar variant decodes and accumulates in fp64: it is the specification. Other variants stay within the bounds of
 * docs/attention.md, by codec. Nothing here allocates or keeps state; any thread. The tiles are trusted as to their size, not
 * as to their content: any bytes give some numbers, never a fault.
 *
 * Includes: the C library, kernels/codec and kernels/cpu.h. */
#ifndef KVD_KERNELS_ATTN_ATTN_H
#define KVD_KERNELS_ATTN_ATTN_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/codec/tile.h"
#include "kernels/cpu.h"

#define ATTN_DIM_MAX CODEC_DIM_MAX

/* What all rows of a call share. */
struct attn_params {
    float scale;          /* finite */
    float softcap;        /* 0: none; else positive */
    uint32_t window;      /* tokens, the query's own included; 0: none */
    uint32_t sink_tokens; /* the first of the sequence, visible whatever the window */
    uint32_t dim_o;       /* of the output: dim_v; for a layer without V (latent attention) the values are the first dim_o
                             channels of K */
};

/* One KV head's tile of one block. Borrowed for the call. */
struct attn_block {
    const void *tile;                 /* layout->bytes, aligned to TILE_ALIGN */
    const struct tile_layout *layout; /* blocks of a list may differ in codecs (first blocks), not in sizes of a vector */
    uint32_t pos;                     /* of the block's first token in the sequence */
    uint32_t n_tokens;                /* of the block that count, from its first: at most layout->n_tokens */
};

/* Query rows of one KV head: those of its group's heads, of several query tokens, of several requests: stacked. */
struct attn_rows {
    uint32_t n;
    const float *q;        /* [n][dim_k], finite */
    const uint32_t *q_pos; /* [n] positions in the sequence */
};

/* Where a partial goes: o [n][dim_o], lse [n] (natural logarithm); block_lse [n][n_blocks] or NULL: log-sum-exp of each
 * block alone, so that its share of the attention is exp(block_lse - lse). */
struct attn_out {
    float *o, *lse;
    float *block_lse;
};

/* One variant. Arguments as of attn_partial(), checked; work is attn_work_bytes() long and aligned to 64. */
struct attn_ops {
    const char *name; /* "scalar", "avx2", "avx512", "avx512-vnni" */
    void (*partial)(const struct attn_params *params, const struct attn_block *blocks, size_t n_blocks,
                    const struct attn_rows *rows, const struct attn_out *out, void *work);
};
extern const struct attn_ops attn_ops_scalar;
extern const struct attn_ops attn_ops_avx2;        /* AVX2, FMA, F16C, BMI2 */
extern const struct attn_ops attn_ops_avx512;      /* AVX-512 F, BW, VL, DQ and the above */
extern const struct attn_ops attn_ops_avx512_vnni; /* AVX-512 VNNI and the above */

/* The fastest variant for these features; NULL: the scalar one. Choose once and pass it along. */
const struct attn_ops *attn_ops_choose(const struct cpu_features *cpu);

/* Bytes of scratch memory for a call; an upper bound for every variant. */
size_t attn_work_bytes(uint32_t n_rows, uint32_t n_tokens, uint32_t dim_k, uint32_t dim_o);

/* Attention of the rows over the blocks, in order. work: attn_work_bytes(rows->n, tokens of a block, dim_k, dim_o) bytes,
 * aligned to 64, not shared with another call in progress. n_blocks may be 0.
 * Errors: -EINVAL (no rows, sizes that differ within the list or from dim_o, a scale that is not finite, a negative softcap). */
int attn_partial(const struct attn_ops *ops, const struct attn_params *params, const struct attn_block *blocks,
                 size_t n_blocks, const struct attn_rows *rows, const struct attn_out *out, void *work);

/* Merges partials of one row into the first: o[dim], *lse become those of the union of both token sets. Either may be empty
 * (lse -infinity). Any order gives the same within rounding. */
void attn_merge(float *o, float *lse, const float *other_o, float other_lse, uint32_t dim);

#endif
