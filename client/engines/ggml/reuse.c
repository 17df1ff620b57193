#include "reuse.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PUBLISH_BLOCKS 8u /* at once: they are copied beforehand */
#define LOAD_BLOCKS 8u /* the same */

static double now_msec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static int fail(struct reuse *reuse, int error, const char *what)
{
    snprintf(reuse->error, sizeof(reuse->error), "%s: %s (%.300s)", what, kvd_strerror(error), kvd_message(reuse->session));
    return error;
}

/* ---- The space --------------------------------------------------------------------------------------------------- */

/* Full layers first. Returns how many groups there are. */
static uint32_t order_layers(const struct gemma *model, uint32_t *order, struct kvd_group *groups)
{
    uint32_t n_groups = 0, next = 0;

    for (int sliding = 0; sliding < 2; sliding++) {
        bool is_used = false;

        for (uint32_t i = 0; i < model->n_layers; i++) {
            if ((model->layers[i].window_tokens > 0) != (sliding == 1))
                continue;
            order[i] = next++;
            groups[n_groups].window_tokens = model->layers[i].window_tokens;
            is_used = true;
        }
        n_groups += is_used;
    }
    return n_groups;
}

static int open_space(struct reuse *reuse)
{
    const struct gemma *model = reuse->model;
    const struct reuse_options *options = &reuse->options;
    struct kvd_space_desc desc = KVD_SPACE_INIT;
    struct kvd_group groups[2] = {0};
    struct kvd_layer *layers = calloc(model->n_layers, sizeof(*layers));
    int r;

    if (!layers)
        return fail(reuse, KVD_E_NOMEM, "a space");
    desc.n_groups = reuse->n_groups = order_layers(model, reuse->order, groups);
    for (uint32_t i = 0; i < model->n_layers; i++)
        layers[reuse->order[i]] = (struct kvd_layer){
            .n_kv_heads = model->n_kv_heads,
            .dim_k = model->dim,
            .dim_v = model->dim,
            .group = model->layers[i].window_tokens > 0 ? desc.n_groups - 1 : 0,
            .codec_k = options->codec_k,
            .codec_v = options->codec_v,
            .codec_first_k = options->codec_first,
            .codec_first_v = options->codec_first,
        };
    desc.model = options->model_name;
    desc.revision = options->revision;
    desc.rope = "as in the file"; /* which revision stands for; this program changes nothing of it */
    desc.dtype = KVD_F16;
    desc.block_tokens = options->block_tokens;
    desc.vocab_tokens = model->n_vocab;
    desc.groups = groups;
    desc.layers = layers;
    desc.n_layers = model->n_layers;
    r = kvd_space_open(reuse->session, &desc, &reuse->space);
    free(layers);
    return r == KVD_OK ? r : fail(reuse, r, "this model's space");
}

int reuse_open(const struct gemma *model, const struct reuse_options *options, uint32_t n_context, struct reuse *reuse)
{
    struct kvd_options attach = KVD_OPTIONS_INIT;
    int r;

    memset(reuse, 0, sizeof(*reuse));
    reuse->model = model;
    reuse->options = *options;
    reuse->order = calloc(model->n_layers, sizeof(*reuse->order));
    if (!reuse->order)
        return fail(reuse, KVD_E_NOMEM, "a session");
    attach.socket_path = options->socket_path;
    attach.name = "kvd-ggml";
    r = kvd_attach(&attach, &reuse->session);
    if (r != KVD_OK)
        return fail(reuse, r, "attaching to kvd");
    r = open_space(reuse);
    if (r != KVD_OK)
        return r;
    r = kvd_prefix_create(reuse->space, n_context / options->block_tokens + 1, &reuse->prefix);
    return r == KVD_OK ? r : fail(reuse, r, "a prefix");
}

void reuse_close(struct reuse *reuse)
{
    reuse->prefix = kvd_prefix_destroy(reuse->prefix);
    reuse->space = kvd_space_close(reuse->space);
    reuse->session = kvd_detach(reuse->session);
    free(reuse->order);
    reuse->order = NULL;
}

struct attention_layer *reuse_layers(const struct gemma *model, const struct reuse *reuse)
{
    struct attention_layer *layers = calloc(model->n_layers, sizeof(*layers));

    for (uint32_t i = 0; layers && i < model->n_layers; i++) {
        layers[i].index = reuse ? reuse->order[i] : 0;
        layers[i].n_heads = model->n_heads;
        layers[i].n_kv_heads = model->n_kv_heads;
        layers[i].window_tokens = model->layers[i].window_tokens;
    }
    return layers;
}

/* ---- Match ------------------------------------------------------------------------------------------------------- */

static int match_once(struct reuse *reuse)
{
    double begun = now_msec();
    size_t matched = 0;
    int r = kvd_match(reuse->prefix, reuse->tokens, reuse->n_tokens - 1, NULL, 0, &matched);

    reuse->n_matched = r == KVD_OK ? (uint32_t)matched : 0;
    reuse->match_msec += now_msec() - begun;
    return r == KVD_OK ? r : fail(reuse, r, "matching");
}

