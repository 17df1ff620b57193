/* Codecs, one core: GB/s of fp16 that goes in (encode) or comes out (decode), for each codec, head size and variant, next to
 * memcpy of the same fp16 bytes in the same run. The memory is far larger than the caches next to the core. Last CRC32C, next to
 * reading the same bytes.
 *
 * Usage: bench_codec [TEXT]: only the cases that contain TEXT. */
#include "bench/bench.h"
#include "kernels/codec/codec_num.h"
#include "kernels/codec/tile.h"
#include "kernels/crc32c.h"

#define TOKENS 64u
#define SET_BYTES (UINT64_C(48) << 20) /* of fp16 */
#define N_SLICES 8u                    /* a sample is one of them: short enough to be seldom interrupted on a shared machine */
#define SLICE_BYTES (SET_BYTES / N_SLICES)
#define SCALAR_BYTES (UINT64_C(256) << 10)
#define SAMPLES (3 * N_SLICES)
#define LIMIT_ENCODE "memcpy of the same fp16 bytes in this run: encode of the default at least 0.2 or 4 GB/s"
#define LIMIT_DECODE "memcpy of the same fp16 bytes in this run: decode of the default at least 0.4 or 8 GB/s"

struct bench {
    uint8_t *src, *dst; /* SET_BYTES each */
    uint8_t *packed;    /* as long */
    const char *only;
};

/* Nearly Gaussian fp16: the sum of eight uniform bytes. */
static void fill(uint8_t *p, size_t n)
{
    uint64_t state = 1;

    for (size_t i = 0; i < n; i++) {
        uint64_t u = bench_random(&state);
        int sum = 0;

        for (int b = 0; b < 8; b++)
            sum += (int)(u >> 8 * b & 255);
        store_u16(p + 2 * i, f32_to_f16((float)(sum - 1020) / 209.0f));
    }
}

/* What is run over a slice: tiles with K alone, or with V too. */
struct work {
    const struct codec_ops *ops;
    struct tile_layout layout;
    size_t fp16_bytes; /* a tile */
    size_t n_tiles;    /* a slice */
};

static void run_encode(const struct work *w, const uint8_t *src, uint8_t *packed, uint8_t *dst)
{
    (void)dst;
    for (size_t i = 0; i < w->n_tiles; i++) {
        const uint8_t *k = src + i * w->fp16_bytes, *v = k + TOKENS * 2 * w->layout.dim_k;
        int r = tile_encode(w->ops, &w->layout, NULL, NULL, CODEC_F16, k, 2 * w->layout.dim_k, v, 2 * w->layout.dim_v,
                            packed + i * w->layout.bytes, NULL);

        if (r < 0) {
            fprintf(stderr, "bench_codec: encode: %s\n", strerror(-r));
            exit(1);
        }
    }
}

static void run_decode(const struct work *w, const uint8_t *src, uint8_t *packed, uint8_t *dst)
{
    (void)src;
    for (size_t i = 0; i < w->n_tiles; i++) {
        uint8_t *k = dst + i * w->fp16_bytes, *v = k + TOKENS * 2 * w->layout.dim_k;
        int r = tile_decode(w->ops, &w->layout, NULL, NULL, packed + i * w->layout.bytes, 0, TOKENS, CODEC_F16, k,
                            2 * w->layout.dim_k, v, 2 * w->layout.dim_v);

        if (r < 0) {
            fprintf(stderr, "bench_codec: decode: %s\n", strerror(-r));
            exit(1);
        }
    }
}

/* Each sample is preceded by its limit, so that both see the same machine. */
static void rate(struct bench *b, const struct work *w, void (*run)(const struct work *, const uint8_t *, uint8_t *, uint8_t *),
                 double *ret_gbs, double *ret_memcpy_gbs)
{
    double sample[SAMPLES], copy[SAMPLES];
    size_t n = w->ops == &codec_ops_scalar ? 5 : SAMPLES;

    for (size_t i = 0; i < n; i++) {
        size_t off = i % N_SLICES * SLICE_BYTES;
        uint64_t begun = bench_nsec(), copied;

        memcpy(b->dst + off, b->src + off, SLICE_BYTES);
        bench_use(b->dst[off]);
        copied = bench_nsec();
        copy[i] = (double)SLICE_BYTES / (double)(copied - begun);
        off = (i + N_SLICES / 2) % N_SLICES * SLICE_BYTES; /* not what was just copied */
        copied = bench_nsec();
        run(w, b->src + off, b->packed + off, b->dst + off);
        sample[i] = (double)(w->n_tiles * w->fp16_bytes) / (double)(bench_nsec() - copied);
    }
    *ret_gbs = bench_median(sample, n);
    *ret_memcpy_gbs = bench_median(copy, n);
}

