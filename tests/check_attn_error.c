/* How far the variants of attention are from fp64: a table by codec, head size, rows a KV head, and what hides or caps scores; every
 * figure within the bounds of docs/attention.md. */
#include "tests/check_attn_scene.h"

enum feature { PLAIN, WINDOW, CAP, SINKS, ALL, N_FEATURES };

/* The worst error of all variants, for one combination. */
static double table_case(const char *k, const char *v, uint32_t dim, uint32_t gqa, enum feature feature,
                         uint64_t *state)
{
    const struct attn_ops *ops[4];
    size_t n_ops = scene_variants(ops);
    struct scene s = {0};
    struct result want;
    double worst = 0;

    if (!layout_of(s.layout, k, v, 64, dim, dim))
        return -1;
    s.layout[1] = s.layout[0];
    s.params.dim_o = dim;
    s.params.window = feature == WINDOW || feature == SINKS || feature == ALL ? 90 : 0;
    s.params.sink_tokens = feature == SINKS || feature == ALL ? 4 : 0;
    s.params.softcap = feature == CAP || feature == ALL ? 30 : 0;
    scene_blocks(&s, state, 3);
    s.blocks[2].n_tokens = 50;
    scene_queries(&s, state, gqa, 3);
    for (uint32_t r = 0; r < gqa; r++)
        s.q_pos[r] = 178;
    want = scene_run(&attn_ops_scalar, &s);
    for (size_t i = 1; i < n_ops; i++) {
        struct result got = scene_run(ops[i], &s);
        double e = scene_compare(k, &s, got, want, scene_bound(&s));

        worst = e > worst ? e : worst;
        scene_result_free(got);
    }
    scene_result_free(want);
    scene_free(&s);
    return worst;
}

START_TEST(table_of_errors)
{
    static const struct {
        const char *k, *v;
    } pairs[] = {{"kc4", "tq4"},
                 {"raw", "raw"},
                 {"bf16", "bf16"},
                 {"f32", "f32"},
                 {"fp8", "fp8"},
                 {"int8", "int8"},
                 {"tq4", "tq4"},
                 {"tq3", "tq3"},
                 {"kc4", "kc4"},
                 {"kc4:grid=e2m1", "tq4"},
                 {"uq4:rotate=off", "uq4"},
                 {"uq4:rotate=on", "uq4:rotate=on"}};
    static const uint32_t gqa[] = {1, 2, 4, 8, 16};
    uint64_t state = data_seed(6);

    printf("worst relative error of o over the variants, against fp64; each figure the worst of its row and column\n");
    printf("%-28s %4s  %8s %8s %8s %8s %8s  %8s %8s %8s %8s %8s\n", "K / V", "D", "GQA 1", "2", "4", "8", "16", "plain",
           "window", "softcap", "sinks", "all");
    for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++)
        for (size_t d = 0; d < DATA_N_DIMS; d++) {
            double by_gqa[5] = {0}, by_feature[N_FEATURES] = {0};
            char name[64];

            for (uint32_t g = 0; g < 5; g++)
                for (enum feature f = PLAIN; f < N_FEATURES; f++) {
                    double e = table_case(pairs[i].k, pairs[i].v, data_dims[d], gqa[g], f, &state);

                    by_gqa[g] = fmax(by_gqa[g], e);
                    by_feature[f] = fmax(by_feature[f], e);
                    if (e < 0)
                        by_gqa[0] = -1;
                }
            if (by_gqa[0] < 0)
                continue; /* the codec has no form for this head size */
            snprintf(name, sizeof(name), "%s / %s", pairs[i].k, pairs[i].v);
            printf("%-28s %4u ", name, data_dims[d]);
            for (uint32_t g = 0; g < 5; g++)
                printf(" %8.1e", by_gqa[g]);
            printf(" ");
            for (enum feature f = PLAIN; f < N_FEATURES; f++)
                printf(" %8.1e", by_feature[f]);
            printf("\n");
        }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("attn_error");
    TCase *tcase = tcase_create("attn_error");
    SRunner *runner;
    int n_failed;

    tcase_set_timeout(tcase, 600);
    tcase_add_test(tcase, table_of_errors);
    suite_add_tcase(suite, tcase);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
