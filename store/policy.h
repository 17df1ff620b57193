/* Eviction order: which entry leaves when room is wanted.
 *
 * A policy orders dense 32-bit ids (the entry numbers of an index). It is a pure data structure: no clock, no lock, no
 * randomness, no system call; all memory is allocated at creation; every call is O(1) amortised. It knows nothing of
 * keys, slots or leases: the store tells it what happened to an id and asks it for the next one to go.
 *
 *                insert                     park
 *     ABSENT ------------->  EVICTABLE  <=========>  PARKED
 *       ^ ^ ^                 |     ^      unpark       |
 *       | | |          victim |     | keep              | remove
 *       | | |   evicted       v     |                   |
 *       | | +-------------- PENDING-+                   |
 *       | +------ remove (from any state) --------------+
 *
 *     EVICTABLE  victim() may return it.
 *     PARKED     has a child or a pin. It keeps its standing: it ages, and hits count, as if it could be evicted; but
 *                when its turn to leave comes it is passed over, and once unparked it is the next to leave, unless it
 *                was hit since.
 *     PENDING    victim() returned it; the caller has yet to say evicted() or keep(). Several may be pending at once
 *                (one scan of the lease tables then serves a batch).
 *
 * "Children of a prefix leave before their parents" is the caller's rule: park() a parent when it gets its first child,
 * unpark() it when the last one is gone. The policy then never meets an id that it would have to look behind, and needs
 * no walk along chains.
 *
 * Invariants (each policy adds its own at the top of its file; assert_valid() checks all):
 *   P1  An id is in exactly one of the four states; EVICTABLE ids and no others are returned by victim().
 *   P2  Every present id is linked in at most one queue, at one place; an EVICTABLE id is in exactly one.
 *   P3  n_present counts the ids that are not ABSENT, n_evictable those that are EVICTABLE.
 *   P4  Work is paid for in advance: n_steps <= POLICY_STEPS_PER_CALL * n_calls, at any time.
 *
 * Owner: the loop thread; there are no locks (rule I6). */
#ifndef KVD_STORE_POLICY_H
#define KVD_STORE_POLICY_H

#include <stddef.h>
#include <stdint.h>

/* Bound on ids, and on the bytes that a policy takes for each; a constant of at most POLICY_FIXED_BYTES comes on top. */
#define POLICY_N_MAX        (UINT32_C(1) << 28)
#define POLICY_BYTES_PER_ID 24u
#define POLICY_FIXED_BYTES  512u

/* P4: an inner step is one look at one id (or at one ghost bucket) inside a call. */
#define POLICY_STEPS_PER_CALL 4u

struct policy_ops;

/* What every policy begins with. Read-only for callers. */
struct policy {
    const struct policy_ops *ops;
    uint32_t n_max;
    uint32_t n_present;
    uint32_t n_evictable;
    uint64_t n_calls; /* insert, hit, remove, park, unpark, victim, evicted, keep */
    uint64_t n_steps;
};

/* The id that a call names must be below n_max and in the state that the call's arrow leaves from (asserted): ids come
 * from the store itself, never from a worker unchecked. */
struct policy_ops {
    const char *name;

    /* -EINVAL if n_max is 0 or above POLICY_N_MAX, -ENOMEM. destroy accepts NULL and returns NULL. */
    int (*create)(uint32_t n_max, struct policy **ret_policy);
    struct policy *(*destroy)(struct policy *p);

    /* A new entry: ABSENT -> EVICTABLE. key_hash (any good 64-bit hash of the key) is how a policy recognises a key
     * that it has evicted before. An entry born with a pin or a child is parked by the next call. */
    void (*insert)(struct policy *p, uint32_t id, uint64_t key_hash);

    /* A use, in any state but ABSENT. */
    void (*hit)(struct policy *p, uint32_t id);

    /* Gone for another reason than eviction (any state -> ABSENT). Not remembered. */
    void (*remove)(struct policy *p, uint32_t id);

    /* First child or pin: EVICTABLE -> PARKED. Last one gone: PARKED -> EVICTABLE. The caller counts. */
    void (*park)(struct policy *p, uint32_t id);
    void (*unpark)(struct policy *p, uint32_t id);

    /* Takes the next id to leave off its queue (EVICTABLE -> PENDING). -ENOENT if nothing is evictable. */
    int (*victim)(struct policy *p, uint32_t *ret_id);

    /* The caller's answer. evicted: it has left (PENDING -> ABSENT); a policy may remember its key. keep: it is leased,
     * so it stays, as if it had been hit just now (PENDING -> EVICTABLE). While all answers are keep, no id is asked
     * about twice before every evictable one has been asked about once: who is refused n_evictable times in a row knows
     * that there is no room. */
    void (*evicted)(struct policy *p, uint32_t id);
    void (*keep)(struct policy *p, uint32_t id);

    /* Aborts if an invariant does not hold. O(n_max): for tests and debug builds. */
    void (*assert_valid)(const struct policy *p);
};

/* "s3fifo" (the default: policy_find(NULL)) or "lru"; NULL if there is none of that name. policy_at() lists them: NULL
 * past the end. */
const struct policy_ops *policy_find(const char *name);
const struct policy_ops *policy_at(size_t i);

static inline size_t policy_n_evictable(const struct policy *p)
{
    return p->n_evictable;
}

#endif
