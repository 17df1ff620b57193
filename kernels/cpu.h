/* What this processor and this kernel let us use. Detect once at start, pass the struct along; tests pass a weaker one.
 * A feature is set only if CPUID has it and the operating system saves its registers (XGETBV). */
#ifndef KVD_KERNELS_CPU_H
#define KVD_KERNELS_CPU_H

#include <stdbool.h>

struct cpu_features {
    bool sse42, pclmul;   /* crc32 instructions, carry-less multiply */
    bool sha;
    bool avx2;            /* AVX2 with FMA, F16C, BMI1 and BMI2: the level that avx2 variants are compiled for */
    bool avx_vnni;
    bool avx512;          /* F, BW, VL, DQ on top of avx2: the level that avx512 variants are compiled for */
    bool avx512_vbmi, avx512_vnni, avx512_bf16;
    bool vpclmul;         /* 256- and 512-bit carry-less multiply */
};

void cpu_detect(struct cpu_features *ret_cpu);

/* Takes away what is above level: "scalar" (nothing is left), "avx2", "avx512" or "native" (all stays). A level that the machine
 * lacks leaves what it has. Errors: -EINVAL (another word). */
int cpu_limit(struct cpu_features *cpu, const char *level);

#endif
