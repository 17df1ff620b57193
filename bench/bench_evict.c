/* What keeping order costs: publish and eviction at 10^4 to 10^7 blocks, metadata a block, and an idle daemon.
 *
 *   bench_evict [N]    full tiers of up to N blocks (default 10^7)
 *
 * The store is driven without a daemon. A tier is filled to its last slot; from then on each block that is published makes another
 * one leave. What a block costs is compared with the smallest tier of the run, after the growth of the machine's own random-line
 * latency between the two sizes has been taken out: what is O(1) stays near 1. */
#include <dirent.h>
#include <errno.h>
#include <unistd.h>

#include "bench/bench.h"
#include "client/libkvd/kvd.h"
#include "store/cache.h"
#include "store/slab.h"
#include "tests/harness.h"

enum { CHAIN = 8, PAYLOAD = 64, SLAB = 2 << 20 };

static void check(int r, const char *what)
{
    if (r) {
        fprintf(stderr, "bench_evict: %s: %d\n", what, r);
        exit(1);
    }
}

static uint64_t now_usec(void *ctx)
{
    (void)ctx;
    return bench_nsec() / 1000;
}

struct bed {
    struct cache *cache;
    struct budget budget;
    struct space *space;
    uint64_t next; /* number of the next block; chains of CHAIN */
    uint8_t parent[KEY_BYTES];
    double reserve_ns, commit_ns;
};

static void bed_init(struct bed *b, const char *policy, uint32_t n)
{
    static const uint32_t window = 0;
    static const struct space_layer_desc layer = {1, 16, 0, 0, "raw", NULL, NULL, NULL};
    struct space_desc desc = {.model = "bench", .revision = "", .rope = "", .shard = "", .dtype = CODEC_F16,
                              .block_tokens = 2, .window_tokens = &window, .n_groups = 1, .layers = &layer, .n_layers = 1};
    struct cache_config config = {.tenant = "bench", .domain = "bench", .n_entries = n + 64, .n_spaces_max = 4,
                                  .slab_bytes = SLAB, .policy = policy_find(policy), .budget = &b->budget,
                                  .now_usec = now_usec};
    const char *why = "";

    memset(b, 0, sizeof(*b));
    b->budget.limit_bytes = config.quota_bytes = (uint64_t)n * PAYLOAD;
    b->budget.hugepages = SLAB_HUGE_OFF;
    check(cache_create(&config, &b->cache), "cache_create");
    if (cache_space_open(b->cache, &desc, &b->space, &why)) {
        fprintf(stderr, "bench_evict: %s\n", why);
        exit(1);
    }
}

static void key_of(uint64_t number, uint8_t ret[KEY_BYTES])
{
    uint64_t state = number * 4 + 1, words[4];

    for (int i = 0; i < 4; i++)
        words[i] = bench_random(&state);
    memcpy(ret, words, sizeof(words));
}

/* Publishes n blocks; what a job would write into the slot is left out. */
static void publish(struct bed *b, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++, b->next++) {
        struct cache_slot slot;
        uint8_t key[KEY_BYTES];

        if (b->next % CHAIN == 0)
            memcpy(b->parent, b->space->fingerprint, KEY_BYTES);
        key_of(b->next, key);
        check(cache_reserve(b->cache, b->space, 0, key, b->parent, b->next % CHAIN == 0, &slot), "cache_reserve");
        slot.crc32c = 0;
        cache_commit(b->cache, &slot);
        memcpy(b->parent, key, KEY_BYTES);
    }
}

static double key_cost(uint64_t n)
{
    uint64_t begun = bench_nsec(), sum = 0;
    uint8_t key[KEY_BYTES];

    for (uint64_t i = 0; i < n; i++) {
        key_of(i, key);
        sum += key[0];
    }
    bench_use(sum);
    return (double)(bench_nsec() - begun) / (double)n;
}

struct figures {
    double fill, churn, evict, line;
    double meta;
};

static struct figures measure(const char *policy, uint32_t n)
{
    struct cache_stats stats, after;
    struct figures f = {0};
    struct bed b;
    uint64_t begun, room = n / CHAIN * CHAIN, n_churn = n < 100000 ? 100000 : n < 1000000 ? n : 1000000;
    double churn[5], own = key_cost(100000);
    void *map;

