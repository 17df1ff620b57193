/* Memory runs out at every single place: the n-th allocation fails, for every n until a run needs no n-th.
 *
 * The linker puts our functions in the place of malloc, calloc, realloc, posix_memalign, strdup, memfd_create, mmap and fallocate in kvd's
 * own code (not inside other libraries). After each failure: an error came back, invariants hold, the same thing works when asked
 * again, and at the end nothing is left allocated. A daemon with fault points is put through the same. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "store/cache.h"
#include "store/flight.h"
#include "store/slab.h"
#include "tests/content.h"
#include "tests/harness.h"

/* ---- the failing n-th ---- */

/* The C library's functions carry no context, so this is the one place for it. */
static struct {
    _Atomic uint64_t n_met, fail_at; /* fail_at 0: never */
    _Atomic int64_t n_live;          /* blocks of the heap */
    _Atomic int onward;              /* all from fail_at on */
    _Atomic int paused;              /* while the test's own code runs */
} faults;

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
int __real_posix_memalign(void **ret, size_t align, size_t n);
char *__real_strdup(const char *s);
void __real_free(void *p);
int __real_memfd_create(const char *name, unsigned flags);
void *__real_mmap(void *addr, size_t n, int prot, int flags, int fd, off_t off);
int __real_fallocate(int fd, int mode, off_t off, off_t len);

void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
int __wrap_posix_memalign(void **ret, size_t align, size_t n);
char *__wrap_strdup(const char *s);
void __wrap_free(void *p);
int __wrap_memfd_create(const char *name, unsigned flags);
void *__wrap_mmap(void *addr, size_t n, int prot, int flags, int fd, off_t off);
int __wrap_fallocate(int fd, int mode, off_t off, off_t len);

static bool due(int error)
{
    uint64_t met, at = atomic_load(&faults.fail_at);

    if (at == 0 || atomic_load(&faults.paused))
        return false;
    met = atomic_fetch_add(&faults.n_met, 1) + 1;
    if ((faults.onward ? met < at : met != at))
        return false;
    errno = error;
    return true;
}

static void *counted(void *p)
{
    if (p)
        atomic_fetch_add(&faults.n_live, 1);
    return p;
}

void *__wrap_malloc(size_t n)
{
    return due(ENOMEM) ? NULL : counted(__real_malloc(n));
}

void *__wrap_calloc(size_t n, size_t size)
{
    return due(ENOMEM) ? NULL : counted(__real_calloc(n, size));
}

void *__wrap_realloc(void *p, size_t n)
{
    void *q;

    if (due(ENOMEM))
        return NULL;
    q = __real_realloc(p, n);
    return p ? q : counted(q);
}

int __wrap_posix_memalign(void **ret, size_t align, size_t n)
{
    int r;

    if (due(ENOMEM))
        return ENOMEM;
    r = __real_posix_memalign(ret, align, n);
    if (r == 0)
        counted(*ret);
    return r;
}

char *__wrap_strdup(const char *s)
{
    return due(ENOMEM) ? NULL : counted(__real_strdup(s));
}

void __wrap_free(void *p)
{
    if (p)
        atomic_fetch_sub(&faults.n_live, 1);
    __real_free(p);
}

int __wrap_memfd_create(const char *name, unsigned flags)
{
    return due(ENOMEM) ? -1 : __real_memfd_create(name, flags);
}

void *__wrap_mmap(void *addr, size_t n, int prot, int flags, int fd, off_t off)
{
    return due(ENOMEM) ? MAP_FAILED : __real_mmap(addr, n, prot, flags, fd, off);
}

int __wrap_fallocate(int fd, int mode, off_t off, off_t len)
{
    return due(ENOSPC) ? -1 : __real_fallocate(fd, mode, off, len);
}

static void arm(uint64_t at, bool onward)
{
    atomic_store(&faults.n_met, 0);
    atomic_store(&faults.n_live, 0);
    atomic_store(&faults.onward, onward);
    atomic_store(&faults.fail_at, at);
}

/* True if the fault was met. */
static bool disarm(void)
{
    uint64_t at = atomic_load(&faults.fail_at);

    atomic_store(&faults.fail_at, 0);
    return atomic_load(&faults.n_met) >= at;
}

/* An assertion inside of a body: libcheck allocates too. */
static void must(bool good, const char *what)
{
    if (!good) {
        disarm();
        ck_abort_msg("%s", what);
    }
}

