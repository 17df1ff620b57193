/* The vector variants, written once over sixteen lanes: included by codec_avx2.c and codec_avx512.c after the lanes
 * (codec_vec_*.h). It does what codec_scalar.c does, in the same order of operations wherever that order shows in a bit.
 *
 * codec_rows_kc4.h and codec_rows_tq.h are parts of it.
 *
 * A row is coded in chunks of 64 channels (four vf); dim is a multiple of 16, so the last chunk may be short, and its codes take a
 * detour: nothing past the caller's bytes is touched. */
#include <errno.h>
#include <math.h>

#include "kernels/codec/codec.h"
#include "kernels/codec/codec_num.h"
#include "kernels/codec/codec_tab.h"

#define CHUNK 64u

/* ---- rows in and out ---- */

VEC vf load16(enum codec_dtype dtype, const uint8_t *p, uint32_t i)
{
    if (dtype == CODEC_F16)
        return vf_load_f16(p + 2 * i);
    if (dtype == CODEC_BF16)
        return vf_load_bf16(p + 2 * i);
    return vf_load((const float *)(const void *)(p + 4 * i));
}

VEC void store16(enum codec_dtype dtype, uint8_t *p, uint32_t i, vf v)
{
    if (dtype == CODEC_F16)
        vf_store_f16(p + 2 * i, v);
    else if (dtype == CODEC_BF16)
        vf_store_bf16(p + 2 * i, v);
    else
        vf_store((float *)(void *)(p + 4 * i), v);
}

static void row_load(enum codec_dtype dtype, const uint8_t *p, uint32_t dim, float *x)
{
    for (uint32_t i = 0; i < dim; i += 16)
        vf_store(x + i, load16(dtype, p, i));
}

static void row_store(enum codec_dtype dtype, const float *x, uint32_t dim, uint8_t *p)
{
    for (uint32_t i = 0; i < dim; i += 16)
        store16(dtype, p, i, vf_load(x + i));
}

/* The largest magnitude's bits. */
static uint32_t row_amax(const float *x, uint32_t dim)
{
    vi m = vi_zero();

    for (uint32_t i = 0; i < dim; i += 16)
        m = vi_max(m, vf_abs_bits(vf_load(x + i)));
    return vi_max_of(m);
}

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

VEC void store_nibbles(uint8_t *p, vb codes, uint32_t n)
{
    uint8_t chunk[CHUNK / 2];

    if (n == CHUNK) {
        vb_store_nibbles(p, codes);
        return;
    }
    vb_store_nibbles(chunk, codes);
    memcpy(p, chunk, n / 2);
}

/* ---- rotation ---- */

VEC void wht_stage(vf *r, uint32_t n, uint32_t h)
{
#pragma GCC unroll 16
    for (uint32_t i = 0; i < n; i++)
        if (!(i & h)) {
            vf u = r[i], v = r[i | h];

            r[i] = vf_add(u, v);
            r[i | h] = vf_sub(u, v);
        }
}

/* n vf held in registers; n is a constant where this is inlined. */
VEC void wht_registers(vf *r, uint32_t n)
{
#pragma GCC unroll 16
    for (uint32_t i = 0; i < n; i++)
        r[i] = vf_wht16(r[i]);
    if (n > 1)
        wht_stage(r, n, 1);
    if (n > 2)
        wht_stage(r, n, 2);
    if (n > 4)
        wht_stage(r, n, 4);
    if (n > 8)
        wht_stage(r, n, 8);
}

VEC void wht_run(float *x, uint32_t dim, uint32_t n)
{
    for (uint32_t b = 0; b < dim; b += 16 * n) {
        vf r[VEC_WHT_REGS];

#pragma GCC unroll 16
        for (uint32_t i = 0; i < n; i++)
            r[i] = vf_load(x + b + 16 * i);
        wht_registers(r, n);
#pragma GCC unroll 16
        for (uint32_t i = 0; i < n; i++)
            vf_store(x + b + 16 * i, r[i]);
    }
}

