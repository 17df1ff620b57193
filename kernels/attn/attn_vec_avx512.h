/* One register of floats or integers with AVX-512 F, BW, VL and DQ: what attn_part.h and its parts are written in.
 * attn_vec_avx2.h has the same names.   wf: WIDTH floats   wi: the same bits as integers   a lane: 128 of them */
#ifndef KVD_KERNELS_ATTN_VEC_AVX512_H
#define KVD_KERNELS_ATTN_VEC_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 16u
#define LANES 4u
#define ROWS 4u /* of a register block */
#define VEC static inline __attribute__((always_inline))

typedef __m512 wf;
typedef __m512i wi;

VEC wf wf_set1(float x) { return _mm512_set1_ps(x); }
VEC wf wf_load(const float *p) { return _mm512_loadu_ps(p); }
VEC void wf_store(float *p, wf v) { _mm512_storeu_ps(p, v); }
VEC wf wf_add(wf a, wf b) { return _mm512_add_ps(a, b); }
VEC wf wf_sub(wf a, wf b) { return _mm512_sub_ps(a, b); }
VEC wf wf_mul(wf a, wf b) { return _mm512_mul_ps(a, b); }
VEC wf wf_div(wf a, wf b) { return _mm512_div_ps(a, b); }
VEC wf wf_fma(wf a, wf b, wf c) { return _mm512_fmadd_ps(a, b, c); }
VEC wf wf_max(wf a, wf b) /* b if one is no number */
 { return _mm512_max_ps(a, b); }
VEC wf wf_abs(wf a) { return _mm512_abs_ps(a); }
VEC wf wf_copysign(wf magnitude, wf sign)
{
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
VEC wf wf_round(wf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC wf wf_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
/* The even and the odd ones of 2 WIDTH halves. */
VEC void wf_load_f16_pairs(const void *p, wf *ret_even, wf *ret_odd)
{
    wi v = _mm512_loadu_si512(p);

    *ret_even = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
    *ret_odd = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)));
}

/* The larger of a and |b|, a >= 0. */
VEC wf wf_max_abs(wf a, wf b) { return _mm512_range_ps(a, b, 0x0b); }
/* Changes the signs where the mask's sign bit is set. */
VEC wf wf_flip(wf v, const uint32_t *mask)
{
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), _mm512_loadu_si512(mask)));
}
/* The even and the odd ones of 2 WIDTH floats. */
VEC void wf_load_pairs(const float *p, wf *ret_even, wf *ret_odd)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    wf a = wf_load(p), b = wf_load(p + 16);

    *ret_even = _mm512_permutex2var_ps(a, even, b);
    *ret_odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
}
/* Elements of even and odd by turns: the eight of lane i to p + 32 i. */
VEC void wf_store_pairs(float *p, wf even, wf odd)
{
    wf a = _mm512_unpacklo_ps(even, odd), b = _mm512_unpackhi_ps(even, odd);

    _mm_storeu_ps(p, _mm512_castps512_ps128(a));
    _mm_storeu_ps(p + 4, _mm512_castps512_ps128(b));
    _mm_storeu_ps(p + 32, _mm512_extractf32x4_ps(a, 1));
    _mm_storeu_ps(p + 36, _mm512_extractf32x4_ps(b, 1));
    _mm_storeu_ps(p + 64, _mm512_extractf32x4_ps(a, 2));
    _mm_storeu_ps(p + 68, _mm512_extractf32x4_ps(b, 2));
    _mm_storeu_ps(p + 96, _mm512_extractf32x4_ps(a, 3));
    _mm_storeu_ps(p + 100, _mm512_extractf32x4_ps(b, 3));
}
/* Sum and difference of elements whose numbers differ in one bit. */
VEC wf wf_butterfly(wf v, uint32_t bit)
{
    const __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 upper = _mm512_test_epi32_mask(number, _mm512_set1_epi32(1 << bit));
    wf other = _mm512_permutexvar_ps(_mm512_xor_si512(number, _mm512_set1_epi32(1 << bit)), v);

    return _mm512_mask_sub_ps(_mm512_add_ps(other, v), upper, other, v);
}

/* E4M3 codes: their values / 256 (the codes that stand for NaN have some value, too). */
VEC wf wf_load_e4m3(const uint8_t *p)
{
    __m256i c = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)), 8);

    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(c, 1), _mm256_set1_epi16((short)0xbfff)));
}

