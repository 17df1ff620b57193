/* libkvd against a daemon made by hand (fake_daemon.h): match, lease, load, publish, and everything that a daemon
 * may do wrong. */
#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "client/libkvd/kvd.h"
#include "tests/fake_daemon.h"

enum { B = 4, HEADS = 2, DIM = 64, VOCAB = 100000, MAX_BLOCKS = 200 };

static char dir[] = "/tmp/kvd-check-XXXXXX";
static char path[64];

static uint64_t rng_state;
static uint32_t rng(uint32_t below)
{
    uint64_t z = (rng_state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)((z ^ z >> 31) % below);
}

static void seed(const char *test)
{
    const char *text = getenv("KVD_SEED");
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    rng_state = text ? strtoull(text, NULL, 0) : (uint64_t)t.tv_nsec;
    printf("%s: KVD_SEED=%llu\n", test, (unsigned long long)rng_state);
}

static void folder_setup(void)
{
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/kvd.sock", dir);
}

static void folder_teardown(void)
{
    unlink(path);
    rmdir(dir);
}

static struct fake *start(void)
{
    struct fake_options o = {.socket_path = path};

    return fake_start(&o);
}

static kvd *attach(void)
{
    struct kvd_options o = KVD_OPTIONS_INIT;
    kvd *k = NULL;

    o.socket_path = path;
    o.name = "check";
    o.reattach_msec = 1;
    o.timeout_msec = 5000;
    ck_assert_msg(kvd_attach(&o, &k) == KVD_OK, "%s", kvd_message(NULL));
    return k;
}

/* Two layers in one full group; with windows > 0 one more layer in a sliding group for each. */
static kvd_space *open_space(kvd *k, const uint32_t *windows, uint32_t n_windows, uint32_t digest_bytes,
                             const char *codec)
{
    struct kvd_space_desc d = KVD_SPACE_INIT;
    struct kvd_layer layers[8] = {{0}};
    struct kvd_group groups[8] = {{0}};
    kvd_space *space = NULL;

    for (uint32_t l = 0; l < 2 + n_windows; l++)
        layers[l] = (struct kvd_layer){HEADS, DIM, DIM, l < 2 ? 0 : l - 1, codec, codec, "", ""};
    for (uint32_t g = 0; g < n_windows; g++)
        groups[1 + g].window_tokens = windows[g];
    d.model = "m";
    d.block_tokens = B;
    d.vocab_tokens = VOCAB;
    d.digest_bytes = digest_bytes;
    d.groups = groups;
    d.n_groups = 1 + n_windows;
    d.layers = layers;
    d.n_layers = 2 + n_windows;
    ck_assert_msg(kvd_space_open(k, &d, &space) == KVD_OK, "%s", kvd_message(k));
    ck_assert_str_eq(kvd_message(k), "");
    return space;
}

struct bed {
    struct fake *fake;
    kvd *k;
    kvd_space *space;
    kvd_prefix *prefix;
    uint32_t tokens[MAX_BLOCKS * B];
};

static void bed_setup_as(struct bed *b, const uint32_t *windows, uint32_t n_windows, uint32_t digest_bytes)
{
    b->fake = start();
    b->k = attach();
    b->space = open_space(b->k, windows, n_windows, digest_bytes, "raw");
    ck_assert_int_eq(kvd_prefix_create(b->space, MAX_BLOCKS, &b->prefix), KVD_OK);
    for (uint32_t i = 0; i < MAX_BLOCKS * B; i++)
        b->tokens[i] = i * 7 % VOCAB;
}

static void bed_setup(struct bed *b)
{
    bed_setup_as(b, NULL, 0, 0);
}

static void bed_teardown(struct bed *b)
{
    b->k = kvd_detach(b->k);
    if (b->fake)
        b->fake = fake_stop(b->fake, true);
}

static size_t match(struct bed *b, size_t n_tokens)
{
    size_t n = 12345;

    ck_assert_msg(kvd_match(b->prefix, b->tokens, n_tokens, NULL, 0, &n) == KVD_OK, "%s", kvd_message(b->k));
    return n;
}

/* A payload whose every byte follows from a number. */
static uint32_t add_block(struct bed *b, size_t block, uint32_t group, uint8_t fill)
{
    size_t n = kvd_space_block_bytes(b->space, group, block == 0);
    uint8_t *payload = malloc(n);
    uint32_t e;

    memset(payload, fill, n);
    e = fake_add(b->fake, kvd_prefix_key(b->prefix, block), (uint8_t)group, block == 0 ? SHM_ENTRY_FIRST : 0, payload,
                 (uint32_t)n, 0);
    free(payload);
    return e;
}

/* ---- attach ---- */

START_TEST(attach_info_ping)
{
    struct kvd_info info = {.size = sizeof(info)};
    struct bed b;

    bed_setup(&b);
    ck_assert_int_eq(kvd_ping(b.k), KVD_OK);
    ck_assert_int_eq(kvd_get_info(b.k, &info), KVD_OK);
    ck_assert_str_eq(info.tenant, "fake");
    ck_assert(info.alive && info.admin);
    ck_assert_uint_eq(info.n_reattached, 0);
    bed_teardown(&b);
}
END_TEST

START_TEST(attach_nobody_there)
{
    struct kvd_options o = KVD_OPTIONS_INIT;
    char longer[300];
    kvd *k = NULL;

    o.socket_path = path;
    ck_assert_int_eq(kvd_attach(&o, &k), KVD_E_CONNECT);
    ck_assert_ptr_nonnull(strstr(kvd_message(NULL), path));
    memset(longer, 'x', sizeof(longer));
    longer[299] = 0;
    o.socket_path = longer;
    ck_assert_int_eq(kvd_attach(&o, &k), KVD_E_ARG);
    o.size = 3;
    ck_assert_int_eq(kvd_attach(&o, &k), KVD_E_ARG);
    ck_assert_int_eq(kvd_attach(&o, NULL), KVD_E_ARG);
    ck_assert_ptr_null(k);
    ck_assert_ptr_null(kvd_detach(NULL));
}
END_TEST

/* Every lie about hello: an error, nothing mapped, nothing leaked (the sanitizers see to that). */
START_TEST(attach_lies)
{
    static const struct {
        enum fake_lie lie;
        int error;
    } lies[] = {
        {FAKE_SILENT, KVD_E_TIMEOUT},        {FAKE_HANGUP, KVD_E_GONE},          {FAKE_GARBAGE, KVD_E_PROTOCOL},
        {FAKE_SHORT_FRAME, KVD_E_PROTOCOL},  {FAKE_WRONG_TYPE, KVD_E_PROTOCOL},  {FAKE_WRONG_ID, KVD_E_TIMEOUT},
        {FAKE_BROKEN_BODY, KVD_E_PROTOCOL},  {FAKE_EXTRA_FD, KVD_E_PROTOCOL},    {FAKE_NO_FDS, KVD_E_PROTOCOL},
        {FAKE_ERROR, KVD_E_DRAINING},        {FAKE_ERROR_EMPTY, KVD_E_PROTOCOL}, {FAKE_UNSEALED, KVD_E_PROTOCOL},
        {FAKE_SHORT_MEMORY, KVD_E_PROTOCOL}, {FAKE_BAD_INDEX, KVD_E_PROTOCOL},   {FAKE_BAD_PAGE, KVD_E_PROTOCOL},
        {FAKE_OLD_VERSION, KVD_E_PROTOCOL},
    };
    struct kvd_options o = KVD_OPTIONS_INIT;
    struct fake *fake = start();
    kvd *k = NULL;
    int r;

    o.socket_path = path;
    o.timeout_msec = 50;
    fake_lie(fake, FRAME_HELLO, lies[_i].lie);
    r = kvd_attach(&o, &k);
    ck_assert_msg(r == lies[_i].error, "lie %d: %d (%s)", lies[_i].lie, r, kvd_message(NULL));
    ck_assert_ptr_null(k);
    ck_assert_str_ne(kvd_message(NULL), "");
    if (lies[_i].lie == FAKE_ERROR)
        ck_assert_str_eq(kvd_message(NULL), "not now; allowed: later");
    fake_stop(fake, true);
}
END_TEST

