#include "kernels/crc32c.h"

#define POLY 0x82f63b78u

/* Polynomials over GF(2) modulo POLY, reflected: bit 31 is x^0. */
static uint32_t poly_multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;

    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
        if (a & bit)
            product ^= b;
        b = b & 1 ? b >> 1 ^ POLY : b >> 1;
    }
    return product;
}

uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t n_b)
{
    uint32_t square = 0x00800000u; /* x^8: one byte */

    for (; n_b; n_b >>= 1, square = poly_multiply(square, square))
        if (n_b & 1)
            crc_a = poly_multiply(square, crc_a);
    return crc_a ^ crc_b;
}

/* One nibble at a time: for machines without SSE 4.2, where nobody looks at the clock. */
uint32_t crc32c_table(uint32_t crc, const void *data, size_t n)
{
    static const uint32_t table[16] = {
        0x00000000u, 0x105ec76fu, 0x20bd8edeu, 0x30e349b1u, 0x417b1dbcu, 0x5125dad3u, 0x61c69362u, 0x7198540du,
        0x82f63b78u, 0x92a8fc17u, 0xa24bb5a6u, 0xb21572c9u, 0xc38d26c4u, 0xd3d3e1abu, 0xe330a81au, 0xf36e6f75u,
    };
    const uint8_t *p = data;

    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return ~crc;
}

crc32c_fn crc32c_choose(const struct cpu_features *cpu)
{
    return cpu && cpu->sse42 && cpu->pclmul ? crc32c_sse42 : crc32c_table;
}
