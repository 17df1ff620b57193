/* A cache against a model: random publishes, evictions, pins, leases of well-behaved and of mad workers, corruption and shrinking,
 * with every invariant checked as it goes. The seed is printed; KVD_SEED repeats a run. */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "proto/lookup.h"
#include "store/cache.h"

#define N_PAGES 3
#define N_LEASES 64
#define N_LOG 256

struct page_memory {
    struct shm_page_header header;
    _Atomic uint64_t leases[N_LEASES];
    _Atomic uint64_t log[N_LOG];
    struct cache_page page;
};

static uint64_t clock_usec;
static struct budget budget;
static struct cache *cache;
static struct space *space, *sliding;
static struct page_memory pages[N_PAGES];
static uint64_t rng;
static uint64_t space_quota; /* of the next cache; 0: none */

static uint64_t now(void *ctx)
{
    (void)ctx;
    return clock_usec;
}

static uint64_t next_random(void)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
}

static uint64_t below(uint64_t n)
{
    return next_random() % n;
}

static void open_space(const char *model, uint32_t n_groups, struct space **ret)
{
    static const uint32_t windows[2] = {0, 128};
    struct space_layer_desc layers[2] = {{1, 64, 64, 0, NULL, NULL, "raw", "raw"},
                                         {2, 64, 64, n_groups - 1, NULL, NULL, "raw", "raw"}};
    struct space_desc d = {.model = model, .revision = "1", .rope = "", .shard = "", .dtype = CODEC_F16, .block_tokens = 64,
                           .window_tokens = windows, .n_groups = n_groups, .layers = layers, .n_layers = 2};
    const char *reason = "";

    ck_assert_msg(cache_space_open(cache, &d, ret, &reason) == 0, "%s", reason);
}

static void make_cache(const char *policy, uint32_t n_entries, uint64_t quota_bytes)
{
    struct cache_config config = {.tenant = "t", .domain = "t", .n_entries = n_entries, .quota_bytes = quota_bytes,
                                  .n_spaces_max = 4, .space_quota_bytes = space_quota, .slab_bytes = 2 << 20, .policy = policy_find(policy),
                                  .budget = &budget, .now_usec = now};

    budget = (struct budget){.limit_bytes = 1 << 30, .hugepages = SLAB_HUGE_OFF};
    clock_usec = 1;
    ck_assert_int_eq(cache_create(&config, &cache), 0);
    open_space("plain", 1, &space);
    open_space("sliding", 2, &sliding);
    for (int i = 0; i < N_PAGES; i++) {
        memset(&pages[i], 0, sizeof(pages[i]));
        pages[i].page = (struct cache_page){.header = &pages[i].header, .leases = pages[i].leases, .log = pages[i].log,
                                            .n_leases = N_LEASES, .n_log = N_LOG};
        ck_assert_int_eq(cache_page_add(cache, &pages[i].page), 0);
    }
}

static void drop_cache(void)
{
    for (int i = 0; i < N_PAGES; i++)
        cache_page_remove(cache, &pages[i].page);
    cache = cache_destroy(cache);
    ck_assert_uint_eq(budget.used_bytes, 0);
}

/* Block d of chain c: key and parent are numbers, the payload repeats the key. */
static void key_of(uint32_t chain, uint32_t depth, const struct space *s, uint8_t ret[KEY_BYTES])
{
    uint64_t x = (uint64_t)chain << 32 | (depth + 1);

    memset(ret, 0, KEY_BYTES);
    memcpy(ret, &x, sizeof(x));
    x *= UINT64_C(0x9e3779b97f4a7c15);
    memcpy(ret + 8, &x, sizeof(x));
    ret[31] = (uint8_t)s->id;
}

static int publish_as(struct space *s, uint8_t group, const uint8_t *key, const uint8_t *parent, bool first, bool commit)
{
    struct cache_slot slot;
    int r = cache_reserve(cache, s, group, key, parent, first, &slot);

    if (r != CACHE_RESERVED)
        return r;
    for (uint64_t i = 0; i < slot.bytes; i++)
        ((uint8_t *)slot.payload)[i] = key[i % KEY_BYTES];
    if (!commit) {
        cache_abort(cache, &slot);
        return -1;
    }
    return cache_commit(cache, &slot);
}