/* Runs body for n = 1, 2, ... until the fault is not met any more; once with the n-th alone, once with all from it on. */
static uint64_t for_every_n(void (*body)(void *ctx), void (*after)(void *ctx), void *ctx)
{
    uint64_t n;

    for (int onward = 0; onward < 2; onward++)
        for (n = 1;; n++) {
            int64_t n_left;
            bool met;

            arm(n, onward);
            body(ctx);
            met = disarm();
            n_left = atomic_load(&faults.n_live);
            ck_assert_msg(n_left == 0, "with the failure of number %llu %lld allocations are left", (unsigned long long)n,
                          (long long)n_left);
            ck_assert_uint_lt(n, 100000);
            if (after)
                after(ctx);
            if (!met)
                break;
        }
    return n - 1;
}

/* ---- store ---- */

static uint64_t now_usec(void *ctx)
{
    return ++*(uint64_t *)ctx;
}

static const uint32_t windows[] = {0, 8};
static const struct space_layer_desc layers[] = {{1, 16, 16, 0, "raw", "raw", "raw", "raw"},
                                                 {2, 32, 32, 1, "kc4", "tq4", NULL, NULL}};
static const struct space_desc description = {.model = "m", .revision = "1", .rope = "r", .shard = "0", .dtype = CODEC_F16,
                                              .block_tokens = 4, .window_tokens = windows, .n_groups = 2, .layers = layers,
                                              .n_layers = 2};

static void store_chain(struct cache *cache, struct space *space, uint8_t number)
{
    uint8_t key[KEY_BYTES] = {number}, parent[KEY_BYTES];
    struct cache_slot slot;

    memcpy(parent, space->fingerprint, KEY_BYTES);
    for (int i = 0; i < 6; i++) {
        int r;

        key[1] = (uint8_t)i;
        r = cache_reserve(cache, space, 0, key, parent, i == 0, &slot);
        if (r != CACHE_RESERVED) {
            must(r < 0 || r == CACHE_NO_PARENT || r == CACHE_PRESENT, "cache_reserve gave what it never does");
            return;
        }
        memset(slot.payload, number, slot.bytes);
        if (number % 3 == 2 && i == 4)
            cache_abort(cache, &slot);
        else
            cache_commit(cache, &slot);
        memcpy(parent, key, KEY_BYTES);
    }
}

/* A short life of a cache: made, filled beyond its index, pinned, evicted, shrunk, gone. */
static void cache_life(void *ctx)
{
    uint64_t now = 0, blocks, bytes;
    struct budget budget = {.limit_bytes = 16 << 20, .hugepages = SLAB_HUGE_OFF};
    struct cache_config config = {.tenant = "t", .domain = "d", .n_entries = 40, .quota_bytes = 8 << 20, .n_spaces_max = 3,
                                  .slab_bytes = 2 << 20, .policy = ctx, .budget = &budget, .now_usec = now_usec,
                                  .now_ctx = &now};
    struct cache *cache;
    struct space *space;
    const char *why = NULL;
    struct cache_evicted evicted = {0};
    uint32_t all[40];

    if (cache_create(&config, &cache) < 0)
        return;
    for (int round = 0; round < 3; round++) {
        if (cache_space_open(cache, &description, &space, &why) < 0)
            continue;
        for (uint8_t c = 0; c < 9; c++)
            store_chain(cache, space, c);
        cache_assert_valid(cache);
        cache_pin(cache, 0, false, &blocks, &bytes);
        cache_pin(cache, 0, true, &blocks, &bytes);
        cache_space_close(cache, space);
    }
    for (uint32_t i = 0; i < 40; i++)
        all[i] = i;
    cache_evict(cache, all, 40, NULL, NULL, 0, &evicted);
    cache_shrink(cache, 0);
    cache_assert_valid(cache);
    cache_destroy(cache);
    must(budget.used_bytes == 0, "bytes of the budget are left");
}

START_TEST(cache)
{
    const struct policy_ops *policy = policy_at((size_t)_i);

    ck_assert_uint_gt(for_every_n(cache_life, NULL, (void *)policy), 20);
}
END_TEST

static void nobody_is_told(void *ctx, uint64_t token, enum flight_outcome outcome)
{
    (void)ctx;
    (void)token;
    (void)outcome;
}

static void flights_life(void *ctx)
{
    struct flights *f;
    uint8_t key[KEY_BYTES] = {0};

    (void)ctx;
    if (flights_create(64, 32, 16, nobody_is_told, NULL, &f) < 0)
        return;
    for (uint8_t i = 0; i < 40; i++) {
        key[0] = i;
        if (flight_begin(f, 1, 1, key, 7) >= 0)
            flight_wait(f, 1, 1, key, 8, i, 1000);
    }
    flight_landed(f, 1, 1, key);
    flights_expire(f, 2000);
    flights_worker_gone(f, 7);
    flights_destroy(f);
}

START_TEST(flights)
{
    ck_assert_uint_gt(for_every_n(flights_life, NULL, NULL), 0);
}
END_TEST

