/* Index, spaces and flights by themselves. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "store/flight.h"
#include "store/index.h"
#include "store/space.h"

/* ---- index ---- */

static void number_key(uint32_t i, uint8_t key[32])
{
    uint64_t x = (i + 1) * UINT64_C(0x9e3779b97f4a7c15);

    for (int w = 0; w < 4; w++, x *= UINT64_C(0xd1b54a32d192ed03))
        memcpy(key + 8 * w, &x, 8);
}

START_TEST(index_finds_what_was_put)
{
    enum { N = 20000 };
    static struct lookup_hit hits[N];
    static uint8_t keys[N * 32];
    struct index x;
    struct lookup_hit hit;

    ck_assert_int_eq(index_init(&x, "test", N), 0);
    for (uint32_t i = 0; i < N; i++) {
        number_key(i, keys + i * 32);
        index_fill(&x, i, keys + i * 32, 3, 1, 0, 100, i, i);
        ck_assert_int_eq(index_publish(&x, i), 0);
    }
    index_assert_valid(&x);
    ck_assert_uint_eq(lookup_find_many(&x.view, keys, N, 3, 1, true, hits), N);
    for (uint32_t i = 0; i < N; i++)
        ck_assert(hits[i].entry == i && hits[i].crc32c == i && hits[i].gen == 2);
    ck_assert(!lookup_find(&x.view, keys, 3, 0, &hit)); /* another group, another space: never (I1) */
    ck_assert(!lookup_find(&x.view, keys, 2, 1, &hit));
    for (uint32_t i = 0; i < N; i += 2) {
        index_retire(&x, i);
        ck_assert(!lookup_find(&x.view, keys + i * 32, 3, 1, &hit));
        if (i % 4 == 0)
            index_remove(&x, i);
        else
            index_restore(&x, i);
    }
    index_assert_valid(&x);
    for (uint32_t i = 0; i < N; i++)
        ck_assert_int_eq(lookup_find(&x.view, keys + i * 32, 3, 1, &hit), i % 4 != 0);
    ck_assert_uint_eq(lookup_find_many(&x.view, keys + 32, N - 1, 3, 1, true, hits), 3); /* up to the first miss */
    index_fill(&x, 0, keys, 3, 1, 0, 100, 0, 0);
    ck_assert_int_eq(index_publish(&x, 0), 0);
    ck_assert(lookup_find(&x.view, keys, 3, 1, &hit) && hit.gen == 4); /* X3: never the same generation again */
    index_deinit(&x);
}
END_TEST

