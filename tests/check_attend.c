/* Attention over leased blocks, in the worker: against fp64 attention over what kvd_load() returns, on one thread and on several,
 * in parts, with everything that a caller may get wrong, and with a daemon that dies or is short of room meanwhile. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/libkvd/kvd_impl.h"
#include "tests/attend_fixture.h"

static const struct at_shape shapes[] = {
    /* name, KV heads, ratio, K, V, codecs, first, window, block, dtype, bound */
    {"default", 2, 4, 128, 128, NULL, NULL, NULL, NULL, 0, 64, KVD_F16, 2e-3},
    {"one codec", 2, 4, 128, 128, NULL, NULL, "", "", 0, 64, KVD_BF16, 2e-3},
    {"mha", 4, 1, 64, 64, NULL, NULL, NULL, NULL, 0, 64, KVD_F16, 2e-3},
    {"mqa", 1, 8, 256, 256, NULL, NULL, NULL, NULL, 0, 64, KVD_BF16, 2e-3},
    {"raw", 2, 4, 64, 64, "raw", "raw", NULL, NULL, 0, 16, KVD_F16, 5e-4},
    {"f32", 1, 1, 80, 96, "raw", "raw", NULL, NULL, 0, 16, KVD_F32, 5e-4},
    {"uq4", 2, 4, 128, 128, "uq4", "uq4", NULL, NULL, 0, 64, KVD_BF16, 5e-4},
    {"fp8", 2, 3, 128, 64, "fp8", "fp8", NULL, NULL, 0, 32, KVD_BF16, 5e-4},
    {"int8, tq3", 2, 2, 64, 128, "int8", "tq3", NULL, NULL, 0, 64, KVD_F16, 5e-4},
    {"k wider", 2, 4, 192, 128, NULL, NULL, NULL, NULL, 0, 64, KVD_F16, 2e-3},
    {"latent", 1, 16, 576, 0, NULL, NULL, NULL, NULL, 0, 64, KVD_BF16, 5e-4},
    {"slide", 2, 4, 128, 128, NULL, NULL, NULL, NULL, 300, 64, KVD_F16, 2e-3},
    {"odd block", 2, 4, 128, 128, NULL, NULL, NULL, NULL, 0, 48, KVD_F16, 2e-3},
};
enum { N_SHAPES = sizeof(shapes) / sizeof(shapes[0]), BLOCKS = 11 };

static struct at_bed bed;

static uint32_t below(uint32_t n)
{
    return (uint32_t)(test_random(&bed.random) % n);
}

static void attend(struct at_call *c, const char *what)
{
    int r = kvd_attend(bed.prefix, &c->a, KVD_ATTEND_LOCAL);

    ck_assert_msg(r == KVD_OK, "%s: %s: %s (%s)", bed.shape.name, what, kvd_strerror(r), kvd_message(bed.k));
    at_compare(&bed, c, bed.shape.bound, what);
}

/* ---- against the definition ---- */

/* Scatters the queries over memory with gaps, and the outputs heads first. */
static void use_strides(struct at_call *c)
{
    size_t row = bed.shape.dim_k * (c->a.dtype == KVD_F32 ? 4 : 2), head = row + 16, token = head * c->a.n_heads + 64;
    char *spread = at_alloc(c->a.n_tokens * token, 1);

    for (uint32_t t = 0; t < c->a.n_tokens; t++)
        for (uint32_t h = 0; h < c->a.n_heads; h++)
            memcpy(spread + t * token + h * head, (char *)c->q_memory + ((size_t)t * c->a.n_heads + h) * row, row);
    free(c->q_memory);
    c->a.q = c->q_memory = spread;
    c->a.q_head_stride = head;
    c->a.q_token_stride = token;
    c->a.o_token_stride = c->dim_o * sizeof(float) + 32;
    c->a.o_head_stride = c->a.o_token_stride * c->a.n_tokens;
    free(c->o_memory);
    c->a.o = c->o_memory = at_alloc(c->a.n_heads * c->a.o_head_stride, 1);
}

static void use_range(struct at_call *c)
{
    c->a.first_block = below(BLOCKS);
    c->a.n_blocks = 1 + below((uint32_t)(BLOCKS - c->a.first_block));
}

/* Queries in the middle of the sequence see only what is before them, and one sees nothing. */
static void use_positions(struct at_call *c)
{
    for (uint32_t t = 0; t < c->a.n_tokens; t++)
        c->positions[t] = below((uint32_t)bed.n_blocks * bed.shape.block_tokens + 20);
    c->a.positions = c->positions;
    if (c->a.first_block)
        c->positions[0] = 0;
}

