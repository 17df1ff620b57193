/* Every variant that this machine has writes the scalar variant's bytes and decodes to its bits: random and hostile input, all
 * head sizes, all source types, odd token counts, sub-ranges, guard bytes around everything that is written. */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <time.h>

#include "tests/check_codec_data.h"

#define MAX_DIM 576u
#define MAX_TOKENS 67u
#define GUARD 64u
#define GUARD_BYTE 0xa5

enum kind { K_GAUSS, K_SMALL, K_HUGE, K_ZERO, K_CONSTANT, K_SPARSE, K_BITS, K_TIES, K_ONE_NAN, K_ONE_INF, K_N };

static float value(enum kind kind, uint64_t *state, uint32_t t, uint32_t i)
{
    static const float specials[] = {0.25f, -0.25f, 0.75f, 5.0f, -5.0f, 3.5f, 2.5f, 1.0f, -0.0f, 0.0f, 6.0f, -1.75f, 448.0f, 0x1p-9f};
    uint64_t u = data_random(state);

    switch (kind) {
    case K_SMALL:
        return data_bell(state) * 0x1p-20f * (u % 3 ? 1 : 0x1p-110f);
    case K_HUGE:
        return data_bell(state) * (u % 7 ? 8000.0f : u % 2 ? 16000.0f : 0x1p120f);
    case K_ZERO:
        return u & 1 ? 0.0f : -0.0f;
    case K_CONSTANT:
        return (float)(i + 1) * 0.37f * (i & 1 ? -1 : 1);
    case K_SPARSE:
        return u % 61 ? 0 : data_bell(state) * 100;
    case K_BITS: /* any finite bits; those above a codec's range are refused alike */
        return f32_from_bits((uint32_t)u & (u >> 40 & 1 ? 0xbfffffffu : 0xc7ffffffu));
    case K_TIES:
        return specials[u % (sizeof(specials) / sizeof(specials[0]))] * (float)(1 << t % 5);
    default:
        return data_bell(state) * (i % 16 == 3 ? 20 : 1);
    }
}

static void fill(enum kind kind, uint64_t *state, enum codec_dtype dtype, uint32_t n_tokens, uint32_t dim, size_t stride, uint8_t *p)
{
    for (uint32_t t = 0; t < n_tokens; t++)
        for (uint32_t i = 0; i < dim; i++)
            data_put(dtype, p + t * stride, i, value(kind, state, t, i));
    if (kind == K_ONE_NAN || kind == K_ONE_INF) {
        uint32_t t = (uint32_t)(data_random(state) % n_tokens), i = (uint32_t)(data_random(state) % dim);

        data_put(dtype, p + t * stride, i, kind == K_ONE_NAN ? NAN : t & 1 ? INFINITY : -INFINITY);
    }
}

struct buffers {
    uint8_t src[MAX_TOKENS * (MAX_DIM * 4 + 36)];
    uint8_t side[2][GUARD + 4 * MAX_DIM + 2 * MAX_TOKENS * MAX_DIM / 32 + GUARD];
    uint8_t codes[2][GUARD + MAX_TOKENS * MAX_DIM * 4 + GUARD];
    uint8_t dst[2][GUARD + MAX_TOKENS * (MAX_DIM * 4 + 36) + GUARD];
};

static void guard_init(uint8_t *p, size_t n)
{
    memset(p, GUARD_BYTE, n + 2 * GUARD);
}

static bool guard_intact(const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < GUARD; i++)
        if (p[i] != GUARD_BYTE || p[GUARD + n + i] != GUARD_BYTE)
            return false;
    return true;
}

/* NaN of any payload is one value: which of two comes out of an operation is not specified. */
static bool same_values(enum codec_dtype dtype, const uint8_t *a, const uint8_t *b, size_t n)
{
    if (!memcmp(a, b, n * codec_dtype_bytes(dtype)))
        return true;
    for (size_t i = 0; i < n; i++) {
        float x = data_get(dtype, a, i), y = data_get(dtype, b, i);

        if (!(isnan(x) && isnan(y)) && f32_bits(x) != f32_bits(y))
            return false;
    }
    return true;
}

