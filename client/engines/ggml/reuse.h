/* What a worker on libggml has of kvd: the model's space, a leased prefix, and the blocks that it publishes.
 *
 * The space is the one that kvd-llama opens for the same file: full layers first, then sliding ones, each kind in the model's order.
 * What either program has computed the other uses.
 *
 * Threads: one at a time. Includes: kvd.h. */
#ifndef KVD_GGML_REUSE_H
#define KVD_GGML_REUSE_H

#include <kvd.h>

#include "attention.h"
#include "gemma.h"

struct reuse_options {
    const char *socket_path; /* NULL: libkvd's default */
    const char *model_name;
    const char *revision; /* digest of the weights */
    uint32_t block_tokens;
    const char *codec_k, *codec_v, *codec_first; /* NULL: libkvd's defaults */
    uint32_t wait_msec; /* for another worker that is computing the same prefix; 0: compute it too */
};

struct reuse {
    const struct gemma *model;
    struct reuse_options options;
    uint32_t *order; /* [n_layers]: the space's layer of each of the model's */
    uint32_t n_groups;
    kvd *session;
    kvd_space *space;
    kvd_prefix *prefix;
    const uint32_t *tokens; /* borrowed, from reuse_match() on */
    uint32_t n_tokens, n_matched;
    uint32_t n_published, n_present, n_failed; /* blocks */
    double match_msec, wait_msec, load_msec, publish_msec;
    char error[512]; /* of the last call that failed */
};

/* Attaches and opens the model's space. n_context: tokens of the longest sequence. The strings of options are borrowed for the call. To be freed with
 * reuse_close(), also after a failure. Returns an enum kvd_error, with a text in reuse->error. */
int reuse_open(const struct gemma *model, const struct reuse_options *options, uint32_t n_context, struct reuse *reuse);
void reuse_close(struct reuse *reuse);

/* Leases the longest cached prefix of tokens that leaves at least one to compute, until the next match or reuse_close(). tokens are
 * borrowed until then. If another worker is computing more of it: waits for that. Returns an enum kvd_error; none for a miss. */
int reuse_match(struct reuse *reuse, const uint32_t *tokens, uint32_t n_tokens);

/* The attention's layers, with their places in the space; to be given to attention_init(). NULL: no memory. reuse NULL: as without kvd. */
struct attention_layer *reuse_layers(const struct gemma *model, const struct reuse *reuse);

/* Begins an attention over what was matched, in one form, or for ATTENTION_AUTO in that which kvd_attend_choose() finds cheapest for
 * each kind of layer and n_steps tokens. Decodes the layers that are plain. */
int reuse_begin(struct reuse *reuse, struct attention *attention, enum attention_form form, uint64_t n_steps);

/* Publishes the whole blocks of the tokens [first, end) of the prompt, whose K and V the attention holds. A failure is counted. */
int reuse_publish(struct reuse *reuse, const struct attention *attention, uint32_t first, uint32_t end);

#endif
