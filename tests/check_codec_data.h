/* What the codec suites and the generator of the golden files share: random numbers, input blocks, the cases. */
#ifndef KVD_TESTS_CHECK_CODEC_DATA_H
#define KVD_TESTS_CHECK_CODEC_DATA_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/codec/codec.h"
#include "kernels/codec/codec_num.h"
#include "kernels/crc32c.h"

/* Head sizes of the models that we know of. */
static const uint32_t data_dims[] = {64, 80, 96, 128, 192, 256, 512, 576};
#define DATA_N_DIMS (sizeof(data_dims) / sizeof(data_dims[0]))
static const enum codec_dtype data_dtypes[] = {CODEC_F16, CODEC_BF16, CODEC_F32};

/* splitmix64 */
static inline uint64_t data_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static inline double data_uniform(uint64_t *state)
{
    return ((double)(data_random(state) >> 11) + 0.5) * 0x1p-53;
}

/* Unit Gaussian, by Box and Muller. */
static inline double data_gauss(uint64_t *state)
{
    double radius = sqrt(-2 * log(data_uniform(state)));

    return radius * cos(2 * M_PI * data_uniform(state));
}

/* Student's t with four degrees of freedom, scaled to unit variance. */
static inline double data_t4(uint64_t *state)
{
    double chi2 = -2 * log(data_uniform(state) * data_uniform(state));

    return data_gauss(state) / sqrt(chi2 / 4) / sqrt(2.0);
}

/* Bell-shaped without libm, so that every machine makes the same: the sum of eight bytes, a multiple of 2^-8 within +-4. */
static inline float data_bell(uint64_t *state)
{
    uint64_t u = data_random(state);
    int sum = -1020;

    for (int b = 0; b < 8; b++)
        sum += (int)(u >> 8 * b & 255);
    return (float)sum / 256.0f;
}

static inline void data_put(enum codec_dtype dtype, void *p, size_t i, float x)
{
    uint8_t *at = p;

    if (dtype == CODEC_F32)
        memcpy(at + 4 * i, &x, 4);
    else
        store_u16(at + 2 * i, dtype == CODEC_F16 ? f32_to_f16(x) : f32_to_bf16(x));
}

static inline float data_get(enum codec_dtype dtype, const void *p, size_t i)
{
    const uint8_t *at = p;
    float x;

    if (dtype == CODEC_F16)
        return f16_to_f32(load_u16(at + 2 * i));
    if (dtype == CODEC_BF16)
        return bf16_to_f32(load_u16(at + 2 * i));
    memcpy(&x, at + 4 * i, 4);
    return x;
}

/* The block that golden files code: channels of different sizes, one far from zero, one constant, a token of zeros, a token
 * that is large. Every value is exact in fp16 and nearly every in bf16. */
static inline float data_golden_value(uint64_t *state, uint32_t t, uint32_t i)
{
    float x = data_bell(state);

    if (i % 16 == 5)
        x = x * 8 + 16;
    if (i % 32 == 9)
        x = 0.75f;
    if (i % 8 == 3)
        x /= 16;
    if (t % 7 == 4)
        x = 0;
    if (t % 11 == 6)
        x *= 64;
    return x;
}

static inline void data_golden_block(enum codec_dtype dtype, uint32_t n_tokens, uint32_t dim, void *p)
{
    uint64_t state = 1000 * dim + n_tokens;

    for (uint32_t t = 0; t < n_tokens; t++)
        for (uint32_t i = 0; i < dim; i++)
            data_put(dtype, p, (size_t)t * dim + i, data_golden_value(&state, t, i));
}

/* The golden cases, in order: every example specification, head size, and two token counts. Returns 0 past the last and skips
 * what codec_check() refuses. */
struct data_case {
    size_t spec_at, dim_at, tokens_at;
    struct codec_spec spec;
    char text[CODEC_TEXT_MAX];
    uint32_t dim, n_tokens;
};