static void compare_decode(struct buffers *b, const struct codec_ops *ops, const struct codec_spec *spec, uint32_t n_tokens, uint32_t dim,
                           uint32_t t0, uint32_t t1, enum codec_dtype dtype, const char *what)
{
    size_t stride = dim * codec_dtype_bytes(dtype) + (t1 & 1 ? 0 : 6), n = (t1 - t0) * stride;
    const struct codec_ops *both[2] = {&codec_ops_scalar, ops};

    for (int v = 0; v < 2; v++) {
        guard_init(b->dst[v], n);
        ck_assert_int_eq(codec_decode(both[v], spec, NULL, b->side[0] + GUARD, b->codes[0] + GUARD, n_tokens, dim, t0, t1, dtype,
                                      b->dst[v] + GUARD, stride),
                         0);
        ck_assert_msg(guard_intact(b->dst[v], n), "%s: decode wrote outside", what);
    }
    for (uint32_t t = 0; t < t1 - t0; t++)
        ck_assert_msg(same_values(dtype, b->dst[0] + GUARD + t * stride, b->dst[1] + GUARD + t * stride, dim),
                      "%s: token %u of [%u, %u) as %s decodes differently", what, t, t0, t1, codec_dtype_name(dtype));
}

static void compare_case(struct buffers *b, const struct codec_ops *ops, const struct codec_spec *spec, enum codec_dtype dtype,
                         uint32_t n_tokens, uint32_t dim, enum kind kind, uint64_t *state)
{
    size_t side_bytes = codec_side_bytes(spec, n_tokens, dim), code_bytes = codec_code_bytes(spec, n_tokens, dim);
    size_t stride = dim * codec_dtype_bytes(dtype) + (n_tokens % 3 ? 0 : 10);
    const struct codec_ops *both[2] = {&codec_ops_scalar, ops};
    char text[CODEC_TEXT_MAX], what[160];
    int r[2];

    snprintf(what, sizeof(what), "%s %s %s [%u][%u] kind %d", ops->name, codec_spec_format(spec, text), codec_dtype_name(dtype),
             n_tokens, dim, kind);
    fill(kind, state, dtype, n_tokens, dim, stride, b->src);
    for (int v = 0; v < 2; v++) {
        guard_init(b->side[v], side_bytes);
        guard_init(b->codes[v], code_bytes);
        r[v] = codec_encode(both[v], spec, NULL, dtype, b->src, stride, n_tokens, dim, b->side[v] + GUARD, b->codes[v] + GUARD);
        ck_assert_msg(guard_intact(b->side[v], side_bytes), "%s: side data written outside", what);
        ck_assert_msg(guard_intact(b->codes[v], code_bytes), "%s: codes written outside", what);
    }
    ck_assert_msg(r[0] == r[1], "%s: returns %d, scalar %d", what, r[1], r[0]);
    ck_assert(r[0] == 0 || r[0] == -EDOM);
    if (kind == K_ONE_NAN || kind == K_ONE_INF)
        ck_assert_msg((r[0] == 0) == (spec->id == CODEC_RAW && spec->dtype == dtype), "%s: %d", what, r[0]);
    if (r[0] < 0)
        return;
    ck_assert_msg(!memcmp(b->side[0], b->side[1], side_bytes + GUARD), "%s: side data differ", what);
    ck_assert_msg(!memcmp(b->codes[0], b->codes[1], code_bytes + GUARD), "%s: codes differ", what);
    for (int d = 0; d < 3; d++) {
        uint32_t t0 = (uint32_t)(data_random(state) % n_tokens), t1 = t0 + (uint32_t)(data_random(state) % (n_tokens - t0 + 1));

        compare_decode(b, ops, spec, n_tokens, dim, 0, n_tokens, data_dtypes[d], what);
        compare_decode(b, ops, spec, n_tokens, dim, t0, t1, data_dtypes[d], what);
    }
}

/* _i is the example specification. */
START_TEST(variants_agree)
{
    static const uint32_t tokens[] = {1, 3, 64, 67, 17, 32};
    const struct codec_ops *ops[3];
    size_t n_ops = data_variants(ops);
    uint64_t state = data_seed((uint64_t)time(NULL)) + (uint64_t)_i;
    struct buffers *b = malloc(sizeof(*b));
    struct codec_spec spec;

    ck_assert_ptr_nonnull(b);
    ck_assert_int_eq(codec_spec_parse(codec_spec_example((size_t)_i), CODEC_K, &spec, NULL), 0);
    for (size_t v = 1; v < n_ops; v++)
        for (size_t d = 0; d < DATA_N_DIMS; d++)
            for (int dtype = 0; dtype < 3; dtype++)
                for (int kind = 0; kind < K_N; kind++) {
                    uint32_t n_tokens = tokens[data_random(&state) % 6];

                    if (codec_check(&spec, NULL, CODEC_K, n_tokens, data_dims[d], NULL) == 0)
                        compare_case(b, ops[v], &spec, data_dtypes[dtype], n_tokens, data_dims[d], (enum kind)kind, &state);
                }
    free(b);
}
END_TEST