START_TEST(index_memory_cannot_be_written_by_others)
{
    struct index x;
    void *map;
    char path[64];
    int fd;

    ck_assert_int_eq(index_init(&x, "test", 64), 0);
    map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, x.memory.fd, 0);
    ck_assert_ptr_eq(map, MAP_FAILED);
    map = mmap(NULL, 4096, PROT_READ, MAP_SHARED, x.memory.fd, 0);
    ck_assert_ptr_ne(map, MAP_FAILED);
    ck_assert_int_eq(mprotect(map, 4096, PROT_READ | PROT_WRITE), -1);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", x.memory.fd);
    fd = open(path, O_RDWR);
    if (fd >= 0) {
        ck_assert_ptr_eq(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
        ck_assert_int_eq((int)write(fd, "x", 1), -1);
        close(fd);
    }
    ck_assert_int_eq(ftruncate(x.memory.fd, 0), -1);
    ck_assert_int_eq(fallocate(x.memory.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
    ck_assert_int_eq(fcntl(x.memory.fd, F_ADD_SEALS, 0), -1);
    munmap(map, 4096);
    index_deinit(&x);
}
END_TEST

/* The word that tells a worker by a load that its daemon is gone, however it went. */
START_TEST(death_of_the_owner_shows)
{
    int memory_pipe[2], go[2], fd;
    const struct shm_index_header *h;
    char path[64], c = 0;
    pid_t pid;

    ck_assert_int_eq(pipe(memory_pipe), 0);
    ck_assert_int_eq(pipe(go), 0);
    pid = fork();
    if (pid == 0) {
        struct index x;

        if (index_init(&x, "test", 64) < 0 || write(memory_pipe[1], &x.memory.fd, sizeof(int)) < 0)
            _exit(1);
        pause();
        _exit(2);
    }
    ck_assert_int_eq((int)read(memory_pipe[0], &fd, sizeof(fd)), (int)sizeof(fd));
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, fd);
    fd = open(path, O_RDONLY);
    ck_assert_int_ge(fd, 0);
    h = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(h, MAP_FAILED);
    ck_assert(shm_index_alive(h));
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    ck_assert(!shm_index_alive(h));
    (void)c;
    close(fd);
}
END_TEST

/* ---- spaces ---- */

static const uint32_t windows[2] = {0, 512};
static struct space_layer_desc layers[2] = {{1, 64, 64, 0, NULL, NULL, "raw", "raw"}, {1, 64, 64, 1, "uq4", "fp8", "", NULL}};

static struct space_desc plain_desc(void)
{
    return (struct space_desc){.model = "plain", .revision = "1", .rope = "", .shard = "", .dtype = CODEC_F16,
                               .block_tokens = 64, .window_tokens = windows, .n_groups = 1, .layers = layers, .n_layers = 1};
}

static int try_space(const struct space_desc *d, const char *domain, uint8_t *ret_fingerprint, const char **ret_reason)
{
    struct key_hasher *h;
    struct space *s = NULL;
    int r;

    ck_assert_int_eq(key_hasher_create(&h), 0);
    r = space_create(d, domain, h, &s, ret_reason);
    if (r == 0 && ret_fingerprint)
        memcpy(ret_fingerprint, s->fingerprint, 32);
    space_destroy(s);
    key_hasher_destroy(h);
    return r;
}

START_TEST(fingerprint_has_a_known_answer_and_feels_everything)
{
    struct space_desc d = plain_desc(), e;
    struct space_layer_desc other = layers[0];
    uint8_t a[32], b[32];
    const char *reason;
    char text[65];

    ck_assert_int_eq(try_space(&d, "t", a, &reason), 0);
    for (int i = 0; i < 32; i++)
        sprintf(text + 2 * i, "%02x", a[i]);
    ck_assert_str_eq(text, "51ac439c754f7bb57d74d7802109a564b1eef21d2eb1f1899e5060551df07a6b");
    ck_assert_int_eq(try_space(&d, "u", b, &reason), 0);
    ck_assert_mem_ne(a, b, 32);
#define DIFFERS(change)                                     \
    e = d;                                                  \
    other = layers[0];                                      \
    change;                                                 \
    ck_assert_int_eq(try_space(&e, "t", b, &reason), 0);    \
    ck_assert_mem_ne(a, b, 32)
    DIFFERS(e.model = "plain2");
    DIFFERS(e.revision = "2");
    DIFFERS(e.rope = "10000");
    DIFFERS(e.shard = "tp0");
    DIFFERS(e.dtype = CODEC_BF16);
    DIFFERS(e.block_tokens = 32);
    DIFFERS(e.vocab_tokens = 1000);
    DIFFERS(e.digest_bytes = 16);
    DIFFERS(e.layers = &other; other.dim_k = 128);
    DIFFERS(e.layers = &other; other.dim_v = 128);
    DIFFERS(e.layers = &other; other.n_kv_heads = 2);
    DIFFERS(e.layers = &other; other.codec_k = "kc4:grid=e2m1");
    DIFFERS(e.layers = &other; other.codec_v = "tq3");
    DIFFERS(e.layers = &other; other.codec_first_k = "fp8");
    DIFFERS(e.n_groups = 2; e.n_layers = 2);
}
END_TEST

START_TEST(impossible_spaces_are_refused_with_a_reason)
{
    struct space_desc d, base = plain_desc();
    struct space_layer_desc bad = layers[0];
    const char *reason = "";
    char long_name[300];

    memset(long_name, 'a', 299);
    long_name[299] = 0;
#define REFUSED(change, word)                                        \
    d = base;                                                        \
    bad = layers[0];                                                 \
    change;                                                          \
    ck_assert_int_eq(try_space(&d, "t", NULL, &reason), -EINVAL);    \
    ck_assert_msg(reason && strstr(reason, word), "a reason with: %s", word)
    REFUSED(d.model = "", "model");
    REFUSED(d.model = long_name, "255");
    REFUSED(d.revision = long_name, "revision");
    REFUSED(d.dtype = 0, "dtype");
    REFUSED(d.block_tokens = 0, "4096");
    REFUSED(d.block_tokens = 4097, "4096");
    REFUSED(d.digest_bytes = 7, "digest");
    REFUSED(d.digest_bytes = 33, "digest");
    REFUSED(d.n_groups = 0, "groups");
    REFUSED(d.n_groups = 17, "groups");
    REFUSED(d.n_layers = 0, "layers");
    REFUSED(d.n_layers = 1025, "layers");
    REFUSED(d.layers = &bad; bad.group = 1, "group");
    REFUSED(d.layers = &bad; bad.n_kv_heads = 0, "heads");
    REFUSED(d.layers = &bad; bad.codec_k = "zip", "");
    REFUSED(d.layers = &bad; bad.dim_k = 0, "");
    REFUSED(d.layers = &bad; bad.dim_k = 65, "");
    REFUSED(d.layers = &bad; bad.codec_k = "uq4"; bad.dim_k = 80, "");
    REFUSED(d.n_groups = 2, "without a layer");
    REFUSED(d.layers = &bad; bad.n_kv_heads = 1024; bad.dim_k = 1024; d.block_tokens = 4096, "2 GiB");
}
END_TEST

/* ---- flights ---- */

static struct {
    uint64_t token;
    enum flight_outcome outcome;
} told[8];
static int n_told;

static void tell(void *ctx, uint64_t token, enum flight_outcome outcome)
{
    (void)ctx;
    told[n_told].token = token;
    told[n_told++].outcome = outcome;
}

START_TEST(flights_land_end_and_expire)
{
    struct flights *f;
    uint8_t key[32] = {1}, other[32] = {2};
    uint64_t n, w;

    n_told = 0;
    ck_assert_int_eq(flights_create(3, 2, 2, tell, NULL, &f), 0);
    ck_assert_int_eq(flight_begin(f, 0, 1, key, 100), FLIGHT_GRANTED);
    ck_assert_int_eq(flight_begin(f, 0, 1, key, 100), FLIGHT_GRANTED);
    ck_assert_int_eq(flight_begin(f, 0, 1, key, 200), FLIGHT_BUSY);
    ck_assert_int_eq(flight_begin(f, 1, 1, key, 200), FLIGHT_GRANTED); /* another tenant's */
    ck_assert_int_eq(flight_begin(f, 0, 2, key, 200), FLIGHT_GRANTED); /* another space's */
    ck_assert_int_eq(flight_begin(f, 0, 3, key, 300), -ENOSPC);
    flight_end(f, 0, 2, key, 200);
    ck_assert_int_eq(flight_begin(f, 0, 1, other, 100), FLIGHT_GRANTED);
    flight_end(f, 1, 1, key, 200);
    ck_assert_int_eq(flight_begin(f, 0, 9, other, 100), -ENOSPC); /* two are one worker's bound */
    ck_assert_int_eq(flight_wait(f, 0, 7, key, 200, 1, 50), -ENOENT);
    ck_assert_int_eq(flight_wait(f, 0, 1, key, 200, 1, 50), 0);
    ck_assert_int_eq(flight_wait(f, 0, 1, key, 300, 2, 80), 0);
    ck_assert_int_eq(flight_wait(f, 0, 1, other, 300, 3, 80), -ENOSPC);
    ck_assert_uint_eq(flights_expire(f, 49), 50);
    ck_assert_uint_eq(flights_expire(f, 50), 80);
    ck_assert(n_told == 1 && told[0].token == 1 && told[0].outcome == FLIGHT_TIMED_OUT);
    flight_end(f, 0, 1, key, 200); /* not its own: nothing */
    flights_count(f, &n, &w);
    ck_assert(n == 2 && w == 1);
    flight_landed(f, 0, 1, key);
    ck_assert(n_told == 2 && told[1].token == 2 && told[1].outcome == FLIGHT_LANDED);
    ck_assert_int_eq(flight_wait(f, 0, 1, other, 300, 4, 80), 0);
    ck_assert_int_eq(flight_wait(f, 0, 1, other, 100, 5, 80), 0);
    flights_worker_gone(f, 100); /* owner of other: 300 is told, its own wait is forgotten */
    ck_assert(n_told == 3 && told[2].token == 4 && told[2].outcome == FLIGHT_GIVEN_UP);
    flights_count(f, &n, &w);
    ck_assert(n == 0 && w == 0);
    ck_assert_uint_eq(flights_expire(f, 1000), UINT64_MAX);
    flights_destroy(f);
}
END_TEST

/* Each worker's flights are bounded by its own number, whoever begins and ends between. */
START_TEST(flights_are_counted_by_worker)
{
    enum { WORKERS = 3, MOST = 5, KEYS = 40 };
    uint64_t seed = (uint64_t)time(NULL), n_flights, n_waiters;
    uint32_t n[WORKERS] = {0}, owner[KEYS] = {0};
    struct flights *f;

    if (getenv("KVD_SEED"))
        seed = strtoull(getenv("KVD_SEED"), NULL, 0);
    printf("flights_are_counted_by_worker: KVD_SEED=%llu\n", (unsigned long long)seed);
    srand((unsigned)seed);
    ck_assert_int_eq(flights_create(1000, MOST, 2, tell, NULL, &f), 0);
    for (int step = 0; step < 20000; step++) {
        uint32_t w = 1 + (uint32_t)rand() % WORKERS, k = (uint32_t)rand() % KEYS;
        uint8_t key[32] = {[16] = (uint8_t)k};
        int what = rand() % 8, r;

        if (what < 4) {
            r = flight_begin(f, 1, 1, key, w);
            if (owner[k]) {
                ck_assert_int_eq(r, owner[k] == w ? FLIGHT_GRANTED : FLIGHT_BUSY);
            } else {
                ck_assert_int_eq(r, n[w - 1] < MOST ? FLIGHT_GRANTED : -ENOSPC);
                owner[k] = r == FLIGHT_GRANTED ? w : 0;
                n[w - 1] += r == FLIGHT_GRANTED;
            }
        } else if (what < 7) {
            if (what == 4)
                flight_landed(f, 1, 1, key);
            else
                flight_end(f, 1, 1, key, w);
            if (owner[k] && (what == 4 || owner[k] == w)) {
                n[owner[k] - 1]--;
                owner[k] = 0;
            }
        } else if (rand() % 16 == 0) {
            flights_worker_gone(f, w);
            n[w - 1] = 0;
            for (k = 0; k < KEYS; k++)
                owner[k] = owner[k] == w ? 0 : owner[k];
        }
        flights_count(f, &n_flights, &n_waiters);
        ck_assert_uint_eq(n_flights, n[0] + n[1] + n[2]);
    }
    flights_destroy(f);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("store");
    TCase *t = tcase_create("store");
    SRunner *runner;
    int failed;

    tcase_set_timeout(t, 60);
    tcase_add_test(t, index_finds_what_was_put);
    tcase_add_test(t, index_memory_cannot_be_written_by_others);
    tcase_add_test(t, death_of_the_owner_shows);
    tcase_add_test(t, fingerprint_has_a_known_answer_and_feels_everything);
    tcase_add_test(t, impossible_spaces_are_refused_with_a_reason);
    tcase_add_test(t, flights_land_end_and_expire);
    tcase_add_test(t, flights_are_counted_by_worker);
    suite_add_tcase(s, t);
    runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
