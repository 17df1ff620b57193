/* One tenant's cache: its index, spaces, host slabs, eviction order and leases, behind one door.
 *
 * Loop thread only (rule I6), but for what says otherwise: there is no lock in here. Helper threads get memory lent (struct
 * cache_slot) and give it back; other readers go by the index and by leases, as workers do.
 * Nothing here waits, logs, or knows a socket. Includes: proto, kernels, store.
 *
 * States of an entry, and the function that makes each move:
 *
 *              cache_reserve()            cache_commit()              retire()  (evict, drop)
 *     FREE ----------------> RESERVED -------------------> VALID ----------------------------> RETIRING
 *      ^                        |                            ^                                  |    |
 *      |     cache_abort()      |                            |   a lease was found: taken back  |    |
 *      +------------------------+                            +----------------------------------+    |
 *      +---------------------------------------------------------------------------------------------+
 *                                                                                  no lease: freed
 *     FREE      no slot, in the free list; gen odd or 0
 *     RESERVED  has entry, slot and parent; a job fills the slot; not in a bucket; gen odd (rule I2: not visible)
 *     VALID     in its bucket, gen even, payload and CRC complete (I2); its slot does not move (I3)
 *     RETIRING  gen odd, in its bucket still, for the length of one call
 *     (ZOMBIE   a block found bad while it was leased: out of its bucket, freed when the last lease is gone)
 *
 * Invariants (cache_assert_valid()):
 *   C1  every VALID entry is found by lookup_find() under its own key, space and group
 *   C2  a parent stays as long as a child does: VALID or RESERVED entries with a parent have a VALID or RESERVED parent
 *   C3  an entry is in the eviction order (not parked) exactly if it is VALID, has no child, no pin and no hold
 *   C4  the slots in use of all slabs, the entries not FREE, and the sums of bytes by space and tenant agree
 *   C5  no slot is owned by two entries */
#ifndef KVD_STORE_CACHE_H
#define KVD_STORE_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/key.h"
#include "proto/lookup.h"
#include "proto/shm.h"
#include "store/policy.h"
#include "store/slab.h"
#include "store/space.h"

struct cache;

enum { CACHE_NONE = UINT32_MAX };

struct cache_config {
    const char *tenant;              /* copied */
    const char *domain;              /* key domain: part of each fingerprint; copied */
    uint32_t n_entries;              /* size of the index; 1 to SHM_ENTRIES_MAX */
    uint64_t quota_bytes;            /* of host slabs; live: cache_set_quota() */
    uint64_t space_quota_bytes;      /* of payloads of one space; 0: none */
    uint32_t n_spaces_max;
    uint64_t slab_bytes;             /* multiple of 2 MiB */
    const struct policy_ops *policy;
    struct budget *budget;           /* borrowed while the cache lives */
    uint64_t (*now_usec)(void *ctx); /* monotonic clock */
    void *now_ctx;
};

/* Errors: -ENOMEM, -EINVAL, -errno of memfd and mmap. */
int cache_create(const struct cache_config *config, struct cache **ret);
/* Marks the index closed, frees all. NULL allowed; returns NULL. Sessions' pages must have been removed. */
struct cache *cache_destroy(struct cache *cache);
void cache_assert_valid(const struct cache *cache);

/* Descriptor (read-only use, sealed) and size of the index; borrowed. */
int cache_index_fd(const struct cache *cache, uint64_t *ret_bytes);
uint64_t cache_epoch(const struct cache *cache);
/* Descriptor and size of a slab; borrowed. -ENOENT: never was or is gone. */
int cache_slab_fd(const struct cache *cache, uint32_t slab, uint64_t *ret_bytes);
void cache_set_quota(struct cache *cache, uint64_t quota_bytes);
/* Making a slab takes milliseconds, for which the loop must not stand still: would one made ahead by a job be of use, and of what
 * size? The job calls slab_memory_create() with the budget's huge page and NUMA settings; the loop gives the result. What is not
 * needed any more is released at once. */
bool cache_spare_wanted(const struct cache *cache, uint64_t *ret_bytes);
void cache_spare_give(struct cache *cache, struct slab_memory *memory);

/* ---- Workers' pages (lease table, hit log) ---- */

/* Adds the daemon's mapping of a worker's page (kept until removed). The words in it are hostile: only range-checked numbers
 * are used. n_leases and n_log are what the daemon laid out, not what the page says now. -ENOMEM. */
struct cache_page {
    const struct shm_page_header *header;
    const _Atomic uint64_t *leases;
    const _Atomic uint64_t *log;
    uint32_t n_leases;
    uint32_t n_log;
    uint64_t log_seen; /* the cache's: words drained */
};
int cache_page_add(struct cache *cache, struct cache_page *page);
void cache_page_remove(struct cache *cache, struct cache_page *page);
/* Valid words in a page's lease table (for statistics). */
uint64_t cache_page_leases(const struct cache *cache, const struct cache_page *page);
/* Reads what workers noted since the last time: touches what they used. Called before evictions, and for statistics. */
void cache_drain_hits(struct cache *cache);

/* ---- Readers in threads of the daemon ---- */

/* The index, to be read as a worker reads it. Stays as long as the cache. Any thread. */
const struct lookup_view *cache_view(const struct cache *cache);
/* Address of a payload whose entry the caller has under lease in a table that was added with cache_page_add(), from the entry's host
 * field. NULL: it is not in host memory. Any thread. */
const void *cache_leased_at(const struct cache *cache, uint64_t host);
/* The index header's word that tells workers that nobody needs to be woken for their submissions: the attention threads write it. */
_Atomic uint32_t *cache_awake_word(const struct cache *cache);

/* ---- Spaces ---- */

