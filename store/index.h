/* The writer's half of a tenant's index: makes the memfd, keeps buckets and entries. The reader's half is proto/lookup.h;
 * layout, invariants X1 to X4 and the meaning of every field are in proto/shm.h.
 *
 * A write in four steps, so that a reader at any instruction sees the old, the new, or nothing:
 *   retire   gen becomes odd                                (readers: miss)
 *   ...      full fence, scan of lease tables by the cache  (rule I3)
 *   remove   out of its bucket
 *   fill, publish   fields, then gen even (release), then the bucket's tag (release)
 *
 * Loop thread only; created on the daemon's main thread, which holds the robust mutex that tells workers that it lives.
 * Includes: proto, store/slab.h. */
#ifndef KVD_STORE_INDEX_H
#define KVD_STORE_INDEX_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/lookup.h"
#include "store/slab.h"

struct index {
    struct slab_memory memory;
    struct shm_index_header *header;
    struct shm_bucket *buckets;
    struct shm_entry *entries;
    struct lookup_view view;
    uint32_t n_used;
};

/* name: of the memfd. Errors: -EINVAL, -ENOMEM, -ENOSPC, -errno. */
int index_init(struct index *index, const char *name, uint32_t n_entries);
/* Marks it closed and lets go of it; workers keep their mapping. */
void index_deinit(struct index *index);

/* Writes the fields of an entry whose gen is odd. */
void index_fill(struct index *index, uint32_t entry, const uint8_t key[SHM_KEY_BYTES], uint16_t space, uint8_t group,
                uint8_t flags, uint32_t bytes, uint32_t crc32c, uint64_t host);
/* Makes it visible. -ENOSPC: no free place within SHM_PROBE_MAX buckets (the entry stays invisible). */
int index_publish(struct index *index, uint32_t entry);
/* Invisible from now on for whoever looks; what leases it holds is for the caller to find out after a full fence. */
void index_retire(struct index *index, uint32_t entry);
/* Takes a retirement back: the same generation again (X3). */
void index_restore(struct index *index, uint32_t entry);
/* Out of its bucket. The entry must be retired. */
void index_remove(struct index *index, uint32_t entry);

static inline uint32_t index_gen(const struct index *index, uint32_t entry)
{
    return atomic_load_explicit(&index->entries[entry].gen, memory_order_relaxed);
}
/* X1, X2 for all, O(n). */
void index_assert_valid(const struct index *index);

#endif
