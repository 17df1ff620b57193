#include "lookup.h"

#include <errno.h>
#include <string.h>

#if defined(__SANITIZE_THREAD__)
#define LOOKUP_SCALAR 1
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

int lookup_view_init(const void *map, size_t map_bytes, struct lookup_view *ret_view)
{
    const struct shm_index_header *h = map;
    uint64_t buckets_bytes, entries_bytes;

    if (map_bytes < sizeof(*h))
        return -EINVAL;
    if (h->magic != SHM_INDEX_MAGIC || h->version != SHM_VERSION || h->flags_incompat != 0)
        return -EPROTONOSUPPORT;
    if (h->header_bytes < sizeof(*h) || h->n_buckets == 0 || (h->n_buckets & (h->n_buckets - 1)) != 0 ||
        h->n_entries == 0 || h->n_entries > SHM_ENTRIES_MAX)
        return -EINVAL;
    buckets_bytes = (uint64_t)h->n_buckets * sizeof(struct shm_bucket);
    entries_bytes = (uint64_t)h->n_entries * sizeof(struct shm_entry);
    if (h->buckets_off % 64 != 0 || h->entries_off % 64 != 0 || h->buckets_off > map_bytes ||
        buckets_bytes > map_bytes - h->buckets_off || h->entries_off > map_bytes ||
        entries_bytes > map_bytes - h->entries_off)
        return -EINVAL;
    *ret_view = (struct lookup_view){
        .header = h,
        .buckets = (const void *)((const char *)map + h->buckets_off),
        .entries = (const void *)((const char *)map + h->entries_off),
        .seed = h->seed,
        .bucket_mask = h->n_buckets - 1,
        .n_entries = h->n_entries,
    };
    return 0;
}

static inline uint64_t mix(uint64_t a, uint64_t b)
{
    __uint128_t m = (__uint128_t)a * b;

    return (uint64_t)m ^ (uint64_t)(m >> 64);
}

uint64_t lookup_hash(uint64_t seed, const uint8_t key[SHM_KEY_BYTES], uint16_t space, uint8_t group)
{
    uint64_t w[4];

    memcpy(w, key, sizeof(w));
    return mix(mix(w[0] ^ seed, w[1] ^ UINT64_C(0x9e3779b97f4a7c15)) ^ space,
               mix(w[2] ^ seed, w[3] ^ UINT64_C(0xd1b54a32d192ed03)) ^ UINT64_C(0x8bb84b93962eacc9) ^
                   (uint64_t)group << 32);
}

/* Bit i: tag i of the bucket equals tag. */
static inline unsigned match_tags(const struct shm_bucket *b, uint16_t tag)
{
#if defined(__SSE2__) && !defined(LOOKUP_SCALAR)
    /* 16-byte load of eight independent atomics: each 16-bit lane is read whole on x86-64; the order among them is of no
     * matter, since what a tag points to is checked against the entry itself. */
    __m128i t = _mm_load_si128((const __m128i *)(const void *)b->tag);
    unsigned m = (unsigned)_mm_movemask_epi8(_mm_cmpeq_epi16(t, _mm_set1_epi16((short)tag)));
    unsigned r = 0;

    atomic_thread_fence(memory_order_acquire); /* pairs with the release store of the tag in index_insert() */
    while (m) {
        unsigned bit = (unsigned)__builtin_ctz(m);

        r |= 1u << (bit / 2);
        m &= ~(3u << bit);
    }
    return r;
#else
    unsigned r = 0;

    for (unsigned i = 0; i < SHM_BUCKET_SLOTS; i++)
        if (atomic_load_explicit(&b->tag[i], memory_order_acquire) == tag)
            r |= 1u << i;
    return r;
#endif
}

static inline bool key_equal(const uint8_t *shared, const uint8_t *key)
{
    const _Atomic uint64_t *s = (const void *)shared;
    uint64_t k[4], d = 0;

    memcpy(k, key, sizeof(k));
    for (int i = 0; i < 4; i++)
        d |= atomic_load_explicit(&s[i], memory_order_relaxed) ^ k[i];
    return d == 0;
}

/* Copies entry number e if it is valid and is the one asked for (X4: two equal even generations frame the reads). */
static inline bool read_entry(const struct lookup_view *view, uint32_t e, const uint8_t *key, uint16_t space,
                              uint8_t group, struct lookup_hit *ret_hit)
{
    const struct shm_entry *x = &view->entries[e];
    uint32_t gen = atomic_load_explicit(&x->gen, memory_order_acquire);

    if ((gen & 1) || gen < 2 || !key_equal(x->key, key) ||
        atomic_load_explicit(&x->space, memory_order_relaxed) != space ||
        atomic_load_explicit(&x->group, memory_order_relaxed) != group)
        return false;
    ret_hit->entry = e;
    ret_hit->gen = gen;
    ret_hit->crc32c = atomic_load_explicit(&x->crc32c, memory_order_relaxed);
    ret_hit->bytes = atomic_load_explicit(&x->bytes, memory_order_relaxed);
    ret_hit->host = atomic_load_explicit(&x->host, memory_order_relaxed);
    ret_hit->dev = atomic_load_explicit(&x->dev, memory_order_relaxed);
    ret_hit->flags = atomic_load_explicit(&x->flags, memory_order_relaxed);
#if defined(LOOKUP_SCALAR)
    /* ThreadSanitizer knows no fences: a read-modify-write that changes nothing would need write access, so re-read only. */
    return atomic_load_explicit(&x->gen, memory_order_acquire) == gen;
#else
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&x->gen, memory_order_relaxed) == gen;
#endif
}

