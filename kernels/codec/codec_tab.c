#include "kernels/codec/codec_tab.h"

#define L0 0.128395f
#define L1 0.388048f
#define L2 0.656759f
#define L3 0.942340f
#define L4 1.256231f
#define L5 1.618046f
#define L6 2.069017f
#define L7 2.732590f
#define MID(a, b) (((a) + (b)) * 0.5f)

const float codec_tq4_level[8] = {L0, L1, L2, L3, L4, L5, L6, L7};
const float codec_tq4_mid[7] = {MID(L0, L1), MID(L1, L2), MID(L2, L3), MID(L3, L4), MID(L4, L5), MID(L5, L6), MID(L6, L7)};
const float codec_tq4_square[8] = {L0 * L0, L1 * L1, L2 * L2, L3 * L3, L4 * L4, L5 * L5, L6 * L6, L7 * L7};

#define M0 0.2450942f
#define M1 0.7560052f
#define M2 1.3439093f
#define M3 2.1519457f

const float codec_tq3_level[4] = {M0, M1, M2, M3};
const float codec_tq3_mid[3] = {MID(M0, M1), MID(M1, M2), MID(M2, M3)};
const float codec_tq3_square[4] = {M0 * M0, M1 * M1, M2 * M2, M3 * M3};

const float codec_tq_value[2][16] = {
    {-L7, -L6, -L5, -L4, -L3, -L2, -L1, -L0, L0, L1, L2, L3, L4, L5, L6, L7},
    {-M3, -M2, -M1, -M0, M0, M1, M2, M3, -M3, -M2, -M1, -M0, M0, M1, M2, M3},
};
#define SQUARES4 L0 * L0, L1 * L1, L2 * L2, L3 * L3, L4 * L4, L5 * L5, L6 * L6, L7 * L7
#define SQUARES3 0, 0, 0, 0, M0 * M0, M1 * M1, M2 * M2, M3 * M3
const float codec_tq_leaf_square[2][16] = {{SQUARES4, SQUARES4}, {SQUARES3, SQUARES3}};

#define NONE __builtin_inff()
const float codec_tq_cell16_mid[2][16] = {
    {NONE, MID(L0, L1), MID(L1, L2), MID(L2, L3), MID(L3, L4), NONE, MID(L4, L5), MID(L5, L6), NONE, NONE, MID(L6, L7), NONE, NONE,
     NONE, NONE, NONE},
    {NONE, NONE, MID(M0, M1), NONE, MID(M1, M2), NONE, NONE, MID(M2, M3), NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE},
};
const int32_t codec_tq_cell16_leaf[2][16] = {
    {8, 8, 9, 10, 11, 12, 12, 13, 14, 14, 14, 15, 15, 15, 15, 15},
    {4, 4, 4, 5, 5, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7},
};
const float codec_tq_cell8_mid[2][8] = {
    {MID(L4, L5), MID(L5, L6), MID(L6, L7), NONE, MID(L0, L1), MID(L1, L2), MID(L2, L3), MID(L3, L4)},
    {NONE, MID(M2, M3), NONE, NONE, NONE, MID(M0, M1), NONE, MID(M1, M2)},
};
const int32_t codec_tq_cell8_leaf[2][8] = {{12, 13, 14, 15, 8, 9, 10, 11}, {6, 6, 7, 7, 4, 4, 5, 5}};

/* The first 16 outputs of splitmix64 seeded with 0x6b7664. */
#define SIGN_WORDS(X) \
    X(0x5226fe6a619aa8f8ull) X(0x524e3ee3b047b5f7ull) X(0x4d1fa455d6dd9c19ull) X(0x63199c41f17c42dfull) \
    X(0xa4f590c8214fb1c5ull) X(0xcc141a410d478ac1ull) X(0x81beca3657d9087cull) X(0x56490cab1ba90845ull) \
    X(0x4f51944606647e8eull) X(0x8b0ae183301c6ddaull) X(0xb3d8764d67b63d69ull) X(0x6103ed8865828665ull) \
    X(0xb202c6ce42d157bcull) X(0x6f729fecb434e27full) X(0xa4bbc7d18d308d29ull) X(0x95cde24f9d89fa64ull)
#define WORD(w) w,
const uint64_t codec_sign[16] = {SIGN_WORDS(WORD)};

#define BIT(w, i) (uint32_t)((w) >> (i)&1) << 31
#define BITS8(w, i) \
    BIT(w, i), BIT(w, i + 1), BIT(w, i + 2), BIT(w, i + 3), BIT(w, i + 4), BIT(w, i + 5), BIT(w, i + 6), BIT(w, i + 7)
#define MASKS(w) BITS8(w, 0), BITS8(w, 8), BITS8(w, 16), BITS8(w, 24), BITS8(w, 32), BITS8(w, 40), BITS8(w, 48), BITS8(w, 56),
_Alignas(64) const uint32_t codec_sign_mask[1024] = {SIGN_WORDS(MASKS)};

#define RSQRT2 0.70710678118654752440f
const float codec_rsqrt[11] = {1.0f,      RSQRT2,         0.5f,     RSQRT2 / 2,    0.25f,     RSQRT2 / 4,
                               0.125f,    RSQRT2 / 8,     0.0625f,  RSQRT2 / 16,   0.03125f};

const float codec_kc4_steps[2][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, -7, -6, -5, -4, -3, -2, -1, 0},
    {-12, -11, -10, -9, -8, -6, -4, 0, 12, 11, 10, 9, 8, 6, 4, 0},
};
const uint16_t codec_kc4_from_high[2] = {0xff00, 0x00ff};
const float codec_kc4_span[2] = {15, 24};

const float codec_e2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
const uint8_t codec_e2m1_mag[16] = {0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6, 6};
