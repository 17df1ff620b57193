/* A worker's page as a hostile worker writes it, under a cache at work: lease words, hit log, heads; between them publishes,
 * evictions, pins and counts. Nothing breaks, no invariant is lost, and nothing but its own blocks is kept from leaving.
 *
 * The input is a program: an operation a byte, its numbers behind it. The cache outlives a run (making one takes longer than all
 * that a run does) and is emptied at the end of each, which is itself checked; the generations of its entries go on. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "store/cache.h"
#include "store/slab.h"

enum { ENTRIES = 32, LEASES = 16, LOG = 16, CHAIN = 4 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct bed {
    struct budget budget;
    struct cache *cache;
    struct space *space;
    struct shm_page_header header;
    _Atomic uint64_t leases[LEASES], log[LOG];
    struct cache_page page;
    uint64_t now;
    uint32_t next;
    uint8_t parent[KEY_BYTES];
};

static uint64_t now_usec(void *ctx)
{
    struct bed *b = ctx;

    return b->now += 1000;
}

static struct bed *make_bed(void)
{
    static const uint32_t window = 0;
    static const struct space_layer_desc layer = {64, 256, 0, 0, "raw", NULL, "raw", NULL}; /* 64 KiB: few slots to check */
    struct space_desc desc = {.model = "m", .revision = "", .rope = "", .shard = "", .dtype = CODEC_F16, .block_tokens = 2,
                              .window_tokens = &window, .n_groups = 1, .layers = &layer, .n_layers = 1};
    struct bed *b = calloc(1, sizeof(*b));
    struct cache_config config = {.tenant = "t", .domain = "d", .n_entries = ENTRIES, .quota_bytes = 4 << 20,
                                  .n_spaces_max = 2, .slab_bytes = 2 << 20, .policy = policy_find(NULL),
                                  .now_usec = now_usec, .now_ctx = b};
    const char *why;

    if (!b)
        abort();
    b->budget.limit_bytes = 4 << 20;
    b->budget.hugepages = SLAB_HUGE_OFF;
    config.budget = &b->budget;
    if (cache_create(&config, &b->cache) < 0 || cache_space_open(b->cache, &desc, &b->space, &why) < 0)
        abort();
    b->page = (struct cache_page){.header = &b->header, .leases = b->leases, .log = b->log, .n_leases = LEASES, .n_log = LOG};
    if (cache_page_add(b->cache, &b->page) < 0)
        abort();
    return b;
}

static void publish(struct bed *b, uint8_t how)
{
    struct cache_slot slot;
    uint8_t key[KEY_BYTES] = {0};
    int r;

    if (b->next % CHAIN == 0)
        memcpy(b->parent, b->space->fingerprint, KEY_BYTES);
    b->next++;
    memcpy(key, &b->next, sizeof(b->next));
    r = cache_reserve(b->cache, b->space, 0, key, b->parent, false, &slot);
    if (r == CACHE_RESERVED) {
        memset(slot.payload, (int)b->next, 64);
        if (how % 8 == 0) {
            cache_abort(b->cache, &slot);
            b->next = (b->next + CHAIN - 1) / CHAIN * CHAIN;
        } else {
            cache_commit(b->cache, &slot);
        }
    } else if (r != CACHE_NO_PARENT && r != -ENOSPC) {
        abort();
    }
    memcpy(b->parent, key, KEY_BYTES);
}

/* What a worker could know, or nonsense. */
static uint64_t word(const uint8_t *at, uint8_t kind)
{
    uint64_t v;

    memcpy(&v, at, sizeof(v));
    return kind % 4 ? shm_ref(at[0] % (ENTRIES + 1), (uint32_t)(at[1] % 64) * 2) : v;
}

static void step(struct bed *b, uint8_t op, const uint8_t *arg)
{
    struct cache_evicted evicted = {0};
    struct cache_stats stats;
    uint32_t all[ENTRIES];
    uint64_t blocks, bytes, v;

    switch (op % 10) {
    case 0:
    case 1:
        atomic_store(&b->leases[arg[8] % LEASES], word(arg, arg[9]));
        break;
    case 2:
        atomic_store(&b->log[arg[8] % LOG], word(arg, arg[9]));
        atomic_fetch_add(&b->header.log_head, 1);
        break;
    case 3:
        memcpy(&v, arg, sizeof(v));
        atomic_store(&b->header.log_head, v);
        break;
    case 4:
        cache_drain_hits(b->cache);
        break;
    case 5:
        for (uint32_t i = 0; i < ENTRIES; i++)
            all[i] = i;
        cache_evict(b->cache, all + arg[0] % ENTRIES, ENTRIES - arg[0] % ENTRIES, NULL, NULL, 0, &evicted);
        break;
    case 6:
        if (cache_page_leases(b->cache, &b->page) > LEASES)
            abort();
        cache_stats(b->cache, &stats);
        break;
    case 7: /* the rest of the header is read by nobody */
        b->header.n_leases = UINT32_MAX;
        b->header.n_log = arg[0];
        memcpy(&b->header.leases_off, arg, 8);
        b->header.total_bytes = 0;
        break;
    case 8:
        if (cache_find(b->cache, b->space->id, 0, b->parent) != CACHE_NONE)
            cache_pin(b->cache, cache_find(b->cache, b->space->id, 0, b->parent), arg[0] % 2, &blocks, &bytes);
        break;
    default:
        publish(b, arg[0]);
    }
}

static bool always(void *ctx, uint32_t entry)
{
    (void)ctx;
    (void)entry;
    return true;
}

/* The worker is gone: nothing of its words holds anything, all blocks can leave. */
static void clear(struct bed *b)
{
    struct cache_evicted evicted = {0};
    struct cache_stats stats;
    uint32_t all[ENTRIES];
    uint64_t blocks, bytes;

    cache_page_remove(b->cache, &b->page);
    memset((void *)b->leases, 0, sizeof(b->leases));
    memset((void *)b->log, 0, sizeof(b->log));
    memset(&b->header, 0, sizeof(b->header));
    b->page.log_seen = 0;
    for (uint32_t e = 0; e < ENTRIES; e++) {
        struct cache_entry_info info;

        all[e] = e;
        while (cache_entry_info(b->cache, e, &info) && info.n_pins)
            cache_pin(b->cache, e, true, &blocks, &bytes);
    }
    cache_evict(b->cache, all, ENTRIES, always, NULL, 0, &evicted);
    cache_stats(b->cache, &stats);
    if (stats.n_valid || stats.n_reserved || stats.bytes_used)
        abort();
    cache_assert_valid(b->cache);
    if (cache_page_add(b->cache, &b->page) < 0)
        abort();
    b->next = (b->next + CHAIN - 1) / CHAIN * CHAIN;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct bed *bed; /* see above */
    uint8_t arg[10];

    if (!bed)
        bed = make_bed();
    for (size_t at = 0; at < size; at += 1 + sizeof(arg)) {
        size_t n = size - at - 1 < sizeof(arg) ? size - at - 1 : sizeof(arg);

        memset(arg, 0, sizeof(arg));
        memcpy(arg, data + at + 1, n);
        step(bed, data[at], arg);
    }
    cache_assert_valid(bed->cache);
    clear(bed);
    return 0;
}