static void space_life(void *ctx)
{
    struct key_hasher *hasher;
    struct space *space;
    const char *why;

    (void)ctx;
    if (key_hasher_create(&hasher) < 0)
        return;
    if (space_create(&description, "d", hasher, &space, &why) == 0)
        space_destroy(space);
    key_hasher_destroy(hasher);
}

START_TEST(spaces)
{
    ck_assert_uint_gt(for_every_n(space_life, NULL, NULL), 3);
}
END_TEST

/* ---- libkvd ---- */

struct client {
    struct harness h;
    struct world world;
    uint64_t prompt;
    size_t n_wrong;
    struct tensors t;
};

static void check_loaded(struct client *c, kvd_prefix *p, struct tensors *t)
{
    size_t n = kvd_prefix_blocks(p);
    struct kvd_block block;
    int r;

    if (n == 0)
        return;
    r = kvd_load(p, 0, n, c->world.desc.dtype, t->kv, KVD_LOAD_VERIFY);
    atomic_store(&faults.paused, 1);
    for (size_t i = 0; i < n && r == KVD_OK; i++) {
        const uint8_t *key = kvd_prefix_key(p, i);
        bool first = kvd_prefix_block(p, i, 0, &block) == KVD_OK && block.first;

        c->n_wrong += content_check(&c->world, key, 0, first, t, i * c->world.desc.block_tokens);
    }
    atomic_store(&faults.paused, 0);
}

static int publish_prompt(struct client *c, kvd_prefix *p, const uint32_t *tokens, struct tensors *t)
{
    atomic_store(&faults.paused, 1);
    for (size_t i = 0; i < 4; i++)
        content_fill(&c->world, kvd_prefix_key(p, i), t, i * 16);
    atomic_store(&faults.paused, 0);
    return kvd_publish(p, tokens, 64, 0, 4, 0, c->world.desc.dtype, t->kv, NULL);
}

/* A query of zeros weighs all tokens the same: each log-sum-exp is that of their number. */
static void check_attended(struct client *c, const struct kvd_attention *a, const float *lse, int r)
{
    for (uint32_t h = 0; h < a->n_heads && r == KVD_OK; h++)
        c->n_wrong += !(lse[h] > 4.15f && lse[h] < 4.17f); /* log 64 */
}

/* All 64 tokens, in every form. */
static int attend(struct client *c, kvd_space *space, kvd_prefix *p)
{
    static const enum kvd_attend_form forms[] = {KVD_ATTEND_LOCAL, KVD_ATTEND_DAEMON, KVD_ATTEND_AUTO};
    static const struct kvd_attention init = KVD_ATTENTION_INIT;
    static float q[4 * 64], o[4 * 64], lse[4];
    struct kvd_attend_costs costs = {.size = sizeof(costs)};
    kvd_attending *attending = NULL;
    struct kvd_attention a = init;
    int r = 0;

    a.n_heads = 4;
    a.q = q;
    a.first_position = 64;
    a.scale = 1;
    a.n_blocks = 4;
    a.o = o;
    a.lse = lse;
    for (size_t i = 0; i < 3 && !r; i++) {
        r = kvd_attend(p, &a, forms[i]);
        check_attended(c, &a, lse, r);
    }
    if (!r)
        r = kvd_attend_choose(p, &a, 1, &costs);
    if (!r)
        r = kvd_attending_create(space, &attending);
    if (!r)
        r = kvd_attend_begin(attending, p, &a, 2);
    if (!r) {
        while (kvd_attend_work(attending) == KVD_OK) {
        }
        r = kvd_attend_wait(attending, -1);
        check_attended(c, &a, lse, r);
    }
    kvd_attending_destroy(attending);
    return r;
}

/* Attach, publish, match, load, attend, leave. Errors are expected everywhere; wrong bytes and crashes nowhere. */
static int client_life(struct client *c, struct tensors *t)
{
    struct kvd_options options = KVD_OPTIONS_INIT;
    uint32_t tokens[64];
    kvd_space *space;
    kvd_prefix *p;
    size_t got;
    kvd *k;
    int r;

    options.socket_path = c->h.socket;
    options.timeout_msec = 2000;
    r = kvd_attach(&options, &k);
    if (r)
        return r;
    r = kvd_space_open(k, &c->world.desc, &space);
    if (!r)
        r = kvd_prefix_create(space, 8, &p);
    if (!r) {
        world_tokens(&c->world, c->prompt, 64, tokens);
        r = kvd_match(p, tokens, 64, NULL, 0, &got);
        if (!r)
            r = publish_prompt(c, p, tokens, t);
        if (!r)
            r = kvd_match(p, tokens, 64, NULL, 0, &got);
        check_loaded(c, p, t);
        if (!r && kvd_prefix_blocks(p) == 4)
            r = attend(c, space, p);
    }
    kvd_detach(k);
    return r;
}

