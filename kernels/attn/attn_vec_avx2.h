/* One register of floats or integers with AVX2, FMA, F16C and BMI2: attn_vec_avx512.h has the same names and says
 * what they do. */
#ifndef KVD_KERNELS_ATTN_VEC_AVX2_H
#define KVD_KERNELS_ATTN_VEC_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 8u
#define LANES 2u
#define ROWS 2u
#define VEC static inline __attribute__((always_inline))

typedef __m256 wf;
typedef __m256i wi;

VEC wf wf_set1(float x) { return _mm256_set1_ps(x); }
VEC wf wf_load(const float *p) { return _mm256_loadu_ps(p); }
VEC void wf_store(float *p, wf v) { _mm256_storeu_ps(p, v); }
VEC wf wf_add(wf a, wf b) { return _mm256_add_ps(a, b); }
VEC wf wf_sub(wf a, wf b) { return _mm256_sub_ps(a, b); }
VEC wf wf_mul(wf a, wf b) { return _mm256_mul_ps(a, b); }
VEC wf wf_div(wf a, wf b) { return _mm256_div_ps(a, b); }
VEC wf wf_fma(wf a, wf b, wf c) { return _mm256_fmadd_ps(a, b, c); }
VEC wf wf_max(wf a, wf b) { return _mm256_max_ps(a, b); }
VEC wf wf_abs(wf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
VEC wf wf_copysign(wf magnitude, wf sign)
{
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
VEC wf wf_round(wf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC wf wf_load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
VEC wf f16_low_halves(wi v)
{
    wi h = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));

    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0xd8)));
}
VEC void wf_load_f16_pairs(const void *p, wf *ret_even, wf *ret_odd)
{
    wi v = _mm256_loadu_si256(p);

    *ret_even = f16_low_halves(v);
    *ret_odd = f16_low_halves(_mm256_srli_epi32(v, 16));
}

VEC wf wf_max_abs(wf a, wf b) { return wf_max(a, wf_abs(b)); }
VEC wf wf_flip(wf v, const uint32_t *mask)
{
    return _mm256_xor_ps(v, _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *)mask)));
}
VEC void wf_load_pairs(const float *p, wf *ret_even, wf *ret_odd)
{
    wf a = wf_load(p), b = wf_load(p + 8);

    *ret_even = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), 0xd8));
    *ret_odd = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8));
}
VEC void wf_store_pairs(float *p, wf even, wf odd)
{
    wf a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);

    _mm_storeu_ps(p, _mm256_castps256_ps128(a));
    _mm_storeu_ps(p + 4, _mm256_castps256_ps128(b));
    _mm_storeu_ps(p + 32, _mm256_extractf128_ps(a, 1));
    _mm_storeu_ps(p + 36, _mm256_extractf128_ps(b, 1));
}
VEC wf wf_butterfly(wf v, uint32_t bit)
{
    const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), mask = _mm256_set1_epi32(1 << bit);
    wf other = _mm256_permutevar8x32_ps(v, _mm256_xor_si256(number, mask));
    __m256i upper = _mm256_cmpeq_epi32(_mm256_and_si256(number, mask), mask);

    return _mm256_add_ps(other, _mm256_xor_ps(v, _mm256_and_ps(_mm256_castsi256_ps(upper), _mm256_set1_ps(-0.0f))));
}

VEC wf wf_load_e4m3(const uint8_t *p)
{
    __m128i c = _mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)p));

    return _mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(c, 1), _mm_set1_epi16((short)0xbfff)));
}

VEC wf wf_scale(wf x, wf n)
{
    __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    wf y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), e));

    return _mm256_and_ps(y, _mm256_cmp_ps(n, _mm256_set1_ps(-126), _CMP_NLT_UQ));
}