START_TEST(as_defined)
{
    static const enum kvd_dtype dtypes[] = {KVD_F16, KVD_BF16, KVD_F32};
    struct at_call c;

    at_setup_space(&bed, &shapes[_i], BLOCKS);
    for (int i = 0; i < 3; i++) {
        at_call_init(&c, &bed, 1, dtypes[i]);
        attend(&c, "one token");
        at_call_deinit(&c);
    }
    at_call_init(&c, &bed, 5, KVD_F16);
    c.a.layer = 1;
    use_strides(&c);
    attend(&c, "several tokens, strides");
    c.a.mass = NULL;
    c.a.softcap = 1.5f;
    attend(&c, "a softcap");
    c.a.mass = c.mass;
    c.a.window_tokens = 100;
    attend(&c, "a window");
    if (!bed.shape.window) {
        c.a.sink_tokens = 5;
        attend(&c, "a window and sinks");
        for (int i = 0; i < 8; i++) {
            c.a.window_tokens = below(2) ? 1 + below(200) : 0;
            c.a.sink_tokens = below(100);
            use_range(&c);
            use_positions(&c);
            attend(&c, "anything");
        }
    }
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

/* What the worker has done for itself, as the daemon tells it. */
START_TEST(is_counted)
{
    uint64_t before = harness_stat(&bed.h, "kvd_attend_local_total", NULL);
    uint64_t bytes = harness_stat(&bed.h, "kvd_attend_local_bytes_total", NULL);
    struct at_call c;

    at_setup_space(&bed, &shapes[4], 3);
    at_call_init(&c, &bed, 1, KVD_F16);
    attend(&c, "all");
    c.a.first_position = 0; /* one block has what it sees */
    attend(&c, "the first token");
    c.a.n_blocks = 0;
    attend(&c, "nothing, which is not counted");
    ck_assert_uint_eq(harness_stat(&bed.h, "kvd_attend_local_total", NULL) - before, 2);
    ck_assert_uint_eq(harness_stat(&bed.h, "kvd_attend_local_bytes_total", NULL) - bytes, (3 + 1) * 2 * 16 * (64 + 64) * 2);
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

START_TEST(latent_values)
{
    struct at_call c;

    at_setup_space(&bed, &shapes[10], 3);
    at_call_init(&c, &bed, 2, KVD_F32);
    c.a.dim_o = c.dim_o = 512;
    attend(&c, "the first channels of K");
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

START_TEST(many_rows)
{
    struct at_call c;

    at_setup_space(&bed, &shapes[0], 4);
    at_call_init(&c, &bed, 70, KVD_F32); /* 280 rows: more than a unit takes */
    c.a.first_position = 128;
    attend(&c, "a chunk of a prompt");
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

START_TEST(nothing_to_see)
{
    struct at_call c;

    at_setup_space(&bed, &shapes[0], 3);
    at_call_init(&c, &bed, 2, KVD_F32);
    c.a.first_block = 2;
    c.a.n_blocks = 1;
    c.a.first_position = 100; /* before the block */
    memset(c.o_memory, 0x7f, 16);
    c.mass[0] = 7;
    attend(&c, "the future only");
    ck_assert(c.lse[0] == -INFINITY && c.mass[0] == 0);
    c.a.n_blocks = 0;
    memset(c.o_memory, 0x7f, 16);
    attend(&c, "no blocks");
    kvd_release(bed.prefix);
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_LOCAL), KVD_E_STALE); /* blocks 2 to 1 of none */
    c.a.first_block = 0;
    attend(&c, "no blocks of no lease");
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

/* ---- in parts ---- */

/* Merges what is computed over [cut[i], cut[i + 1]) in some order; equals the whole. */
START_TEST(parts_merge_to_the_whole)
{
    struct at_call whole, part;
    size_t n;

    at_setup_space(&bed, &shapes[_i], BLOCKS);
    at_call_init(&whole, &bed, 3, KVD_F32);
    attend(&whole, "the whole");
    n = (size_t)whole.a.n_tokens * whole.a.n_heads;
    for (int round = 0; round < 6; round++) {
        size_t cut[4] = {0, below(BLOCKS + 1), below(BLOCKS + 1), BLOCKS}, order[3] = {0, 1, 2}, first = below(3);
        float *o = at_alloc(n * whole.dim_o, sizeof(float)), *lse = at_alloc(n, sizeof(float));

        if (cut[1] > cut[2])
            cut[1] = cut[2];
        order[0] = first;
        order[1] = (first + 1 + below(2)) % 3;
        order[2] = 3 - order[0] - order[1];
        for (size_t r = 0; r < n; r++)
            lse[r] = -INFINITY;
        part = whole;
        part.a.o = at_alloc(n * whole.dim_o, sizeof(float));
        part.a.lse = at_alloc(n, sizeof(float));
        part.a.mass = NULL;
        for (int i = 0; i < 3; i++) {
            part.a.first_block = cut[order[i]];
            part.a.n_blocks = cut[order[i] + 1] - cut[order[i]];
            ck_assert_int_eq(kvd_attend(bed.prefix, &part.a, KVD_ATTEND_LOCAL), KVD_OK);
            for (size_t r = 0; r < n; r++)
                kvd_attend_merge(o + r * whole.dim_o, &lse[r], part.a.o + r * whole.dim_o, part.a.lse[r], whole.dim_o);
        }
        for (size_t r = 0; r < n; r++)
            ck_assert_float_eq_tol(lse[r], whole.lse[r], 1e-5f);
        for (size_t i = 0; i < n * whole.dim_o; i++)
            ck_assert_float_eq_tol(o[i], whole.a.o[i], (float)(1e-5 * bed.v_most));
        free(o);
        free(lse);
        free(part.a.o);
        free(part.a.lse);
    }
    at_call_deinit(&whole);
    at_teardown_space(&bed);
}
END_TEST

START_TEST(merge_with_a_sink)
{
    float o[4] = {1, -2, 3, 0}, lse = 2, none[4] = {0}, empty = -INFINITY;

    kvd_attend_merge(o, &lse, NULL, 2, 4); /* a sink as heavy as all the rest */
    ck_assert_float_eq_tol(o[0], 0.5f, 1e-6f);
    ck_assert_float_eq_tol(o[1], -1, 1e-6f);
    ck_assert_float_eq_tol(lse, 2 + logf(2), 1e-6f);
    kvd_attend_merge(o, &lse, none, -INFINITY, 4); /* nothing */
    ck_assert_float_eq_tol(o[2], 1.5f, 1e-6f);
    kvd_attend_merge(none, &empty, o, lse, 4); /* into nothing */
    ck_assert(none[0] == o[0] && none[2] == o[2] && empty == lse);
    empty = -INFINITY;
    kvd_attend_merge(none, &empty, o, -INFINITY, 4);
    ck_assert(empty == -INFINITY && none[0] == o[0]);
    empty = -INFINITY;
    none[0] = 0;
    kvd_attend_merge(none, &empty, NULL, 7, 1);
    ck_assert(empty == 7 && none[0] == 0);
    lse = 1e30f;
    kvd_attend_merge(o, &lse, none, -1e30f, 1);
    ck_assert(lse == 1e30f && isfinite(o[0]));
}
END_TEST

/* ---- threads ---- */

struct crew {
    kvd_attending *attending;
    _Atomic bool stop;
    _Atomic uint64_t n_done;
};

/* Works at whatever is there; most of the time it comes too late or too early. */
static void *crew_member(void *arg)
{
    struct crew *crew = arg;

    while (!atomic_load(&crew->stop)) {
        int r = kvd_attend_work(crew->attending);

        if (r == KVD_OK)
            atomic_fetch_add(&crew->n_done, 1);
        else if (r != KVD_E_NOT_FOUND)
            return (void *)"an error";
    }
    return NULL;
}

START_TEST(several_threads)
{
    struct crew crew = {0};
    pthread_t threads[3];
    struct at_call here, c;
    void *said;

    at_setup_space(&bed, &shapes[_i], BLOCKS);
    ck_assert_int_eq(kvd_attending_create(bed.space, &crew.attending), KVD_OK);
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, crew_member, &crew), 0);
    for (int round = 0; round < 60; round++) {
        size_t n;

        at_call_init(&here, &bed, 1 + below(3), KVD_F16);
        if (below(2) && !bed.shape.window) {
            use_range(&here);
            use_positions(&here);
            here.a.positions = here.positions;
        }
        ck_assert_int_eq(kvd_attend(bed.prefix, &here.a, KVD_ATTEND_LOCAL), KVD_OK);
        c = here;
        n = (size_t)c.a.n_tokens * c.a.n_heads;
        c.a.o = at_alloc(n * c.dim_o, sizeof(float));
        c.a.lse = at_alloc(n, sizeof(float));
        c.a.mass = round % 3 ? at_alloc(bed.n_blocks, sizeof(float)) : NULL;
        ck_assert_int_eq(kvd_attend_begin(crew.attending, bed.prefix, &c.a, below(9)), KVD_OK);
        while (kvd_attend_work(crew.attending) == KVD_OK) {
        }
        ck_assert_int_eq(kvd_attend_wait(crew.attending, -1), KVD_OK);
        for (size_t r = 0; r < n; r++)
            ck_assert(here.lse[r] == c.a.lse[r] || fabsf(here.lse[r] - c.a.lse[r]) < 1e-5f);
        for (size_t i = 0; i < n * c.dim_o; i++)
            ck_assert_float_eq_tol(here.a.o[i], c.a.o[i], (float)(1e-5 * bed.v_most));
        for (size_t i = 0; c.a.mass && i < c.a.n_blocks; i++)
            ck_assert_float_eq_tol(here.mass[i], c.a.mass[i], 1e-5f);
        free(c.a.o);
        free(c.a.lse);
        free(c.a.mass);
        at_call_deinit(&here);
    }
    atomic_store(&crew.stop, true);
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(pthread_join(threads[i], &said), 0);
        ck_assert_ptr_null(said);
    }
    ck_assert_ptr_null(kvd_attending_destroy(crew.attending));
    at_teardown_space(&bed);
}
END_TEST