/* x * 2^n for whole n, 0 where n is below -126; a NaN stays one. */
VEC wf wf_scale(wf x, wf n)
{
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, _mm512_set1_ps(-126), _CMP_NLT_UQ), x, n);
}

/* The same for n >= -126. */
VEC wf wf_scale_normal(wf x, wf n) { return _mm512_scalef_ps(x, n); }
/* x = m * 2^n, 0.75 <= m < 1.5, of a positive normal x. */
VEC wf wf_mantissa(wf x, wf *ret_n)
{
    __m512i u = _mm512_castps_si512(x);
    __m512i n = _mm512_srai_epi32(_mm512_sub_epi32(u, _mm512_set1_epi32(0x3f400000)), 23);

    *ret_n = _mm512_cvtepi32_ps(n);
    return _mm512_castsi512_ps(_mm512_sub_epi32(u, _mm512_slli_epi32(n, 23)));
}
/* v where a > b, else 0. */
VEC wf wf_where_more(wf a, wf b, wf v) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), v); }

/* -infinity where first + lane is not below head nor in from .. to - 1. */
VEC wf wf_see(wf v, uint32_t first, uint32_t head, uint32_t from, uint32_t to)
{
    wi t = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                            _mm512_set1_epi32((int)first));
    __mmask16 seen = _mm512_cmplt_epi32_mask(t, _mm512_set1_epi32((int)head)) |
                     (_mm512_cmpge_epi32_mask(t, _mm512_set1_epi32((int)from)) &
                      _mm512_cmplt_epi32_mask(t, _mm512_set1_epi32((int)to)));

    return _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), seen, v);
}

#define WF_FOLD4(op) \
    wf a = op(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee)); \
    wf b = op(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee)); \
    wf c = op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); \
    c = op(c, _mm512_permute_ps(c, 0x4e)); \
    c = op(c, _mm512_permute_ps(c, 0xb1)); \
    ret[0] = _mm512_shuffle_f32x4(c, c, 0x00); \
    ret[1] = _mm512_shuffle_f32x4(c, c, 0x55); \
    ret[2] = _mm512_shuffle_f32x4(c, c, 0xaa); \
    ret[3] = _mm512_shuffle_f32x4(c, c, 0xff)
/* The largest, the sum of the lanes of each of four, everywhere. */
VEC void wf_max4(const wf v[4], wf ret[4]) { WF_FOLD4(_mm512_max_ps); }
VEC void wf_sum4(const wf v[4], wf ret[4]) { WF_FOLD4(_mm512_add_ps); }
/* The four sums, side by side. */
VEC __m128 wf_quarter(wf v)
{
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));

    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}
VEC __m128 wf_sums(const wf v[4])
{
    return _mm_hadd_ps(_mm_hadd_ps(wf_quarter(v[0]), wf_quarter(v[1])), _mm_hadd_ps(wf_quarter(v[2]), wf_quarter(v[3])));
}
VEC float wf_first(wf v) { return _mm512_cvtss_f32(v); }

/* ---- integers ---- */

