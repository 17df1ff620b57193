/* The specification. Every line of arithmetic is fp32 with one rounding an operation (no contraction); the order of sums is
 * the one written here. docs/codecs.md says the same in words. */
#include "kernels/codec/codec.h"
#include "kernels/codec/codec_num.h"
#include "kernels/codec/codec_tab.h"

#include <errno.h>
#include <math.h>

/* ---- rows in and out ---- */

static void row_load(enum codec_dtype dtype, const void *src, uint32_t dim, float *x)
{
    const uint8_t *p = src;

    if (dtype == CODEC_F16)
        for (uint32_t i = 0; i < dim; i++)
            x[i] = f16_to_f32(load_u16(p + 2 * i));
    else if (dtype == CODEC_BF16)
        for (uint32_t i = 0; i < dim; i++)
            x[i] = bf16_to_f32(load_u16(p + 2 * i));
    else
        for (uint32_t i = 0; i < dim; i++)
            x[i] = f32_from_bits(load_u32(p + 4 * i));
}

static void row_store(enum codec_dtype dtype, const float *x, uint32_t dim, void *dst)
{
    uint8_t *p = dst;

    if (dtype == CODEC_F32)
        memcpy(p, x, 4 * (size_t)dim);
    else if (dtype == CODEC_BF16)
        for (uint32_t i = 0; i < dim; i++)
            store_u16(p + 2 * i, f32_to_bf16(x[i]));
    else
        for (uint32_t i = 0; i < dim; i++) {
            float v = F16_MAX < x[i] ? F16_MAX : x[i];

            store_u16(p + 2 * i, f32_to_f16(-F16_MAX > v ? -F16_MAX : v));
        }
}

/* Walsh-Hadamard in natural order over each run of `block` values, smallest stride first, not scaled. */
static void row_wht(float *x, uint32_t dim, uint32_t block)
{
    for (uint32_t b = 0; b < dim; b += block)
        for (uint32_t h = 1; h < block; h *= 2)
            for (uint32_t i = b; i < b + block; i += 2 * h)
                for (uint32_t j = i; j < i + h; j++) {
                    float u = x[j], v = x[j + h];

                    x[j] = u + v;
                    x[j + h] = u - v;
                }
}

static void row_sign(float *x, uint32_t dim)
{
    for (uint32_t i = 0; i < dim; i++)
        x[i] = f32_from_bits(f32_bits(x[i]) ^ (uint32_t)(codec_sign[i / 64] >> (i % 64) & 1) << 31);
}

/* The order of every sum over a row: 16 partial sums by i % 16, then halves. */
static float sum16(float *acc)
{
    for (int h = 8; h; h /= 2)
        for (int j = 0; j < h; j++)
            acc[j] += acc[j + h];
    return acc[0];
}

static uint32_t rotation_block(uint32_t dim)
{
    return dim & -dim;
}

static uint32_t log2_of(uint32_t pow2)
{
    return (uint32_t)__builtin_ctz(pow2);
}

static void nibble_set(uint8_t *codes, uint32_t i, uint32_t code)
{
    if (i & 1)
        codes[i / 2] = (uint8_t)((codes[i / 2] & 0x0f) | (code & 15) << 4);
    else
        codes[i / 2] = (uint8_t)(code & 15);
}

static uint32_t nibble_get(const uint8_t *codes, uint32_t i)
{
    return codes[i / 2] >> (i & 1) * 4 & 15;
}

/* E2M1 code of y / 4, the number of midpoints strictly below it deciding: a tie goes to the more negative level. All midpoints are
 * whole in quarters, so after rounding up only integers are compared. Never the code of -0. */
static uint32_t e2m1_code(float y)
{
    float within = y > 24 ? 24 : y > -24 ? y : -24;
    int32_t k = (int32_t)within, n = k - !((float)k < within); /* rounded up, less one */
    uint32_t j = (uint32_t)(n < 0 ? ~n : n) & 31, mag = codec_e2m1_mag[j < 15 ? j : 15] + (j >= 20);

    return n < 0 && mag ? 8 | mag : mag;
}

/* ---- raw ---- */

