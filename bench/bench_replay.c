/* Replay of a trace of prompts: hit rate against capacity, for each eviction policy and for the offline optimum.
 *
 *   bench_replay [--trace FILE] [--svg FILE]          FILE of JSON lines with "hash_ids", else $KVD_TRACE, else a made-up trace
 *
 * A request's blocks count as hits as far as they are present from its start without a gap. What misses is put in, block by block,
 * each a child of the one before; a block with a child, or at the end of the chain that is being put in, is parked. Capacity is in
 * blocks, from 1/64 of the trace's different blocks to all of them.
 *
 * The offline optimum knows the future. It throws out the block whose next use is furthest away, or does not take the new one in
 * if that is the furthest. A block is used in every request that uses a child of it, and before the child; so the furthest next use
 * is always that of a leaf (asserted), the chains stay whole, and since nothing beats this rule without the wish to keep chains
 * whole (Belady 1966, with bypass), nothing beats it with that wish. */
#include "bench/bench.h"
#include "bench/replay_trace.h"
#include "bench/svg_plot.h"
#include "store/policy.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#define N_CAPS 13u
#define N_CURVES_MAX 8u
#define NONE UINT32_MAX
#define MAKE_SEED UINT64_C(7)

/* ---- a cache under a policy ---- */

struct sim {
    const struct trace *t;
    struct policy *p;
    uint32_t *id_of;    /* block -> id, or NONE */
    uint32_t *block_of; /* id -> block */
    uint32_t *n_holds;  /* of a block: children present, and the end of the chain being put in */
    uint32_t *free_ids;
    uint32_t n_free;
};

static void hold(struct sim *s, uint32_t block)
{
    if (block != TRACE_NO_PARENT && s->n_holds[block]++ == 0)
        s->p->ops->park(s->p, s->id_of[block]);
}

static void let_go(struct sim *s, uint32_t block)
{
    if (block != TRACE_NO_PARENT && --s->n_holds[block] == 0)
        s->p->ops->unpark(s->p, s->id_of[block]);
}

static bool make_room(struct sim *s)
{
    uint32_t id;

    if (s->n_free > 0)
        return true;
    if (s->p->ops->victim(s->p, &id) < 0)
        return false;
    s->p->ops->evicted(s->p, id);
    s->id_of[s->block_of[id]] = NONE;
    s->free_ids[s->n_free++] = id;
    let_go(s, s->t->parent[s->block_of[id]]);
    return true;
}

/* Returns how many blocks hit. */
static size_t sim_request(struct sim *s, const uint32_t *chain, size_t n)
{
    size_t n_hit = 0, i;
    uint32_t end = TRACE_NO_PARENT;

    for (; n_hit < n && s->id_of[chain[n_hit]] != NONE; n_hit++)
        s->p->ops->hit(s->p, s->id_of[chain[n_hit]]);
    if (n_hit > 0)
        hold(s, end = chain[n_hit - 1]);
    for (i = n_hit; i < n && make_room(s); i++) {
        uint32_t block = chain[i], id = s->free_ids[--s->n_free];
        uint64_t key = block;

        s->id_of[block] = id;
        s->block_of[id] = block;
        s->p->ops->insert(s->p, id, bench_random(&key));
        hold(s, s->t->parent[block]);
        hold(s, block);
        let_go(s, end);
        end = block;
    }
    let_go(s, end);
    return n_hit;
}

static double hit_percent_policy(const struct trace *t, const struct policy_ops *ops, uint32_t cap)
{
    struct sim s = {.t = t, .n_free = cap};
    size_t n_hit = 0;

    if (ops->create(cap, &s.p) < 0) {
        fprintf(stderr, "bench_replay: no memory\n");
        exit(1);
    }
    s.id_of = bench_alloc(t->n_blocks * sizeof(*s.id_of));
    s.n_holds = bench_alloc(t->n_blocks * sizeof(*s.n_holds));
    s.block_of = bench_alloc(cap * sizeof(*s.block_of));
    s.free_ids = bench_alloc(cap * sizeof(*s.free_ids));
    memset(s.id_of, 0xff, t->n_blocks * sizeof(*s.id_of));
    memset(s.n_holds, 0, t->n_blocks * sizeof(*s.n_holds));
    for (uint32_t i = 0; i < cap; i++)
        s.free_ids[i] = cap - 1 - i;
    for (size_t r = 0; r < t->n_requests; r++)
        n_hit += sim_request(&s, t->uses + t->first[r], t->first[r + 1] - t->first[r]);
    ops->destroy(s.p);
    free(s.id_of);
    free(s.n_holds);
    free(s.block_of);
    free(s.free_ids);
    return 100.0 * (double)n_hit / (double)t->n_uses;
}