static void *waiter(void *arg)
{
    return (void *)(intptr_t)kvd_attend_wait(arg, -1);
}

START_TEST(who_waits_is_woken)
{
    kvd_attending *a, *other;
    struct at_call c;
    pthread_t thread;
    void *result;

    at_setup_space(&bed, &shapes[0], BLOCKS);
    at_call_init(&c, &bed, 1, KVD_F16);
    ck_assert_int_eq(kvd_attending_create(bed.space, &a), KVD_OK);
    ck_assert_int_eq(kvd_attending_create(bed.space, &other), KVD_OK);
    ck_assert_int_eq(kvd_attend_work(a), KVD_E_NOT_FOUND);
    ck_assert_int_eq(kvd_attend_wait(a, 0), KVD_E_ARG); /* nothing was begun */
    ck_assert_int_eq(kvd_attend_begin(a, bed.prefix, &c.a, 2), KVD_OK);
    ck_assert_int_eq(kvd_attend_begin(a, bed.prefix, &c.a, 2), KVD_E_ARG); /* the first is not complete */
    ck_assert_int_eq(kvd_attend_wait(a, 0), KVD_E_TIMEOUT);
    ck_assert_int_eq(kvd_attend_wait(a, 5), KVD_E_TIMEOUT);
    ck_assert_int_eq(pthread_create(&thread, NULL, waiter, a), 0);
    test_sleep_usec(20000); /* long enough to be asleep, most of the time */
    while (kvd_attend_work(a) == KVD_OK) {
    }
    ck_assert_int_eq(pthread_join(thread, &result), 0);
    ck_assert_int_eq((intptr_t)result, KVD_OK);
    ck_assert_int_eq(kvd_attend_wait(a, 0), KVD_OK); /* as often as one likes */
    at_compare(&bed, &c, bed.shape.bound, "by parts");
    /* What is refused leaves the object as it was. */
    c.a.layer = 9;
    ck_assert_int_eq(kvd_attend_begin(a, bed.prefix, &c.a, 2), KVD_E_ARG);
    ck_assert_int_eq(kvd_attend_wait(a, 0), KVD_OK);
    c.a.layer = 1;
    ck_assert_int_eq(kvd_attend_begin(a, bed.prefix, &c.a, 1025), KVD_E_ARG);
    ck_assert_int_eq(kvd_attend_begin(a, bed.prefix, &c.a, 1024), KVD_OK);
    while (kvd_attend_work(a) == KVD_OK) {
    }
    ck_assert_int_eq(kvd_attend_wait(a, -1), KVD_OK);
    at_compare(&bed, &c, bed.shape.bound, "by more parts than there are blocks");
    ck_assert_int_eq(kvd_attending_create(NULL, &a), KVD_E_ARG);
    ck_assert_int_eq(kvd_attending_create(bed.space, NULL), KVD_E_ARG);
    ck_assert_int_eq(kvd_attend_begin(NULL, bed.prefix, &c.a, 1), KVD_E_ARG);
    ck_assert_int_eq(kvd_attend_begin(a, NULL, &c.a, 1), KVD_E_ARG);
    ck_assert_ptr_null(kvd_attending_destroy(a));
    ck_assert_ptr_null(kvd_attending_destroy(other));
    ck_assert_ptr_null(kvd_attending_destroy(NULL));
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

/* ---- bad input ---- */

struct misuse {
    const char *says;
    int error;
    void (*spoil)(struct at_call *c);
};

static void set_q(struct at_call *c, size_t i, float value)
{
    at_put(c->a.dtype, (char *)c->q_memory + i * (c->a.dtype == KVD_F32 ? 4 : 2), value);
}
static void bad_size(struct at_call *c) { c->a.size = 8; }
static void bad_layer(struct at_call *c) { c->a.layer = AT_LAYERS; }
static void bad_layer_far(struct at_call *c) { c->a.layer = UINT32_MAX; }
static void no_heads(struct at_call *c) { c->a.n_heads = 0; }
static void odd_heads(struct at_call *c) { c->a.n_heads = 7; }
static void many_heads(struct at_call *c) { c->a.n_heads = UINT32_MAX - 1; }
static void no_tokens(struct at_call *c) { c->a.n_tokens = 0; }
static void many_tokens(struct at_call *c) { c->a.n_tokens = UINT32_MAX; }
static void bad_dtype(struct at_call *c) { c->a.dtype = (enum kvd_dtype)9; }
static void no_q(struct at_call *c) { c->a.q = NULL; }
static void no_o(struct at_call *c) { c->a.o = NULL; }
static void no_lse(struct at_call *c) { c->a.lse = NULL; }
static void bad_dim_o(struct at_call *c) { c->a.dim_o = 64; }
static void nan_scale(struct at_call *c) { c->a.scale = NAN; }
static void inf_scale(struct at_call *c) { c->a.scale = INFINITY; }
static void bad_softcap(struct at_call *c) { c->a.softcap = -1; }
static void nan_softcap(struct at_call *c) { c->a.softcap = NAN; }
static void past_lease(struct at_call *c) { c->a.n_blocks++; }
static void past_lease_far(struct at_call *c) { c->a.first_block = SIZE_MAX; }
static void past_lease_wraps(struct at_call *c)
{
    c->a.first_block = 2;
    c->a.n_blocks = SIZE_MAX;
}
static void q_stride_wraps(struct at_call *c) { c->a.q_token_stride = SIZE_MAX / 2; }
static void q_head_stride_wraps(struct at_call *c) { c->a.q_head_stride = SIZE_MAX - 15; }
static void o_stride_wraps(struct at_call *c) { c->a.o_head_stride = (size_t)1 << 62; }
static void o_token_stride_wraps(struct at_call *c) { c->a.o_token_stride = SIZE_MAX - 3; }
static void o_overlaps(struct at_call *c) { c->a.o_head_stride = 256; }
static void o_tokens_overlap(struct at_call *c) { c->a.o_token_stride = 512; }
static void o_odd(struct at_call *c) { c->a.o_token_stride = 512 * 8 + 2; }
static void lse_odd(struct at_call *c) { c->a.lse = (float *)(void *)((char *)c->a.lse + 1); }
static void positions_wrap(struct at_call *c) { c->a.first_position = UINT32_MAX - 1; }
static void nan_query(struct at_call *c) { set_q(c, 3 * 128 + 5, NAN); }
static void inf_query(struct at_call *c) { set_q(c, 0, -INFINITY); }
static void last_query(struct at_call *c) { set_q(c, (size_t)c->a.n_tokens * c->a.n_heads * 128 - 1, INFINITY); }

static const struct misuse misuses[] = {
    {"attention.size is 8; allowed: at least", KVD_E_ARG, bad_size},
    {"layer 2; allowed: below 2", KVD_E_ARG, bad_layer},
    {"layer 4294967295; allowed", KVD_E_ARG, bad_layer_far},
    {"n_heads is 0; allowed: a multiple of layer 0's 2", KVD_E_ARG, no_heads},
    {"n_heads is 7; allowed", KVD_E_ARG, odd_heads},
    {"n_heads is 4294967294; allowed", KVD_E_ARG, many_heads},
    {"n_tokens is 0; allowed with 8 heads", KVD_E_ARG, no_tokens},
    {"n_tokens is 4294967295; allowed", KVD_E_ARG, many_tokens},
    {"dtype is none of", KVD_E_ARG, bad_dtype},
    {"q is NULL", KVD_E_ARG, no_q},
    {"o is NULL", KVD_E_ARG, no_o},
    {"lse is NULL", KVD_E_ARG, no_lse},
    {"dim_o is 64; allowed for layer 0", KVD_E_ARG, bad_dim_o},
    {"allowed: finite numbers", KVD_E_ARG, nan_scale},
    {"allowed: finite numbers", KVD_E_ARG, inf_scale},
    {"softcap not below 0", KVD_E_ARG, bad_softcap},
    {"allowed: finite numbers", KVD_E_ARG, nan_softcap},
    {"of 5 that are matched", KVD_E_STALE, past_lease},
    {"of 5 that are matched", KVD_E_STALE, past_lease_far},
    {"of 5 that are matched", KVD_E_STALE, past_lease_wraps},
    {"q's strides", KVD_E_ARG, q_stride_wraps},
    {"q's strides", KVD_E_ARG, q_head_stride_wraps},
    {"o's strides", KVD_E_ARG, o_stride_wraps},
    {"o's strides", KVD_E_ARG, o_token_stride_wraps},
    {"overlap", KVD_E_ARG, o_overlaps},
    {"overlap", KVD_E_ARG, o_tokens_overlap},
    {"no multiples", KVD_E_ARG, o_odd},
    {"no multiples", KVD_E_ARG, lse_odd},
    {"first_position is 4294967294; allowed", KVD_E_ARG, positions_wrap},
    {"q of token 0, head 3, channel 5", KVD_E_ARG, nan_query},
    {"q of token 0, head 0, channel 0", KVD_E_ARG, inf_query},
    {"q of token 2, head 7, channel 127", KVD_E_ARG, last_query},
};

START_TEST(misuse_is_refused)
{
    kvd_attending *attending;
    struct at_call good, c;

    at_setup_space(&bed, &shapes[0], 5);
    ck_assert_int_eq(kvd_attending_create(bed.space, &attending), KVD_OK);
    for (size_t i = 0; i < sizeof(misuses) / sizeof(misuses[0]); i++) {
        int r;

        at_call_init(&c, &bed, 3, i % 2 ? KVD_F32 : KVD_F16);
        misuses[i].spoil(&c);
        r = kvd_attend(bed.prefix, &c.a, KVD_ATTEND_LOCAL);
        ck_assert_msg(r == misuses[i].error, "%s: %d", misuses[i].says, r);
        ck_assert_msg(strstr(kvd_message(bed.k), misuses[i].says) != NULL, "\"%s\" does not say \"%s\"",
                      kvd_message(bed.k), misuses[i].says);
        ck_assert_int_eq(kvd_attend_begin(attending, bed.prefix, &c.a, 2), misuses[i].error);
        at_call_deinit(&c);
    }
    kvd_attending_destroy(attending);
    at_call_init(&good, &bed, 1, KVD_F16);
    ck_assert_int_eq(kvd_attend(NULL, &good.a, KVD_ATTEND_LOCAL), KVD_E_ARG);
    ck_assert_int_eq(kvd_attend(bed.prefix, NULL, KVD_ATTEND_LOCAL), KVD_E_ARG);
    ck_assert_int_eq(kvd_attend(bed.prefix, &good.a, (enum kvd_attend_form)17), KVD_E_ARG);
    ck_assert_int_eq(kvd_attend(bed.prefix, &good.a, KVD_ATTEND_LOAD), KVD_E_ARG);
    good.a.scale = 3e38f; /* finite, and a score need not be: numbers or an error, and never a NaN */
    if (kvd_attend(bed.prefix, &good.a, KVD_ATTEND_LOCAL) == KVD_OK)
        for (uint32_t h = 0; h < good.a.n_heads; h++)
            ck_assert(!isnan(good.lse[h]) && !isnan(at_o(&good, 0, h)[0]));
    else
        ck_assert_ptr_nonnull(strstr(kvd_message(bed.k), "have no result within fp32"));
    good.a.scale = 0.1f;
    attend(&good, "after all that");
    at_call_deinit(&good);
    at_teardown_space(&bed);
}
END_TEST

START_TEST(latent_dim_o)
{
    struct at_call c;

    at_setup_space(&bed, &shapes[10], 2);
    at_call_init(&c, &bed, 1, KVD_F16);
    for (uint32_t dim = 0; dim < 592; dim += 7) {
        bool good = dim >= 16 && dim % 16 == 0 && dim <= 576;

        c.a.dim_o = dim;
        ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_LOCAL), good ? KVD_OK : KVD_E_ARG);
    }
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