/* Lies about other requests: an error for that call; the session recovers when the truth is told again. */
START_TEST(request_lies)
{
    struct bed b;
    int r;

    if (_i == FAKE_HONEST)
        return;
    bed_setup(&b);
    fake_lie(b.fake, FRAME_PING, (enum fake_lie)_i);
    if (_i == FAKE_SILENT || _i == FAKE_WRONG_ID) { /* would wait for the whole timeout */
        kvd_detach(b.k);
        struct kvd_options o = KVD_OPTIONS_INIT;

        o.socket_path = path;
        o.timeout_msec = 50;
        ck_assert_int_eq(kvd_attach(&o, &b.k), KVD_OK);
        ck_assert_int_eq(kvd_ping(b.k), KVD_E_TIMEOUT);
    } else if (_i == FAKE_BROKEN_BODY || _i == FAKE_EXTRA_FD || _i >= FAKE_UNSEALED || _i == FAKE_NO_FDS) {
        ck_assert_int_eq(kvd_ping(b.k), KVD_OK); /* no lie for an answer without a body */
    } else {
        r = kvd_ping(b.k);
        ck_assert_msg(r != KVD_OK, "lie %d", _i);
    }
    fake_lie(b.fake, FRAME_PING, FAKE_HONEST);
    for (int i = 0; (r = kvd_ping(b.k)) != KVD_OK && i < 1000; i++)
        usleep(1000);
    ck_assert_int_eq(r, KVD_OK);
    bed_teardown(&b);
}
END_TEST

START_TEST(space_refusals)
{
    struct kvd_space_desc d = KVD_SPACE_INIT;
    struct kvd_layer layer = {HEADS, DIM, DIM, 0, NULL, NULL, NULL, NULL};
    struct kvd_group group = {0};
    kvd_space *space = NULL;
    struct bed b;

    bed_setup(&b);
    d.groups = &group;
    d.n_groups = 1;
    d.layers = &layer;
    d.n_layers = 1;
    ck_assert_int_eq(kvd_space_open(b.k, &d, &space), KVD_E_LAYOUT); /* no model */
    d.model = "m";
    d.block_tokens = 0;
    ck_assert_int_eq(kvd_space_open(b.k, &d, &space), KVD_E_LAYOUT);
    d.block_tokens = 64;
    layer.group = 1;
    ck_assert_int_eq(kvd_space_open(b.k, &d, &space), KVD_E_LAYOUT);
    layer.group = 0;
    layer.codec_k = "zip";
    ck_assert_int_eq(kvd_space_open(b.k, &d, &space), KVD_E_LAYOUT);
    ck_assert_ptr_nonnull(strstr(kvd_message(b.k), "zip"));
    layer.codec_k = NULL;
    d.digest_bytes = 7;
    ck_assert_int_eq(kvd_space_open(b.k, &d, &space), KVD_E_LAYOUT);
    d.digest_bytes = 0;
    d.size = 8;
    ck_assert_int_eq(kvd_space_open(b.k, &d, &space), KVD_E_ARG);
    d.size = sizeof(d);
    fake_lie(b.fake, FRAME_SPACE_OPEN, FAKE_BROKEN_BODY);
    ck_assert_int_eq(kvd_space_open(b.k, &d, &space), KVD_E_PROTOCOL);
    fake_lie(b.fake, FRAME_SPACE_OPEN, FAKE_HONEST);
    ck_assert_int_eq(kvd_space_open(b.k, &d, &space), KVD_OK);
    ck_assert_ptr_null(kvd_space_close(space));
    bed_teardown(&b);
}
END_TEST

/* ---- match ---- */

START_TEST(match_longest_whole_blocks)
{
    struct kvd_block block;
    struct bed b;

    bed_setup(&b);
    ck_assert_uint_eq(match(&b, 10 * B), 0);
    ck_assert_ptr_null(kvd_prefix_key(b.prefix, 10));
    for (size_t i = 0; i < 6; i++)
        add_block(&b, i, 0, (uint8_t)i);
    ck_assert_uint_eq(match(&b, 10 * B), 6 * B);
    ck_assert_uint_eq(kvd_prefix_blocks(b.prefix), 6);
    ck_assert_uint_eq(fake_leases(b.fake), 6);
    ck_assert_uint_eq(match(&b, 6 * B), 6 * B);
    ck_assert_uint_eq(match(&b, 6 * B + 3), 6 * B);
    ck_assert_uint_eq(match(&b, 3 * B + 2), 3 * B);
    ck_assert_uint_eq(fake_leases(b.fake), 3);
    ck_assert_uint_eq(match(&b, B - 1), 0);
    ck_assert_uint_eq(match(&b, 0), 0);
    ck_assert_uint_eq(fake_leases(b.fake), 0);
    b.tokens[2 * B]++; /* another third block */
    ck_assert_uint_eq(match(&b, 6 * B), 2 * B);
    ck_assert_int_eq(kvd_prefix_block(b.prefix, 1, 0, &block), KVD_OK);
    ck_assert_uint_eq(block.bytes, kvd_space_block_bytes(b.space, 0, 0));
    ck_assert_uint_eq(((const uint8_t *)block.payload)[block.bytes - 1], 1);
    ck_assert(!block.first);
    ck_assert_int_eq(kvd_prefix_block(b.prefix, 2, 0, &block), KVD_E_NOT_FOUND);
    ck_assert_int_eq(kvd_prefix_block(b.prefix, 0, 1, &block), KVD_E_ARG);
    ck_assert_uint_gt(fake_logged(b.fake), 0);
    kvd_release(b.prefix);
    kvd_release(b.prefix);
    ck_assert_uint_eq(fake_leases(b.fake), 0);
    bed_teardown(&b);
}
END_TEST

START_TEST(match_arguments)
{
    struct kvd_extra extra[2] = {{1, "abc", 3}, {1, "d", 1}};
    uint8_t key[32];
    size_t n = 77;
    struct bed b;

    bed_setup(&b);
    ck_assert_int_eq(kvd_match(NULL, b.tokens, B, NULL, 0, &n), KVD_E_ARG);
    ck_assert_int_eq(kvd_match(b.prefix, NULL, B, NULL, 0, &n), KVD_E_ARG);
    ck_assert_int_eq(kvd_match(b.prefix, b.tokens, (MAX_BLOCKS + 1) * B, NULL, 0, &n), KVD_E_LIMIT);
    ck_assert_int_eq(kvd_match_digests(b.prefix, (const uint8_t *)"x", 1, &n), KVD_E_ARG);
    ck_assert_int_eq(kvd_match(b.prefix, b.tokens, 2 * B, extra, 2, &n), KVD_E_ARG); /* the same block twice */
    b.tokens[3] = VOCAB;
    ck_assert_int_eq(kvd_match(b.prefix, b.tokens, B, NULL, 0, &n), KVD_E_TOKEN);
    b.tokens[3] = 3;
    ck_assert_uint_eq(n, 77); /* untouched by failures */
    ck_assert_int_eq(kvd_match(b.prefix, b.tokens, 3 * B, extra, 1, &n), KVD_OK);
    memcpy(key, kvd_prefix_key(b.prefix, 0), 32);
    ck_assert_int_eq(kvd_match(b.prefix, b.tokens, 3 * B, NULL, 0, NULL), KVD_OK);
    ck_assert_mem_eq(key, kvd_prefix_key(b.prefix, 0), 32);
    memcpy(key, kvd_prefix_key(b.prefix, 1), 32);
    ck_assert_int_eq(kvd_match(b.prefix, b.tokens, 3 * B, extra, 1, &n), KVD_OK);
    ck_assert_mem_ne(key, kvd_prefix_key(b.prefix, 1), 32);
    bed_teardown(&b);
}
END_TEST

