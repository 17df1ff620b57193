/* Test worlds: spaces, token sequences and K/V whose every number follows from the block's key, so that whoever uses a block
 * can tell whether its bytes are right without having seen who made it.
 *
 *   prompt (a number) --> tokens of each block --> key (by the library) --> every element of K and V
 *
 * Prompts form a binary tree: block b of prompt p is that of every prompt with the same p >> (DEPTH - b), so that different
 * prompts share beginnings. Elements are 8-bit integers over 64: exact in fp16 and bf16, so raw codecs must return them
 * bit for bit; other codecs must return what encode + decode of the same content by the codec itself returns.
 *
 * Uses libkvd's public header only. */
#ifndef KVD_TESTS_CONTENT_H
#define KVD_TESTS_CONTENT_H

#include <stddef.h>
#include <stdint.h>

#include "client/libkvd/kvd.h"

enum { WORLD_LAYERS_MAX = 8, WORLD_TREE_DEPTH = 6 };

struct world {
    struct kvd_space_desc desc; /* points into this struct: do not copy it */
    struct kvd_layer layers[WORLD_LAYERS_MAX];
    struct kvd_group groups[2];
    char model[64];
};

/* kind: raw, bf16, default, quant, slide, latent, digest, wide or small-block, with an optional "@model". Returns 0, or -1: no such kind. */
int world_init(struct world *w, const char *kind);

void world_tokens(const struct world *w, uint64_t prompt, size_t n_tokens, uint32_t *ret);
/* n digests of desc.digest_bytes. */
void world_digests(const struct world *w, uint64_t prompt, size_t n, uint8_t *ret);

/* K and V of all layers for n_tokens tokens, row-major [token][head][channel] in the space's dtype. */
struct tensors {
    struct kvd_kv kv[WORLD_LAYERS_MAX];
    void *memory;
    size_t bytes;
};
int tensors_init(struct tensors *t, const struct world *w, size_t n_tokens);
void tensors_deinit(struct tensors *t);
/* What no block holds: to see that a load really wrote. */
void tensors_poison(struct tensors *t);

/* Writes the content of the block with this key at token `at` of the tensors. */
void content_fill(const struct world *w, const uint8_t *key, struct tensors *t, size_t at);
/* Elements that differ from what the block with this key must hold, in the layers of group. */
size_t content_check(const struct world *w, const uint8_t *key, uint32_t group, int first,
                     const struct tensors *t, size_t at);

uint64_t test_random(uint64_t *state);

#endif
