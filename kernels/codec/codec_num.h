/* Scalar conversions between fp32 and the small formats, in integers, as the hardware does them. Private to kernels/. */
#ifndef KVD_KERNELS_CODEC_NUM_H
#define KVD_KERNELS_CODEC_NUM_H

#include <stdint.h>
#include <string.h>

#define F16_MAX 65504.0f
#define F16_MAX_BITS 0x477fe000u /* of 65504.0f */
#define F32_INF_BITS 0x7f800000u
/* 2^112 and beyond (after rotation, if any) is refused by uq4: rounding up to a level, or rotating back (up to 1024 terms of 1.5 times
 * that), could leave fp32. */
#define UQ4_LIMIT_BITS 0x77800000u

static inline uint32_t f32_bits(float x)
{
    uint32_t u;

    memcpy(&u, &x, 4);
    return u;
}

static inline float f32_from_bits(uint32_t u)
{
    float x;

    memcpy(&x, &u, 4);
    return x;
}

static inline uint32_t f32_abs_bits(float x)
{
    return f32_bits(x) & 0x7fffffffu;
}

/* Source memory may change under us: whatever is loaded is loaded once and then lives in a register of ours. */
static inline uint16_t load_u16(const void *p)
{
    uint16_t h;
    uint32_t u;

    memcpy(&h, p, 2);
    u = h;
    __asm__("" : "+r"(u));
    return (uint16_t)u;
}

static inline uint32_t load_u32(const void *p)
{
    uint32_t u;

    memcpy(&u, p, 4);
    __asm__("" : "+r"(u));
    return u;
}

static inline void store_u16(void *p, uint16_t h)
{
    memcpy(p, &h, 2);
}

static inline float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 0x1f, m = h & 0x3ff;

    if (e == 0)
        return f32_from_bits(f32_bits((float)m * 0x1p-24f) | sign);
    if (e == 31)
        return f32_from_bits(sign | F32_INF_BITS | (m ? 0x400000u : 0) | m << 13);
    return f32_from_bits(sign | (e + 112) << 23 | m << 13);
}

/* Magnitude of x in fp16 rounded toward zero; *ret_rest is what was cut off: 0 nothing, 1 less than half, 2 half, 3 more.
 * x is finite and below 2^16. */
static inline uint32_t f16_trunc(float x, uint32_t *ret_rest)
{
    uint32_t a = f32_abs_bits(x), shift, m, cut, half;

    if (a >= 0x38800000u) {
        m = a - 0x38000000u;
        shift = 13;
    } else {
        m = (a & 0x7fffffu) | (a >> 23 ? 0x800000u : 0);
        shift = 126 - (a >> 23 ? a >> 23 : 1);
        if (shift > 25) {
            *ret_rest = a ? 1 : 0;
            return 0;
        }
    }
    cut = m & ((1u << shift) - 1);
    half = 1u << (shift - 1);
    *ret_rest = cut == 0 ? 0 : cut < half ? 1 : cut == half ? 2 : 3;
    return m >> shift;
}

/* Round to nearest even; beyond the range infinity. */
static inline uint16_t f32_to_f16(float x)
{
    uint32_t sign = (f32_bits(x) >> 16) & 0x8000u, a = f32_abs_bits(x), h, rest;

    if (a > F32_INF_BITS)
        return (uint16_t)(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
    if (a >= 0x47800000u)
        return (uint16_t)(sign | 0x7c00u);
    h = f16_trunc(x, &rest);
    if (rest == 3 || (rest == 2 && (h & 1)))
        h++;
    return (uint16_t)(sign | h);
}

/* Toward minus and plus infinity; |x| <= 65504. Zero comes out as +0. */
static inline uint16_t f32_to_f16_down(float x)
{
    uint32_t rest, h = f16_trunc(x, &rest);

    if (x < 0)
        return (uint16_t)(0x8000u | (rest ? h + 1 : h));
    return (uint16_t)h;
}

static inline uint16_t f32_to_f16_up(float x)
{
    uint32_t rest, h = f16_trunc(x, &rest);

    if (x < 0)
        return (uint16_t)(h ? 0x8000u | h : 0);
    return (uint16_t)(rest ? h + 1 : h);
}

static inline float bf16_to_f32(uint16_t h)
{
    return f32_from_bits((uint32_t)h << 16);
}

static inline uint16_t f32_to_bf16(float x)
{
    uint32_t u = f32_bits(x);

    if ((u & 0x7fffffffu) > F32_INF_BITS)
        return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

/* The value of a UE8M0 byte as the store reads it: 0 is zero (an all-zero group), 255 is NaN. */
static inline float ue8m0_value(uint8_t byte)
{
    if (byte == 255)
        return f32_from_bits(0x7fc00000u);
    return f32_from_bits((uint32_t)byte << 23);
}

/* The scale byte of a group whose largest magnitude has these bits (finite): the exponent of `even`, 2^floor(log2(amax / 3.5)),
 * or of UltraQuant, 2^floor(log2(0.156 amax) + 1/2), with the product in fp32 and the logarithm exact: 0x3504f4 is the
 * mantissa of the first float above sqrt(2). Bytes 1 to 253; 0 for an all-zero group. */
static inline uint8_t ue8m0_byte(uint32_t amax_bits, int even)
{
    int32_t e;

    if (!amax_bits)
        return 0;
    if (even)
        e = (int32_t)((amax_bits + 0x200000u) >> 23) - 2;
    else
        e = (int32_t)((f32_bits(0.156f * f32_from_bits(amax_bits)) + (0x800000u - 0x3504f4u)) >> 23);
    return (uint8_t)(e < 1 ? 1 : e);
}

/* 1 / scale for bytes 1 to 253. */
static inline float ue8m0_inverse(uint8_t byte)
{
    return f32_from_bits((254u - byte) << 23);
}

#endif