START_TEST(match_digests_pad)
{
    uint8_t digests[3][12], key[32] = {0};
    uint8_t *payload;
    size_t n = 0, bytes;
    struct bed b;

    bed_setup_as(&b, NULL, 0, 12);
    for (int i = 0; i < 3; i++)
        memset(digests[i], 0x40 + i, 12);
    bytes = kvd_space_block_bytes(b.space, 0, 0);
    payload = calloc(1, bytes);
    for (int i = 0; i < 2; i++) {
        memcpy(key, digests[i], 12);
        fake_add(b.fake, key, 0, 0, payload, (uint32_t)bytes, 0);
    }
    free(payload);
    ck_assert_int_eq(kvd_match_digests(b.prefix, digests[0], 3, &n), KVD_OK);
    ck_assert_uint_eq(n, 2);
    ck_assert_mem_eq(kvd_prefix_key(b.prefix, 1), key, 32);
    ck_assert_int_eq(kvd_match(b.prefix, b.tokens, B, NULL, 0, NULL), KVD_E_ARG);
    bed_teardown(&b);
}
END_TEST

/* The longest n by the rule itself, slowly. */
static size_t by_the_rule(bool has[4][MAX_BLOCKS], const uint32_t *windows, uint32_t n_windows, size_t n_blocks)
{
    for (size_t n = n_blocks; n > 0; n--) {
        bool good = true;

        for (size_t i = 0; i < n; i++)
            good &= has[0][i];
        for (uint32_t g = 0; g < n_windows; g++) {
            size_t w = (windows[g] + B - 1) / B;

            for (size_t i = n > w ? n - w : 0; i < n; i++)
                good &= has[1 + g][i];
        }
        if (good)
            return n;
    }
    return 0;
}

static uint64_t leases_by_the_rule(const uint32_t *windows, uint32_t n_windows, size_t n)
{
    uint64_t sum = n;

    for (uint32_t g = 0; g < n_windows; g++) {
        size_t w = (windows[g] + B - 1) / B;

        sum += n > w ? w : n;
    }
    return sum;
}

START_TEST(match_layer_groups_as_the_rule_says)
{
    uint32_t windows[2] = {1 + rng(5 * B), 1 + rng(60 * B)}, n_windows = 1 + (uint32_t)_i % 2;
    bool has[4][MAX_BLOCKS];
    uint32_t entry[4][MAX_BLOCKS];
    struct bed b;

    seed("match_layer_groups");
    windows[0] = 1 + rng(5 * B);
    windows[1] = 1 + rng(60 * B);
    bed_setup_as(&b, windows, n_windows, 0);
    match(&b, MAX_BLOCKS * B);
    for (uint32_t g = 0; g <= n_windows; g++)
        for (size_t i = 0; i < 100; i++) {
            has[g][i] = g == 0 ? i < 90 : rng(10) > 0;
            if (has[g][i])
                entry[g][i] = add_block(&b, i, g, (uint8_t)i);
        }
    for (int round = 0; round < 60; round++) {
        size_t n = 1 + rng(100), want = by_the_rule(has, windows, n_windows, n), got = match(&b, n * B) / B;

        ck_assert_msg(got == want, "%zu blocks, windows %u %u: %zu, not %zu", n, windows[0], windows[1], got, want);
        ck_assert_uint_eq(fake_leases(b.fake), leases_by_the_rule(windows, n_windows, want));
        if (want > 1) {
            size_t to = rng((uint32_t)want);

            want = by_the_rule(has, windows, n_windows, to);
            ck_assert_uint_eq(kvd_prefix_trim(b.prefix, to), want);
            ck_assert_uint_eq(kvd_prefix_blocks(b.prefix), want);
            ck_assert_uint_eq(fake_leases(b.fake), leases_by_the_rule(windows, n_windows, want));
        }
        kvd_release(b.prefix);
        for (int k = 0; k < 3; k++) { /* some go */
            uint32_t g = rng(n_windows + 1);
            size_t i = rng(90);

            if (has[g][i] && (g > 0 || i > 60)) {
                ck_assert(fake_retire(b.fake, entry[g][i]));
                has[g][i] = false;
            }
        }
    }
    bed_teardown(&b);
}
END_TEST

START_TEST(match_with_few_leases)
{
    struct fake_options o = {.socket_path = path, .n_leases = 20};
    uint32_t window = 3 * B;
    kvd_prefix *other;
    size_t n;
    struct bed b;

    b.fake = fake_start(&o);
    b.k = attach();
    b.space = open_space(b.k, &window, 1, 0, "raw");
    ck_assert_int_eq(kvd_prefix_create(b.space, MAX_BLOCKS, &b.prefix), KVD_OK);
    ck_assert_int_eq(kvd_prefix_create(b.space, MAX_BLOCKS, &other), KVD_OK);
    for (uint32_t i = 0; i < MAX_BLOCKS * B; i++)
        b.tokens[i] = i;
    match(&b, 40 * B);
    for (size_t i = 0; i < 40; i++)
        for (uint32_t g = 0; g < 2; g++)
            add_block(&b, i, g, 1);
    ck_assert_uint_eq(match(&b, 40 * B), 17 * B); /* 17 + 3 words */
    ck_assert_int_eq(kvd_match(other, b.tokens, 40 * B, NULL, 0, &n), KVD_OK);
    ck_assert_uint_eq(n, 0);
    ck_assert_uint_eq(kvd_prefix_trim(b.prefix, 5), 5); /* 5 + 3 */
    ck_assert_int_eq(kvd_match(other, b.tokens, 40 * B, NULL, 0, &n), KVD_OK);
    ck_assert_uint_gt(n, 0);
    ck_assert_uint_le(fake_leases(b.fake), 20);
    kvd_prefix_destroy(other);
    kvd_release(b.prefix);
    ck_assert_uint_eq(fake_leases(b.fake), 0);
    ck_assert_uint_eq(match(&b, 40 * B), 17 * B); /* no word was lost */
    bed_teardown(&b);
}
END_TEST

START_TEST(lease_keeps_a_block)
{
    uint32_t entry[3];
    struct bed b;

    bed_setup(&b);
    match(&b, 3 * B);
    for (size_t i = 0; i < 3; i++)
        entry[i] = add_block(&b, i, 0, 9);
    ck_assert_uint_eq(match(&b, 3 * B), 3 * B);
    for (int i = 0; i < 3; i++)
        ck_assert(!fake_retire(b.fake, entry[i]));
    ck_assert_uint_eq(kvd_prefix_trim(b.prefix, 1), 1);
    ck_assert(!fake_retire(b.fake, entry[0]));
    ck_assert(fake_retire(b.fake, entry[1]));
    kvd_release(b.prefix);
    ck_assert(fake_retire(b.fake, entry[0]));
    bed_teardown(&b);
}
END_TEST

/* Matchers against a writer that evicts and puts back other bytes: what is leased never changes and is what its key
 * says. */
enum { RACE_BLOCKS = 24, RACE_MATCHERS = 3, RACE_ROUNDS = 3000 };
struct race {
    struct bed *b;
    uint8_t keys[RACE_BLOCKS][32];
    _Atomic int stop;
    _Atomic uint64_t n_blocks, n_wrong;
};