/* ---- the offline optimum ---- */

struct oracle {
    const size_t *next_use; /* of the use at a position: the position of that block's next use, SIZE_MAX if there is none */
    size_t *next_of;        /* block -> next use, if present */
    uint32_t *n_children;
    bool *present;
    struct furthest {
        size_t next;
        uint32_t block;
    } *heap; /* by next, largest first; an item whose block has another next by now is stale */
    size_t n_heap;
};

static bool further(const struct furthest *a, const struct furthest *b)
{
    return a->next != b->next ? a->next > b->next : a->block > b->block; /* never again: children are numbered after parents */
}

static void heap_push(struct oracle *o, struct furthest x)
{
    size_t i = o->n_heap++;

    for (; i > 0 && further(&x, &o->heap[(i - 1) / 2]); i = (i - 1) / 2)
        o->heap[i] = o->heap[(i - 1) / 2];
    o->heap[i] = x;
}

static void heap_pop(struct oracle *o)
{
    struct furthest x = o->heap[--o->n_heap];
    size_t i = 0, c;

    while ((c = 2 * i + 1) < o->n_heap) {
        if (c + 1 < o->n_heap && further(&o->heap[c + 1], &o->heap[c]))
            c++;
        if (!further(&o->heap[c], &x))
            break;
        o->heap[i] = o->heap[c];
        i = c;
    }
    o->heap[i] = x;
}

static bool heap_stale(const struct oracle *o)
{
    return !o->present[o->heap[0].block] || o->next_of[o->heap[0].block] != o->heap[0].next;
}

static double hit_percent_optimum(const struct trace *t, const size_t *next_use, uint32_t cap)
{
    struct oracle o = {.next_use = next_use};
    size_t n_hit = 0, n_present = 0;

    o.next_of = bench_alloc(t->n_blocks * sizeof(*o.next_of));
    o.n_children = bench_alloc(t->n_blocks * sizeof(*o.n_children));
    o.present = bench_alloc(t->n_blocks * sizeof(*o.present));
    o.heap = bench_alloc(t->n_uses * sizeof(*o.heap));
    memset(o.n_children, 0, t->n_blocks * sizeof(*o.n_children));
    memset(o.present, 0, t->n_blocks * sizeof(*o.present));
    for (size_t i = 0; i < t->n_uses; i++) {
        struct furthest x = {.next = next_use[i], .block = t->uses[i]};
        uint32_t parent = t->parent[x.block];

        if (o.present[x.block]) {
            n_hit++;
        } else {
            while (o.n_heap > 0 && heap_stale(&o))
                heap_pop(&o);
            if (n_present == cap && further(&x, &o.heap[0]))
                continue; /* not taken in */
            if (n_present == cap) {
                uint32_t out = o.heap[0].block;

                assert(o.n_children[out] == 0 && out != parent);
                heap_pop(&o);
                o.present[out] = false;
                if (t->parent[out] != TRACE_NO_PARENT)
                    o.n_children[t->parent[out]]--;
                n_present--;
            }
            assert(parent == TRACE_NO_PARENT || o.present[parent]);
            o.present[x.block] = true;
            n_present++;
            if (parent != TRACE_NO_PARENT)
                o.n_children[parent]++;
        }
        o.next_of[x.block] = x.next;
        heap_push(&o, x);
    }
    free(o.next_of);
    free(o.n_children);
    free(o.present);
    free(o.heap);
    return 100.0 * (double)n_hit / (double)t->n_uses;
}

static size_t *next_uses(const struct trace *t)
{
    size_t *next = bench_alloc(t->n_uses * sizeof(*next)), *seen = bench_alloc(t->n_blocks * sizeof(*seen));

    memset(seen, 0xff, t->n_blocks * sizeof(*seen));
    for (size_t i = t->n_uses; i-- > 0;) {
        next[i] = seen[t->uses[i]];
        seen[t->uses[i]] = i;
    }
    free(seen);
    return next;
}

