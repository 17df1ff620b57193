/* A model of the Gemma 3 family in a GGUF file, and its graph on libggml's public API: everything but the attention, for which the
 * graph asks its caller.
 *
 * The weights are used where the file is mapped, read-only: any number of processes hold them once.
 *
 * Threads: a model is read-only once it is open. Includes: ggml's public headers. */
#ifndef KVD_GGML_GEMMA_H
#define KVD_GGML_GEMMA_H

#include <ggml-backend.h>
#include <ggml.h>
#include <gguf.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct gemma_layer {
    uint32_t window_tokens; /* 0: full attention */
    float rope_base;
    struct ggml_tensor *attn_norm, *wq, *wk, *wv, *q_norm, *k_norm, *wo, *post_attn_norm;
    struct ggml_tensor *ffn_norm, *ffn_gate, *ffn_up, *ffn_down, *post_ffn_norm;
};

struct gemma {
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, dim, n_ff, n_vocab, n_context;
    float norm_epsilon;
    float scale; /* of the logits of attention */
    struct gemma_layer *layers;
    struct ggml_tensor *embedding, *output_norm; /* the embedding is also the output's matrix */

    struct gguf_context *file;
    struct ggml_context *tensors;
    ggml_backend_buffer_t buffer; /* the mapping, as ggml knows it */
    void *map;
    size_t map_bytes;
    int failure;     /* of gemma_open(), the first one */
    char error[256]; /* of gemma_open() */
};

/* Opens a file. To be freed with gemma_close(), also after a failure. Returns 0 or a negative errno, with a text in model->error:
 * -ENOTSUP is a model that this program does not represent. */
int gemma_open(const char *path, struct gemma *model);
void gemma_close(struct gemma *model);

/* Adds a layer's attention to the graph. q [dim, n_heads, n], k and v [dim, n_kv_heads, n], fp32, contiguous, q and k after their
 * norms and RoPE, q not scaled. Returns [dim * n_heads, n], fp32. */
typedef struct ggml_tensor *(*gemma_attention_fn)(void *ctx, struct ggml_context *context, uint32_t layer, struct ggml_tensor *q,
                                                  struct ggml_tensor *k, struct ggml_tensor *v);

/* One graph, of n tokens in a row. */
struct gemma_graph {
    struct ggml_cgraph *graph;
    struct ggml_tensor *tokens, *positions; /* in: [n] int32 */
    struct ggml_tensor *logits;             /* out: [n_vocab, n_logits], of the last n_logits tokens */
};

/* Memory that a context for gemma_graph_build() needs (no_alloc). */
size_t gemma_graph_bytes(const struct gemma *model);
void gemma_graph_build(const struct gemma *model, struct ggml_context *context, uint32_t n_tokens, uint32_t n_logits,
                       gemma_attention_fn attention, void *ctx, struct gemma_graph *ret);

#endif