/* Says that this worker computes what is not cached. True: another one was at it, and there may be more to match now. */
static bool wait_for_others(struct reuse *reuse)
{
    uint32_t block = reuse->options.block_tokens, first = reuse->n_matched / block, n_busy = 0;
    uint32_t n = (reuse->n_tokens - 1) / block - first;
    enum kvd_flight *states = calloc(n + 1, sizeof(*states));
    double begun = now_msec();
    bool more = false;

    if (states && n > 0 && kvd_flight_begin(reuse->prefix, first, n, states) == KVD_OK) {
        while (n_busy < n && states[n_busy] != KVD_FLIGHT_GRANTED)
            n_busy++;
        more = n_busy > 0;
        if (more && states[n_busy - 1] == KVD_FLIGHT_BUSY)
            more = kvd_flight_wait(reuse->prefix, first + n_busy - 1, reuse->options.wait_msec) == KVD_OK;
    }
    free(states);
    reuse->wait_msec += now_msec() - begun;
    return more;
}

int reuse_match(struct reuse *reuse, const uint32_t *tokens, uint32_t n_tokens)
{
    int r;

    reuse->tokens = tokens;
    reuse->n_tokens = n_tokens;
    r = match_once(reuse);
    if (r == KVD_OK && reuse->options.wait_msec > 0 && wait_for_others(reuse))
        r = match_once(reuse);
    return r;
}

/* ---- Forms ------------------------------------------------------------------------------------------------------- */

/* The cheapest form for this layer, for a query of one token at the end of the prefix. */
static enum attention_form choose(struct reuse *reuse, const struct attention *attention, uint32_t layer, uint64_t n_steps)
{
    struct kvd_attend_costs costs = {.size = sizeof(costs)};
    struct kvd_attention request;

    if (!attention_request(attention, layer, attention->n_prefix, 1, NULL, &request) ||
        kvd_attend_choose(reuse->prefix, &request, n_steps, &costs) != KVD_OK)
        return ATTENTION_LOCAL;
    return costs.form == KVD_ATTEND_DAEMON ? ATTENTION_DAEMON : costs.form == KVD_ATTEND_LOAD ? ATTENTION_PLAIN : ATTENTION_LOCAL;
}

/* Decodes blocks [first, first + n) of the plain layers, which lack none before them. */
static int load_blocks(struct reuse *reuse, struct attention *attention, uint32_t first, uint32_t n, float *memory,
                       struct kvd_kv *layers)
{
    const struct gemma *model = reuse->model;
    uint32_t block = reuse->options.block_tokens;
    size_t row = (size_t)model->n_kv_heads * model->dim, each = row * block * n;
    int r;

    for (uint32_t i = 0; i < model->n_layers; i++) {
        struct attention_layer *layer = &attention->layers[i];
        struct kvd_kv *kv = &layers[layer->index];

        *kv = (struct kvd_kv){0};
        if (layer->form == ATTENTION_PLAIN && layer->prefix.first + layer->prefix.n_tokens == first * block)
            *kv = (struct kvd_kv){memory + 2 * i * each,         memory + (2 * i + 1) * each, row * sizeof(float),
                                  model->dim * sizeof(float), row * sizeof(float),         model->dim * sizeof(float)};
    }
    r = kvd_load(reuse->prefix, first, n, KVD_F32, layers, 0);
    for (uint32_t i = 0; r == KVD_OK && i < model->n_layers; i++) {
        struct tiles *tiles = &attention->layers[i].prefix;
        const struct kvd_kv *kv = &layers[attention->layers[i].index];

        if (kv->k && tiles_reserve(tiles, tiles->n_tokens + n * block) < 0)
            r = KVD_E_NOMEM;
        else if (kv->k)
            tiles_append(tiles, kv->k, kv->v, n * block);
    }
    return r;
}

/* Sliding layers get the blocks that the lease holds for them: those that the first token after the prefix sees. */
static int load_plain(struct reuse *reuse, struct attention *attention)
{
    const struct gemma *model = reuse->model;
    uint32_t block = reuse->options.block_tokens, n_blocks = attention->n_prefix / block, next;
    size_t row = (size_t)model->n_kv_heads * model->dim;
    float *memory = malloc(2 * model->n_layers * row * block * LOAD_BLOCKS * sizeof(*memory));
    struct kvd_kv *layers = calloc(model->n_layers, sizeof(*layers));
    int r = memory && layers ? KVD_OK : KVD_E_NOMEM;

    for (uint32_t i = 0; i < model->n_layers; i++) {
        uint32_t window = model->layers[i].window_tokens, n = (window + block - 1) / block;

        tiles_reset(&attention->layers[i].prefix, window > 0 && n < n_blocks ? (n_blocks - n) * block : 0);
    }
    for (uint32_t at = 0; r == KVD_OK && at < n_blocks; at = next) {
        next = at + LOAD_BLOCKS < n_blocks ? at + LOAD_BLOCKS : n_blocks;
        /* A piece ends where some layer begins. */
        for (uint32_t i = 0; i < model->n_layers; i++)
            if (attention->layers[i].prefix.first > at * block && attention->layers[i].prefix.first < next * block)
                next = attention->layers[i].prefix.first / block;
        r = load_blocks(reuse, attention, at, next - at, memory, layers);
    }
    free(memory);
    free(layers);
    return r;
}

