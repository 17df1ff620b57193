/* The vector variants, written once over sixteen lanes: included by codec_avx2.c and codec_avx512.c after the lanes
 * (codec_vec_*.h). It does what codec_scalar.c does, in the same order of operations wherever that order shows in a bit.
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

static void row_scale(float *x, uint32_t dim, float by)
{
    for (uint32_t i = 0; i < dim; i += 16)
        vf_store(x + i, vf_mul(vf_load(x + i), vf_set1(by)));
}

static uint32_t log2_of(uint32_t pow2)
{
    return (uint32_t)__builtin_ctz(pow2);
}

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

            if (amax >= F32_INF_BITS)
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

/* ---- tq4, tq3 ---- */

/* Three-bit codes of n bytes, eight to 24 bits. */
static void store_triples(uint8_t *p, vb codes, uint32_t n)
{
    uint8_t bytes[CHUNK];

    vb_store(bytes, codes);
    for (uint32_t i = 0; i < n; i += 8, p += 3) {
        uint64_t u;

        memcpy(&u, bytes + i, 8);
        u = _pext_u64(u, 0x0707070707070707ull);
        memcpy(p, &u, 3);
    }
}

/* Codes of n values at y, four vf of them if n is CHUNK, and the squares of their levels onto squares. */
VEC vf tq_quantise(const vf *y, uint32_t n, vf factor, int is_tq3, uint8_t *codes, vf squares)
{
    const vcells cells = vcells_load(is_tq3);
    const vlut square = vlut_load(codec_tq_leaf_square[is_tq3]);
    vi code[4] = {vi_zero(), vi_zero(), vi_zero(), vi_zero()};

#pragma GCC unroll 4
    for (uint32_t i = 0; i < 4; i++) {
        vf v;
        vi leaf;

        if (16 * i >= n)
            break;
        v = vf_mul(y[i], factor);
        leaf = vcells_leaf(vf_abs(v), cells);
        squares = vf_add(squares, vlut_get_low3(square, leaf));
        code[i] = vi_flip_negative(leaf, v, is_tq3 ? 7 : 15);
    }
    if (is_tq3)
        store_triples(codes, vb_pack(code), n);
    else
        store_nibbles(codes, vb_pack(code), n);
    return squares;
}

VEC size_t tq_bytes(int is_tq3, uint32_t n)
{
    return is_tq3 ? n / 8 * 3 : n / 2;
}

/* Rotates blocks of 16 n values, which fit into registers, and codes them from there. */
VEC vf tq_code_fused(const float *x, uint32_t dim, uint32_t n, vf factor, int is_tq3, uint8_t *codes)
{
    vf squares = vf_set1(0);

    for (uint32_t b = 0; b < dim; b += 16 * n) {
        vf r[VEC_WHT_REGS];

#pragma GCC unroll 16
        for (uint32_t i = 0; i < n; i++)
            r[i] = vf_load(x + b + 16 * i);
        wht_registers(r, n);
#pragma GCC unroll 4
        for (uint32_t i = 0; i < n; i += 4)
            squares = tq_quantise(r + i, CHUNK, factor, is_tq3, codes + tq_bytes(is_tq3, b + 16 * i), squares);
    }
    return squares;
}

/* Rotates x in place and codes it; the squares of the levels, by lanes. */
VEC vf tq_code_row(float *x, uint32_t dim, vf factor, int is_tq3, uint8_t *codes)
{
    uint32_t block = dim & -dim;
    vf squares = vf_set1(0);

    if (block == 64)
        return tq_code_fused(x, dim, 4, factor, is_tq3, codes);
#if VEC_WHT_REGS > 4
    if (block == 128)
        return tq_code_fused(x, dim, 8, factor, is_tq3, codes);
    if (block == 256)
        return tq_code_fused(x, dim, 16, factor, is_tq3, codes);
#endif
    row_wht(x, dim, block);
    for (uint32_t i = 0; i < dim; i += CHUNK) {
        uint32_t n = min_u32(CHUNK, dim - i);
        vf y[4];

        for (uint32_t j = 0; 16 * j < n; j++)
            y[j] = vf_load(x + i + 16 * j);
        if (n == CHUNK)
            squares = tq_quantise(y, CHUNK, factor, is_tq3, codes + tq_bytes(is_tq3, i), squares);
        else
            squares = tq_quantise(y, n, factor, is_tq3, codes + tq_bytes(is_tq3, i), squares);
    }
    return squares;
}

