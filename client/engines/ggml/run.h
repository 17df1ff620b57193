/* What kvd-ggml does with a prompt: goes on from it, or compares two forms of attention while going on from it. */
#ifndef KVD_GGML_RUN_H
#define KVD_GGML_RUN_H

#include "words.h"
#include "worker.h"

struct run_options {
    uint32_t n_predict;
    int n_threads;
    bool json;
};

/* Generates greedily and prints text as it comes, or one line of JSON. reuse_error: why there is no cache though it was wished for, or
 * NULL. Returns 0 or a negative errno, with a text in worker->error. */
int run_generate(struct worker *worker, const struct words *words, const uint32_t *prompt, uint32_t n_prompt,
                 const struct run_options *options, const char *reuse_error);

/* Generates with one worker, whose attention over the prefix is plain, and gives each token to another one, whose form differs: the
 * next-token distributions of both over the same tokens. Prints one line of JSON: how often both have the same most likely token, and
 * their KL in nats; where the most likely tokens differ ("parted"), its largest there. */
int run_compare(struct worker *plain, struct worker *other, const uint32_t *prompt, uint32_t n_prompt,
                const struct run_options *options);

/* "plain", ...; NULL: no form. */
const char *run_form_name(enum attention_form form);

#endif
