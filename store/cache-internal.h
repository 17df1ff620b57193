/* What cache.c (life, spaces, publish), cache-evict.c (retirement, making room) and cache-query.c (look, pin, count) share.
 * Nobody else includes this. */
#ifndef KVD_STORE_CACHE_INTERNAL_H
#define KVD_STORE_CACHE_INTERNAL_H

#include "store/cache.h"
#include "store/index.h"
#include "store/tier/tier.h"

enum entry_state { ENTRY_FREE, ENTRY_RESERVED, ENTRY_VALID, ENTRY_RETIRING, ENTRY_ZOMBIE };

/* The daemon's own knowledge of an entry; what workers may see is in struct shm_entry. 48 bytes. */
struct meta {
    uint32_t parent, first_child, next_sibling, prev_sibling;
    uint32_t n_children; /* children that are not RETIRING */
    uint32_t next, prev; /* FREE, ZOMBIE: list; RESERVED: pending bucket; VALID: its space's list */
    uint32_t last_use_ds, born_ds; /* tenths of a second since the cache began */
    uint32_t n_pins;
    uint16_t n_holds;
    uint8_t state;
    bool parked : 1;   /* as the policy knows it */
    bool in_policy : 1;
    bool leased : 1;   /* found by the scan of the lease tables that is going on */
    bool listed : 1;   /* in the list that is being made */
    bool pending_answer : 1; /* victim() returned it, it waits for evicted() or keep() */
};
static_assert(sizeof(struct meta) == 44 || sizeof(struct meta) == 48, "metadata budget");

struct space_slot {
    struct space *space;
    uint64_t n_blocks, bytes;
    uint32_t n_open;
    uint32_t oldest, newest; /* VALID entries in the order of their commit, or of having been passed over since */
};

enum { PENDING_BUCKETS = 1024, EVICT_BATCH_MAX = 256 };

struct cache {
    uint32_t magic;
    char *tenant, *domain;
    struct cache_config config;
    struct index index;
    struct tier *host;
    const struct tier_ops *tier;
    struct policy *policy;
    struct key_hasher *hasher;
    struct meta *meta;
    uint32_t free_head, n_free;
    uint32_t zombie_head;
    uint32_t pending[PENDING_BUCKETS];
    struct space_slot *spaces; /* id 1 .. n_spaces, at id - 1 */
    _Atomic uint32_t n_spaces; /* read by other threads; grows after the space is in its place */
    struct cache_page **pages;
    uint32_t n_pages;
    uint64_t born_usec;
    uint64_t attempt; /* to empty slabs: see tier_ops.cheapest */
    uint64_t n_valid, n_reserved, bytes_used;
    uint64_t n_published, n_evicted, evicted_bytes, n_aborted, n_corrupt, n_full, n_leased_kept, n_hits_logged, n_hits_lost;
};

static inline struct shm_entry *entry_of(const struct cache *c, uint32_t e)
{
    return &c->index.entries[e];
}
static inline uint64_t entry_bytes(const struct cache *c, uint32_t e)
{
    return atomic_load_explicit(&entry_of(c, e)->bytes, memory_order_relaxed);
}
static inline struct space_slot *space_slot_of(const struct cache *c, uint32_t id)
{
    return &c->spaces[id - 1];
}
static inline struct space_slot *entry_space(const struct cache *c, uint32_t e)
{
    return space_slot_of(c, atomic_load_explicit(&entry_of(c, e)->space, memory_order_relaxed));
}
uint32_t cache_now_ds(const struct cache *c);

/* Brings the policy's view of a VALID entry in step with its children, pins and holds (C3). */
void cache_settle(struct cache *c, uint32_t e);
void cache_unlink_child(struct cache *c, uint32_t child);
/* The entry's slot and number are free again; it must be out of bucket, policy, space list and pending table. */
void cache_free_entry(struct cache *c, uint32_t e);
void cache_space_list_add(struct cache *c, uint32_t e);
void cache_space_list_remove(struct cache *c, uint32_t e);

/* Evicts until an entry number is free, or until the tier has a slot of bytes; -ENOSPC. */
int cache_room_for_entry(struct cache *c);
int cache_room_for_slot(struct cache *c, uint64_t bytes, uint32_t owner, uint64_t *ret_loc);
/* Evicts oldest blocks of one space until bytes more fit into the space's quota; -EDQUOT. */
int cache_room_in_space(struct cache *c, struct space_slot *space, uint64_t bytes);
/* Frees zombies whose leases are gone. */
void cache_reap_zombies(struct cache *c);

#endif
