/* What the suites of attention share: a list of blocks with queries and everything else of a call, drawn at random; running it;
 * and comparing results. */
#ifndef KVD_TESTS_CHECK_ATTN_SCENE_H
#define KVD_TESTS_CHECK_ATTN_SCENE_H

#include <check.h>

#include "kernels/attn/attn.h"
#include "tests/check_codec_data.h"

#define BLOCKS_MAX 6u
#define ROWS_MAX   40u

static const char *const scene_codecs[] = {"raw",
                                           "bf16",
                                           "f32",
                                           "fp8",
                                           "int8",
                                           "kc4",
                                           "kc4:grid=e2m1",
                                           "tq4",
                                           "tq3",
                                           "uq4:rotate=off",
                                           "uq4:rule=even,rotate=on"};
#define N_CODECS (sizeof(scene_codecs) / sizeof(scene_codecs[0]))

/* A list of blocks, queries and everything else of a call. Memory is exactly as long as promised, so that a sanitizer sees what
 * goes beyond. */
struct scene {
    struct tile_layout layout[2]; /* of the first block and of the others */
    struct attn_block blocks[BLOCKS_MAX];
    void *tiles[BLOCKS_MAX];
    uint32_t n_blocks;
    struct attn_params params;
    struct attn_rows rows;
    float *q;
    uint32_t *q_pos;
};

struct result {
    float *o, *lse, *block_lse;
};

static inline void *scene_take(size_t align, size_t n)
{
    void *p = NULL;

    ck_assert_int_eq(posix_memalign(&p, align, n ? n : 1), 0);
    return p;
}

static inline uint32_t scene_below(uint64_t *state, uint32_t n)
{
    return (uint32_t)(data_random(state) % n);
}

static inline const struct codec_ops *scene_codec(void)
{
    struct cpu_features cpu;

    cpu_detect(&cpu);
    return codec_ops_choose(&cpu);
}

static inline size_t scene_variants(const struct attn_ops *ret_ops[4])
{
    struct cpu_features cpu;
    size_t n = 0;

    cpu_detect(&cpu);
    ret_ops[n++] = &attn_ops_scalar;
    if (cpu.avx2)
        ret_ops[n++] = &attn_ops_avx2;
    if (cpu.avx512)
        ret_ops[n++] = &attn_ops_avx512;
    if (cpu.avx512 && cpu.avx512_vnni)
        ret_ops[n++] = &attn_ops_avx512_vnni;
    return n;
}

/* false if a codec has no form for its head size. */
static inline bool layout_of(struct tile_layout *l, const char *k, const char *v, uint32_t n_tokens, uint32_t dim_k,
                             uint32_t dim_v)
{
    struct codec_spec ks, vs;

    ck_assert_int_eq(codec_spec_parse(k, CODEC_K, &ks, NULL), 0);
    ck_assert_int_eq(codec_spec_parse(v, CODEC_V, &vs, NULL), 0);
    return tile_layout_init(l, &ks, &vs, n_tokens, dim_k, dim_v, NULL) == 0;
}

/* Keys with channels of different sizes and means, values with tokens of different sizes. */
static inline void tile_fill(const struct tile_layout *l, uint64_t *state, void *tile)
{
    float *k = scene_take(64, 4 * l->n_tokens * l->dim_k), *v = scene_take(64, 4 * l->n_tokens * l->dim_v);

    for (uint32_t i = 0; i < l->n_tokens * l->dim_k; i++) {
        uint32_t c = i % l->dim_k;

        k[i] = (float)(data_gauss(state) * (c % 16 == 3 ? 4 : 1) + (c % 8 == 5 ? 2 : 0));
    }
    for (uint32_t t = 0; t < l->n_tokens; t++)
        for (uint32_t c = 0; c < l->dim_v; c++)
            v[t * l->dim_v + c] = t % 13 == 7 ? 0 : (float)(data_gauss(state) * (1 + t % 3));
    ck_assert_int_eq(tile_encode(scene_codec(), l, NULL, NULL, CODEC_F32, k, 4 * l->dim_k, v, 4 * l->dim_v, tile, NULL),
                     0);
    free(k);
    free(v);
}