static int publish(struct space *s, uint8_t group, uint32_t chain, uint32_t depth, bool commit)
{
    uint8_t key[KEY_BYTES], parent[KEY_BYTES];

    key_of(chain, depth, s, key);
    if (depth == 0)
        memcpy(parent, s->fingerprint, KEY_BYTES);
    else
        key_of(chain, depth - 1, s, parent);
    return publish_as(s, group, key, parent, depth == 0, commit);
}

/* A second block of a chain, one of many. */
static int publish_below(struct space *s, uint32_t chain, uint32_t child)
{
    uint8_t key[KEY_BYTES], parent[KEY_BYTES];

    key_of(chain, 0, s, parent);
    key_of(chain + 1000000, child, s, key);
    return publish_as(s, 0, key, parent, false, true);
}

/* Reads it through the descriptor that workers get: a block dropped as corrupt is there as well while it is leased. */
static bool payload_right(const struct lookup_view *view, uint32_t entry)
{
    const struct shm_entry *x = &view->entries[entry];
    static uint8_t payload[1 << 16];
    uint64_t loc = x->host, slab_bytes;
    int fd = cache_slab_fd(cache, shm_loc_slab(loc), &slab_bytes);

    if (fd < 0 || x->bytes > sizeof(payload) ||
        pread(fd, payload, x->bytes, (off_t)shm_loc_off(loc)) != (ssize_t)x->bytes)
        return false;
    for (uint64_t i = 0; i < x->bytes; i += 97)
        if (payload[i] != x->key[i % KEY_BYTES])
            return false;
    return true;
}

/* As a worker sees it: read-only. */
static const void *map_fd(int fd, uint64_t bytes)
{
    const void *map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);

    ck_assert_ptr_ne(map, MAP_FAILED);
    return map;
}

static struct lookup_view view_of(void)
{
    uint64_t bytes;
    struct lookup_view view;
    int fd = cache_index_fd(cache, &bytes);

    ck_assert_int_eq(lookup_view_init(map_fd(fd, bytes), bytes, &view), 0);
    return view;
}

static void lease_random(const struct lookup_view *view, struct page_memory *p)
{
    uint8_t key[KEY_BYTES];
    struct space *s = below(2) ? space : sliding;
    struct lookup_hit hit;
    uint32_t slot = (uint32_t)below(N_LEASES);

    key_of((uint32_t)below(12), (uint32_t)below(20), s, key);
    if (p->leases[slot]) {
        ck_assert(payload_right(view, shm_ref_entry(p->leases[slot]))); /* I3: what was leased is as it was */
        p->leases[slot] = 0;
        return;
    }
    if (!lookup_find(view, key, (uint16_t)s->id, 0, &hit))
        return;
    p->leases[slot] = shm_ref(hit.entry, hit.gen);
    ck_assert_uint_eq(lookup_confirm(view, &hit, 1), 1);
    p->log[p->header.log_head++ % N_LOG] = shm_ref(hit.entry, hit.gen);
}

static bool want_even(void *ctx, uint32_t e)
{
    (void)ctx;
    return e % 2 == 0;
}

static void step(const struct lookup_view *view)
{
    uint32_t chain = (uint32_t)below(12), depth = (uint32_t)below(20), e = (uint32_t)below(cache_n_entries(cache));
    struct cache_evicted done = {0};
    uint64_t blocks, bytes;
    uint8_t key[KEY_BYTES];

    switch (below(12)) {
    case 0: case 1: case 2: case 3:
        for (uint32_t d = 0; d <= depth; d++)
            publish(space, 0, chain, d, true);
        break;
    case 4:
        publish(sliding, (uint8_t)below(2), chain, depth, below(4) != 0);
        break;
    case 5: case 6:
        lease_random(view, &pages[below(2)]); /* pages 0 and 1 behave */
        break;
    case 7:
        pages[2].leases[below(N_LEASES)] = below(2) ? next_random() : shm_ref(e, (uint32_t)below(6)); /* page 2 is mad */
        pages[2].log[below(N_LOG)] = next_random();
        pages[2].header.log_head = below(3) ? pages[2].header.log_head + below(N_LOG * 2) : next_random();
        break;
    case 8:
        if (below(2))
            cache_evict(cache, &e, 1, NULL, NULL, 0, &done);
        else
            cache_evict(cache, &e, 1, want_even, NULL, below(2) ? 100000 : 0, &done);
        break;
    case 9:
        if (below(4) == 0)
            cache_pin(cache, e, below(2), &blocks, &bytes);
        else if (cache_hold(cache, e))
            cache_unhold(cache, e);
        break;
    case 10:
        key_of(chain, depth, space, key);
        e = cache_find(cache, space->id, 0, key);
        if (below(8) == 0 && e != CACHE_NONE)
            cache_drop_corrupt(cache, e);
        cache_drain_hits(cache);
        break;
    default:
        if (below(16) == 0)
            cache_shrink(cache, below(4) << 21);
    }
    clock_usec += below(300000);
}