static int raw_encode(const struct codec_spec *spec, enum codec_dtype dtype, const void *src, size_t stride, uint32_t n_tokens,
                      uint32_t dim, uint8_t *codes)
{
    size_t row_bytes = codec_row_bytes(spec, dim);
    float x[CODEC_DIM_MAX];

    for (uint32_t t = 0; t < n_tokens; t++, codes += row_bytes) {
        const uint8_t *p = (const uint8_t *)src + t * stride;

        if (spec->dtype == dtype) {
            memcpy(codes, p, row_bytes);
            continue;
        }
        row_load(dtype, p, dim, x);
        for (uint32_t i = 0; i < dim; i++) {
            if (spec->dtype == CODEC_F32 ? f32_abs_bits(x[i]) >= F32_INF_BITS
                : spec->dtype == CODEC_F16
                    ? !(fabsf(x[i]) < 65520.0f)
                    : (f32_to_bf16(x[i]) & 0x7fff) >= 0x7f80)
                return -EDOM;
        }
        row_store(spec->dtype, x, dim, codes);
    }
    return 0;
}

static void raw_decode_row(const struct codec_spec *spec, const uint8_t *codes, uint32_t dim, float *x)
{
    row_load(spec->dtype, codes, dim, x);
}

/* ---- fp8 ---- */

static uint8_t e4m3_from_f32(float x)
{
    uint32_t sign = f32_bits(x) >> 24 & 0x80, u;
    float a = f32_from_bits(f32_abs_bits(x));

    if (a >= 448.0f)
        return (uint8_t)(sign | 0x7e);
    if (a < 0x1p-6f) /* steps of 2^-9: the sum's last bit is one */
        return (uint8_t)(sign | (f32_bits(a + 16384.0f) - f32_bits(16384.0f)));
    u = f32_bits(a);
    return (uint8_t)(sign | (((u + 0x7ffffu + (u >> 20 & 1)) >> 20) - (120u << 3)));
}

static float e4m3_to_f32(uint8_t c)
{
    float a = f16_to_f32((uint16_t)((c & 0x80) << 8 | (c & 0x7f) << 7)) * 256.0f;

    return (c & 0x7f) == 0x7f ? f32_from_bits(0x7fc00000u) : a;
}

static int fp8_encode(enum codec_dtype dtype, const void *src, size_t stride, uint32_t n_tokens, uint32_t dim, uint8_t *codes)
{
    float x[CODEC_DIM_MAX];

    for (uint32_t t = 0; t < n_tokens; t++, codes += dim) {
        row_load(dtype, (const uint8_t *)src + t * stride, dim, x);
        for (uint32_t i = 0; i < dim; i++) {
            if (f32_abs_bits(x[i]) >= F32_INF_BITS)
                return -EDOM;
            codes[i] = e4m3_from_f32(x[i]);
        }
    }
    return 0;
}

/* ---- int8 ---- */

static int int8_encode(enum codec_dtype dtype, const void *src, size_t stride, uint32_t n_tokens, uint32_t dim, uint8_t *side,
                       uint8_t *codes)
{
    float x[CODEC_DIM_MAX];

    for (uint32_t t = 0; t < n_tokens; t++, codes += dim) {
        uint32_t amax = 0;
        float limit, scale, inverse;
        uint16_t h;

        row_load(dtype, (const uint8_t *)src + t * stride, dim, x);
        for (uint32_t i = 0; i < dim; i++)
            amax = f32_abs_bits(x[i]) > amax ? f32_abs_bits(x[i]) : amax;
        limit = f32_from_bits(amax) / 127.0f;
        if (!(limit <= F16_MAX))
            return -EDOM;
        h = f32_to_f16_up(limit); /* up, so that nothing clips */
        store_u16(side + 2 * t, h);
        scale = f16_to_f32(h);
        inverse = scale > 0 ? 1.0f / scale : 0;
        for (uint32_t i = 0; i < dim; i++) {
            float q = x[i] * inverse;

            codes[i] = (uint8_t)(int8_t)(q >= 127 ? 127 : q > -127 ? (int)rintf(q) : -127);
        }
    }
    return 0;
}

/* ---- uq4 ---- */

