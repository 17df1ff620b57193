#include "kernels/attn/attn.h"

#include <errno.h>
#include <math.h>

#include "kernels/attn/attn_int.h"

const struct attn_ops *attn_ops_choose(const struct cpu_features *cpu)
{
    if (cpu && cpu->avx512_vnni)
        return &attn_ops_avx512_vnni;
    if (cpu && cpu->avx512)
        return &attn_ops_avx512;
    return cpu && cpu->avx2 ? &attn_ops_avx2 : &attn_ops_scalar;
}

size_t attn_work_bytes(uint32_t n_rows, uint32_t n_tokens, uint32_t dim_k, uint32_t dim_o)
{
    (void)n_tokens; /* blocks are taken in chunks, whatever their size */
    size_t scalar = attn_scalar_bytes(n_rows, dim_k, dim_o), vector = attn_vector_bytes(n_rows, dim_k, dim_o);

    return scalar > vector ? scalar : vector;
}

static int check_params(const struct attn_params *params)
{
    if (!isfinite(params->scale) || !(params->softcap >= 0) || !isfinite(params->softcap))
        return -EINVAL;
    return params->dim_o < 16 || params->dim_o > ATTN_DIM_MAX || params->dim_o % 16 ? -EINVAL : 0;
}

static int check_block(const struct attn_params *params, const struct attn_block *block,
                       const struct tile_layout *first)
{
    const struct tile_layout *l = block->layout;

    if (l->n_tokens != first->n_tokens || l->dim_k != first->dim_k || l->dim_v != first->dim_v)
        return -EINVAL;
    if (l->dim_v ? params->dim_o != l->dim_v : params->dim_o > l->dim_k)
        return -EINVAL;
    if (block->n_tokens > l->n_tokens || block->n_tokens > UINT32_MAX - block->pos ||
        (uintptr_t)block->tile % TILE_ALIGN)
        return -EINVAL;
    return 0;
}

int attn_partial(const struct attn_ops *ops, const struct attn_params *params, const struct attn_block *blocks,
                 size_t n_blocks, const struct attn_rows *rows, const struct attn_out *out, void *work)
{
    int r = check_params(params);

    if (r < 0 || !rows->n)
        return -EINVAL;
    for (size_t b = 0; b < n_blocks; b++) {
        r = check_block(params, blocks + b, blocks[0].layout);
        if (r < 0)
            return r;
    }
    ops->partial(params, blocks, n_blocks, rows, out, work);
    return 0;
}

void attn_merge(float *o, float *lse, const float *other_o, float other_lse, uint32_t dim)
{
    float max = *lse > other_lse ? *lse : other_lse, mine, other, sum;

    if (other_lse == -INFINITY)
        return;
    mine = expf(*lse - max); /* 0 for an empty one */
    other = expf(other_lse - max);
    sum = mine + other;
    mine /= sum;
    other /= sum;
    for (uint32_t i = 0; i < dim; i++)
        o[i] = mine * o[i] + other * other_o[i];
    *lse = max + logf(sum);
}
