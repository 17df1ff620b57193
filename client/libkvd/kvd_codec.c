/* The codecs by themselves: a thin door to kernels/codec. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/codec/tile.h"
#include "kvd_impl.h"

static const struct {
    const char *name, *help;
} codecs[] = {
    {"raw", "16- or 32-bit floats as they are (in a space: of its dtype; alone: fp16); exact"},
    {"bf16", "bfloat16 as it is"},
    {"f32", "float32 as it is"},
    {"fp8", "E4M3, 8 bits a number"},
    {"int8", "a scale for each token, 8 bits a number"},
    {"uq4", "UltraQuant: E2M1 codes, a UE8M0 scale for 32 channels; options rule=ultraquant|even, rotate=on|off"},
    {"tq4", "a norm for each token, rotated, 16 Lloyd-Max levels; the default for V"},
    {"tq3", "the same with 8 levels"},
    {"kc4", "4 bits between low and high of each channel over the block; option grid=int|e2m1; the default for K"},
};

const char *const *kvd_codec_names(void)
{
    static const char *const names[] = {"raw", "bf16", "f32", "fp8", "int8", "uq4", "tq4", "tq3", "kc4", NULL};

    return names;
}

const char *kvd_codec_help(const char *spec)
{
    size_t n = spec ? strcspn(spec, ":") : 0;

    for (size_t i = 0; i < sizeof(codecs) / sizeof(codecs[0]); i++)
        if (strlen(codecs[i].name) == n && memcmp(codecs[i].name, spec, n) == 0)
            return codecs[i].help;
    return NULL;
}

static enum codec_role role_of(int is_v)
{
    return is_v ? CODEC_V : CODEC_K;
}

/* Parses and checks. ret_reason is set on failure. */
static int prepare(const char *spec, int is_v, size_t n_tokens, size_t dim, struct codec_spec *ret,
                   const char **ret_reason)
{
    *ret_reason = "no codec is named";
    if (!spec || codec_spec_parse(spec, role_of(is_v), ret, ret_reason) < 0)
        return KVD_E_LAYOUT;
    *ret_reason = "at most 4096 tokens and 1024 numbers a token";
    if (n_tokens > CODEC_TOKENS_MAX || dim > CODEC_DIM_MAX)
        return KVD_E_LAYOUT;
    return codec_check(ret, NULL, role_of(is_v), (uint32_t)n_tokens, (uint32_t)dim, ret_reason) < 0 ? KVD_E_LAYOUT : 0;
}

static const struct codec_ops *best_ops(void)
{
    struct cpu_features cpu;

    cpu_detect(&cpu);
    return codec_ops_choose(&cpu);
}

int kvd_codec_bytes(const char *spec, int is_v, size_t n_tokens, size_t dim, size_t *ret_bytes, const char **ret_reason)
{
    struct codec_spec s;
    const char *reason;
    int r = prepare(spec, is_v, n_tokens, dim, &s, &reason);

    if (r != 0) {
        if (ret_reason)
            *ret_reason = reason;
        return error_set(0, r, "%s: %s", spec ? spec : "", reason);
    }
    *ret_bytes = codec_side_bytes(&s, (uint32_t)n_tokens, (uint32_t)dim) +
                 codec_code_bytes(&s, (uint32_t)n_tokens, (uint32_t)dim);
    return KVD_OK;
}

/* The same for numbers of a dtype; on failure the error is set. */
static int prepare_coding(const char *spec, int is_v, enum kvd_dtype dtype, size_t n_tokens, size_t dim,
                          struct codec_spec *ret)
{
    const char *reason;
    int r = prepare(spec, is_v, n_tokens, dim, ret, &reason);

    if (r == 0 && !dtype_of(dtype)) {
        reason = "dtype is none of enum kvd_dtype";
        r = KVD_E_LAYOUT;
    }
    return r == 0 ? KVD_OK : error_set(0, r, "%s: %s", spec ? spec : "", reason);
}

static const char *fault_name(enum codec_fault_kind kind)
{
    return kind == CODEC_FAULT_NAN ? "is NaN" : kind == CODEC_FAULT_INF ? "is infinite" : "is out of the codec's range";
}

