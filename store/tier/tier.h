/* What a tier is: a place where payloads live. One table a kind of memory; store/tier/host.c is the first.
 *
 * A tier hands out slots of a fixed size a size class and knows who owns each. It evicts nothing: the cache does, and asks
 * again. Loop thread only, but for the memory that at() names, which jobs may read or write while the loop lends it.
 * Includes: proto/shm.h, store/slab.h. */
#ifndef KVD_STORE_TIER_H
#define KVD_STORE_TIER_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/shm.h"

struct tier;

struct tier_info {
    uint64_t limit_bytes;   /* quota of this tenant in this tier */
    uint64_t slab_bytes;    /* held from the system */
    uint64_t slot_bytes;    /* in slots that are in use */
    uint32_t n_slabs;
    uint64_t n_slots;       /* in use */
    uint32_t slab_slots_max; /* no slab has more */
    uint64_t meta_bytes;    /* the tier's own bookkeeping */
};

struct tier_ops {
    const char *name;
    struct tier *(*destroy)(struct tier *tier);

    /* A slot of at least bytes, 64-byte aligned, for owner (an entry number). -ENOSPC: no free slot of this size and no more memory to
     * be had (quota, budget or system). */
    int (*reserve)(struct tier *tier, uint64_t bytes, uint32_t owner, uint64_t *ret_loc);
    void (*release)(struct tier *tier, uint64_t loc);
    void (*set_owner)(struct tier *tier, uint64_t loc, uint32_t owner);
    uint32_t (*owner)(const struct tier *tier, uint64_t loc); /* UINT32_MAX: no slot in use there */
    /* This process's mapping of a slot; NULL if loc is none of the tier's. */
    void *(*at)(const struct tier *tier, uint64_t loc);
    /* Has this size any slab at all? */
    bool (*has_class)(const struct tier *tier, uint64_t bytes);
    /* The slab that is cheapest to empty (fewest bytes in use) among those of another size than bytes (0: among all) that were not
     * named before in the same attempt (any number that the caller counts up). Fills the owners of its slots: room for
     * tier_info.slab_slots_max. Returns the slab's number, or -ENOENT. */
    int (*cheapest)(struct tier *tier, uint64_t bytes, uint64_t attempt, uint32_t *ret_owners, uint32_t *ret_n);
    /* Gives every empty slab back to the system. Returns bytes given back. */
    uint64_t (*trim)(struct tier *tier);
    void (*set_limit)(struct tier *tier, uint64_t bytes);
    void (*info)(const struct tier *tier, struct tier_info *ret);
};

#endif
