/* How far decoded numbers are from the source: the bounds that docs/codecs.md states for every value, and mean squared errors on
 * synthetic sources against known figures, each within 1 %. Own generator, fixed seeds: the sampling error is part of the 1 %. */
#include <check.h>
#include <errno.h>

#include "tests/check_codec_data.h"

#define DIM 128u

static const struct codec_ops *fastest(void)
{
    struct cpu_features cpu;

    cpu_detect(&cpu);
    return codec_ops_choose(&cpu);
}

/* ---- mean squared error ---- */

enum source { GAUSS, T4, OUTLIERS, UNIFORM };

/* 4 of 128 channels ten times as large for OUTLIERS; uniform of unit variance. */
static float draw(enum source source, uint64_t *state, uint32_t i)
{
    switch (source) {
    case T4:
        return (float)data_t4(state);
    case OUTLIERS:
        return (float)data_gauss(state) * (i % 32 == 5 ? 10 : 1);
    case UNIFORM:
        return (float)((data_uniform(state) - 0.5) * sqrt(12.0));
    case GAUSS:
        break;
    }
    return (float)data_gauss(state);
}

/* Sum of squared errors over that of squares. scaled: vector v is multiplied by 2^u, u running over an octave, and its errors are
 * divided by it. */
static double relative_mse(const char *text, enum source source, uint32_t n_tokens, uint32_t n_blocks, bool scaled)
{
    uint64_t state = 12345 + (uint64_t)source;
    float *x = malloc(4 * n_tokens * DIM), *y = malloc(4 * n_tokens * DIM);
    uint8_t *side = malloc(1 << 16), *codes = malloc(1 << 20);
    double error = 0, power = 0;
    struct codec_spec spec;

    ck_assert_int_eq(codec_spec_parse(text, CODEC_K, &spec, NULL), 0);
    for (uint32_t b = 0; b < n_blocks; b++) {
        for (uint32_t i = 0; i < n_tokens * DIM; i++)
            x[i] = draw(source, &state, i % DIM) * (scaled ? exp2f(((float)(i / DIM % 64) + 0.5f) / 64) : 1);
        ck_assert_int_eq(codec_encode(fastest(), &spec, NULL, CODEC_F32, x, 4 * DIM, n_tokens, DIM, side, codes), 0);
        ck_assert_int_eq(codec_decode(fastest(), &spec, NULL, side, codes, n_tokens, DIM, 0, n_tokens, CODEC_F32, y, 4 * DIM), 0);
        for (uint32_t i = 0; i < n_tokens * DIM; i++) {
            double s = scaled ? exp2(2 * ((double)(i / DIM % 64) + 0.5) / 64) : 1, d = (double)x[i] - (double)y[i];

            error += d * d / s;
            power += (double)x[i] * (double)x[i] / s;
        }
    }
    free(codes);
    free(side);
    free(y);
    free(x);
    return error / power;
}

