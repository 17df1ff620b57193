/* How long a match takes.
 *
 *   bench_match                    everything: look-ups in indexes of 10^4 to 10^7 blocks, then libkvd against a live daemon
 *   bench_match lookup [N]         look-ups only, indexes up to N blocks
 *   bench_match live               libkvd against a live daemon only
 *   bench_match loop SOCKET MSEC   nothing but matches and releases for so long: for strace -c -f
 *
 * The limit of a look-up is what the same machine takes, in the same run and the same memory, to read random cache lines: two
 * independent ones a block in a chain (bucket and entry), three dependent ones for a block alone. */
#include <errno.h>
#include <unistd.h>

#include "bench/bench.h"
#include "client/libkvd/kvd.h"
#include "proto/key.h"
#include "store/index.h"
#include "tests/harness.h"

enum { CHAIN = 64, REPEATS = 9, BLOCK_TOKENS = 64, LONG_TOKENS = 142000 };

static void check(int r, const char *what)
{
    if (r) {
        fprintf(stderr, "bench_match: %s: %d\n", what, r);
        exit(1);
    }
}

/* ---- look-ups ---- */

struct bed {
    struct index index;
    uint8_t (*keys)[SHM_KEY_BYTES]; /* by number; their entries are shuffled, so that nothing is found by its neighbour */
    uint32_t n;
};

static void key_of(uint64_t number, uint8_t ret[SHM_KEY_BYTES])
{
    uint64_t state = number * 4 + 1, words[4];

    for (int i = 0; i < 4; i++)
        words[i] = bench_random(&state);
    memcpy(ret, words, sizeof(words));
}

static void bed_init(struct bed *b, uint32_t n)
{
    uint32_t *entry = bench_alloc(n * sizeof(*entry));
    uint64_t state = 5;

    b->n = n;
    b->keys = bench_alloc((size_t)n * SHM_KEY_BYTES);
    check(index_init(&b->index, "bench", n), "index_init");
    for (uint32_t i = 0; i < n; i++)
        entry[i] = i;
    for (uint32_t i = n - 1; i > 0; i--) {
        uint32_t j = (uint32_t)(bench_random(&state) % (i + 1)), t = entry[i];

        entry[i] = entry[j];
        entry[j] = t;
    }
    for (uint32_t i = 0; i < n; i++) {
        key_of(i, b->keys[i]);
        index_fill(&b->index, entry[i], b->keys[i], 1, 0, 0, 4096, 0, shm_loc(0, 0));
        check(index_publish(&b->index, entry[i]), "index_publish");
    }
    free(entry);
}

static void bed_deinit(struct bed *b)
{
    index_deinit(&b->index);
    free(b->keys);
}

/* ns a block: chains of CHAIN keys that lie anywhere in the index. */
static double chains(const struct bed *b, size_t n_chains, uint64_t seed)
{
    uint8_t (*keys)[SHM_KEY_BYTES] = bench_alloc(n_chains * CHAIN * SHM_KEY_BYTES);
    struct lookup_hit hits[CHAIN];
    uint64_t begun, found = 0;

    for (size_t i = 0; i < n_chains * CHAIN; i++)
        memcpy(keys[i], b->keys[bench_random(&seed) % b->n], SHM_KEY_BYTES);
    begun = bench_nsec();
    for (size_t i = 0; i < n_chains; i++)
        found += lookup_find_many(&b->index.view, keys[i * CHAIN], CHAIN, 1, 0, true, hits);
    begun = bench_nsec() - begun;
    check(found != n_chains * CHAIN, "a block was not found");
    free(keys);
    return (double)begun / (double)(n_chains * CHAIN);
}

