/* One sequence's prefix, shared through kvd: what is cached goes into the engine, what the engine computes goes into
 * the cache. */
#ifndef KVD_LLAMA_SHARING_H
#define KVD_LLAMA_SHARING_H

#include <kvd.h>

#include "engine.h"

struct sharing_options {
    const char *socket_path; /* NULL: libkvd's default */
    const char *model_name;
    const char *revision; /* digest of the weights */
    uint32_t block_tokens;
    const char *codec_k, *codec_v, *codec_first; /* NULL: libkvd's defaults */
    uint32_t wait_msec; /* for another worker that is computing the same prefix; 0: compute it twice */
    bool verify;        /* check each block's checksum before it is used */
    /* Reuse only as much as leaves every later token in a micro-batch and a cell that it has without the cache. With
     * codecs that lose nothing the run is then equal to one without the cache, in every bit. */
    bool exact;
};

struct sharing_figures {
    double match_msec, wait_msec, load_msec, put_msec, take_msec, publish_msec;
    uint32_t n_matched_tokens;                 /* that the cache had */
    uint32_t n_reused_tokens;                  /* that were put into the engine */
    uint32_t n_published, n_present, n_failed; /* blocks */
    uint64_t block_bytes, block_fp16_bytes;    /* of one block that is not the first: as cached, and in 16-bit floats */
};

struct sharing {
    struct engine *engine;
    struct sharing_options options;
    kvd *session;
    kvd_space *space;
    kvd_prefix *prefix;
    const uint32_t *tokens; /* borrowed, from sharing_restore() on */
    uint32_t n_tokens;
    struct kvd_kv *layers; /* one a layer, for a load or a publish */
    struct sharing_figures figures;
    char error[768]; /* of the last call that failed, or of a publish that did not succeed */
};

/* Attaches and opens the model's space. engine and what options points to are kept until sharing_close(), which is
 * also to be called after a failure. Returns 0 or an enum kvd_error, with a text in sharing->error. */
int sharing_open(struct engine *engine, const struct sharing_options *options, struct sharing *sharing);
void sharing_close(struct sharing *sharing);

/* Finds the longest cached prefix of tokens that leaves at least one token to compute, and puts it into the engine.
 * tokens are borrowed until the next call. Returns the number of tokens that the engine now holds; 0 on any failure of
 * the cache (its text in sharing->error): a cache must never stop a worker. */
uint32_t sharing_restore(struct sharing *sharing, const uint32_t *tokens, uint32_t n_tokens);

/* For engine_compute(): publishes the whole blocks of a micro-batch that was just computed; ctx is the sharing. A
 * failure to publish is counted and told in error, and is no failure of the run; negative errno: the engine failed. */
int sharing_publish(void *ctx, uint32_t first, uint32_t end);

/* Publishes n whole blocks of the sequence that was last restored, whose K and V are in rows from token first on.
 * Returns 0, or an enum kvd_error with a text in sharing->error. */
int sharing_publish_rows(struct sharing *sharing, uint32_t first, uint32_t n, const struct kvstate_rows *rows);

#endif
