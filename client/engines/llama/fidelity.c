#include "fidelity.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "divergence.h"

#define BATCH_TOKENS 128u /* of the tail; bounds the engine's own buffer of logits */

struct fidelity {
    struct engine *engine;
    struct fidelity_options options;
    const uint32_t *tokens;
    uint8_t **k, **v; /* [layer]: rows of the whole exact prefix */
    float *logits;    /* [tail_tokens][n_vocab], over the exact prefix */
    struct divergence *rows;
    double *sorted;
};

struct fidelity *fidelity_create(struct engine *engine, const struct fidelity_options *options)
{
    const struct kvstate_layout *layout = engine->layout;
    struct fidelity *f = calloc(1, sizeof(*f));
    bool complete;

    if (!f)
        return NULL;
    f->engine = engine;
    f->options = *options;
    f->k = calloc(layout->n_layers, sizeof(*f->k));
    f->v = calloc(layout->n_layers, sizeof(*f->v));
    f->logits = malloc(options->tail_tokens * (size_t)engine->n_vocab * sizeof(*f->logits));
    f->rows = malloc(options->tail_tokens * sizeof(*f->rows));
    f->sorted = malloc(options->tail_tokens * sizeof(*f->sorted));
    complete = f->k && f->v && f->logits && f->rows && f->sorted;
    for (uint32_t i = 0; complete && i < layout->n_layers; i++) {
        f->k[i] = malloc(options->prefix_tokens * layout->layers[i].k_row_bytes);
        f->v[i] = malloc(options->prefix_tokens * layout->layers[i].v_row_bytes);
        complete = f->k[i] && f->v[i];
    }
    return complete ? f : fidelity_destroy(f);
}

struct fidelity *fidelity_destroy(struct fidelity *f)
{
    if (!f)
        return NULL;
    for (uint32_t i = 0; f->k && f->v && i < f->engine->layout->n_layers; i++) {
        free(f->k[i]);
        free(f->v[i]);
    }
    free(f->k);
    free(f->v);
    free(f->logits);
    free(f->rows);
    free(f->sorted);
    free(f);
    return NULL;
}

static int fail(struct fidelity *f, int error, const char *what)
{
    snprintf(f->engine->error, sizeof(f->engine->error), "%s: %s", what, strerror(-error));
    return error;
}

/* ---- The exact run ----------------------------------------------------------------------------------------------- */

static int record(void *ctx, uint32_t first, uint32_t end)
{
    struct fidelity *f = ctx;
    const struct kvstate_layout *layout = f->engine->layout;
    const struct kvstate_rows *rows;
    int r = kvstate_take(f->engine->state, first, end - first, &rows);

    if (r < 0)
        return fail(f, r, "taking K and V");
    for (uint32_t i = 0; i < layout->n_layers; i++) {
        size_t k = layout->layers[i].k_row_bytes, v = layout->layers[i].v_row_bytes;

        memcpy(f->k[i] + first * k, rows[i].k, (end - first) * k);
        memcpy(f->v[i] + first * v, rows[i].v, (end - first) * v);
    }
    return 0;
}

/* Computes the tail over what the engine holds. each gets the logits of [first, first + n) of the tail. */
static int compute_tail(struct fidelity *f,
                        void (*each)(struct fidelity *f, const float *logits, uint32_t first, uint32_t n))
{
    uint32_t batch = BATCH_TOKENS < f->engine->step_tokens ? BATCH_TOKENS : f->engine->step_tokens;

    for (uint32_t i = 0; i < f->options.tail_tokens; i += batch) {
        uint32_t n = f->options.tail_tokens - i < batch ? f->options.tail_tokens - i : batch;
        const float *logits;
        int r = engine_compute_logits(f->engine, f->tokens + f->options.prefix_tokens + i, n, &logits);

        if (r < 0)
            return r;
        each(f, logits, i, n);
    }
    return 0;
}

static void keep(struct fidelity *f, const float *logits, uint32_t first, uint32_t n)
{
    memcpy(f->logits + first * (size_t)f->engine->n_vocab, logits, n * (size_t)f->engine->n_vocab * sizeof(*logits));
}