/* Finds or makes the space and opens it once more. *ret_space is owned by the cache until closed as often as opened; its blocks
 * stay when nobody has it open. Errors: -EINVAL with ret_reason, -ENOSPC (n_spaces_max), -ENOMEM. */
int cache_space_open(struct cache *cache, const struct space_desc *desc, struct space **ret_space, const char **ret_reason);
void cache_space_close(struct cache *cache, struct space *space);
/* NULL: no such space. Any thread: a space stays as long as the cache, and does not change. */
struct space *cache_space_find(const struct cache *cache, uint32_t id);
/* What is known of a space beyond its description. */
struct cache_space_stats {
    uint64_t n_blocks;
    uint64_t bytes;
    uint32_t n_open;
};
void cache_space_stats(const struct cache *cache, const struct space *space, struct cache_space_stats *ret);

/* ---- Publish ---- */

enum cache_reserve_result {
    CACHE_RESERVED = 0,
    CACHE_PRESENT = 1,       /* VALID already */
    CACHE_IN_PROGRESS = 2,   /* RESERVED by another publish: being encoded */
    CACHE_NO_PARENT = 3,     /* the parent is not in the cache */
};

/* Memory lent to a job. Valid until commit or abort. */
struct cache_slot {
    struct space *space;
    uint32_t entry;
    uint8_t group;
    bool first;
    void *payload;           /* bytes long, 64-byte aligned, written by the job */
    uint64_t bytes;
    uint32_t crc32c;         /* the job's result */
};

/* Reserves entry and slot for a block; evicts if need be. parent == the space's fingerprint: the first block of a chain (or told so
 * by first for engine digests). Returns enum cache_reserve_result, or -ENOSPC (nothing could be evicted: tier, budget or index full),
 * -EDQUOT (space quota), -ENOMEM. */
int cache_reserve(struct cache *cache, struct space *space, uint8_t group, const uint8_t key[KEY_BYTES],
                  const uint8_t parent[KEY_BYTES], bool first, struct cache_slot *ret_slot);
/* Makes it visible; the slot is gone afterwards. -ENOSPC: the index has no place for this key; then it is as if aborted. */
int cache_commit(struct cache *cache, struct cache_slot *slot);
/* Gives it back; children that wait for it lose their parent and are aborted by their own publish. */
void cache_abort(struct cache *cache, struct cache_slot *slot);

/* ---- Look, evict, pin ---- */

/* VALID entry number, or CACHE_NONE. */
uint32_t cache_find(const struct cache *cache, uint32_t space, uint8_t group, const uint8_t key[KEY_BYTES]);

struct cache_entry_info {
    uint32_t entry;
    uint32_t gen;              /* of its index entry */
    uint32_t space;
    uint8_t group;
    bool first;
    uint8_t key[KEY_BYTES];
    uint8_t parent[KEY_BYTES]; /* the fingerprint for a first block; zeros where the group keeps no chain */
    uint64_t bytes;
    uint32_t crc32c;
    uint32_t n_children;
    uint32_t n_leases;         /* words that hold it now, in all pages, and holds */
    uint32_t n_pins;
    uint64_t idle_usec;
    uint64_t age_usec;
    void *payload;             /* the daemon's mapping */
    bool is_leaf;
    uint32_t parent_entry;     /* CACHE_NONE: none */
};
/* False: not VALID. The brief form leaves n_leases 0, whose count reads all lease tables. */
bool cache_entry_info(const struct cache *cache, uint32_t entry, struct cache_entry_info *ret);
bool cache_entry_brief(const struct cache *cache, uint32_t entry, struct cache_entry_info *ret);
uint32_t cache_n_entries(const struct cache *cache); /* for walks: 0 .. n - 1, in slices */

struct cache_evicted {
    uint64_t blocks, bytes;
    uint64_t kept_leased, kept_pinned, kept_parents;
};
/* Evicts n entries, in batches of one fence and one pass over all lease tables. Entries that are not VALID, have children, pins, holds or
 * leases stay. Where want is given it goes on upward: a parent that loses its last child and for which want() is true goes too. Stops
 * after max_bytes (0: no bound). Adds its counts to ret. */
void cache_evict(struct cache *cache, const uint32_t *entries, size_t n, bool (*want)(void *ctx, uint32_t entry), void *ctx,
                 uint64_t max_bytes, struct cache_evicted *ret);
/* Gives slabs back until at most target_bytes are held (or nothing more can go). Returns bytes given back. */
uint64_t cache_shrink(struct cache *cache, uint64_t target_bytes);

/* Pins or unpins an entry and those before it in its chain. Counts what changed. */
void cache_pin(struct cache *cache, uint32_t entry, bool unpin, uint64_t *ret_blocks, uint64_t *ret_bytes);
/* A hold: for jobs that read a payload, and for workers whose leases the daemon keeps for them. While held the entry stays, and so
 * does its payload where it is. False: not VALID, or held by 65,535 already. */
bool cache_hold(struct cache *cache, uint32_t entry);
void cache_unhold(struct cache *cache, uint32_t entry);
/* A VALID entry was used: what the hit log says for those that have a page. */
void cache_use(struct cache *cache, uint32_t entry);
/* Drops a block found bad; children go with it. Leased ones become invisible at once and are freed when released. */
void cache_drop_corrupt(struct cache *cache, uint32_t entry);

struct cache_stats {
    uint64_t n_valid, n_reserved, bytes_used;
    uint64_t slab_bytes, n_slabs, quota_bytes;
    uint64_t n_published, n_evicted, evicted_bytes, n_aborted, n_corrupt, n_full, n_leased_kept;
    uint64_t n_hits_logged, n_hits_lost;
    uint64_t index_bytes, meta_bytes;
    uint32_t n_spaces, n_entries;
};
void cache_stats(const struct cache *cache, struct cache_stats *ret);

#endif