static int uq4_encode(const struct codec_spec *spec, enum codec_dtype dtype, const void *src, size_t stride, uint32_t n_tokens,
                      uint32_t dim, uint8_t *side, uint8_t *codes)
{
    float x[CODEC_DIM_MAX];

    for (uint32_t t = 0; t < n_tokens; t++, codes += dim / 2) {
        row_load(dtype, (const uint8_t *)src + t * stride, dim, x);
        if (spec->rotate) {
            row_wht(x, dim, dim);
            for (uint32_t i = 0; i < dim; i++)
                x[i] *= codec_rsqrt[log2_of(dim)];
        }
        for (uint32_t g = 0; g < dim; g += 32) {
            uint32_t amax = 0;
            uint8_t byte;

            for (uint32_t i = g; i < g + 32; i++)
                amax = f32_abs_bits(x[i]) > amax ? f32_abs_bits(x[i]) : amax;
            if (amax >= UQ4_LIMIT_BITS)
                return -EDOM;
            byte = ue8m0_byte(amax, spec->rule == CODEC_RULE_EVEN);
            *side++ = byte;
            for (uint32_t i = g; i < g + 32; i++)
                nibble_set(codes, i, e2m1_code(byte ? x[i] * ue8m0_inverse(byte) * 4.0f : 0));
        }
    }
    return 0;
}

static void uq4_decode_row(const struct codec_spec *spec, const uint8_t *side, const uint8_t *codes, uint32_t dim, float *x)
{
    for (uint32_t i = 0; i < dim; i++)
        x[i] = codec_e2m1[nibble_get(codes, i)] * ue8m0_value(side[i / 32]);
    if (spec->rotate) {
        row_wht(x, dim, dim);
        for (uint32_t i = 0; i < dim; i++)
            x[i] *= codec_rsqrt[log2_of(dim)];
    }
}

/* ---- tq4, tq3 ---- */

struct tq_table {
    const float *level, *mid, *square;
    uint32_t n; /* magnitudes */
};

static struct tq_table tq_table(const struct codec_spec *spec)
{
    if (spec->id == CODEC_TQ4)
        return (struct tq_table){codec_tq4_level, codec_tq4_mid, codec_tq4_square, 8};
    return (struct tq_table){codec_tq3_level, codec_tq3_mid, codec_tq3_square, 4};
}

static void tq_code_put(const struct codec_spec *spec, uint8_t *codes, uint32_t i, uint32_t code)
{
    if (spec->id == CODEC_TQ4) {
        nibble_set(codes, i, code);
        return;
    }
    /* eight codes in 24 bits, little-endian */
    for (uint32_t b = 0; b < 3; b++) {
        uint32_t at = 3 * (i % 8) + b;
        uint8_t *p = codes + i / 8 * 3 + at / 8, bit = (uint8_t)(1u << at % 8);

        *p = (uint8_t)(code >> b & 1 ? *p | bit : *p & ~bit);
    }
}

static uint32_t tq_code_get(const struct codec_spec *spec, const uint8_t *codes, uint32_t i)
{
    const uint8_t *p = codes + i / 8 * 3;

    if (spec->id == CODEC_TQ4)
        return nibble_get(codes, i);
    return (p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16) >> 3 * (i % 8) & 7;
}

static int tq_encode_row(const struct codec_spec *spec, float *x, uint32_t dim, uint8_t *side, uint8_t *codes)
{
    struct tq_table tab = tq_table(spec);
    uint32_t block = rotation_block(dim);
    float norm, factor, scale, acc[16] = {0};

    for (uint32_t i = 0; i < dim; i++)
        acc[i % 16] += x[i] * x[i];
    norm = sqrtf(sum16(acc));
    factor = norm > 0 ? sqrtf((float)(dim / block)) / norm : 0; /* to unit variance a coordinate */
    row_sign(x, dim);
    row_wht(x, dim, block);
    memset(acc, 0, sizeof(acc));
    for (uint32_t i = 0; i < dim; i++) {
        float y = x[i] * factor, a = fabsf(y);
        uint32_t mag = 0;

        for (uint32_t j = 0; j + 1 < tab.n; j++)
            mag += a >= tab.mid[j];
        tq_code_put(spec, codes, i, y < 0 ? tab.n - 1 - mag : tab.n + mag);
        acc[i % 16] += tab.square[mag];
    }
    /* the norm of the levels is divided out here, so that decoding need not renormalise */
    scale = norm / sqrtf(sum16(acc));
    if (!(scale < 65520.0f))
        return -EDOM;
    store_u16(side, f32_to_f16(scale));
    return 0;
}