/* Over each run of `block` values: first what fits into registers, then two stages a pass, then what is left. */
static void row_wht(float *x, uint32_t dim, uint32_t block)
{
    uint32_t h = min_u32(block, 16 * VEC_WHT_REGS);

    switch (h / 16) {
    case 1:
        wht_run(x, dim, 1);
        break;
    case 2:
        wht_run(x, dim, 2);
        break;
    case 4:
        wht_run(x, dim, 4);
        break;
#if VEC_WHT_REGS > 4
    case 8:
        wht_run(x, dim, 8);
        break;
    default:
        wht_run(x, dim, 16);
        break;
#endif
    }
    for (; 4 * h <= block; h *= 4)
        for (uint32_t b = 0; b < dim; b += 4 * h)
            for (uint32_t i = b; i < b + h; i += 16) {
                vf p = vf_load(x + i), q = vf_load(x + i + h), r = vf_load(x + i + 2 * h), s = vf_load(x + i + 3 * h);
                vf pq = vf_add(p, q), p_q = vf_sub(p, q), rs = vf_add(r, s), r_s = vf_sub(r, s);

                vf_store(x + i, vf_add(pq, rs));
                vf_store(x + i + h, vf_add(p_q, r_s));
                vf_store(x + i + 2 * h, vf_sub(pq, rs));
                vf_store(x + i + 3 * h, vf_sub(p_q, r_s));
            }
    for (; h < block; h *= 2)
        for (uint32_t b = 0; b < dim; b += 2 * h)
            for (uint32_t i = b; i < b + h; i += 16) {
                vf p = vf_load(x + i), q = vf_load(x + i + h);

                vf_store(x + i, vf_add(p, q));
                vf_store(x + i + h, vf_sub(p, q));
            }
}

/* The last stages of a rotation as its result is read: of n_parts (1, 2 or 4) runs of `step` values that are rotated by themselves,
 * 16 values of run `part` of the whole. */
VEC vf wht_late(const float *x, uint32_t step, uint32_t n_parts, uint32_t part)
{
    vf p = vf_load(x), q, r, s;

    if (n_parts == 1)
        return p;
    q = vf_load(x + step);
    p = part & 1 ? vf_sub(p, q) : vf_add(p, q);
    if (n_parts == 2)
        return p;
    r = vf_load(x + 2 * step);
    s = vf_load(x + 3 * step);
    r = part & 1 ? vf_sub(r, s) : vf_add(r, s);
    return part & 2 ? vf_sub(p, r) : vf_add(p, r);
}

static void row_scale(float *x, uint32_t dim, float by)
{
    for (uint32_t i = 0; i < dim; i += 16)
        vf_store(x + i, vf_mul(vf_load(x + i), vf_set1(by)));
}

static uint32_t log2_of(uint32_t pow2)
{
    return (uint32_t)__builtin_ctz(pow2);
}

#include "kernels/codec/codec_rows_kc4.h"
#include "kernels/codec/codec_rows_tq.h"

/* ---- raw, fp8, int8 ---- */

static int raw_encode_row(enum codec_dtype stored, enum codec_dtype dtype, const uint8_t *p, uint32_t dim, uint8_t *codes)
{
    _Alignas(64) float x[CODEC_DIM_MAX];
    uint32_t amax;

    if (stored == dtype) {
        memcpy(codes, p, dim * codec_dtype_bytes(dtype));
        return 0;
    }
    row_load(dtype, p, dim, x);
    amax = row_amax(x, dim);
    /* fp16 rounds to infinity from 65520, bf16 from 0x7f7f8000 */
    if (amax >= (stored == CODEC_F16 ? 0x477ff000u : stored == CODEC_BF16 ? 0x7f7f8000u : F32_INF_BITS))
        return -EDOM;
    row_store(stored, x, dim, codes);
    return 0;
}

