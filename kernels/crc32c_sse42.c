/* The crc32 instruction takes 8 bytes a cycle but answers after three: three independent runs of the data keep it busy. Their
 * CRCs are joined by a carry-less multiplication with x^(8 n - 33) mod P, n being the bytes that follow, and one more crc32
 * instruction, which multiplies by x^32 and reduces (the product of two reflected words brings the missing x).
 * Compiled with -msse4.2 -mpclmul. */
#include "kernels/crc32c.h"

#include <nmmintrin.h>
#include <string.h>
#include <wmmintrin.h>

#define LONG_BYTES 1024u
#define LONG_X1 0x170076fau /* x^(8 * 1024 - 33) */
#define LONG_X2 0xa51b6135u /* x^(16 * 1024 - 33) */
#define SHORT_BYTES 128u
#define SHORT_X1 0x0d3b6092u /* x^(8 * 128 - 33) */
#define SHORT_X2 0xb9e02b86u /* x^(16 * 128 - 33) */

static inline uint64_t load8(const uint8_t *p)
{
    uint64_t u;

    memcpy(&u, p, 8);
    return u;
}

static inline uint64_t shift(uint64_t crc, uint32_t by)
{
    return (uint64_t)_mm_cvtsi128_si64(
        _mm_clmulepi64_si128(_mm_cvtsi64_si128((int64_t)crc), _mm_cvtsi32_si128((int32_t)by), 0));
}

static inline uint64_t three_runs(uint64_t crc, const uint8_t *p, uint32_t run_bytes, uint32_t x1, uint32_t x2)
{
    uint64_t second = 0, third = 0;

    for (uint32_t i = 0; i < run_bytes; i += 8) {
        crc = _mm_crc32_u64(crc, load8(p + i));
        second = _mm_crc32_u64(second, load8(p + run_bytes + i));
        third = _mm_crc32_u64(third, load8(p + 2 * run_bytes + i));
    }
    return _mm_crc32_u64(0, shift(crc, x2) ^ shift(second, x1)) ^ third;
}

uint32_t crc32c_sse42(uint32_t crc, const void *data, size_t n)
{
    const uint8_t *p = data;
    uint64_t c = ~crc;

    for (; n >= 3 * LONG_BYTES; p += 3 * LONG_BYTES, n -= 3 * LONG_BYTES)
        c = three_runs(c, p, LONG_BYTES, LONG_X1, LONG_X2);
    for (; n >= 3 * SHORT_BYTES; p += 3 * SHORT_BYTES, n -= 3 * SHORT_BYTES)
        c = three_runs(c, p, SHORT_BYTES, SHORT_X1, SHORT_X2);
    for (; n >= 8; p += 8, n -= 8)
        c = _mm_crc32_u64(c, load8(p));
    for (; n; p++, n--)
        c = _mm_crc32_u8((uint32_t)c, *p);
    return ~(uint32_t)c;
}