static void compare(struct fidelity *f, const float *logits, uint32_t first, uint32_t n)
{
    divergence_rows(f->logits + first * (size_t)f->engine->n_vocab, logits,
                    f->tokens + f->options.prefix_tokens + first + 1, n, f->engine->n_vocab, f->options.n_threads,
                    f->rows + first);
}

/* ---- The prefix through a codec ---------------------------------------------------------------------------------- */

/* Copies rows [first, first + n) of one layer's K or V, each block of each head through its codec. dst and src point
 * to row first. */
static int code_rows(const struct fidelity_options *options, const char *plain, const char *wide, bool is_v, bool f32,
                     uint32_t n_heads, uint32_t dim, uint32_t first, uint32_t n, const uint8_t *src, uint8_t *dst)
{
    size_t number = f32 ? 4 : 2, head = dim * number, row = n_heads * head, most = options->block_tokens * head, bytes;
    uint8_t *flat = malloc(most), *code = NULL;
    int r = flat ? KVD_OK : KVD_E_NOMEM;

    for (uint32_t at = first; r == KVD_OK && at < first + n;) {
        const char *spec = at < options->block_tokens ? wide : plain;
        uint32_t end = (at / options->block_tokens + 1) * options->block_tokens, n_tokens;

        end = end < first + n ? end : first + n;
        n_tokens = end - at;
        r = kvd_codec_bytes(spec, is_v, n_tokens, dim, &bytes, NULL);
        if (r == KVD_OK) {
            uint8_t *grown = realloc(code, bytes + 1);

            r = grown ? KVD_OK : KVD_E_NOMEM;
            code = grown ? grown : code;
        }
        for (uint32_t h = 0; r == KVD_OK && h < n_heads; h++) {
            size_t off = (at - first) * row + h * head;

            for (uint32_t t = 0; t < n_tokens; t++)
                memcpy(flat + t * head, src + off + t * row, head);
            r = kvd_codec_encode(spec, is_v, f32 ? KVD_F32 : KVD_F16, flat, n_tokens, dim, code);
            if (r == KVD_OK)
                r = kvd_codec_decode(spec, is_v, code, n_tokens, dim, f32 ? KVD_F32 : KVD_F16, flat);
            for (uint32_t t = 0; t < n_tokens; t++)
                memcpy(dst + off + t * row, flat + t * head, head);
        }
        at = end;
    }
    free(flat);
    free(code);
    return r;
}

/* Puts the exact prefix into the engine, through codec unless that is NULL. */
static int put_prefix(struct fidelity *f, const struct fidelity_codec *codec)
{
    const struct kvstate_layout *layout = f->engine->layout;
    const struct kvstate_rows *rows;
    uint32_t n = f->options.prefix_tokens;
    int r = kvstate_put_begin(f->engine->state, n, &rows);

    if (r < 0)
        return fail(f, r, "room for a prefix");
    for (uint32_t i = 0; i < layout->n_layers; i++) {
        const struct kvstate_layer *layer = &layout->layers[i];
        uint32_t first = rows[i].first_token;
        const uint8_t *k = f->k[i] + first * layer->k_row_bytes, *v = f->v[i] + first * layer->v_row_bytes;
        const char *wide = codec && codec->first[0] ? codec->first : NULL;

        if (!codec) {
            memcpy(rows[i].k, k, (n - first) * layer->k_row_bytes);
            memcpy(rows[i].v, v, (n - first) * layer->v_row_bytes);
            continue;
        }
        r = code_rows(&f->options, codec->k, wide ? wide : codec->k, false, layout->f32, layer->n_kv_heads,
                      layer->dim_k, first, n - first, k, rows[i].k);
        if (r == KVD_OK)
            r = code_rows(&f->options, codec->v, wide ? wide : codec->v, true, layout->f32, layer->n_kv_heads,
                          layer->dim_v, first, n - first, v, rows[i].v);
        if (r != KVD_OK) {
            snprintf(f->engine->error, sizeof(f->engine->error), "codecs %s / %s: %s", codec->k, codec->v,
                     kvd_strerror(r));
            return -EINVAL;
        }
    }
    r = kvstate_put_commit(f->engine->state);
    return r < 0 ? fail(f, r, "putting a prefix into the engine") : 0;
}

