/* A payload: the encoded bytes of one block for one layer group.
 *
 *   layer by layer (those of the group, in the space's order), in a layer one tile a KV head, head after head:
 *
 *   | L0 H0 tile | L0 H1 tile | … | L1 H0 tile | …          every tile a multiple of 64 bytes, no gaps between
 *
 * so that a head's tile is one contiguous run that one bulk copy takes. docs/codecs.md has the tables.
 *
 * A raw block (what a worker puts into staging) is, for each of these layers, K [n_tokens][n_kv_heads][dim_k], then
 * V [n_tokens][n_kv_heads][dim_v], row-major, contiguous.
 *
 * A layout is immutable once made: any thread. Includes: tile.h. */
#ifndef KVD_KERNELS_CODEC_PAYLOAD_H
#define KVD_KERNELS_CODEC_PAYLOAD_H

#include "kernels/codec/tile.h"

enum { PAYLOAD_HEADS_MAX = 1024 };
#define PAYLOAD_BYTES_MAX (UINT64_C(1) << 31) /* an index entry holds 32 bits; a slot must fit a slab */

/* One layer of a model. codec zero in v where dim_v is 0. */
struct payload_layer {
    uint32_t n_kv_heads, dim_k, dim_v;
    uint32_t group;
    struct codec_spec k, v;             /* blocks */
    struct codec_spec first_k, first_v; /* the first block of a chain */
};

/* Reads the codecs of a layer whose dim_v is set, from their texts; NULL and "" are the same:
 *   k, v               none: "kc4", "tq4"
 *   first_k, first_v   none: as k, v
 *   "raw"              keeps dtype, the type that the engine computes in
 * Both ends of the socket resolve texts by this one function. Errors: codec_spec_parse()'s. */
int payload_layer_codecs(struct payload_layer *layer, enum codec_dtype dtype, const char *k, const char *v,
                         const char *first_k, const char *first_v, const char **ret_reason);

/* One layer of a group's payload. */
struct payload_part {
    uint32_t layer;   /* number in the model */
    uint32_t n_kv_heads;
    uint64_t off;     /* of head 0's tile; head h is at off + h * tile.bytes */
    uint64_t raw_off[4]; /* of K in a raw block, by enum codec_dtype */
    struct tile_layout tile;
};

struct payload_layout {
    uint32_t n_tokens;
    uint32_t n_parts;
    uint64_t bytes;
    uint64_t raw_bytes[4]; /* of a raw block, by enum codec_dtype */
    struct payload_part parts[];
};

/* The layout of group's blocks of n_tokens; first: of the first block of a chain. Errors: -EINVAL (with ret_reason, a constant sentence:
 * sizes, no layer in the group, over PAYLOAD_BYTES_MAX), codec_check()'s, -ENOMEM. Free with payload_layout_destroy(). */
int payload_layout_create(const struct payload_layer *layers, uint32_t n_layers, uint32_t group, bool first,
                          uint32_t n_tokens, struct payload_layout **ret, const char **ret_reason);
struct payload_layout *payload_layout_destroy(struct payload_layout *layout);

/* Encodes parts [part0, part1) of a raw block in dtype at raw into payload. raw may change meanwhile (codec_encode() says what then).
 * Errors: codec_encode()'s; on -EDOM *ret_fault (if not NULL) tells the first refused value, ret_layer and ret_role where. */
struct payload_fault {
    struct codec_fault value;
    uint32_t layer, head;
    enum codec_role role;
};
int payload_encode(const struct payload_layout *layout, const struct codec_ops *ops, enum codec_dtype dtype, const void *raw,
                   uint32_t part0, uint32_t part1, void *payload, struct payload_fault *ret_fault);

/* Where decoded K and V of one layer go: head h, token t at k + t * k_token_stride + h * k_head_stride (bytes). NULL: not wanted. */
struct payload_dst {
    void *k, *v;
    size_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
};
/* Decodes all heads of one part, tokens [t0, t1) (token t0 goes to k + 0). Errors: codec_decode()'s. */
int payload_decode(const struct payload_layout *layout, const struct codec_ops *ops, uint32_t part, const void *payload,
                   uint32_t t0, uint32_t t1, enum codec_dtype dtype, const struct payload_dst *dst);

#endif
