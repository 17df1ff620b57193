/* Sixteen lanes with AVX-512 F, BW, VL and DQ: what codec_rows.h is written in. codec_vec_avx2.h has the same names.
 *   vf: 16 floats   vi: 16 int32   vb: 64 bytes, in order */
#ifndef KVD_KERNELS_CODEC_VEC_AVX512_H
#define KVD_KERNELS_CODEC_VEC_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels/codec/codec_tab.h"

#define VEC_WHT_REGS 16 /* vf that a rotation keeps in registers */
#define VEC static inline __attribute__((always_inline))

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vb;

VEC vf vf_set1(float x) { return _mm512_set1_ps(x); }
VEC vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
VEC void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
VEC vf vf_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
VEC vf vf_load_bf16(const void *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
VEC void vf_store_f16(void *p, vf v) /* saturates; NaN stays */
{
    v = _mm512_max_ps(_mm512_set1_ps(-65504.0f), _mm512_min_ps(_mm512_set1_ps(65504.0f), v));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
VEC void vf_store_f16_down(void *p, vf v)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
VEC void vf_store_f16_up(void *p, vf v)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}
VEC __m256i vf_to_bf16(vf v)
{
    vi u = _mm512_castps_si512(v), lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    vi r = _mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));

    r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
VEC void vf_store_bf16(void *p, vf v) { _mm256_storeu_si256((__m256i *)p, vf_to_bf16(v)); }

VEC vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
VEC vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
VEC vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
VEC vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
VEC vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); } /* a < b ? a : b */
VEC vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); } /* a > b ? a : b */
VEC vf vf_madd_exact(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); } /* where a * b needs no rounding */
VEC vf vf_cut4(vf a) /* the last four bits of the mantissa are dropped */
{
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(~15)));
}
VEC vf vf_zero_unless_positive(vf v, vf test)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_GT_OQ), v);
}
/* Changes the sign of the lanes whose mask is the sign bit. */
VEC vf vf_flip(vf v, const uint32_t *mask)
{
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), _mm512_loadu_si512(mask)));
}
/* Lanes added by halves: j with j + 8, then + 4, + 2, + 1. */
VEC float vf_sum16(vf v)
{
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));

    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

/* Walsh-Hadamard of the lanes. The factors are 1 and -1, so the fused operations round as an addition does. */
VEC vf vf_wht16(vf v)
{
    const vf s1 = _mm512_setr_ps(1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
    const vf s2 = _mm512_setr_ps(1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1);
    const vf s4 = _mm512_setr_ps(1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1);
    const vf s8 = _mm512_setr_ps(1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1);

    v = _mm512_fmadd_ps(v, s1, _mm512_permute_ps(v, 0xb1));
    v = _mm512_fmadd_ps(v, s2, _mm512_permute_ps(v, 0x4e));
    v = _mm512_fmadd_ps(v, s4, _mm512_shuffle_f32x4(v, v, 0xb1));
    return _mm512_fmadd_ps(v, s8, _mm512_shuffle_f32x4(v, v, 0x4e));
}

/* ---- 32 halves whose order as int16 is that of the numbers they stand for: fp16 or bf16 with the magnitude of negative ones
 * inverted; the same step goes back ---- */

typedef __m512i vh;
VEC vh vh_order(vh h)
{
    return _mm512_ternarylogic_epi32(h, _mm512_srai_epi16(h, 15), _mm512_set1_epi16(0x7fff), 0x78); /* a ^ (b & c) */
}
VEC vh vh_load(const uint8_t *p) { return vh_order(_mm512_loadu_si512(p)); }
VEC void vh_store(uint16_t *p, vh h) { _mm512_storeu_si512(p, vh_order(h)); }
VEC vh vh_min(vh a, vh b) { return _mm512_min_epi16(a, b); }
VEC vh vh_max(vh a, vh b) { return _mm512_max_epi16(a, b); }

/* ---- integers ---- */

VEC vi vi_zero(void) { return _mm512_setzero_si512(); }
VEC vi vf_abs_bits(vf v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(INT32_MAX)); }
VEC vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
VEC uint32_t vi_max_of(vi a) { return (uint32_t)_mm512_reduce_max_epi32(a); }
VEC vi vf_round(vf v) { return _mm512_cvtps_epi32(v); }
VEC vi vf_ceil(vf v) { return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }

/* The 16 codes of 8 bytes; bits above the fourth of a lane are not zero. */
VEC vi vi_nibbles(const uint8_t *p)
{
    const vi which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const vi by = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);

    return _mm512_srlv_epi32(_mm512_permutexvar_epi32(which, _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)p))), by);
}
/* The 16 codes of three bits of 6 bytes; bits above the third of a lane are not zero. */
VEC vi vi_triples(const uint8_t *p)
{
    const vi which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const vi by = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 0, 3, 6, 9, 12, 15, 18, 21);
    uint32_t first;
    uint16_t last;
    uint64_t u;

    memcpy(&first, p, 4); /* two loads: a copy of six bytes would wait for its own stores */
    memcpy(&last, p + 4, 2);
    u = (first & 0xffffffu) | ((uint64_t)first >> 24 | (uint64_t)last << 8) << 32;
    return _mm512_srlv_epi32(_mm512_permutexvar_epi32(which, _mm512_castsi128_si512(_mm_cvtsi64_si128((int64_t)u))), by);
}

