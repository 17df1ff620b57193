/* The ghost: keys that were evicted not long ago, by fingerprint.
 *
 * A fixed table of 8-byte slots in buckets of one cache line. A fingerprint belongs to one bucket; adding to a full
 * bucket forgets the oldest of that bucket. A sequence number gives ages, so that "among the last `window` evicted" is
 * a comparison and nothing ever has to be taken out.
 *
 *     bucket:  [fp seq] [fp seq] [fp seq] [fp seq] [fp seq] [fp seq] [fp seq] [fp seq]        seq 0 = free
 *
 *   G1  A fingerprint is in its own bucket and at most once.
 *   G2  What was added is found until it is taken, unless it fell out of the window or 8 later ones came into its
 *       bucket.
 *   G3  What is found was added: but two keys with one fingerprint (32 bits) are one key here, with a probability of
 *       about window / 2^32 for a new key. The cost is a block that lives longer than it should.
 *
 * Sequence numbers wrap after 2^32 evictions: a slot that no add to its bucket has replaced in all that time could then
 * look fresh. The cost is the same.
 *
 * For store/policy*.c. The caller lends the memory. */
#ifndef KVD_STORE_POLICY_GHOST_H
#define KVD_STORE_POLICY_GHOST_H

#include <stdbool.h>
#include <stdint.h>

#define GHOST_WAYS 8u

struct ghost_slot {
    uint32_t fp, seq;
};

struct ghost {
    struct ghost_slot *slots; /* borrowed while the ghost lives; n_buckets * GHOST_WAYS of them, zeroed */
    uint32_t n_buckets;
    uint32_t seq; /* of the latest add */
};

/* Buckets for n keys: as many slots as keys, at least one bucket. */
static inline uint32_t ghost_n_buckets(uint32_t n)
{
    return n < GHOST_WAYS ? 1 : n / GHOST_WAYS;
}
static inline uint32_t ghost_bucket(const struct ghost *g, uint32_t fp)
{
    return (uint32_t)((uint64_t)fp * g->n_buckets >> 32);
}

/* Both look at one bucket. take: whether fp is among the last `window` added; if so it is forgotten. */
void ghost_add(struct ghost *g, uint32_t fp);
bool ghost_take(struct ghost *g, uint32_t fp, uint32_t window);

/* Aborts if G1 does not hold. */
void ghost_assert_valid(const struct ghost *g);

#endif
