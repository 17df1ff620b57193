/* Attention of a ggml graph whose K and V are in two places: a prefix that kvd has, and the tokens that the worker computed itself.
 *
 *   position  0 ............ n_prefix ............... n
 *             leased blocks | tiles of the worker's own (fp32)
 *             in one of three forms: plain (decoded to tiles of the worker's), local or daemon (never decoded)
 *
 * A layer is three nodes of the graph, between which ggml's threads wait for each other:
 *   keep    one thread: appends K and V of the new tokens; begins the prefix's part where kvd computes it
 *   attend  all threads: the worker's own tokens, and a plain prefix; then what there is to do of a local one
 *   merge   one thread: waits for the prefix's part, and merges all parts into the result
 *
 * The daemon thus computes while the worker does. If it fails, the part is computed here, over the same leased blocks.
 *
 * Threads: one graph at a time. Includes: ggml's public header, kvd.h. */
#ifndef KVD_GGML_ATTENTION_H
#define KVD_GGML_ATTENTION_H

#include <ggml.h>
#include <kvd.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tiles.h"

enum attention_form { ATTENTION_PLAIN, ATTENTION_LOCAL, ATTENTION_DAEMON, ATTENTION_AUTO };

struct attention;

struct attention_layer {
    struct attention *attention;
    uint32_t index;               /* of the space's layers */
    uint32_t n_heads, n_kv_heads; /* of queries; of K and V */
    uint32_t window_tokens;
    enum attention_form form;     /* not AUTO */
    struct tiles prefix;          /* a plain prefix; else empty */
    struct tiles own;
    kvd_attending *attending;     /* a local one; else NULL */
};

struct attention {
    uint32_t n_layers, dim, block_tokens;
    float scale;
    int n_threads;
    struct attention_layer *layers;
    kvd_prefix *prefix; /* borrowed; NULL: there is none */
    uint32_t n_prefix;  /* tokens of it that are used: whole blocks */
    uint32_t position;  /* of the first token of the graph that is computed */

    /* While a layer is computed. */
    uint32_t n_parts;
    size_t part_rows;        /* rows that each part has room for */
    float *part_o, *part_lse; /* [n_parts_max][part_rows][dim], [n_parts_max][part_rows] */
    struct kvd_attention request;
    bool is_asked;           /* the prefix's part was begun, or is to be computed when it is merged */
    bool is_pending;         /* kvd is at it */
    uint64_t ticket;

    uint64_t n_asked, n_fallbacks; /* parts of layers: all that kvd was asked for, those that the daemon failed at */
    int error;                     /* enum kvd_error, or KVD_E_NOMEM: the graph's results mean nothing */
    char message[256];
};

/* layers [n_layers] is taken on success: index, head counts and windows are set by the caller, the rest here. Returns 0 or -ENOMEM. */
int attention_init(struct attention *attention, uint32_t n_layers, struct attention_layer *layers, uint32_t dim, uint32_t block_tokens,
                   float scale, int n_threads);
void attention_deinit(struct attention *attention);

/* Forgets everything; the next token comes after a prefix of n_prefix tokens, which stays leased while it is used. forms [n_layers]:
 * where each layer's part of it is computed; a layer that is PLAIN has its tiles filled by the caller. Returns an enum kvd_error. */
int attention_begin(struct attention *attention, kvd_space *space, kvd_prefix *prefix, uint32_t n_prefix,
                    const enum attention_form *forms);

/* Before a graph of n tokens is computed, the first of them at position. Returns 0 or -ENOMEM. */
int attention_prepare(struct attention *attention, uint32_t position, uint32_t n);

/* Adds a layer's nodes; as gemma_attention_fn, ctx is the attention. */
struct ggml_tensor *attention_add(void *ctx, struct ggml_context *context, uint32_t layer, struct ggml_tensor *q, struct ggml_tensor *k,
                                  struct ggml_tensor *v);

/* What a layer's query of n tokens from position on asks of the prefix. False: it sees nothing of it. q NULL: for kvd_attend_choose(). */
bool attention_request(const struct attention *attention, uint32_t layer, uint32_t position, uint32_t n, const float *q,
                       struct kvd_attention *ret);

#endif
