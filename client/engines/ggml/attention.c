#include "attention.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A query of fewer tokens than this for each thread is divided by what it attends to, not by its tokens. */
#define TOKENS_PER_THREAD 4u
#define TIMEOUT_MSEC 10000

/* ---- Set up ------------------------------------------------------------------------------------------------------ */

/* Own tokens and a plain prefix, each divided among the threads; and what kvd computes. */
static uint32_t max_parts(const struct attention *attention)
{
    return 2 * (uint32_t)attention->n_threads + 1;
}

int attention_init(struct attention *attention, uint32_t n_layers, struct attention_layer *layers, uint32_t dim, uint32_t block_tokens,
                   float scale, int n_threads)
{
    *attention = (struct attention){
        .n_layers = n_layers,
        .dim = dim,
        .block_tokens = block_tokens,
        .scale = scale,
        .n_threads = n_threads,
        .layers = layers,
    };
    for (uint32_t i = 0; i < n_layers; i++) {
        layers[i].attention = attention;
        layers[i].attending = NULL;
        layers[i].form = ATTENTION_PLAIN;
        tiles_init(&layers[i].prefix, layers[i].n_kv_heads, dim, 0);
        tiles_init(&layers[i].own, layers[i].n_kv_heads, dim, 0);
    }
    return 0;
}

void attention_deinit(struct attention *attention)
{
    for (uint32_t i = 0; attention->layers && i < attention->n_layers; i++) {
        kvd_attending_destroy(attention->layers[i].attending);
        tiles_deinit(&attention->layers[i].prefix);
        tiles_deinit(&attention->layers[i].own);
    }
    free(attention->layers);
    free(attention->part_o);
    free(attention->part_lse);
    memset(attention, 0, sizeof(*attention));
}

int attention_begin(struct attention *attention, kvd_space *space, kvd_prefix *prefix, uint32_t n_prefix,
                    const enum attention_form *forms)
{
    attention->prefix = n_prefix > 0 ? prefix : NULL;
    attention->n_prefix = n_prefix;
    attention->error = KVD_OK;
    for (uint32_t i = 0; i < attention->n_layers; i++) {
        struct attention_layer *layer = &attention->layers[i];
        int r = KVD_OK;

        tiles_reset(&layer->own, n_prefix);
        tiles_reset(&layer->prefix, 0);
        layer->form = forms[i];
        layer->attending = kvd_attending_destroy(layer->attending);
        if (layer->form == ATTENTION_LOCAL && n_prefix > 0)
            r = kvd_attending_create(space, &layer->attending);
        if (r != KVD_OK)
            return r;
    }
    return KVD_OK;
}

int attention_prepare(struct attention *attention, uint32_t position, uint32_t n)
{
    size_t rows = 0;

    for (uint32_t i = 0; i < attention->n_layers; i++) {
        struct attention_layer *layer = &attention->layers[i];

        if (tiles_reserve(&layer->own, position + n - attention->n_prefix) < 0)
            return -ENOMEM;
        rows = (size_t)n * layer->n_heads > rows ? (size_t)n * layer->n_heads : rows;
    }
    if (rows > attention->part_rows) {
        free(attention->part_o);
        free(attention->part_lse);
        attention->part_rows = 0;
        attention->part_o = aligned_alloc(64, max_parts(attention) * rows * attention->dim * sizeof(float));
        attention->part_lse = malloc(max_parts(attention) * rows * sizeof(float));
        if (!attention->part_o || !attention->part_lse)
            return -ENOMEM;
        attention->part_rows = rows;
    }
    attention->position = position;
    return 0;
}

static float *part_o(const struct attention *attention, uint32_t part)
{
    return attention->part_o + part * attention->part_rows * attention->dim;
}

static float *part_lse(const struct attention *attention, uint32_t part)
{
    return attention->part_lse + part * attention->part_rows;
}

/* ---- The prefix's part ------------------------------------------------------------------------------------------- */