static void bench_case(struct bench *b, const struct codec_ops *ops, const char *k, const char *v, uint32_t dim)
{
    struct work w = {.ops = ops};
    struct codec_spec spec_k, spec_v;
    double gbs, memcpy_gbs;
    char name[128];

    if (codec_spec_parse(k, CODEC_K, &spec_k, NULL) < 0 || (v && codec_spec_parse(v, CODEC_V, &spec_v, NULL) < 0) ||
        tile_layout_init(&w.layout, &spec_k, &spec_v, TOKENS, dim, v ? dim : 0, NULL) < 0)
        exit(1);
    w.fp16_bytes = (size_t)TOKENS * 2 * (w.layout.dim_k + w.layout.dim_v);
    w.n_tiles = (ops == &codec_ops_scalar ? SCALAR_BYTES : SLICE_BYTES) / w.fp16_bytes;
    if (w.n_tiles * w.layout.bytes > SLICE_BYTES)
        w.n_tiles = SLICE_BYTES / w.layout.bytes;
    snprintf(name, sizeof(name), "%s%s%s D=%u %s encode", k, v ? "/" : "", v ? v : "", dim, ops->name);
    if (b->only && !strstr(name, b->only))
        return;
    rate(b, &w, run_encode, &gbs, &memcpy_gbs);
    bench_line("codec", name, gbs, "GB/s", memcpy_gbs, LIMIT_ENCODE);
    for (size_t i = 0; i < N_SLICES; i++)
        run_encode(&w, b->src + i * SLICE_BYTES, b->packed + i * SLICE_BYTES, NULL);
    snprintf(name, sizeof(name), "%s%s%s D=%u %s decode", k, v ? "/" : "", v ? v : "", dim, ops->name);
    rate(b, &w, run_decode, &gbs, &memcpy_gbs);
    bench_line("codec", name, gbs, "GB/s", memcpy_gbs, LIMIT_DECODE);
}

static void bench_crc(struct bench *b, const struct cpu_features *cpu)
{
    const uint64_t *words = (const uint64_t *)(const void *)b->src;
    crc32c_fn crc = crc32c_choose(cpu);
    double sample[SAMPLES], read[SAMPLES];

    if (b->only && !strstr("crc32c", b->only))
        return;
    for (size_t i = 0; i < SAMPLES; i++) {
        size_t off = i % N_SLICES * (SLICE_BYTES / 8);
        uint64_t begun = bench_nsec(), sum[4] = {0};

        bench_use(crc(0, words + off, SLICE_BYTES));
        sample[i] = (double)SLICE_BYTES / (double)(bench_nsec() - begun);
        off = (i + N_SLICES / 2) % N_SLICES * (SLICE_BYTES / 8);
        begun = bench_nsec();
        for (size_t j = 0; j < SLICE_BYTES / 8; j += 4)
            for (size_t l = 0; l < 4; l++)
                sum[l] += words[off + j + l];
        bench_use(sum[0] + sum[1] + sum[2] + sum[3]);
        read[i] = (double)SLICE_BYTES / (double)(bench_nsec() - begun);
    }
    bench_line("codec", "crc32c", bench_median(sample, SAMPLES), "GB/s", bench_median(read, SAMPLES),
               "reading the same bytes in this run: at least 10 GB/s or near 1");
}

int main(int argc, char **argv)
{
    static const char *const codecs[] = {"raw", "fp8", "int8", "kc4", "kc4:grid=e2m1", "tq4", "tq3", "uq4", "uq4:rotate=off"};
    static const uint32_t dims[] = {64, 128, 256};
    struct bench b = {.src = bench_alloc(SET_BYTES), .dst = bench_alloc(SET_BYTES), .packed = bench_alloc(SET_BYTES)};
    const struct codec_ops *variants[3] = {&codec_ops_scalar};
    struct cpu_features cpu;
    size_t n_variants = 1;

    cpu_detect(&cpu);
    if (cpu.avx2)
        variants[n_variants++] = &codec_ops_avx2;
    if (cpu.avx512)
        variants[n_variants++] = &codec_ops_avx512;
    b.only = argc > 1 ? argv[1] : NULL;
    fill(b.src, SET_BYTES / 2);
    memset(b.dst, 0, SET_BYTES);
    memset(b.packed, 0, SET_BYTES);
    for (size_t v = n_variants; v-- > 0;)
        for (size_t d = 0; d < 3; d++) {
            bench_case(&b, variants[v], "kc4", "tq4", dims[d]);
            for (size_t c = 0; c < sizeof(codecs) / sizeof(codecs[0]); c++)
                bench_case(&b, variants[v], codecs[c], NULL, dims[d]);
        }
    bench_crc(&b, &cpu);
    free(b.packed);
    free(b.dst);
    free(b.src);
    return 0;
}
