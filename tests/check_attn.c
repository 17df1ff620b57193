/* Attention over encoded blocks: the scalar variant against a direct evaluation of the header's formulas, every other variant
 * against the scalar one within the bounds of docs/attention.md, merges, refusals, and tiles of garbage. Random cases print their
 * seed. */
#include <errno.h>

#include "tests/check_attn_scene.h"

/* The header's formulas, one row, as they stand there. */
static void direct(const struct scene *s, uint32_t row, double *o, double *ret_lse)
{
    const struct attn_params *p = &s->params;
    const struct tile_layout *l = s->layout + 1;
    uint32_t n_all = s->n_blocks * l->n_tokens, dim_v = l->dim_v ? l->dim_v : l->dim_k;
    double *score = scene_take(64, sizeof(double) * n_all), max = -HUGE_VAL, sum = 0;
    float *k = scene_take(64, 4 * n_all * l->dim_k), *v = scene_take(64, 4 * n_all * dim_v);

    for (uint32_t b = 0; b < s->n_blocks; b++)
        ck_assert_int_eq(tile_decode(&codec_ops_scalar, s->blocks[b].layout, NULL, NULL, s->blocks[b].tile, 0,
                                     l->n_tokens, CODEC_F32, k + b * l->n_tokens * l->dim_k, 4 * l->dim_k,
                                     v + b * l->n_tokens * dim_v, 4 * dim_v),
                         0);
    for (uint32_t t = 0; t < n_all; t++) {
        uint32_t pos = t, q_pos = s->q_pos[row];
        bool visible = pos <= q_pos && (p->window == 0 || q_pos - pos < p->window || pos < p->sink_tokens);
        double dot = 0;

        for (uint32_t i = 0; i < l->dim_k; i++)
            dot += (double)s->q[row * l->dim_k + i] * (double)k[t * l->dim_k + i];
        dot *= (double)p->scale;
        if (p->softcap > 0)
            dot = (double)p->softcap * tanh(dot / (double)p->softcap);
        score[t] = visible && t % l->n_tokens < s->blocks[t / l->n_tokens].n_tokens ? dot : -HUGE_VAL;
        max = fmax(max, score[t]);
    }
    for (uint32_t t = 0; t < n_all; t++)
        sum += max > -HUGE_VAL ? exp(score[t] - max) : 0;
    *ret_lse = max + log(sum);
    for (uint32_t i = 0; i < p->dim_o; i++) {
        o[i] = 0;
        for (uint32_t t = 0; t < n_all && sum > 0; t++)
            o[i] += exp(score[t] - *ret_lse) * (double)(l->dim_v ? v : k)[t * dim_v + i];
    }
    free(score);
    free(k);
    free(v);
}

START_TEST(scalar_is_the_formula)
{
    uint64_t state = data_seed(1);
    double o[CODEC_DIM_MAX], lse;

    for (uint32_t i = 0; i < 60; i++) {
        struct scene s;
        struct result got;
        char what[160];

        scene_random(&s, &state, what);
        got = scene_run(&attn_ops_scalar, &s);
        for (uint32_t r = 0; r < s.rows.n && r < 3; r++) {
            direct(&s, r, o, &lse);
            ck_assert_msg(got.lse[r] == (float)lse || fabs((double)got.lse[r] - lse) < 1e-6 * (1 + fabs(lse)),
                          "%s: lse %g, not %g", what, (double)got.lse[r], lse);
            for (uint32_t c = 0; c < s.params.dim_o; c++)
                ck_assert_msg(fabs((double)got.o[r * s.params.dim_o + c] - o[c]) <= 1e-6 * (1 + fabs(o[c])),
                              "%s: o %g, not %g", what, (double)got.o[r * s.params.dim_o + c], o[c]);
        }
        scene_check_shares(what, &s, got, s.n_blocks);
        scene_result_free(got);
        scene_free(&s);
    }
}
END_TEST

