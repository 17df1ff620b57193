/* A worker's look-up in an index that holds garbage: any bytes as header, buckets and entries. Nothing outside the mapping is read,
 * every call ends, and what is returned is an entry number within bounds. */
#include <stdlib.h>
#include <string.h>

#include "proto/lookup.h"

enum { BUCKETS_MAX = 16, ENTRIES_MAX = 64, KEYS = 20 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The input's own header, whatever it says. */
static void raw_header(const uint8_t *data, size_t size)
{
    size_t bytes = size < sizeof(struct shm_index_header) ? size : size / 64 * 64;
    struct lookup_view view;
    struct lookup_hit hit;
    void *map;

    if (posix_memalign(&map, 64, bytes ? bytes : 1))
        abort();
    memcpy(map, data, bytes);
    if (bytes >= 16) { /* the magic is not what is to be guessed */
        uint64_t magic = SHM_INDEX_MAGIC;
        uint32_t version = SHM_VERSION;

        memcpy(map, &magic, sizeof(magic));
        memcpy((char *)map + 8, &version, sizeof(version));
    }
    if (lookup_view_init(map, bytes, &view) == 0 && lookup_find(&view, (const uint8_t *)map, 1, 0, &hit) &&
        hit.entry >= view.n_entries)
        abort();
    free(map);
}

/* A sound header over buckets and entries of garbage. */
static void raw_tables(const uint8_t *data, size_t size)
{
    uint32_t n_buckets = 1u << data[0] % 5, n_entries = 1 + data[1] % ENTRIES_MAX;
    size_t buckets_off = sizeof(struct shm_index_header);
    size_t entries_off = buckets_off + n_buckets * sizeof(struct shm_bucket);
    size_t total = entries_off + n_entries * sizeof(struct shm_entry), rest = total - buckets_off;
    struct shm_index_header *h;
    struct lookup_hit hits[KEYS];
    uint8_t keys[KEYS * SHM_KEY_BYTES] = {0};
    struct lookup_view view;
    size_t n;

    if (posix_memalign((void **)&h, 64, total))
        abort();
    memset(h, 0, total);
    h->magic = SHM_INDEX_MAGIC;
    h->version = SHM_VERSION;
    h->header_bytes = sizeof(*h);
    h->n_buckets = n_buckets;
    h->n_entries = n_entries;
    h->buckets_off = buckets_off;
    h->entries_off = entries_off;
    h->total_bytes = total;
    memcpy((char *)h + buckets_off, data, size < rest ? size : rest);
    for (uint32_t i = 0; i < KEYS; i++) /* keys that some entries have */
        memcpy(keys + i * SHM_KEY_BYTES, (char *)h + entries_off + (i % n_entries) * sizeof(struct shm_entry), SHM_KEY_BYTES);
    if (lookup_view_init(h, total, &view) < 0)
        abort();
    for (unsigned g = 0; g < 2; g++) {
        n = lookup_find_many(&view, keys, KEYS, (uint16_t)(data[2] % 4), (uint8_t)g, data[3] % 2, hits);
        if (n > KEYS)
            abort();
        for (size_t i = 0; i < n; i++)
            if (data[3] % 2 && (hits[i].entry >= n_entries || (hits[i].gen & 1)))
                abort();
    }
    free(h);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    raw_header(data, size);
    if (size >= 4)
        raw_tables(data, size);
    return 0;
}
