/* kc4 over sixteen lanes: a part of codec_rows.h, which includes it. */

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
