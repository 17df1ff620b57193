/* S3-FIFO: three first-in-first-out queues (Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache
 * eviction", SOSP 2023). Most blocks are used once; the small queue lets them go before they push out what is used
 * again.
 *
 *                               freq >= S3_PROMOTE: freq = 0               +--------+ freq > 0: freq - 1
 *     insert --> [head  small  tail] ---------------------+                v        |
 *            \                   | else                   +------>  [head  main  tail] ---+
 *             \                  v                        |              ^                | freq == 0
 *              \            victim, evicted --> ( ghost ) |              |                v
 *               \________ key in the ghost _______________|              |         victim, evicted
 *                                                                        |
 *                           victim, keep --> [head  resting  tail] -------+ one for each id evicted
 *
 *   S1  freq counts uses up to S3_FREQ_MAX; a hit writes that one byte and moves nothing.
 *   S2  n_in[k] counts the ids whose node says queue k and that are not PENDING: linked there or set aside from there.
 *       Set-aside ids take room, so shares are of what is present, not of what is linked.
 *   S3  victim() takes from the small queue while that holds more than its share of what is present, else from main;
 *       from the other one if the first has nothing evictable; from the resting ones if neither has.
 *   S4  The ghost remembers what left by the small queue, for as many evictions as main's share of what is present.
 *   S5  A PARKED id goes through promotion, decay and reinsertion like any other. Only where it would have been the
 *       victim is it set aside, with its queue and its freq; unparked, it stands at the evicting end of that queue
 *       again.
 *   S6  An id that was refused (keep: it is leased) rests: it is not asked for again before all others, or before other
 *       ids have been evicted. Set aside from there, it comes back to main.
 *
 * Amortised cost (P4): victim() looks at an id and either returns it (one a call), or sets it aside (once for each
 * insert, unpark, keep or evicted that brought it into a queue), or moves it on (which takes from freq what a hit or
 * keep put there). insert() and evicted() look at one bucket of the ghost, and evicted() at one resting id. */
#include "store/policy-t.h"
#include "store/policy.h"
#include "store/policy_ghost.h"

#include <errno.h>
#include <stdlib.h>

#define S3_FREQ_MAX 3u

/* Two figures differ from the paper's (10 % and 2), which suit loads where most keys never return and the others return
 * in bursts. A request uses each block of its chain once, so a second use is another request already, and no burst to
 * see through: one hit promotes. And a prefix first returns when a turn is over, later than it does from then on, so
 * that its trial must be long: half. docs/eviction.md has the measurements. */
#define S3_SMALL_PERCENT 50u
#define S3_PROMOTE       1u

enum { S3_SMALL, S3_MAIN, S3_RESTING, S3_N_QUEUES };

struct s3 {
    struct policy base;
    struct policy_queue q[S3_N_QUEUES];
    uint32_t n_in[S3_N_QUEUES];
    struct ghost ghost; /* its slots follow the nodes */
    struct policy_node nodes[];
};

static int s3_create(uint32_t n_max, struct policy **ret_policy)
{
    size_t n_slots;
    struct s3 *s;

    if (n_max == 0 || n_max > POLICY_N_MAX)
        return -EINVAL;
    n_slots = (size_t)ghost_n_buckets(n_max) * GHOST_WAYS;
    s = calloc(1, sizeof(*s) + (size_t)n_max * sizeof(s->nodes[0]) + n_slots * sizeof(struct ghost_slot));
    if (!s)
        return -ENOMEM;
    s->base.ops = &policy_s3fifo;
    s->base.n_max = n_max;
    s->ghost = (struct ghost){.slots = (void *)&s->nodes[n_max], .n_buckets = ghost_n_buckets(n_max)};
    for (int k = 0; k < S3_N_QUEUES; k++)
        policy_queue_init(&s->q[k]);
    *ret_policy = &s->base;
    return 0;
}

static struct policy *s3_destroy(struct policy *p)
{
    free(p);
    return NULL;
}

/* Every call comes in here. */
static struct s3 *s3_enter(struct policy *p)
{
    assert(p->ops == &policy_s3fifo);
    p->n_calls++;
    return (struct s3 *)p;
}

static struct policy_node *s3_node(struct s3 *s, uint32_t id)
{
    assert(id < s->base.n_max);
    return &s->nodes[id];
}

/* What shares are of: all that is present and not on its way out. */
static uint32_t s3_total(const struct s3 *s)
{
    return s->n_in[S3_SMALL] + s->n_in[S3_MAIN] + s->n_in[S3_RESTING];
}

static uint32_t s3_small_share(const struct s3 *s)
{
    return (uint32_t)((uint64_t)s3_total(s) * S3_SMALL_PERCENT / 100);
}

/* Into queue k at its inserting end. */
static void s3_enqueue(struct s3 *s, uint32_t id, unsigned k)
{
    s->nodes[id].queue = (uint8_t)k;
    s->n_in[k]++;
    policy_queue_push_head(&s->q[k], s->nodes, id);
}

static void s3_insert(struct policy *p, uint32_t id, uint64_t key_hash)
{
    struct s3 *s = s3_enter(p);
    struct policy_node *x = s3_node(s, id);

    policy_move(p, x, POLICY_ABSENT, POLICY_EVICTABLE);
    x->tag = (uint32_t)(key_hash >> 32);
    x->freq = 0;
    p->n_steps++;
    s3_enqueue(s, id, ghost_take(&s->ghost, x->tag, s3_total(s) - s3_small_share(s)) ? S3_MAIN : S3_SMALL);
}

