/* Sixteen lanes as two registers with AVX2, FMA, F16C and BMI2: what codec_rows.h is written in. codec_vec_avx512.h has the same
 * names.   vf: 16 floats   vi: 16 int32   vb: 64 bytes, in order */
#ifndef KVD_KERNELS_CODEC_VEC_AVX2_H
#define KVD_KERNELS_CODEC_VEC_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels/codec/codec_tab.h"

#define VEC_WHT_REGS 4 /* vf that a rotation keeps in registers */
#define VEC static inline __attribute__((always_inline))

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;
typedef struct { __m256i a, b; } vb;

#define VF2(op, x, y) ((vf){op((x).a, (y).a), op((x).b, (y).b)})
#define VI2(op, x, y) ((vi){op((x).a, (y).a), op((x).b, (y).b)})

VEC vf vf_set1(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
VEC vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
VEC void vf_store(float *p, vf v)
{
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
VEC vf vf_load_f16(const void *p)
{
    const __m128i *q = p;

    return (vf){_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
VEC __m256 bf16_widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
VEC vf vf_load_bf16(const void *p)
{
    const __m128i *q = p;

    return (vf){bf16_widen(_mm_loadu_si128(q)), bf16_widen(_mm_loadu_si128(q + 1))};
}
VEC __m256 saturate_f16(__m256 v)
{
    return _mm256_max_ps(_mm256_set1_ps(-65504.0f), _mm256_min_ps(_mm256_set1_ps(65504.0f), v));
}
#define STORE_F16(p, v, mode) \
    do { \
        _mm_storeu_si128((__m128i *)(p), _mm256_cvtps_ph((v).a, (mode) | _MM_FROUND_NO_EXC)); \
        _mm_storeu_si128((__m128i *)(p) + 1, _mm256_cvtps_ph((v).b, (mode) | _MM_FROUND_NO_EXC)); \
    } while (0)
VEC void vf_store_f16(void *p, vf v) /* saturates; NaN stays */
{
    v = (vf){saturate_f16(v.a), saturate_f16(v.b)};
    STORE_F16(p, v, _MM_FROUND_TO_NEAREST_INT);
}
VEC void vf_store_f16_down(void *p, vf v) { STORE_F16(p, v, _MM_FROUND_TO_NEG_INF); }
VEC void vf_store_f16_up(void *p, vf v) { STORE_F16(p, v, _MM_FROUND_TO_POS_INF); }
VEC __m256i bf16_round(__m256 v) /* in the low halves of the lanes */
{
    __m256i u = _mm256_castps_si256(v), lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
    __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q), quiet = _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));

    return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(r), quiet, nan)), 16);
}
VEC __m256i vf_to_bf16(vf v)
{
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_round(v.a), bf16_round(v.b)), 0xd8);
}
VEC void vf_store_bf16(void *p, vf v) { _mm256_storeu_si256((__m256i *)p, vf_to_bf16(v)); }

VEC vf vf_add(vf x, vf y) { return VF2(_mm256_add_ps, x, y); }
VEC vf vf_sub(vf x, vf y) { return VF2(_mm256_sub_ps, x, y); }
VEC vf vf_mul(vf x, vf y) { return VF2(_mm256_mul_ps, x, y); }
VEC vf vf_div(vf x, vf y) { return VF2(_mm256_div_ps, x, y); }
VEC vf vf_min(vf x, vf y) { return VF2(_mm256_min_ps, x, y); } /* x < y ? x : y */
VEC vf vf_max(vf x, vf y) { return VF2(_mm256_max_ps, x, y); } /* x > y ? x : y */
VEC vf vf_madd_exact(vf x, vf y, vf z) /* where x * y needs no rounding */
{
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
VEC vf vf_cut4(vf v) /* the last four bits of the mantissa are dropped */
{
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(~15));

    return (vf){_mm256_and_ps(v.a, m), _mm256_and_ps(v.b, m)};
}
VEC vf vf_zero_unless_positive(vf v, vf test)
{
    const __m256 zero = _mm256_setzero_ps();

    return (vf){_mm256_and_ps(v.a, _mm256_cmp_ps(test.a, zero, _CMP_GT_OQ)),
                _mm256_and_ps(v.b, _mm256_cmp_ps(test.b, zero, _CMP_GT_OQ))};
}
/* Changes the sign of the lanes whose mask is the sign bit. */
VEC vf vf_flip(vf v, const uint32_t *mask)
{
    const float *m = (const float *)(const void *)mask;

    return (vf){_mm256_xor_ps(v.a, _mm256_loadu_ps(m)), _mm256_xor_ps(v.b, _mm256_loadu_ps(m + 8))};
}
/* Lanes added by halves: j with j + 8, then + 4, + 2, + 1. */
VEC float vf_sum16(vf v)
{
    __m256 a = _mm256_add_ps(v.a, v.b);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));

    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