VEC wf wf_scale_normal(wf x, wf n)
{
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
VEC wf wf_mantissa(wf x, wf *ret_n)
{
    __m256i u = _mm256_castps_si256(x);
    __m256i n = _mm256_srai_epi32(_mm256_sub_epi32(u, _mm256_set1_epi32(0x3f400000)), 23);

    *ret_n = _mm256_cvtepi32_ps(n);
    return _mm256_castsi256_ps(_mm256_sub_epi32(u, _mm256_slli_epi32(n, 23)));
}
VEC wf wf_where_more(wf a, wf b, wf v) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), v); }

VEC wf wf_see(wf v, uint32_t first, uint32_t head, uint32_t from, uint32_t to)
{
    wi t = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32((int)first));
    wi seen = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)from), t),
                                  _mm256_cmpgt_epi32(_mm256_set1_epi32((int)to), t));

    seen = _mm256_or_si256(seen, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)head), t));
    return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), v, _mm256_castsi256_ps(seen));
}

VEC wf wf_lanes(wf v, int i)
{
    return i ? _mm256_permute2f128_ps(v, v, 0x11) : _mm256_permute2f128_ps(v, v, 0x00);
}
#define WF_FOLD4(op) \
    for (int i = 0; i < 4; i += 2) { \
        wf c = op(_mm256_permute2f128_ps(v[i], v[i + 1], 0x20), _mm256_permute2f128_ps(v[i], v[i + 1], 0x31)); \
\
        c = op(c, _mm256_permute_ps(c, 0x4e)); \
        c = op(c, _mm256_permute_ps(c, 0xb1)); \
        ret[i] = wf_lanes(c, 0); \
        ret[i + 1] = wf_lanes(c, 1); \
    }
VEC void wf_max4(const wf v[4], wf ret[4]) { WF_FOLD4(_mm256_max_ps) }
VEC void wf_sum4(const wf v[4], wf ret[4]) { WF_FOLD4(_mm256_add_ps) }
VEC __m128 wf_quarter(wf v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
VEC __m128 wf_sums(const wf v[4])
{
    return _mm_hadd_ps(_mm_hadd_ps(wf_quarter(v[0]), wf_quarter(v[1])), _mm_hadd_ps(wf_quarter(v[2]), wf_quarter(v[3])));
}
VEC float wf_first(wf v) { return _mm256_cvtss_f32(v); }

/* ---- integers ---- */

VEC wi wi_zero(void) { return _mm256_setzero_si256(); }
VEC wi wi_load(const void *p) { return _mm256_loadu_si256(p); }
VEC void wi_store(void *p, wi v) { _mm256_storeu_si256(p, v); }
VEC wi wi_add32(wi a, wi b) { return _mm256_add_epi32(a, b); }
/* Sums in a loop are instructions: gcc 12 would make all products first and add them up later, from memory. */
VEC wi wi_sum16(wi sum, wi x)
{
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x));
    return sum;
}
VEC wi wi_sum32(wi sum, wi x)
{
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x));
    return sum;
}
VEC wi wi_shl8(wi a) { return _mm256_slli_epi32(a, 8); }
VEC wi wi_nib_low(wi a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
VEC wi wi_nib_high(wi a) { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }
VEC wi wi_set1_lane(const void *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(p)); }
VEC wi wi_set1_32(const void *p)
{
    int32_t x;

    memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
}
VEC wi wi_maddubs(wi u, wi s) { return _mm256_maddubs_epi16(u, s); }
VEC wi wi_madd(wi a, wi b) { return _mm256_madd_epi16(a, b); }
/* acc + sums of two neighbouring products of int16. */
VEC wi wi_dot_pairs(wi acc, wi a, wi b) { return wi_sum32(acc, _mm256_madd_epi16(a, b)); }
VEC wi wi_set1_16(int x) { return _mm256_set1_epi16((short)x); }
VEC wf wi_float(wi a) { return _mm256_cvtepi32_ps(a); }

