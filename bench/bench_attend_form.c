/* Attention in the worker: what the library adds to the kernels, how it scales to two threads, and how well it knows what is cheapest.
 *
 * A layer of 8 KV heads of 128, 4 query heads each, default codecs; four such layers in turns, so that what a call reads was not
 * read a moment ago.
 *
 *   overhead    kvd_attend() against attn_partial() over the same tiles
 *   threads     kvd_attend_begin/work/wait on two threads against kvd_attend()
 *   choice      for a grid of lengths, query tokens and steps: what the form that kvd_attend_choose() names costs, against the cheapest
 *               as measured. Loading is measured as kvd_load() and then the library's own kernels over the decoded numbers at each step.
 *               "new": the session has attended to nothing yet; "used": after the calls that were measured */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>

#include "bench/bench.h"
#include "bench/kv_bed.h"
#include "kernels/attn/attn.h"

enum { LAYERS = 4, RATIO = 4, HEADS = BED_HEADS * RATIO, BLOCKS = 256, QUERIES_MAX = 16, PAGE_BLOCKS = 16, REPEATS = 40 };

struct bed {
    struct kv_bed kv;
    const struct attn_ops *attn;
    float q[QUERIES_MAX * HEADS * BED_DIM];
    float o[QUERIES_MAX * HEADS * BED_DIM], lse[QUERIES_MAX * HEADS];
    float rows[QUERIES_MAX * HEADS * BED_DIM]; /* the same queries, stacked by KV head */
    uint32_t pos[QUERIES_MAX * RATIO];
    void *work;
    struct tile_layout page; /* decoded numbers of PAGE_BLOCKS blocks of one KV head, as an engine has them */
    uint8_t *pages[LAYERS];
};

static void check(const struct bed *b, int r, const char *what)
{
    if (r) {
        fprintf(stderr, "bench_attend_form: %s: %d %s\n", what, r, kvd_message(b->kv.k));
        exit(1);
    }
}

static struct kvd_attention attention(struct bed *b, uint32_t layer, uint32_t n_queries, uint32_t n_blocks)
{
    struct kvd_attention a = KVD_ATTENTION_INIT;

    a.layer = layer;
    a.n_heads = HEADS;
    a.n_tokens = n_queries;
    a.q = b->q;
    a.first_position = (BLOCKS + 1) * BED_TOKENS;
    a.scale = 0.088f;
    a.first_block = 1;
    a.n_blocks = n_blocks;
    a.o = b->o;
    a.lse = b->lse;
    return a;
}

static void open_bed(struct bed *b)
{
    struct codec_spec raw = codec_spec_raw(CODEC_F16);
    struct cpu_features cpu;
    void *p;

    bed_start(&b->kv, "attend_form");
    bed_open(&b->kv, LAYERS, BLOCKS);
    bed_fresh_sequence(&b->kv);
    bed_publish(&b->kv);
    bed_match_whole(&b->kv);
    cpu_detect(&cpu);
    b->attn = attn_ops_choose(&cpu);
    for (size_t i = 0; i < QUERIES_MAX * HEADS * BED_DIM; i++)
        b->q[i] = b->rows[i] = (float)(bench_random(&b->kv.seed) % 2001) / 1000 - 1;
    for (size_t i = 0; i < QUERIES_MAX * RATIO; i++)
        b->pos[i] = (BLOCKS + 1) * BED_TOKENS + QUERIES_MAX;
    p = bench_alloc(attn_work_bytes(QUERIES_MAX * RATIO, PAGE_BLOCKS * BED_TOKENS, BED_DIM, BED_DIM));
    b->work = p;
    check(b, tile_layout_init(&b->page, &raw, &raw, PAGE_BLOCKS * BED_TOKENS, BED_DIM, BED_DIM, NULL), "tile_layout_init");
    for (int l = 0; l < LAYERS; l++)
        b->pages[l] = bench_alloc((size_t)BLOCKS / PAGE_BLOCKS * BED_HEADS * b->page.bytes);
}

/* ---- what is measured ---- */

