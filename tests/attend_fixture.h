/* What the suites of attention share: a daemon, a space with random blocks in it, leased; an attention with random queries; and
 * fp64 attention over what kvd_load() returns, to compare with. */
#ifndef KVD_TESTS_ATTEND_FIXTURE_H
#define KVD_TESTS_ATTEND_FIXTURE_H

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/content.h"
#include "tests/harness.h"

enum { AT_LAYERS = 2, AT_BLOCKS_MAX = 64 };

/* A space's shape; both its layers are alike, in one group. */
struct at_shape {
    const char *name;
    uint32_t n_kv_heads, ratio, dim_k, dim_v;
    const char *codec_k, *codec_v, *first_k, *first_v;
    uint32_t window, block_tokens;
    enum kvd_dtype dtype;
    double bound; /* of an output's error, in largest values */
};

struct at_bed {
    struct harness h;
    uint64_t random;
    kvd *k;
    kvd_space *space;
    kvd_prefix *prefix;
    struct at_shape shape;
    size_t n_blocks;
    uint32_t *tokens;
    float *load[AT_LAYERS][2]; /* K and V as kvd_load() returns them, [token][kv head][channel] */
    double v_most;             /* largest number of the values */
};

static inline float at_number(uint64_t *state)
{
    return (float)((double)(test_random(state) >> 40) / (1 << 23) - 1.0);
}

static inline void at_put(enum kvd_dtype dtype, void *at, float f)
{
    _Float16 h = (_Float16)f;
    uint32_t bits;

    memcpy(&bits, &f, sizeof(bits));
    bits >>= 16;
    memcpy(at, dtype == KVD_F32 ? (const void *)&f : dtype == KVD_BF16 ? (const void *)&bits : (const void *)&h,
           dtype == KVD_F32 ? 4 : 2);
}

static inline float at_get(enum kvd_dtype dtype, const void *at)
{
    _Float16 h;
    uint32_t bits = 0;
    float f;

    memcpy(&bits, at, dtype == KVD_F32 ? 4 : 2);
    memcpy(&h, &bits, 2);
    bits <<= dtype == KVD_BF16 ? 16 : 0;
    memcpy(&f, &bits, 4);
    return dtype == KVD_F16 ? (float)h : f;
}

static inline void at_attach(const struct at_bed *b, kvd **ret)
{
    struct kvd_options o = KVD_OPTIONS_INIT;

    o.socket_path = b->h.socket;
    o.name = "attend";
    o.timeout_msec = 20000;
    ck_assert_msg(kvd_attach(&o, ret) == KVD_OK, "%s", kvd_message(NULL));
}

static inline kvd_space *at_space(kvd *k, const struct at_shape *s)
{
    struct kvd_space_desc d = KVD_SPACE_INIT;
    struct kvd_group group = {s->window};
    struct kvd_layer layer = {s->n_kv_heads, s->dim_k, s->dim_v, 0, s->codec_k, s->codec_v, s->first_k, s->first_v};
    struct kvd_layer layers[AT_LAYERS] = {layer, layer};
    kvd_space *space = NULL;

    d.model = "attend";
    d.revision = s->name;
    d.dtype = s->dtype;
    d.block_tokens = s->block_tokens;
    d.groups = &group;
    d.n_groups = 1;
    d.layers = layers;
    d.n_layers = AT_LAYERS;
    ck_assert_msg(kvd_space_open(k, &d, &space) == KVD_OK, "%s: %s", s->name, kvd_message(k));
    return space;
}

/* Row-major [n_tokens][n_kv_heads][dim] of one layer. */
static inline struct kvd_kv at_kv(const struct at_shape *s, void *k, void *v, size_t element)
{
    return (struct kvd_kv){k,
                           s->dim_v ? v : NULL,
                           s->n_kv_heads * s->dim_k * element,
                           s->dim_k * element,
                           s->n_kv_heads * s->dim_v * element,
                           s->dim_v * element};
}

