/* Built with -O3. What costs is compiled for three instruction sets; a struct tiles says which. */
#include "tiles.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 4u  /* queries that one pass over a tile serves */
#define LANES 16u
#define TILE_VECTORS (TILE_TOKENS / LANES)

typedef float vector __attribute__((vector_size(64), aligned(64)));
typedef int32_t integers __attribute__((vector_size(64), aligned(64)));

#define INLINE static inline __attribute__((always_inline))

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

void tiles_init(struct tiles *tiles, uint32_t n_heads, uint32_t dim, uint32_t first)
{
    *tiles = (struct tiles){.n_heads = n_heads, .dim = dim, .first = first, .variant = tiles_best_variant()};
}

enum tiles_variant tiles_best_variant(void)
{
    return __builtin_cpu_supports("x86-64-v4")   ? TILES_V4
           : __builtin_cpu_supports("x86-64-v3") ? TILES_V3
                                                 : TILES_BASELINE;
}

void tiles_deinit(struct tiles *tiles)
{
    free(tiles->k);
    free(tiles->v);
    *tiles = (struct tiles){0};
}

void tiles_reset(struct tiles *tiles, uint32_t first)
{
    tiles->first = first;
    tiles->n_tokens = 0;
}

static float *grow(float *old, size_t n_old, size_t n)
{
    float *p = aligned_alloc(64, n * sizeof(*p));

    if (!p)
        return NULL;
    if (n_old > 0)
        memcpy(p, old, n_old * sizeof(*p));
    /* A tile is computed whole: what no token has filled must at least be numbers. */
    memset(p + n_old, 0, (n - n_old) * sizeof(*p));
    free(old);
    return p;
}

int tiles_reserve(struct tiles *tiles, uint32_t n_tokens)
{
    size_t row = (size_t)tiles->n_heads * tiles->dim;
    uint32_t n_room = (n_tokens + TILE_TOKENS - 1) / TILE_TOKENS * TILE_TOKENS;
    float *k, *v;

    if (n_room <= tiles->n_room)
        return 0;
    if (tiles->n_room > 0 && n_room < tiles->n_room + tiles->n_room / 2)
        n_room = (tiles->n_room + tiles->n_room / 2 + TILE_TOKENS - 1) / TILE_TOKENS * TILE_TOKENS;
    k = grow(tiles->k, tiles->n_room * row, n_room * row);
    if (!k)
        return -ENOMEM;
    tiles->k = k;
    v = grow(tiles->v, tiles->n_room * row, n_room * row);
    if (!v)
        return -ENOMEM;
    tiles->v = v;
    tiles->n_room = n_room;
    return 0;
}

static float *tile_k(const struct tiles *tiles, uint32_t tile, uint32_t head)
{
    return tiles->k + ((size_t)tile * tiles->n_heads + head) * tiles->dim * TILE_TOKENS;
}

static float *tile_v(const struct tiles *tiles, uint32_t tile, uint32_t head)
{
    return tiles->v + ((size_t)tile * tiles->n_heads + head) * tiles->dim * TILE_TOKENS;
}

void tiles_append(struct tiles *tiles, const float *k, const float *v, uint32_t n)
{
    uint32_t dim = tiles->dim;

    for (uint32_t i = 0; i < n; i++, tiles->n_tokens++)
        for (uint32_t h = 0; h < tiles->n_heads; h++, k += dim, v += dim) {
            uint32_t t = tiles->n_tokens % TILE_TOKENS;
            float *column = tile_k(tiles, tiles->n_tokens / TILE_TOKENS, h) + t;

            for (uint32_t d = 0; d < dim; d++)
                column[d * TILE_TOKENS] = k[d];
            memcpy(tile_v(tiles, tiles->n_tokens / TILE_TOKENS, h) + (size_t)t * dim, v, dim * sizeof(*v));
        }
}

void tiles_copy(const struct tiles *tiles, uint32_t at, uint32_t n, float *k, float *v)
{
    uint32_t dim = tiles->dim;

    for (uint32_t i = at; i < at + n; i++)
        for (uint32_t h = 0; h < tiles->n_heads; h++, k += dim, v += dim) {
            const float *column = tile_k(tiles, i / TILE_TOKENS, h) + i % TILE_TOKENS;

            for (uint32_t d = 0; d < dim; d++)
                k[d] = column[d * TILE_TOKENS];
            memcpy(v, tile_v(tiles, i / TILE_TOKENS, h) + (size_t)(i % TILE_TOKENS) * dim, dim * sizeof(*v));
        }
}

/* ---- Attention --------------------------------------------------------------------------------------------------- */