static double attend_nsec(struct bed *b, kvd_prefix *prefix, uint32_t layer, uint32_t n_queries, uint32_t n_blocks,
                          enum kvd_attend_form form)
{
    struct kvd_attention a = attention(b, layer, n_queries, n_blocks);
    uint64_t begun = bench_nsec();

    check(b, kvd_attend(prefix, &a, form), "kvd_attend");
    return (double)(bench_nsec() - begun);
}

static void partial(struct bed *b, const struct attn_block *blocks, uint32_t n_blocks, uint32_t head, uint32_t n_queries)
{
    struct attn_params params = {0.088f, 0, 0, 0, BED_DIM};
    struct attn_rows rows = {n_queries * RATIO, b->rows + (size_t)head * n_queries * RATIO * BED_DIM, b->pos};
    struct attn_out out = {b->o, b->lse, NULL};

    check(b, attn_partial(b->attn, &params, blocks, n_blocks, &rows, &out, b->work), "attn_partial");
}

/* The kernels by themselves, over the leased tiles. */
static double kernel_nsec(struct bed *b, uint32_t layer, uint32_t n_queries, uint32_t n_blocks)
{
    struct payload_part *part = &b->kv.layout->parts[layer];
    const uint8_t *payload[BLOCKS];
    struct attn_block blocks[BLOCKS];
    uint64_t begun;

    for (uint32_t i = 0; i < n_blocks; i++) {
        struct kvd_block block;

        check(b, kvd_prefix_block(b->kv.prefix, i + 1, 0, &block), "kvd_prefix_block");
        payload[i] = (const uint8_t *)block.payload + part->off;
    }
    begun = bench_nsec();
    for (uint32_t h = 0; h < BED_HEADS; h++) {
        for (uint32_t i = 0; i < n_blocks; i++)
            blocks[i] = (struct attn_block){payload[i] + (size_t)h * part->tile.bytes, &part->tile, (i + 1) * BED_TOKENS,
                                            BED_TOKENS};
        partial(b, blocks, n_blocks, h, n_queries);
    }
    return (double)(bench_nsec() - begun);
}

static double load_nsec(struct bed *b, uint32_t layer, uint32_t n_blocks)
{
    uint64_t begun = bench_nsec();

    for (uint32_t at = 0; at < n_blocks; at += PAGE_BLOCKS) {
        uint8_t *to = b->pages[layer] + (size_t)at / PAGE_BLOCKS * BED_HEADS * b->page.bytes;
        struct kvd_kv kv[LAYERS] = {{0}};

        kv[layer] = (struct kvd_kv){to + b->page.k_codes_off, to + b->page.v_codes_off, BED_DIM * 2, b->page.bytes,
                                    BED_DIM * 2, b->page.bytes};
        check(b, kvd_load(b->kv.prefix, 1 + at, n_blocks - at < PAGE_BLOCKS ? n_blocks - at : PAGE_BLOCKS, KVD_F16, kv, 0),
              "kvd_load");
    }
    return (double)(bench_nsec() - begun);
}

/* One step over what was loaded. */
static double own_nsec(struct bed *b, uint32_t layer, uint32_t n_queries, uint32_t n_blocks)
{
    struct attn_block blocks[BLOCKS / PAGE_BLOCKS];
    uint32_t n = (n_blocks + PAGE_BLOCKS - 1) / PAGE_BLOCKS, left = n_blocks % PAGE_BLOCKS;
    uint64_t begun = bench_nsec();

    for (uint32_t h = 0; h < BED_HEADS; h++) {
        for (uint32_t i = 0; i < n; i++)
            blocks[i] = (struct attn_block){b->pages[layer] + ((size_t)i * BED_HEADS + h) * b->page.bytes, &b->page,
                                            (1 + i * PAGE_BLOCKS) * BED_TOKENS,
                                            (i + 1 == n && left ? left : PAGE_BLOCKS) * BED_TOKENS};
        partial(b, blocks, n, h, n_queries);
    }
    return (double)(bench_nsec() - begun);
}

/* ---- overhead and threads ---- */