static void *matcher(void *ctx)
{
    struct race *race = ctx;
    kvd_prefix *p = NULL;

    kvd_prefix_create(race->b->space, MAX_BLOCKS, &p);
    while (!atomic_load(&race->stop)) {
        struct kvd_block block;
        size_t n;

        kvd_match(p, race->b->tokens, RACE_BLOCKS * B, NULL, 0, &n);
        for (size_t i = 0; i < n / B; i++) {
            if (kvd_prefix_block(p, i, 0, &block) != KVD_OK) {
                atomic_fetch_add(&race->n_wrong, 1);
                continue;
            }
            for (size_t at = 0; at < block.bytes; at += 97)
                if (((const uint8_t *)block.payload)[at] != race->keys[i][0])
                    atomic_fetch_add(&race->n_wrong, 1);
            atomic_fetch_add(&race->n_blocks, 1);
        }
        kvd_release(p);
    }
    kvd_prefix_destroy(p);
    return NULL;
}

START_TEST(lease_race_with_eviction)
{
    struct fake_options o = {.socket_path = path, .n_entries = 65536, .slab_bytes = 32 << 20};
    uint32_t entry[RACE_BLOCKS];
    pthread_t t[RACE_MATCHERS];
    static struct race race;
    static struct bed b;
    uint64_t n_retired = 0;

    seed("lease_race");
    b.fake = fake_start(&o);
    b.k = attach();
    b.space = open_space(b.k, NULL, 0, 0, "tq4");
    ck_assert_int_eq(kvd_prefix_create(b.space, MAX_BLOCKS, &b.prefix), KVD_OK);
    for (uint32_t i = 0; i < MAX_BLOCKS * B; i++)
        b.tokens[i] = i;
    race.b = &b;
    match(&b, RACE_BLOCKS * B);
    for (size_t i = 0; i < RACE_BLOCKS; i++) {
        memcpy(race.keys[i], kvd_prefix_key(b.prefix, i), 32);
        entry[i] = add_block(&b, i, 0, race.keys[i][0]);
    }
    for (int i = 0; i < RACE_MATCHERS; i++)
        ck_assert_int_eq(pthread_create(&t[i], NULL, matcher, &race), 0);
    for (int round = 0; round < RACE_ROUNDS || atomic_load(&race.n_blocks) < 1000; round++) {
        size_t i = rng(RACE_BLOCKS);

        if (round % 64 == 63)
            usleep(100); /* with one processor the matchers need a turn */
        if (fake_retire(b.fake, entry[i])) {
            uint64_t loc = atomic_load(&fake_index(b.fake)->entries[entry[i]].host);

            n_retired++;
            /* Nobody holds it: its bytes may become anything. The same entry and slot come back with the right ones. */
            (void)loc;
            index_fill(fake_index(b.fake), entry[i], race.keys[i], FAKE_SPACE, 0, i == 0 ? SHM_ENTRY_FIRST : 0,
                       (uint32_t)kvd_space_block_bytes(b.space, 0, i == 0), 0, loc);
            ck_assert_int_eq(index_publish(fake_index(b.fake), entry[i]), 0);
        }
    }
    atomic_store(&race.stop, 1);
    for (int i = 0; i < RACE_MATCHERS; i++)
        pthread_join(t[i], NULL);
    printf("lease_race: %llu blocks used, %llu retired\n", (unsigned long long)race.n_blocks,
           (unsigned long long)n_retired);
    ck_assert_uint_eq(race.n_wrong, 0);
    ck_assert_uint_gt(n_retired, 0);
    ck_assert_uint_eq(fake_leases(b.fake), 0);
    bed_teardown(&b);
}
END_TEST

START_TEST(match_makes_no_request)
{
    uint64_t before = 0, after = 0;
    struct bed b;

    bed_setup(&b);
    match(&b, 9 * B);
    for (size_t i = 0; i < 9; i++)
        add_block(&b, i, 0, 1);
    for (int type = 0; type < 64; type++)
        before += fake_count(b.fake, (enum frame_type)type);
    for (int i = 0; i < 1000; i++) {
        ck_assert_uint_eq(match(&b, 9 * B), 9 * B);
        kvd_release(b.prefix);
    }
    for (int type = 0; type < 64; type++)
        after += fake_count(b.fake, (enum frame_type)type);
    ck_assert_uint_eq(before, after);
    bed_teardown(&b);
}
END_TEST

START_TEST(slab_number_used_again)
{
    struct kvd_block block;
    uint32_t entry;
    struct bed b;

    bed_setup(&b);
    match(&b, B);
    entry = add_block(&b, 0, 0, 1);
    ck_assert_uint_eq(match(&b, B), B);
    ck_assert_int_eq(kvd_prefix_block(b.prefix, 0, 0, &block), KVD_OK);
    ck_assert_uint_eq(*(const uint8_t *)block.payload, 1);
    kvd_release(b.prefix);
    ck_assert(fake_retire(b.fake, entry));
    fake_replace_slab(b.fake, 0);
    entry = add_block(&b, 0, 0, 2);
    ck_assert_uint_eq(match(&b, B), B);
    ck_assert_int_eq(kvd_prefix_block(b.prefix, 0, 0, &block), KVD_OK);
    ck_assert_uint_eq(*(const uint8_t *)block.payload, 2);
    ck_assert_uint_eq(fake_count(b.fake, FRAME_SLAB_GET), 2);
    bed_teardown(&b);
}
END_TEST

START_TEST(slab_lies)
{
    static const enum fake_lie lies[] = {FAKE_UNSEALED,    FAKE_SHORT_MEMORY, FAKE_NO_FDS,
                                         FAKE_BROKEN_BODY, FAKE_ERROR,        FAKE_EXTRA_FD};
    struct kvd_block block;
    struct bed b;

    bed_setup(&b);
    match(&b, B);
    add_block(&b, 0, 0, 1);
    ck_assert_uint_eq(match(&b, B), B);
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        fake_lie(b.fake, FRAME_SLAB_GET, lies[i]);
        ck_assert_int_ne(kvd_prefix_block(b.prefix, 0, 0, &block), KVD_OK);
    }
    fake_lie(b.fake, FRAME_SLAB_GET, FAKE_HONEST);
    ck_assert_int_eq(kvd_prefix_block(b.prefix, 0, 0, &block), KVD_OK);
    bed_teardown(&b);
}
END_TEST

/* An index that says anything: an error or a miss, never memory outside of a slab. */
START_TEST(index_of_garbage)
{
    struct index *index;
    struct kvd_block block;
    struct bed b;

    seed("index_of_garbage");
    bed_setup(&b);
    match(&b, 8 * B);
    for (size_t i = 0; i < 8; i++)
        add_block(&b, i, 0, 1);
    index = fake_index(b.fake);
    for (int round = 0; round < 3000; round++) {
        uint32_t e = rng(8);

        switch (rng(4)) {
        case 0:
            atomic_store(&index->entries[e].host, (uint64_t)rng(3) << 48 | rng(UINT32_MAX));
            break;
        case 1:
            atomic_store(&index->entries[e].bytes, rng(UINT32_MAX));
            break;
        case 2:
            atomic_store(&index->buckets[rng(index->header->n_buckets)].entry[rng(8)], rng(UINT32_MAX));
            break;
        default:
            atomic_store(&index->entries[e].flags, (uint8_t)rng(256));
        }
        match(&b, 8 * B);
        for (size_t i = 0; i < kvd_prefix_blocks(b.prefix); i++)
            if (kvd_prefix_block(b.prefix, i, 0, &block) == KVD_OK)
                ck_assert_uint_le(((const uint8_t *)block.payload)[block.bytes - 1], 1);
    }
    bed_teardown(&b);
}
END_TEST

/* ---- load and publish ---- */

/* Values that fp16 keeps: small integers over 64. */
static float value_at(size_t token, uint32_t layer, int is_v, uint32_t head, uint32_t channel)
{
    return (float)((int)((token * 31 + layer * 17 + (uint32_t)is_v * 7 + head * 5 + channel * 3) % 255) - 127) / 64.0f;
}

