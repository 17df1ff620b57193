/* What a codec costs a model: a prefix whose K and V went through it, against the exact one, seen in the next-token
 * distributions of a tail that is computed over it. That is what a hit in the cache does. */
#ifndef KVD_LLAMA_FIDELITY_H
#define KVD_LLAMA_FIDELITY_H

#include "engine.h"
#include "sharing.h"

#define FIDELITY_MAX_CODECS 32

struct fidelity_codec {
    char k[64], v[64], first[64]; /* first: of a chain's first block, K and V */
};

struct fidelity_options {
    uint32_t prefix_tokens, tail_tokens, block_tokens;
    int n_threads;
    struct fidelity_codec codecs[FIDELITY_MAX_CODECS];
    uint32_t n_codecs;
};

struct fidelity_result {
    double kl, kl_se, kl_p99; /* mean over the tail, its standard error, 99th percentile; nats */
    double top1;              /* share of tokens for which both have the same most likely next one */
    double ppl_ratio;         /* perplexity of the tail over the coded prefix / over the exact one */
};

struct fidelity;

/* Memory for tail_tokens rows of logits (half a GiB with 512 tokens and 262,144 words). NULL: none. */
struct fidelity *fidelity_create(struct engine *engine, const struct fidelity_options *options);
struct fidelity *fidelity_destroy(struct fidelity *fidelity);

/* Computes the exact prefix and tail of a text; tokens: [prefix_tokens + tail_tokens + 1], borrowed until the next
 * call. Returns 0, or a negative errno with a text in the engine's error. */
int fidelity_begin(struct fidelity *fidelity, const uint32_t *tokens);

/* The text's tail over its prefix after encode and decode in this process. */
int fidelity_measure(struct fidelity *fidelity, const struct fidelity_codec *codec, struct fidelity_result *ret);

/* The same over the prefix as the daemon hands it out, after publishing it where it is not there yet. prefix_tokens
 * must be whole blocks. -ENODATA: the cache did not hold on to the prefix. */
int fidelity_measure_shared(struct fidelity *fidelity, struct sharing *sharing, struct fidelity_result *ret);

#endif
