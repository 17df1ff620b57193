#include "kernels/codec/tile.h"

#include <errno.h>
#include <string.h>

static uint32_t align_up(uint32_t n, uint32_t to)
{
    return (n + to - 1) / to * to;
}

int tile_layout_init(struct tile_layout *layout, const struct codec_spec *k, const struct codec_spec *v, uint32_t n_tokens,
                     uint32_t dim_k, uint32_t dim_v, const char **ret_reason)
{
    struct tile_layout l = {.k = *k, .n_tokens = n_tokens, .dim_k = dim_k, .dim_v = dim_v};
    int r = codec_check(k, NULL, CODEC_K, n_tokens, dim_k, ret_reason);

    if (r < 0)
        return r;
    l.k_side_bytes = (uint32_t)codec_side_bytes(k, n_tokens, dim_k);
    l.k_codes_bytes = (uint32_t)codec_code_bytes(k, n_tokens, dim_k);
    if (dim_v) {
        r = codec_check(v, NULL, CODEC_V, n_tokens, dim_v, ret_reason);
        if (r < 0)
            return r;
        l.v = *v;
        l.v_side_bytes = (uint32_t)codec_side_bytes(v, n_tokens, dim_v);
        l.v_codes_bytes = (uint32_t)codec_code_bytes(v, n_tokens, dim_v);
    }
    l.v_side_off = align_up(l.k_side_bytes, TILE_PART_ALIGN);
    l.k_codes_off = align_up(l.v_side_off + l.v_side_bytes, TILE_PART_ALIGN);
    l.v_codes_off = align_up(l.k_codes_off + l.k_codes_bytes, TILE_PART_ALIGN);
    l.bytes = align_up(l.v_codes_off + l.v_codes_bytes, TILE_ALIGN);
    *layout = l;
    return 0;
}

static void zero_gap(uint8_t *tile, uint32_t from, uint32_t to)
{
    memset(tile + from, 0, to - from);
}

int tile_encode(const struct codec_ops *ops, const struct tile_layout *layout, const struct codec_params *k_params,
                const struct codec_params *v_params, enum codec_dtype dtype, const void *k_src, size_t k_stride_bytes,
                const void *v_src, size_t v_stride_bytes, void *tile, enum codec_role *ret_role)
{
    const struct tile_layout *l = layout;
    uint8_t *p = tile;
    int r;

    zero_gap(p, l->k_side_off + l->k_side_bytes, l->v_side_off);
    zero_gap(p, l->v_side_off + l->v_side_bytes, l->k_codes_off);
    zero_gap(p, l->k_codes_off + l->k_codes_bytes, l->v_codes_off);
    zero_gap(p, l->v_codes_off + l->v_codes_bytes, l->bytes);
    r = codec_encode(ops, &l->k, k_params, dtype, k_src, k_stride_bytes, l->n_tokens, l->dim_k, p + l->k_side_off,
                     p + l->k_codes_off);
    if (r < 0) {
        if (ret_role)
            *ret_role = CODEC_K;
        return r;
    }
    if (!l->dim_v)
        return 0;
    r = codec_encode(ops, &l->v, v_params, dtype, v_src, v_stride_bytes, l->n_tokens, l->dim_v, p + l->v_side_off,
                     p + l->v_codes_off);
    if (r < 0 && ret_role)
        *ret_role = CODEC_V;
    return r;
}

int tile_decode(const struct codec_ops *ops, const struct tile_layout *layout, const struct codec_params *k_params,
                const struct codec_params *v_params, const void *tile, uint32_t t0, uint32_t t1, enum codec_dtype dtype,
                void *k_dst, size_t k_stride_bytes, void *v_dst, size_t v_stride_bytes)
{
    const struct tile_layout *l = layout;
    const uint8_t *p = tile;
    int r = 0;

    if (k_dst)
        r = codec_decode(ops, &l->k, k_params, p + l->k_side_off, p + l->k_codes_off, l->n_tokens, l->dim_k, t0, t1, dtype,
                         k_dst, k_stride_bytes);
    if (r < 0 || !v_dst || !l->dim_v)
        return r;
    return codec_decode(ops, &l->v, v_params, p + l->v_side_off, p + l->v_codes_off, l->n_tokens, l->dim_v, t0, t1, dtype,
                        v_dst, v_stride_bytes);
}

/* ---- vLLM's slots ---- */

size_t tile_slot_bytes(const struct tile_layout *layout)
{
    if (layout->k.id != CODEC_UQ4 || layout->v.id != CODEC_UQ4)
        return 0;
    return (size_t)(layout->dim_k + layout->dim_v) / 32 * 17;
}

/* The four runs of a token: where in the tile, how long. */
struct slot_run {
    uint32_t off, bytes;
};

static void slot_runs(const struct tile_layout *l, uint32_t t, struct slot_run run[4])
{
    run[0] = (struct slot_run){l->k_codes_off + t * (l->dim_k / 2), l->dim_k / 2};
    run[1] = (struct slot_run){l->k_side_off + t * (l->dim_k / 32), l->dim_k / 32};
    run[2] = (struct slot_run){l->v_codes_off + t * (l->dim_v / 2), l->dim_v / 2};
    run[3] = (struct slot_run){l->v_side_off + t * (l->dim_v / 32), l->dim_v / 32};
}

int tile_to_slots(const struct tile_layout *layout, const void *tile, void *slots, size_t slot_stride_bytes)
{
    size_t slot_bytes = tile_slot_bytes(layout);

    if (!slot_bytes || slot_stride_bytes < slot_bytes)
        return -EINVAL;
    for (uint32_t t = 0; t < layout->n_tokens; t++) {
        uint8_t *to = (uint8_t *)slots + t * slot_stride_bytes;
        struct slot_run run[4];

        slot_runs(layout, t, run);
        for (int i = 0; i < 4; to += run[i++].bytes)
            memcpy(to, (const uint8_t *)tile + run[i].off, run[i].bytes);
    }
    return 0;
}

int tile_from_slots(const struct tile_layout *layout, const void *slots, size_t slot_stride_bytes, void *tile)
{
    size_t slot_bytes = tile_slot_bytes(layout);

    if (!slot_bytes || slot_stride_bytes < slot_bytes)
        return -EINVAL;
    memset(tile, 0, layout->bytes);
    for (uint32_t t = 0; t < layout->n_tokens; t++) {
        const uint8_t *from = (const uint8_t *)slots + t * slot_stride_bytes;
        struct slot_run run[4];

        slot_runs(layout, t, run);
        for (int i = 0; i < 4; from += run[i++].bytes)
            memcpy((uint8_t *)tile + run[i].off, from, run[i].bytes);
    }
    return 0;
}
