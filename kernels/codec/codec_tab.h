/* Constants of the codecs that all variants share. The numbers are the format: docs/codecs.md prints them.
 * Private to kernels/. */
#ifndef KVD_KERNELS_CODEC_TAB_H
#define KVD_KERNELS_CODEC_TAB_H

#include <stdint.h>

/* Lloyd-Max levels of the unit Gaussian, by magnitude; the midpoints between them; the squares of the levels in fp32. */
extern const float codec_tq4_level[8], codec_tq4_mid[7], codec_tq4_square[8];
extern const float codec_tq3_level[4], codec_tq3_mid[3], codec_tq3_square[4];

/* The same for variants with vector tables, tq4 first, tq3 second: the level of a code (tq3's table twice); the midpoints as a tree
 * with its root at 1, so that a descent ends at a leaf 2^bits / 2 + magnitude, which is also the code if the value is not
 * negative; and the squares by leaf. */
extern const float codec_tq_value[2][16], codec_tq_tree[2][8], codec_tq_leaf_square[2][16];

/* Bit i % 64 of word i / 64: channel i changes its sign before tq4 and tq3 rotate. */
extern const uint64_t codec_sign[16];

/* 1 / sqrt(n) in fp32 for n = 2^i. */
extern const float codec_rsqrt[11];

/* kc4's two grids: code c decodes to (kc4_from_high[c] ? high : low) + step * kc4_steps[c]. Both ends are attained exactly,
 * and as steps have 20 significant bits and multipliers at most 4, the product is exact: with or without a fused multiply-add
 * the result is the same. Indexed by enum codec_grid. */
extern const float codec_kc4_steps[2][16];
extern const uint16_t codec_kc4_from_high[2]; /* bit c */
extern const float codec_kc4_span[2];         /* (high - low) / step */

/* E2M1 values by code, and the magnitude code of j = 0..15 quarter-units (codec_scalar.c: e2m1_code). */
extern const float codec_e2m1[16];
extern const uint8_t codec_e2m1_mag[16];

#endif