/* A sliding group holds its last blocks; what a query sees beyond them is named. */
START_TEST(window_past_what_is_held)
{
    struct at_call c;

    at_setup_space(&bed, &shapes[11], BLOCKS); /* 300 tokens: the last 5 of 11 blocks */
    at_call_init(&c, &bed, 1, KVD_F16);
    attend(&c, "its own window");
    c.a.window_tokens = 64 * 5 + 1;
    attend(&c, "as wide as what is held");
    c.a.window_tokens++;
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_LOCAL), KVD_E_ARG);
    ck_assert_ptr_nonnull(strstr(kvd_message(bed.k), "block 5 is seen with a window of 322 tokens"));
    ck_assert_ptr_nonnull(strstr(kvd_message(bed.k), "holds blocks 6 to 10"));
    c.a.first_block = 6; /* not asked for, not needed */
    c.a.n_blocks = 5;
    attend(&c, "a wider window over what is held");
    c.a.first_block = 0;
    c.a.n_blocks = BLOCKS;
    c.a.window_tokens = 0;
    c.a.sink_tokens = 1;
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_LOCAL), KVD_E_ARG);
    ck_assert_ptr_nonnull(strstr(kvd_message(bed.k), "block 0 is seen"));
    c.a.sink_tokens = 0;
    c.a.first_position = 10; /* sees the tokens before it, which are not held */
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_LOCAL), KVD_E_ARG);
    /* Positions with a gap: what lies in it is seen by none. */
    at_call_deinit(&c);
    at_call_init(&c, &bed, 2, KVD_F16);
    c.positions[0] = BLOCKS * 64;
    c.positions[1] = BLOCKS * 64 + 4000;
    c.a.positions = c.positions;
    attend(&c, "far apart");
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

