#include "store/index.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/random.h>

static uint32_t buckets_for(uint32_t n_entries)
{
    uint32_t n = 1;

    while ((uint64_t)n * SHM_BUCKET_SLOTS < (uint64_t)n_entries * 2) /* half load: see SHM_PROBE_MAX */
        n *= 2;
    return n;
}

/* The robust mutex is locked for good by the calling thread; when that ends in whatever way, the kernel marks the word. */
static int lock_alive(pthread_mutex_t *alive)
{
    pthread_mutexattr_t attr;
    int r = pthread_mutexattr_init(&attr);

    if (r)
        return -r;
    r = pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    if (!r)
        r = pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    if (!r)
        r = pthread_mutex_init(alive, &attr);
    if (!r)
        r = pthread_mutex_lock(alive);
    pthread_mutexattr_destroy(&attr);
    return -r;
}

int index_init(struct index *x, const char *name, uint32_t n_entries)
{
    uint32_t n_buckets = buckets_for(n_entries);
    uint64_t buckets_off = sizeof(struct shm_index_header);
    uint64_t entries_off = buckets_off + (uint64_t)n_buckets * sizeof(struct shm_bucket);
    uint64_t total = entries_off + (uint64_t)n_entries * sizeof(struct shm_entry);
    struct shm_index_header *h;
    int r;

    memset(x, 0, sizeof(*x));
    x->memory.fd = -1;
    if (n_entries == 0 || n_entries > SHM_ENTRIES_MAX)
        return -EINVAL;
    r = slab_memory_create(name, total, SLAB_HUGE_OFF, false, &x->memory);
    if (r < 0)
        return r;
    h = x->memory.map;
    h->magic = SHM_INDEX_MAGIC;
    h->version = SHM_VERSION;
    h->header_bytes = sizeof(*h);
    h->n_buckets = n_buckets;
    h->n_entries = n_entries;
    h->buckets_off = buckets_off;
    h->entries_off = entries_off;
    h->total_bytes = x->memory.bytes;
    if (getrandom(&h->epoch, sizeof(h->epoch), 0) != sizeof(h->epoch) ||
        getrandom(&h->seed, sizeof(h->seed), 0) != sizeof(h->seed)) {
        r = -EIO;
        goto fail;
    }
    r = lock_alive(&h->alive);
    if (r < 0)
        goto fail;
    x->header = h;
    x->buckets = (void *)((char *)x->memory.map + buckets_off);
    x->entries = (void *)((char *)x->memory.map + entries_off);
    for (uint32_t i = 0; i < n_entries; i++)
        atomic_store_explicit(&x->entries[i].gen, 1, memory_order_relaxed);
    atomic_store_explicit(&h->state, SHM_INDEX_SERVING, memory_order_release);
    r = lookup_view_init(x->memory.map, x->memory.bytes, &x->view);
    if (r == 0)
        r = slab_memory_seal(&x->memory);
    if (r == 0)
        return 0;
    pthread_mutex_unlock(&h->alive);
fail:
    slab_memory_release(&x->memory);
    memset(x, 0, sizeof(*x));
    x->memory.fd = -1;
    return r;
}

void index_deinit(struct index *x)
{
    if (!x->header)
        return;
    atomic_store_explicit(&x->header->state, SHM_INDEX_CLOSED, memory_order_release);
    pthread_mutex_unlock(&x->header->alive);
    slab_memory_release(&x->memory);
    memset(x, 0, sizeof(*x));
    x->memory.fd = -1;
}

void index_fill(struct index *x, uint32_t entry, const uint8_t key[SHM_KEY_BYTES], uint16_t space, uint8_t group,
                uint8_t flags, uint32_t bytes, uint32_t crc32c, uint64_t host)
{
    struct shm_entry *e = &x->entries[entry];
    _Atomic uint64_t *k = (void *)e->key;
    uint64_t words[4];

    assert(index_gen(x, entry) & 1);
    memcpy(words, key, sizeof(words));
    for (int i = 0; i < 4; i++)
        atomic_store_explicit(&k[i], words[i], memory_order_relaxed);
    atomic_store_explicit(&e->crc32c, crc32c, memory_order_relaxed);
    atomic_store_explicit(&e->bytes, bytes, memory_order_relaxed);
    atomic_store_explicit(&e->space, space, memory_order_relaxed);
    atomic_store_explicit(&e->group, group, memory_order_relaxed);
    atomic_store_explicit(&e->flags, flags, memory_order_relaxed);
    atomic_store_explicit(&e->host, host, memory_order_relaxed);
    atomic_store_explicit(&e->dev, SHM_LOC_NONE, memory_order_relaxed);
}

