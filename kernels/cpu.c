#include "kernels/cpu.h"

#include <cpuid.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>

/* XCR0 bits: which register state the operating system saves. */
#define XCR0_AVX 0x06u     /* SSE, upper halves of YMM */
#define XCR0_AVX512 0xe6u  /* the above, mask registers, upper halves of ZMM, ZMM16 to 31 */

static uint32_t xcr0_read(void)
{
    uint32_t lo, hi;

    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return lo;
}

static bool has(uint32_t word, uint32_t bits)
{
    return (word & bits) == bits;
}

void cpu_detect(struct cpu_features *ret_cpu)
{
    struct cpu_features cpu = {0};
    uint32_t a, b, c1, d, b7, c7, d7, a71 = 0, n7, xcr0 = 0;

    if (!__get_cpuid(1, &a, &b, &c1, &d))
        goto out;
    cpu.sse42 = has(c1, bit_SSE4_2);
    cpu.pclmul = has(c1, bit_PCLMUL);
    if (!__get_cpuid_count(7, 0, &n7, &b7, &c7, &d7))
        goto out;
    if (n7 >= 1 && !__get_cpuid_count(7, 1, &a71, &b, &a, &d))
        a71 = 0;
    cpu.sha = has(b7, bit_SHA) && cpu.sse42;
    if (has(c1, bit_OSXSAVE))
        xcr0 = xcr0_read();
    if (!has(xcr0, XCR0_AVX))
        goto out;
    cpu.avx2 = has(c1, bit_AVX | bit_FMA | bit_F16C) && has(b7, bit_AVX2 | bit_BMI | bit_BMI2);
    cpu.avx_vnni = cpu.avx2 && has(a71, 1u << 4);
    cpu.vpclmul = cpu.avx2 && has(c7, bit_VPCLMULQDQ);
    if (!cpu.avx2 || !has(xcr0, XCR0_AVX512))
        goto out;
    cpu.avx512 = has(b7, bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ);
    cpu.avx512_vbmi = cpu.avx512 && has(c7, bit_AVX512VBMI);
    cpu.avx512_vnni = cpu.avx512 && has(c7, bit_AVX512VNNI);
    cpu.avx512_bf16 = cpu.avx512 && has(a71, 1u << 5);
out:
    *ret_cpu = cpu;
}

int cpu_limit(struct cpu_features *cpu, const char *level)
{
    if (!strcmp(level, "native"))
        return 0;
    if (!strcmp(level, "scalar")) {
        *cpu = (struct cpu_features){0};
        return 0;
    }
    if (strcmp(level, "avx2") && strcmp(level, "avx512"))
        return -EINVAL;
    if (!strcmp(level, "avx2"))
        cpu->avx512 = cpu->avx512_vbmi = cpu->avx512_vnni = cpu->avx512_bf16 = false;
    return 0;
}
