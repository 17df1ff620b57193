/* K and V of one layer in fp32, and plain attention over them: what a worker keeps of the tokens that it computed itself, and of a
 * prefix that it has decoded.
 *
 * Tiles of 64 tokens. K lies transposed in a tile, so that one channel of a query meets 64 tokens at once:
 *   k [tile][head][dim][64], v [tile][head][64][dim]
 *
 * Threads: any number may compute over tiles that nobody changes. Includes: the C library only. */
#ifndef KVD_GGML_TILES_H
#define KVD_GGML_TILES_H

#include <stddef.h>
#include <stdint.h>

#define TILE_TOKENS 64u

/* Instruction sets, as x86-64's levels: v3 has AVX2, v4 AVX-512. */
enum tiles_variant { TILES_BASELINE, TILES_V3, TILES_V4 };

struct tiles {
    uint32_t n_heads, dim;          /* of K and V; dim a multiple of 64 */
    uint32_t first;                 /* position of the first token */
    uint32_t n_tokens, n_room;      /* n_room a multiple of TILE_TOKENS */
    enum tiles_variant variant;
    float *k, *v;
};

/* The best that this machine has; tiles_init() chooses it. */
enum tiles_variant tiles_best_variant(void);

void tiles_init(struct tiles *tiles, uint32_t n_heads, uint32_t dim, uint32_t first);
void tiles_deinit(struct tiles *tiles);
/* Forgets all tokens; the next one has the position first. */
void tiles_reset(struct tiles *tiles, uint32_t first);

/* Makes room for n_tokens in all. Returns 0 or -ENOMEM. */
int tiles_reserve(struct tiles *tiles, uint32_t n_tokens);
/* Appends tokens for which there is room. k and v [n][n_heads][dim]. */
void tiles_append(struct tiles *tiles, const float *k, const float *v, uint32_t n);
/* Copies the tokens [at, at + n), counted from the first, to k and v [n][n_heads][dim]. */
void tiles_copy(const struct tiles *tiles, uint32_t at, uint32_t n, float *k, float *v);

static inline uint32_t tiles_count(const struct tiles *tiles)
{
    return (tiles->n_tokens + TILE_TOKENS - 1) / TILE_TOKENS;
}

/* Queries of n_tokens in a row, the first one at position; q and o [n_tokens][n_heads][dim], lse [n_tokens][n_heads]; n_heads is a
 * multiple of the tiles'. A token sees itself and what is before it, of that the last window tokens only, unless that is 0. */
struct tiles_query {
    const float *q;
    float *o, *lse;
    uint32_t n_tokens, n_heads, position, window;
    float scale;
};

/* Attention of the query's tokens [first, end) over the tiles [first_tile, end_tile). Nothing seen: lse -infinity, o zero. */
void tiles_attend(const struct tiles *tiles, const struct tiles_query *query, uint32_t first, uint32_t end, uint32_t first_tile,
                  uint32_t end_tile);

#endif