static inline void *at_alloc(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);

    ck_assert_ptr_nonnull(p);
    return p;
}

/* Publishes n_blocks blocks of random numbers under random tokens; the prefix knows the tokens. */
static inline void at_publish(struct at_bed *b, kvd_prefix *prefix, const uint32_t *tokens, size_t n_blocks)
{
    const struct at_shape *s = &b->shape;
    size_t n_tokens = n_blocks * s->block_tokens, element = s->dtype == KVD_F32 ? 4 : 2;
    struct kvd_kv kv[AT_LAYERS];
    void *memory[AT_LAYERS][2];

    for (int l = 0; l < AT_LAYERS; l++) {
        for (int v = 0; v < 2; v++) {
            size_t n = n_tokens * s->n_kv_heads * (v ? s->dim_v : s->dim_k);

            memory[l][v] = at_alloc(n, element);
            for (size_t i = 0; i < n; i++)
                at_put(s->dtype, (char *)memory[l][v] + i * element, 2 * at_number(&b->random));
        }
        kv[l] = at_kv(s, memory[l][0], memory[l][1], element);
    }
    ck_assert_int_eq(kvd_match(prefix, tokens, n_tokens, NULL, 0, NULL), KVD_OK);
    ck_assert_msg(kvd_publish(prefix, tokens, n_tokens, 0, n_blocks, 0, s->dtype, kv, NULL) == KVD_OK, "%s",
                  kvd_message(b->k));
    for (int l = 0; l < AT_LAYERS; l++)
        for (int v = 0; v < 2; v++)
            free(memory[l][v]);
}

/* Leases all blocks and loads them. */
static inline void at_match_and_load(struct at_bed *b)
{
    const struct at_shape *s = &b->shape;
    size_t n_tokens = b->n_blocks * s->block_tokens, got;
    struct kvd_kv kv[AT_LAYERS];

    ck_assert_int_eq(kvd_match(b->prefix, b->tokens, n_tokens, NULL, 0, &got), KVD_OK);
    ck_assert_uint_eq(got, n_tokens);
    for (int l = 0; l < AT_LAYERS; l++) {
        b->load[l][0] = at_alloc(n_tokens * s->n_kv_heads * s->dim_k, sizeof(float));
        b->load[l][1] = at_alloc(n_tokens * s->n_kv_heads * s->dim_v, sizeof(float));
        kv[l] = at_kv(s, b->load[l][0], b->load[l][1], sizeof(float));
    }
    ck_assert_msg(kvd_load(b->prefix, 0, b->n_blocks, KVD_F32, kv, KVD_LOAD_VERIFY) == KVD_OK, "%s", kvd_message(b->k));
    b->v_most = 0;
    for (size_t i = 0; i < n_tokens * s->n_kv_heads * (s->dim_v ? s->dim_v : s->dim_k); i++)
        b->v_most = fmax(b->v_most, fabs((double)b->load[0][s->dim_v ? 1 : 0][i]));
}

static inline void at_setup_space(struct at_bed *b, const struct at_shape *shape, size_t n_blocks)
{
    b->shape = *shape;
    b->n_blocks = n_blocks;
    b->space = at_space(b->k, shape);
    ck_assert_int_eq(kvd_prefix_create(b->space, AT_BLOCKS_MAX, &b->prefix), KVD_OK);
    b->tokens = at_alloc(n_blocks * shape->block_tokens, sizeof(*b->tokens));
    for (size_t i = 0; i < n_blocks * shape->block_tokens; i++)
        b->tokens[i] = (uint32_t)test_random(&b->random) % 50000;
    at_publish(b, b->prefix, b->tokens, n_blocks);
    at_match_and_load(b);
}

static inline void at_teardown_space(struct at_bed *b)
{
    b->space = kvd_space_close(b->space);
    free(b->tokens);
    for (int l = 0; l < AT_LAYERS; l++)
        for (int v = 0; v < 2; v++)
            free(b->load[l][v]);
}