static const struct {
    const char *text;
    enum source source;
    uint32_t n_tokens;
    bool scaled;
    double mse, tolerance;
} figures[] = {
    /* unit variance */
    {"uq4:rotate=off", GAUSS, 64, false, .017799, .01},
    {"uq4:rotate=on", GAUSS, 64, false, .017822, .01},
    {"uq4:rule=even,rotate=off", GAUSS, 64, false, .012515, .01},
    {"uq4:rule=even,rotate=on", GAUSS, 64, false, .012511, .01},
    {"uq4:rotate=off", T4, 64, false, .02188, .01},
    {"uq4:rotate=on", T4, 64, false, .017451, .01},
    {"uq4:rule=even,rotate=off", T4, 64, false, .01665, .01},
    {"uq4:rule=even,rotate=on", T4, 64, false, .012466, .01},
    {"uq4:rotate=off", OUTLIERS, 64, false, .038461, .01},
    {"uq4:rotate=on", OUTLIERS, 64, false, .014904, .01},
    {"uq4:rule=even,rotate=off", OUTLIERS, 64, false, .029982, .01},
    {"uq4:rule=even,rotate=on", OUTLIERS, 64, false, .011234, .01},
    {"tq4", GAUSS, 64, false, .009186, .01},
    {"tq4", T4, 64, false, .008953, .01},
    {"tq4", OUTLIERS, 64, false, .008365, .01},
    {"tq3", GAUSS, 64, false, .033819, .01},
    {"tq3", T4, 64, false, .032944, .01},
    {"tq3", OUTLIERS, 64, false, .030039, .01},
    {"fp8", GAUSS, 64, false, .000704, .01},
    {"fp8", T4, 64, false, .00070, .01},
    {"fp8", OUTLIERS, 64, false, .000703, .01},
    /* a channel of 32, 64 or 128 tokens is an asymmetric int4 group of that size */
    {"kc4", GAUSS, 32, false, .006116, .01},
    {"kc4", GAUSS, 64, false, .008032, .01},
    {"kc4", GAUSS, 128, false, .009950, .01},
    {"kc4", OUTLIERS, 64, false, .008032, .01},
    /* averaged over an octave of scale */
    {"uq4:rotate=off", GAUSS, 64, true, .016812, .01},
    {"uq4:rule=even,rotate=off", GAUSS, 64, true, .012612, .01},
    {"uq4:rotate=on", T4, 64, true, .016712, .01},
    {"uq4:rule=even,rotate=on", T4, 64, true, .012496, .01},
    {"uq4:rotate=off", UNIFORM, 64, true, .017276, .01},
    {"uq4:rule=even,rotate=off", UNIFORM, 64, true, .011198, .01},
};

START_TEST(mean_squared_error)
{
    double mse = relative_mse(figures[_i].text, figures[_i].source, figures[_i].n_tokens, 32768 / figures[_i].n_tokens, figures[_i].scaled);

    ck_assert_msg(fabs(mse / figures[_i].mse - 1) <= figures[_i].tolerance, "%s source %d tokens %u: %.6f, not %.6f", figures[_i].text,
                  figures[_i].source, figures[_i].n_tokens, mse, figures[_i].mse);
}
END_TEST

/* ---- bounds for every value ---- */

#define TOKENS 37u

struct block {
    uint32_t dim;
    float x[TOKENS * 576], y[TOKENS * 576];
    uint8_t side[1 << 14], codes[1 << 18];
};

/* Values of very different sizes; some channels are far from zero. */
static void fill(struct block *b, uint64_t *state, uint32_t dim)
{
    b->dim = dim;
    for (uint32_t i = 0; i < TOKENS * dim; i++) {
        float size = ldexpf(1, (int)(i % dim % 13) - 6);

        b->x[i] = ((float)data_gauss(state) + (i % dim % 7 == 3 ? 20 : 0)) * size * (i / dim % 5 == 2 ? 30 : 1);
    }
}

static void round_trip(struct block *b, const char *text, struct codec_spec *ret_spec)
{
    ck_assert_int_eq(codec_spec_parse(text, CODEC_V, ret_spec, NULL), 0);
    ck_assert_int_eq(codec_encode(fastest(), ret_spec, NULL, CODEC_F32, b->x, 4 * b->dim, TOKENS, b->dim, b->side, b->codes), 0);
    ck_assert_int_eq(
        codec_decode(fastest(), ret_spec, NULL, b->side, b->codes, TOKENS, b->dim, 0, TOKENS, CODEC_F32, b->y, 4 * b->dim), 0);
}

/* At least one head size and many seeds a codec; _i is the head size. */
START_TEST(bound_kc4)
{
    uint64_t state = data_seed(10) + (uint64_t)_i;
    struct block *b = malloc(sizeof(*b));
    uint32_t dim = data_dims[_i];
    struct codec_spec spec;

    for (int grid = 0; grid < 2; grid++) {
        fill(b, &state, dim);
        round_trip(b, grid ? "kc4:grid=e2m1" : "kc4", &spec);
        for (uint32_t i = 0; i < TOKENS * dim; i++) {
            double low = (double)f16_to_f32(load_u16(b->side + 2 * (i % dim)));
            double high = (double)f16_to_f32(load_u16(b->side + 2 * (dim + i % dim)));
            double bound = (high - low) / (grid ? 12 : 30) * (1 + 0x1p-16);

            ck_assert(low <= (double)b->x[i] && (double)b->x[i] <= high);
            ck_assert_msg(fabs((double)b->x[i] - (double)b->y[i]) <= bound, "grid %d: %g became %g in [%g, %g]", grid, (double)b->x[i],
                          (double)b->y[i], low, high);
        }
    }
    free(b);
}
END_TEST