/* ---- Results ----------------------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static void summarize(struct fidelity *f, struct fidelity_result *ret)
{
    uint32_t n = f->options.tail_tokens, n_same = 0;
    double sum = 0, squares = 0, nll = 0;

    for (uint32_t i = 0; i < n; i++) {
        f->sorted[i] = f->rows[i].kl;
        sum += f->rows[i].kl;
        squares += f->rows[i].kl * f->rows[i].kl;
        nll += f->rows[i].nll_q - f->rows[i].nll_p;
        n_same += (uint32_t)f->rows[i].same_top;
    }
    qsort(f->sorted, n, sizeof(*f->sorted), ascending);
    ret->kl = sum / n;
    ret->kl_se = n > 1 ? sqrt(fmax(0, squares / n - ret->kl * ret->kl) / (n - 1)) : 0;
    ret->kl_p99 = f->sorted[(n - 1) * 99 / 100];
    ret->top1 = (double)n_same / n;
    ret->ppl_ratio = exp(nll / n);
}

int fidelity_begin(struct fidelity *f, const uint32_t *tokens)
{
    int r;

    f->tokens = tokens;
    engine_reset(f->engine);
    r = engine_compute(f->engine, tokens, 0, f->options.prefix_tokens, record, f);
    /* The exact prefix is put like the coded ones, so that every token is in the same cell and only the codec differs.
     * */
    if (r >= 0)
        r = put_prefix(f, NULL);
    return r < 0 ? r : compute_tail(f, keep);
}

int fidelity_measure(struct fidelity *f, const struct fidelity_codec *codec, struct fidelity_result *ret)
{
    int r = put_prefix(f, codec);

    if (r >= 0)
        r = compute_tail(f, compare);
    if (r >= 0)
        summarize(f, ret);
    return r;
}

/* Publishes the exact prefix from token first on, in pieces of at most this many blocks: staging memory is limited. */
#define PUBLISH_BLOCKS 32u

static int publish_prefix(struct fidelity *f, struct sharing *sharing, uint32_t first)
{
    const struct kvstate_layout *layout = f->engine->layout;
    uint32_t block = f->options.block_tokens, n_blocks = f->options.prefix_tokens / block;
    struct kvstate_rows *rows = calloc(layout->n_layers, sizeof(*rows));
    int r = rows ? 0 : -ENOMEM;

    for (uint32_t i = 0; rows && i < layout->n_layers; i++)
        rows[i] = (struct kvstate_rows){f->k[i], f->v[i], 0};
    for (uint32_t at = first / block; r == 0 && at < n_blocks; at += PUBLISH_BLOCKS) {
        uint32_t n = n_blocks - at < PUBLISH_BLOCKS ? n_blocks - at : PUBLISH_BLOCKS;

        if (sharing_publish_rows(sharing, at * block, n, rows) != 0)
            r = -EIO;
    }
    free(rows);
    return r;
}

int fidelity_measure_shared(struct fidelity *f, struct sharing *sharing, struct fidelity_result *ret)
{
    uint32_t n = f->options.prefix_tokens, reused = sharing_restore(sharing, f->tokens, n + 1);
    int r = 0;

    if (reused < n) {
        r = publish_prefix(f, sharing, reused);
        if (r == 0 && sharing_restore(sharing, f->tokens, n + 1) < n)
            r = -ENODATA;
    }
    if (r < 0) {
        snprintf(f->engine->error, sizeof(f->engine->error), "a prefix through the daemon: %.400s",
                 sharing->error[0] ? sharing->error : "it is not in the cache though it was published");
        return r;
    }
    r = compute_tail(f, compare);
    if (r >= 0)
        summarize(f, ret);
    return r;
}