/* Walsh-Hadamard of the lanes. The factors are 1 and -1, so the fused operations round as an addition does. */
VEC __m256 wht8(__m256 v)
{
    v = _mm256_fmadd_ps(v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(v, 0xb1));
    v = _mm256_fmadd_ps(v, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(v, 0x4e));
    return _mm256_fmadd_ps(v, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(v, v, 1));
}
VEC vf vf_wht16(vf v)
{
    __m256 a = wht8(v.a), b = wht8(v.b);

    return (vf){_mm256_add_ps(a, b), _mm256_sub_ps(a, b)};
}

/* ---- 32 halves whose order as int16 is that of the numbers they stand for: fp16 or bf16 with the magnitude of negative ones
 * inverted; the same step goes back ---- */

typedef struct { __m256i a, b; } vh;
VEC __m256i order16(__m256i h)
{
    return _mm256_xor_si256(h, _mm256_and_si256(_mm256_srai_epi16(h, 15), _mm256_set1_epi16(0x7fff)));
}
VEC vh vh_load(const uint8_t *p)
{
    const __m256i *q = (const __m256i *)p;

    return (vh){order16(_mm256_loadu_si256(q)), order16(_mm256_loadu_si256(q + 1))};
}
VEC void vh_store(uint16_t *p, vh h)
{
    _mm256_storeu_si256((__m256i *)p, order16(h.a));
    _mm256_storeu_si256((__m256i *)p + 1, order16(h.b));
}
VEC vh vh_min(vh x, vh y) { return (vh){_mm256_min_epi16(x.a, y.a), _mm256_min_epi16(x.b, y.b)}; }
VEC vh vh_max(vh x, vh y) { return (vh){_mm256_max_epi16(x.a, y.a), _mm256_max_epi16(x.b, y.b)}; }

/* ---- integers ---- */

VEC vi vi_zero(void) { return (vi){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
VEC vi vf_abs_bits(vf v)
{
    const __m256i m = _mm256_set1_epi32(INT32_MAX);

    return (vi){_mm256_and_si256(_mm256_castps_si256(v.a), m), _mm256_and_si256(_mm256_castps_si256(v.b), m)};
}
VEC vi vi_max(vi x, vi y) { return VI2(_mm256_max_epi32, x, y); }
VEC uint32_t vi_max_of(vi x)
{
    __m256i m = _mm256_max_epi32(x.a, x.b);
    __m128i n = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));

    n = _mm_max_epi32(n, _mm_shuffle_epi32(n, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(n, _mm_shuffle_epi32(n, 0xb1)));
}
VEC vi vf_round(vf v) { return (vi){_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
VEC vi vf_ceil(vf v) { return vf_round((vf){_mm256_ceil_ps(v.a), _mm256_ceil_ps(v.b)}); }

VEC __m256i spread4(const uint8_t *p)
{
    int u;

    memcpy(&u, p, 4);
    return _mm256_set1_epi32(u);
}
VEC __m256i spread3(const uint8_t *p)
{
    uint16_t u;

    memcpy(&u, p, 2);
    return _mm256_set1_epi32(u | p[2] << 16);
}
/* The 16 codes of 8 bytes; bits above the fourth of a lane are not zero. */
VEC vi vi_nibbles(const uint8_t *p)
{
    const __m256i by = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);

    return (vi){_mm256_srlv_epi32(spread4(p), by), _mm256_srlv_epi32(spread4(p + 4), by)};
}
/* The 16 codes of three bits of 6 bytes; bits above the third of a lane are not zero. */
VEC vi vi_triples(const uint8_t *p)
{
    const __m256i by = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);

    return (vi){_mm256_srlv_epi32(spread3(p), by), _mm256_srlv_epi32(spread3(p + 3), by)};
}

/* Tables of 16 floats, looked up by the low four bits of an index. */
typedef struct { __m256 lo, hi; } vlut;
VEC vlut vlut_load(const float *t) { return (vlut){_mm256_loadu_ps(t), _mm256_loadu_ps(t + 8)}; }
VEC vlut vlut_scale(vlut t, float by)
{
    return (vlut){_mm256_mul_ps(t.lo, _mm256_set1_ps(by)), _mm256_mul_ps(t.hi, _mm256_set1_ps(by))};
}
VEC __m256 bit3_mask(__m256i index) { return _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); }
VEC __m256 lut8(vlut t, __m256i index)
{
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.lo, index), _mm256_permutevar8x32_ps(t.hi, index), bit3_mask(index));
}
VEC vf vlut_get(vlut t, vi index) { return (vf){lut8(t, index.a), lut8(t, index.b)}; }
/* Bit 3 of the index chooses. */
VEC vf vf_choose_bit3(vi index, vf if_clear, vf if_set)
{
    return (vf){_mm256_blendv_ps(if_clear.a, if_set.a, bit3_mask(index.a)),
                _mm256_blendv_ps(if_clear.b, if_set.b, bit3_mask(index.b))};
}