static inline int data_case_next(struct data_case *c)
{
    static const uint32_t tokens[] = {5, 64};

    for (;; c->tokens_at++) {
        const char *text;

        if (c->tokens_at == 2) {
            c->tokens_at = 0;
            c->dim_at++;
        }
        if (c->dim_at == DATA_N_DIMS) {
            c->dim_at = 0;
            c->spec_at++;
        }
        text = codec_spec_example(c->spec_at);
        if (!text)
            return 0;
        c->dim = data_dims[c->dim_at];
        c->n_tokens = tokens[c->tokens_at];
        if (codec_spec_parse(text, CODEC_K, &c->spec, NULL) < 0)
            abort();
        codec_spec_format(&c->spec, c->text);
        if (codec_check(&c->spec, NULL, CODEC_K, c->n_tokens, c->dim, NULL) < 0)
            continue;
        c->tokens_at++;
        return 1;
    }
}

/* Some of them have a file, "tq4-80x5.bin" and the like: side data, then codes. All have a line in LIST. */
static inline int data_case_has_file(const struct data_case *c)
{
    return c->n_tokens == 5 && c->dim <= 128;
}

static inline void data_case_file(const struct data_case *c, char *buf, size_t n)
{
    size_t used = (size_t)snprintf(buf, n, "%s", c->text);

    for (char *p = buf; *p; p++)
        if (*p == ':' || *p == ',' || *p == '=')
            *p = '-';
    snprintf(buf + used, n - used, "-%ux%u.bin", c->dim, c->n_tokens);
}

/* What a case must give: its bytes (to be freed) and the line of LIST. */
static inline uint8_t *data_case_run(const struct data_case *c, const struct codec_ops *ops, size_t *ret_bytes, char line[160])
{
    size_t side_bytes = codec_side_bytes(&c->spec, c->n_tokens, c->dim), code_bytes = codec_code_bytes(&c->spec, c->n_tokens, c->dim);
    size_t n = (size_t)c->n_tokens * c->dim;
    uint8_t *packed = malloc(side_bytes + code_bytes + 1), *out = malloc(4 * n), *src = malloc(2 * n);
    uint32_t crc[3];

    if (!packed || !out || !src)
        abort();
    data_golden_block(CODEC_F16, c->n_tokens, c->dim, src);
    if (codec_encode(ops, &c->spec, NULL, CODEC_F16, src, 2 * c->dim, c->n_tokens, c->dim, packed, packed + side_bytes) < 0)
        abort();
    crc[0] = crc32c_table(0, packed, side_bytes + code_bytes);
    for (int d = 0; d < 2; d++) {
        enum codec_dtype dtype = d ? CODEC_F32 : CODEC_F16;
        size_t stride = c->dim * codec_dtype_bytes(dtype);

        if (codec_decode(ops, &c->spec, NULL, packed, packed + side_bytes, c->n_tokens, c->dim, 0, c->n_tokens, dtype, out, stride) < 0)
            abort();
        crc[1 + d] = crc32c_table(0, out, c->n_tokens * stride);
    }
    snprintf(line, 160, "%s dim=%u tokens=%u bytes=%zu crc=%08x f16=%08x f32=%08x", c->text, c->dim, c->n_tokens,
             side_bytes + code_bytes, crc[0], crc[1], crc[2]);
    free(src);
    free(out);
    *ret_bytes = side_bytes + code_bytes;
    return packed;
}

/* Variants that this machine has; the scalar one first. */
static inline size_t data_variants(const struct codec_ops *ret_ops[3])
{
    struct cpu_features cpu;
    size_t n = 0;

    cpu_detect(&cpu);
    ret_ops[n++] = &codec_ops_scalar;
    if (cpu.avx2)
        ret_ops[n++] = &codec_ops_avx2;
    if (cpu.avx512)
        ret_ops[n++] = &codec_ops_avx512;
    return n;
}

/* KVD_TEST_SEED, or the given one; printed, so that a failure can be run again. */
static inline uint64_t data_seed(uint64_t otherwise)
{
    const char *text = getenv("KVD_TEST_SEED");
    uint64_t seed = text ? strtoull(text, NULL, 0) : otherwise;

    printf("seed: KVD_TEST_SEED=%llu\n", (unsigned long long)seed);
    return seed;
}

#endif