/* ns of a look-up whose key is known only when the one before has been found. absent: of keys that are not there. */
static double singles(const struct bed *b, size_t n, uint64_t seed, int absent)
{
    uint8_t (*keys)[SHM_KEY_BYTES] = bench_alloc((n + 1) * SHM_KEY_BYTES);
    struct lookup_hit hit;
    uint64_t begun, found = 0, never = 0;

    for (size_t i = 0; i <= n; i++)
        if (absent)
            key_of(b->n + bench_random(&seed) % UINT32_MAX, keys[i]);
        else
            memcpy(keys[i], b->keys[bench_random(&seed) % b->n], SHM_KEY_BYTES);
    __asm__ volatile("" : "+r"(never));
    hit.gen = 0;
    begun = bench_nsec();
    for (size_t i = 0; i < n; i++)
        found += lookup_find(&b->index.view, keys[i + (hit.gen & never)], 1, 0, &hit);
    begun = bench_nsec() - begun;
    check(found != (absent ? 0 : n), "look-ups found the wrong number of blocks");
    free(keys);
    return (double)begun / (double)n;
}

struct figures {
    double chain, single, absent, line, line_dependent;
};

/* The three kinds of reads take turns, so that a neighbour's noise falls on all. */
static struct figures measure(const struct bed *b)
{
    double chain[REPEATS], single[REPEATS], absent[REPEATS], line[REPEATS], dependent[REPEATS];
    const void *map = b->index.memory.map;
    size_t bytes = b->index.memory.bytes, n = 100000;

    for (size_t i = 0; i < REPEATS; i++) {
        line[i] = bench_random_lines(map, bytes, n, 0, i + 1);
        chain[i] = chains(b, n / CHAIN, i + 1);
        dependent[i] = bench_random_lines(map, bytes, n, 1, i + 1);
        single[i] = singles(b, n, i + 1, 0);
        absent[i] = singles(b, n, i + 1, 1);
    }
    return (struct figures){bench_median(chain, REPEATS), bench_median(single, REPEATS), bench_median(absent, REPEATS),
                            bench_median(line, REPEATS), bench_median(dependent, REPEATS)};
}

static void lookups(uint32_t n_max)
{
    struct figures first = {0};

    for (uint32_t n = 10000; n <= n_max; n *= 10) {
        struct bed b;
        struct figures f;
        char name[64];

        bed_init(&b, n);
        f = measure(&b);
        if (n == 10000)
            first = f;
        snprintf(name, sizeof(name), "chain of %d, index of %u", CHAIN, n);
        bench_line("match", name, f.chain, "ns/block", 2 * f.line, "2 independent random lines of the index; at most 150 ns");
        snprintf(name, sizeof(name), "single, index of %u", n);
        bench_line("match", name, f.single, "ns", 3 * f.line_dependent,
                   "3 dependent random lines; at most 1 from an index of 10^6 on (smaller ones lie in a cache)");
        snprintf(name, sizeof(name), "single absent, index of %u", n);
        bench_line("match", name, f.absent, "ns", 3 * f.line_dependent,
                   "3 dependent random lines (misses of different keys overlap by speculation)");
        if (n > 10000) {
            snprintf(name, sizeof(name), "growth of chain, 10000 to %u", n);
            bench_line("match", name, f.chain / first.chain, "x", f.line_dependent / first.line_dependent,
                       "growth of the machine's random-line latency; ratio at most 2");
            snprintf(name, sizeof(name), "growth of single, 10000 to %u", n);
            bench_line("match", name, f.single / first.single, "x", f.line_dependent / first.line_dependent,
                       "growth of the machine's random-line latency; ratio at most 2");
        }
        bed_deinit(&b);
    }
}

/* ---- libkvd against a live daemon ---- */

static const struct kvd_layer layer = {1, 16, 16, 0, "raw", "raw", "raw", "raw"};
static const struct kvd_group group = {0};

static kvd_space *open_space(kvd *k, uint32_t digest_bytes)
{
    struct kvd_space_desc desc = KVD_SPACE_INIT;
    kvd_space *space;

    desc.model = digest_bytes ? "bench-digests" : "bench-tokens";
    desc.block_tokens = digest_bytes ? 1 : BLOCK_TOKENS;
    desc.digest_bytes = digest_bytes;
    desc.groups = &group;
    desc.n_groups = 1;
    desc.layers = &layer;
    desc.n_layers = 1;
    check(kvd_space_open(k, &desc, &space), "kvd_space_open");
    return space;
}