static void bench_overhead(struct bed *b)
{
    static const uint32_t lengths[] = {1, 4, 16, 64, 256};

    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        double with[REPEATS], without[REPEATS];
        char name[64];

        for (int r = 0; r < REPEATS; r++) {
            with[r] = attend_nsec(b, b->kv.prefix, r % LAYERS, 1, lengths[i], KVD_ATTEND_LOCAL);
            without[r] = kernel_nsec(b, (r + 1) % LAYERS, 1, lengths[i]);
        }
        snprintf(name, sizeof(name), "overhead, %u tokens", lengths[i] * BED_TOKENS);
        bench_line("attend_form", name, bench_median(with, REPEATS) / 1000, "us", bench_median(without, REPEATS) / 1000,
                   "attn_partial over the same tiles; at most 1.1 from 1024 tokens on");
    }
}

struct helper {
    kvd_attending *attending;
    _Atomic bool stop;
};

static void *help(void *arg)
{
    struct helper *h = arg;

    while (!atomic_load(&h->stop))
        if (kvd_attend_work(h->attending) == KVD_E_NOT_FOUND)
            __builtin_ia32_pause();
    return NULL;
}

static double parts_nsec(struct bed *b, kvd_attending *attending, uint32_t layer, uint32_t n_blocks)
{
    struct kvd_attention a = attention(b, layer, 1, n_blocks);
    uint64_t begun = bench_nsec();

    check(b, kvd_attend_begin(attending, b->kv.prefix, &a, 2), "kvd_attend_begin");
    while (kvd_attend_work(attending) == KVD_OK) {
    }
    check(b, kvd_attend_wait(attending, -1), "kvd_attend_wait");
    return (double)(bench_nsec() - begun);
}

/* On processors 0 and 1 of those that we may use. */
static void pin(int number)
{
    cpu_set_t all, one;

    sched_getaffinity(0, sizeof(all), &all);
    CPU_ZERO(&one);
    for (int i = 0, n = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &all) && n++ == number)
            CPU_SET(i, &one);
    if (CPU_COUNT(&one))
        sched_setaffinity(0, sizeof(one), &one);
}

static void *help_pinned(void *arg)
{
    pin(1);
    return help(arg);
}

static void bench_threads(struct bed *b)
{
    static const uint32_t lengths[] = {16, 64, 256};
    struct helper helper = {0};
    cpu_set_t before;
    pthread_t thread;

    sched_getaffinity(0, sizeof(before), &before);
    if (CPU_COUNT(&before) < 2) {
        fprintf(stderr, "bench_attend_form: one processor: no threads are measured\n");
        return;
    }
    check(b, kvd_attending_create(b->kv.space, &helper.attending), "kvd_attending_create");
    if (pthread_create(&thread, NULL, help_pinned, &helper))
        exit(1);
    pin(0);
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        double one[REPEATS], two[REPEATS];
        char name[64];

        for (int r = 0; r < REPEATS; r++) {
            two[r] = parts_nsec(b, helper.attending, r % LAYERS, lengths[i]);
            one[r] = attend_nsec(b, b->kv.prefix, (r + 1) % LAYERS, 1, lengths[i], KVD_ATTEND_LOCAL);
        }
        snprintf(name, sizeof(name), "two threads, %u tokens", lengths[i] * BED_TOKENS);
        bench_line("attend_form", name, bench_minimum(one, REPEATS) / bench_minimum(two, REPEATS), "times as fast", 1,
                   "one thread, best of each; at least 1.8 until memory binds");
    }
    atomic_store(&helper.stop, true);
    pthread_join(thread, NULL);
    kvd_attending_destroy(helper.attending);
    sched_setaffinity(0, sizeof(before), &before);
}

/* ---- choice ---- */

/* Nanoseconds as measured: of a call in each form, of loading once, of a step over what was loaded. */
struct measured {
    double local, daemon, load, own;
};

static struct measured measure(struct bed *b, uint32_t n_queries, uint32_t n_blocks)
{
    double local[REPEATS], daemon[REPEATS], load[REPEATS], own[REPEATS];

