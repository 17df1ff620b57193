#include "store/policy.h"

#include "store/policy-t.h"

#include <string.h>

/* The first is the default. */
static const struct policy_ops *const policies[] = {&policy_s3fifo, &policy_lru};

const struct policy_ops *policy_at(size_t i)
{
    return i < sizeof(policies) / sizeof(policies[0]) ? policies[i] : NULL;
}

const struct policy_ops *policy_find(const char *name)
{
    const struct policy_ops *ops;

    if (!name)
        return policies[0];
    for (size_t i = 0; (ops = policy_at(i)); i++)
        if (strcmp(ops->name, name) == 0)
            return ops;
    return NULL;
}

static void assert_queue(const struct policy *p, const struct policy_node *nodes, const struct policy_queue *q,
                         size_t k)
{
    uint32_t n = 0, prev = POLICY_NIL;

    for (uint32_t id = q->head; id != POLICY_NIL; prev = id, id = nodes[id].next) {
        assert(id < p->n_max && n < q->n);
        assert(nodes[id].linked && nodes[id].queue == k && nodes[id].prev == prev);
        n++;
    }
    assert(n == q->n && q->tail == prev);
}

void policy_assert_nodes(const struct policy *p, const struct policy_node *nodes, const struct policy_queue *qs,
                         size_t n_qs)
{
    uint32_t n[POLICY_N_STATES] = {0};
    uint64_t n_linked = 0, n_queued = 0;

    for (uint32_t id = 0; id < p->n_max; id++) {
        assert(nodes[id].state < POLICY_N_STATES);
        n[nodes[id].state]++;
        n_linked += nodes[id].linked;
        switch ((enum policy_state)nodes[id].state) {
        case POLICY_EVICTABLE:
            assert(nodes[id].linked);
            break;
        case POLICY_PARKED:
            break;
        default:
            assert(!nodes[id].linked);
        }
    }
    for (size_t k = 0; k < n_qs; k++) { /* as many linked as queued, and every queued one linked once: P2 */
        assert_queue(p, nodes, &qs[k], k);
        n_queued += qs[k].n;
    }
    assert(n_linked == n_queued);
    assert(p->n_present == p->n_max - n[POLICY_ABSENT] && p->n_evictable == n[POLICY_EVICTABLE]);
    assert(p->n_steps <= POLICY_STEPS_PER_CALL * p->n_calls);
}