static void digests_of(uint64_t chain, uint8_t ret[CHAIN * SHM_KEY_BYTES])
{
    for (int i = 0; i < CHAIN; i++)
        key_of(chain * CHAIN + (uint64_t)i, ret + i * SHM_KEY_BYTES);
}

/* Publishes what the prefix has not found. */
static void publish_rest(kvd_prefix *p, const uint32_t *tokens, size_t n_tokens, size_t n_blocks, size_t block_tokens)
{
    size_t have = kvd_prefix_blocks(p);
    uint16_t *zeros = calloc(n_blocks * block_tokens, 16 * 2);
    struct kvd_kv kv = {zeros, zeros, 32, 32, 32, 32};

    for (; have < n_blocks; have += 256)
        check(kvd_publish(p, tokens, n_tokens, have, n_blocks - have < 256 ? n_blocks - have : 256, 0, KVD_F16, &kv, NULL),
              "kvd_publish");
    free(zeros);
}

static void live_chains(kvd *k, size_t n_chains)
{
    kvd_space *space = open_space(k, SHM_KEY_BYTES);
    kvd_prefix *p;
    uint8_t digests[CHAIN * SHM_KEY_BYTES], *all;
    double match[REPEATS], memory[REPEATS];
    size_t n, m = 2000, bytes = n_chains * CHAIN * 96;
    void *map = bench_alloc(bytes);
    uint64_t seed = 1;

    check(kvd_prefix_create(space, CHAIN, &p), "kvd_prefix_create");
    for (size_t i = 0; i < n_chains; i++) {
        digests_of(i, digests);
        check(kvd_match_digests(p, digests, CHAIN, &n), "kvd_match_digests");
        publish_rest(p, NULL, 0, CHAIN, 1);
    }
    memset(map, 1, bytes);
    all = bench_alloc(m * sizeof(digests));
    for (size_t r = 0; r < REPEATS; r++) {
        uint64_t begun;

        memory[r] = bench_random_lines(map, bytes, 100000, 0, r + 1);
        for (size_t i = 0; i < m; i++)
            digests_of(bench_random(&seed) % n_chains, all + i * sizeof(digests));
        begun = bench_nsec();
        for (size_t i = 0; i < m; i++) {
            check(kvd_match_digests(p, all + i * sizeof(digests), CHAIN, &n), "kvd_match_digests");
            check(n != CHAIN, "a chain was not found");
            kvd_release(p);
        }
        match[r] = (double)(bench_nsec() - begun) / (double)(m * CHAIN);
    }
    bench_line("match", "match, lease and release a chain of 64 digests, index of 1000000", bench_median(match, REPEATS),
               "ns/block", 2 * bench_median(memory, REPEATS), "2 independent random lines; at most 150 ns");
    free(all);
    free(map);
    kvd_prefix_destroy(p);
    kvd_space_close(space);
}

