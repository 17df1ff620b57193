/* A prompt and its greedy continuation, with the prefix from the cache if there is one. */
#ifndef KVD_LLAMA_GENERATE_H
#define KVD_LLAMA_GENERATE_H

#include <stdio.h>

#include "engine.h"
#include "sharing.h"

struct generate_result {
    double ttft_msec;    /* from the tokens of the prompt to the first generated token */
    double prefill_msec; /* of it: computing what was not in the cache */
    double total_msec;
    uint32_t n_prompt, n_reused, n_computed, n_generated;
    uint32_t *generated; /* to be freed with free() */
    char *text;          /* the same; 0-terminated */
};

/* sharing: NULL for a run without the cache. Returns 0, or a negative errno with a text in the engine's error. */
int generate(struct engine *engine, struct sharing *sharing, const uint32_t *tokens, uint32_t n_tokens,
             uint32_t n_predict, struct generate_result *ret);

/* One line of JSON. sharing_error: why there is no sharing though it was wished for, or NULL. */
void generate_print_json(FILE *file, const struct generate_result *result, const struct sharing *sharing,
                         const char *sharing_error);
void generate_print_text(FILE *file, const struct generate_result *result, const struct sharing *sharing);

#endif
