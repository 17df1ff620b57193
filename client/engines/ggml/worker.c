#include "worker.h"

#include <errno.h>
#include <ggml-cpu.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STEP_TOKENS_MAX 512u

static int fail(struct worker *worker, int error, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(worker->error, sizeof(worker->error), format, args);
    va_end(args);
    return error;
}

int worker_open(const struct gemma *model, struct reuse *reuse, uint32_t block_tokens, enum attention_form form, int n_threads,
                struct worker *worker)
{
    struct attention_layer *layers;

    memset(worker, 0, sizeof(*worker));
    worker->model = model;
    worker->reuse = reuse;
    worker->form = form;
    worker->step_tokens = block_tokens < STEP_TOKENS_MAX ? STEP_TOKENS_MAX / block_tokens * block_tokens : block_tokens;
    worker->backend = ggml_backend_cpu_init();
    worker->allocator = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
    worker->graph_memory = malloc(gemma_graph_bytes(model));
    layers = reuse_layers(model, reuse);
    if (!worker->backend || !worker->allocator || !worker->graph_memory || !layers) {
        free(layers);
        return fail(worker, -ENOMEM, "no memory for a graph");
    }
    ggml_backend_cpu_set_n_threads(worker->backend, n_threads);
    attention_init(&worker->attention, model->n_layers, layers, model->dim, block_tokens, model->scale, n_threads);
    return 0;
}

void worker_close(struct worker *worker)
{
    attention_deinit(&worker->attention);
    free(worker->graph_memory);
    if (worker->allocator)
        ggml_gallocr_free(worker->allocator);
    if (worker->backend)
        ggml_backend_free(worker->backend);
    memset(worker, 0, sizeof(*worker));
}

/* Begins on nothing. */
static void begin_empty(struct worker *worker)
{
    struct attention *a = &worker->attention;

    worker->n_tokens = 0;
    a->prefix = NULL;
    a->n_prefix = 0;
    a->error = KVD_OK;
    for (uint32_t i = 0; i < a->n_layers; i++) {
        a->layers[i].form = ATTENTION_PLAIN;
        tiles_reset(&a->layers[i].own, 0);
        tiles_reset(&a->layers[i].prefix, 0);
    }
}

int worker_begin(struct worker *worker, uint64_t n_steps)
{
    begin_empty(worker);
    if (!worker->reuse || worker->reuse->n_matched == 0)
        return 0;
    if (reuse_begin(worker->reuse, &worker->attention, worker->form, n_steps) != KVD_OK) {
        begin_empty(worker);
        return fail(worker, -EIO, "%s", worker->reuse->error);
    }
    worker->n_tokens = worker->attention.n_prefix;
    return 0;
}

/* One graph, of the n tokens that are next. */
static int compute(struct worker *worker, const uint32_t *tokens, uint32_t n, uint32_t n_logits, const float **ret_logits)
{
    struct ggml_init_params params = {gemma_graph_bytes(worker->model), worker->graph_memory, true};
    struct ggml_context *context = ggml_init(params);
    struct gemma_graph graph;
    enum ggml_status status;

    if (!context || attention_prepare(&worker->attention, worker->n_tokens, n) < 0) {
        ggml_free(context);
        return fail(worker, -ENOMEM, "no memory for %u tokens after %u", n, worker->n_tokens);
    }
    gemma_graph_build(worker->model, context, n, n_logits, attention_add, &worker->attention, &graph);
    if (!ggml_gallocr_alloc_graph(worker->allocator, graph.graph)) {
        ggml_free(context);
        return fail(worker, -ENOMEM, "no memory for a graph of %u tokens", n);
    }
    for (uint32_t i = 0; i < n; i++) {
        ((int32_t *)graph.tokens->data)[i] = (int32_t)tokens[i];
        ((int32_t *)graph.positions->data)[i] = (int32_t)(worker->n_tokens + i);
    }
    status = ggml_backend_graph_compute(worker->backend, graph.graph);
    *ret_logits = graph.logits->data; /* in the allocator's buffer, which outlives the context */
    ggml_free(context);
    if (status != GGML_STATUS_SUCCESS)
        return fail(worker, -EIO, "ggml computes no graph of %u tokens (%d)", n, (int)status);
    if (worker->attention.error != KVD_OK) {
        fail(worker, -ESTALE, "%s", worker->attention.message);
        worker->n_recomputed += worker->n_tokens + n;
        begin_empty(worker);
        return -ESTALE;
    }
    worker->n_tokens += n;
    return 0;
}

int worker_compute(struct worker *worker, const uint32_t *tokens, uint32_t n, bool publish, const float **ret_logits)
{
    int r = 0;

    for (uint32_t i = worker->n_tokens; i < n; i++)
        if (tokens[i] >= worker->model->n_vocab)
            return fail(worker, -EINVAL, "token %u; there are %u", tokens[i], worker->model->n_vocab);
    while (r == 0 && worker->n_tokens < n) {
        uint32_t first = worker->n_tokens, end = (first / worker->step_tokens + 1) * worker->step_tokens;

        end = end < n ? end : n;
        r = compute(worker, tokens + first, end - first, 1, ret_logits);
        /* What cannot be published is counted, and no failure of the sequence. */
        if (r == 0 && publish && worker->reuse)
            (void)reuse_publish(worker->reuse, &worker->attention, first, end);
    }
    return r;
}

int worker_compute_surely(struct worker *worker, const uint32_t *tokens, uint32_t n, bool publish, const float **ret_logits)
{
    int r = worker_compute(worker, tokens, n, publish, ret_logits);

    /* Without a prefix there is nothing left that could be stale. */
    return r == -ESTALE ? worker_compute(worker, tokens, n, false, ret_logits) : r;
}

int worker_compute_logits(struct worker *worker, const uint32_t *tokens, uint32_t n, const float **ret_logits)
{
    return compute(worker, tokens, n, n, ret_logits);
}

uint32_t worker_best(const struct worker *worker, const float *logits)
{
    uint32_t best = 0;

    for (uint32_t i = 1; i < worker->model->n_vocab; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}