    for (int r = 0; r < REPEATS; r++) {
        local[r] = attend_nsec(b, b->kv.prefix, r % LAYERS, n_queries, n_blocks, KVD_ATTEND_LOCAL);
        daemon[r] = attend_nsec(b, b->kv.prefix, (r + 2) % LAYERS, n_queries, n_blocks, KVD_ATTEND_DAEMON);
        load[r] = load_nsec(b, r % LAYERS, n_blocks);
        own[r] = own_nsec(b, (r + 1) % LAYERS, n_queries, n_blocks);
    }
    return (struct measured){bench_median(local, REPEATS), bench_median(daemon, REPEATS), bench_median(load, REPEATS),
                             bench_median(own, REPEATS)};
}

static double cost_of(const struct measured *m, enum kvd_attend_form form, uint64_t n_steps)
{
    return form == KVD_ATTEND_LOAD ? m->load + (double)n_steps * m->own
                                   : (double)n_steps * (form == KVD_ATTEND_DAEMON ? m->daemon : m->local);
}

static void choose(struct bed *b, kvd_prefix *prefix, const char *state, const struct measured *m, uint32_t n_queries,
                   uint32_t n_blocks)
{
    static const uint64_t steps[] = {1, 8, 64, 1024};
    static const char *const names[] = {"auto", "local", "daemon", "load"};

    for (size_t s = 0; s < sizeof(steps) / sizeof(steps[0]); s++) {
        struct kvd_attention a = attention(b, 0, n_queries, n_blocks);
        struct kvd_attend_costs costs = {.size = sizeof(costs)};
        double local = cost_of(m, KVD_ATTEND_LOCAL, steps[s]), daemon = cost_of(m, KVD_ATTEND_DAEMON, steps[s]);
        double load = cost_of(m, KVD_ATTEND_LOAD, steps[s]), best = local < daemon ? local : daemon;
        char name[224];

        check(b, kvd_attend_choose(prefix, &a, steps[s], &costs), "kvd_attend_choose");
        snprintf(name, sizeof(name),
                 "choice, %s, %u tokens, %u queries, %u steps: %s (local %.0f us, said %.0f; daemon %.0f us, said %.0f; "
                 "load %.0f us, said %.0f)",
                 state, n_blocks * BED_TOKENS, n_queries, (unsigned)steps[s], names[costs.form], local / 1000,
                 costs.local_usec, daemon / 1000, costs.daemon_usec, load / 1000, costs.load_usec);
        bench_line("attend_form", name, cost_of(m, costs.form, steps[s]) / 1000, "us", (best < load ? best : load) / 1000,
                   "the cheapest as measured; at most 1.2");
    }
}

static void bench_choice(struct bed *b)
{
    static const uint32_t lengths[] = {4, 16, 64, 256}, queries[] = {1, 4, 16};
    struct kvd_space_desc desc = KVD_SPACE_INIT;
    struct kvd_group group = {0};

    desc.model = "bench-4";
    desc.block_tokens = BED_TOKENS;
    desc.groups = &group;
    desc.n_groups = 1;
    desc.layers = b->kv.layers;
    desc.n_layers = LAYERS;
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++)
        for (size_t n = 0; n < sizeof(queries) / sizeof(queries[0]); n++) {
            struct measured m = measure(b, queries[n], lengths[i]);
            kvd_space *space;
            kvd_prefix *prefix;
            size_t got;

            /* The same space opened once more has measured nothing. */
            check(b, kvd_space_open(b->kv.k, &desc, &space), "kvd_space_open");
            check(b, kvd_prefix_create(space, BLOCKS + 1, &prefix), "kvd_prefix_create");
            check(b, kvd_match(prefix, b->kv.tokens, (BLOCKS + 1) * BED_TOKENS, NULL, 0, &got), "kvd_match");
            choose(b, prefix, "new", &m, queries[n], lengths[i]);
            kvd_space_close(space);
            choose(b, b->kv.prefix, "used", &m, queries[n], lengths[i]);
        }
}

int main(void)
{
    struct bed *b = calloc(1, sizeof(*b));

    if (!b)
        return 1;
    open_bed(b);
    bench_overhead(b);
    bench_threads(b);
    bench_choice(b);
    bed_close(&b->kv);
    bed_stop(&b->kv);
    for (int l = 0; l < LAYERS; l++)
        free(b->pages[l]);
    free(b->work);
    free(b);
    return 0;
}