static void run(const char *policy, uint32_t n_entries, uint64_t quota)
{
    const char *seed = getenv("KVD_SEED");
    struct lookup_view view;

    rng = seed ? strtoull(seed, NULL, 0) : ((uint64_t)time(NULL) * 2654435761u) | 1;
    printf("check_cache %s %u: KVD_SEED=%llu\n", policy, n_entries, (unsigned long long)rng);
    fflush(stdout);
    make_cache(policy, n_entries, quota);
    view = view_of();
    for (int i = 0; i < 4000; i++) {
        step(&view);
        if (i % 16 == 0)
            cache_assert_valid(cache);
    }
    cache_assert_valid(cache);
    drop_cache();
}

START_TEST(random_s3fifo)
{
    run("s3fifo", 200, 8 << 20);
}
END_TEST

START_TEST(random_lru)
{
    run("lru", 97, 6 << 20);
}
END_TEST

START_TEST(random_tiny)
{
    run("s3fifo", 9, 2 << 20);
}
END_TEST

/* A full cache takes a new chain by evicting others, leaves first, and never the parent of what is being published. */
START_TEST(long_chains_replace_each_other)
{
    make_cache("s3fifo", 64, 1 << 30);
    for (uint32_t chain = 0; chain < 50; chain++)
        for (uint32_t d = 0; d < 40; d++) {
            ck_assert_int_eq(publish(space, 0, chain, d, true), CACHE_RESERVED);
            if (d % 8 == 0)
                cache_assert_valid(cache);
        }
    drop_cache();
}
END_TEST

