/* Is a sequence that goes on from K and V put back the same, bit by bit, as one that was never interrupted?
 *
 * usage: check_kvstate MODEL.gguf [SEED]. A test of its own and no suite of `make check`, because it needs libllama
 * and a model. */
#include "kvstate.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_UBATCH  512
#define N_CONTEXT 4096
#define N_TAIL    77
#define N_GREEDY  12

struct variant {
    const char *name;
    enum llama_flash_attn_type flash;
    enum ggml_type type;
};

struct recorder {
    uint8_t **k, **v; /* [layer]: all tokens' rows */
};

static void quiet(enum ggml_log_level level, const char *text, void *ctx)
{
    (void)ctx;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(text, stderr);
}

static void require(bool ok, const char *what)
{
    if (!ok) {
        printf("FAIL: %s\n", what);
        exit(1);
    }
}

static struct llama_context *new_context(struct llama_model *model, const struct variant *variant, uint32_t n_sequences)
{
    struct llama_context_params params = llama_context_default_params();
    struct llama_context *context;

    params.n_ctx = N_CONTEXT;
    params.n_batch = params.n_ubatch = N_UBATCH;
    params.n_seq_max = n_sequences;
    params.n_threads = params.n_threads_batch = 2;
    params.flash_attn_type = variant->flash;
    params.type_k = params.type_v = variant->type;
    params.swa_full = false;
    context = llama_init_from_model(model, params);
    require(context, "a context");
    return context;
}

/* Micro-batches end at multiples of N_UBATCH. Records K and V if recorder is not NULL. */
static void compute(struct llama_context *context, kvstate *state, llama_token *tokens, uint32_t first, uint32_t end,
                    const struct recorder *recorder)
{
    while (first < end) {
        uint32_t stop = (first / N_UBATCH + 1) * N_UBATCH, n = (stop < end ? stop : end) - first;

        require(llama_decode(context, llama_batch_get_one(tokens + first, (int32_t)n)) == 0, "llama_decode");
        if (recorder) {
            const struct kvstate_layout *layout = kvstate_get_layout(state);
            const struct kvstate_rows *rows;

            require(kvstate_take(state, first, n, &rows) == 0, "kvstate_take");
            for (uint32_t i = 0; i < layout->n_layers; i++) {
                const struct kvstate_layer *layer = &layout->layers[i];

                memcpy(recorder->k[i] + first * layer->k_row_bytes, rows[i].k, n * layer->k_row_bytes);
                memcpy(recorder->v[i] + first * layer->v_row_bytes, rows[i].v, n * layer->v_row_bytes);
            }
        }
        first += n;
    }
}

static void put(kvstate *state, const struct recorder *recorder, uint32_t n)
{
    const struct kvstate_layout *layout = kvstate_get_layout(state);
    const struct kvstate_rows *rows;

    require(kvstate_put_begin(state, n, &rows) == 0, "kvstate_put_begin");
    for (uint32_t i = 0; i < layout->n_layers; i++) {
        const struct kvstate_layer *layer = &layout->layers[i];
        uint32_t first = rows[i].first_token;

        memcpy(rows[i].k, recorder->k[i] + first * layer->k_row_bytes, (n - first) * layer->k_row_bytes);
        memcpy(rows[i].v, recorder->v[i] + first * layer->v_row_bytes, (n - first) * layer->v_row_bytes);
    }
    require(kvstate_put_commit(state) == 0, "kvstate_put_commit");
}

/* After the tail: its last logits, then N_GREEDY greedy steps with theirs. out: [N_GREEDY + 1][n_vocab] */
static void finish(struct llama_context *context, kvstate *state, llama_token *tokens, uint32_t first, uint32_t end,
                   float *out)
{
    const size_t n_vocab = (size_t)llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context)));

    compute(context, state, tokens, first, end, NULL);
    for (int i = 0; i <= N_GREEDY; i++) {
        const float *logits = llama_get_logits_ith(context, -1);
        llama_token best = 0;

        memcpy(out + i * n_vocab, logits, n_vocab * sizeof(float));
        for (size_t t = 1; t < n_vocab; t++)
            if (logits[t] > logits[best])
                best = (llama_token)t;
        if (i < N_GREEDY)
            require(llama_decode(context, llama_batch_get_one(&best, 1)) == 0, "llama_decode of a token");
    }
}