static inline void at_setup(struct at_bed *b, const char *test, const char *option)
{
    memset(b, 0, sizeof(*b));
    b->random = test_seed(test);
    harness_init(&b->h);
    if (option)
        harness_option(&b->h, option);
    harness_start(&b->h);
    at_attach(b, &b->k);
}

static inline void at_teardown(struct at_bed *b)
{
    b->k = kvd_detach(b->k);
    if (b->h.pid) {
        ck_assert(harness_quiet(&b->h, 0, 5000));
        ck_assert_int_eq(harness_stop(&b->h), 0);
    }
    harness_deinit(&b->h);
}

/* ---- an attention ---- */

struct at_call {
    struct kvd_attention a;
    float *q; /* [token][head][channel], what the queries are as fp32 */
    void *q_memory, *o_memory;
    uint32_t positions[64];
    float *lse, *mass;
    uint32_t dim_o;
};

/* Random queries at the end of the sequence, contiguous, all blocks. */
static inline void at_call_init(struct at_call *c, struct at_bed *b, uint32_t n_tokens, enum kvd_dtype dtype)
{
    static const struct kvd_attention init = KVD_ATTENTION_INIT;
    const struct at_shape *s = &b->shape;
    size_t element = dtype == KVD_F32 ? 4 : 2, n_heads = s->n_kv_heads * s->ratio, n = n_tokens * n_heads * s->dim_k;

    memset(c, 0, sizeof(*c));
    c->a = init;
    c->dim_o = s->dim_v ? s->dim_v : s->dim_k;
    c->q = at_alloc(n, sizeof(float));
    c->q_memory = at_alloc(n, element);
    c->o_memory = at_alloc(n_tokens * n_heads * c->dim_o, sizeof(float));
    c->lse = at_alloc(n_tokens * n_heads, sizeof(float));
    c->mass = at_alloc(b->n_blocks, sizeof(float));
    for (size_t i = 0; i < n; i++) {
        at_put(dtype, (char *)c->q_memory + i * element, 3 * at_number(&b->random));
        c->q[i] = at_get(dtype, (char *)c->q_memory + i * element);
    }
    c->a.n_heads = (uint32_t)n_heads;
    c->a.n_tokens = n_tokens;
    c->a.dtype = dtype;
    c->a.q = c->q_memory;
    c->a.first_position = (uint32_t)(b->n_blocks * s->block_tokens);
    c->a.scale = (float)(1 / sqrt((double)s->dim_k));
    c->a.n_blocks = b->n_blocks;
    c->a.o = c->o_memory;
    c->a.lse = c->lse;
    c->a.mass = c->mass;
    c->a.dim_o = s->dim_v ? 0 : s->dim_k;
}

static inline void at_call_deinit(struct at_call *c)
{
    free(c->q);
    free(c->q_memory);
    free(c->o_memory);
    free(c->lse);
    free(c->mass);
}

static inline float *at_o(const struct at_call *c, uint32_t token, uint32_t head)
{
    size_t hs = c->a.o_head_stride ? c->a.o_head_stride : c->dim_o * sizeof(float);
    size_t ts = c->a.o_token_stride ? c->a.o_token_stride : hs * c->a.n_heads;

    return (float *)(void *)((char *)c->a.o + token * ts + head * hs);
}

static inline bool at_visible(const struct at_bed *b, const struct at_call *c, uint32_t q_pos, uint32_t pos)
{
    uint32_t window = c->a.window_tokens ? c->a.window_tokens : b->shape.window;

    return pos <= q_pos && (window == 0 || q_pos - pos < window || pos < c->a.sink_tokens);
}