static void s3_hit(struct policy *p, uint32_t id)
{
    struct policy_node *x = s3_node(s3_enter(p), id);

    assert(x->state != POLICY_ABSENT);
    if (x->freq < S3_FREQ_MAX)
        x->freq++;
}

static void s3_remove(struct policy *p, uint32_t id)
{
    struct s3 *s = s3_enter(p);
    struct policy_node *x = s3_node(s, id);

    assert(x->state != POLICY_ABSENT);
    if (x->state != POLICY_PENDING)
        s->n_in[x->queue]--;
    if (x->linked)
        policy_queue_unlink(&s->q[x->queue], s->nodes, id);
    policy_move(p, x, x->state, POLICY_ABSENT);
}

static void s3_park(struct policy *p, uint32_t id)
{
    policy_move(p, s3_node(s3_enter(p), id), POLICY_EVICTABLE, POLICY_PARKED);
}

static void s3_unpark(struct policy *p, uint32_t id)
{
    struct s3 *s = s3_enter(p);
    struct policy_node *x = s3_node(s, id);

    policy_move(p, x, POLICY_PARKED, POLICY_EVICTABLE);
    if (!x->linked)
        policy_queue_push_tail(&s->q[x->queue], s->nodes, id);
}

/* Takes the next to leave off queue k, or finds that it has nothing evictable (and then is empty). */
static bool s3_scan(struct s3 *s, unsigned k, uint32_t *ret_id)
{
    static const uint8_t freq_stay[S3_N_QUEUES] = {S3_PROMOTE, 1, S3_FREQ_MAX + 1};

    while (s->q[k].tail != POLICY_NIL) {
        uint32_t id = s->q[k].tail;
        struct policy_node *x = &s->nodes[id];

        s->base.n_steps++;
        policy_queue_unlink(&s->q[k], s->nodes, id);
        s->n_in[k]--;
        if (x->freq >= freq_stay[k]) {
            x->freq = k == S3_SMALL ? 0 : (uint8_t)(x->freq - 1);
            s3_enqueue(s, id, S3_MAIN);
        } else if (x->state == POLICY_EVICTABLE) {
            policy_move(&s->base, x, POLICY_EVICTABLE, POLICY_PENDING);
            *ret_id = id;
            return true;
        } else { /* parked: set aside */
            x->queue = k == S3_SMALL ? S3_SMALL : S3_MAIN;
            s->n_in[x->queue]++;
        }
    }
    return false;
}

static int s3_victim(struct policy *p, uint32_t *ret_id)
{
    struct s3 *s = s3_enter(p);

    /* A scan that finds nothing leaves its queue empty; but small's may have moved ids to main, hence main last. */
    if (s->n_in[S3_SMALL] <= s3_small_share(s) && s3_scan(s, S3_MAIN, ret_id))
        return 0;
    if (s3_scan(s, S3_SMALL, ret_id) || s3_scan(s, S3_MAIN, ret_id) || s3_scan(s, S3_RESTING, ret_id))
        return 0;
    return -ENOENT;
}

static void s3_evicted(struct policy *p, uint32_t id)
{
    struct s3 *s = s3_enter(p);
    struct policy_node *x = s3_node(s, id);
    uint32_t rested = s->q[S3_RESTING].tail;

    policy_move(p, x, POLICY_PENDING, POLICY_ABSENT);
    p->n_steps += 2;
    if (x->queue == S3_SMALL)
        ghost_add(&s->ghost, x->tag);
    if (rested != POLICY_NIL) {
        policy_queue_unlink(&s->q[S3_RESTING], s->nodes, rested);
        s->n_in[S3_RESTING]--;
        s3_enqueue(s, rested, S3_MAIN);
    }
}

static void s3_keep(struct policy *p, uint32_t id)
{
    struct s3 *s = s3_enter(p);
    struct policy_node *x = s3_node(s, id);

    policy_move(p, x, POLICY_PENDING, POLICY_EVICTABLE);
    if (x->freq < S3_FREQ_MAX)
        x->freq++;
    s3_enqueue(s, id, S3_RESTING);
}

static void s3_assert_valid(const struct policy *p)
{
    const struct s3 *s = (const struct s3 *)p;
    uint32_t n_in[S3_N_QUEUES] = {0};

    assert(p->ops == &policy_s3fifo);
    policy_assert_nodes(p, s->nodes, s->q, S3_N_QUEUES);
    for (uint32_t id = 0; id < p->n_max; id++) {
        const struct policy_node *x = &s->nodes[id];

        assert(x->freq <= S3_FREQ_MAX && x->queue < S3_N_QUEUES);
        if (x->state == POLICY_EVICTABLE || x->state == POLICY_PARKED)
            n_in[x->queue]++;
    }
    for (int k = 0; k < S3_N_QUEUES; k++)
        assert(n_in[k] == s->n_in[k]);
    ghost_assert_valid(&s->ghost);
}

const struct policy_ops policy_s3fifo = {
    .name = "s3fifo",
    .create = s3_create,
    .destroy = s3_destroy,
    .insert = s3_insert,
    .hit = s3_hit,
    .remove = s3_remove,
    .park = s3_park,
    .unpark = s3_unpark,
    .victim = s3_victim,
    .evicted = s3_evicted,
    .keep = s3_keep,
    .assert_valid = s3_assert_valid,
};