START_TEST(variants_are_near_the_scalar_one)
{
    const struct attn_ops *ops[4];
    size_t n_ops = scene_variants(ops);
    uint64_t state = data_seed(2);

    for (uint32_t i = 0; i < 1500; i++) {
        struct scene s;
        struct result want;
        char what[160];

        scene_random(&s, &state, what);
        want = scene_run(&attn_ops_scalar, &s);
        for (size_t v = 1; v < n_ops; v++) {
            struct result got = scene_run(ops[v], &s);

            scene_compare(what, &s, got, want, scene_bound(&s));
            scene_check_shares(what, &s, got, s.n_blocks);
            scene_result_free(got);
        }
        scene_result_free(want);
        scene_free(&s);
    }
}
END_TEST

/* ---- merging ---- */

static void shuffle(uint64_t *state, uint32_t *order, uint32_t n)
{
    for (uint32_t i = n; i > 1; i--) {
        uint32_t j = scene_below(state, i), x = order[i - 1];

        order[i - 1] = order[j];
        order[j] = x;
    }
}

/* Parts of a random partition of the blocks' tokens, in random order, with an empty one; whole: of all. */
static void check_partition(const char *what, const struct attn_ops *ops, const struct scene *s, uint64_t *state,
                            struct result whole)
{
    struct attn_block parts[BLOCKS_MAX];
    uint32_t dim = s->params.dim_o, n = s->n_blocks, order[BLOCKS_MAX], size;
    struct result sum = scene_run_blocks(ops, s, NULL, 0);

    for (uint32_t i = 0; i < n; i++)
        order[i] = i;
    shuffle(state, order, n);
    for (uint32_t first = 0; first < n; first += size) {
        struct result part;

        size = 1 + scene_below(state, n - first);
        for (uint32_t i = 0; i < size; i++)
            parts[i] = s->blocks[order[first + i]];
        part = scene_run_blocks(ops, s, parts, size);
        for (uint32_t r = 0; r < s->rows.n; r++)
            attn_merge(sum.o + r * dim, sum.lse + r, part.o + r * dim, part.lse[r], dim);
        scene_result_free(part);
    }
    scene_compare(what, s, sum, whole, (struct bound){1e-5, 1e-5});
    scene_result_free(sum);
}

START_TEST(partitions_merge_to_the_whole)
{
    const struct attn_ops *ops[4];
    size_t n_ops = scene_variants(ops);
    uint64_t state = data_seed(3);

    for (uint32_t i = 0; i < 200; i++) {
        struct scene s;
        char what[160];

        scene_random(&s, &state, what);
        for (size_t v = 0; v < n_ops; v++) {
            struct result whole = scene_run(ops[v], &s);

            check_partition(what, ops[v], &s, &state, whole);
            scene_result_free(whole);
        }
        scene_free(&s);
    }
}
END_TEST

START_TEST(a_learned_sink_is_a_partial)
{
    float o[16], zero[16] = {0}, lse = 1.5f;

    for (uint32_t i = 0; i < 16; i++)
        o[i] = (float)i;
    attn_merge(o, &lse, zero, 0.5f, 16); /* a logit of 0.5 */
    ck_assert(fabs((double)lse - log(exp(1.5) + exp(0.5))) < 1e-6);
    for (uint32_t i = 0; i < 16; i++)
        ck_assert(fabs((double)o[i] - i / (1 + exp(-1.0))) < 1e-5);
    attn_merge(o, &lse, zero, -INFINITY, 16); /* nothing: nothing changes */
    ck_assert(fabs((double)o[7] - 7 / (1 + exp(-1.0))) < 1e-5);
    lse = -INFINITY; /* into nothing */
    attn_merge(memset(o, 0, sizeof(o)), &lse, (float[16]){3, 4}, 2.0f, 16);
    ck_assert(lse == 2.0f && o[0] == 3 && o[1] == 4 && o[2] == 0);
    lse = -INFINITY;
    attn_merge(memset(o, 0, sizeof(o)), &lse, zero, -INFINITY, 16);
    ck_assert(lse == -INFINITY && o[0] == 0);
}
END_TEST

/* ---- refusals and garbage ---- */

static int call(const struct scene *s, const struct attn_params *params, const struct attn_block *blocks,
                uint32_t n_blocks)
{
    float o[4 * 128], lse[4];
    struct attn_out out = {o, lse, NULL};
    void *work = scene_take(64, attn_work_bytes(4, 64, 128, 128));
    int r = attn_partial(&attn_ops_scalar, params, blocks, n_blocks, &s->rows, &out, work);

    free(work);
    return r;
}