VEC wi wi_zero(void) { return _mm512_setzero_si512(); }
VEC wi wi_load(const void *p) { return _mm512_loadu_si512(p); }
VEC void wi_store(void *p, wi v) { _mm512_storeu_si512(p, v); }
VEC wi wi_add32(wi a, wi b) { return _mm512_add_epi32(a, b); }
/* Sums in a loop are instructions: gcc 12 would make all products first and add them up later, from memory. */
VEC wi wi_sum16(wi sum, wi x)
{
    __asm__("vpaddw %1, %0, %0" : "+v"(sum) : "v"(x));
    return sum;
}
VEC wi wi_sum32(wi sum, wi x)
{
    __asm__("vpaddd %1, %0, %0" : "+v"(sum) : "v"(x));
    return sum;
}
VEC wi wi_shl8(wi a) { return _mm512_slli_epi32(a, 8); }
VEC wi wi_nib_low(wi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
VEC wi wi_nib_high(wi a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
VEC wi wi_set1_32(const void *p)
{
    int32_t x;

    memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}
VEC wi wi_maddubs(wi u, wi s) { return _mm512_maddubs_epi16(u, s); }
VEC wi wi_madd(wi a, wi b) { return _mm512_madd_epi16(a, b); }
#ifdef ATTN_VNNI
/* acc + sums of four neighbouring products of uint8 and int8, the latter the same four everywhere. Instructions,
 * because gcc 12 copies the accumulators of the intrinsics. */
VEC wi wi_dot_bytes(wi acc, wi u, const void *s)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "m"(*(const int32_t(*)[1])s));
    return acc;
}
VEC wi wi_dot_pairs(wi acc, wi a, wi b)
{
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
#else
VEC wi wi_dot_pairs(wi acc, wi a, wi b) { return wi_sum32(acc, _mm512_madd_epi16(a, b)); }
#endif
VEC wi wi_set1_16(int x) { return _mm512_set1_epi16((short)x); }
VEC wf wi_float(wi a) { return _mm512_cvtepi32_ps(a); }

/* Lane i of register j becomes lane j of register i. */
VEC void wi_transpose_lanes(wi x[4])
{
    wi a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[0], x[1], 0xee);
    wi c = _mm512_shuffle_i32x4(x[2], x[3], 0x44), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);

    x[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    x[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    x[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    x[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}
/* Lane i is 16 bytes of row i, 8 of them and zeros if half. */
VEC __m128i lane_load(const uint8_t *p, int half)
{
    return half ? _mm_loadl_epi64((const __m128i *)p) : _mm_loadu_si128((const __m128i *)p);
}
VEC wi wi_gather_lanes(const uint8_t *p, size_t stride, int half)
{
    wi v = _mm512_castsi128_si512(lane_load(p, half));

    v = _mm512_inserti32x4(v, lane_load(p + stride, half), 1);
    v = _mm512_inserti32x4(v, lane_load(p + 2 * stride, half), 2);
    return _mm512_inserti32x4(v, lane_load(p + 3 * stride, half), 3);
}

/* In each lane: dword i of register j becomes dword j of register i. */
VEC void wi_transpose_dwords(wi x[4])
{
    wi a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    wi c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);

    x[0] = _mm512_unpacklo_epi64(a, c);
    x[1] = _mm512_unpackhi_epi64(a, c);
    x[2] = _mm512_unpacklo_epi64(b, d);
    x[3] = _mm512_unpackhi_epi64(b, d);
}

/* Rounds 16 even and 16 odd numbers within int16 to whole ones, 256 * high + low byte (signed). To to + 64 k: high
 * bytes of the four even ones from 4 k on, of the odd ones, low bytes of both. *total += the whole numbers. */
VEC void wf_split32(const wf v[2], uint8_t *to, wi *total)
{
    wi a = _mm512_cvtps_epi32(v[0]), b = _mm512_cvtps_epi32(v[1]), n = _mm512_packs_epi32(a, b);
    wi high = _mm512_srli_epi16(_mm512_add_epi16(n, _mm512_set1_epi16(128)), 8);

    *total = _mm512_add_epi32(*total, _mm512_add_epi32(a, b));
    n = _mm512_packus_epi16(high, _mm512_and_si512(n, _mm512_set1_epi16(255)));
    _mm_storeu_si128((__m128i *)to, _mm512_castsi512_si128(n));
    _mm_storeu_si128((__m128i *)(to + 64), _mm512_extracti32x4_epi32(n, 1));
    _mm_storeu_si128((__m128i *)(to + 128), _mm512_extracti32x4_epi32(n, 2));
    _mm_storeu_si128((__m128i *)(to + 192), _mm512_extracti32x4_epi32(n, 3));
}

/* 2 WIDTH numbers within int16, rounded. */
VEC void wf_store_int16(int16_t *p, wf a, wf b)
{
    const wi order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);

    _mm512_storeu_si512(p, _mm512_permutexvar_epi64(order, _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b))));
}

/* ---- values of two tokens ---- */

typedef struct { wi t; } wtab;
VEC wtab wtab_load(const int16_t table[16])
{
    return (wtab){_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table))};
}
/* n bytes, and zeros. */
VEC wi wi_load_n(const uint8_t *p, uint32_t n)
{
    return n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, p);
}
/* Codes of two tokens, half of each lane (0: the first 8 bytes): their numbers by table, side by side as int16; the
 * four bytes from 4 i on of the half are in ret[2 i] (low nibbles) and ret[2 i + 1]. */
VEC void wtab_pairs(wtab t, wi a, wi b, int half, wi ret[4])
{
    wi x = half ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b), y = _mm512_srli_epi16(x, 8);
    wi p = _mm512_unpacklo_epi16(x, y), q = _mm512_unpackhi_epi16(x, y);

    ret[0] = _mm512_permutexvar_epi16(p, t.t); /* looks at five bits; both halves of the table are the same */
    ret[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(p, 4), t.t);
    ret[2] = _mm512_permutexvar_epi16(q, t.t);
    ret[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4), t.t);
}

#endif