/* Has the library map the blocks that the daemon is to read for us: should it die, they are at hand. */
static void map_blocks(struct reuse *reuse, uint32_t n_blocks)
{
    struct kvd_block block;

    for (uint32_t i = 0; i < n_blocks; i++)
        for (uint32_t group = 0; group < reuse->n_groups; group++)
            (void)kvd_prefix_block(reuse->prefix, i, group, &block); /* what a sliding group has left is no error */
}

int reuse_begin(struct reuse *reuse, struct attention *attention, enum attention_form form, uint64_t n_steps)
{
    uint32_t n_layers = reuse->model->n_layers;
    enum attention_form *forms = calloc(n_layers, sizeof(*forms));
    double begun = now_msec();
    bool is_plain = false, is_daemon = false;
    int r;

    if (!forms)
        return fail(reuse, KVD_E_NOMEM, "attention");
    attention->prefix = reuse->n_matched > 0 ? reuse->prefix : NULL;
    attention->n_prefix = reuse->n_matched;
    for (uint32_t i = 0; i < n_layers; i++) {
        forms[i] = form;
        if (form == ATTENTION_AUTO)
            forms[i] = attention->n_prefix > 0 ? choose(reuse, attention, i, n_steps) : ATTENTION_PLAIN;
        is_plain |= forms[i] == ATTENTION_PLAIN;
        is_daemon |= forms[i] == ATTENTION_DAEMON;
    }
    if (is_daemon)
        map_blocks(reuse, reuse->n_matched / reuse->options.block_tokens);
    r = attention_begin(attention, reuse->space, reuse->prefix, reuse->n_matched, forms);
    if (r == KVD_OK && is_plain && reuse->n_matched > 0)
        r = load_plain(reuse, attention);
    free(forms);
    reuse->load_msec += now_msec() - begun;
    return r == KVD_OK ? r : fail(reuse, r, "beginning on a cached prefix");
}

/* ---- Publish ----------------------------------------------------------------------------------------------------- */

static void count(struct reuse *reuse, const enum kvd_publish_status *status, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        reuse->n_published += status[i] == KVD_PUBLISHED;
        reuse->n_present += status[i] == KVD_PRESENT;
        reuse->n_failed += status[i] == KVD_FAILED;
    }
}

static int publish_some(struct reuse *reuse, const struct attention *attention, uint32_t first, uint32_t n, float *memory,
                        struct kvd_kv *layers)
{
    const struct gemma *model = reuse->model;
    uint32_t block = reuse->options.block_tokens;
    size_t row = (size_t)model->n_kv_heads * model->dim, each = row * block * n;
    enum kvd_publish_status status[PUBLISH_BLOCKS] = {0};
    int r;

    for (uint32_t i = 0; i < model->n_layers; i++) {
        const struct attention_layer *layer = &attention->layers[i];
        float *k = memory + 2 * i * each, *v = k + each;

        tiles_copy(&layer->own, first * block - layer->own.first, n * block, k, v);
        layers[layer->index] =
            (struct kvd_kv){k, v, row * sizeof(*k), model->dim * sizeof(*k), row * sizeof(*v), model->dim * sizeof(*v)};
    }
    r = kvd_publish(reuse->prefix, reuse->tokens, reuse->n_tokens, first, n, 0, KVD_F32, layers, status);
    count(reuse, status, n);
    return r == KVD_OK ? r : fail(reuse, r, "publishing");
}

int reuse_publish(struct reuse *reuse, const struct attention *attention, uint32_t first, uint32_t end)
{
    const struct gemma *model = reuse->model;
    uint32_t block = reuse->options.block_tokens;
    double begun = now_msec();
    size_t row = (size_t)model->n_kv_heads * model->dim;
    float *memory = malloc(2 * model->n_layers * row * block * PUBLISH_BLOCKS * sizeof(*memory));
    struct kvd_kv *layers = calloc(model->n_layers, sizeof(*layers));
    int r = memory && layers ? KVD_OK : fail(reuse, KVD_E_NOMEM, "publishing");

    for (uint32_t at = first / block; r == KVD_OK && at < end / block; at += PUBLISH_BLOCKS) {
        uint32_t n = end / block - at < PUBLISH_BLOCKS ? end / block - at : PUBLISH_BLOCKS;

        r = publish_some(reuse, attention, at, n, memory, layers);
    }
    free(memory);
    free(layers);
    reuse->publish_msec += now_msec() - begun;
    return r;
}
