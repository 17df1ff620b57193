/* Constants of the codecs that all variants share. The numbers are the format: docs/codecs.md prints them.
 * Private to kernels/. */
#ifndef KVD_KERNELS_CODEC_TAB_H
#define KVD_KERNELS_CODEC_TAB_H

#include <stdint.h>

/* Lloyd-Max levels of the unit Gaussian, by magnitude; the midpoints between them; the squares of the levels in fp32. */
extern const float codec_tq4_level[8], codec_tq4_mid[7], codec_tq4_square[8];
extern const float codec_tq3_level[4], codec_tq3_mid[3], codec_tq3_square[4];

/* The same for variants with vector tables, tq4 first, tq3 second: the level of a code (tq3's table twice); the squares by leaf,
 * which is 2^bits / 2 + magnitude and thus the code of a value that is not negative (first half: as low three bits). */
extern const float codec_tq_value[2][16], codec_tq_leaf_square[2][16];

/* Cells that hold at most one midpoint each, so that one look-up and one comparison find the magnitude: the midpoint (or infinity)
 * and the leaf below it. Their bounds lie well between the midpoints, so how they are computed shows nowhere.
 * 16 cells of width 1/4 around c / 4; or 8, of a scale whose upper half is twice as wide: with b = 1 + a / 1.15 in [1, 4), three
 * bits of b from the lowest one of the exponent. */
extern const float codec_tq_cell16_mid[2][16], codec_tq_cell8_mid[2][8];
extern const int32_t codec_tq_cell16_leaf[2][16], codec_tq_cell8_leaf[2][8];

/* Bit i % 64 of word i / 64: channel i changes its sign before tq4 and tq3 rotate. */
extern const uint64_t codec_sign[16];
extern const uint32_t codec_sign_mask[1024]; /* the same as the sign bits of floats */

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