static void raw_decode_row(enum codec_dtype stored, const uint8_t *codes, uint32_t dim, enum codec_dtype dtype, uint8_t *p)
{
    if (stored == dtype) {
        memcpy(p, codes, dim * codec_dtype_bytes(dtype));
        return;
    }
    for (uint32_t i = 0; i < dim; i += 16)
        store16(dtype, p, i, load16(stored, codes, i));
}

static int fp8_encode_row(enum codec_dtype dtype, const uint8_t *p, uint32_t dim, uint8_t *codes)
{
    vi amax = vi_zero();

    for (uint32_t i = 0; i < dim; i += 16) {
        vf v = load16(dtype, p, i);

        amax = vi_max(amax, vf_abs_bits(v));
        vi_store_low_bytes(codes + i, vf_to_e4m3(v));
    }
    return vi_max_of(amax) >= F32_INF_BITS ? -EDOM : 0;
}

static int int8_encode_row(enum codec_dtype dtype, const uint8_t *p, uint32_t dim, uint8_t *side, uint8_t *codes)
{
    _Alignas(64) float x[CODEC_DIM_MAX];
    float limit, scale, inverse;
    uint16_t h;

    row_load(dtype, p, dim, x);
    limit = f32_from_bits(row_amax(x, dim)) / 127.0f;
    if (!(limit <= F16_MAX))
        return -EDOM;
    h = f32_to_f16_up(limit);
    store_u16(side, h);
    scale = f16_to_f32(h);
    inverse = scale > 0 ? 1.0f / scale : 0;
    for (uint32_t i = 0; i < dim; i += 16) /* the row is our copy and |q| <= 127 */
        vi_store_low_bytes(codes + i, vf_round(vf_mul(vf_load(x + i), vf_set1(inverse))));
    return 0;
}

/* ---- uq4 ---- */

static int uq4_encode_row(const struct codec_spec *spec, enum codec_dtype dtype, const uint8_t *p, uint32_t dim, uint8_t *side,
                          uint8_t *codes)
{
    _Alignas(64) float x[CODEC_DIM_MAX];

    row_load(dtype, p, dim, x);
    if (spec->rotate) {
        row_wht(x, dim, dim);
        row_scale(x, dim, codec_rsqrt[log2_of(dim)]);
    }
    for (uint32_t i = 0; i < dim; i += CHUNK) {
        uint32_t n = min_u32(CHUNK, dim - i);
        vi quarters[4] = {vi_zero(), vi_zero(), vi_zero(), vi_zero()};

        for (uint32_t g = 0; g < n; g += 32) {
            vf u = vf_load(x + i + g), v = vf_load(x + i + g + 16), inverse, four = vf_set1(4.0f);
            uint32_t amax = vi_max_of(vi_max(vf_abs_bits(u), vf_abs_bits(v)));
            uint8_t byte = ue8m0_byte(amax, spec->rule == CODEC_RULE_EVEN);

            if (amax >= UQ4_LIMIT_BITS)
                return -EDOM;
            *side++ = byte;
            inverse = vf_set1(byte ? ue8m0_inverse(byte) : 0);
            quarters[g / 16] = vf_ceil(vf_mul(vf_mul(u, inverse), four));
            quarters[g / 16 + 1] = vf_ceil(vf_mul(vf_mul(v, inverse), four));
        }
        store_nibbles(codes + i / 2, vb_e2m1(vb_pack(quarters), codec_e2m1_mag), n);
    }
    return 0;
}

static void uq4_decode_row(const struct codec_spec *spec, const uint8_t *side, const uint8_t *codes, uint32_t dim,
                           enum codec_dtype dtype, uint8_t *p)
{
    const vlut table = vlut_load(codec_e2m1);
    _Alignas(64) float x[CODEC_DIM_MAX];

    for (uint32_t i = 0; i < dim; i += 32) {
        vlut scaled = vlut_scale(table, ue8m0_value(side[i / 32]));

        vf_store(x + i, vlut_get(scaled, vi_nibbles(codes + i / 2)));
        vf_store(x + i + 16, vlut_get(scaled, vi_nibbles(codes + i / 2 + 8)));
    }
    if (spec->rotate) {
        row_wht(x, dim, dim);
        row_scale(x, dim, codec_rsqrt[log2_of(dim)]);
    }
    row_store(dtype, x, dim, p);
}

