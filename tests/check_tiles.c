/* The ggml worker's own attention: fp32 tiles against sums in fp64. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/engines/ggml/tiles.h"

#define MOST 5e-6 /* of an output whose values are within -1 and 1 */

/* One layer, some queries, and what is to come out. */
struct bed {
    uint32_t n_kv_heads, n_heads, dim, n, first, n_queries, position, window;
    float *k, *v, *q, *o, *lse;
    struct tiles tiles;
};

static uint32_t below(uint64_t *seed, uint32_t n)
{
    *seed = *seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((*seed >> 33) % n);
}

static float *numbers(uint64_t *seed, size_t n, float scale)
{
    float *x = malloc(n * sizeof(*x));

    ck_assert_ptr_nonnull(x);
    for (size_t i = 0; i < n; i++)
        x[i] = ((float)below(seed, 20001) / 10000 - 1) * scale;
    return x;
}

static void make(struct bed *b, uint64_t *seed)
{
    size_t row;

    b->n_kv_heads = 1 + below(seed, 3);
    b->n_heads = b->n_kv_heads * (1 + below(seed, 5));
    b->dim = 64 * (1 + below(seed, 4));
    b->n = 1 + below(seed, 300);
    b->first = below(seed, 200);
    b->n_queries = 1 + below(seed, 30);
    /* Some queries are before all tokens, some far behind them. */
    b->position = below(seed, 2 * (b->first + b->n));
    b->window = below(seed, 2) ? 0 : 1 + below(seed, 150);
    row = (size_t)b->n_kv_heads * b->dim;
    b->k = numbers(seed, b->n * row, 1);
    b->v = numbers(seed, b->n * row, 1);
    b->q = numbers(seed, (size_t)b->n_queries * b->n_heads * b->dim, 8);
    b->o = numbers(seed, (size_t)b->n_queries * b->n_heads * b->dim, 1);
    b->lse = numbers(seed, (size_t)b->n_queries * b->n_heads, 1);
    tiles_init(&b->tiles, b->n_kv_heads, b->dim, b->first);
    for (uint32_t at = 0, some; at < b->n; at += some) {
        some = 1 + below(seed, 60);
        some = some < b->n - at ? some : b->n - at;
        ck_assert_int_eq(tiles_reserve(&b->tiles, at + some), 0);
        tiles_append(&b->tiles, b->k + at * row, b->v + at * row, some);
    }
}

static void drop(struct bed *b)
{
    tiles_deinit(&b->tiles);
    free(b->k);
    free(b->v);
    free(b->q);
    free(b->o);
    free(b->lse);
}

static struct tiles_query query_of(const struct bed *b)
{
    return (struct tiles_query){
        .q = b->q,
        .o = b->o,
        .lse = b->lse,
        .n_tokens = b->n_queries,
        .n_heads = b->n_heads,
        .position = b->position,
        .window = b->window,
        .scale = 1 / sqrtf((float)b->dim),
    };
}

/* The log-sum-exp of the tokens [from, to), and their output. */
static double definition(const struct bed *b, uint32_t query, uint32_t head, uint32_t from, uint32_t to, double *o)
{
    uint32_t kv_head = head / (b->n_heads / b->n_kv_heads), position = b->position + query;
    const float *q = b->q + ((size_t)query * b->n_heads + head) * b->dim;
    double sum = 0;

    memset(o, 0, b->dim * sizeof(*o));
    for (uint32_t t = from; t < to; t++) {
        const float *k = b->k + ((size_t)t * b->n_kv_heads + kv_head) * b->dim;
        const float *v = b->v + ((size_t)t * b->n_kv_heads + kv_head) * b->dim;
        double s = 0;

        if (b->first + t > position || (b->window > 0 && position - (b->first + t) >= b->window))
            continue;
        for (uint32_t c = 0; c < b->dim; c++)
            s += (double)q[c] * k[c];
        s = exp(s * (1 / sqrt(b->dim))); /* at most e^128 */
        sum += s;
        for (uint32_t c = 0; c < b->dim; c++)
            o[c] += s * v[c];
    }
    for (uint32_t c = 0; c < b->dim; c++)
        o[c] = sum > 0 ? o[c] / sum : 0;
    return sum > 0 ? log(sum) : -INFINITY;
}

