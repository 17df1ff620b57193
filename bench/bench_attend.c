/* Attention over encoded blocks, the kernels alone: microseconds of one layer's attention of one step, next to reading the same packed
 * bytes once, by the same threads, in the same run. Four rows (query heads) a KV head unless said, default codecs unless said, 64
 * tokens a block; a block's KV heads lie side by side as in the store. Least of many runs, which walk layers of COLD_BYTES together, so
 * that what is read comes from memory.
 *
 * Usage: bench_attend [--peer FILE] [TEXT]: only the cases that contain TEXT. FILE has lines of bench/peer_attend.sh: for each of
 * its cases there is one more line, kvd's fastest variant next to it, over one layer again and again, as the peer does it. */
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "bench/bench.h"
#include "kernels/attn/attn.h"
#include "kernels/codec/codec_num.h"

#define TOKENS     64u
#define N_DISTINCT 16u
#define COLD_BYTES ((size_t)256 << 20)
#define CASE_NSEC  UINT64_C(100000000)
#define LEAST_RUNS 3u
#define LIMIT                                                                                                          \
    "one reading of the same packed bytes by the same threads (least): at most 1.5 with VNNI, 2.5 with AVX2, from 8K " \
    "tokens on"

struct shape {
    const char *k, *v;
    uint32_t dim, n_heads, n_tokens, n_rows, n_threads;
    bool warm; /* one layer, again and again */
};

/* What a shape is computed in. */
struct bed {
    struct shape shape;
    const struct attn_ops *ops;
    struct tile_layout layout;
    uint8_t *tiles; /* [layers][blocks][heads] */
    size_t n_layers, n_blocks, layer_bytes;
    struct attn_block *blocks; /* [layers][heads][blocks] */
    size_t layer;              /* in hand */
    float *q, *o, *lse;        /* [threads][heads][rows].. */
    uint32_t *q_pos;
    void *work[2];
    /* the second thread */
    pthread_t thread;
    atomic_uint turn, done;
    void (*job)(struct bed *bed, uint32_t thread);
};

struct bench {
    const char *only, *peer;
    const struct attn_ops *ops[4];
    size_t n_ops;
};

static void fatal(const char *what)
{
    fprintf(stderr, "bench_attend: %s\n", what);
    exit(1);
}

/* ---- beds ---- */

/* Nearly Gaussian. */
static float draw(uint64_t *state)
{
    uint64_t u = bench_random(state);
    int sum = 0;

    for (int b = 0; b < 8; b++)
        sum += (int)(u >> 8 * b & 255);
    return (float)(sum - 1020) / 209.0f;
}

static void fill(struct bed *bed)
{
    struct cpu_features cpu;
    size_t n = (size_t)TOKENS * bed->shape.dim;
    float *k = bench_alloc(4 * n), *v = bench_alloc(4 * n);
    uint64_t state = 1;

    cpu_detect(&cpu);
    for (size_t i = 0; i < bed->n_layers * bed->layer_bytes / bed->layout.bytes; i++) {
        uint8_t *tile = bed->tiles + i * bed->layout.bytes;

        if (i >= N_DISTINCT) {
            memcpy(tile, bed->tiles + i % N_DISTINCT * bed->layout.bytes, bed->layout.bytes);
            continue;
        }
        for (size_t j = 0; j < n; j++) {
            k[j] = draw(&state);
            v[j] = draw(&state);
        }
        if (tile_encode(codec_ops_choose(&cpu), &bed->layout, NULL, NULL, CODEC_F32, k, 4 * bed->shape.dim, v,
                        4 * bed->shape.dim, tile, NULL) < 0)
            fatal("a tile could not be encoded");
    }
    free(k);
    free(v);
}

static void *second_thread(void *arg)
{
    struct bed *bed = arg;

    for (unsigned turn = 1;; turn++) {
        for (unsigned i = 0; atomic_load_explicit(&bed->turn, memory_order_acquire) != turn; i++)
            if (i > 2000)
                sched_yield();
        if (!bed->job)
            return NULL;
        bed->job(bed, 1);
        atomic_store_explicit(&bed->done, turn, memory_order_release);
    }
}

static struct bed *bed_create(const struct shape *shape)
{
    struct bed *bed = bench_alloc(sizeof(*bed));
    struct codec_spec k, v;
    uint64_t state = 2;
    size_t rows = (size_t)shape->n_heads * shape->n_rows;