bool attention_request(const struct attention *attention, uint32_t layer, uint32_t position, uint32_t n, const float *q,
                       struct kvd_attention *ret)
{
    const struct attention_layer *l = &attention->layers[layer];
    uint32_t first = l->window_tokens > 0 && position + 1 > l->window_tokens ? position + 1 - l->window_tokens : 0;
    struct kvd_attention request = KVD_ATTENTION_INIT;

    if (!attention->prefix || first >= attention->n_prefix)
        return false;
    request.layer = l->index;
    request.n_heads = l->n_heads;
    request.n_tokens = n;
    request.dtype = KVD_F32;
    request.q = q;
    request.q_head_stride = attention->dim * sizeof(float);
    request.q_token_stride = l->n_heads * request.q_head_stride;
    request.first_position = position;
    request.scale = attention->scale;
    request.first_block = first / attention->block_tokens;
    request.n_blocks = attention->n_prefix / attention->block_tokens - request.first_block;
    *ret = request;
    return true;
}

static void failed(struct attention *attention, int error, const char *what)
{
    if (attention->error != KVD_OK)
        return;
    attention->error = error;
    snprintf(attention->message, sizeof(attention->message), "%s: %s", what, kvd_strerror(error));
}

/* Begins it, or leaves it to be computed when it is merged. */
static void ask(struct attention_layer *layer, const float *q, uint32_t n)
{
    struct attention *a = layer->attention;
    uint32_t part = max_parts(a) - 1;
    int r = KVD_OK;

    a->is_pending = false;
    a->is_asked = layer->form != ATTENTION_PLAIN &&
                  attention_request(a, (uint32_t)(layer - a->layers), a->position, n, q, &a->request);
    if (!a->is_asked)
        return;
    a->n_asked++;
    a->request.o = part_o(a, part);
    a->request.lse = part_lse(a, part);
    if (layer->form == ATTENTION_DAEMON) {
        r = kvd_attend_submit(a->prefix, &a->request, 0, &a->ticket);
        a->n_fallbacks += r != KVD_OK;
    } else {
        r = kvd_attend_begin(layer->attending, a->prefix, &a->request, (uint32_t)a->n_threads);
    }
    a->is_pending = r == KVD_OK;
}

/* Waits for it. What failed is computed here. */
static void receive(struct attention_layer *layer)
{
    struct attention *a = layer->attention;
    int r = KVD_E_GONE;

    if (a->is_pending && layer->form == ATTENTION_DAEMON) {
        r = kvd_attend_collect(a->prefix, a->ticket, TIMEOUT_MSEC);
        if (r == KVD_E_TIMEOUT)
            kvd_attend_cancel(a->prefix, a->ticket);
        a->n_fallbacks += r != KVD_OK;
    } else if (a->is_pending) {
        r = kvd_attend_wait(layer->attending, TIMEOUT_MSEC);
    }
    a->is_pending = false;
    if (r != KVD_OK)
        r = kvd_attend(a->prefix, &a->request, KVD_ATTEND_LOCAL);
    if (r != KVD_OK)
        failed(a, r, "attention over the cached prefix");
}

/* ---- The nodes --------------------------------------------------------------------------------------------------- */

/* src: k, v, q. */
static void keep_node(struct ggml_tensor *dst, int ith, int nth, void *ctx)
{
    struct attention_layer *layer = ctx;
    uint32_t n = (uint32_t)dst->src[0]->ne[2];

    (void)nth;
    if (ith != 0)
        return;
    tiles_append(&layer->own, dst->src[0]->data, dst->src[1]->data, n);
    ask(layer, dst->src[2]->data, n);
}