int kvd_codec_encode(const char *spec, int is_v, enum kvd_dtype dtype, const void *src, size_t n_tokens, size_t dim,
                     void *code)
{
    enum codec_dtype type = dtype_of(dtype);
    size_t stride = dim * codec_dtype_bytes(type);
    struct codec_fault fault = {.kind = CODEC_FAULT_NONE};
    struct codec_spec s;
    int r = prepare_coding(spec, is_v, dtype, n_tokens, dim, &s);

    if (r != 0)
        return r;
    r = codec_encode(best_ops(), &s, NULL, type, src, stride, (uint32_t)n_tokens, (uint32_t)dim, code,
                     (uint8_t *)code + codec_side_bytes(&s, (uint32_t)n_tokens, (uint32_t)dim));
    if (r == -EDOM) {
        codec_find_refused(&s, type, src, stride, (uint32_t)n_tokens, (uint32_t)dim, &fault);
        return error_set(0, KVD_E_VALUE, "%s: channel %u of token %u %s (%g)", spec, fault.channel, fault.token,
                         fault_name(fault.kind), (double)fault.value);
    }
    return r == 0 ? KVD_OK : error_set(0, KVD_E_LAYOUT, "%s: the shape cannot be coded", spec);
}

int kvd_codec_decode(const char *spec, int is_v, const void *code, size_t n_tokens, size_t dim, enum kvd_dtype dtype,
                     void *dst)
{
    enum codec_dtype type = dtype_of(dtype);
    size_t stride = dim * codec_dtype_bytes(type);
    struct codec_spec s;
    int r = prepare_coding(spec, is_v, dtype, n_tokens, dim, &s);

    if (r != 0)
        return r;
    r = codec_decode(best_ops(), &s, NULL, code,
                     (const uint8_t *)code + codec_side_bytes(&s, (uint32_t)n_tokens, (uint32_t)dim),
                     (uint32_t)n_tokens, (uint32_t)dim, 0, (uint32_t)n_tokens, type, dst, stride);
    return r == 0 ? KVD_OK : error_set(0, KVD_E_LAYOUT, "%s: the shape cannot be decoded", spec);
}

int kvd_codec_uq_page(const char *spec_k, const char *spec_v, enum kvd_dtype dtype, const void *k, const void *v,
                      size_t n_tokens, size_t dim, void *page)
{
    enum codec_dtype type = dtype_of(dtype);
    size_t stride = dim * codec_dtype_bytes(type), slot;
    struct tile_layout layout;
    struct codec_spec sk, sv;
    const char *reason;
    void *tile;
    int r = prepare(spec_k, 0, n_tokens, dim, &sk, &reason);

    if (r == 0)
        r = prepare(spec_v, 1, n_tokens, dim, &sv, &reason);
    if (r == 0 && (sk.id != CODEC_UQ4 || sv.id != CODEC_UQ4)) {
        reason = "the page layout is of uq4 for both K and V";
        r = KVD_E_LAYOUT;
    }
    if (r != 0 || !stride)
        return error_set(0, KVD_E_LAYOUT, "%s", r != 0 ? reason : "dtype is none of enum kvd_dtype");
    if (tile_layout_init(&layout, &sk, &sv, (uint32_t)n_tokens, (uint32_t)dim, (uint32_t)dim, &reason) < 0)
        return error_set(0, KVD_E_LAYOUT, "%s", reason);
    slot = tile_slot_bytes(&layout);
    tile = malloc(layout.bytes);
    if (!tile)
        return error_set(0, KVD_E_NOMEM, "no memory for a tile of %u bytes", layout.bytes);
    r = tile_encode(best_ops(), &layout, NULL, NULL, type, k, stride, v, stride, tile, NULL);
    if (r == 0)
        r = tile_to_slots(&layout, tile, page, slot);
    free(tile);
    if (r < 0)
        return error_set(0, r == -EDOM ? KVD_E_VALUE : KVD_E_LAYOUT, "uq4: %s",
                         r == -EDOM ? "a number is NaN, infinite or out of range" : "the shape cannot be coded");
    return KVD_OK;
}