    memset(bed, 0, sizeof(*bed));
    bed->shape = *shape;
    if (codec_spec_parse(shape->k, CODEC_K, &k, NULL) < 0 || codec_spec_parse(shape->v, CODEC_V, &v, NULL) < 0 ||
        tile_layout_init(&bed->layout, &k, &v, TOKENS, shape->dim, shape->dim, NULL) < 0)
        fatal("no such layout");
    bed->n_blocks = shape->n_tokens / TOKENS;
    bed->layer_bytes = bed->n_blocks * shape->n_heads * bed->layout.bytes;
    bed->n_layers = shape->warm ? 1 : (COLD_BYTES + bed->layer_bytes - 1) / bed->layer_bytes;
    bed->tiles = bench_alloc(bed->n_layers * bed->layer_bytes);
    fill(bed);
    bed->blocks = bench_alloc(bed->n_layers * bed->n_blocks * shape->n_heads * sizeof(*bed->blocks));
    for (size_t i = 0, at = 0; i < bed->n_layers; i++)
        for (size_t h = 0; h < shape->n_heads; h++)
            for (size_t b = 0; b < bed->n_blocks; b++, at++)
                bed->blocks[at] = (struct attn_block){bed->tiles + i * bed->layer_bytes +
                                                          (b * shape->n_heads + h) * bed->layout.bytes,
                                                      &bed->layout, (uint32_t)b * TOKENS, TOKENS};
    bed->q = bench_alloc(4 * rows * shape->dim);
    for (size_t i = 0; i < rows * shape->dim; i++)
        bed->q[i] = draw(&state);
    bed->o = bench_alloc(2 * 4 * rows * shape->dim);
    bed->lse = bench_alloc(2 * 4 * rows);
    bed->q_pos = bench_alloc(4 * rows);
    for (size_t i = 0; i < rows; i++)
        bed->q_pos[i] = shape->n_tokens;
    for (int i = 0; i < 2; i++)
        bed->work[i] = bench_alloc(attn_work_bytes(shape->n_rows, TOKENS, shape->dim, shape->dim));
    if (shape->n_threads == 2 && pthread_create(&bed->thread, NULL, second_thread, bed))
        fatal("no thread");
    return bed;
}

static void bed_run(struct bed *bed, void (*job)(struct bed *bed, uint32_t thread))
{
    unsigned turn;

    bed->job = job;
    if (bed->shape.n_threads == 1) {
        job(bed, 0);
        return;
    }
    turn = atomic_load_explicit(&bed->turn, memory_order_relaxed) + 1;
    atomic_store_explicit(&bed->turn, turn, memory_order_release);
    if (job)
        job(bed, 0);
    for (unsigned i = 0; job && atomic_load_explicit(&bed->done, memory_order_acquire) != turn; i++)
        if (i > 2000)
            sched_yield();
}

static void bed_destroy(struct bed *bed)
{
    if (bed->shape.n_threads == 2) {
        bed_run(bed, NULL);
        pthread_join(bed->thread, NULL);
    }
    free(bed->tiles);
    free(bed->blocks);
    free(bed->q);
    free(bed->o);
    free(bed->lse);
    free(bed->q_pos);
    free(bed->work[0]);
    free(bed->work[1]);
    free(bed);
}

/* ---- what is timed ---- */

/* A thread's half of the KV heads, or of the tokens if there is one head; the halves of that are merged by bed_attend(). */
static void attend_job(struct bed *bed, uint32_t thread)
{
    const struct shape *s = &bed->shape;
    uint32_t parts = s->n_threads, by_head = s->n_heads >= parts ? parts : 1, h0 = 0, h1 = s->n_heads;
    size_t b0 = 0, b1 = bed->n_blocks, out = 0;
    struct attn_params params = {.scale = 1 / sqrtf((float)s->dim), .dim_o = s->dim};

    if (by_head == parts) {
        h0 = s->n_heads * thread / parts;
        h1 = s->n_heads * (thread + 1) / parts;
    } else {
        b0 = bed->n_blocks * thread / parts;
        b1 = bed->n_blocks * (thread + 1) / parts;
        out = thread * (size_t)s->n_heads * s->n_rows;
    }
    for (uint32_t h = h0; h < h1; h++) {
        size_t row = (size_t)h * s->n_rows;
        struct attn_rows rows = {s->n_rows, bed->q + row * s->dim, bed->q_pos + row};
        struct attn_out to = {bed->o + (out + row) * s->dim, bed->lse + out + row, NULL};

        if (attn_partial(bed->ops, &params, bed->blocks + (bed->layer * s->n_heads + h) * bed->n_blocks + b0, b1 - b0,
                         &rows, &to, bed->work[thread]) < 0)
            fatal("refused");
    }
}