/* ---- the daemon and the lease meanwhile ---- */

START_TEST(lease_is_gone)
{
    struct at_call c;

    at_setup_space(&bed, &shapes[0], 5);
    at_call_init(&c, &bed, 1, KVD_F16);
    attend(&c, "leased");
    ck_assert_uint_eq(kvd_prefix_trim(bed.prefix, 3), 3);
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_LOCAL), KVD_E_STALE);
    c.a.n_blocks = 3;
    attend(&c, "trimmed");
    kvd_release(bed.prefix);
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_LOCAL), KVD_E_STALE);
    ck_assert_str_eq(kvd_message(bed.k), "nothing is leased");
    ck_assert_int_eq(kvd_match(bed.prefix, bed.tokens, bed.n_blocks * 64, NULL, 0, NULL), KVD_OK);
    attend(&c, "leased again");
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

/* What the daemon does when it gives a worker up. */
START_TEST(revoked)
{
    kvd_attending *a;
    struct at_call c;

    at_setup_space(&bed, &shapes[0], 5);
    at_call_init(&c, &bed, 1, KVD_F16);
    ck_assert_int_eq(kvd_attending_create(bed.space, &a), KVD_OK);
    ck_assert_int_eq(kvd_attend_begin(a, bed.prefix, &c.a, 2), KVD_OK);
    ck_assert_int_eq(kvd_attend_work(a), KVD_OK);
    atomic_store(&bed.prefix->life->page->revoked, 1);
    while (kvd_attend_work(a) == KVD_OK) {
    }
    ck_assert_int_eq(kvd_attend_wait(a, -1), KVD_E_STALE);
    ck_assert_ptr_nonnull(strstr(kvd_message(bed.k), "gave up this session"));
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_LOCAL), KVD_E_STALE);
    kvd_attending_destroy(a);
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