/* Bytes that no encoder writes: the same values everywhere, NaN for NaN, and nothing outside. */
START_TEST(random_bytes_decode_alike)
{
    const struct codec_ops *ops[3];
    size_t n_ops = data_variants(ops);
    uint64_t state = data_seed((uint64_t)time(NULL)) + (uint64_t)_i;
    struct buffers *b = malloc(sizeof(*b));
    struct codec_spec spec;

    ck_assert_ptr_nonnull(b);
    ck_assert_int_eq(codec_spec_parse(codec_spec_example((size_t)_i), CODEC_K, &spec, NULL), 0);
    for (int round = 0; round < 20; round++)
        for (size_t d = 0; d < DATA_N_DIMS; d++) {
            uint32_t n_tokens = 1 + (uint32_t)(data_random(&state) % MAX_TOKENS), dim = data_dims[d];

            if (codec_check(&spec, NULL, CODEC_K, n_tokens, dim, NULL) < 0)
                continue;
            for (size_t i = 0; i < codec_side_bytes(&spec, n_tokens, dim); i++)
                b->side[0][GUARD + i] = (uint8_t)data_random(&state);
            for (size_t i = 0; i < codec_code_bytes(&spec, n_tokens, dim); i++)
                b->codes[0][GUARD + i] = (uint8_t)data_random(&state);
            for (size_t v = 1; v < n_ops; v++)
                compare_decode(b, ops[v], &spec, n_tokens, dim, 0, n_tokens, data_dtypes[round % 3], "random bytes");
        }
    free(b);
}
END_TEST

/* ---- a source that another thread changes ---- */

struct scribbler {
    volatile uint16_t *at;
    size_t n;
    volatile int stop;
};

static void *scribble(void *arg)
{
    struct scribbler *s = arg;
    uint64_t state = 7;

    while (!s->stop)
        for (size_t i = 0; i < s->n; i++)
            s->at[i] = (uint16_t)data_random(&state);
    return NULL;
}

START_TEST(changing_source_is_contained)
{
    const struct codec_ops *ops[3];
    size_t n_ops = data_variants(ops);
    struct buffers *b = malloc(sizeof(*b));
    struct scribbler s = {.at = (volatile uint16_t *)(void *)b->src, .n = 16 * 128};
    pthread_t thread;

    ck_assert_ptr_nonnull(b);
    memset(b->src, 0, sizeof(b->src));
    ck_assert_int_eq(pthread_create(&thread, NULL, scribble, &s), 0);
    for (size_t v = 0; v < n_ops; v++)
        for (int i = 0; codec_spec_example((size_t)i); i++)
            for (int round = 0; round < 200; round++) {
                struct codec_spec spec;
                size_t side_bytes, code_bytes;
                int r;

                ck_assert_int_eq(codec_spec_parse(codec_spec_example((size_t)i), CODEC_K, &spec, NULL), 0);
                side_bytes = codec_side_bytes(&spec, 16, 128);
                code_bytes = codec_code_bytes(&spec, 16, 128);
                guard_init(b->side[0], side_bytes);
                guard_init(b->codes[0], code_bytes);
                r = codec_encode(ops[v], &spec, NULL, CODEC_F16, b->src, 256, 16, 128, b->side[0] + GUARD, b->codes[0] + GUARD);
                ck_assert(r == 0 || r == -EDOM);
                ck_assert(guard_intact(b->side[0], side_bytes));
                ck_assert(guard_intact(b->codes[0], code_bytes));
            }
    s.stop = 1;
    pthread_join(thread, NULL);
    free(b);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("codec_variants");
    TCase *agree = tcase_create("agree"), *contained = tcase_create("contained");
    int n = 0;
    SRunner *runner;

    while (codec_spec_example((size_t)n))
        n++;
    tcase_set_timeout(agree, 300);
    tcase_add_loop_test(agree, variants_agree, 0, n);
    tcase_add_loop_test(agree, random_bytes_decode_alike, 0, n);
    suite_add_tcase(suite, agree);
    tcase_set_timeout(contained, 300);
#ifndef __SANITIZE_THREAD__ /* the race is the point */
    tcase_add_test(contained, changing_source_is_contained);
#endif
    suite_add_tcase(suite, contained);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    n = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n ? EXIT_FAILURE : EXIT_SUCCESS;
}