/* K and V with padding between tokens and heads, so that strides matter. */
enum { ROW = DIM + 8, TOKEN_ROW = HEADS * ROW + 24 };
struct cache {
    float *memory[8][2];
    struct kvd_kv kv[8];
};

static void cache_init(struct cache *c, uint32_t n_layers, size_t n_tokens, bool fill)
{
    memset(c, 0, sizeof(*c));
    for (uint32_t l = 0; l < n_layers; l++) {
        for (int v = 0; v < 2; v++) {
            c->memory[l][v] = malloc(n_tokens * TOKEN_ROW * sizeof(float));
            for (size_t i = 0; i < n_tokens * TOKEN_ROW; i++)
                c->memory[l][v][i] = 1e9f;
            for (size_t t = 0; fill && t < n_tokens; t++)
                for (uint32_t h = 0; h < HEADS; h++)
                    for (uint32_t d = 0; d < DIM; d++)
                        c->memory[l][v][t * TOKEN_ROW + h * ROW + d] = value_at(t, l, v, h, d);
        }
        c->kv[l] = (struct kvd_kv){c->memory[l][0],     c->memory[l][1],           TOKEN_ROW * sizeof(float),
                                   ROW * sizeof(float), TOKEN_ROW * sizeof(float), ROW * sizeof(float)};
    }
}

static void cache_deinit(struct cache *c)
{
    for (int l = 0; l < 8; l++)
        for (int v = 0; v < 2; v++)
            free(c->memory[l][v]);
}

/* Numbers that differ from the content of tokens [first, first + n), and padding that was touched. */
static size_t cache_wrong(const struct cache *c, uint32_t layer, size_t first, size_t n)
{
    size_t wrong = 0;

    for (int v = 0; v < 2; v++)
        for (size_t t = 0; t < n; t++)
            for (uint32_t i = 0; i < TOKEN_ROW; i++) {
                float want = i / ROW < HEADS && i % ROW < DIM ? value_at(first + t, layer, v, i / ROW, i % ROW) : 1e9f;

                wrong += c->memory[layer][v][t * TOKEN_ROW + i] != want;
            }
    return wrong;
}

static void publish(struct bed *b, size_t n_blocks, uint32_t n_layers, int want)
{
    enum kvd_publish_status status[MAX_BLOCKS];
    struct cache c;
    int r;

    cache_init(&c, n_layers, n_blocks * B, true);
    r = kvd_publish(b->prefix, b->tokens, n_blocks * B, 0, n_blocks, 0, KVD_F32, c.kv, status);
    ck_assert_msg(r == want, "%d: %s", r, kvd_message(b->k));
    cache_deinit(&c);
}

START_TEST(publish_then_load)
{
    enum kvd_publish_status status[MAX_BLOCKS];
    uint32_t window = 2 * B;
    struct cache c;
    struct bed b;

    bed_setup_as(&b, &window, 1, 0);
    match(&b, 100 * B);
    publish(&b, 100, 3, KVD_OK); /* several frames */
    ck_assert_uint_gt(fake_count(b.fake, FRAME_PUBLISH), 2);
    ck_assert_uint_eq(match(&b, 100 * B), 100 * B);
    cache_init(&c, 3, 100 * B, false);
    ck_assert_msg(kvd_load(b.prefix, 0, 100, KVD_F32, c.kv, KVD_LOAD_VERIFY) == KVD_OK, "%s", kvd_message(b.k));
    for (uint32_t l = 0; l < 2; l++)
        ck_assert_uint_eq(cache_wrong(&c, l, 0, 100 * B), 0);
    ck_assert_float_eq(c.memory[2][0][97 * B * TOKEN_ROW], 1e9f); /* outside of the window: left alone */
    ck_assert_float_eq(c.memory[2][0][98 * B * TOKEN_ROW], value_at(98 * B, 2, 0, 0, 0));
    cache_deinit(&c);
    /* A range from the middle, and a layer left out. */
    cache_init(&c, 3, 10 * B, false);
    c.kv[0].k = NULL;
    ck_assert_int_eq(kvd_load(b.prefix, 50, 10, KVD_F32, c.kv, 0), KVD_OK);
    ck_assert_uint_eq(cache_wrong(&c, 1, 50 * B, 10 * B), 0);
    ck_assert_float_eq(c.memory[0][0][0], 1e9f);
    cache_deinit(&c);
    /* All there already: nothing is sent. */
    cache_init(&c, 3, 100 * B, true);
    uint64_t sent = fake_count(b.fake, FRAME_PUBLISH);

    ck_assert_int_eq(kvd_publish(b.prefix, b.tokens, 100 * B, 0, 100, 0, KVD_F32, c.kv, status), KVD_OK);
    ck_assert_int_eq(status[99], KVD_PRESENT);
    ck_assert_uint_eq(fake_count(b.fake, FRAME_PUBLISH), sent);
    cache_deinit(&c);
    bed_teardown(&b);
}
END_TEST

START_TEST(publish_goes_on_after_the_match)
{
    struct cache c;
    struct bed b;

    bed_setup(&b);
    match(&b, 3 * B);
    cache_init(&c, 2, 6 * B, true);
    ck_assert_int_eq(kvd_publish(b.prefix, b.tokens, 6 * B, 0, 6, 0, KVD_F32, c.kv, NULL),
                     KVD_OK); /* generated tokens */
    ck_assert_uint_eq(match(&b, 6 * B), 6 * B);
    b.tokens[0]++;
    ck_assert_int_eq(kvd_publish(b.prefix, b.tokens, 6 * B, 0, 6, 0, KVD_F32, c.kv, NULL), KVD_E_TOKEN);
    b.tokens[0]--;
    ck_assert_int_eq(kvd_publish(b.prefix, b.tokens, 6 * B, 3, 4, 0, KVD_F32, c.kv, NULL), KVD_E_TOKEN); /* too few */
    ck_assert_int_eq(kvd_publish(b.prefix, b.tokens, 6 * B, 0, 6, 2, KVD_F32, c.kv, NULL),
                     KVD_E_ARG); /* no such group */
    c.kv[1].v = NULL;
    ck_assert_int_eq(kvd_publish(b.prefix, b.tokens, 6 * B, 0, 6, 0, KVD_F32, c.kv, NULL), KVD_E_ARG);
    cache_deinit(&c);
    bed_teardown(&b);
}
END_TEST

START_TEST(publish_small_staging)
{
    struct kvd_options o = KVD_OPTIONS_INIT;
    size_t raw = 2u * B * HEADS * DIM * 2 * sizeof(float); /* one block of two layers */
    struct bed b;

    bed_setup(&b);
    kvd_detach(b.k);
    o.socket_path = path;
    o.staging_bytes = raw + 64; /* room for one block: no two frames at once */
    ck_assert_int_eq(kvd_attach(&o, &b.k), KVD_OK);
    b.space = open_space(b.k, NULL, 0, 0, "raw");
    ck_assert_int_eq(kvd_prefix_create(b.space, MAX_BLOCKS, &b.prefix), KVD_OK);
    match(&b, 20 * B);
    publish(&b, 20, 2, KVD_OK);
    ck_assert_uint_eq(match(&b, 20 * B), 20 * B);
    kvd_detach(b.k);
    o.staging_bytes = raw - 1;
    ck_assert_int_eq(kvd_attach(&o, &b.k), KVD_OK);
    b.space = open_space(b.k, NULL, 0, 0, "raw");
    ck_assert_int_eq(kvd_prefix_create(b.space, MAX_BLOCKS, &b.prefix), KVD_OK);
    match(&b, 40 * B);
    publish(&b, 40, 2, KVD_E_LIMIT);
    bed_teardown(&b);
}
END_TEST