static void compare(const struct bed *b, uint32_t first_query, uint32_t end_query, uint32_t from, uint32_t to)
{
    double o[256];

    for (uint32_t i = first_query; i < end_query; i++)
        for (uint32_t h = 0; h < b->n_heads; h++) {
            size_t at = (size_t)i * b->n_heads + h;
            double lse = definition(b, i, h, from, to, o);

            if (lse == -INFINITY)
                ck_assert_float_eq(b->lse[at], -INFINITY);
            else
                ck_assert_double_eq_tol(b->lse[at], lse, MOST * (1 + fabs(lse)));
            for (uint32_t c = 0; c < b->dim; c++)
                ck_assert_double_eq_tol(b->o[at * b->dim + c], o[c], MOST);
        }
}

/* Once for each variant that the machine has. */
START_TEST(whole_and_parts)
{
    uint64_t seed = (uint64_t)time(NULL);

    printf("variant %d, seed %llu\n", _i, (unsigned long long)seed);
    for (int round = 0; round < 30; round++) {
        struct bed b;
        struct tiles_query query;
        uint32_t n_tiles, middle, end;

        make(&b, &seed);
        b.tiles.variant = (enum tiles_variant)_i;
        query = query_of(&b);
        n_tiles = tiles_count(&b.tiles);
        tiles_attend(&b.tiles, &query, 0, b.n_queries, 0, n_tiles);
        compare(&b, 0, b.n_queries, 0, b.n);
        /* Some queries, some tiles; an empty range of them too. */
        middle = below(&seed, b.n_queries);
        end = below(&seed, n_tiles + 1);
        tiles_attend(&b.tiles, &query, middle, b.n_queries, 0, end);
        compare(&b, middle, b.n_queries, 0, end * TILE_TOKENS < b.n ? end * TILE_TOKENS : b.n);
        drop(&b);
    }
}
END_TEST

START_TEST(copies_are_equal)
{
    uint64_t seed = (uint64_t)time(NULL);

    printf("seed %llu\n", (unsigned long long)seed);
    for (int round = 0; round < 40; round++) {
        struct bed b;
        uint32_t at, n;
        size_t row;
        float *k, *v;

        make(&b, &seed);
        row = (size_t)b.n_kv_heads * b.dim;
        at = below(&seed, b.n);
        n = 1 + below(&seed, b.n - at);
        k = malloc(n * row * sizeof(*k));
        v = malloc(n * row * sizeof(*v));
        tiles_copy(&b.tiles, at, n, k, v);
        ck_assert_mem_eq(k, b.k + at * row, n * row * sizeof(*k));
        ck_assert_mem_eq(v, b.v + at * row, n * row * sizeof(*v));
        free(k);
        free(v);
        drop(&b);
    }
}
END_TEST

/* What was there before is of no effect. */
START_TEST(reset_forgets)
{
    uint64_t seed = 1;
    struct bed b;
    struct tiles_query query;
    size_t row;

    make(&b, &seed);
    row = (size_t)b.n_kv_heads * b.dim;
    tiles_reset(&b.tiles, b.first);
    ck_assert_uint_eq(tiles_count(&b.tiles), 0);
    b.n = b.n < 5 ? b.n : 5;
    memmove(b.k, b.k + row, (b.n - 1) * row * sizeof(*b.k));
    tiles_append(&b.tiles, b.k, b.v, b.n);
    query = query_of(&b);
    tiles_attend(&b.tiles, &query, 0, b.n_queries, 0, 1);
    compare(&b, 0, b.n_queries, 0, b.n);
    drop(&b);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("tiles");
    TCase *cases = tcase_create("tiles");
    SRunner *runner;
    int failed;

    tcase_add_loop_test(cases, whole_and_parts, TILES_BASELINE, (int)tiles_best_variant() + 1);
    tcase_add_test(cases, copies_are_equal);
    tcase_add_test(cases, reset_forgets);
    tcase_set_timeout(cases, 60);
    suite_add_tcase(suite, cases);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