VEC __m128i lane_load(const uint8_t *p, int half)
{
    return half ? _mm_loadl_epi64((const __m128i *)p) : _mm_loadu_si128((const __m128i *)p);
}
VEC void wi_transpose_lanes(wi x[2])
{
    wi a = _mm256_permute2x128_si256(x[0], x[1], 0x20);

    x[1] = _mm256_permute2x128_si256(x[0], x[1], 0x31);
    x[0] = a;
}
VEC wi wi_gather_lanes(const uint8_t *p, size_t stride, int half)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(lane_load(p, half)), lane_load(p + stride, half), 1);
}

VEC void wi_transpose_dwords(wi x[4])
{
    wi a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    wi c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);

    x[0] = _mm256_unpacklo_epi64(a, c);
    x[1] = _mm256_unpackhi_epi64(a, c);
    x[2] = _mm256_unpacklo_epi64(b, d);
    x[3] = _mm256_unpackhi_epi64(b, d);
}

VEC void wf_split32(const wf v[4], uint8_t *to, wi *total)
{
    wi n[4], high[2];
    wf h, l, x;

    for (int i = 0; i < 4; i++) {
        n[i] = _mm256_cvtps_epi32(v[i]);
        *total = _mm256_add_epi32(*total, n[i]);
    }
    for (int i = 0; i < 2; i++) {
        n[i] = _mm256_packs_epi32(n[2 * i], n[2 * i + 1]);
        high[i] = _mm256_srli_epi16(_mm256_add_epi16(n[i], _mm256_set1_epi16(128)), 8);
        n[i] = _mm256_and_si256(n[i], _mm256_set1_epi16(255));
    }
    /* dwords of the lanes: even 0, even 2, odd 0, odd 2; even 1, even 3, odd 1, odd 3 */
    h = _mm256_castsi256_ps(_mm256_packus_epi16(high[0], high[1]));
    l = _mm256_castsi256_ps(_mm256_packus_epi16(n[0], n[1]));
    x = _mm256_shuffle_ps(h, l, 0x88);
    _mm_storeu_ps((float *)to, _mm256_castps256_ps128(x));
    _mm_storeu_ps((float *)(to + 64), _mm256_extractf128_ps(x, 1));
    x = _mm256_shuffle_ps(h, l, 0xdd);
    _mm_storeu_ps((float *)(to + 128), _mm256_castps256_ps128(x));
    _mm_storeu_ps((float *)(to + 192), _mm256_extractf128_ps(x, 1));
}
VEC void wf_store_int16(int16_t *p, wf a, wf b)
{
    wi n = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));

    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(n, 0xd8));
}

/* ---- values of two tokens ---- */

typedef struct { wi low, high; } wtab; /* bytes of the numbers */
VEC wtab wtab_load(const int16_t table[16])
{
    uint8_t low[16], high[16];

    for (int i = 0; i < 16; i++) {
        low[i] = (uint8_t)table[i];
        high[i] = (uint8_t)(table[i] >> 8);
    }
    return (wtab){wi_set1_lane(low), wi_set1_lane(high)};
}
VEC wi wi_load_n(const uint8_t *p, uint32_t n)
{
    const wi words = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);

    if (n >= 32)
        return _mm256_loadu_si256((const __m256i *)p);
    return _mm256_maskload_epi32((const int *)p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n / 4), words));
}
VEC void wtab_pairs(wtab t, wi a, wi b, int half, wi ret[4])
{
    wi x = half ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b), even = wi_nib_low(x), odd = wi_nib_high(x);
    wi l = _mm256_shuffle_epi8(t.low, even), h = _mm256_shuffle_epi8(t.high, even);

    ret[0] = _mm256_unpacklo_epi8(l, h);
    ret[2] = _mm256_unpackhi_epi8(l, h);
    l = _mm256_shuffle_epi8(t.low, odd);
    h = _mm256_shuffle_epi8(t.high, odd);
    ret[1] = _mm256_unpacklo_epi8(l, h);
    ret[3] = _mm256_unpackhi_epi8(l, h);
}

#endif