/* A daemon that answers too late still reads the staging when it gets to it: nothing is written over what it may read. */
START_TEST(publish_that_times_out_leaves_its_staging_alone)
{
    struct kvd_options o = KVD_OPTIONS_INIT;
    size_t raw = 2u * B * HEADS * DIM * 2 * sizeof(float); /* one block of two layers */
    struct cache c;
    struct bed b;

    bed_setup(&b);
    kvd_detach(b.k);
    o.socket_path = path;
    o.timeout_msec = 100;
    o.staging_bytes = 4 * (raw + 64) / 4096 * 4096 + 4096; /* a frame for each block, and four of them on their way */
    ck_assert_int_eq(kvd_attach(&o, &b.k), KVD_OK);
    b.space = open_space(b.k, NULL, 0, 0, "raw");
    ck_assert_int_eq(kvd_prefix_create(b.space, MAX_BLOCKS, &b.prefix), KVD_OK);
    match(&b, 8 * B);
    fake_delay(b.fake, FRAME_PUBLISH, 300);
    publish(&b, 8, 2, KVD_E_TIMEOUT);
    while (match(&b, 8 * B) < 4 * B)
        usleep(2000);
    cache_init(&c, 2, 4 * B, false);
    fake_delay(b.fake, FRAME_PUBLISH, 0);
    while (kvd_load(b.prefix, 0, 4, KVD_F32, c.kv, 0) == KVD_E_TIMEOUT) /* the slab is asked for behind the late frames */
        ;
    for (uint32_t l = 0; l < 2; l++)
        ck_assert_uint_eq(cache_wrong(&c, l, 0, 4 * B), 0);
    cache_deinit(&c);
    bed_teardown(&b);
}
END_TEST

START_TEST(publish_one_bad_block)
{
    enum kvd_publish_status status[5];
    struct cache c;
    struct bed b;

    bed_setup(&b);
    kvd_detach(b.k);
    b.k = attach();
    b.space = open_space(b.k, NULL, 0, 0, "tq4");
    ck_assert_int_eq(kvd_prefix_create(b.space, MAX_BLOCKS, &b.prefix), KVD_OK);
    match(&b, 5 * B);
    cache_init(&c, 2, 5 * B, true);
    c.memory[1][1][2 * B * TOKEN_ROW + 5] = 0.0f / 0.0f;
    ck_assert_int_eq(kvd_publish(b.prefix, b.tokens, 5 * B, 0, 5, 0, KVD_F32, c.kv, status), KVD_E_VALUE);
    ck_assert_ptr_nonnull(strstr(kvd_message(b.k), "block 2"));
    ck_assert_int_eq(status[1], KVD_PUBLISHED);
    ck_assert_int_eq(status[2], KVD_FAILED);
    cache_deinit(&c);
    bed_teardown(&b);
}
END_TEST

START_TEST(publish_lies)
{
    static const enum fake_lie lies[] = {FAKE_HANGUP, FAKE_GARBAGE, FAKE_BROKEN_BODY, FAKE_ERROR, FAKE_WRONG_TYPE};
    struct bed b;
    int r;

    bed_setup(&b);
    match(&b, 3 * B);
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        struct cache c;

        fake_lie(b.fake, FRAME_PUBLISH, lies[i]);
        fake_stop(b.fake, true); /* so that every round finds nothing present */
        b.fake = start();
        fake_lie(b.fake, FRAME_PUBLISH, lies[i]);
        cache_init(&c, 2, 3 * B, true);
        do { /* the first tries may come before the time to attach again */
            usleep(2000);
            r = kvd_ping(b.k);
        } while (r != KVD_OK);
        ck_assert_int_ne(kvd_publish(b.prefix, b.tokens, 3 * B, 0, 3, 0, KVD_F32, c.kv, NULL), KVD_OK);
        cache_deinit(&c);
    }
    bed_teardown(&b);
}
END_TEST

START_TEST(load_refuses_corruption)
{
    struct cache c;
    struct bed b;
    size_t n, bytes;
    uint8_t *payload;

    bed_setup(&b);
    match(&b, 2 * B);
    bytes = kvd_space_block_bytes(b.space, 0, 1);
    payload = calloc(1, bytes);
    fake_add(b.fake, kvd_prefix_key(b.prefix, 0), 0, SHM_ENTRY_FIRST, payload, (uint32_t)bytes, 0xbad);
    fake_add(b.fake, kvd_prefix_key(b.prefix, 1), 0, 0, payload, (uint32_t)bytes - 64, 0);
    free(payload);
    n = match(&b, 2 * B);
    ck_assert_uint_eq(n, 2 * B);
    cache_init(&c, 2, 2 * B, false);
    ck_assert_int_eq(kvd_load(b.prefix, 0, 1, KVD_F32, c.kv, 0), KVD_OK); /* not asked to check */
    ck_assert_int_eq(kvd_load(b.prefix, 0, 1, KVD_F32, c.kv, KVD_LOAD_VERIFY), KVD_E_CORRUPT);
    ck_assert_int_eq(kvd_load(b.prefix, 1, 1, KVD_F32, c.kv, 0), KVD_E_CORRUPT); /* of another size than the space's */
    ck_assert_int_eq(kvd_load(b.prefix, 0, 3, KVD_F32, c.kv, 0), KVD_E_STALE);
    ck_assert_int_eq(kvd_load(b.prefix, SIZE_MAX, 2, KVD_F32, c.kv, 0), KVD_E_STALE);
    ck_assert_int_eq(kvd_load(b.prefix, 0, 1, (enum kvd_dtype)7, c.kv, 0), KVD_E_ARG);
    ck_assert_int_eq(kvd_load(b.prefix, 0, 1, KVD_F32, c.kv, 0x80), KVD_E_ARG);
    kvd_release(b.prefix);
    ck_assert_int_eq(kvd_load(b.prefix, 0, 1, KVD_F32, c.kv, 0), KVD_E_STALE);
    cache_deinit(&c);
    bed_teardown(&b);
}
END_TEST

static void *load_worker(void *ctx)
{
    int r, worst = KVD_OK;

    while ((r = kvd_load_work(ctx)) != KVD_E_NOT_FOUND)
        worst = r ? r : worst;
    return (void *)(intptr_t)worst;
}

START_TEST(load_layer_by_layer)
{
    kvd_loading *loading = NULL;
    pthread_t t[2];
    struct cache c;
    struct bed b;

    bed_setup(&b);
    match(&b, 50 * B);
    publish(&b, 50, 2, KVD_OK);
    ck_assert_uint_eq(match(&b, 50 * B), 50 * B);
    cache_init(&c, 2, 50 * B, false);
    ck_assert_int_eq(kvd_load_begin(b.prefix, 0, 50, KVD_F32, c.kv, KVD_LOAD_VERIFY, &loading), KVD_OK);
    ck_assert_int_eq(kvd_load_done(loading, 0), 0);
    ck_assert_int_eq(kvd_load_wait(loading, 1, 1), KVD_E_TIMEOUT);
    ck_assert_int_eq(kvd_load_wait(loading, 2, 1), KVD_E_ARG);
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(pthread_create(&t[i], NULL, load_worker, loading), 0);
    for (uint32_t l = 0; l < 2; l++) {
        ck_assert_int_eq(kvd_load_wait(loading, l, -1), KVD_OK);
        ck_assert_uint_eq(cache_wrong(&c, l, 0, 50 * B), 0);
    }
    for (int i = 0; i < 2; i++) {
        void *worst;

        pthread_join(t[i], &worst);
        ck_assert_ptr_null(worst);
    }
    ck_assert_int_eq(kvd_load_work(loading), KVD_E_NOT_FOUND);
    ck_assert_ptr_null(kvd_load_end(loading));
    cache_deinit(&c);
    bed_teardown(&b);
}
END_TEST