/* *x = exp(*x), of numbers <= 0, within 2 units in the last place; below -87 zero. Cody and Waite's reduction, a polynomial of degree 6. */
INLINE void exp_vector(vector *x)
{
    vector rounding = (vector){0} + 12582912.0f, n, r, p; /* 1.5 * 2^23: adding it rounds to an integer */
    integers is_tiny = *x < -87.0f;

    n = (vector)(((integers)*x & ~is_tiny) | ((integers)((vector){0} - 87.0f) & is_tiny));
    r = n;
    n = n * 1.44269504f + rounding - rounding;
    r = r - n * 0.693359375f - n * -2.12194440e-4f;
    p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1;
    p = (vector)((integers)p + (__builtin_convertvector(n, integers) << 23));
    *x = (vector)((integers)p & ~is_tiny);
}

/* Four queries of one KV head. */
struct rows {
    const float *q[ROWS];
    float *o[ROWS];
    uint32_t position[ROWS];
    float max[ROWS], sum[ROWS]; /* sum of exp(s - max) */
};

/* scores[r][t] = q[r] . k[t] */
INLINE void dot_tile(const float *k, uint32_t dim, const struct rows *rows, vector (*scores)[TILE_VECTORS])
{
    vector a[ROWS][TILE_VECTORS] = {0};

    for (uint32_t d = 0; d < dim; d++)
        for (uint32_t j = 0; j < TILE_VECTORS; j++) {
            vector x = ((const vector *)k)[d * TILE_VECTORS + j];

            for (uint32_t r = 0; r < ROWS; r++)
                a[r][j] += rows->q[r][d] * x;
        }
    memcpy(scores, a, sizeof(a));
}

/* o[r] = o[r] * keep[r] + sum over t of p[r][t] * v[t] */
INLINE void add_values(const float *v, uint32_t dim, struct rows *rows, const float *keep, const vector (*p)[TILE_VECTORS])
{
    const float *weights = (const float *)p;

    for (uint32_t d = 0; d < dim; d += 4 * LANES) {
        vector a[ROWS][4];

        for (uint32_t r = 0; r < ROWS; r++) {
            memcpy(a[r], rows->o[r] + d, sizeof(a[r]));
            for (uint32_t j = 0; j < 4; j++)
                a[r][j] *= keep[r];
        }
        for (uint32_t t = 0; t < TILE_TOKENS; t++)
            for (uint32_t j = 0; j < 4; j++) {
                vector x = ((const vector *)(v + (size_t)t * dim + d))[j];

                for (uint32_t r = 0; r < ROWS; r++)
                    a[r][j] += weights[r * TILE_TOKENS + t] * x;
            }
        for (uint32_t r = 0; r < ROWS; r++)
            memcpy(rows->o[r] + d, a[r], sizeof(a[r]));
    }
}

/* Leaves -infinity where the query does not see the token. Returns the largest score. */
INLINE float mask_scores(float *scores, uint32_t query, uint32_t window, uint32_t position, uint32_t n)
{
    float max = -INFINITY;

    for (uint32_t t = 0; t < TILE_TOKENS; t++) {
        bool is_seen = t < n && position + t <= query && (window == 0 || query - (position + t) < window);

        scores[t] = is_seen ? scores[t] : -INFINITY;
        max = scores[t] > max ? scores[t] : max;
    }
    return max;
}

/* One step of the online softmax. position: of the tile's first token, n: how many it has. */
INLINE void attend_tile(const float *k, const float *v, uint32_t dim, uint32_t position, uint32_t n, float scale, uint32_t window,
                        struct rows *rows)
{
    vector scores[ROWS][TILE_VECTORS];
    float keep[ROWS];

    dot_tile(k, dim, rows, scores);
    for (uint32_t r = 0; r < ROWS; r++) {
        vector sum = {0};
        float max;

        for (uint32_t j = 0; j < TILE_VECTORS; j++)
            scores[r][j] *= scale;
        max = mask_scores((float *)scores[r], rows->position[r], window, position, n);
        max = max > rows->max[r] ? max : rows->max[r];
        /* Nothing seen yet: any finite number makes all weights zero. */
        keep[r] = rows->max[r] == -INFINITY ? 0 : expf(rows->max[r] - max);
        for (uint32_t j = 0; j < TILE_VECTORS; j++) {
            scores[r][j] -= max == -INFINITY ? 0 : max;
            exp_vector(&scores[r][j]);
            sum += scores[r][j];
        }
        rows->max[r] = max;
        rows->sum[r] *= keep[r];
        for (uint32_t i = 0; i < LANES; i++)
            rows->sum[r] += sum[i];
    }
    add_values(v, dim, rows, keep, scores);
}

