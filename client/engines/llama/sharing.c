#include "sharing.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now_msec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static int fail(struct sharing *sharing, int error, const char *what)
{
    snprintf(sharing->error, sizeof(sharing->error), "%s: %s (%s)", what, kvd_strerror(error),
             kvd_message(sharing->session));
    return error;
}

static int fail_engine(struct sharing *sharing, int error, const char *what)
{
    snprintf(sharing->error, sizeof(sharing->error), "%s: %s", what, strerror(-error));
    return error;
}

static enum kvd_dtype dtype_of(const struct sharing *sharing)
{
    return sharing->engine->layout->f32 ? KVD_F32 : KVD_F16;
}

/* ---- Open and close ---------------------------------------------------------------------------------------------- */

static void measure_blocks(struct sharing *sharing)
{
    const struct kvstate_layout *layout = sharing->engine->layout;
    struct sharing_figures *figures = &sharing->figures;

    for (uint32_t g = 0; g < layout->n_groups; g++)
        figures->block_bytes += kvd_space_block_bytes(sharing->space, g, 0);
    for (uint32_t i = 0; i < layout->n_layers; i++) {
        const struct kvstate_layer *layer = &layout->layers[i];

        figures->block_fp16_bytes +=
            2 * (uint64_t)sharing->options.block_tokens * layer->n_kv_heads * (layer->dim_k + layer->dim_v);
    }
}

static int open_space(struct sharing *sharing)
{
    const struct kvstate_layout *layout = sharing->engine->layout;
    const struct sharing_options *options = &sharing->options;
    struct kvd_space_desc desc = KVD_SPACE_INIT;
    struct kvd_group groups[KVSTATE_MAX_GROUPS] = {0};
    struct kvd_layer *layers = calloc(layout->n_layers, sizeof(*layers));
    int r;

    if (!layers)
        return fail(sharing, KVD_E_NOMEM, "a space");
    for (uint32_t i = 0; i < layout->n_layers; i++) {
        const struct kvstate_layer *layer = &layout->layers[i];

        layers[i] = (struct kvd_layer){
            .n_kv_heads = layer->n_kv_heads,
            .dim_k = layer->dim_k,
            .dim_v = layer->dim_v,
            .group = layer->group,
            .codec_k = options->codec_k,
            .codec_v = options->codec_v,
            .codec_first_k = options->codec_first,
            .codec_first_v = options->codec_first,
        };
    }
    for (uint32_t g = 0; g < layout->n_groups; g++)
        groups[g].window_tokens = layout->groups[g].window_tokens;
    desc.model = options->model_name;
    desc.revision = options->revision;
    desc.rope = "as in the file"; /* which revision stands for; this program changes nothing of it */
    desc.dtype = dtype_of(sharing);
    desc.block_tokens = options->block_tokens;
    desc.vocab_tokens = sharing->engine->n_vocab;
    desc.groups = groups;
    desc.n_groups = layout->n_groups;
    desc.layers = layers;
    desc.n_layers = layout->n_layers;
    r = kvd_space_open(sharing->session, &desc, &sharing->space);
    free(layers);
    return r == KVD_OK ? 0 : fail(sharing, r, "this model's space");
}

int sharing_open(struct engine *engine, const struct sharing_options *options, struct sharing *sharing)
{
    struct kvd_options attach = KVD_OPTIONS_INIT;
    int r;

    memset(sharing, 0, sizeof(*sharing));
    sharing->engine = engine;
    sharing->options = *options;
    sharing->layers = calloc(engine->layout->n_layers, sizeof(*sharing->layers));
    if (!sharing->layers)
        return fail(sharing, KVD_E_NOMEM, "a session");
    attach.socket_path = options->socket_path;
    attach.name = "kvd-llama";
    r = kvd_attach(&attach, &sharing->session);
    if (r != KVD_OK)
        return fail(sharing, r, "attaching to kvd");
    r = open_space(sharing);
    if (r != 0)
        return r;
    measure_blocks(sharing);
    r = kvd_prefix_create(sharing->space, engine->n_context / options->block_tokens + 1, &sharing->prefix);
    return r == KVD_OK ? 0 : fail(sharing, r, "a prefix");
}

void sharing_close(struct sharing *sharing)
{
    sharing->prefix = kvd_prefix_destroy(sharing->prefix);
    sharing->space = kvd_space_close(sharing->space);
    sharing->session = kvd_detach(sharing->session);
    free(sharing->layers);
    sharing->layers = NULL;
}

/* ---- From the cache into the engine ------------------------------------------------------------------------------ */

