/* LRU: the id that was inserted or hit longest ago leaves first.
 *
 *     insert, hit, keep -> [head ............ queue ............ tail] -> victim
 *                                                              ^  |
 *                                                       unpark |  v set aside (parked when its turn came)
 *
 *   L1  The queue is in order of last use, but for ids that come back from being set aside: those are older than all
 *       the rest, and leave latest unparked first.
 *   L2  Ids that are set aside are PARKED and were last used before every id that has stayed in the queue since.
 *
 * A hit on a parked id moves it like any other, so an inner block of a chain that is in use keeps its true place and a
 * parent whose last child leaves is next only if it has not been used since its turn came. */
#include "store/policy-t.h"
#include "store/policy.h"

#include <errno.h>
#include <stdlib.h>

struct lru {
    struct policy base;
    struct policy_queue q;
    struct policy_node nodes[];
};

static int lru_create(uint32_t n_max, struct policy **ret_policy)
{
    struct lru *l;

    if (n_max == 0 || n_max > POLICY_N_MAX)
        return -EINVAL;
    l = calloc(1, sizeof(*l) + (size_t)n_max * sizeof(l->nodes[0]));
    if (!l)
        return -ENOMEM;
    l->base.ops = &policy_lru;
    l->base.n_max = n_max;
    policy_queue_init(&l->q);
    *ret_policy = &l->base;
    return 0;
}

static struct policy *lru_destroy(struct policy *p)
{
    free(p);
    return NULL;
}

/* Every call comes in here. */
static struct lru *lru_enter(struct policy *p)
{
    assert(p->ops == &policy_lru);
    p->n_calls++;
    return (struct lru *)p;
}

static struct policy_node *lru_node(struct lru *l, uint32_t id)
{
    assert(id < l->base.n_max);
    return &l->nodes[id];
}

static void lru_insert(struct policy *p, uint32_t id, uint64_t key_hash)
{
    struct lru *l = lru_enter(p);

    (void)key_hash;
    policy_move(p, lru_node(l, id), POLICY_ABSENT, POLICY_EVICTABLE);
    policy_queue_push_head(&l->q, l->nodes, id);
}

static void lru_hit(struct policy *p, uint32_t id)
{
    struct lru *l = lru_enter(p);
    struct policy_node *x = lru_node(l, id);

    assert(x->state != POLICY_ABSENT);
    if (x->state == POLICY_PENDING)
        return; /* keep() will put it at the head */
    if (x->linked)
        policy_queue_unlink(&l->q, l->nodes, id);
    policy_queue_push_head(&l->q, l->nodes, id);
}

static void lru_remove(struct policy *p, uint32_t id)
{
    struct lru *l = lru_enter(p);
    struct policy_node *x = lru_node(l, id);

    assert(x->state != POLICY_ABSENT);
    if (x->linked)
        policy_queue_unlink(&l->q, l->nodes, id);
    policy_move(p, x, x->state, POLICY_ABSENT);
}

static void lru_park(struct policy *p, uint32_t id)
{
    policy_move(p, lru_node(lru_enter(p), id), POLICY_EVICTABLE, POLICY_PARKED);
}

static void lru_unpark(struct policy *p, uint32_t id)
{
    struct lru *l = lru_enter(p);
    struct policy_node *x = lru_node(l, id);

    policy_move(p, x, POLICY_PARKED, POLICY_EVICTABLE);
    if (!x->linked)
        policy_queue_push_tail(&l->q, l->nodes, id);
}

static int lru_victim(struct policy *p, uint32_t *ret_id)
{
    struct lru *l = lru_enter(p);

    while (l->q.tail != POLICY_NIL) {
        uint32_t id = l->q.tail;

        p->n_steps++;
        policy_queue_unlink(&l->q, l->nodes, id);
        if (l->nodes[id].state == POLICY_PARKED)
            continue; /* set aside */
        policy_move(p, &l->nodes[id], POLICY_EVICTABLE, POLICY_PENDING);
        *ret_id = id;
        return 0;
    }
    return -ENOENT;
}

static void lru_evicted(struct policy *p, uint32_t id)
{
    policy_move(p, lru_node(lru_enter(p), id), POLICY_PENDING, POLICY_ABSENT);
}

static void lru_keep(struct policy *p, uint32_t id)
{
    struct lru *l = lru_enter(p);

    policy_move(p, lru_node(l, id), POLICY_PENDING, POLICY_EVICTABLE);
    policy_queue_push_head(&l->q, l->nodes, id);
}

static void lru_assert_valid(const struct policy *p)
{
    const struct lru *l = (const struct lru *)p;

    assert(p->ops == &policy_lru);
    policy_assert_nodes(p, l->nodes, &l->q, 1);
}

const struct policy_ops policy_lru = {
    .name = "lru",
    .create = lru_create,
    .destroy = lru_destroy,
    .insert = lru_insert,
    .hit = lru_hit,
    .remove = lru_remove,
    .park = lru_park,
    .unpark = lru_unpark,
    .victim = lru_victim,
    .evicted = lru_evicted,
    .keep = lru_keep,
    .assert_valid = lru_assert_valid,
};