static void client_body(void *ctx)
{
    struct client *c = ctx;

    c->prompt += 64; /* nothing in common */
    client_life(c, &c->t);
}

/* The daemon has felt nothing, and the same thing works. */
static void client_after(void *ctx)
{
    struct client *c = ctx;

    ck_assert_uint_eq(c->n_wrong, 0);
    if (c->prompt % (64 * 16) == 0)
        ck_assert_int_eq(client_life(c, &c->t), KVD_OK);
}

START_TEST(client)
{
    struct client c = {.prompt = 0};

    harness_init(&c.h);
    harness_start(&c.h);
    world_init(&c.world, "raw");
    ck_assert_int_eq(tensors_init(&c.t, &c.world, 64), 0);
    ck_assert_int_eq(client_life(&c, &c.t), KVD_OK); /* what libraries allocate once */
    ck_assert_uint_gt(for_every_n(client_body, client_after, &c), 10);
    ck_assert_int_eq(client_life(&c, &c.t), KVD_OK);
    tensors_deinit(&c.t);
    ck_assert(harness_quiet(&c.h, 0, 5000));
    ck_assert_uint_eq(harness_verify(&c.h), 0);
    ck_assert_int_eq(harness_stop(&c.h), 0);
    harness_deinit(&c.h);
}
END_TEST

#ifdef KVD_FAULT_POINTS
/* ---- a daemon whose memory runs out ---- */

static const char *const daemon_faults[] = {"malloc", "calloc", "realloc", "memfd_create", "fallocate", "mmap", "sendmsg",
                                            "job-submit"};

/* One life: it refuses to start with a word, or it serves: whoever gets an error may come again, nobody gets wrong bytes. */
static bool daemon_life(const char *fault, unsigned n)
{
    struct client c = {.prompt = 64};
    char value[64];
    pid_t pid;
    int status;

    snprintf(value, sizeof(value), "%s:%u", fault, n);
    setenv("KVD_FAULT", value, 1);
    harness_init(&c.h);
    world_init(&c.world, "raw");
    ck_assert_int_eq(tensors_init(&c.t, &c.world, 64), 0);
    harness_write_config(&c.h);
    pid = test_fork();
    if (pid == 0) { /* harness_start() takes a failed start for the end of the test */
        int r = KVD_E_CONNECT;

        harness_start(&c.h);
        for (int i = 0; i < 4 && r; i++) /* one fault: the next try gets through */
            r = client_life(&c, &c.t);
        if (r || c.n_wrong || !harness_alive(&c.h))
            test_die(&c.h, "with %s: error %d, %zu wrong, daemon %s", value, r, c.n_wrong,
                     harness_alive(&c.h) ? "alive" : "dead");
        if (harness_stop(&c.h) != 0)
            test_die(&c.h, "with %s: it did not end well", value);
        _exit(0);
    }
    waitpid(pid, &status, 0);
    unsetenv("KVD_FAULT");
    if (status != 0) { /* then it must have said why, and ended by itself */
        char *text = harness_log_text(&c.h);

        ck_assert_msg(strlen(text) > 0, "%s: no word", value);
        ck_assert_msg(!strstr(text, "assert") && !strstr(text, "Sanitizer") && !strstr(text, "ready:"), "%s: %s", value, text);
        free(text);
    }
    tensors_deinit(&c.t);
    harness_deinit(&c.h);
    return status == 0;
}

START_TEST(daemon_runs_out)
{
    const char *fault = daemon_faults[_i];
    unsigned n, n_refused = 0, in_a_row = 0;

    for (n = 1; n < 160 && in_a_row < 40; n++) { /* many in a row without an effect: beyond the last one */
        bool served = daemon_life(fault, n);

        n_refused += !served;
        in_a_row = served ? in_a_row + 1 : 0;
    }
    printf("%s: %u lives, %u of them refused to start\n", fault, n - 1, n_refused);
}
END_TEST
#endif

int main(void)
{
    Suite *suite = suite_create("alloc");
    TCase *tc = tcase_create("the n-th allocation fails");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(tc, 300);
    tcase_add_loop_test(tc, cache, 0, policy_at(1) ? 2 : 1);
    tcase_add_test(tc, flights);
    tcase_add_test(tc, spaces);
    tcase_add_test(tc, client);
#ifdef KVD_FAULT_POINTS
    tcase_add_loop_test(tc, daemon_runs_out, 0, sizeof(daemon_faults) / sizeof(daemon_faults[0]));
#endif
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