/* The longest prefix <= n that may be reused. */
static uint32_t allowed(const struct sharing *sharing, uint32_t n)
{
    uint32_t step = sharing->options.exact ? sharing->engine->step_tokens : sharing->options.block_tokens;

    n = n / step * step;
    while (sharing->options.exact && n > 0 && !kvstate_is_exact(sharing->engine->layout, n))
        n -= step;
    return n;
}

/* Matches, again if need be, until what is leased may be reused. */
static int match(struct sharing *sharing, uint32_t *ret_n)
{
    uint32_t n = allowed(sharing, sharing->n_tokens - 1);
    double begun = now_msec();
    bool is_first = true;

    for (;;) {
        size_t matched;
        int r = kvd_match(sharing->prefix, sharing->tokens, n, NULL, 0, &matched);

        if (r != KVD_OK)
            return fail(sharing, r, "matching");
        if (is_first)
            sharing->figures.n_matched_tokens = (uint32_t)matched;
        is_first = false;
        n = allowed(sharing, (uint32_t)matched);
        if (n == matched) {
            *ret_n = n;
            sharing->figures.match_msec += now_msec() - begun;
            return 0;
        }
    }
}

/* Says that this worker computes what comes after the first n tokens. If another one is at it already: waits for that
 * one. Returns true if there may be more to match now. On any failure the worker just computes. */
static bool wait_for_others(struct sharing *sharing, uint32_t n)
{
    uint32_t block = sharing->options.block_tokens, first = n / block, last = 0;
    uint32_t n_blocks = allowed(sharing, sharing->n_tokens - 1) / block - first;
    enum kvd_flight *states = calloc(n_blocks + 1, sizeof(*states));
    double begun = now_msec();
    bool more = false;

    if (states && n_blocks > 0 && kvd_flight_begin(sharing->prefix, first, n_blocks, states) == KVD_OK) {
        while (last < n_blocks && states[last] != KVD_FLIGHT_GRANTED)
            last++;
        more = last > 0;
        if (more && states[last - 1] == KVD_FLIGHT_BUSY)
            more = kvd_flight_wait(sharing->prefix, first + last - 1, sharing->options.wait_msec) == KVD_OK;
    }
    free(states);
    sharing->figures.wait_msec += now_msec() - begun;
    return more;
}

/* Names the memory of the layers of one group, or of all if that is negative, for a call whose range begins with token
 * first. */
static void name_rows(struct sharing *sharing, const struct kvstate_rows *rows, uint32_t first, int only_group)
{
    const struct kvstate_layout *layout = sharing->engine->layout;
    size_t number = layout->f32 ? 4 : 2;

    for (uint32_t i = 0; i < layout->n_layers; i++) {
        const struct kvstate_layer *layer = &layout->layers[i];
        size_t skip = first - rows[i].first_token;

        sharing->layers[i] = (struct kvd_kv){NULL, NULL, 0, 0, 0, 0};
        if (only_group < 0 || layer->group == (uint32_t)only_group)
            sharing->layers[i] = (struct kvd_kv){
                .k = rows[i].k + skip * layer->k_row_bytes,
                .v = rows[i].v + skip * layer->v_row_bytes,
                .k_token_stride = layer->k_row_bytes,
                .k_head_stride = layer->dim_k * number,
                .v_token_stride = layer->v_row_bytes,
                .v_head_stride = layer->dim_v * number,
            };
    }
}

/* Decodes a group's part of a prefix of n tokens. A window that is no whole number of blocks begins within a block:
 * that one is decoded on the side, and its end copied. */
static int load_group(struct sharing *sharing, const struct kvstate_rows *rows, uint32_t group, uint32_t n)
{
    const struct kvstate_layout *layout = sharing->engine->layout;
    const struct kvstate_group *g = &layout->groups[group];
    uint32_t block = sharing->options.block_tokens, first = rows[g->first_layer].first_token;
    uint32_t whole = (first + block - 1) / block * block, skip = first % block;
    enum kvd_dtype dtype = dtype_of(sharing);
    uint32_t flags = sharing->options.verify ? KVD_LOAD_VERIFY : 0;
    struct kvstate_rows *side;
    uint8_t *memory, *p;
    size_t bytes = 0;
    int r;

    name_rows(sharing, rows, whole, (int)group);
    r = kvd_load(sharing->prefix, whole / block, (n - whole) / block, dtype, sharing->layers, flags);
    if (r != KVD_OK || skip == 0)
        return r;

    for (uint32_t i = 0; i < layout->n_layers; i++)
        bytes += block * (layout->layers[i].k_row_bytes + layout->layers[i].v_row_bytes);
    side = calloc(layout->n_layers, sizeof(*side));
    p = memory = malloc(bytes);
    r = side && memory ? KVD_OK : KVD_E_NOMEM;
    for (uint32_t i = 0; r == KVD_OK && i < layout->n_layers; i++) {
        side[i] = (struct kvstate_rows){p, p + block * layout->layers[i].k_row_bytes, first - skip};
        p += block * (layout->layers[i].k_row_bytes + layout->layers[i].v_row_bytes);
    }
    if (r == KVD_OK) {
        name_rows(sharing, side, first - skip, (int)group);
        r = kvd_load(sharing->prefix, first / block, 1, dtype, sharing->layers, flags);
    }
    for (uint32_t i = g->first_layer; r == KVD_OK && i < g->first_layer + g->n_layers; i++) {
        size_t k = layout->layers[i].k_row_bytes, v = layout->layers[i].v_row_bytes;

        memcpy(rows[i].k, side[i].k + skip * k, (block - skip) * k);
        memcpy(rows[i].v, side[i].v + skip * v, (block - skip) * v);
    }
    free(side);
    free(memory);
    return r;
}