/* One row by the definition, in fp64. mass [n_blocks]: shares. Returns the log-sum-exp. */
static inline double at_reference(const struct at_bed *b, const struct at_call *c, uint32_t token, uint32_t head,
                                  double *o, double *mass)
{
    const struct at_shape *s = &b->shape;
    const float *q = c->q + ((size_t)token * c->a.n_heads + head) * s->dim_k;
    uint32_t kv = head / s->ratio, pos = c->a.positions ? c->a.positions[token] : c->a.first_position + token;
    size_t t0 = c->a.first_block * s->block_tokens, n = c->a.n_blocks * s->block_tokens;
    double *score = at_alloc(n, sizeof(*score)), most = -INFINITY, sum = 0;

    for (size_t t = 0; t < n; t++) {
        const float *key = b->load[c->a.layer][0] + ((t0 + t) * s->n_kv_heads + kv) * s->dim_k;

        for (uint32_t i = 0; i < s->dim_k; i++)
            score[t] += (double)q[i] * (double)key[i];
        score[t] *= (double)c->a.scale;
        if (c->a.softcap > 0)
            score[t] = (double)c->a.softcap * tanh(score[t] / (double)c->a.softcap);
        if (!at_visible(b, c, pos, (uint32_t)(t0 + t)))
            score[t] = -INFINITY;
        most = fmax(most, score[t]);
    }
    memset(o, 0, c->dim_o * sizeof(*o));
    memset(mass, 0, c->a.n_blocks * sizeof(*mass));
    for (size_t t = 0; t < n && most > -INFINITY; t++)
        sum += exp(score[t] - most);
    for (size_t t = 0; t < n && most > -INFINITY; t++) {
        const float *value = b->load[c->a.layer][s->dim_v ? 1 : 0] +
                             ((t0 + t) * s->n_kv_heads + kv) * (s->dim_v ? s->dim_v : s->dim_k);
        double p = exp(score[t] - most) / sum;

        mass[t / s->block_tokens] += p;
        for (uint32_t i = 0; i < c->dim_o && p > 0; i++)
            o[i] += p * (double)value[i];
    }
    free(score);
    return most > -INFINITY ? most + log(sum) : -INFINITY;
}

/* All that the call has written against the definition. bound: of o in largest values; log-sum-exps may differ by ten times it. */
static inline void at_compare(const struct at_bed *b, const struct at_call *c, double bound, const char *what)
{
    double *o = at_alloc(c->dim_o, sizeof(*o)), *mass = at_alloc(c->a.n_blocks, sizeof(*mass));
    double *all = at_alloc(c->a.n_blocks, sizeof(*all));
    size_t n_seen = 0;

    for (uint32_t t = 0; t < c->a.n_tokens; t++)
        for (uint32_t h = 0; h < c->a.n_heads; h++) {
            double lse = at_reference(b, c, t, h, o, mass), have = (double)c->lse[t * c->a.n_heads + h];

            ck_assert_msg(lse == have || fabs(lse - have) <= 10 * bound, "%s: %s: token %u, head %u: lse %g, not %g",
                          b->shape.name, what, t, h, have, lse);
            for (uint32_t i = 0; i < c->dim_o; i++)
                ck_assert_msg(fabs(o[i] - (double)at_o(c, t, h)[i]) <= bound * b->v_most,
                              "%s: %s: token %u, head %u, channel %u: %g, not %g", b->shape.name, what, t, h, i,
                              (double)at_o(c, t, h)[i], o[i]);
            n_seen += lse > -INFINITY;
            for (size_t i = 0; i < c->a.n_blocks; i++)
                all[i] += mass[i];
        }
    for (size_t i = 0; c->a.mass && i < c->a.n_blocks; i++)
        ck_assert_msg(fabs((n_seen ? all[i] / (double)n_seen : 0) - (double)c->a.mass[i]) <= 10 * bound,
                      "%s: %s: mass of block %zu is %g, not %g", b->shape.name, what, i, (double)c->a.mass[i],
                      n_seen ? all[i] / (double)n_seen : 0);
    free(o);
    free(mass);
    free(all);
}

#endif