static bool find_hashed(const struct lookup_view *view, uint64_t hash, const uint8_t *key, uint16_t space,
                        uint8_t group, struct lookup_hit *ret_hit)
{
    uint16_t tag = lookup_tag(hash);
    uint32_t home = (uint32_t)hash & view->bucket_mask;

    for (uint32_t p = 0; p < SHM_PROBE_MAX; p++) {
        const struct shm_bucket *b = &view->buckets[(home + p) & view->bucket_mask];
        unsigned m = match_tags(b, tag);

        for (; m; m &= m - 1) {
            uint32_t e = atomic_load_explicit(&b->entry[__builtin_ctz(m)], memory_order_relaxed);

            if (e < view->n_entries && read_entry(view, e, key, space, group, ret_hit))
                return true;
        }
        if (p == 0 && atomic_load_explicit(&b->overflow, memory_order_acquire) == 0)
            return false;
    }
    return false;
}

bool lookup_find(const struct lookup_view *view, const uint8_t key[SHM_KEY_BYTES], uint16_t space, uint8_t group,
                 struct lookup_hit *ret_hit)
{
    return find_hashed(view, lookup_hash(view->seed, key, space, group), key, space, group, ret_hit);
}

/* Keys in flight at once: enough to cover a DRAM miss with the work of the others, few enough for the line-fill buffers. */
#define WAVE 16

size_t lookup_find_many(const struct lookup_view *view, const uint8_t *keys, size_t n, uint16_t space, uint8_t group,
                        bool until_miss, struct lookup_hit *ret_hits)
{
    uint64_t hash[2][WAVE];
    size_t n_found = 0;
    size_t wave_n = n < WAVE ? n : WAVE;

    for (size_t i = 0; i < wave_n; i++) {
        hash[0][i] = lookup_hash(view->seed, keys + i * SHM_KEY_BYTES, space, group);
        __builtin_prefetch(&view->buckets[(uint32_t)hash[0][i] & view->bucket_mask]);
    }
    for (size_t base = 0, w = 0; base < n; base += WAVE, w ^= 1) {
        size_t here = n - base < WAVE ? n - base : WAVE;
        size_t next = base + WAVE < n ? (n - base - WAVE < WAVE ? n - base - WAVE : WAVE) : 0;

        for (size_t i = 0; i < here; i++) { /* buckets have arrived: ask for the entries, and for the next wave's buckets */
            const struct shm_bucket *b = &view->buckets[(uint32_t)hash[w][i] & view->bucket_mask];
            unsigned m = match_tags(b, lookup_tag(hash[w][i]));

            if (m) {
                uint32_t e = atomic_load_explicit(&b->entry[__builtin_ctz(m)], memory_order_relaxed);

                if (e < view->n_entries)
                    __builtin_prefetch(&view->entries[e]);
            }
            if (i < next) {
                hash[w ^ 1][i] = lookup_hash(view->seed, keys + (base + WAVE + i) * SHM_KEY_BYTES, space, group);
                __builtin_prefetch(&view->buckets[(uint32_t)hash[w ^ 1][i] & view->bucket_mask]);
            }
        }
        for (size_t i = 0; i < here; i++) {
            struct lookup_hit *hit = &ret_hits[base + i];

            if (find_hashed(view, hash[w][i], keys + (base + i) * SHM_KEY_BYTES, space, group, hit)) {
                n_found++;
                continue;
            }
            *hit = (struct lookup_hit){.host = SHM_LOC_NONE, .dev = SHM_LOC_NONE};
            if (until_miss)
                return n_found;
        }
    }
    return n_found;
}

size_t lookup_confirm(const struct lookup_view *view, const struct lookup_hit *hits, size_t n)
{
    size_t i = 0;

    /* Full fence between the caller's stores of its lease words and these loads: pairs with the fence between the daemon's
     * store of the odd generation and its scan of the lease tables. One of the two sees the other. */
    atomic_thread_fence(memory_order_seq_cst);
    while (i < n &&
           atomic_load_explicit(&view->entries[hits[i].entry].gen, memory_order_acquire) == hits[i].gen)
        i++;
    return i;
}
