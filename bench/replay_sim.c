#include "bench/replay_sim.h"

#include "bench/bench.h"

#include <assert.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NONE UINT32_MAX

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

double replay_policy(const struct trace *t, const struct policy_ops *ops, uint32_t cap)
{
    struct sim s = {.t = t, .n_free = cap};
    size_t n_hit = 0;

    if (ops->create(cap, &s.p) < 0) {
        fprintf(stderr, "replay: no memory\n");
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
    size_t *next_of; /* block -> position of its next use, SIZE_MAX if there is none; if present */
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
    /* Never again is the same for all: then the later number, for children are numbered after their parents. */
    return a->next != b->next ? a->next > b->next : a->block > b->block;
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

/* Of the use at each position: the position of that block's next use, SIZE_MAX if there is none. */
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

double replay_optimum(const struct trace *t, uint32_t cap)
{
    size_t *next_use = next_uses(t);
    struct oracle o = {0};
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
    free(next_use);
    free(o.next_of);
    free(o.n_children);
    free(o.present);
    free(o.heap);
    return 100.0 * (double)n_hit / (double)t->n_uses;
}