/* Lowest and highest of an fp16 channel come back exactly, and so does a constant channel. */
START_TEST(kc4_keeps_extremes)
{
    uint64_t state = data_seed(11) + (uint64_t)_i;
    uint32_t dim = data_dims[_i];
    uint16_t *x = malloc(2 * TOKENS * dim), *y = malloc(2 * TOKENS * dim);
    uint8_t *side = malloc(4 * dim), *codes = malloc(TOKENS * dim / 2);

    for (int grid = 0; grid < 2; grid++) {
        struct codec_spec spec = {.id = CODEC_KC4, .grid = (uint8_t)grid};

        for (uint32_t i = 0; i < TOKENS * dim; i++) { /* any fp16 but infinities and NaN, so lows and highs of all proportions */
            uint16_t h = (uint16_t)data_random(&state);

            x[i] = i % dim == 1 ? 0x3555 : (h & 0x7c00) == 0x7c00 ? (uint16_t)(h ^ 0x4000) : h;
        }
        ck_assert_int_eq(codec_encode(fastest(), &spec, NULL, CODEC_F16, x, 2 * dim, TOKENS, dim, side, codes), 0);
        ck_assert_int_eq(codec_decode(fastest(), &spec, NULL, side, codes, TOKENS, dim, 0, TOKENS, CODEC_F16, y, 2 * dim), 0);
        for (uint32_t i = 0; i < TOKENS * dim; i++) {
            float v = f16_to_f32(x[i]);
            bool lowest = v == f16_to_f32(load_u16(side + 2 * (i % dim))), highest = v == f16_to_f32(load_u16(side + 2 * (dim + i % dim)));

            if (lowest || highest)
                ck_assert_msg(f16_to_f32(y[i]) == v, "%a became %a", (double)v, (double)f16_to_f32(y[i]));
            else
                ck_assert(i % dim != 1);
        }
    }
    free(codes);
    free(side);
    free(y);
    free(x);
}
END_TEST

START_TEST(bound_int8)
{
    uint64_t state = data_seed(12) + (uint64_t)_i;
    struct block *b = malloc(sizeof(*b));
    struct codec_spec spec;

    fill(b, &state, data_dims[_i]);
    round_trip(b, "int8", &spec);
    for (uint32_t t = 0; t < TOKENS; t++) {
        double scale = (double)f16_to_f32(load_u16(b->side + 2 * t)), amax = 0;

        for (uint32_t i = t * b->dim; i < (t + 1) * b->dim; i++) {
            amax = fmax(amax, fabs((double)b->x[i]));
            ck_assert(fabs((double)b->x[i] - (double)b->y[i]) <= scale / 2 * (1 + 0x1p-16));
        }
        ck_assert(scale >= amax / 127 * (1 - 0x1p-23) && scale <= amax / 127 * (1 + 0x1p-10) + 0x1p-24);
    }
    free(b);
}
END_TEST

START_TEST(bound_fp8)
{
    uint64_t state = data_seed(13) + (uint64_t)_i;
    struct block *b = malloc(sizeof(*b));
    struct codec_spec spec;

    fill(b, &state, data_dims[_i]);
    round_trip(b, "fp8", &spec);
    for (uint32_t i = 0; i < TOKENS * b->dim; i++) {
        double x = (double)b->x[i], bound = fmax(fabs(x) * 0x1p-4, 0x1p-10);

        if (fabs(x) > 448)
            ck_assert((double)b->y[i] == copysign(448, x));
        else
            ck_assert(fabs(x - (double)b->y[i]) <= bound);
    }
    free(b);
}
END_TEST

