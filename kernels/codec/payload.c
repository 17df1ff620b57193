#include "kernels/codec/payload.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_K "kc4"
#define DEFAULT_V "tq4"

static int fail(const char *reason, const char **ret_reason)
{
    if (ret_reason)
        *ret_reason = reason;
    return -EINVAL;
}

static int parse(const char *text, enum codec_dtype dtype, enum codec_role role, struct codec_spec *ret,
                 const char **ret_reason)
{
    if (strcmp(text, "raw") != 0)
        return codec_spec_parse(text, role, ret, ret_reason);
    *ret = codec_spec_raw(dtype);
    return 0;
}

int payload_layer_codecs(struct payload_layer *layer, enum codec_dtype dtype, const char *k, const char *v,
                         const char *first_k, const char *first_v, const char **ret_reason)
{
    int r;

    k = k && *k ? k : DEFAULT_K;
    v = v && *v ? v : DEFAULT_V;
    first_k = first_k && *first_k ? first_k : k;
    first_v = first_v && *first_v ? first_v : v;
    layer->v = layer->first_v = (struct codec_spec){0};
    r = parse(k, dtype, CODEC_K, &layer->k, ret_reason);
    if (r == 0)
        r = parse(first_k, dtype, CODEC_K, &layer->first_k, ret_reason);
    if (r == 0 && layer->dim_v)
        r = parse(v, dtype, CODEC_V, &layer->v, ret_reason);
    if (r == 0 && layer->dim_v)
        r = parse(first_v, dtype, CODEC_V, &layer->first_v, ret_reason);
    return r;
}

static int add_part(struct payload_layout *p, const struct payload_layer *layer, uint32_t number, bool first,
                    const char **ret_reason)
{
    struct payload_part *part = &p->parts[p->n_parts];
    const struct codec_spec *k = first ? &layer->first_k : &layer->k, *v = first ? &layer->first_v : &layer->v;
    int r;

    if (layer->n_kv_heads == 0 || layer->n_kv_heads > PAYLOAD_HEADS_MAX)
        return fail("KV heads of a layer: allowed are 1 to 1024", ret_reason);
    part->layer = number;
    part->n_kv_heads = layer->n_kv_heads;
    part->off = p->bytes;
    r = tile_layout_init(&part->tile, k, layer->dim_v ? v : NULL, p->n_tokens, layer->dim_k, layer->dim_v, ret_reason);
    if (r < 0)
        return r;
    for (int d = CODEC_F16; d <= CODEC_F32; d++) {
        part->raw_off[d] = p->raw_bytes[d];
        p->raw_bytes[d] += (uint64_t)p->n_tokens * layer->n_kv_heads * (layer->dim_k + layer->dim_v) *
                           codec_dtype_bytes((enum codec_dtype)d);
    }
    p->bytes += (uint64_t)layer->n_kv_heads * part->tile.bytes;
    p->n_parts++;
    if (p->bytes > PAYLOAD_BYTES_MAX || p->raw_bytes[CODEC_F32] > 4 * PAYLOAD_BYTES_MAX)
        return fail("a block's payload is over 2 GiB: use fewer tokens a block", ret_reason);
    return 0;
}

int payload_layout_create(const struct payload_layer *layers, uint32_t n_layers, uint32_t group, bool first,
                          uint32_t n_tokens, struct payload_layout **ret, const char **ret_reason)
{
    struct payload_layout *p = calloc(1, sizeof(*p) + n_layers * sizeof(p->parts[0]));

    if (!p)
        return -ENOMEM;
    p->n_tokens = n_tokens;
    for (uint32_t i = 0; i < n_layers; i++) {
        int r = layers[i].group == group ? add_part(p, &layers[i], i, first, ret_reason) : 0;

        if (r < 0) {
            free(p);
            return r;
        }
    }
    if (p->n_parts == 0) {
        free(p);
        return fail("a layer group without a layer", ret_reason);
    }
    *ret = p;
    return 0;
}

struct payload_layout *payload_layout_destroy(struct payload_layout *layout)
{
    free(layout);
    return NULL;
}

/* Says where a refused value is; what the source holds may have changed since, then kind is CODEC_FAULT_NONE. */
static void tell_fault(const struct payload_part *part, enum codec_dtype dtype, const char *src, size_t stride,
                       uint32_t head, enum codec_role role, struct payload_fault *ret)
{
    const struct tile_layout *t = &part->tile;

    *ret = (struct payload_fault){.layer = part->layer, .head = head, .role = role};
    (void)codec_find_refused(role == CODEC_K ? &t->k : &t->v, dtype, src, stride, t->n_tokens,
                             role == CODEC_K ? t->dim_k : t->dim_v, &ret->value);
}

int payload_encode(const struct payload_layout *layout, const struct codec_ops *ops, enum codec_dtype dtype, const void *raw,
                   uint32_t part0, uint32_t part1, void *payload, struct payload_fault *ret_fault)
{
    size_t size = codec_dtype_bytes(dtype);

    if (size == 0 || part0 > part1 || part1 > layout->n_parts)
        return -EINVAL;
    for (uint32_t i = part0; i < part1; i++) {
        const struct payload_part *part = &layout->parts[i];
        const struct tile_layout *t = &part->tile;
        size_t k_stride = (size_t)part->n_kv_heads * t->dim_k * size, v_stride = (size_t)part->n_kv_heads * t->dim_v * size;
        const char *k = (const char *)raw + part->raw_off[dtype], *v = k + layout->n_tokens * k_stride;

        for (uint32_t h = 0; h < part->n_kv_heads; h++) {
            enum codec_role role = CODEC_K;
            const char *kh = k + h * t->dim_k * size, *vh = v + h * t->dim_v * size;
            int r = tile_encode(ops, t, NULL, NULL, dtype, kh, k_stride, vh, v_stride,
                                (char *)payload + part->off + (uint64_t)h * t->bytes, &role);

            if (r == -EDOM && ret_fault)
                tell_fault(part, dtype, role == CODEC_K ? kh : vh, role == CODEC_K ? k_stride : v_stride, h, role,
                           ret_fault);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

int payload_decode(const struct payload_layout *layout, const struct codec_ops *ops, uint32_t i, const void *payload,
                   uint32_t t0, uint32_t t1, enum codec_dtype dtype, const struct payload_dst *dst)
{
    const struct payload_part *part;

    if (i >= layout->n_parts)
        return -EINVAL;
    part = &layout->parts[i];
    for (uint32_t h = 0; h < part->n_kv_heads; h++) {
        int r = tile_decode(ops, &part->tile, NULL, NULL, (const char *)payload + part->off + (uint64_t)h * part->tile.bytes,
                            t0, t1, dtype, dst->k ? (char *)dst->k + h * dst->k_head_stride : NULL, dst->k_token_stride,
                            dst->v && part->tile.dim_v ? (char *)dst->v + h * dst->v_head_stride : NULL,
                            dst->v_token_stride);

        if (r < 0)
            return r;
    }
    return 0;
}