/* Look-up by the low three bits of the index; both halves of the table are the same. */
VEC vf vlut_get_low3(vlut t, vi index)
{
    return (vf){_mm256_permutevar8x32_ps(t.lo, index.a), _mm256_permutevar8x32_ps(t.lo, index.b)};
}

/* codec_tab.h: the 8 cells. */
typedef struct { __m256 mid; __m256i leaf; } vcells;
VEC vcells vcells_load(int is_tq3)
{
    return (vcells){_mm256_loadu_ps(codec_tq_cell8_mid[is_tq3]),
                    _mm256_loadu_si256((const __m256i *)(const void *)codec_tq_cell8_leaf[is_tq3])};
}
VEC __m256i cells_leaf(__m256 a, vcells cells)
{
    __m256 b = _mm256_fmadd_ps(a, _mm256_set1_ps(1 / 1.15f), _mm256_set1_ps(1.0f));
    __m256i cell = _mm256_srli_epi32(_mm256_castps_si256(_mm256_min_ps(b, _mm256_set1_ps(3.9f))), 21);

    return _mm256_sub_epi32(
        _mm256_permutevar8x32_epi32(cells.leaf, cell),
        _mm256_castps_si256(_mm256_cmp_ps(a, _mm256_permutevar8x32_ps(cells.mid, cell), _CMP_GE_OQ)));
}
VEC vi vcells_leaf(vf a, vcells cells) { return (vi){cells_leaf(a.a, cells), cells_leaf(a.b, cells)}; }
/* leaf ^ flip in the lanes where v < 0. */
VEC vi vi_flip_negative(vi leaf, vf v, int flip)
{
    const __m256i f = _mm256_set1_epi32(flip);
    const __m256 zero = _mm256_setzero_ps();
    __m256i na = _mm256_castps_si256(_mm256_cmp_ps(v.a, zero, _CMP_LT_OQ)), nb = _mm256_castps_si256(_mm256_cmp_ps(v.b, zero, _CMP_LT_OQ));

    return (vi){_mm256_xor_si256(leaf.a, _mm256_and_si256(na, f)), _mm256_xor_si256(leaf.b, _mm256_and_si256(nb, f))};
}
VEC vf vf_abs(vf v)
{
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX));

    return (vf){_mm256_and_ps(v.a, m), _mm256_and_ps(v.b, m)};
}

/* ---- bytes ---- */

