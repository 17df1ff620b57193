/* Look-up in a mapped index: the reader's half, used by workers and by the daemon alike.
 *
 * No lock, no system call, no allocation; safe against the writer at any instruction and against an index that holds
 * garbage (every number read from it is masked or compared with the view's own bounds).
 *
 * Cost of one key with cold caches: its home bucket, then its entry: 2 dependent cache misses; a third only when the home
 * bucket has overflowed (X2). lookup_find_many() overlaps the misses of different keys by prefetching.
 *
 * Any thread. Includes: shm.h. */
#ifndef KVD_PROTO_LOOKUP_H
#define KVD_PROTO_LOOKUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "shm.h"

/* A checked view of a mapped index; the bounds are copied out of the header once so that nobody can change them later. */
struct lookup_view {
    const struct shm_index_header *header;
    const struct shm_bucket *buckets;
    const struct shm_entry *entries;
    uint64_t seed;
    uint32_t bucket_mask;
    uint32_t n_entries;
};

/* What was found, a consistent copy. Valid while gen stays what it was or a lease is held. */
struct lookup_hit {
    uint32_t entry;
    uint32_t gen;
    uint32_t crc32c;
    uint32_t bytes;
    uint64_t host;
    uint64_t dev;
    uint8_t flags;
};

/* Checks the header of a mapping of map_bytes at map and fills ret_view (borrows map).
 * Errors: -EPROTONOSUPPORT (magic, version, unknown incompatible flag), -EINVAL (sizes do not fit the mapping). */
int lookup_view_init(const void *map, size_t map_bytes, struct lookup_view *ret_view);

/* Hash of (key, space, group). The bucket is its low bits, the tag its top 16 with the lowest bit set. */
uint64_t lookup_hash(uint64_t seed, const uint8_t key[SHM_KEY_BYTES], uint16_t space, uint8_t group);
static inline uint16_t lookup_tag(uint64_t hash)
{
    return (uint16_t)(hash >> 48) | 1u;
}

/* One key. Returns true and fills ret_hit, or false: not there (or changed meanwhile, which is the same). */
bool lookup_find(const struct lookup_view *view, const uint8_t key[SHM_KEY_BYTES], uint16_t space, uint8_t group,
                 struct lookup_hit *ret_hit);

/* n keys of 32 bytes, contiguous. Stops at the first that is missing when until_miss; a missing one has gen 0.
 * Returns how many were found before the first miss (until_miss), or found in all. */
size_t lookup_find_many(const struct lookup_view *view, const uint8_t *keys, size_t n, uint16_t space, uint8_t group,
                        bool until_miss, struct lookup_hit *ret_hits);

/* The worker's half of the lease protocol, after it has stored shm_ref(entry, gen) of n hits into its lease table: one full fence,
 * and the generations again. Returns how many hold before the first that was retired in between (n: all of them); the caller clears
 * the words of the rest, which are misses. */
size_t lookup_confirm(const struct lookup_view *view, const struct lookup_hit *hits, size_t n);

#endif