static void attend(struct bed *bed)
{
    const struct shape *s = &bed->shape;
    size_t n = (size_t)s->n_heads * s->n_rows;

    bed_run(bed, attend_job);
    if (s->n_heads < s->n_threads)
        for (size_t r = 0; r < n; r++)
            attn_merge(bed->o + r * s->dim, bed->lse + r, bed->o + (n + r) * s->dim, bed->lse[n + r], s->dim);
}

__attribute__((target("avx2"))) static uint64_t sum_avx2(const uint8_t *p, size_t n)
{
    __m256i a = _mm256_setzero_si256(), b = a;

    for (size_t i = 0; i + 128 <= n; i += 128) {
        a = _mm256_add_epi64(a, _mm256_add_epi64(*(const __m256i *)(p + i), *(const __m256i *)(p + i + 32)));
        b = _mm256_add_epi64(b, _mm256_add_epi64(*(const __m256i *)(p + i + 64), *(const __m256i *)(p + i + 96)));
    }
    a = _mm256_add_epi64(a, b);
    return (uint64_t)_mm256_extract_epi64(a, 0) + (uint64_t)_mm256_extract_epi64(a, 2);
}

static uint64_t sum_sse2(const uint8_t *p, size_t n)
{
    __m128i a = _mm_setzero_si128(), b = a;

    for (size_t i = 0; i + 64 <= n; i += 64) {
        a = _mm_add_epi64(a, _mm_add_epi64(*(const __m128i *)(p + i), *(const __m128i *)(p + i + 16)));
        b = _mm_add_epi64(b, _mm_add_epi64(*(const __m128i *)(p + i + 32), *(const __m128i *)(p + i + 48)));
    }
    return (uint64_t)_mm_cvtsi128_si64(_mm_add_epi64(a, b));
}

static void read_job(struct bed *bed, uint32_t thread)
{
    size_t part = bed->layer_bytes / bed->shape.n_threads & ~(size_t)127;
    const uint8_t *p = bed->tiles + bed->layer * bed->layer_bytes + thread * part;

    bench_use(__builtin_cpu_supports("avx2") ? sum_avx2(p, part) : sum_sse2(p, part));
}

static void read_all(struct bed *bed)
{
    bed_run(bed, read_job);
}

/* Least microseconds of both, taken by turns so that both meet the same machine; each on a layer that was not read lately, or, of one
 * layer, as the same job before leaves the caches. */
static void measure(struct bed *bed, double *ret_attend, double *ret_read)
{
    uint64_t begun = bench_nsec();

    *ret_attend = *ret_read = 1e30;
    for (unsigned i = 0; i < LEAST_RUNS || bench_nsec() - begun < CASE_NSEC; i++)
        for (int what = 0; what < 2; what++) {
            double *least = what ? ret_attend : ret_read, t;
            uint64_t at;

            bed->layer = (bed->layer + 1) % bed->n_layers;
            if (bed->shape.warm)
                (what ? attend : read_all)(bed);
            at = bench_nsec();
            (what ? attend : read_all)(bed);
            t = (double)(bench_nsec() - at) / 1e3;
            *least = t < *least ? t : *least;
        }
}

/* ---- cases ---- */

static void case_name(char *name, size_t n, const struct attn_ops *ops, const struct shape *s)
{
    snprintf(name, n, "%s, %s/%s, D %u, %u KV heads, %u tokens, %u rows, %u thread%s%s", ops->name, s->k, s->v, s->dim,
             s->n_heads, s->n_tokens, s->n_rows, s->n_threads, s->n_threads == 1 ? "" : "s", s->warm ? ", warm" : "");
}

/* Microseconds of the case, 0 if it was not wanted. */
static double run_case(const struct bench *b, const struct attn_ops *ops, const struct shape *shape, double *ret_read)
{
    char name[160];
    double us, read;
    struct bed *bed;

    case_name(name, sizeof(name), ops, shape);
    if (b->only && !strstr(name, b->only))
        return 0;
    bed = bed_create(shape);
    bed->ops = ops;
    measure(bed, &us, &read);
    bed_destroy(bed);
    bench_line("attend", name, us, "us", read, LIMIT);
    if (ret_read)
        *ret_read = read;
    return us;
}

/* One thread, then two: how much faster. */
static void run_threads(const struct bench *b, const struct attn_ops *ops, struct shape shape)
{
    double us[2], read[2];
    char name[160], line[192];

    for (uint32_t i = 0; i < 2; i++) {
        shape.n_threads = i + 1;
        us[i] = run_case(b, ops, &shape, read + i);
    }
    if (us[0] == 0 || us[1] == 0)
        return;
    case_name(name, sizeof(name), ops, &shape);
    snprintf(line, sizeof(line), "scaling: %s", name);
    bench_line("attend", line, us[0] / us[1], "times", read[0] / read[1],
               "what reading gains: at least 1.8 until memory binds");
}

