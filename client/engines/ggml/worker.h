/* One sequence that is computed: a model, its attention, and what computes the graph.
 *
 * Threads: one at a time. Includes: ggml's public headers. */
#ifndef KVD_GGML_WORKER_H
#define KVD_GGML_WORKER_H

#include <ggml-alloc.h>
#include <ggml-backend.h>

#include "attention.h"
#include "gemma.h"
#include "reuse.h"

struct worker {
    const struct gemma *model;
    struct reuse *reuse; /* NULL: without kvd */
    struct attention attention;
    enum attention_form form;
    ggml_backend_t backend;
    ggml_gallocr_t allocator;
    void *graph_memory;
    uint32_t step_tokens; /* micro-batches end at multiples of it: whole blocks */
    uint32_t n_tokens;    /* of the sequence: those of the prefix and those that were computed */
    uint32_t n_recomputed;
    char error[512];
};

/* model and reuse are kept. To be freed with worker_close(), also after a failure. Returns 0 or a negative errno, with a text in
 * worker->error; so do the calls below. */
int worker_open(const struct gemma *model, struct reuse *reuse, uint32_t block_tokens, enum attention_form form, int n_threads,
                struct worker *worker);
void worker_close(struct worker *worker);

/* Empties the sequence and begins on what reuse_match() has leased; n_steps: tokens that are to be generated. */
int worker_begin(struct worker *worker, uint64_t n_steps);

/* Computes tokens[n] up to the last one, of which the first worker->n_tokens were computed already (or are the prefix's). publish: the
 * whole blocks among them go to kvd. *ret_logits [n_vocab] of the last token, valid until the next call.
 * -ESTALE: the cached prefix could not be attended to; the sequence is empty now, and goes on without it when called again. */
int worker_compute(struct worker *worker, const uint32_t *tokens, uint32_t n, bool publish, const float **ret_logits);

/* The same, again and again until it succeeds or fails for a reason other than kvd. */
int worker_compute_surely(struct worker *worker, const uint32_t *tokens, uint32_t n, bool publish, const float **ret_logits);

/* The logits of each of n tokens in one graph: *ret_logits [n][n_vocab]. */
int worker_compute_logits(struct worker *worker, const uint32_t *tokens, uint32_t n, const float **ret_logits);

/* The most likely token. */
uint32_t worker_best(const struct worker *worker, const float *logits);

#endif