/* ---- threads, forks, deaths ---- */

struct slow {
    struct bed *b;
    _Atomic int done;
    int result;
};

static void *slow_publish(void *ctx)
{
    struct slow *slow = ctx;
    struct cache c;

    cache_init(&c, 2, B, true);
    slow->result = kvd_publish(slow->b->prefix, slow->b->tokens, B, 0, 1, 0, KVD_F32, c.kv, NULL);
    atomic_store(&slow->done, 1);
    cache_deinit(&c);
    return NULL;
}

START_TEST(a_long_request_holds_up_no_other)
{
    struct kvd_options o = KVD_OPTIONS_INIT;
    struct slow slow;
    pthread_t t;
    struct bed b;

    bed_setup(&b);
    kvd_detach(b.k);
    o.socket_path = path;
    o.timeout_msec = 3000;
    ck_assert_int_eq(kvd_attach(&o, &b.k), KVD_OK);
    b.space = open_space(b.k, NULL, 0, 0, "raw");
    ck_assert_int_eq(kvd_prefix_create(b.space, MAX_BLOCKS, &b.prefix), KVD_OK);
    match(&b, B);
    fake_lie(b.fake, FRAME_PUBLISH, FAKE_SILENT);
    slow = (struct slow){.b = &b};
    ck_assert_int_eq(pthread_create(&t, NULL, slow_publish, &slow), 0);
    while (fake_count(b.fake, FRAME_PUBLISH) == 0)
        usleep(100);
    for (int i = 0; i < 100; i++)
        ck_assert_int_eq(kvd_ping(b.k), KVD_OK);
    ck_assert_int_eq(slow.done, 0);
    pthread_join(t, NULL);
    ck_assert_int_eq(slow.result, KVD_E_TIMEOUT);
    ck_assert_uint_eq(fake_count(b.fake, FRAME_STAGING_DROP),
                      1); /* the daemon may still read it: it is not used again */
    bed_teardown(&b);
}
END_TEST

START_TEST(daemon_dies_and_comes_back)
{
    struct kvd_info info = {.size = sizeof(info)};
    struct kvd_block block;
    struct cache c;
    struct bed b;
    size_t n = 0;
    int r = 0;

    bed_setup(&b);
    match(&b, 5 * B);
    publish(&b, 5, 2, KVD_OK);
    ck_assert_uint_eq(match(&b, 5 * B), 5 * B);
    ck_assert_int_eq(kvd_prefix_block(b.prefix, 4, 0, &block), KVD_OK);
    b.fake = fake_stop(b.fake, _i == 1);
    ck_assert_int_eq(kvd_get_info(b.k, &info), KVD_OK);
    ck_assert(!info.alive);
    /* What is under lease stays as it was. */
    cache_init(&c, 2, 5 * B, false);
    ck_assert_int_eq(kvd_load(b.prefix, 0, 5, KVD_F32, c.kv, KVD_LOAD_VERIFY), KVD_OK);
    ck_assert_uint_eq(cache_wrong(&c, 1, 0, 5 * B), 0);
    cache_deinit(&c);
    ck_assert_uint_eq(kvd_prefix_trim(b.prefix, 3), 3);
    ck_assert_int_eq(kvd_prefix_block(b.prefix, 2, 0, &block), KVD_OK);
    ck_assert_int_eq(kvd_ping(b.k), KVD_E_GONE);
    usleep(3000);
    ck_assert_int_eq(kvd_ping(b.k), KVD_E_GONE); /* not KVD_E_CONNECT: the library goes on trying */
    publish(&b, 5, 2, KVD_E_GONE);
    b.fake = start();
    for (int i = 0; (r = kvd_ping(b.k)) != KVD_OK && i < 1000; i++)
        usleep(1000);
    ck_assert_int_eq(r, KVD_OK);
    /* The old lease is still good, of the old life. */
    ck_assert_uint_eq(kvd_prefix_blocks(b.prefix), 3);
    ck_assert_uint_eq(((const uint8_t *)block.payload)[0], ((const uint8_t *)block.payload)[0]);
    ck_assert_uint_eq(match(&b, 5 * B), 0); /* a new cache */
    publish(&b, 5, 2, KVD_OK);
    ck_assert_uint_eq(match(&b, 5 * B), 5 * B);
    ck_assert_int_eq(kvd_get_info(b.k, &info), KVD_OK);
    ck_assert(info.alive);
    ck_assert_uint_eq(info.n_reattached, 1);
    /* And by a match alone. */
    fake_stop(b.fake, true);
    b.fake = start();
    match(&b, 5 * B);
    for (int i = 0; i < 1000 && info.n_reattached < 2; i++) {
        usleep(1000);
        kvd_match(b.prefix, b.tokens, 5 * B, NULL, 0, &n);
        kvd_get_info(b.k, &info);
    }
    ck_assert_uint_eq(info.n_reattached, 2);
    bed_teardown(&b);
}
END_TEST

/* A daemon that comes back and hangs, at hello or just after: a match is a miss then, and waits for no answer that is due in
 * seconds. */
START_TEST(match_does_not_wait_for_a_daemon_that_hangs)
{
    const enum frame_type hangs_at[] = {FRAME_HELLO, FRAME_SPACE_OPEN};
    struct timespec begun, ended;
    struct bed b;
    int r = KVD_E_GONE;

    bed_setup(&b);
    fake_stop(b.fake, true);
    b.fake = start();
    fake_lie(b.fake, hangs_at[_i], FAKE_SILENT);
    clock_gettime(CLOCK_MONOTONIC, &begun);
    while (fake_count(b.fake, hangs_at[_i]) == 0)
        ck_assert_uint_eq(match(&b, 5 * B), 0);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    ck_assert_int_lt(ended.tv_sec - begun.tv_sec, 4); /* requests of this session time out after 5 s */
    fake_lie(b.fake, hangs_at[_i], FAKE_HONEST);
    for (int i = 0; i < 1000 && (r = kvd_ping(b.k)) != KVD_OK; i++)
        usleep(1000);
    ck_assert_int_eq(r, KVD_OK);
    publish(&b, 5, 2, KVD_OK);
    ck_assert_uint_eq(match(&b, 5 * B), 5 * B);
    bed_teardown(&b);
}
END_TEST

/* Many threads match, publish and load while the daemon is restarted again and again. */
struct churn {
    struct bed *b;
    uint32_t number;
    _Atomic int *stop;
    uint64_t n_wrong, n_published;
    _Atomic uint64_t n_used;
};

static void *churner(void *ctx)
{
    struct churn *churn = ctx;
    uint32_t tokens[6 * B];
    kvd_prefix *p = NULL;
    struct cache full, empty;

    kvd_prefix_create(churn->b->space, MAX_BLOCKS, &p);
    for (uint32_t i = 0; i < 6 * B; i++)
        tokens[i] = i + churn->number;
    cache_init(&full, 2, 6 * B, true);
    while (!atomic_load(churn->stop)) {
        size_t n = 0;

        kvd_match(p, tokens, 6 * B, NULL, 0, &n);
        if (n) {
            int r;

            cache_init(&empty, 2, 6 * B, false);
            r = kvd_load(p, 0, n / B, KVD_F32, empty.kv, KVD_LOAD_VERIFY);
            if (r == KVD_OK) {
                atomic_fetch_add(&churn->n_used, n / B);
                churn->n_wrong += cache_wrong(&empty, 1, 0, n);
            } else if (r != KVD_E_GONE && r != KVD_E_STALE) {
                churn->n_wrong++;
            }
            cache_deinit(&empty);
        }
        if (n < 6 * B && kvd_publish(p, tokens, 6 * B, 0, 6, 0, KVD_F32, full.kv, NULL) == KVD_OK)
            churn->n_published++;
        kvd_release(p);
    }
    cache_deinit(&full);
    kvd_prefix_destroy(p);
    return NULL;
}