static int tq_encode(const struct codec_spec *spec, enum codec_dtype dtype, const void *src, size_t stride, uint32_t n_tokens,
                     uint32_t dim, uint8_t *side, uint8_t *codes)
{
    float x[CODEC_DIM_MAX];
    int r;

    for (uint32_t t = 0; t < n_tokens; t++) {
        row_load(dtype, (const uint8_t *)src + t * stride, dim, x);
        r = tq_encode_row(spec, x, dim, side + 2 * t, codes + t * codec_row_bytes(spec, dim));
        if (r < 0)
            return r;
    }
    return 0;
}

static void tq_decode_row(const struct codec_spec *spec, const uint8_t *side, const uint8_t *codes, uint32_t dim, float *x)
{
    struct tq_table tab = tq_table(spec);
    uint32_t block = rotation_block(dim);
    float gain = f16_to_f32(load_u16(side)) * codec_rsqrt[log2_of(block)];

    for (uint32_t i = 0; i < dim; i++) {
        uint32_t code = tq_code_get(spec, codes, i);

        x[i] = code < tab.n ? -(tab.level[tab.n - 1 - code] * gain) : tab.level[code - tab.n] * gain;
    }
    row_wht(x, dim, block);
    row_sign(x, dim);
}

/* ---- kc4 ---- */

/* Distance of neighbouring levels from low and high as stored, cut to 20 significant bits (codec_tab.h says why). */
static float kc4_step(float low, float high, uint32_t grid)
{
    return f32_from_bits(f32_bits((high - low) / codec_kc4_span[grid]) & ~15u);
}

static int kc4_encode(const struct codec_spec *spec, enum codec_dtype dtype, const void *src, size_t stride, uint32_t n_tokens,
                      uint32_t dim, uint8_t *side, uint8_t *codes)
{
    float x[CODEC_DIM_MAX], low[CODEC_DIM_MAX], high[CODEC_DIM_MAX], inverse[CODEC_DIM_MAX];

    for (uint32_t t = 0; t < n_tokens; t++) {
        row_load(dtype, (const uint8_t *)src + t * stride, dim, x);
        for (uint32_t i = 0; i < dim; i++) {
            if (f32_abs_bits(x[i]) > F16_MAX_BITS)
                return -EDOM;
            low[i] = t == 0 || x[i] < low[i] ? x[i] : low[i];
            high[i] = t == 0 || x[i] > high[i] ? x[i] : high[i];
        }
    }
    for (uint32_t i = 0; i < dim; i++) {
        uint16_t lo = f32_to_f16_down(low[i]), hi = f32_to_f16_up(high[i]);
        float step;

        store_u16(side + 2 * i, lo);
        store_u16(side + 2 * (dim + i), hi);
        low[i] = f16_to_f32(lo);
        step = kc4_step(low[i], f16_to_f32(hi), spec->grid);
        inverse[i] = step > 0 ? 1.0f / step : 0;
    }
    for (uint32_t t = 0; t < n_tokens; t++, codes += dim / 2) {
        row_load(dtype, (const uint8_t *)src + t * stride, dim, x);
        for (uint32_t i = 0; i < dim; i++) {
            float y = (x[i] - low[i]) * inverse[i]; /* in steps above low */

            if (spec->grid == CODEC_GRID_INT)
                nibble_set(codes, i, y >= 15 ? 15 : y > 0 ? (uint32_t)rintf(y) : 0);
            else
                nibble_set(codes, i, e2m1_code(2 * y - 24));
        }
    }
    return 0;
}