static uint64_t hash_of(const struct index *x, uint32_t entry)
{
    const struct shm_entry *e = &x->entries[entry];

    return lookup_hash(x->view.seed, e->key, atomic_load_explicit(&e->space, memory_order_relaxed),
                       atomic_load_explicit(&e->group, memory_order_relaxed));
}

int index_publish(struct index *x, uint32_t entry)
{
    struct shm_entry *e = &x->entries[entry];
    uint64_t hash = hash_of(x, entry);
    uint32_t home = (uint32_t)hash & x->view.bucket_mask;
    uint32_t probes = x->view.bucket_mask < SHM_PROBE_MAX ? x->view.bucket_mask + 1 : SHM_PROBE_MAX;
    uint32_t gen = index_gen(x, entry) + 1;

    for (uint32_t p = 0; p < probes; p++) {
        struct shm_bucket *b = &x->buckets[(home + p) & x->view.bucket_mask];

        for (uint32_t i = 0; i < SHM_BUCKET_SLOTS; i++) {
            if (atomic_load_explicit(&b->tag[i], memory_order_relaxed))
                continue;
            if (p > 0) /* X2, before the entry can be found there */
                atomic_fetch_add_explicit(&x->buckets[home].overflow, 1, memory_order_release);
            atomic_store_explicit(&e->gen, gen < 2 ? 2 : gen, memory_order_release); /* pairs with read_entry() */
            atomic_store_explicit(&b->entry[i], entry, memory_order_relaxed);
            atomic_store_explicit(&b->tag[i], lookup_tag(hash), memory_order_release); /* pairs with match_tags() */
            atomic_store_explicit(&x->header->n_used, ++x->n_used, memory_order_relaxed);
            return 0;
        }
    }
    return -ENOSPC;
}

void index_retire(struct index *x, uint32_t entry)
{
    uint32_t gen = index_gen(x, entry);

    assert(!(gen & 1));
    atomic_store_explicit(&x->entries[entry].gen, gen | 1, memory_order_release);
}

void index_restore(struct index *x, uint32_t entry)
{
    uint32_t gen = index_gen(x, entry);

    assert(gen & 1);
    atomic_store_explicit(&x->entries[entry].gen, gen & ~1u, memory_order_release);
}

void index_remove(struct index *x, uint32_t entry)
{
    uint64_t hash = hash_of(x, entry);
    uint32_t home = (uint32_t)hash & x->view.bucket_mask;

    assert(index_gen(x, entry) & 1);
    for (uint32_t p = 0; p < SHM_PROBE_MAX; p++) {
        struct shm_bucket *b = &x->buckets[(home + p) & x->view.bucket_mask];

        for (uint32_t i = 0; i < SHM_BUCKET_SLOTS; i++) {
            if (!atomic_load_explicit(&b->tag[i], memory_order_relaxed) ||
                atomic_load_explicit(&b->entry[i], memory_order_relaxed) != entry)
                continue;
            atomic_store_explicit(&b->tag[i], 0, memory_order_release);
            if (p > 0)
                atomic_fetch_sub_explicit(&x->buckets[home].overflow, 1, memory_order_release);
            atomic_store_explicit(&x->header->n_used, --x->n_used, memory_order_relaxed);
            return;
        }
    }
    assert(!"an entry that is in use is in a bucket (X1)");
}

void index_assert_valid(const struct index *x)
{
    uint32_t n = 0;

    for (uint32_t b = 0; b <= x->view.bucket_mask; b++) {
        const struct shm_bucket *bucket = &x->buckets[b];

        for (uint32_t i = 0; i < SHM_BUCKET_SLOTS; i++) {
            uint32_t entry, home;
            uint64_t hash;

            if (!bucket->tag[i])
                continue;
            entry = bucket->entry[i];
            assert(entry < x->view.n_entries);
            hash = hash_of(x, entry);
            home = (uint32_t)hash & x->view.bucket_mask;
            assert(lookup_tag(hash) == bucket->tag[i]);
            assert(((b - home) & x->view.bucket_mask) < SHM_PROBE_MAX); /* X1 */
            assert(b == home || x->buckets[home].overflow > 0);         /* X2 */
            n++;
        }
    }
    assert(n == x->n_used);
}