    bed_init(&b, policy, n);
    begun = bench_nsec();
    publish(&b, room);
    f.fill = (double)(bench_nsec() - begun) / (double)room - own;
    cache_stats(b.cache, &stats);
    check(stats.n_evicted != 0, "evictions before the tier was full");
    publish(&b, n_churn); /* into the steady state */
    for (int i = 0; i < 5; i++) {
        begun = bench_nsec();
        publish(&b, n_churn / 5 / CHAIN * CHAIN);
        churn[i] = (double)(bench_nsec() - begun) / (double)(n_churn / 5 / CHAIN * CHAIN) - own;
    }
    f.churn = bench_median(churn, 5);
    cache_stats(b.cache, &after);
    check(after.n_evicted < n_churn, "too little was evicted");
    f.meta = (double)(after.index_bytes + after.meta_bytes) / (double)after.n_entries;
    cache_destroy(b.cache);

    map = bench_alloc((size_t)n * 200);
    memset(map, 1, (size_t)n * 200);
    f.line = bench_random_lines(map, (size_t)n * 200, 200000, 1, 1);
    free(map);
    return f;
}

static void tiers(uint32_t n_max)
{
    for (size_t p = 0; policy_at(p); p++) {
        const char *policy = policy_at(p)->name;
        struct figures first = {0};

        for (uint32_t about = 10000; about <= n_max; about *= 10) {
            uint32_t n = (uint32_t)(((uint64_t)about * PAYLOAD + SLAB - 1) / SLAB * SLAB / PAYLOAD); /* whole slabs */
            struct figures f = measure(policy, n);
            char name[80];

            if (about == 10000)
                first = f;
            snprintf(name, sizeof(name), "%s: publish into a tier that fills, %u blocks", policy, n);
            bench_line("evict", name, f.fill, "ns/block", first.fill * f.line / first.line,
                       "cost in the smallest tier times growth of random-line latency; at most 2");
            snprintf(name, sizeof(name), "%s: publish and evict one, full tier of %u blocks", policy, n);
            bench_line("evict", name, f.churn, "ns/block", first.churn * f.line / first.line,
                       "cost in the smallest tier times growth of random-line latency; at most 2");
            snprintf(name, sizeof(name), "%s: metadata, %u blocks", policy, n);
            bench_line("evict", name, f.meta, "bytes/block", 200, "the budget; at most 1");
        }
    }
}

/* ---- an idle daemon ---- */

/* Context switches of all threads, chosen and forced: an idle process has none. */
static uint64_t switches(pid_t pid)
{
    char path[320], line[128];
    uint64_t sum = 0;
    struct dirent *e;
    DIR *d;

    snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    d = opendir(path);
    if (!d)
        return 0;
    while ((e = readdir(d))) {
        unsigned long long n;
        FILE *f;

        snprintf(path, sizeof(path), "/proc/%d/task/%s/status", (int)pid, e->d_name);
        if (e->d_name[0] == '.' || !(f = fopen(path, "r")))
            continue;
        while (fgets(line, sizeof(line), f))
            if (sscanf(line, "voluntary_ctxt_switches: %llu", &n) == 1 ||
                sscanf(line, "nonvoluntary_ctxt_switches: %llu", &n) == 1)
                sum += n;
        fclose(f);
    }
    closedir(d);
    return sum;
}

static void idle(void)
{
    struct worker w[4];
    struct harness h;
    uint64_t before;

    harness_init(&h);
    harness_start(&h);
    for (int i = 0; i < 4; i++) {
        worker_start(&w[i], &h, (uid_t)-1);
        worker_ask(&w[i], "open 0 raw 64");
        worker_ask(&w[i], "match 0 %d 160", i * 64);
        worker_ask(&w[i], "publish 0 0 10 0");
        worker_ask(&w[i], "match 0 %d 160", i * 64);
    }
    test_sleep_usec(1000000); /* what publishing has set going comes to rest */
    before = switches(h.pid);
    test_sleep_usec(5000000);
    bench_line("evict", "wake-ups of a daemon with 4 idle workers, in 5 s", (double)(switches(h.pid) - before), "switches", 0,
               "nothing to do, nothing done: 0");
    for (int i = 0; i < 4; i++)
        worker_stop(&w[i]);
    harness_stop(&h);
    harness_deinit(&h);
}

int main(int argc, char **argv)
{
    if (argc > 2) {
        fprintf(stderr, "usage: %s [N]\n", argv[0]);
        return 2;
    }
    tiers(argc == 2 ? (uint32_t)strtoul(argv[1], NULL, 10) : 10000000);
    idle();
    return 0;
}