/* ---- the curves ---- */

struct curves {
    double x[N_CAPS]; /* capacity as a part of the trace's blocks */
    uint32_t cap[N_CAPS];
    double y[N_CURVES_MAX][N_CAPS]; /* [0] the optimum, then the policies */
    size_t n;
    double most; /* hit rate with room for all */
};

static void measure(const struct trace *t, struct curves *c)
{
    size_t *next = next_uses(t);
    char name[64];

    c->most = 100.0 * (double)(t->n_uses - t->n_blocks) / (double)t->n_uses;
    for (size_t i = 0; i < N_CAPS; i++) {
        c->x[i] = exp2(((double)i - (N_CAPS - 1)) / 2);
        c->cap[i] = (uint32_t)(c->x[i] * (double)t->n_blocks + 0.5);
        c->cap[i] += c->cap[i] == 0;
        c->y[0][i] = hit_percent_optimum(t, next, c->cap[i]);
        snprintf(name, sizeof(name), "optimum capacity=%.4f", c->x[i]);
        bench_line("replay", name, c->y[0][i], "% of blocks", c->most, "room for all blocks, more is better");
        c->n = 1;
        for (const struct policy_ops *ops; c->n < N_CURVES_MAX && (ops = policy_at(c->n - 1)); c->n++) {
            c->y[c->n][i] = hit_percent_policy(t, ops, c->cap[i]);
            snprintf(name, sizeof(name), "%s capacity=%.4f", ops->name, c->x[i]);
            bench_line("replay", name, c->y[c->n][i], "% of blocks", c->y[0][i],
                       "the offline optimum with the same capacity, more is better");
        }
    }
    free(next);
}

static int draw(const struct trace *t, const struct curves *c, const char *source, const char *path)
{
    static const char *const colours[N_CURVES_MAX] = {"#555", "#d1495b", "#00798c", "#edae49", "#6a4c93", "#2e8b57", "#888", "#000"};
    struct plot_series series[N_CURVES_MAX];
    char subtitle[160];
    struct plot p = {
        .title = "Hit rate against capacity",
        .subtitle = subtitle,
        .x_label = "capacity as a part of the different blocks of the trace",
        .y_label = "blocks that hit, %",
        .x = c->x,
        .n_x = N_CAPS,
        .series = series,
        .n_series = c->n,
    };
    FILE *f = fopen(path, "we");
    int r;

    if (!f)
        return -errno;
    snprintf(subtitle, sizeof(subtitle), "%s: %zu requests, %zu uses of %zu blocks; room for all gives %.1f %%", source,
             t->n_requests, t->n_uses, t->n_blocks, c->most);
    for (size_t i = 0; i < c->n; i++)
        series[i] = (struct plot_series){
            .name = i == 0 ? "offline optimum" : policy_at(i - 1)->name,
            .colour = colours[i],
            .y = c->y[i],
            .dashed = i == 0,
        };
    r = plot_write_svg(&p, f);
    if (fclose(f) != 0 && r == 0)
        r = -errno;
    return r;
}

int main(int argc, char **argv)
{
    const char *path = getenv("KVD_TRACE"), *svg = NULL;
    struct curves curves = {0};
    struct trace t;
    size_t line = 0;
    int r;

    for (int i = 1; i < argc; i += 2) {
        if (i + 1 < argc && strcmp(argv[i], "--trace") == 0)
            path = argv[i + 1];
        else if (i + 1 < argc && strcmp(argv[i], "--svg") == 0)
            svg = argv[i + 1];
        else {
            fprintf(stderr, "usage: bench_replay [--trace FILE] [--svg FILE]\n");
            return 2;
        }
    }
    if (path && !*path)
        path = NULL;
    r = path ? trace_read(&t, path, &line) : trace_make(&t, MAKE_SEED);
    if (r < 0) {
        fprintf(stderr, "bench_replay: %s, line %zu: %s\n", path ? path : "made-up trace", line, strerror(-r));
        trace_deinit(&t);
        return 1;
    }
    measure(&t, &curves);
    if (svg && (r = draw(&t, &curves, path ? "trace from a file" : "made-up agents", svg)) < 0)
        fprintf(stderr, "bench_replay: %s: %s\n", svg, strerror(-r));
    trace_deinit(&t);
    return r < 0;
}