/* Rows that are under way together: the square roots and divisions of eight norms are one instruction each, and no row waits for
 * its own. As many as fit into a buffer of the first-level cache. */
#define TQ_ROWS 8u
#define TQ_BUFFER 4096u

/* Copies rows with their signs changed; their sums of squares. */
VEC void tq_take_rows(enum codec_dtype dtype, const uint8_t *p, size_t stride, uint32_t n_rows, uint32_t dim, float *x, float *sum)
{
    for (uint32_t row = 0; row < n_rows; row++, p += stride, x += dim) {
        vf acc = vf_set1(0);

        for (uint32_t i = 0; i < dim; i += 16) {
            vf v = load16(dtype, p, i);

            acc = vf_add(acc, vf_mul(v, v));
            vf_store(x + i, vf_flip(v, codec_sign_mask + i));
        }
        sum[row] = vf_sum16(acc);
    }
}

static void tq_take(enum codec_dtype dtype, const uint8_t *p, size_t stride, uint32_t n_rows, uint32_t dim, float *x, float *sum)
{
    switch (dtype) {
    case CODEC_F16:
        tq_take_rows(CODEC_F16, p, stride, n_rows, dim, x, sum);
        break;
    case CODEC_BF16:
        tq_take_rows(CODEC_BF16, p, stride, n_rows, dim, x, sum);
        break;
    case CODEC_F32:
        tq_take_rows(CODEC_F32, p, stride, n_rows, dim, x, sum);
        break;
    }
}