/* Queries such that scores are spread by about spread. */
static inline void scene_queries(struct scene *s, uint64_t *state, uint32_t n_rows, float spread)
{
    uint32_t dim = s->layout[1].dim_k;

    s->q = scene_take(64, sizeof(float) * n_rows * dim);
    s->q_pos = scene_take(64, sizeof(uint32_t) * n_rows);
    for (uint32_t i = 0; i < n_rows * dim; i++)
        s->q[i] = (float)data_gauss(state);
    s->params.scale = spread / sqrtf(1.94f * (float)dim);
    s->rows = (struct attn_rows){n_rows, s->q, s->q_pos};
}

static inline void scene_free(struct scene *s)
{
    for (uint32_t b = 0; b < s->n_blocks; b++)
        free(s->tiles[b]);
    free(s->q);
    free(s->q_pos);
}

static inline void scene_blocks(struct scene *s, uint64_t *state, uint32_t n_blocks)
{
    s->n_blocks = n_blocks;
    for (uint32_t b = 0; b < n_blocks; b++) {
        const struct tile_layout *l = s->layout + (b > 0);

        s->tiles[b] = scene_take(TILE_ALIGN, l->bytes);
        tile_fill(l, state, s->tiles[b]);
        s->blocks[b] = (struct attn_block){s->tiles[b], l, b * l->n_tokens, l->n_tokens};
    }
}

static inline struct result scene_run_blocks(const struct attn_ops *ops, const struct scene *s,
                                             const struct attn_block *blocks, uint32_t n_blocks)
{
    const struct tile_layout *l = s->layout + 1;
    uint32_t n = s->rows.n, dim = s->params.dim_o;
    struct result r = {scene_take(64, sizeof(float) * n * dim), scene_take(64, sizeof(float) * n),
                       scene_take(64, sizeof(float) * n * n_blocks)};
    struct attn_out out = {r.o, r.lse, r.block_lse};
    void *work = scene_take(64, attn_work_bytes(n, l->n_tokens, l->dim_k, dim));

    memset(work, 0xff, attn_work_bytes(n, l->n_tokens, l->dim_k, dim)); /* NaNs: nothing of it may be used unwritten */
    ck_assert_int_eq(attn_partial(ops, &s->params, blocks, n_blocks, &s->rows, &out, work), 0);
    free(work);
    return r;
}

static inline struct result scene_run(const struct attn_ops *ops, const struct scene *s)
{
    return scene_run_blocks(ops, s, s->blocks, s->n_blocks);
}

static inline void scene_result_free(struct result r)
{
    free(r.o);
    free(r.lse);
    free(r.block_lse);
}

/* ---- comparing ---- */