START_TEST(forked_child)
{
    kvd_attending *a;
    struct at_call c;
    pid_t pid;
    int status;

    at_setup_space(&bed, &shapes[0], 5);
    at_call_init(&c, &bed, 1, KVD_F16);
    ck_assert_int_eq(kvd_attending_create(bed.space, &a), KVD_OK);
    ck_assert_int_eq(kvd_attend_begin(a, bed.prefix, &c.a, 2), KVD_OK);
    pid = test_fork();
    if (pid == 0) {
        struct kvd_attend_costs costs = {.size = sizeof(costs)};
        kvd_attending *other;
        int good = kvd_attend(bed.prefix, &c.a, KVD_ATTEND_LOCAL) == KVD_E_FORKED &&
                   kvd_attend_choose(bed.prefix, &c.a, 1, &costs) == KVD_E_FORKED &&
                   kvd_attending_create(bed.space, &other) == KVD_E_FORKED &&
                   kvd_attend_begin(a, bed.prefix, &c.a, 1) == KVD_E_FORKED && kvd_attend_work(a) == KVD_E_FORKED &&
                   kvd_attend_wait(a, -1) == KVD_E_FORKED;

        kvd_attending_destroy(a);
        kvd_detach(bed.k);
        _exit(good ? 0 : 1);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    while (kvd_attend_work(a) == KVD_OK) {
    }
    ck_assert_int_eq(kvd_attend_wait(a, -1), KVD_OK);
    at_compare(&bed, &c, bed.shape.bound, "in the parent");
    kvd_attending_destroy(a);
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

struct repeating {
    struct at_call call;
    _Atomic bool stop;
    _Atomic uint64_t n;
    _Atomic int error;
};

static void *repeat(void *arg)
{
    struct repeating *r = arg;

    while (!atomic_load(&r->stop) && r->error == 0) {
        r->error = kvd_attend(bed.prefix, &r->call.a, KVD_ATTEND_LOCAL);
        atomic_fetch_add(&r->n, 1);
    }
    return NULL;
}

static void start_repeating(struct repeating *r, pthread_t *thread)
{
    memset(r, 0, sizeof(*r));
    at_call_init(&r->call, &bed, 2, KVD_F16);
    ck_assert_int_eq(pthread_create(thread, NULL, repeat, r), 0);
    while (atomic_load(&r->n) < 3)
        test_sleep_usec(100);
}

static void stop_repeating(struct repeating *r, pthread_t thread)
{
    uint64_t n = atomic_load(&r->n);

    while (atomic_load(&r->n) < n + 3 && !r->error)
        test_sleep_usec(100);
    atomic_store(&r->stop, true);
    ck_assert_int_eq(pthread_join(thread, NULL), 0);
    ck_assert_int_eq(r->error, KVD_OK);
    at_compare(&bed, &r->call, bed.shape.bound, "at the end");
    at_call_deinit(&r->call);
}

/* What is under lease stays readable as it was. */
START_TEST(daemon_is_killed_meanwhile)
{
    struct repeating r;
    pthread_t thread;

    at_setup_space(&bed, &shapes[0], BLOCKS);
    start_repeating(&r, &thread);
    harness_kill(&bed.h);
    stop_repeating(&r, thread);
    at_teardown_space(&bed);
}
END_TEST

/* Others need all the room that there is; what is under lease is neither moved nor reused. */
START_TEST(eviction_meanwhile)
{
    struct repeating r;
    kvd_prefix *other;
    pthread_t thread;
    uint32_t tokens[32 * 64];
    uint64_t evicted;

    at_setup_space(&bed, &shapes[0], BLOCKS);
    start_repeating(&r, &thread);
    ck_assert_int_eq(kvd_prefix_create(bed.space, 32, &other), KVD_OK);
    for (int i = 0; i < 40; i++) {
        for (size_t t = 0; t < 32 * 64; t++)
            tokens[t] = below(50000);
        at_publish(&bed, other, tokens, 32);
        kvd_release(other);
    }
    evicted = harness_stat(&bed.h, "kvd_tenant_evicted_total", NULL);
    ck_assert_uint_gt(evicted, 0);
    stop_repeating(&r, thread);
    ck_assert_uint_eq(kvd_prefix_blocks(bed.prefix), BLOCKS);
    at_teardown_space(&bed);
}
END_TEST

/* ---- the choice ---- */

START_TEST(costs_are_numbers)
{
    struct kvd_attend_costs costs = {.size = sizeof(costs)}, many = {.size = sizeof(many)};
    struct at_call c;

    at_setup_space(&bed, &shapes[_i], BLOCKS);
    at_call_init(&c, &bed, 1, KVD_F16);
    ck_assert_int_eq(kvd_attend_choose(bed.prefix, &c.a, 0, &costs), KVD_E_ARG);
    ck_assert_int_eq(kvd_attend_choose(bed.prefix, &c.a, 1, NULL), KVD_E_ARG);
    costs.size = 4;
    ck_assert_int_eq(kvd_attend_choose(bed.prefix, &c.a, 1, &costs), KVD_E_ARG);
    costs.size = sizeof(costs);
    c.a.layer = 7;
    ck_assert_int_eq(kvd_attend_choose(bed.prefix, &c.a, 1, &costs), KVD_E_ARG);
    c.a.layer = 0;
    for (int i = 0; i < 3; i++) { /* at first from a trial, then from what calls took */
        ck_assert_int_eq(kvd_attend_choose(bed.prefix, &c.a, 1, &costs), KVD_OK);
        ck_assert_int_eq(kvd_attend_choose(bed.prefix, &c.a, 1000, &many), KVD_OK);
        ck_assert(costs.local_usec > 0 && costs.load_usec > 0 && isfinite(costs.local_usec) && isfinite(costs.load_usec));
        ck_assert_double_eq_tol(many.local_usec, 1000 * costs.local_usec, 1e-3 * many.local_usec);
        ck_assert(many.load_usec > costs.load_usec && many.load_usec < 1001 * costs.load_usec);
        ck_assert(many.form == (many.load_usec < many.local_usec && many.load_usec < many.daemon_usec ? KVD_ATTEND_LOAD
                                : many.daemon_usec < many.local_usec                                  ? KVD_ATTEND_DAEMON
                                                                                                      : KVD_ATTEND_LOCAL));
        attend(&c, "measured by the way");
    }
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

START_TEST(environment_decides)
{
    struct kvd_options o = KVD_OPTIONS_INIT;
    struct kvd_attend_costs costs = {.size = sizeof(costs)};
    struct at_call c;
    kvd *k = NULL;

    o.socket_path = bed.h.socket;
    setenv("KVD_ATTEND_FORM", "elsewhere", 1);
    ck_assert_int_eq(kvd_attach(&o, &k), KVD_E_OPTION);
    ck_assert_str_eq(kvd_message(NULL), "KVD_ATTEND_FORM is \"elsewhere\"; allowed: auto, local, daemon");
    kvd_detach(bed.k);
    setenv("KVD_ATTEND_FORM", "local", 1);
    at_attach(&bed, &bed.k);
    unsetenv("KVD_ATTEND_FORM"); /* it counts when a session begins */
    at_setup_space(&bed, &shapes[0], 3);
    at_call_init(&c, &bed, 1, KVD_F16);
    ck_assert_int_eq(kvd_attend_choose(bed.prefix, &c.a, 1000000, &costs), KVD_OK);
    ck_assert_int_eq(costs.form, KVD_ATTEND_LOCAL);
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_AUTO), KVD_OK);
    at_compare(&bed, &c, bed.shape.bound, "as the environment says");
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

/* The daemon counts a moment after it has answered. */
static void await_done_by_daemon(uint64_t n)
{
    while (harness_stat(&bed.h, "kvd_attend_done_total", NULL) < n)
        test_sleep_usec(1000);
}

/* Whatever is chosen, and whenever: the same result. */
START_TEST(any_form)
{
    static const enum kvd_attend_form forms[] = {KVD_ATTEND_AUTO, KVD_ATTEND_LOCAL, KVD_ATTEND_DAEMON};
    struct at_call c;
    uint64_t n = 0;

    at_setup_space(&bed, &shapes[_i], BLOCKS);
    for (int round = 0; round < 12; round++) {
        enum kvd_attend_form form = forms[below(3)];
        int r;

        at_call_init(&c, &bed, 1 + below(2), KVD_F16);
        n += form == KVD_ATTEND_DAEMON;
        r = kvd_attend(bed.prefix, &c.a, form);
        ck_assert_msg(r == KVD_OK, "form %d: %s", form, kvd_message(bed.k));
        at_compare(&bed, &c, bed.shape.bound, "in any form");
        c.a.layer = AT_LAYERS;
        ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, form), KVD_E_ARG);
        at_call_deinit(&c);
    }
    await_done_by_daemon(n);
    at_teardown_space(&bed);
}
END_TEST