START_TEST(restarts_under_load)
{
    struct churn churn[3];
    _Atomic int stop = 0;
    pthread_t t[3];
    uint64_t used = 0, published = 0;
    struct kvd_info info = {.size = sizeof(info)};
    struct bed b;

    bed_setup(&b);
    for (uint32_t i = 0; i < 3; i++) {
        churn[i] = (struct churn){.b = &b, .number = i, .stop = &stop};
        ck_assert_int_eq(pthread_create(&t[i], NULL, churner, &churn[i]), 0);
    }
    for (int i = 0; i < 20; i++) {
        usleep(20000);
        fake_stop(b.fake, i % 2);
        b.fake = start();
    }
    /* A slow machine needs the last daemon for a while; one that never gets there runs into the suite's time limit. */
    while (atomic_load(&churn[0].n_used) + atomic_load(&churn[1].n_used) + atomic_load(&churn[2].n_used) == 0)
        usleep(10000);
    atomic_store(&stop, 1);
    for (int i = 0; i < 3; i++) {
        pthread_join(t[i], NULL);
        ck_assert_uint_eq(churn[i].n_wrong, 0);
        used += atomic_load(&churn[i].n_used);
        published += churn[i].n_published;
    }
    kvd_get_info(b.k, &info);
    printf("restarts_under_load: %llu blocks used, %llu publishes, attached again %llu times\n",
           (unsigned long long)used, (unsigned long long)published, (unsigned long long)info.n_reattached);
    ck_assert_uint_gt(used, 0);
    ck_assert_uint_gt(info.n_reattached, 0);
    bed_teardown(&b);
}
END_TEST

START_TEST(cut_off_while_the_daemon_lives)
{
    struct kvd_block block;
    struct cache c;
    struct bed b;
    int r = 0;

    bed_setup(&b);
    match(&b, 5 * B);
    publish(&b, 5, 2, KVD_OK);
    ck_assert_uint_eq(match(&b, 5 * B), 5 * B);
    fake_revoke(b.fake);
    /* No lease is kept for us any more: nothing may be used. */
    cache_init(&c, 2, 5 * B, false);
    ck_assert_int_eq(kvd_load(b.prefix, 0, 5, KVD_F32, c.kv, 0), KVD_E_STALE);
    ck_assert_int_eq(kvd_prefix_block(b.prefix, 0, 0, &block), KVD_E_STALE);
    ck_assert_uint_eq(kvd_prefix_trim(b.prefix, 3), 0);
    cache_deinit(&c);
    for (int i = 0; (r = kvd_ping(b.k)) != KVD_OK && i < 1000; i++)
        usleep(1000);
    ck_assert_int_eq(r, KVD_OK);
    ck_assert_uint_eq(match(&b, 5 * B), 5 * B); /* the same daemon, the same cache, a new session */
    bed_teardown(&b);
}
END_TEST

START_TEST(fork_child_is_told)
{
    struct bed b;
    int status;
    pid_t pid;

    bed_setup(&b);
    match(&b, 4 * B);
    publish(&b, 4, 2, KVD_OK);
    ck_assert_uint_eq(match(&b, 4 * B), 4 * B);
    pid = fork();
    if (pid == 0) {
        struct kvd_info info = {.size = sizeof(info)};
        struct kvd_block block;
        size_t n = 1;
        int bad = 0;

        bad |= kvd_ping(b.k) != KVD_E_FORKED;
        bad |= kvd_match(b.prefix, b.tokens, B, NULL, 0, &n) != KVD_E_FORKED;
        bad |= kvd_prefix_block(b.prefix, 0, 0, &block) != KVD_E_FORKED;
        bad |= kvd_get_info(b.k, &info) != KVD_E_FORKED;
        bad |= kvd_flight_end(b.prefix, 0, 1) != KVD_E_FORKED;
        bad |= kvd_admin_drain(b.k, 0) != KVD_E_FORKED;
        bad |= strcmp(kvd_message(b.k), "") == 0;
        kvd_release(b.prefix);
        kvd_detach(b.k);
        _exit(bad);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_int_eq(status, 0);
    ck_assert_uint_eq(fake_leases(b.fake), 4); /* the parent's are untouched */
    ck_assert_int_eq(kvd_ping(b.k), KVD_OK);
    kvd_release(b.prefix);
    ck_assert_uint_eq(fake_leases(b.fake), 0);
    bed_teardown(&b);
}
END_TEST

START_TEST(flights)
{
    enum kvd_flight state[3];
    struct bed b;

    bed_setup(&b);
    match(&b, 3 * B);
    ck_assert_int_eq(kvd_flight_begin(b.prefix, 0, 3, state), KVD_OK);
    ck_assert_int_eq(state[0], KVD_FLIGHT_GRANTED);
    ck_assert_int_eq(state[1], KVD_FLIGHT_BUSY);
    ck_assert_int_eq(state[2], KVD_FLIGHT_LANDED);
    ck_assert_int_eq(kvd_flight_wait(b.prefix, 1, 1), KVD_OK);
    ck_assert_int_eq(kvd_flight_wait(b.prefix, 1, 2), KVD_E_TIMEOUT);
    ck_assert_int_eq(kvd_flight_wait(b.prefix, 1, 3), KVD_E_NOT_FOUND);
    ck_assert_int_eq(kvd_flight_end(b.prefix, 0, 3), KVD_OK);
    ck_assert_int_eq(kvd_flight_begin(b.prefix, 1, 3, state), KVD_E_ARG);
    bed_teardown(&b);
}
END_TEST

static void add(Suite *s, const char *name, const TTest *const *tests, size_t n)
{
    TCase *tc = tcase_create(name);

    tcase_add_checked_fixture(tc, folder_setup, folder_teardown);
    tcase_set_timeout(tc, 300);
    for (size_t i = 0; i < n; i++)
        tcase_add_test(tc, tests[i]);
    suite_add_tcase(s, tc);
}

int main(void)
{
    const TTest *plain[] = {
        attach_info_ping,
        attach_nobody_there,
        space_refusals,
        match_longest_whole_blocks,
        match_arguments,
        match_digests_pad,
        match_with_few_leases,
        match_makes_no_request,
        lease_keeps_a_block,
        lease_race_with_eviction,
        slab_number_used_again,
        slab_lies,
        index_of_garbage,
        publish_then_load,
        publish_goes_on_after_the_match,
        publish_small_staging,
        publish_that_times_out_leaves_its_staging_alone,
        publish_one_bad_block,
        publish_lies,
        load_refuses_corruption,
        load_layer_by_layer,
        a_long_request_holds_up_no_other,
        restarts_under_load,
        cut_off_while_the_daemon_lives,
        fork_child_is_told,
        flights,
    };
    Suite *s = suite_create("libkvd");
    TCase *loops = tcase_create("loops");
    SRunner *runner;
    int n_failed;

    add(s, "plain", plain, sizeof(plain) / sizeof(plain[0]));
    tcase_add_checked_fixture(loops, folder_setup, folder_teardown);
    tcase_set_timeout(loops, 300);
    tcase_add_loop_test(loops, attach_lies, 0, 16);
    tcase_add_loop_test(loops, request_lies, 0, FAKE_LIES);
    tcase_add_loop_test(loops, match_layer_groups_as_the_rule_says, 0, 8);
    tcase_add_loop_test(loops, daemon_dies_and_comes_back, 0, 2);
    tcase_add_loop_test(loops, match_does_not_wait_for_a_daemon_that_hangs, 0, 2);
    suite_add_tcase(s, loops);
    runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