START_TEST(everything_leased_is_full_and_then_not)
{
    struct lookup_view view;
    struct lookup_hit hit;
    uint8_t key[KEY_BYTES];

    make_cache("s3fifo", 16, 1 << 30);
    view = view_of();
    for (uint32_t d = 0; d < 16; d++)
        ck_assert_int_eq(publish(space, 0, 0, d, true), 0);
    for (uint32_t d = 0; d < 16; d++) {
        key_of(0, d, space, key);
        ck_assert(lookup_find(&view, key, (uint16_t)space->id, 0, &hit));
        pages[0].leases[d] = shm_ref(hit.entry, hit.gen);
    }
    ck_assert_int_eq(publish(space, 0, 1, 0, true), -ENOSPC);
    cache_assert_valid(cache);
    for (uint32_t d = 0; d < 16; d++)
        ck_assert(payload_right(&view, shm_ref_entry(pages[0].leases[d])));
    pages[0].leases[15] = 0; /* the leaf */
    ck_assert_int_eq(publish(space, 0, 1, 0, true), 0);
    key_of(0, 15, space, key);
    ck_assert(!lookup_find(&view, key, (uint16_t)space->id, 0, &hit));
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

START_TEST(pinned_chains_stay)
{
    uint64_t blocks, bytes;
    uint8_t key[KEY_BYTES];

    make_cache("lru", 32, 1 << 30);
    for (uint32_t d = 0; d < 8; d++)
        publish(space, 0, 0, d, true);
    key_of(0, 7, space, key);
    cache_pin(cache, cache_find(cache, space->id, 0, key), false, &blocks, &bytes);
    ck_assert_uint_eq(blocks, 8);
    for (uint32_t chain = 1; chain < 40; chain++)
        for (uint32_t d = 0; d < 6; d++)
            ck_assert_int_eq(publish(space, 0, chain, d, true), 0);
    for (uint32_t d = 0; d < 8; d++) {
        key_of(0, d, space, key);
        ck_assert_uint_ne(cache_find(cache, space->id, 0, key), CACHE_NONE);
    }
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

/* Blocks of 256 bytes: thousands to a slab. */
static struct space *open_tiny(void)
{
    static const uint32_t window = 0;
    struct space_layer_desc layer = {1, 64, 64, 0, "raw", "raw", "raw", "raw"};
    struct space_desc d = {.model = "tiny", .revision = "1", .rope = "", .shard = "", .dtype = CODEC_F16, .block_tokens = 1,
                           .window_tokens = &window, .n_groups = 1, .layers = &layer, .n_layers = 1};
    const char *reason = "";
    struct space *s;

    ck_assert_msg(cache_space_open(cache, &d, &s, &reason) == 0, "%s", reason);
    return s;
}

static uint32_t find(struct space *s, uint32_t chain, uint32_t depth)
{
    uint8_t key[KEY_BYTES];

    key_of(chain, depth, s, key);
    return cache_find(cache, s->id, 0, key);
}

/* A worker takes the first n_chains chains' first blocks. */
static void lease_first_blocks(struct space *s, uint32_t n_chains)
{
    struct lookup_view view = view_of();
    struct lookup_hit hit;
    uint8_t key[KEY_BYTES];

    ck_assert_uint_le(n_chains, N_PAGES * N_LEASES);
    for (uint32_t chain = 0; chain < n_chains; chain++) {
        key_of(chain, 0, s, key);
        ck_assert(lookup_find(&view, key, (uint16_t)s->id, 0, &hit));
        pages[chain / N_LEASES].leases[chain % N_LEASES] = shm_ref(hit.entry, hit.gen);
    }
}

START_TEST(shrinking_ends_where_nothing_can_go)
{
    uint64_t blocks, bytes;
    struct space *tiny;

    make_cache("s3fifo", 16384, 1 << 30);
    tiny = open_tiny();
    for (uint32_t d = 0; d < 6000; d++)
        ck_assert_int_eq(publish(tiny, 0, 0, d, true), 0);
    cache_pin(cache, find(tiny, 0, 5999), false, &blocks, &bytes);
    ck_assert_uint_eq(blocks, 6000);
    ck_assert_uint_eq(cache_shrink(cache, 0), 0);
    ck_assert_uint_ne(find(tiny, 0, 5999), CACHE_NONE);
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

/* A slab that one block keeps is of no use when memory is wanted: its other blocks stay where they are. */
START_TEST(shrinking_takes_nothing_for_nothing)
{
    struct cache_stats stats;

    make_cache("s3fifo", 256, 1 << 30);
    for (uint32_t chain = 0; chain < 100; chain++)
        ck_assert_int_eq(publish(space, 0, chain, 0, true), 0);
    cache_stats(cache, &stats);
    ck_assert_uint_ge(stats.n_slabs, 2);
    lease_first_blocks(space, 1);
    cache_shrink(cache, 0);
    cache_stats(cache, &stats);
    ck_assert_uint_eq(stats.n_slabs, 1);
    ck_assert_uint_gt(stats.n_valid, 1);
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

/* What is to go is listed once, however much of it hangs on each other: memory in the order of the blocks, not of their square. */
START_TEST(one_long_chain_is_listed_once)
{
    struct rusage before, after;
    struct space *tiny;

    make_cache("s3fifo", 32768, 1 << 30);
    tiny = open_tiny();
    for (uint32_t d = 0; d < 30000; d++)
        ck_assert_int_eq(publish(tiny, 0, 0, d, true), 0);
    getrusage(RUSAGE_SELF, &before);
    ck_assert_uint_gt(cache_shrink(cache, 0), 0);
    getrusage(RUSAGE_SELF, &after);
    ck_assert_int_lt(after.ru_maxrss - before.ru_maxrss, 64 << 10); /* KiB */
    ck_assert_uint_eq(find(tiny, 0, 0), CACHE_NONE);
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

static bool want_all(void *ctx, uint32_t e)
{
    (void)ctx;
    (void)e;
    return true;
}

static void *evict_chain(void *arg)
{
    struct cache_evicted done = {0};

    cache_evict(cache, arg, 1, want_all, NULL, 0, &done);
    return (void *)(uintptr_t)done.blocks;
}

/* However long a chain is, the way up takes no more stack. */
START_TEST(a_long_chain_goes_on_a_small_stack)
{
    enum { DEPTH = 60000, STACK_BYTES = 192 << 10 };
    struct space *tiny;
    pthread_attr_t attr;
    uint32_t leaf;
    pthread_t t;
    void *n;

    make_cache("lru", DEPTH, 1 << 30);
    tiny = open_tiny();
    for (uint32_t d = 0; d < DEPTH; d++)
        ck_assert_int_eq(publish(tiny, 0, 0, d, true), 0);
    leaf = find(tiny, 0, DEPTH - 1);
    pthread_attr_init(&attr);
    ck_assert_int_eq(pthread_attr_setstacksize(&attr, STACK_BYTES), 0);
    ck_assert_int_eq(pthread_create(&t, &attr, evict_chain, &leaf), 0);
    pthread_join(t, &n);
    pthread_attr_destroy(&attr);
    ck_assert_uint_eq((uintptr_t)n, DEPTH);
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

/* Leased blocks that are first in the order of eviction do not make the cache full. */
START_TEST(leased_victims_are_not_all)
{
    static const char *const policies[] = {"s3fifo", "lru"};

    make_cache(policies[_i], 128, 1 << 30);
    for (uint32_t chain = 0; chain < 128; chain++)
        ck_assert_int_eq(publish(space, 0, chain, 0, true), 0);
    lease_first_blocks(space, 100);
    ck_assert_int_eq(publish(space, 0, 1000, 0, true), 0);
    for (uint32_t chain = 0; chain < 100; chain++)
        ck_assert_uint_ne(find(space, chain, 0), CACHE_NONE);
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

static void make_quota_cache(uint32_t n_blocks)
{
    space_quota = n_blocks * 256;
    make_cache("s3fifo", 1024, 1 << 30);
    space_quota = 0;
}

/* One more block than a space may have costs it some old ones, not all that hang on the oldest. */
START_TEST(a_full_space_keeps_most_of_its_tree)
{
    struct cache_space_stats stats;
    struct space *tiny;

    make_quota_cache(640);
    tiny = open_tiny();
    ck_assert_int_eq(publish(tiny, 0, 0, 0, true), 0);
    for (uint32_t child = 1; child < 640; child++)
        ck_assert_int_eq(publish_below(tiny, 0, child), 0);
    for (uint32_t child = 640; child < 2000; child++) {
        ck_assert_int_eq(publish_below(tiny, 0, child), 0);
        cache_space_stats(cache, tiny, &stats);
        ck_assert_uint_gt(stats.n_blocks, 600);
    }
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

START_TEST(what_stays_of_the_oldest_does_not_fill_a_space)
{
    uint64_t blocks, bytes;
    struct space *tiny;

    make_quota_cache(500);
    tiny = open_tiny();
    for (uint32_t chain = 0; chain < 190; chain++)
        ck_assert_int_eq(publish(tiny, 0, chain, 0, true), 0);
    for (uint32_t d = 1; d <= 100; d++)
        ck_assert_int_eq(publish(tiny, 0, 0, d, true), 0);
    cache_pin(cache, find(tiny, 0, 100), false, &blocks, &bytes);
    lease_first_blocks(tiny, 190);
    for (uint32_t chain = 200; chain < 800; chain++)
        ck_assert_int_eq(publish(tiny, 0, chain, 0, true), 0);
    for (uint32_t chain = 0; chain < 190; chain++)
        ck_assert_uint_ne(find(tiny, chain, 0), CACHE_NONE);
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

/* Pieces that are all too small for a payload make room for a larger one. */
START_TEST(a_payload_larger_than_a_slab_gets_one)
{
    static const uint32_t window = 0;
    struct space_layer_desc layer = {64, 128, 128, 0, "raw", "raw", "raw", "raw"};
    struct space_desc d = {.model = "large", .revision = "1", .rope = "", .shard = "", .dtype = CODEC_F16, .block_tokens = 100,
                           .window_tokens = &window, .n_groups = 1, .layers = &layer, .n_layers = 1};
    const char *reason = "";
    struct space *large;

    make_cache("s3fifo", 512, 8 << 20);
    ck_assert_int_eq(cache_space_open(cache, &d, &large, &reason), 0);
    ck_assert_uint_gt(space_layout(large, 0, true)->bytes, 2 << 20);
    for (uint32_t chain = 0; chain < 400; chain++)
        ck_assert_int_eq(publish(space, 0, chain, 0, true), 0);
    for (uint32_t chain = 0; chain < 4; chain++)
        ck_assert_int_eq(publish(large, 0, chain, 0, true), 0);
    for (uint32_t chain = 1000; chain < 1400; chain++)
        ck_assert_int_eq(publish(space, 0, chain, 0, true), 0);
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

/* Two tenants that take memory from each other all day must not run out of numbers for their slabs. */
START_TEST(slab_numbers_come_back)
{
    uint64_t bytes;
    uint32_t n = 0;

    make_cache("s3fifo", 64, 1 << 30);
    for (int round = 0; round < 100; round++) {
        ck_assert_int_eq(publish(space, 0, (uint32_t)round, 0, true), 0);
        ck_assert_int_ge(cache_slab_fd(cache, n, &bytes), 0);
        ck_assert_uint_gt(cache_shrink(cache, 0), 0);
        ck_assert_int_eq(cache_slab_fd(cache, n, &bytes), -ENOENT);
    }
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

/* Another thread reads under leases while the loop evicts and refills: what it holds never changes (I3). */
struct reader {
    struct lookup_view view;
    struct page_memory *page;
    const uint8_t *slab;
    _Atomic bool stop;
    uint64_t n_leases, n_wrong, n_stale;
};

static void *read_under_leases(void *arg)
{
    struct reader *r = arg;
    uint64_t x = 88172645463325252u;

    while (!atomic_load(&r->stop)) {
        uint8_t key[KEY_BYTES];
        struct lookup_hit hit;

        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        key_of((uint32_t)(x % 30), (uint32_t)(x >> 8) % 8, space, key);
        if (!lookup_find(&r->view, key, (uint16_t)space->id, 0, &hit))
            continue;
        atomic_store_explicit(&r->page->leases[x % N_LEASES], shm_ref(hit.entry, hit.gen), memory_order_relaxed);
        if (lookup_confirm(&r->view, &hit, 1) == 1) {
            const uint8_t *p = r->slab + shm_loc_off(hit.host);

            for (int round = 0; round < 2; round++)
                for (uint64_t i = 0; i < hit.bytes; i += 61)
                    r->n_wrong += p[i] != key[i % KEY_BYTES];
            r->n_leases++;
        } else {
            r->n_stale++;
        }
        atomic_store_explicit(&r->page->leases[x % N_LEASES], 0, memory_order_release);
    }
    return NULL;
}

START_TEST(leases_hold_against_eviction)
{
    struct reader r = {0};
    pthread_t thread;
    uint64_t bytes;
    int fd;

    make_cache("lru", 40, 2 << 20); /* one slab: the reader needs one base address */
    ck_assert_int_eq(publish(space, 0, 0, 0, true), 0);
    fd = cache_slab_fd(cache, 0, &bytes);
    r.slab = map_fd(fd, bytes);
    r.view = view_of();
    r.page = &pages[0];
    ck_assert_int_eq(pthread_create(&thread, NULL, read_under_leases, &r), 0);
    for (uint32_t i = 0; i < 4000; i++)
        for (uint32_t d = 0; d < 6; d++)
            if (publish(space, 0, i % 30, d, true) < 0)
                break;
    atomic_store(&r.stop, true);
    pthread_join(thread, NULL);
    printf("leases %llu stale %llu wrong %llu\n", (unsigned long long)r.n_leases, (unsigned long long)r.n_stale,
           (unsigned long long)r.n_wrong);
    ck_assert_uint_eq(r.n_wrong, 0);
    ck_assert_uint_gt(r.n_leases, 0);
    cache_assert_valid(cache);
    drop_cache();
}
END_TEST

int main(void)
{
    Suite *s = suite_create("cache");
    TCase *t = tcase_create("cache");
    SRunner *runner;
    int failed;

    tcase_set_timeout(t, 240);
    tcase_add_test(t, random_s3fifo);
    tcase_add_test(t, random_lru);
    tcase_add_test(t, random_tiny);
    tcase_add_test(t, long_chains_replace_each_other);
    tcase_add_test(t, everything_leased_is_full_and_then_not);
    tcase_add_test(t, pinned_chains_stay);
    tcase_add_test(t, shrinking_ends_where_nothing_can_go);
    tcase_add_test(t, shrinking_takes_nothing_for_nothing);
    tcase_add_test(t, one_long_chain_is_listed_once);
    tcase_add_test(t, a_long_chain_goes_on_a_small_stack);
    tcase_add_loop_test(t, leased_victims_are_not_all, 0, 2);
    tcase_add_test(t, a_full_space_keeps_most_of_its_tree);
    tcase_add_test(t, what_stays_of_the_oldest_does_not_fill_a_space);
    tcase_add_test(t, a_payload_larger_than_a_slab_gets_one);
    tcase_add_test(t, slab_numbers_come_back);
    tcase_add_test(t, leases_hold_against_eviction);
    suite_add_tcase(s, t);
    runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