/* A session that is told to ask the daemon, and a daemon that cannot be asked. */
START_TEST(automatic_falls_back)
{
    struct kvd_attend_costs costs = {.size = sizeof(costs)};
    uint64_t ticket[1024];
    struct at_call c, other;
    size_t n_tickets = 0;

    kvd_detach(bed.k);
    setenv("KVD_ATTEND_FORM", "daemon", 1);
    at_attach(&bed, &bed.k);
    unsetenv("KVD_ATTEND_FORM");
    at_setup_space(&bed, &shapes[0], BLOCKS);
    at_call_init(&c, &bed, 1, KVD_F16);
    at_call_init(&other, &bed, 1, KVD_F16);
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_AUTO), KVD_OK);
    await_done_by_daemon(1);
    ck_assert_int_eq(kvd_attend_choose(bed.prefix, &c.a, 1, &costs), KVD_OK);
    ck_assert_int_eq(costs.form, KVD_ATTEND_DAEMON);
    /* All places are taken by what nobody collects. */
    while (kvd_attend_submit(bed.prefix, &other.a, 0, &ticket[n_tickets]) == KVD_OK)
        ck_assert_uint_lt(++n_tickets, 1024);
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_DAEMON), KVD_E_LIMIT);
    memset(c.o_memory, 0, 512);
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_AUTO), KVD_OK);
    at_compare(&bed, &c, bed.shape.bound, "with a full queue");
    for (size_t i = 0; i < n_tickets; i++)
        ck_assert_int_eq(kvd_attend_collect(bed.prefix, ticket[i], -1), KVD_OK);
    at_compare(&bed, &other, bed.shape.bound, "what was collected");
    harness_kill(&bed.h);
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_DAEMON), KVD_E_GONE);
    memset(c.o_memory, 0, 512);
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_AUTO), KVD_OK);
    at_compare(&bed, &c, bed.shape.bound, "without a daemon");
    at_call_deinit(&c);
    at_call_deinit(&other);
    at_teardown_space(&bed);
}
END_TEST