VEC int tq_encode_rows(int is_tq3, enum codec_dtype dtype, const uint8_t *p, size_t stride, uint32_t n_rows, uint32_t dim, uint8_t *side,
                       uint8_t *codes)
{
    _Alignas(64) float x[TQ_BUFFER];
    float sum[TQ_ROWS] = {0}, factor[TQ_ROWS], square[TQ_ROWS] = {1, 1, 1, 1, 1, 1, 1, 1};
    const __m256 spread = _mm256_set1_ps(sqrtf((float)(dim / (dim & -dim))));
    __m256 norm, scale;
    __m128i half;

    tq_take(dtype, p, stride, n_rows, dim, x, sum);
    norm = _mm256_sqrt_ps(_mm256_loadu_ps(sum));
    _mm256_storeu_ps(factor, _mm256_and_ps(_mm256_div_ps(spread, norm), _mm256_cmp_ps(norm, _mm256_setzero_ps(), _CMP_GT_OQ)));
    for (uint32_t row = 0; row < n_rows; row++)
        square[row] = vf_sum16(tq_code_row(x + row * dim, dim, vf_set1(factor[row]), is_tq3, codes + row * tq_bytes(is_tq3, dim)));
    scale = _mm256_div_ps(norm, _mm256_sqrt_ps(_mm256_loadu_ps(square)));
    if (_mm256_movemask_ps(_mm256_cmp_ps(scale, _mm256_set1_ps(65520.0f), _CMP_LT_OQ)) != 255)
        return -EDOM;
    half = _mm256_cvtps_ph(scale, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(side, &half, 2 * n_rows);
    return 0;
}

VEC int tq_encode_as(int is_tq3, enum codec_dtype dtype, const uint8_t *src, size_t stride, uint32_t n_tokens, uint32_t dim,
                     uint8_t *side, uint8_t *codes)
{
    uint32_t step = min_u32(TQ_ROWS, TQ_BUFFER / dim);

    for (uint32_t t = 0; t < n_tokens; t += step) {
        int r = tq_encode_rows(is_tq3, dtype, src + t * stride, stride, min_u32(step, n_tokens - t), dim, side + 2 * t,
                               codes + t * tq_bytes(is_tq3, dim));

        if (r < 0)
            return r;
    }
    return 0;
}

static int tq4_encode(enum codec_dtype dtype, const uint8_t *src, size_t stride, uint32_t n_tokens, uint32_t dim, uint8_t *side,
                      uint8_t *codes)
{
    return tq_encode_as(0, dtype, src, stride, n_tokens, dim, side, codes);
}

static int tq3_encode(enum codec_dtype dtype, const uint8_t *src, size_t stride, uint32_t n_tokens, uint32_t dim, uint8_t *side,
                      uint8_t *codes)
{
    return tq_encode_as(1, dtype, src, stride, n_tokens, dim, side, codes);
}

VEC vf tq_values(int is_tq3, const uint8_t *codes, uint32_t i, vlut table)
{
    return vlut_get(table, is_tq3 ? vi_triples(codes + i / 8 * 3) : vi_nibbles(codes + i / 2));
}

VEC void tq_decode_fused(int is_tq3, const uint8_t *codes, uint32_t dim, uint32_t n, vlut table, enum codec_dtype dtype, uint8_t *p)
{
    for (uint32_t b = 0; b < dim; b += 16 * n) {
        vf r[VEC_WHT_REGS];

#pragma GCC unroll 16
        for (uint32_t i = 0; i < n; i++)
            r[i] = tq_values(is_tq3, codes, b + 16 * i, table);
        wht_registers(r, n);
#pragma GCC unroll 16
        for (uint32_t i = 0; i < n; i++)
            store16(dtype, p, b + 16 * i, vf_flip(r[i], codec_sign_mask + b + 16 * i));
    }
}

VEC void tq_decode_row(int is_tq3, const uint8_t *side, const uint8_t *codes, uint32_t dim, enum codec_dtype dtype, uint8_t *p)
{
    uint32_t block = dim & -dim;
    vlut table = vlut_scale(vlut_load(codec_tq_value[is_tq3]), _cvtsh_ss(load_u16(side)) * codec_rsqrt[log2_of(block)]);
    _Alignas(64) float x[CODEC_DIM_MAX];

    if (block == 64) {
        tq_decode_fused(is_tq3, codes, dim, 4, table, dtype, p);
        return;
    }
#if VEC_WHT_REGS > 4
    if (block == 128) {
        tq_decode_fused(is_tq3, codes, dim, 8, table, dtype, p);
        return;
    }
    if (block == 256) {
        tq_decode_fused(is_tq3, codes, dim, 16, table, dtype, p);
        return;
    }
#endif
    for (uint32_t i = 0; i < dim; i += 16)
        vf_store(x + i, tq_values(is_tq3, codes, i, table));
    row_wht(x, dim, block);
    for (uint32_t i = 0; i < dim; i += 16)
        store16(dtype, p, i, vf_flip(vf_load(x + i), codec_sign_mask + i));
}

static void tq4_decode_row(const uint8_t *side, const uint8_t *codes, uint32_t dim, enum codec_dtype dtype, uint8_t *p)
{
    tq_decode_row(0, side, codes, dim, dtype, p);
}

static void tq3_decode_row(const uint8_t *side, const uint8_t *codes, uint32_t dim, enum codec_dtype dtype, uint8_t *p)
{
    tq_decode_row(1, side, codes, dim, dtype, p);
}

/* ---- kc4 ---- */

/* Lowest and highest of n channels. */
VEC void kc4_range_any(enum codec_dtype dtype, const uint8_t *src, size_t stride, uint32_t n_tokens, uint32_t i, uint32_t n, float *low,
                       float *high)
{
    for (uint32_t j = 0; j < n; j += 16) {
        vf lo = load16(dtype, src, i + j), hi = lo;
        vi amax = vf_abs_bits(lo);

        for (uint32_t t = 1; t < n_tokens; t++) {
            vf v = load16(dtype, src + t * stride, i + j);

            amax = vi_max(amax, vf_abs_bits(v));
            lo = vf_min(v, lo);
            hi = vf_max(v, hi);
        }
        if (vi_max_of(amax) >= F32_INF_BITS) /* a NaN gets lost in a comparison */
            hi = vf_set1(INFINITY);
        vf_store(low + j, lo);
        vf_store(high + j, hi);
    }
}

/* The same of 32 n channels of a 16-bit type, as integers; NaN lies beyond infinity there. */
VEC void kc4_range_halves(enum codec_dtype dtype, const uint8_t *src, size_t stride, uint32_t n_tokens, uint32_t n, float *low,
                          float *high)
{
    _Alignas(64) uint16_t half[128];
    vh lo[4], hi[4];

#pragma GCC unroll 4
    for (uint32_t j = 0; j < n; j++)
        lo[j] = hi[j] = vh_load(src + 64 * j);
    for (uint32_t t = 1; t < n_tokens; t++)
#pragma GCC unroll 4
        for (uint32_t j = 0; j < n; j++) {
            vh h = vh_load(src + t * stride + 64 * j);

            lo[j] = vh_min(lo[j], h);
            hi[j] = vh_max(hi[j], h);
        }
#pragma GCC unroll 4
    for (uint32_t j = 0; j < n; j++)
        vh_store(half + 32 * j, lo[j]);
    row_load(dtype, (const uint8_t *)half, 32 * n, low);
#pragma GCC unroll 4
    for (uint32_t j = 0; j < n; j++)
        vh_store(half + 32 * j, hi[j]);
    row_load(dtype, (const uint8_t *)half, 32 * n, high);
}

#define KC4_SPAN 128u /* channels whose ranges are taken together: a run of cache lines */

/* Of the n channels from i, at most KC4_SPAN; 0 or -EDOM. */
VEC int kc4_range(enum codec_dtype dtype, const uint8_t *src, size_t stride, uint32_t n_tokens, uint32_t i, uint32_t n, float *low,
                  float *high)
{
    if (dtype != CODEC_F32 && n == 128)
        kc4_range_halves(dtype, src + 2 * i, stride, n_tokens, 4, low, high);
    else if (dtype != CODEC_F32 && n == 64)
        kc4_range_halves(dtype, src + 2 * i, stride, n_tokens, 2, low, high);
    else
        kc4_range_any(dtype, src, stride, n_tokens, i, n, low, high);
    return row_amax(low, n) > F16_MAX_BITS || row_amax(high, n) > F16_MAX_BITS ? -EDOM : 0;
}

VEC vf kc4_step(vf low, vf high, uint32_t grid)
{
    return vf_cut4(vf_div(vf_sub(high, low), vf_set1(codec_kc4_span[grid])));
}

/* Writes the side data of n channels; low becomes what was stored and inverse one by the step. */
VEC void kc4_side(uint32_t grid, uint32_t dim, uint32_t i, uint32_t n, float *low, const float *high, float *inverse, uint8_t *side)
{
    for (uint32_t j = 0; j < n; j += 16) {
        uint8_t *at_low = side + 2 * (i + j), *at_high = side + 2 * (dim + i + j);
        vf zero = vf_set1(0), lo, hi, step;

        vf_store_f16_down(at_low, vf_load(low + j));
        vf_store_f16_up(at_high, vf_load(high + j));
        lo = vf_add(vf_load_f16(at_low), zero); /* -0 becomes 0 */
        hi = vf_add(vf_load_f16(at_high), zero);
        vf_store_f16(at_low, lo);
        vf_store_f16(at_high, hi);
        step = kc4_step(lo, hi, grid);
        vf_store(low + j, lo);
        vf_store(inverse + j, vf_zero_unless_positive(vf_div(vf_set1(1.0f), step), step));
    }
}

VEC vb kc4_codes(uint32_t grid, enum codec_dtype dtype, const uint8_t *p, uint32_t n, const float *low, const float *inverse)
{
    vi code[4] = {vi_zero(), vi_zero(), vi_zero(), vi_zero()};

#pragma GCC unroll 4
    for (uint32_t j = 0; j < 4; j++) {
        vf y;

        if (16 * j >= n)
            break;
        y = vf_mul(vf_sub(load16(dtype, p, 16 * j), vf_load(low + 16 * j)), vf_load(inverse + 16 * j));
        if (grid == CODEC_GRID_INT)
            code[j] = vf_round(y);
        else
            code[j] = vf_ceil(vf_sub(vf_add(y, y), vf_set1(24.0f)));
    }
    return grid == CODEC_GRID_INT ? vb_clamp(vb_pack(code), 0, 15) : vb_e2m1(vb_pack(code), codec_e2m1_mag);
}

VEC void kc4_encode_span(uint32_t grid, enum codec_dtype dtype, const uint8_t *p, uint32_t n, const float *low, const float *inverse,
                         uint8_t *codes)
{
    for (uint32_t j = 0; j < n; j += CHUNK) {
        const uint8_t *q = p + j * (dtype == CODEC_F32 ? 4 : 2);
        uint32_t m = min_u32(CHUNK, n - j);

        if (m == CHUNK)
            store_nibbles(codes + j / 2, kc4_codes(grid, dtype, q, CHUNK, low + j, inverse + j), CHUNK);
        else
            store_nibbles(codes + j / 2, kc4_codes(grid, dtype, q, m, low + j, inverse + j), m);
    }
}

VEC int kc4_encode_as(uint32_t grid, enum codec_dtype dtype, const uint8_t *src, size_t stride, uint32_t n_tokens, uint32_t dim,
                      uint8_t *side, uint8_t *codes)
{
    for (uint32_t i = 0; i < dim; i += KC4_SPAN) {
        uint32_t n = min_u32(KC4_SPAN, dim - i);
        _Alignas(64) float low[KC4_SPAN], high[KC4_SPAN], inverse[KC4_SPAN];

        if (kc4_range(dtype, src, stride, n_tokens, i, n, low, high) < 0)
            return -EDOM;
        kc4_side(grid, dim, i, n, low, high, inverse, side);
        for (uint32_t t = 0; t < n_tokens; t++)
            kc4_encode_span(grid, dtype, src + t * stride + i * (dtype == CODEC_F32 ? 4 : 2), n, low, inverse,
                            codes + t * (dim / 2) + i / 2);
    }
    return 0;
}

static int kc4_encode(const struct codec_spec *spec, enum codec_dtype dtype, const uint8_t *src, size_t stride, uint32_t n_tokens,
                      uint32_t dim, uint8_t *side, uint8_t *codes)
{
    bool is_int = spec->grid == CODEC_GRID_INT;

    switch (dtype) {
    case CODEC_F16:
        return is_int ? kc4_encode_as(CODEC_GRID_INT, CODEC_F16, src, stride, n_tokens, dim, side, codes)
                      : kc4_encode_as(CODEC_GRID_E2M1, CODEC_F16, src, stride, n_tokens, dim, side, codes);
    case CODEC_BF16:
        return is_int ? kc4_encode_as(CODEC_GRID_INT, CODEC_BF16, src, stride, n_tokens, dim, side, codes)
                      : kc4_encode_as(CODEC_GRID_E2M1, CODEC_BF16, src, stride, n_tokens, dim, side, codes);
    case CODEC_F32:
        break;
    }
    return is_int ? kc4_encode_as(CODEC_GRID_INT, CODEC_F32, src, stride, n_tokens, dim, side, codes)
                  : kc4_encode_as(CODEC_GRID_E2M1, CODEC_F32, src, stride, n_tokens, dim, side, codes);
}

VEC void kc4_decode_as(uint32_t grid, enum codec_dtype dtype, const uint8_t *side, const uint8_t *codes, uint32_t dim, uint32_t t0,
                       uint32_t t1, uint8_t *dst, size_t stride)
{
    const vlut steps = vlut_load(codec_kc4_steps[grid]);

    for (uint32_t i = 0; i < dim; i += 16) {
        vf low = vf_load_f16(side + 2 * i), high = vf_load_f16(side + 2 * (dim + i)), step = kc4_step(low, high, grid);

        for (uint32_t t = t0; t < t1; t++) {
            vi code = vi_nibbles(codes + t * (dim / 2) + i / 2);
            vf base = grid == CODEC_GRID_INT ? vf_choose_bit3(code, low, high) : vf_choose_bit3(code, high, low);

            store16(dtype, dst + (t - t0) * stride, i, vf_madd_exact(step, vlut_get(steps, code), base));
        }
    }
}

static void kc4_decode(const struct codec_spec *spec, const uint8_t *side, const uint8_t *codes, uint32_t dim, uint32_t t0,
                       uint32_t t1, enum codec_dtype dtype, uint8_t *dst, size_t stride)
{
    bool is_int = spec->grid == CODEC_GRID_INT;

    if (dtype == CODEC_F16 && is_int)
        kc4_decode_as(CODEC_GRID_INT, CODEC_F16, side, codes, dim, t0, t1, dst, stride);
    else if (dtype == CODEC_F16)
        kc4_decode_as(CODEC_GRID_E2M1, CODEC_F16, side, codes, dim, t0, t1, dst, stride);
    else if (dtype == CODEC_BF16 && is_int)
        kc4_decode_as(CODEC_GRID_INT, CODEC_BF16, side, codes, dim, t0, t1, dst, stride);
    else if (dtype == CODEC_BF16)
        kc4_decode_as(CODEC_GRID_E2M1, CODEC_BF16, side, codes, dim, t0, t1, dst, stride);
    else if (is_int)
        kc4_decode_as(CODEC_GRID_INT, CODEC_F32, side, codes, dim, t0, t1, dst, stride);
    else
        kc4_decode_as(CODEC_GRID_E2M1, CODEC_F32, side, codes, dim, t0, t1, dst, stride);
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