static void check(struct llama_model *model, const struct variant *variant, llama_token *tokens, uint32_t n_reused,
                  uint32_t n_all)
{
    const size_t n_vocab = (size_t)llama_vocab_n_tokens(llama_model_get_vocab(model));
    float *cold = malloc((N_GREEDY + 1) * n_vocab * sizeof(float)),
          *warm = malloc((N_GREEDY + 1) * n_vocab * sizeof(float));
    struct llama_context *context = new_context(model, variant, 1);
    const struct kvstate_layout *layout;
    const struct kvstate_rows *rows;
    struct recorder recorder;
    const char *reason = "out of memory or engine failure";
    kvstate *state = NULL;
    bool exact, equal;

    if (kvstate_create(context, N_UBATCH, &state, &reason) < 0)
        require(false, reason);
    layout = kvstate_get_layout(state);
    exact = kvstate_is_exact(layout, n_reused);
    recorder.k = calloc(layout->n_layers, sizeof(uint8_t *));
    recorder.v = calloc(layout->n_layers, sizeof(uint8_t *));
    for (uint32_t i = 0; i < layout->n_layers; i++) {
        recorder.k[i] = malloc(n_reused * layout->layers[i].k_row_bytes);
        recorder.v[i] = malloc(n_reused * layout->layers[i].v_row_bytes);
    }
    compute(context, state, tokens, 0, n_reused, &recorder);
    finish(context, state, tokens, n_reused, n_all, cold);
    require(kvstate_take(state, n_all + 1000, 1, &rows) < 0, "a token that is not there is refused");
    if (layout->n_groups > 1 && n_all > 600)
        require(kvstate_take(state, 0, 1, &rows) < 0, "a token that has left its window is refused");
    kvstate_destroy(state);
    llama_free(context);

    context = new_context(model, variant, 1);
    require(kvstate_create(context, N_UBATCH, &state, &reason) == 0, "a second context");
    layout = kvstate_get_layout(state);
    put(state, &recorder, n_reused);
    finish(context, state, tokens, n_reused, n_all, warm);
    equal = memcmp(cold, warm, (N_GREEDY + 1) * n_vocab * sizeof(float)) == 0;
    printf("%-14s %5u tokens put, %5u in all: %s%s\n", variant->name, n_reused, n_all,
           equal ? "equal in every bit" : "differs", exact ? "" : " (not promised)");
    require(equal || !exact, "exactness");

    for (uint32_t i = 0; i < layout->n_layers; i++) {
        free(recorder.k[i]);
        free(recorder.v[i]);
    }
    free(recorder.k);
    free(recorder.v);
    kvstate_destroy(state);
    llama_free(context);
    free(cold);
    free(warm);
}

static void check_refused(struct llama_model *model, const struct variant *variant, uint32_t n_sequences)
{
    struct llama_context *context = new_context(model, variant, n_sequences);
    const char *reason = NULL;
    kvstate *state = NULL;

    require(kvstate_create(context, N_UBATCH, &state, &reason) == -ENOTSUP && !state && reason, "a layout is refused");
    printf("%-14s %5u sequences: refused: %s\n", variant->name, n_sequences, reason);
    llama_free(context);
}

int main(int argc, char **argv)
{
    static const struct variant variants[] = {
        {"flash fp16", LLAMA_FLASH_ATTN_TYPE_ENABLED, GGML_TYPE_F16},
        {"flash fp32", LLAMA_FLASH_ATTN_TYPE_ENABLED, GGML_TYPE_F32},
        {"no flash fp16", LLAMA_FLASH_ATTN_TYPE_DISABLED, GGML_TYPE_F16},
    };
    static const struct variant quantised = {"flash q8_0", LLAMA_FLASH_ATTN_TYPE_ENABLED, GGML_TYPE_Q8_0};
    static const uint32_t reused[] = {64, 512, 1024, 1536, 2048, 3072};
    struct llama_model *model;
    unsigned int seed = argc > 2 ? (unsigned int)strtoul(argv[2], NULL, 10) : 1;
    llama_token tokens[N_CONTEXT];

    if (argc < 2) {
        fprintf(stderr, "usage: check_kvstate MODEL.gguf [SEED]\n");
        return 2;
    }
    setlinebuf(stdout);
    printf("seed %u\n", seed);
    llama_log_set(quiet, NULL);
    llama_backend_init();
    model = llama_model_load_from_file(argv[1], llama_model_default_params());
    require(model, "the model");
    for (int i = 0; i < N_CONTEXT; i++)
        tokens[i] = rand_r(&seed) % llama_vocab_n_tokens(llama_model_get_vocab(model));
    check_refused(model, &quantised, 1);
    check_refused(model, &variants[0], 2);
    for (size_t v = 0; v < sizeof(variants) / sizeof(variants[0]); v++)
        for (size_t i = 0; i < sizeof(reused) / sizeof(reused[0]); i++)
            if (v == 0 || i == 2 || i == 4)
                check(model, &variants[v], tokens, reused[i],
                      (reused[i] / 512 + (i == 4)) * 512 + N_TAIL + (reused[i] < 512) * 64);
    llama_model_free(model);
    llama_backend_free();
    printf("all passed\n");
    return 0;
}