/* A daemon that does not answer costs some time, and no result. */
START_TEST(automatic_does_not_hang)
{
    struct at_call c;

    at_setup_space(&bed, &shapes[_i ? 0 : 2], BLOCKS);
    at_call_init(&c, &bed, 1, KVD_F16);
    if (_i) /* one that has been measured before */
        ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_AUTO), KVD_OK);
    ck_assert_int_eq(kill(bed.h.pid, SIGSTOP), 0);
    for (uint64_t begun = test_usec(); test_usec() - begun < 1500000;) { /* more than one turn of the dearer form */
        memset(c.o_memory, 0, 256);
        ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_AUTO), KVD_OK);
        at_compare(&bed, &c, bed.shape.bound, "beside a daemon that hangs");
    }
    ck_assert_int_eq(kill(bed.h.pid, SIGCONT), 0);
    ck_assert_int_eq(kvd_attend(bed.prefix, &c.a, KVD_ATTEND_DAEMON), KVD_OK);
    at_compare(&bed, &c, bed.shape.bound, "when it goes on");
    at_call_deinit(&c);
    at_teardown_space(&bed);
}
END_TEST

static void setup(void)
{
    at_setup(&bed, "check_attend", NULL);
}

static void setup_small(void)
{
    at_setup(&bed, "check_attend", "host_bytes = 8M");
}

static void teardown(void)
{
    at_teardown(&bed);
}

static TCase *add_case(Suite *suite, const char *name, void (*setup_it)(void))
{
    TCase *tc = tcase_create(name);

    tcase_add_checked_fixture(tc, setup_it, teardown);
    tcase_set_timeout(tc, 300);
    suite_add_tcase(suite, tc);
    return tc;
}

int main(void)
{
    Suite *suite = suite_create("attend");
    TCase *tc = add_case(suite, "result", setup), *small;
    SRunner *runner;
    int n_failed;

    tcase_add_loop_test(tc, as_defined, 0, N_SHAPES);
    tcase_add_test(tc, is_counted);
    tcase_add_test(tc, latent_values);
    tcase_add_test(tc, many_rows);
    tcase_add_test(tc, nothing_to_see);
    tcase_add_loop_test(tc, parts_merge_to_the_whole, 0, 5);
    tcase_add_test(tc, merge_with_a_sink);
    tc = add_case(suite, "threads", setup);
    tcase_add_loop_test(tc, several_threads, 0, 4);
    tcase_add_loop_test(tc, several_threads, 11, 12);
    tcase_add_test(tc, who_waits_is_woken);
    tc = add_case(suite, "misuse", setup);
    tcase_add_test(tc, misuse_is_refused);
    tcase_add_test(tc, latent_dim_o);
    tcase_add_test(tc, window_past_what_is_held);
    tcase_add_test(tc, lease_is_gone);
    tcase_add_test(tc, revoked);
    tcase_add_test(tc, forked_child);
    tcase_add_test(tc, daemon_is_killed_meanwhile);
    small = add_case(suite, "pressure", setup_small);
    tcase_add_test(small, eviction_meanwhile);
    tc = add_case(suite, "choice", setup);
    tcase_add_loop_test(tc, costs_are_numbers, 0, N_SHAPES);
    tcase_add_test(tc, environment_decides);
    tcase_add_loop_test(tc, any_form, 0, N_SHAPES);
    tcase_add_test(tc, automatic_falls_back);
    tcase_add_loop_test(tc, automatic_does_not_hang, 0, 2);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