static int load(struct sharing *sharing, uint32_t n)
{
    const struct kvstate_rows *rows;
    double begun = now_msec(), loaded;
    int r = kvstate_put_begin(sharing->engine->state, n, &rows);

    if (r < 0)
        return fail_engine(sharing, r, "room for a cached prefix");
    for (uint32_t g = 0; g < sharing->engine->layout->n_groups; g++) {
        r = load_group(sharing, rows, g, n);
        if (r != KVD_OK)
            return fail(sharing, r, "loading a cached prefix");
    }
    loaded = now_msec();
    r = kvstate_put_commit(sharing->engine->state);
    sharing->figures.load_msec = loaded - begun;
    sharing->figures.put_msec = now_msec() - loaded;
    return r < 0 ? fail_engine(sharing, r, "putting a cached prefix into the engine") : 0;
}

uint32_t sharing_restore(struct sharing *sharing, const uint32_t *tokens, uint32_t n_tokens)
{
    uint32_t n = 0;
    int r;

    sharing->tokens = tokens;
    sharing->n_tokens = n_tokens;
    sharing->figures.match_msec = 0;
    r = n_tokens == 0 ? 0 : match(sharing, &n);
    if (r == 0 && sharing->options.wait_msec > 0 && wait_for_others(sharing, n))
        r = match(sharing, &n);
    if (r == 0 && n > 0)
        r = load(sharing, n);
    kvd_release(sharing->prefix);
    if (r != 0) {
        engine_reset(sharing->engine);
        n = 0;
    }
    sharing->figures.n_reused_tokens = n;
    return n;
}

/* ---- From the engine into the cache ------------------------------------------------------------------------------ */

static void count(struct sharing *sharing, const enum kvd_publish_status *status, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        switch (status[i]) {
        case KVD_PUBLISHED:
            sharing->figures.n_published++;
            break;
        case KVD_PRESENT:
            sharing->figures.n_present++;
            break;
        case KVD_FAILED:
            sharing->figures.n_failed++;
            break;
        }
}

int sharing_publish_rows(struct sharing *sharing, uint32_t first, uint32_t n, const struct kvstate_rows *rows)
{
    enum kvd_publish_status *status = calloc(n, sizeof(*status));
    double begun = now_msec();
    int r;

    if (!status)
        return fail(sharing, KVD_E_NOMEM, "publishing");
    name_rows(sharing, rows, first, -1);
    r = kvd_publish(sharing->prefix, sharing->tokens, sharing->n_tokens, first / sharing->options.block_tokens, n, 0,
                    dtype_of(sharing), sharing->layers, status);
    if (r != KVD_OK)
        fail(sharing, r, "publishing");
    count(sharing, status, n);
    free(status);
    sharing->figures.publish_msec += now_msec() - begun;
    return r;
}

int sharing_publish(void *ctx, uint32_t first, uint32_t end)
{
    struct sharing *sharing = ctx;
    uint32_t block = sharing->options.block_tokens, n = end / block - first / block;
    const struct kvstate_rows *rows;
    double begun = now_msec();
    int r;

    if (n == 0)
        return 0;
    r = kvstate_take(sharing->engine->state, first, n * block, &rows);
    if (r < 0) {
        snprintf(sharing->engine->error, sizeof(sharing->engine->error), "taking K and V of tokens %u to %u: %s", first,
                 first + n * block, strerror(-r));
        return r;
    }
    sharing->figures.take_msec += now_msec() - begun;
    sharing_publish_rows(sharing, first, n, rows); /* told in sharing->error */
    return 0;
}