/* ---- the two functions of a variant ---- */

static int encode_row(const struct codec_spec *spec, enum codec_dtype dtype, const uint8_t *p, uint32_t t, uint32_t dim, uint8_t *side,
                      uint8_t *codes)
{
    switch ((enum codec_id)spec->id) {
    case CODEC_RAW:
        return raw_encode_row(spec->dtype, dtype, p, dim, codes);
    case CODEC_FP8:
        return fp8_encode_row(dtype, p, dim, codes);
    case CODEC_INT8:
        return int8_encode_row(dtype, p, dim, side + 2 * t, codes);
    case CODEC_UQ4:
        return uq4_encode_row(spec, dtype, p, dim, side + t * (dim / 32), codes);
    case CODEC_TQ4: /* not by rows */
    case CODEC_TQ3:
    case CODEC_KC4:
        break;
    }
    return -EINVAL;
}

static int vec_encode(const struct codec_spec *spec, enum codec_dtype dtype, const void *src, size_t stride_bytes, uint32_t n_tokens,
                      uint32_t dim, void *side, void *codes)
{
    size_t row_bytes = codec_row_bytes(spec, dim);

    if (spec->id == CODEC_KC4)
        return kc4_encode(spec, dtype, src, stride_bytes, n_tokens, dim, side, codes);
    if (spec->id == CODEC_TQ4)
        return tq4_encode(dtype, src, stride_bytes, n_tokens, dim, side, codes);
    if (spec->id == CODEC_TQ3)
        return tq3_encode(dtype, src, stride_bytes, n_tokens, dim, side, codes);
    for (uint32_t t = 0; t < n_tokens; t++) {
        int r = encode_row(spec, dtype, (const uint8_t *)src + t * stride_bytes, t, dim, side, (uint8_t *)codes + t * row_bytes);

        if (r < 0)
            return r;
    }
    return 0;
}

static void decode_row(const struct codec_spec *spec, const uint8_t *side, const uint8_t *codes, uint32_t t, uint32_t dim,
                       enum codec_dtype dtype, uint8_t *p)
{
    switch ((enum codec_id)spec->id) {
    case CODEC_RAW:
        raw_decode_row(spec->dtype, codes, dim, dtype, p);
        break;
    case CODEC_FP8:
        for (uint32_t i = 0; i < dim; i += 16)
            store16(dtype, p, i, vf_load_e4m3(codes + i));
        break;
    case CODEC_INT8:
        for (uint32_t i = 0; i < dim; i += 16)
            store16(dtype, p, i, vf_mul(vf_load_int8(codes + i), vf_set1(_cvtsh_ss(load_u16(side + 2 * t)))));
        break;
    case CODEC_UQ4:
        uq4_decode_row(spec, side + t * (dim / 32), codes, dim, dtype, p);
        break;
    case CODEC_TQ4:
        tq4_decode_row(side + 2 * t, codes, dim, dtype, p);
        break;
    case CODEC_TQ3:
        tq3_decode_row(side + 2 * t, codes, dim, dtype, p);
        break;
    case CODEC_KC4:
        break;
    }
}

static void vec_decode(const struct codec_spec *spec, const void *side, const void *codes, uint32_t n_tokens, uint32_t dim,
                       uint32_t t0, uint32_t t1, enum codec_dtype dtype, void *dst, size_t stride_bytes)
{
    size_t row_bytes = codec_row_bytes(spec, dim);

    (void)n_tokens;
    if (spec->id == CODEC_KC4) {
        kc4_decode(spec, side, codes, dim, t0, t1, dtype, dst, stride_bytes);
        return;
    }
    for (uint32_t t = t0; t < t1; t++)
        decode_row(spec, side, (const uint8_t *)codes + t * row_bytes, t, dim, dtype, (uint8_t *)dst + (t - t0) * stride_bytes);
}