/* Relative norm of a row's difference; the absolute one where the row is nothing. */
static inline double row_error(const float *a, const float *b, uint32_t dim)
{
    double difference = 0, norm = 0;

    for (uint32_t i = 0; i < dim; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

/* The bounds of docs/attention.md, for scores spread by 3. */
struct bound {
    double o, lse;
};

static inline struct bound scene_bound(const struct scene *s)
{
    struct bound bound = {1e-5, 1e-5};

    for (uint32_t b = 0; b < s->n_blocks; b++) {
        const struct tile_layout *l = s->blocks[b].layout;
        bool keys = l->k.id == CODEC_KC4 && l->k.grid == CODEC_GRID_INT, values = l->dim_v && l->v.id == CODEC_TQ4;

        bound.o = keys || values ? 1.5e-3 : bound.o;
        bound.lse = keys ? 1e-3 : bound.lse;
    }
    return bound;
}

static inline double scene_compare(const char *what, const struct scene *s, struct result got, struct result want,
                                   struct bound bound)
{
    double worst = 0;

    for (uint32_t r = 0; r < s->rows.n; r++) {
        const float *o = got.o + (size_t)r * s->params.dim_o, *o_want = want.o + (size_t)r * s->params.dim_o;
        double e = row_error(o, o_want, s->params.dim_o);

        if (want.lse[r] == -INFINITY) {
            ck_assert_msg(got.lse[r] == -INFINITY, "%s: row %u sees nothing, lse %g", what, r, (double)got.lse[r]);
            for (uint32_t i = 0; i < s->params.dim_o; i++)
                ck_assert_msg(o[i] == 0, "%s: row %u sees nothing, o %g", what, r, (double)o[i]);
            continue;
        }
        ck_assert_msg(fabs((double)got.lse[r] - (double)want.lse[r]) <=
                          bound.lse * (1 + fabs((double)want.lse[r]) * 1e-2),
                      "%s: row %u lse %.9g, not %.9g", what, r, (double)got.lse[r], (double)want.lse[r]);
        ck_assert_msg(e <= bound.o, "%s: row %u of %u: error %.3g, bound %.3g", what, r, s->rows.n, e, bound.o);
        worst = e > worst ? e : worst;
    }
    return worst;
}

/* Shares of the blocks add up to one; blocks that a row does not see have none. */
static inline void scene_check_shares(const char *what, const struct scene *s, struct result got, uint32_t n_blocks)
{
    for (uint32_t r = 0; r < s->rows.n; r++) {
        double sum = 0;

        for (uint32_t b = 0; b < n_blocks; b++)
            sum += exp((double)got.block_lse[r * n_blocks + b] - (double)got.lse[r]);
        if (got.lse[r] == -INFINITY)
            for (uint32_t b = 0; b < n_blocks; b++)
                ck_assert(got.block_lse[r * n_blocks + b] == -INFINITY);
        else
            ck_assert_msg(fabs(sum - 1) < 1e-4, "%s: row %u: shares add up to %.9g", what, r, sum);
    }
}

/* ---- random cases ---- */

static inline void scene_random(struct scene *s, uint64_t *state, char what[160])
{
    static const uint32_t tokens[] = {1, 7, 16, 33, 64, 64, 64, 100, 256};
    uint32_t n_tokens = tokens[scene_below(state, 9)], dim_k = data_dims[scene_below(state, DATA_N_DIMS)],
             dim_v = dim_k;
    const char *k, *v, *first;

    memset(s, 0, sizeof(*s));
    if (scene_below(state, 4) == 0)
        dim_v = scene_below(state, 2) ? 0 : 16 * (1 + scene_below(state, 16));
    do {
        k = scene_codecs[scene_below(state, N_CODECS)];
        v = scene_below(state, 2) ? scene_codecs[scene_below(state, N_CODECS)] : "tq4";
        first = scene_below(state, 3) ? k : scene_codecs[scene_below(state, N_CODECS)];
    } while (!layout_of(s->layout, first, scene_below(state, 3) ? v : first, n_tokens, dim_k, dim_v) ||
             !layout_of(s->layout + 1, k, v, n_tokens, dim_k, dim_v));
    s->params.dim_o = dim_v ? dim_v : scene_below(state, 2) ? dim_k : 16;
    s->params.softcap = scene_below(state, 3) ? 0 : 20;
    if (scene_below(state, 2)) {
        s->params.window = 1 + scene_below(state, 3 * n_tokens);
        s->params.sink_tokens = scene_below(state, 2) ? 0 : scene_below(state, 2 * n_tokens);
    }
    scene_blocks(s, state, 1 + scene_below(state, BLOCKS_MAX));
    for (uint32_t b = 0; b < s->n_blocks; b++)
        if (b + 1 == s->n_blocks || scene_below(state, 8) == 0)
            s->blocks[b].n_tokens = scene_below(state, n_tokens + 1);
    scene_queries(s, state, 1 + scene_below(state, scene_below(state, 4) ? 9 : ROWS_MAX), 3);
    for (uint32_t r = 0; r < s->rows.n; r++)
        s->q_pos[r] = scene_below(state, 3) ? n_tokens * s->n_blocks + scene_below(state, 4)
                                            : scene_below(state, n_tokens * s->n_blocks);
    snprintf(what, 160, "%s/%s first %u/%u, %u tokens x %u, dims %u %u %u, %u rows, cap %g window %u sinks %u", k, v,
             s->layout[0].k.id, s->layout[0].v.id, n_tokens, s->n_blocks, dim_k, dim_v, s->params.dim_o, s->rows.n,
             (double)s->params.softcap, s->params.window, s->params.sink_tokens);
}

#endif
