/* tq4 and tq3 over sixteen lanes: a part of codec_rows.h, which includes it. */

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

/* The same for blocks of 2 or 4 times what fits into registers. */
VEC vf tq_code_late(float *x, uint32_t dim, uint32_t n_parts, vf factor, int is_tq3, uint8_t *codes)
{
    const uint32_t step = 16 * VEC_WHT_REGS;
    vf squares = vf_set1(0);

    wht_run(x, dim, VEC_WHT_REGS);
    for (uint32_t b = 0; b < dim; b += n_parts * step)
#pragma GCC unroll 4
        for (uint32_t part = 0; part < n_parts; part++)
            for (uint32_t i = 0; i < step; i += CHUNK) {
                vf y[4];

#pragma GCC unroll 4
                for (uint32_t j = 0; j < 4; j++)
                    y[j] = wht_late(x + b + i + 16 * j, step, n_parts, part);
                squares = tq_quantise(y, CHUNK, factor, is_tq3, codes + tq_bytes(is_tq3, b + part * step + i), squares);
            }
    return squares;
}

/* The same for any block. */
VEC vf tq_code_any(float *x, uint32_t dim, vf factor, int is_tq3, uint8_t *codes)
{
    vf squares = vf_set1(0);

    row_wht(x, dim, dim & -dim);
    for (uint32_t i = 0; i < dim; i += CHUNK) {
        uint32_t n = min_u32(CHUNK, dim - i);
        vf y[4];

        for (uint32_t j = 0; 16 * j < n; j++)
            y[j] = vf_load(x + i + 16 * j);
        squares = tq_quantise(y, n, factor, is_tq3, codes + tq_bytes(is_tq3, i), squares);
    }
    return squares;
}

/* Rotates x, which is lost, and codes it; the squares of the levels, by lanes. */
VEC vf tq_code_row(float *x, uint32_t dim, vf factor, int is_tq3, uint8_t *codes)
{
    uint32_t block = dim & -dim;

    if (block == 64)
        return tq_code_fused(x, dim, 4, factor, is_tq3, codes);
#if VEC_WHT_REGS > 4
    if (block == 128)
        return tq_code_fused(x, dim, 8, factor, is_tq3, codes);
    if (block == 256)
        return tq_code_fused(x, dim, 16, factor, is_tq3, codes);
#endif
    if (block == 2 * 16 * VEC_WHT_REGS)
        return tq_code_late(x, dim, 2, factor, is_tq3, codes);
    if (block == 4 * 16 * VEC_WHT_REGS)
        return tq_code_late(x, dim, 4, factor, is_tq3, codes);
    return tq_code_any(x, dim, factor, is_tq3, codes);
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

VEC void tq_decode_late(int is_tq3, const uint8_t *codes, uint32_t dim, uint32_t n_parts, vlut table, enum codec_dtype dtype,
                        uint8_t *p)
{
    const uint32_t step = 16 * VEC_WHT_REGS;
    _Alignas(64) float x[CODEC_DIM_MAX];

    for (uint32_t b = 0; b < dim; b += step) {
        vf r[VEC_WHT_REGS];

#pragma GCC unroll 16
        for (uint32_t i = 0; i < VEC_WHT_REGS; i++)
            r[i] = tq_values(is_tq3, codes, b + 16 * i, table);
        wht_registers(r, VEC_WHT_REGS);
#pragma GCC unroll 16
        for (uint32_t i = 0; i < VEC_WHT_REGS; i++)
            vf_store(x + b + 16 * i, r[i]);
    }
    for (uint32_t b = 0; b < dim; b += n_parts * step)
#pragma GCC unroll 4
        for (uint32_t part = 0; part < n_parts; part++)
            for (uint32_t i = 0; i < step; i += 16) {
                uint32_t at = b + part * step + i;

                store16(dtype, p, at, vf_flip(wht_late(x + b + i, step, n_parts, part), codec_sign_mask + at));
            }
}

static void tq_decode_any(int is_tq3, const uint8_t *codes, uint32_t dim, vlut table, enum codec_dtype dtype, uint8_t *p)
{
    _Alignas(64) float x[CODEC_DIM_MAX];

    for (uint32_t i = 0; i < dim; i += 16)
        vf_store(x + i, tq_values(is_tq3, codes, i, table));
    row_wht(x, dim, dim & -dim);
    for (uint32_t i = 0; i < dim; i += 16)
        store16(dtype, p, i, vf_flip(vf_load(x + i), codec_sign_mask + i));
}

VEC void tq_decode_row(int is_tq3, const uint8_t *side, const uint8_t *codes, uint32_t dim, enum codec_dtype dtype, uint8_t *p)
{
    uint32_t block = dim & -dim;
    vlut table = vlut_scale(vlut_load(codec_tq_value[is_tq3]), _cvtsh_ss(load_u16(side)) * codec_rsqrt[log2_of(block)]);

    if (block == 64)
        tq_decode_fused(is_tq3, codes, dim, 4, table, dtype, p);
#if VEC_WHT_REGS > 4
    else if (block == 128)
        tq_decode_fused(is_tq3, codes, dim, 8, table, dtype, p);
    else if (block == 256)
        tq_decode_fused(is_tq3, codes, dim, 16, table, dtype, p);
#endif
    else if (block == 2 * 16 * VEC_WHT_REGS)
        tq_decode_late(is_tq3, codes, dim, 2, table, dtype, p);
    else if (block == 4 * 16 * VEC_WHT_REGS)
        tq_decode_late(is_tq3, codes, dim, 4, table, dtype, p);
    else
        tq_decode_any(is_tq3, codes, dim, table, dtype, p);
}

static void tq4_decode_row(const uint8_t *side, const uint8_t *codes, uint32_t dim, enum codec_dtype dtype, uint8_t *p)
{
    tq_decode_row(0, side, codes, dim, dtype, p);
}

static void tq3_decode_row(const uint8_t *side, const uint8_t *codes, uint32_t dim, enum codec_dtype dtype, uint8_t *p)
{
    tq_decode_row(1, side, codes, dim, dtype, p);
}
