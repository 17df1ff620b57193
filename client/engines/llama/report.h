/* The figures of `kvd-llama --fidelity`, as lines of JSON. */
#ifndef KVD_LLAMA_REPORT_H
#define KVD_LLAMA_REPORT_H

#include "engine.h"
#include "sharing.h"

struct report_options {
    uint32_t prefix_tokens, tail_tokens, block_tokens;
    int n_threads;
    const char *codecs; /* K/V[/FIRST],...; NULL: a choice of all */
    char **texts;       /* names of files */
    uint32_t n_texts;
};

/* Measures each codec on each text (the first that is long enough for prefix and tail; shorter ones are passed over
 * with a word on stderr), or, with sharing, the codecs of its space through the daemon. A line for each codec and
 * text, then for each codec over the texts. Returns 0 or a negative errno with a text in the engine's error. */
int report_fidelity(struct engine *engine, struct sharing *sharing, const struct report_options *options);

#endif