VEC __m256i pack32(vi x, vi y)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);

    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(_mm256_packs_epi32(x.a, x.b), _mm256_packs_epi32(y.a, y.b)), order);
}
/* 64 int32 saturated to int8. */
VEC vb vb_pack(const vi c[4]) { return (vb){pack32(c[0], c[1]), pack32(c[2], c[3])}; }
VEC __m256i clamp32(__m256i b, int low, int high)
{
    return _mm256_max_epi8(_mm256_min_epi8(b, _mm256_set1_epi8((char)high)), _mm256_set1_epi8((char)low));
}
VEC vb vb_clamp(vb b, int low, int high) { return (vb){clamp32(b.a, low, high), clamp32(b.b, low, high)}; }
/* Codes 0..15, even ones to the low nibble. */
VEC void vb_store_nibbles(uint8_t *p, vb b)
{
    const __m256i weights = _mm256_set1_epi16(0x1001);
    __m256i packed = _mm256_packus_epi16(_mm256_maddubs_epi16(b.a, weights), _mm256_maddubs_epi16(b.b, weights));

    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
VEC void vb_store(uint8_t *p, vb b)
{
    _mm256_storeu_si256((__m256i *)p, b.a);
    _mm256_storeu_si256((__m256i *)p + 1, b.b);
}
VEC __m256i e2m1_32(__m256i quarters, __m256i table)
{
    const __m256i zero = _mm256_setzero_si256();
    __m256i n = _mm256_sub_epi8(clamp32(quarters, -24, 24), _mm256_set1_epi8(1)), below = _mm256_cmpgt_epi8(zero, n);
    __m256i j = _mm256_xor_si256(n, below), mag = _mm256_shuffle_epi8(table, _mm256_min_epi8(j, _mm256_set1_epi8(15)));

    mag = _mm256_sub_epi8(mag, _mm256_cmpgt_epi8(j, _mm256_set1_epi8(19)));
    below = _mm256_andnot_si256(_mm256_cmpeq_epi8(mag, zero), below);
    return _mm256_or_si256(mag, _mm256_and_si256(below, _mm256_set1_epi8(8)));
}
/* codec_scalar.c: e2m1_code() after rounding up to quarters. */
VEC vb vb_e2m1(vb quarters, const uint8_t mag_table[16])
{
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)mag_table));

    return (vb){e2m1_32(quarters.a, table), e2m1_32(quarters.b, table)};
}

/* ---- 8-bit formats ---- */

/* Low byte of each lane to 16 bytes. */
VEC void vi_store_low_bytes(uint8_t *p, vi v)
{
    const __m256i m = _mm256_set1_epi32(255);
    __m256i w = _mm256_packus_epi32(_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m));

    w = _mm256_permute4x64_epi64(w, 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
VEC vf vf_load_int8(const uint8_t *p)
{
    return (vf){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
}
VEC __m256i e4m3_8(__m256 v)
{
    const __m256 magic = _mm256_set1_ps(16384.0f);
    __m256i u = _mm256_castps_si256(v), sign = _mm256_and_si256(_mm256_srli_epi32(u, 24), _mm256_set1_epi32(0x80));
    __m256 a = _mm256_min_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v), _mm256_set1_ps(448.0f));
    __m256i ua = _mm256_castps_si256(a), lsb = _mm256_and_si256(_mm256_srli_epi32(ua, 20), _mm256_set1_epi32(1));
    __m256i code = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(ua, lsb), _mm256_set1_epi32(0x7ffff)), 20);
    __m256i small = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(a, magic)), _mm256_castps_si256(magic));
    __m256 is_small = _mm256_cmp_ps(a, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ);

    code = _mm256_sub_epi32(code, _mm256_set1_epi32(120 << 3));
    code = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(code), _mm256_castsi256_ps(small), is_small));
    return _mm256_or_si256(code, sign);
}
VEC vi vf_to_e4m3(vf v) { return (vi){e4m3_8(v.a), e4m3_8(v.b)}; }
VEC __m256 e4m3_widen(__m128i c)
{
    const __m128i full = _mm_set1_epi16(0x7f);
    __m128i m = _mm_and_si128(c, full), h = _mm_or_si128(_mm_slli_epi16(_mm_xor_si128(c, m), 8), _mm_slli_epi16(m, 7));
    __m256 v = _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256.0f));
    __m256 nan = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm_cmpeq_epi16(m, full)));

    return _mm256_blendv_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
}
VEC vf vf_load_e4m3(const uint8_t *p)
{
    __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));

    return (vf){e4m3_widen(_mm256_castsi256_si128(c)), e4m3_widen(_mm256_extracti128_si256(c, 1))};
}

#endif