/* Tables of 16 floats, looked up by the low four bits of an index. */
typedef struct { vf t; } vlut;
VEC vlut vlut_load(const float *t) { return (vlut){_mm512_loadu_ps(t)}; }
VEC vlut vlut_scale(vlut t, float by) { return (vlut){_mm512_mul_ps(t.t, _mm512_set1_ps(by))}; }
VEC vf vlut_get(vlut t, vi index) { return _mm512_permutexvar_ps(index, t.t); }
/* Bit 3 of the index chooses. */
VEC vf vf_choose_bit3(vi index, vf if_clear, vf if_set)
{
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(8)), if_clear, if_set);
}

/* Look-up by the low three bits of the index; both halves of the table are the same. */
VEC vf vlut_get_low3(vlut t, vi index) { return vlut_get(t, index); }

/* codec_tab.h: the 16 cells. The sum's last bit is worth 1/4, so its low four bits are the cell. */
typedef struct { vf mid; vi leaf; } vcells;
VEC vcells vcells_load(int is_tq3)
{
    return (vcells){_mm512_loadu_ps(codec_tq_cell16_mid[is_tq3]), _mm512_loadu_si512(codec_tq_cell16_leaf[is_tq3])};
}
VEC vi vcells_leaf(vf a, vcells cells)
{
    vi cell = _mm512_castps_si512(_mm512_add_ps(_mm512_min_ps(a, _mm512_set1_ps(3.75f)), _mm512_set1_ps(0x1p21f)));
    vi leaf = _mm512_permutexvar_epi32(cell, cells.leaf);

    return _mm512_mask_add_epi32(leaf, _mm512_cmp_ps_mask(a, _mm512_permutexvar_ps(cell, cells.mid), _CMP_GE_OQ), leaf,
                                 _mm512_set1_epi32(1));
}
/* leaf ^ flip in the lanes where v < 0. */
VEC vi vi_flip_negative(vi leaf, vf v, int flip)
{
    return _mm512_mask_xor_epi32(leaf, _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ), leaf, _mm512_set1_epi32(flip));
}
VEC vf vf_abs(vf v) { return _mm512_abs_ps(v); }

/* ---- bytes ---- */

/* 64 int32 saturated to int8. */
VEC vb vb_pack(const vi c[4])
{
    const vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);

    return _mm512_permutexvar_epi32(
        order, _mm512_packs_epi16(_mm512_packs_epi32(c[0], c[1]), _mm512_packs_epi32(c[2], c[3])));
}
VEC vb vb_clamp(vb b, int low, int high)
{
    return _mm512_max_epi8(_mm512_min_epi8(b, _mm512_set1_epi8((char)high)), _mm512_set1_epi8((char)low));
}
/* Codes 0..15, even ones to the low nibble. */
VEC void vb_store_nibbles(uint8_t *p, vb b)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(b, _mm512_set1_epi16(0x1001))));
}
VEC void vb_store(uint8_t *p, vb b) { _mm512_storeu_si512(p, b); }
/* codec_scalar.c: e2m1_code() after rounding up to quarters. */
VEC vb vb_e2m1(vb quarters, const uint8_t mag_table[16])
{
    vb n = _mm512_sub_epi8(vb_clamp(quarters, -24, 24), _mm512_set1_epi8(1));
    __mmask64 below = _mm512_movepi8_mask(n);
    vb j = _mm512_xor_si512(n, _mm512_movm_epi8(below)), mag;

    mag = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)mag_table)),
                              _mm512_min_epi8(j, _mm512_set1_epi8(15)));
    mag = _mm512_mask_add_epi8(mag, _mm512_cmpgt_epi8_mask(j, _mm512_set1_epi8(19)), mag, _mm512_set1_epi8(1));
    return _mm512_mask_add_epi8(mag, below & _mm512_test_epi8_mask(mag, mag), mag, _mm512_set1_epi8(8));
}

/* ---- 8-bit formats ---- */

/* Low byte of each lane to 16 bytes. */
VEC void vi_store_low_bytes(uint8_t *p, vi v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(v)); }
VEC vf vf_load_int8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
VEC vi vf_to_e4m3(vf v)
{
    vi u = _mm512_castps_si512(v), sign = _mm512_and_si512(_mm512_srli_epi32(u, 24), _mm512_set1_epi32(0x80));
    vf a = _mm512_min_ps(_mm512_abs_ps(v), _mm512_set1_ps(448.0f));
    vi ua = _mm512_castps_si512(a), lsb = _mm512_and_si512(_mm512_srli_epi32(ua, 20), _mm512_set1_epi32(1));
    vi code = _mm512_sub_epi32(_mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(ua, lsb), _mm512_set1_epi32(0x7ffff)), 20),
                               _mm512_set1_epi32(120 << 3));
    vi small = _mm512_castps_si512(_mm512_add_ps(a, _mm512_set1_ps(16384.0f)));

    code = _mm512_mask_sub_epi32(code, _mm512_cmp_ps_mask(a, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ), small,
                                 _mm512_castps_si512(_mm512_set1_ps(16384.0f)));
    return _mm512_or_si512(code, sign);
}
VEC vf vf_load_e4m3(const uint8_t *p)
{
    __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p)), m = _mm256_and_si256(c, _mm256_set1_epi16(0x7f));
    __m256i h = _mm256_or_si256(_mm256_slli_epi16(_mm256_xor_si256(c, m), 8), _mm256_slli_epi16(m, 7));
    vf v = _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(256.0f));

    return _mm512_mask_mov_ps(v, _mm256_cmpeq_epi16_mask(m, _mm256_set1_epi16(0x7f)),
                              _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}

#endif