START_TEST(bad_arguments_are_refused)
{
    uint64_t state = 4;
    struct scene s = {0};
    struct tile_layout other;
    struct attn_block two[2];
    struct attn_params p;

    ck_assert(layout_of(s.layout, "kc4", "tq4", 16, 64, 64) && layout_of(s.layout + 1, "kc4", "tq4", 16, 64, 64));
    s.params.dim_o = 64;
    scene_blocks(&s, &state, 2);
    scene_queries(&s, &state, 2, 3);
    s.q_pos[0] = s.q_pos[1] = 40;
    ck_assert_int_eq(call(&s, &s.params, s.blocks, 2), 0);
    ck_assert_int_eq(call(&s, &s.params, NULL, 0), 0);
#define REFUSED(field, value)                                                                                          \
    p = s.params;                                                                                                      \
    p.field = (value);                                                                                                 \
    ck_assert_int_eq(call(&s, &p, s.blocks, 2), -EINVAL)
    REFUSED(scale, NAN);
    REFUSED(scale, INFINITY);
    REFUSED(softcap, -1);
    REFUSED(softcap, NAN);
    REFUSED(softcap, INFINITY);
    REFUSED(dim_o, 0);
    REFUSED(dim_o, 48);
    REFUSED(dim_o, 80);
    REFUSED(dim_o, 2048);
    memcpy(two, s.blocks, sizeof(two));
    two[1].n_tokens = 17;
    ck_assert_int_eq(call(&s, &s.params, two, 2), -EINVAL);
    two[1] = s.blocks[1];
    two[1].pos = UINT32_MAX - 3;
    ck_assert_int_eq(call(&s, &s.params, two, 2), -EINVAL);
    two[1] = s.blocks[1];
    two[1].tile = (const char *)two[1].tile + 16;
    ck_assert_int_eq(call(&s, &s.params, two, 2), -EINVAL);
    for (int i = 0; i < 3; i++) {
        ck_assert(layout_of(&other, "kc4", "tq4", i == 0 ? 8 : 16, i == 1 ? 32 : 64, i == 2 ? 32 : 64));
        two[1] = s.blocks[1];
        two[1].layout = &other;
        two[1].n_tokens = 1;
        ck_assert_int_eq(call(&s, &s.params, two, 2), -EINVAL);
    }
    s.rows.n = 0;
    ck_assert_int_eq(call(&s, &s.params, s.blocks, 2), -EINVAL);
    scene_free(&s);
}
END_TEST

START_TEST(any_bytes_are_a_tile)
{
    const struct attn_ops *ops[4];
    size_t n_ops = scene_variants(ops);
    uint64_t state = data_seed(5);

    for (uint32_t i = 0; i < 400; i++) {
        struct scene s;
        char what[160];

        scene_random(&s, &state, what);
        for (uint32_t b = 0; b < s.n_blocks; b++)
            for (uint32_t at = 0; at < s.blocks[b].layout->bytes; at++)
                ((uint8_t *)s.tiles[b])[at] = (uint8_t)(i % 4 ? data_random(&state) : 0xff);
        s.q_pos[0] = 0;
        s.blocks[0].pos = 1; /* the first row sees none of the first block */
        for (size_t v = 0; v < n_ops; v++) {
            struct result got = scene_run(ops[v], &s);

            ck_assert_msg(got.block_lse[0] == -INFINITY, "%s", what);
            scene_result_free(got);
        }
        scene_free(&s);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("attn");
    TCase *tcase = tcase_create("attn");
    SRunner *runner;
    int n_failed;

    tcase_set_timeout(tcase, 600);
    tcase_add_test(tcase, scalar_is_the_formula);
    tcase_add_test(tcase, variants_are_near_the_scalar_one);
    tcase_add_test(tcase, partitions_merge_to_the_whole);
    tcase_add_test(tcase, a_learned_sink_is_a_partial);
    tcase_add_test(tcase, bad_arguments_are_refused);
    tcase_add_test(tcase, any_bytes_are_a_tile);
    suite_add_tcase(suite, tcase);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