/* Thread ith's share of the tiles of both, or of the tokens. */
static void attend_share(struct attention_layer *layer, const struct tiles *tiles, struct tiles_query *query, uint32_t part,
                         uint32_t ith, uint32_t nth)
{
    uint32_t n = query->n_tokens, n_tiles = tiles_count(tiles);

    if (n < nth * TOKENS_PER_THREAD) {
        query->o = part_o(layer->attention, part + ith);
        query->lse = part_lse(layer->attention, part + ith);
        tiles_attend(tiles, query, 0, n, n_tiles * ith / nth, n_tiles * (ith + 1) / nth);
        return;
    }
    query->o = part_o(layer->attention, part);
    query->lse = part_lse(layer->attention, part);
    /* In turns: later tokens see more. */
    for (uint32_t at = ith * TOKENS_PER_THREAD; at < n; at += nth * TOKENS_PER_THREAD)
        tiles_attend(tiles, query, at, at + TOKENS_PER_THREAD < n ? at + TOKENS_PER_THREAD : n, 0, n_tiles);
}

static uint32_t n_shares(uint32_t n_tokens, uint32_t n_threads)
{
    return n_tokens < n_threads * TOKENS_PER_THREAD ? n_threads : 1;
}

/* src: q, keep. */
static void attend_node(struct ggml_tensor *dst, int ith, int nth, void *ctx)
{
    struct attention_layer *layer = ctx;
    struct attention *a = layer->attention;
    struct tiles_query query = {
        .q = dst->src[0]->data,
        .n_tokens = (uint32_t)dst->src[0]->ne[2],
        .n_heads = layer->n_heads,
        .position = a->position,
        .window = layer->window_tokens,
        .scale = a->scale,
    };
    uint32_t shares = n_shares(query.n_tokens, (uint32_t)nth);

    attend_share(layer, &layer->own, &query, 0, (uint32_t)ith, (uint32_t)nth);
    if (layer->prefix.n_tokens > 0)
        attend_share(layer, &layer->prefix, &query, shares, (uint32_t)ith, (uint32_t)nth);
    if (ith == 0)
        a->n_parts = layer->prefix.n_tokens > 0 ? 2 * shares : shares;
    if (a->is_pending && layer->form == ATTENTION_LOCAL)
        while (kvd_attend_work(layer->attending) == KVD_OK)
            ;
}

/* src: attend, q. */
static void merge_node(struct ggml_tensor *dst, int ith, int nth, void *ctx)
{
    struct attention_layer *layer = ctx;
    struct attention *a = layer->attention;
    uint32_t last = max_parts(a) - 1, dim = a->dim;
    size_t n = (size_t)dst->ne[1] * layer->n_heads;
    float *out = dst->data;

    (void)nth;
    if (ith != 0)
        return;
    if (a->is_asked)
        receive(layer);
    for (size_t i = 0; i < n; i++, out += dim) {
        float lse = part_lse(a, 0)[i];

        memcpy(out, part_o(a, 0) + i * dim, dim * sizeof(*out));
        for (uint32_t p = 1; p < a->n_parts; p++)
            kvd_attend_merge(out, &lse, part_o(a, p) + i * dim, part_lse(a, p)[i], dim);
        if (a->is_asked && a->error == KVD_OK)
            kvd_attend_merge(out, &lse, part_o(a, last) + i * dim, part_lse(a, last)[i], dim);
    }
}

struct ggml_tensor *attention_add(void *ctx, struct ggml_context *context, uint32_t layer, struct ggml_tensor *q, struct ggml_tensor *k,
                                  struct ggml_tensor *v)
{
    struct attention *a = ctx;
    struct attention_layer *l = &a->layers[layer];
    struct ggml_tensor *kept, *attended, *to_keep[] = {k, v, q}, *to_attend[] = {q, NULL};
    struct ggml_tensor *to_merge[] = {NULL, q}; /* q once more, as what fails is computed again */

    kept = ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, to_keep, 3, keep_node, 1, l);
    to_attend[1] = kept;
    attended = ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, to_attend, 2, attend_node, GGML_N_TASKS_MAX, l);
    to_merge[0] = attended;
    return ggml_custom_4d(context, GGML_TYPE_F32, (int64_t)a->dim * l->n_heads, q->ne[2], 1, 1, to_merge, 2, merge_node, 1, l);
}
