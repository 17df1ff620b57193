/* A tile: the K and V of one KV head of one layer over one block, encoded. The unit of payloads.
 *
 *   | K side | V side | K codes | V codes | zeros |
 *   0        each part starts at a multiple of 16; the whole is a multiple of 64
 *
 * With 64 tokens there are no gaps between the parts. dim_v may differ from dim_k, and be 0 (latent attention that keeps one
 * record for both): then the two V parts are empty. Gaps and the end are zero, so that equal input gives equal tiles.
 *
 * Includes: codec.h. Any thread. */
#ifndef KVD_KERNELS_CODEC_TILE_H
#define KVD_KERNELS_CODEC_TILE_H

#include "kernels/codec/codec.h"

#define TILE_PART_ALIGN 16u
#define TILE_ALIGN 64u

struct tile_layout {
    struct codec_spec k, v;    /* v is all zero without V */
    uint32_t n_tokens, dim_k, dim_v;
    uint32_t k_side_off, k_side_bytes;
    uint32_t v_side_off, v_side_bytes;
    uint32_t k_codes_off, k_codes_bytes;
    uint32_t v_codes_off, v_codes_bytes;
    uint32_t bytes;            /* of the whole, a multiple of TILE_ALIGN; at most 32 MiB + 64 for any shape */
};

/* v may be NULL if dim_v is 0. Errors: those of codec_check(), with its reason. */
int tile_layout_init(struct tile_layout *layout, const struct codec_spec *k, const struct codec_spec *v, uint32_t n_tokens,
                     uint32_t dim_k, uint32_t dim_v, const char **ret_reason);

/* Encodes K [n_tokens, dim_k] and V [n_tokens, dim_v] into tile (layout->bytes, any alignment; all bytes are written).
 * v_src is not used without V. Errors: those of codec_encode(); *ret_role, if not NULL, says on -EDOM which was refused. */
int tile_encode(const struct codec_ops *ops, const struct tile_layout *layout, const struct codec_params *k_params,
                const struct codec_params *v_params, enum codec_dtype dtype, const void *k_src, size_t k_stride_bytes,
                const void *v_src, size_t v_stride_bytes, void *tile, enum codec_role *ret_role);

/* Decodes tokens t0 <= t < t1; either destination may be NULL to leave it out. Errors: those of codec_decode(). */
int tile_decode(const struct codec_ops *ops, const struct tile_layout *layout, const struct codec_params *k_params,
                const struct codec_params *v_params, const void *tile, uint32_t t0, uint32_t t1, enum codec_dtype dtype,
                void *k_dst, size_t k_stride_bytes, void *v_dst, size_t v_stride_bytes);

/* vLLM's `ultraquant_4bit` cache keeps a slot a (token, head): K codes | K scales | V codes | V scales, no padding inside.
 * Both directions only move bytes. layout has uq4 for K and V; slot t is at slots + t * slot_stride_bytes.
 * Errors: -EINVAL (other codecs, no V, stride below tile_slot_bytes()). */
size_t tile_slot_bytes(const struct tile_layout *layout); /* 0 if the layout is not uq4 for both */
int tile_to_slots(const struct tile_layout *layout, const void *tile, void *slots, size_t slot_stride_bytes);
int tile_from_slots(const struct tile_layout *layout, const void *slots, size_t slot_stride_bytes, void *tile);

#endif