/* Side data: low[0..dim) and high[dim..2 dim) in fp16. */
static void kc4_decode(const struct codec_spec *spec, const uint8_t *side, const uint8_t *codes, uint32_t dim, uint32_t t0,
                       uint32_t t1, enum codec_dtype dtype, uint8_t *dst, size_t stride)
{
    float low[CODEC_DIM_MAX], high[CODEC_DIM_MAX], step[CODEC_DIM_MAX], x[CODEC_DIM_MAX];

    row_load(CODEC_F16, side, dim, low);
    row_load(CODEC_F16, side + 2 * dim, dim, high);
    for (uint32_t i = 0; i < dim; i++)
        step[i] = kc4_step(low[i], high[i], spec->grid);
    for (uint32_t t = t0; t < t1; t++, dst += stride) {
        for (uint32_t i = 0; i < dim; i++) {
            uint32_t code = nibble_get(codes + t * (dim / 2), i);
            float product = step[i] * codec_kc4_steps[spec->grid][code];

            x[i] = (codec_kc4_from_high[spec->grid] >> code & 1 ? high[i] : low[i]) + product;
        }
        row_store(dtype, x, dim, dst);
    }
}

/* ---- the table ---- */

static int scalar_encode(const struct codec_spec *spec, enum codec_dtype dtype, const void *src, size_t stride_bytes,
                         uint32_t n_tokens, uint32_t dim, void *side, void *codes)
{
    switch ((enum codec_id)spec->id) {
    case CODEC_RAW:
        return raw_encode(spec, dtype, src, stride_bytes, n_tokens, dim, codes);
    case CODEC_FP8:
        return fp8_encode(dtype, src, stride_bytes, n_tokens, dim, codes);
    case CODEC_INT8:
        return int8_encode(dtype, src, stride_bytes, n_tokens, dim, side, codes);
    case CODEC_UQ4:
        return uq4_encode(spec, dtype, src, stride_bytes, n_tokens, dim, side, codes);
    case CODEC_TQ4:
    case CODEC_TQ3:
        return tq_encode(spec, dtype, src, stride_bytes, n_tokens, dim, side, codes);
    case CODEC_KC4:
        return kc4_encode(spec, dtype, src, stride_bytes, n_tokens, dim, side, codes);
    }
    return -EINVAL;
}

static void decode_row(const struct codec_spec *spec, const uint8_t *side, const uint8_t *codes, uint32_t t, uint32_t dim,
                       float *x)
{
    codes += t * codec_row_bytes(spec, dim);
    switch ((enum codec_id)spec->id) {
    case CODEC_RAW:
        raw_decode_row(spec, codes, dim, x);
        break;
    case CODEC_FP8:
        for (uint32_t i = 0; i < dim; i++)
            x[i] = e4m3_to_f32(codes[i]);
        break;
    case CODEC_INT8:
        for (uint32_t i = 0; i < dim; i++)
            x[i] = (float)(int8_t)codes[i] * f16_to_f32(load_u16(side + 2 * t));
        break;
    case CODEC_UQ4:
        uq4_decode_row(spec, side + t * (dim / 32), codes, dim, x);
        break;
    case CODEC_TQ4:
    case CODEC_TQ3:
        tq_decode_row(spec, side + 2 * t, codes, dim, x);
        break;
    case CODEC_KC4: /* not by rows */
        break;
    }
}

static void scalar_decode(const struct codec_spec *spec, const void *side, const void *codes, uint32_t n_tokens, uint32_t dim,
                          uint32_t t0, uint32_t t1, enum codec_dtype dtype, void *dst, size_t stride_bytes)
{
    float x[CODEC_DIM_MAX];

    (void)n_tokens;
    if (spec->id == CODEC_KC4) {
        kc4_decode(spec, side, codes, dim, t0, t1, dtype, dst, stride_bytes);
        return;
    }
    for (uint32_t t = t0; t < t1; t++) {
        uint8_t *p = (uint8_t *)dst + (t - t0) * stride_bytes;

        if (spec->id == CODEC_RAW && spec->dtype == dtype) {
            memcpy(p, (const uint8_t *)codes + t * codec_row_bytes(spec, dim), codec_row_bytes(spec, dim));
            continue;
        }
        decode_row(spec, side, codes, t, dim, x);
        row_store(dtype, x, dim, p);
    }
}

const struct codec_ops codec_ops_scalar = {"scalar", scalar_encode, scalar_decode};