static void run_sizes(const struct bench *b, const struct attn_ops *ops)
{
    static const uint32_t dims[] = {64, 128, 256}, tokens[] = {1024, 8192, 32768, 131072}, heads[] = {8, 1};

    for (size_t d = 0; d < 3; d++)
        for (size_t h = 0; h < 2; h++)
            for (size_t t = 0; t < 4; t++)
                run_threads(b, ops, (struct shape){"kc4", "tq4", dims[d], heads[h], tokens[t], 4, 1, false});
}

/* Many rows over the same blocks, as the daemon stacks them: a row costs less. */
static void run_rows(const struct bench *b, const struct attn_ops *ops)
{
    static const uint32_t rows[] = {1, 4, 8, 16, 64};
    double at_four = 0;

    for (size_t i = 0; i < 5; i++) {
        struct shape shape = {"kc4", "tq4", 128, 8, 32768, rows[i], 1, false};
        double us = run_case(b, ops, &shape, NULL);
        char name[160], line[192];

        at_four = rows[i] == 4 ? us : at_four;
        if (us == 0 || at_four == 0 || rows[i] <= 4)
            continue;
        case_name(name, sizeof(name), ops, &shape);
        snprintf(line, sizeof(line), "a row: %s", name);
        bench_line("attend", line, us / rows[i], "us", at_four / 4, "a row's share with 4 rows");
    }
}

static void run_codecs(const struct bench *b, const struct attn_ops *ops)
{
    static const char *const codecs[] = {"raw", "fp8", "int8", "uq4:rotate=off", "tq4", "kc4"};

    for (size_t i = 0; i < sizeof(codecs) / sizeof(codecs[0]); i++)
        run_case(b, ops, &(struct shape){codecs[i], codecs[i], 128, 8, 32768, 4, 1, false}, NULL);
}

/* kvd's fastest variant next to each line of the peer. */
static void run_peer(const struct bench *b)
{
    FILE *f = fopen(b->peer, "r");
    char line[512], type[32], name[160], text[256];

    if (!f)
        fatal("the peer's file cannot be read");
    while (fgets(line, sizeof(line), f)) {
        struct shape s = {"kc4", "tq4", 0, 0, 0, 4, 0, true};
        const char *at = strstr(line, "llama.cpp "), *value = strstr(line, "\"value\":");
        double us;

        if (!at || !value ||
            sscanf(at, "llama.cpp %31[^,], D %u, %u KV heads, %u tokens, %u threads", type, &s.dim, &s.n_heads,
                   &s.n_tokens, &s.n_threads) != 5 ||
            s.n_threads < 1 || s.n_threads > 2)
            continue;
        us = run_case(b, b->ops[b->n_ops - 1], &s, NULL);
        if (us == 0)
            continue;
        case_name(name, sizeof(name), b->ops[b->n_ops - 1], &s);
        snprintf(text, sizeof(text), "against llama.cpp %s: %s", type, name);
        bench_line("attend", text, us, "us", strtod(value + strlen("\"value\":"), NULL),
                   "llama.cpp's attention over the same tokens: below 1");
    }
    fclose(f);
}

int main(int argc, char **argv)
{
    struct bench b = {0};
    struct cpu_features cpu;

    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--peer") && i + 1 < argc)
            b.peer = argv[++i];
        else if (argv[i][0] != '-' && !b.only)
            b.only = argv[i];
        else {
            fprintf(stderr, "usage: bench_attend [--peer FILE] [TEXT]\n");
            return 2;
        }
    }
    cpu_detect(&cpu);
    if (cpu.avx2)
        b.ops[b.n_ops++] = &attn_ops_avx2;
    if (cpu.avx512)
        b.ops[b.n_ops++] = &attn_ops_avx512;
    if (cpu.avx512_vnni)
        b.ops[b.n_ops++] = &attn_ops_avx512_vnni;
    run_case(&b, &attn_ops_scalar, &(struct shape){"kc4", "tq4", 128, 1, 1024, 4, 1, false}, NULL);
    if (!b.n_ops)
        b.ops[b.n_ops++] = &attn_ops_scalar;
    for (size_t i = 0; i < b.n_ops; i++) {
        run_sizes(&b, b.ops[i]);
        run_rows(&b, b.ops[i]);
        run_codecs(&b, b.ops[i]);
    }
    if (b.peer)
        run_peer(&b);
    return 0;
}