/* Without rotation, by groups: |e| <= amax / 3.5 with the even rule, amax (1 - 6 / 9.06) with ultraquant's. */
START_TEST(bound_uq4)
{
    uint64_t state = data_seed(14) + (uint64_t)_i;
    struct block *b = malloc(sizeof(*b));
    struct codec_spec spec;

    for (int even = 0; even < 2; even++) {
        fill(b, &state, data_dims[_i]);
        if (b->dim % 32)
            break;
        round_trip(b, even ? "uq4:rule=even,rotate=off" : "uq4:rotate=off", &spec);
        for (uint32_t g = 0; g < TOKENS * b->dim; g += 32) {
            double amax = 0;

            for (uint32_t i = g; i < g + 32; i++)
                amax = fmax(amax, fabs((double)b->x[i]));
            for (uint32_t i = g; i < g + 32; i++)
                ck_assert(fabs((double)b->x[i] - (double)b->y[i]) <= amax * (even ? 1 / 3.5 : 0.3382));
        }
    }
    free(b);
}
END_TEST

/* The norm is kept to fp16's precision; the cosine is that of 16 (8) levels even for tokens far from Gaussian. */
START_TEST(bound_tq)
{
    uint64_t state = data_seed(15) + (uint64_t)_i;
    struct block *b = malloc(sizeof(*b));
    struct codec_spec spec;

    for (int bits = 3; bits <= 4; bits++) {
        fill(b, &state, data_dims[_i]);
        round_trip(b, bits == 3 ? "tq3" : "tq4", &spec);
        for (uint32_t t = 0; t < TOKENS; t++) {
            double xx = 0, yy = 0, scale = (double)f16_to_f32(load_u16(b->side + 2 * t));

            for (uint32_t i = t * b->dim; i < (t + 1) * b->dim; i++) {
                xx += (double)b->x[i] * (double)b->x[i];
                yy += (double)b->y[i] * (double)b->y[i];
            }
            ck_assert(scale > 0x1p-14); /* normal in fp16 */
            ck_assert_msg(fabs(sqrt(yy / xx) - 1) <= 0x1p-11 + 0x1p-18, "norm %g became %g", sqrt(xx), sqrt(yy));
        }
    }
    free(b);
}
END_TEST

/* A conversion on the way adds its own rounding and no more: fp16 and bf16 output are fp32 output rounded. */
START_TEST(output_is_rounded_once)
{
    uint64_t state = data_seed(16) + (uint64_t)_i;
    struct block *b = malloc(sizeof(*b));
    uint16_t *half = malloc(2 * TOKENS * 576);
    struct codec_spec spec;

    for (size_t e = 0; codec_spec_example(e); e++)
        for (int d = 0; d < 2; d++) {
            fill(b, &state, data_dims[_i]);
            ck_assert_int_eq(codec_spec_parse(codec_spec_example(e), CODEC_K, &spec, NULL), 0);
            if (codec_check(&spec, NULL, CODEC_K, TOKENS, b->dim, NULL) < 0)
                continue;
            round_trip(b, codec_spec_example(e), &spec);
            ck_assert_int_eq(
                codec_decode(fastest(), &spec, NULL, b->side, b->codes, TOKENS, b->dim, 0, TOKENS, data_dtypes[d], half, 2 * b->dim), 0);
            for (uint32_t i = 0; i < TOKENS * b->dim; i++)
                ck_assert_uint_eq(half[i], d ? f32_to_bf16(b->y[i]) : f32_to_f16(b->y[i]));
        }
    free(half);
    free(b);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("codec_error");
    TCase *mse = tcase_create("mse"), *bounds = tcase_create("bounds");
    SRunner *runner = srunner_create(suite);
    int n_failed, n = (int)DATA_N_DIMS;

    tcase_set_timeout(mse, 300);
    tcase_add_loop_test(mse, mean_squared_error, 0, (int)(sizeof(figures) / sizeof(figures[0])));
    suite_add_tcase(suite, mse);
    tcase_set_timeout(bounds, 120);
    tcase_add_loop_test(bounds, bound_kc4, 0, n);
    tcase_add_loop_test(bounds, kc4_keeps_extremes, 0, n);
    tcase_add_loop_test(bounds, bound_int8, 0, n);
    tcase_add_loop_test(bounds, bound_fp8, 0, n);
    tcase_add_loop_test(bounds, bound_uq4, 0, n);
    tcase_add_loop_test(bounds, bound_tq, 0, n);
    tcase_add_loop_test(bounds, output_is_rounded_once, 0, n);
    suite_add_tcase(suite, bounds);
    srunner_run_all(runner, CK_ENV);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