/* The tiles of [first, end) of which some token is seen by a query of [low, high]. */
static bool tile_is_seen(uint32_t position, uint32_t n, uint32_t low, uint32_t high, uint32_t window)
{
    return position <= high && (window == 0 || position + n - 1 + window > low);
}

INLINE void attend_rows(const struct tiles *tiles, uint32_t head, float scale, uint32_t window, uint32_t first_tile, uint32_t end_tile,
                        struct rows *rows)
{
    uint32_t low = rows->position[0], high = low;

    for (uint32_t r = 1; r < ROWS; r++) {
        low = rows->position[r] < low ? rows->position[r] : low;
        high = rows->position[r] > high ? rows->position[r] : high;
    }
    for (uint32_t i = first_tile; i < end_tile; i++) {
        uint32_t at = i * TILE_TOKENS, n = tiles->n_tokens - at < TILE_TOKENS ? tiles->n_tokens - at : TILE_TOKENS;

        if (tile_is_seen(tiles->first + at, n, low, high, window))
            attend_tile(tile_k(tiles, i, head), tile_v(tiles, i, head), tiles->dim, tiles->first + at, n, scale, window, rows);
    }
}

static void attend_rows_baseline(const struct tiles *tiles, uint32_t head, float scale, uint32_t window, uint32_t first_tile,
                                 uint32_t end_tile, struct rows *rows)
{
    attend_rows(tiles, head, scale, window, first_tile, end_tile, rows);
}

__attribute__((target("arch=x86-64-v3"))) static void attend_rows_v3(const struct tiles *tiles, uint32_t head, float scale,
                                                                     uint32_t window, uint32_t first_tile, uint32_t end_tile,
                                                                     struct rows *rows)
{
    attend_rows(tiles, head, scale, window, first_tile, end_tile, rows);
}

__attribute__((target("arch=x86-64-v4"))) static void attend_rows_v4(const struct tiles *tiles, uint32_t head, float scale,
                                                                     uint32_t window, uint32_t first_tile, uint32_t end_tile,
                                                                     struct rows *rows)
{
    attend_rows(tiles, head, scale, window, first_tile, end_tile, rows);
}

typedef void (*attend_rows_fn)(const struct tiles *, uint32_t, float, uint32_t, uint32_t, uint32_t, struct rows *);

static const attend_rows_fn variants[] = {attend_rows_baseline, attend_rows_v3, attend_rows_v4};

/* The rows [at, at + n) of one KV head: row i is query head i % group of token i / group. */
static void attend_some(const struct tiles *tiles, const struct tiles_query *query, uint32_t head, uint32_t at, uint32_t n,
                        uint32_t first_tile, uint32_t end_tile)
{
    uint32_t group = query->n_heads / tiles->n_heads, dim = tiles->dim;
    float spare[256]; /* the output of rows that are not there */
    struct rows rows;
    size_t index[ROWS];

    for (uint32_t r = 0; r < ROWS; r++) {
        uint32_t row = at + (r < n ? r : 0);

        index[r] = (size_t)(row / group) * query->n_heads + head * group + row % group;
        rows.q[r] = query->q + index[r] * dim;
        rows.o[r] = r < n ? query->o + index[r] * dim : spare;
        rows.position[r] = query->position + row / group;
        rows.max[r] = -INFINITY;
        rows.sum[r] = 0;
        memset(rows.o[r], 0, dim * sizeof(float));
    }
    variants[tiles->variant](tiles, head, query->scale, query->window, first_tile, end_tile, &rows);
    for (uint32_t r = 0; r < n; r++) {
        float scale = rows.sum[r] > 0 ? 1 / rows.sum[r] : 0;

        for (uint32_t d = 0; d < dim; d++)
            rows.o[r][d] *= scale;
        query->lse[index[r]] = rows.sum[r] > 0 ? rows.max[r] + logf(rows.sum[r]) : -INFINITY;
    }
}

void tiles_attend(const struct tiles *tiles, const struct tiles_query *query, uint32_t first, uint32_t end, uint32_t first_tile,
                  uint32_t end_tile)
{
    uint32_t group = query->n_heads / tiles->n_heads;

    for (uint32_t head = 0; head < tiles->n_heads; head++)
        for (uint32_t row = first * group; row < end * group; row += ROWS) {
            uint32_t n = end * group - row < ROWS ? end * group - row : ROWS;

            attend_some(tiles, query, head, row, n, first_tile, end_tile);
        }
}
