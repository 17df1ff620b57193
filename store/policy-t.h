/* What the policies share: the record of an id, and queues of ids linked through it.
 *
 *        inserting end                       evicting end
 *     head -> [id] <-> [id] <-> [id] <-> [id] <- tail            prev points towards the head, next towards the tail
 *
 * A PARKED id stays linked where it is. A scan from the evicting end that meets one whose turn has come takes it off
 * (it is then set aside: PARKED, in no queue); unpark() puts it back at the evicting end. So a scan looks at a parked
 * id once for each time that it came into a queue, and an id that is parked and unparked between two scans has not
 * moved at all.
 *
 * For store/policy*.c only. */
#ifndef KVD_STORE_POLICY_T_H
#define KVD_STORE_POLICY_T_H

#include "store/policy.h"

#include <assert.h>
#include <stdbool.h>

#define POLICY_NIL UINT32_MAX

enum policy_state { POLICY_ABSENT, POLICY_EVICTABLE, POLICY_PARKED, POLICY_PENDING, POLICY_N_STATES };

/* 16 bytes. All zero = ABSENT, so that memory fresh from the kernel is never touched before it is needed. */
struct policy_node {
    uint32_t prev, next; /* valid while linked */
    uint32_t tag;        /* the policy's own: what remains of the key's hash */
    uint8_t state;       /* enum policy_state */
    uint8_t linked;      /* in a queue */
    uint8_t freq;        /* the policy's own: uses, saturating */
    uint8_t queue;       /* the policy's own: which queue it is in, or comes back to from being set aside */
};
static_assert(sizeof(struct policy_node) == 16, "node");

struct policy_queue {
    uint32_t head, tail, n;
};

static inline void policy_queue_init(struct policy_queue *q)
{
    *q = (struct policy_queue){.head = POLICY_NIL, .tail = POLICY_NIL};
}

static inline void policy_queue_push_head(struct policy_queue *q, struct policy_node *nodes, uint32_t id)
{
    assert(!nodes[id].linked);
    nodes[id].prev = POLICY_NIL;
    nodes[id].next = q->head;
    nodes[id].linked = 1;
    if (q->head == POLICY_NIL)
        q->tail = id;
    else
        nodes[q->head].prev = id;
    q->head = id;
    q->n++;
}

static inline void policy_queue_push_tail(struct policy_queue *q, struct policy_node *nodes, uint32_t id)
{
    assert(!nodes[id].linked);
    nodes[id].prev = q->tail;
    nodes[id].next = POLICY_NIL;
    nodes[id].linked = 1;
    if (q->tail == POLICY_NIL)
        q->head = id;
    else
        nodes[q->tail].next = id;
    q->tail = id;
    q->n++;
}

static inline void policy_queue_unlink(struct policy_queue *q, struct policy_node *nodes, uint32_t id)
{
    struct policy_node *x = &nodes[id];

    assert(x->linked && q->n > 0);
    if (x->prev == POLICY_NIL)
        q->head = x->next;
    else
        nodes[x->prev].next = x->next;
    if (x->next == POLICY_NIL)
        q->tail = x->prev;
    else
        nodes[x->next].prev = x->prev;
    x->linked = 0;
    q->n--;
}

/* The one place where a state changes: keeps the counts in step (P3). */
static inline void policy_move(struct policy *p, struct policy_node *x, enum policy_state from, enum policy_state to)
{
    assert(x->state == from);
    p->n_present += (to != POLICY_ABSENT) - (from != POLICY_ABSENT);
    p->n_evictable += (to == POLICY_EVICTABLE) - (from == POLICY_EVICTABLE);
    x->state = (uint8_t)to;
}

/* Checks P1 to P4 over a policy's nodes and queues; queue k of qs holds the linked ids whose node says queue == k. */
void policy_assert_nodes(const struct policy *p, const struct policy_node *nodes, const struct policy_queue *qs,
                         size_t n_qs);

extern const struct policy_ops policy_s3fifo;
extern const struct policy_ops policy_lru;

#endif
