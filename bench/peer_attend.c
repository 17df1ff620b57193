/* llama.cpp's own attention over a KV cache, timed: what `bench_attend` is compared with.
 *
 * ggml_flash_attn_ext() on the CPU, one query token, four query heads a KV head, K and V as llama.cpp keeps them (a token's heads
 * side by side, f16 or q4_0), nothing masked and no mask given, which spares it a comparison per token. Each case prints the
 * bench's line; its case is "llama.cpp TYPE, D d, n KV heads, n tokens, n threads" for a program to read, its value the least
 * time of one call, and its limit the least time in which the same threads read the same bytes once, through the same scheduler.
 *
 * Built by bench/peer_attend.sh, as ggml is no Debian package. Includes: bench.h, ggml's public headers. */
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <math.h>
#include <stdbool.h>

#include "bench.h"

#define HEADS_PER_KV 4
#define FILL_TOKENS 1024      /* that differ; more are copies of them */
#define CASE_NSEC 250000000u  /* spent on each case, or LEAST_RUNS */
#define LEAST_RUNS 3

struct shape {
    enum ggml_type type;
    uint32_t dim, n_kv_heads, n_tokens;
    int n_threads;
};

/* What one case is computed in. */
struct bed {
    struct ggml_context *context;
    ggml_backend_buffer_t buffer;
    struct ggml_cgraph *attention, *reading;
    struct ggml_tensor *k, *v; /* [dim * n_kv_heads, n_tokens] */
};

static void fatal(const char *what)
{
    fprintf(stderr, "peer_attend: %s\n", what);
    exit(1);
}

static void fill(struct ggml_tensor *tensor, uint64_t seed)
{
    size_t row = (size_t)tensor->ne[0], n_rows = (size_t)tensor->ne[1], bytes = tensor->nb[1];
    size_t n_fill = n_rows < FILL_TOKENS ? n_rows : FILL_TOKENS;
    float *values = bench_alloc(n_fill * row * sizeof(*values));

    for (size_t i = 0; i < n_fill * row; i++)
        values[i] = (float)(int64_t)(bench_random(&seed) >> 11) * 0x1p-51f - 1;
    ggml_quantize_chunk(tensor->type, values, tensor->data, 0, (int64_t)n_fill, (int64_t)row, NULL);
    free(values);
    for (size_t at = n_fill; at < n_rows; at += n_fill)
        memcpy((char *)tensor->data + at * bytes, tensor->data, (n_rows - at < n_fill ? n_rows - at : n_fill) * bytes);
}

static uint64_t read_share(const struct ggml_tensor *tensor, int ith, int nth)
{
    size_t n = ggml_nbytes(tensor) / 8;
    const uint64_t *words = tensor->data;
    uint64_t sum = 0;

    for (size_t i = n * (size_t)ith / (size_t)nth, end = n * (size_t)(ith + 1) / (size_t)nth; i < end; i++)
        sum += words[i];
    return sum;
}

static void read_both(struct ggml_tensor *dst, int ith, int nth, void *ctx)
{
    const struct bed *bed = ctx;

    (void)dst;
    bench_use(read_share(bed->k, ith, nth) + read_share(bed->v, ith, nth));
}

/* A head's rows of a cache: [dim, n_tokens, n_kv_heads]. */
static struct ggml_tensor *heads_of(struct ggml_context *context, struct ggml_tensor *cache, const struct shape *shape)
{
    return ggml_view_3d(context, cache, shape->dim, shape->n_tokens, shape->n_kv_heads, cache->nb[1],
                        ggml_row_size(shape->type, shape->dim), 0);
}

