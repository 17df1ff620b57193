#include "engine.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STEP_TOKENS_MAX 512u /* libllama's own default for a physical batch */

static int fail(struct engine *engine, int error, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(engine->error, sizeof(engine->error), format, args);
    va_end(args);
    return error;
}

/* libllama is talkative; its errors are ours to tell. */
static void log_errors(enum ggml_log_level level, const char *text, void *ctx)
{
    (void)ctx;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(text, stderr);
}

/* At most one window, so that all its K and V are still in the cache afterwards. */
static int choose_step(struct engine *engine, uint32_t block_tokens)
{
    uint32_t window = (uint32_t)llama_model_n_swa(engine->model), most = STEP_TOKENS_MAX;

    if (window > 0 && window < most)
        most = window;
    if (block_tokens == 0 || block_tokens > most)
        return fail(engine, -EINVAL, "a block of %u tokens; this model allows 1 to %u%s", block_tokens, most,
                    window == most ? ", its attention window" : "");
    engine->step_tokens = most / block_tokens * block_tokens;
    return 0;
}

int engine_open(const char *model_path, uint32_t block_tokens, struct engine *engine)
{
    memset(engine, 0, sizeof(*engine));
    llama_log_set(log_errors, NULL);
    llama_backend_init();
    engine->model = llama_model_load_from_file(model_path, llama_model_default_params());
    if (!engine->model)
        return fail(engine, -EIO, "%s: libllama cannot load this model", model_path);
    engine->vocab = llama_model_get_vocab(engine->model);
    engine->n_vocab = (uint32_t)llama_vocab_n_tokens(engine->vocab);
    return choose_step(engine, block_tokens);
}

int engine_start(struct engine *engine, uint32_t n_context, int n_threads, bool cache_f32)
{
    struct llama_context_params params = llama_context_default_params();
    const char *reason = NULL;
    int r;

    params.n_ctx = n_context;
    params.n_batch = params.n_ubatch = engine->step_tokens;
    params.n_seq_max = 1;
    params.n_threads = params.n_threads_batch = n_threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_AUTO;
    params.type_k = params.type_v = cache_f32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
    params.swa_full = false;
    params.no_perf = true;
    engine->context = llama_init_from_model(engine->model, params);
    if (!engine->context)
        return fail(engine, -EIO, "libllama makes no context of %u tokens", n_context);
    engine->n_context = llama_n_ctx_seq(engine->context);
    r = kvstate_create(engine->context, engine->step_tokens, &engine->state, &reason);
    if (r < 0)
        return fail(engine, r, "this model's cache cannot be shared: %s", reason ? reason : strerror(-r));
    engine->layout = kvstate_get_layout(engine->state);
    return 0;
}

void engine_close(struct engine *engine)
{
    engine->state = kvstate_destroy(engine->state);
    if (engine->context)
        llama_free(engine->context);
    if (engine->model)
        llama_model_free(engine->model);
    engine->context = NULL;
    engine->model = NULL;
    llama_backend_free();
}

int engine_tokenize(struct engine *engine, const char *text, size_t n, bool is_start, uint32_t **ret)
{
    size_t room = n + 8; /* a token has at least a byte, but for the ones that libllama adds */
    uint32_t *tokens;
    int got;

    if (n > INT32_MAX - 8)
        return fail(engine, -E2BIG, "a text of %zu bytes", n);
    tokens = malloc(room * sizeof(*tokens));
    if (!tokens)
        return fail(engine, -ENOMEM, "no memory for %zu tokens", room);
    got = llama_tokenize(engine->vocab, text, (int32_t)n, (llama_token *)tokens, (int32_t)room, is_start, false);
    if (got < 0) {
        free(tokens);
        return fail(engine, -EIO, "libllama cannot tokenize a text of %zu bytes", n);
    }
    *ret = tokens;
    return got;
}

static int decode(struct engine *engine, struct llama_batch batch)
{
    int r = llama_decode(engine->context, batch);

    if (r != 0)
        return fail(engine, -EIO, "libllama computes no batch of %d tokens (%d)", batch.n_tokens, r);
    return 0;
}

int engine_compute(struct engine *engine, const uint32_t *tokens, uint32_t first, uint32_t end,
                   int (*each)(void *ctx, uint32_t first, uint32_t end), void *ctx)
{
    int r = 0;

    if (end > engine->n_context)
        return fail(engine, -E2BIG, "%u tokens; the context has room for %u", end, engine->n_context);
    while (first < end && r >= 0) {
        uint32_t stop = (first / engine->step_tokens + 1) * engine->step_tokens;

        stop = stop < end ? stop : end;
        r = decode(engine, llama_batch_get_one((llama_token *)(tokens + first), (int32_t)(stop - first)));
        if (r >= 0 && each)
            r = each(ctx, first, stop);
        first = stop;
    }
    return r;
}

int engine_compute_next(struct engine *engine, uint32_t token, uint32_t position)
{
    llama_token next = (llama_token)token;

    if (position >= engine->n_context)
        return fail(engine, -E2BIG, "the context has room for %u tokens", engine->n_context);
    return decode(engine, llama_batch_get_one(&next, 1));
}

int engine_compute_logits(struct engine *engine, const uint32_t *tokens, uint32_t n, const float **ret)
{
    struct llama_batch batch = llama_batch_get_one((llama_token *)tokens, (int32_t)n);
    int8_t wanted[STEP_TOKENS_MAX];
    int r;

    if (n > engine->step_tokens)
        return fail(engine, -EINVAL, "a batch of %u tokens; at most %u", n, engine->step_tokens);
    memset(wanted, 1, n);
    batch.logits = wanted;
    r = decode(engine, batch);
    if (r < 0)
        return r;
    *ret = llama_get_logits(engine->context);
    return 0;
}

uint32_t engine_best(struct engine *engine)
{
    const float *logits = llama_get_logits_ith(engine->context, -1);
    uint32_t best = 0;

    for (uint32_t i = 1; i < engine->n_vocab; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

void engine_append_text(const struct engine *engine, uint32_t token, char *buffer, size_t size, size_t *n)
{
    int got = llama_token_to_piece(engine->vocab, (llama_token)token, buffer + *n, (int32_t)(size - *n), 0, false);

    if (got > 0)
        *n += (size_t)got;
}

void engine_reset(struct engine *engine)
{
    llama_memory_clear(llama_get_memory(engine->context), false);
}
