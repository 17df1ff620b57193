/* A model and a context of it, for one sequence that is computed in micro-batches with fixed boundaries. */
#ifndef KVD_LLAMA_ENGINE_H
#define KVD_LLAMA_ENGINE_H

#include <llama.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvstate.h"

struct engine {
    struct llama_model *model;
    const struct llama_vocab *vocab;
    uint32_t n_vocab;
    /* Micro-batches end at multiples of it: a multiple of block_tokens, at most one window and at most 512. Two runs
     * whose micro-batches end at the same places use the same matrix kernels for each token, and agree in every bit. */
    uint32_t step_tokens;
    /* From engine_start() on. */
    struct llama_context *context;
    uint32_t n_context;
    kvstate *state;
    const struct kvstate_layout *layout;
    char error[512]; /* of the last call that failed */
};

/* Loads the model. Everything is to be freed with engine_close(), also after a failure. block_tokens: micro-batches
 * are whole blocks. Returns 0, or a negative errno with a text in engine->error. */
int engine_open(const char *model_path, uint32_t block_tokens, struct engine *engine);

/* Makes the context, with room for n_context tokens, K and V in fp16 or, with cache_f32, in fp32. Returns as
 * engine_open(); -ENOTSUP: a model whose cache cannot be represented. */
int engine_start(struct engine *engine, uint32_t n_context, int n_threads, bool cache_f32);
void engine_close(struct engine *engine);

/* The tokens of a text; *ret is to be freed with free(). is_start: with the model's token for the beginning of a text.
 * Returns their number or a negative errno. */
int engine_tokenize(struct engine *engine, const char *text, size_t n, bool is_start, uint32_t **ret);

/* Computes tokens [first, end), which must be next in the sequence, in micro-batches. each may be NULL; otherwise it
 * is called after each micro-batch with its range, and a negative result of it ends the run and is returned. */
int engine_compute(struct engine *engine, const uint32_t *tokens, uint32_t first, uint32_t end,
                   int (*each)(void *ctx, uint32_t first, uint32_t end), void *ctx);

/* Computes one token, which is next in the sequence, at a position that must be inside of the context. */
int engine_compute_next(struct engine *engine, uint32_t token, uint32_t position);

/* Computes n tokens in one batch, with the logits of each: *ret [n][n_vocab], valid until the next call. n <=
 * step_tokens. */
int engine_compute_logits(struct engine *engine, const uint32_t *tokens, uint32_t n, const float **ret);

/* The most likely next token. */
uint32_t engine_best(struct engine *engine);

/* Appends a token's text to a buffer of size bytes that has *n of them in use; what does not fit is left out. */
void engine_append_text(const struct engine *engine, uint32_t token, char *buffer, size_t size, size_t *n);

/* Empties the sequence. */
void engine_reset(struct engine *engine);

#endif