static void make_bed(const struct shape *shape, ggml_backend_t backend, struct bed *bed)
{
    struct ggml_init_params params = {.mem_size = 32 * ggml_tensor_overhead() + 2 * ggml_graph_overhead(), .no_alloc = true};
    struct ggml_context *context = bed->context = ggml_init(params);
    struct ggml_tensor *q, *out;
    uint64_t seed = 1;
    int64_t width = (int64_t)shape->dim * shape->n_kv_heads;

    if (!context)
        fatal("no memory for a context");
    q = ggml_new_tensor_3d(context, GGML_TYPE_F32, shape->dim, 1, (int64_t)shape->n_kv_heads * HEADS_PER_KV);
    bed->k = ggml_new_tensor_2d(context, shape->type, width, shape->n_tokens);
    bed->v = ggml_new_tensor_2d(context, shape->type, width, shape->n_tokens);
    out = ggml_flash_attn_ext(context, q, heads_of(context, bed->k, shape), heads_of(context, bed->v, shape), NULL,
                              1 / sqrtf((float)shape->dim), 0, 0);
    bed->attention = ggml_new_graph(context);
    ggml_build_forward_expand(bed->attention, out);
    out = ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, &q, 1, read_both, GGML_N_TASKS_MAX, bed);
    bed->reading = ggml_new_graph(context);
    ggml_build_forward_expand(bed->reading, out);
    bed->buffer = ggml_backend_alloc_ctx_tensors(context, backend);
    if (!bed->buffer)
        fatal("no memory for K and V");
    for (int64_t i = 0; i < ggml_nelements(q); i++)
        ((float *)q->data)[i] = (float)(int64_t)(bench_random(&seed) >> 11) * 0x1p-51f - 1;
    fill(bed->k, 2);
    fill(bed->v, 3);
}

static double run(ggml_backend_t backend, struct ggml_cgraph *graph)
{
    uint64_t begun = bench_nsec();

    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS)
        fatal("ggml computes no graph");
    return (double)(bench_nsec() - begun);
}

static void measure(const struct shape *shape, ggml_backend_t backend)
{
    struct bed bed;
    double best = INFINITY, limit = INFINITY;
    uint64_t begun;
    char name[128];

    make_bed(shape, backend, &bed);
    ggml_backend_cpu_set_n_threads(backend, shape->n_threads);
    run(backend, bed.attention);
    run(backend, bed.reading);
    begun = bench_nsec();
    for (int i = 0; i < LEAST_RUNS || bench_nsec() - begun < CASE_NSEC; i++) {
        best = fmin(best, run(backend, bed.attention));
        limit = fmin(limit, run(backend, bed.reading));
    }
    snprintf(name, sizeof(name), "llama.cpp %s, D %u, %u KV heads, %u tokens, %d threads", ggml_type_name(shape->type),
             shape->dim, shape->n_kv_heads, shape->n_tokens, shape->n_threads);
    bench_line("attend", name, best / 1e3, "us", limit / 1e3, "one reading of its K and V by the same threads (least)");
    ggml_backend_buffer_free(bed.buffer);
    ggml_free(bed.context);
}

int main(int argc, char **argv)
{
    static const uint32_t dims[] = {64, 128, 256}, kv_heads[] = {8, 1}, tokens[] = {1024, 8192, 32768, 131072};
    static const enum ggml_type types[] = {GGML_TYPE_F16, GGML_TYPE_Q4_0};
    ggml_backend_t backend = ggml_backend_cpu_init();
    uint32_t only_dim = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 0;

    if (argc > 2 || (argc > 1 && only_dim == 0)) {
        fprintf(stderr, "usage: peer_attend [HEAD-SIZE]\n");
        return 2;
    }
    if (!backend)
        fatal("ggml has no CPU backend");
    for (size_t d = 0; d < 3; d++)
        for (size_t h = 0; h < 2; h++)
            for (size_t t = 0; t < 4; t++)
                for (size_t y = 0; y < 2; y++)
                    for (int n = 1; n <= 2; n++)
                        if (only_dim == 0 || only_dim == dims[d])
                            measure(&(struct shape){types[y], dims[d], kv_heads[h], tokens[t], n}, backend);
    ggml_backend_free(backend);
    return 0;
}