/* A long prompt: keys by SHA-256, look-ups, leases. */
static void live_long(kvd *k)
{
    kvd_space *space = open_space(k, 0);
    size_t n_blocks = LONG_TOKENS / BLOCK_TOKENS, got;
    uint32_t *tokens = bench_alloc(LONG_TOKENS * sizeof(*tokens));
    double match[REPEATS], hash[REPEATS];
    struct key_hasher *hasher;
    uint8_t key[KEY_BYTES];
    uint64_t seed = 3;
    kvd_prefix *p;

    for (size_t i = 0; i < LONG_TOKENS; i++)
        tokens[i] = (uint32_t)(bench_random(&seed) % 100000);
    check(key_hasher_create(&hasher), "key_hasher_create");
    check(kvd_prefix_create(space, n_blocks, &p), "kvd_prefix_create");
    check(kvd_match(p, tokens, LONG_TOKENS, NULL, 0, &got), "kvd_match");
    publish_rest(p, tokens, LONG_TOKENS, n_blocks, BLOCK_TOKENS);
    for (size_t r = 0; r < REPEATS; r++) {
        kvd_prefix *fresh;
        uint64_t begun = bench_nsec();

        memcpy(key, kvd_space_fingerprint(space), sizeof(key));
        for (size_t i = 0; i < n_blocks; i++)
            check(key_block(hasher, key, tokens + i * BLOCK_TOKENS, BLOCK_TOKENS, NULL, 0, key), "key_block");
        hash[r] = (double)(bench_nsec() - begun) / 1e6;
        check(kvd_prefix_create(space, n_blocks, &fresh), "kvd_prefix_create");
        tokens[0] ^= 1; /* an object that knows nothing of the sequence, its memory touched */
        check(kvd_match(fresh, tokens, LONG_TOKENS, NULL, 0, &got), "kvd_match");
        tokens[0] ^= 1;
        begun = bench_nsec();
        check(kvd_match(fresh, tokens, LONG_TOKENS, NULL, 0, &got), "kvd_match");
        match[r] = (double)(bench_nsec() - begun) / 1e6;
        check(got != n_blocks * BLOCK_TOKENS, "the long prompt was not found whole");
        kvd_prefix_destroy(fresh);
    }
    bench_line("match", "142000 tokens in blocks of 64, hashed, matched and leased", bench_median(match, REPEATS), "ms",
               bench_median(hash, REPEATS), "SHA-256 of the same blocks alone; at most 2 ms");
    key_hasher_destroy(hasher);
    kvd_prefix_destroy(p);
    kvd_space_close(space);
    free(tokens);
}

static kvd *attach(const char *path)
{
    struct kvd_options options = KVD_OPTIONS_INIT;
    kvd *k;

    options.socket_path = path;
    options.name = "bench_match";
    check(kvd_attach(&options, &k), "kvd_attach");
    return k;
}

static void live(void)
{
    struct harness h;
    kvd *k;

    harness_init(&h);
    harness_option(&h, "host_bytes = 1G");
    harness_option(&h, "slab_bytes = 64M");
    harness_option(&h, "index_entries = 1100000");
    harness_start(&h);
    k = attach(h.socket);
    live_long(k);
    live_chains(k, 1000000 / CHAIN);
    kvd_detach(k);
    harness_stop(&h);
    harness_deinit(&h);
}

/* One chain is published, then matched and released until the time is over; the clock is read by the vDSO. */
static void loop(const char *path, uint64_t msec)
{
    kvd *k = attach(path);
    kvd_space *space = open_space(k, SHM_KEY_BYTES);
    uint8_t digests[CHAIN * SHM_KEY_BYTES];
    uint64_t begun, n_matches = 0;
    kvd_prefix *p;
    size_t n;

    check(kvd_prefix_create(space, CHAIN, &p), "kvd_prefix_create");
    digests_of(0, digests);
    check(kvd_match_digests(p, digests, CHAIN, &n), "kvd_match_digests");
    publish_rest(p, NULL, 0, CHAIN, 1);
    begun = bench_nsec();
    while (bench_nsec() - begun < msec * 1000000) {
        check(kvd_match_digests(p, digests, CHAIN, &n), "kvd_match_digests");
        check(n != CHAIN, "the chain was not found");
        kvd_release(p);
        n_matches++;
    }
    printf("{\"bench\":\"match\",\"case\":\"loop\",\"matches\":%llu,\"blocks\":%llu}\n", (unsigned long long)n_matches,
           (unsigned long long)n_matches * CHAIN);
    kvd_prefix_destroy(p);
    kvd_space_close(space);
    kvd_detach(k);
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "loop") == 0) {
        loop(argv[2], strtoull(argv[3], NULL, 10));
    } else if (argc >= 2 && strcmp(argv[1], "lookup") == 0) {
        lookups(argc == 3 ? (uint32_t)strtoul(argv[2], NULL, 10) : 10000000);
    } else if (argc == 2 && strcmp(argv[1], "live") == 0) {
        live();
    } else if (argc == 1) {
        lookups(10000000);
        live();
    } else {
        fprintf(stderr, "usage: %s [lookup [N] | live | loop SOCKET MSEC]\n", argv[0]);
        return 2;
    }
    return 0;
}
