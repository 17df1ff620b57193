/* What the variants of attention share: which tokens a row sees, and how scratch memory is laid out. Private to kernels/attn.
 *
 * Includes: attn.h. */
#ifndef KVD_KERNELS_ATTN_ATTN_INT_H
#define KVD_KERNELS_ATTN_ATTN_INT_H

#include <math.h>

#include "kernels/attn/attn.h"

#define ATTN_CHUNK   64u /* tokens whose scores are in work together */
#define ATTN_SUBTILE 16u /* tokens that the scalar variant decodes together */

/* What a row sees of n tokens from position pos on: t < head, and from <= t < to; all within n, head <= from unless it is
 * empty. */
struct attn_sight {
    uint32_t head, from, to;
};

static inline uint32_t attn_clamp(int64_t v, uint32_t n)
{
    return v < 0 ? 0 : v > n ? n : (uint32_t)v;
}

static inline struct attn_sight attn_sight(const struct attn_params *params, uint32_t pos, uint32_t n, uint32_t q_pos)
{
    int64_t past = (int64_t)q_pos + 1 - pos; /* tokens up to the query's own */
    struct attn_sight s = {.to = attn_clamp(past, n)};

    if (params->window) {
        s.from = attn_clamp(past - params->window, s.to);
        s.head = attn_clamp((int64_t)params->sink_tokens - pos, s.from);
    }
    return s;
}

static inline int attn_sight_empty(struct attn_sight s)
{
    return !s.head && s.from >= s.to;
}

/* ---- scratch memory ---- */

static inline size_t attn_align(size_t n)
{
    return (n + 63) & ~(size_t)63;
}

/* Takes n bytes of what is at *at. */
static inline void *attn_take(uint8_t **at, size_t n)
{
    void *p = *at;

    *at += attn_align(n);
    return p;
}

#define ATTN_SUB_BYTES 16384u /* of what the vector variants unpack at a time */
#define ATTN_PAD_BYTES 8192u  /* the codes of 16 tokens */

/* Of the vector variants: attn_part.h takes these in the same order. */
static inline size_t attn_vector_bytes(uint32_t n_rows, uint32_t dim_k, uint32_t dim_o)
{
    size_t rows = (n_rows + 15) & ~15u, keys = (dim_k + 31) / 32 * 32, values = (dim_o + 127) / 128 * 128;

    return rows * (10 * ATTN_CHUNK + 6 * keys + 4 * values) + 8 * keys + ATTN_SUB_BYTES + ATTN_PAD_BYTES +
           13 * 4 * rows;
}

/* Of the scalar variant. */
static inline size_t attn_scalar_bytes(uint32_t n_rows, uint32_t dim_k, uint32_t dim_o)
{
    return attn_align(sizeof(double) * n_rows * dim_o) + 2 * attn_align(2 * sizeof(double) * n_rows) +
           attn_align(sizeof(float) * ATTN_SUBTILE * dim_k) + attn_align(sizeof(float) * ATTN_SUBTILE * dim_o);
}

#endif
