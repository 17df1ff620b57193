/* Attention by the daemon with real processes: right against fp64 attention over loaded values, also when many ask at once, when one of
 * them dies in the middle, when blocks are evicted meanwhile, and when the daemon goes. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/attend_fixture.h"

static const struct at_shape shapes[] = {
    /* name, KV heads, ratio, K, V, codecs, first, window, block, dtype, bound */
    {"default", 2, 4, 128, 128, NULL, NULL, NULL, NULL, 0, 64, KVD_F16, 1e-2},
    {"mha", 4, 1, 64, 64, NULL, NULL, NULL, NULL, 0, 64, KVD_F16, 1e-2},
    {"mqa", 1, 8, 256, 256, NULL, NULL, NULL, NULL, 0, 64, KVD_BF16, 1e-2},
    {"raw", 2, 4, 64, 64, "raw", "raw", NULL, NULL, 0, 16, KVD_F16, 1e-2},
    {"f32", 1, 1, 80, 96, "raw", "raw", NULL, NULL, 0, 16, KVD_F32, 1e-2},
    {"latent", 1, 16, 576, 0, NULL, NULL, NULL, NULL, 0, 64, KVD_BF16, 1e-2},
    {"slide", 2, 4, 128, 128, NULL, NULL, NULL, NULL, 300, 64, KVD_F16, 1e-2},
};
enum { N_SHAPES = sizeof(shapes) / sizeof(shapes[0]), BLOCKS = 11, WORKERS = 6 };

static struct at_bed bed;

static uint32_t below(uint32_t n)
{
    return (uint32_t)(test_random(&bed.random) % n);
}

static int attend(kvd_prefix *prefix, const struct kvd_attention *a)
{
    uint64_t ticket;
    int r = kvd_attend_submit(prefix, a, 0, &ticket);

    return r == KVD_OK ? kvd_attend_collect(prefix, ticket, 20000) : r;
}

static void attend_and_compare(struct at_call *c, const char *what)
{
    int r = attend(bed.prefix, &c->a);

    ck_assert_msg(r == KVD_OK, "%s: %s: %s (%s)", bed.shape.name, what, kvd_strerror(r), kvd_message(bed.k));
    at_compare(&bed, c, bed.shape.bound, what);
}

/* ---- against the definition ---- */

START_TEST(every_shape)
{
    at_setup(&bed, "every_shape", NULL);
    for (size_t i = 0; i < N_SHAPES; i++) {
        at_setup_space(&bed, &shapes[i], BLOCKS);
        for (int round = 0; round < 6; round++) {
            struct at_call c;

            at_call_init(&c, &bed, round < 4 ? 1 : 1 + below(5), round % 3);
            c.a.layer = below(AT_LAYERS);
            c.a.softcap = round == 2 ? 20 : 0;
            if (round == 3)
                c.a.mass = NULL;
            if (round == 5 && !bed.shape.window) {
                c.a.first_block = below(BLOCKS);
                c.a.n_blocks = 1 + below((uint32_t)(BLOCKS - c.a.first_block));
                c.a.first_position = below(BLOCKS * bed.shape.block_tokens);
                c.a.window_tokens = 1 + below(200);
                c.a.sink_tokens = below(100);
            }
            attend_and_compare(&c, "random");
            at_call_deinit(&c);
        }
        at_teardown_space(&bed);
    }
    ck_assert_uint_ge(harness_stat(&bed.h, "kvd_attend_done_total", NULL), N_SHAPES * 6);
    ck_assert_uint_eq(harness_stat(&bed.h, "kvd_attend_failed_total", NULL), 0);
    at_teardown(&bed);
}
END_TEST

/* ---- several processes ---- */

/* In a child: attaches for itself and leases and loads the same prefix. */
static void join(struct at_bed *b, uint64_t seed)
{
    b->random = seed;
    at_attach(b, &b->k);
    b->space = at_space(b->k, &b->shape);
    ck_assert_int_eq(kvd_prefix_create(b->space, AT_BLOCKS_MAX, &b->prefix), KVD_OK);
    at_match_and_load(b);
}

/* A random attention over a random part of the prefix. */
static void random_call(struct at_call *c, struct at_bed *b)
{
    at_call_init(c, b, 1 + (uint32_t)(test_random(&b->random) % 3), KVD_F16);
    c->a.layer = (uint32_t)(test_random(&b->random) % AT_LAYERS);
    c->a.n_blocks = 1 + (size_t)(test_random(&b->random) % b->n_blocks);
    c->a.first_block = test_random(&b->random) % 4 ? 0 : (size_t)(test_random(&b->random) % (b->n_blocks - c->a.n_blocks + 1));
    c->a.mass = test_random(&b->random) % 2 ? c->mass : NULL;
}

/* A child that asks n times (0: until it is killed) and compares. */
static pid_t start_asker(uint64_t seed, int n)
{
    pid_t pid = test_fork();

    if (pid == 0) {
        struct at_bed b = bed;

        join(&b, seed);
        for (int i = 0; n == 0 || i < n; i++) {
            struct at_call c;
            int r;

            random_call(&c, &b);
            r = attend(b.prefix, &c.a);
            ck_assert_msg(r == KVD_OK, "%s (%s)", kvd_strerror(r), kvd_message(b.k));
            at_compare(&b, &c, b.shape.bound, "of many");
            at_call_deinit(&c);
        }
        kvd_detach(b.k);
        _exit(0);
    }
    return pid;
}

static int exit_of(pid_t pid)
{
    int status = -1;

    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    return status;
}

START_TEST(many_processes)
{
    pid_t pids[WORKERS];

    at_setup(&bed, "many_processes", NULL);
    at_setup_space(&bed, &shapes[0], BLOCKS);
    for (int i = 0; i < WORKERS; i++)
        pids[i] = start_asker(test_random(&bed.random), 60);
    for (int i = 0; i < WORKERS; i++)
        ck_assert_int_eq(exit_of(pids[i]), 0);
    ck_assert_uint_eq(harness_stat(&bed.h, "kvd_attend_done_total", NULL), WORKERS * 60);
    ck_assert_uint_lt(harness_stat(&bed.h, "kvd_attend_batches_total", NULL), WORKERS * 60);
    ck_assert_uint_lt(harness_stat(&bed.h, "kvd_attend_read_bytes_total", NULL), harness_stat(&bed.h, "kvd_attend_needed_bytes_total", NULL));
    at_teardown_space(&bed);
    at_teardown(&bed);
}
END_TEST

/* One after another dies in the middle of what it asked for; the others are unharmed, and nothing of it is held. */
START_TEST(killed_in_a_batch)
{
    pid_t lasting[3];

    at_setup(&bed, "killed_in_a_batch", NULL);
    at_setup_space(&bed, &shapes[0], BLOCKS);
    for (int i = 0; i < 3; i++)
        lasting[i] = start_asker(test_random(&bed.random), 150);
    for (int i = 0; i < 12; i++) {
        pid_t pid = start_asker(test_random(&bed.random), 0);

        test_sleep_usec(30000 + below(40000));
        kill(pid, SIGKILL);
        ck_assert_int_eq(exit_of(pid), SIGKILL);
    }
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(exit_of(lasting[i]), 0);
    ck_assert(harness_quiet(&bed.h, 1, 5000));
    ck_assert_uint_eq(harness_stat(&bed.h, "kvd_attend_queue_bytes", NULL), 0);
    ck_assert_uint_eq(harness_stat(&bed.h, "kvd_attend_rings", NULL), 0);
    ck_assert_uint_eq(harness_verify(&bed.h), 0);
    at_teardown_space(&bed);
    at_teardown(&bed);
}
END_TEST

/* Another worker publishes all the time, more than there is room for: what is leased is attended to as it was. */
START_TEST(under_eviction)
{
    pid_t pids[3], publisher;

    at_setup(&bed, "under_eviction", "host_bytes = 8M");
    at_setup_space(&bed, &shapes[0], BLOCKS);
    publisher = test_fork();
    if (publisher == 0) {
        struct at_bed b = bed;
        uint32_t tokens[20 * 64];

        at_attach(&b, &b.k);
        b.space = at_space(b.k, &b.shape);
        ck_assert_int_eq(kvd_prefix_create(b.space, AT_BLOCKS_MAX, &b.prefix), KVD_OK);
        for (;;) {
            for (size_t i = 0; i < 20 * 64; i++)
                tokens[i] = (uint32_t)test_random(&b.random) % 50000;
            at_publish(&b, b.prefix, tokens, 20);
        }
    }
    while (harness_stat(&bed.h, "kvd_tenant_evicted_total", NULL) == 0)
        test_sleep_usec(1000);
    for (int i = 0; i < 3; i++)
        pids[i] = start_asker(test_random(&bed.random), 100);
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(exit_of(pids[i]), 0);
    kill(publisher, SIGKILL);
    ck_assert_int_eq(exit_of(publisher), SIGKILL);
    at_teardown_space(&bed);
    at_teardown(&bed);
}
END_TEST

/* ---- one process, several threads ---- */

static void *asking_thread(void *ctx)
{
    struct at_bed b = bed; /* the same session, a prefix of its own */
    uint64_t seed = (uint64_t)(uintptr_t)ctx;

    b.random = seed;
    ck_assert_int_eq(kvd_prefix_create(b.space, AT_BLOCKS_MAX, &b.prefix), KVD_OK);
    ck_assert_int_eq(kvd_match(b.prefix, b.tokens, b.n_blocks * b.shape.block_tokens, NULL, 0, NULL), KVD_OK);
    for (int i = 0; i < 40; i++) {
        struct at_call c[4];
        uint64_t tickets[4];

        for (int k = 0; k < 4; k++) { /* several under way, collected the other way round, one of them given up */
            random_call(&c[k], &b);
            ck_assert_int_eq(kvd_attend_submit(b.prefix, &c[k].a, 0, &tickets[k]), KVD_OK);
        }
        kvd_attend_cancel(b.prefix, tickets[1]);
        for (int k = 3; k >= 0; k--) {
            if (k != 1) {
                ck_assert_int_eq(kvd_attend_collect(b.prefix, tickets[k], -1), KVD_OK);
                at_compare(&b, &c[k], b.shape.bound, "threads");
            }
            at_call_deinit(&c[k]);
        }
    }
    kvd_prefix_destroy(b.prefix);
    return NULL;
}

START_TEST(several_threads)
{
    pthread_t t[4];

    at_setup(&bed, "threads", NULL);
    at_setup_space(&bed, &shapes[0], BLOCKS);
    for (uintptr_t i = 0; i < 4; i++)
        ck_assert_int_eq(pthread_create(&t[i], NULL, asking_thread, (void *)(i + 1 + (uintptr_t)bed.random)), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    at_teardown_space(&bed);
    at_teardown(&bed);
}
END_TEST

/* ---- tickets and limits ---- */

static void says(const char *text)
{
    ck_assert_msg(strstr(kvd_message(bed.k), text) != NULL, "\"%s\" does not say \"%s\"", kvd_message(bed.k), text);
}

START_TEST(ring_full)
{
    struct at_call c[17];
    uint64_t tickets[17];

    at_setup(&bed, "ring_full", "attend_ring = 16");
    at_setup_space(&bed, &shapes[3], BLOCKS);
    for (int i = 0; i < 17; i++)
        at_call_init(&c[i], &bed, 1, KVD_F16);
    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < 16; i++)
            ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c[i].a, 0, &tickets[i]), KVD_OK);
        ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c[16].a, 0, &tickets[16]), KVD_E_LIMIT);
        says("all 16 requests");
        for (int i = 0; i < 16; i++) {
            ck_assert_int_eq(kvd_attend_collect(bed.prefix, tickets[i], 10000), KVD_OK);
            at_compare(&bed, &c[i], bed.shape.bound, "full ring");
        }
    }
    for (int round = 0; round < 200; round++) { /* given up ones make room as soon as the daemon has answered them */
        int r;

        while ((r = kvd_attend_submit(bed.prefix, &c[0].a, 0, &tickets[0])) == KVD_E_LIMIT)
            test_sleep_usec(100);
        ck_assert_int_eq(r, KVD_OK);
        kvd_attend_cancel(bed.prefix, tickets[0]);
    }
    ck_assert_int_eq(attend(bed.prefix, &c[0].a), KVD_OK);
    for (int i = 0; i < 17; i++)
        at_call_deinit(&c[i]);
    at_teardown_space(&bed);
    at_teardown(&bed);
}
END_TEST

START_TEST(ticket_rules)
{
    struct at_call c;
    uint64_t ticket, other;
    pid_t pid;

    at_setup(&bed, "ticket_rules", NULL);
    at_setup_space(&bed, &shapes[3], BLOCKS);
    at_call_init(&c, &bed, 1, KVD_F32);
    ck_assert_int_eq(kvd_attend_collect(bed.prefix, 0, 0), KVD_E_STALE);
    ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c.a, 0, NULL), KVD_E_ARG);
    ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c.a, 0, &ticket), KVD_OK);
    pid = test_fork();
    if (pid == 0)
        _exit(kvd_attend_submit(bed.prefix, &c.a, 0, &other) != KVD_E_FORKED || kvd_attend_collect(bed.prefix, ticket, 0) != KVD_E_FORKED);
    ck_assert_int_eq(exit_of(pid), 0);
    ck_assert_int_eq(kvd_attend_collect(bed.prefix, ticket, 10000), KVD_OK);
    ck_assert_int_eq(kvd_attend_collect(bed.prefix, ticket, 10000), KVD_E_ARG);
    says("none that waits");
    kvd_attend_cancel(bed.prefix, ticket); /* nothing */
    ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c.a, 1, &ticket), KVD_OK); /* a microsecond is over at once */
    test_sleep_usec(1000);
    ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c.a, 0, &other), KVD_OK);
    ck_assert_int_eq(kvd_attend_collect(bed.prefix, other, 10000), KVD_OK);
    for (int i = 0; i < 2; i++) { /* it was either computed in that time, or it stays late until it is cancelled */
        int r = kvd_attend_collect(bed.prefix, ticket, 10000);

        ck_assert_int_eq(r, i == 0 && r == KVD_OK ? KVD_OK : r == KVD_E_ARG ? KVD_E_ARG : KVD_E_TIMEOUT);
    }
    kvd_attend_cancel(bed.prefix, ticket);
    ((float *)c.q_memory)[40] = NAN;
    ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c.a, 0, &ticket), KVD_E_ARG);
    says("nan");
    ((float *)c.q_memory)[40] = 0;
    ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c.a, 0, &ticket), KVD_OK);
    kvd_release(bed.prefix);
    ck_assert_int_eq(kvd_attend_collect(bed.prefix, ticket, 1000), KVD_E_STALE);
    ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c.a, 0, &ticket), KVD_E_STALE);
    at_call_deinit(&c);
    at_teardown_space(&bed);
    at_teardown(&bed);
}
END_TEST

START_TEST(memory_limits)
{
    struct at_call c[64];
    uint64_t tickets[64];
    int n = 0, r = KVD_OK;

    at_setup(&bed, "memory_limits", "attend_bytes = 1M\nattend_request_bytes = 300K");
    at_setup_space(&bed, &shapes[0], BLOCKS);
    at_call_init(&c[0], &bed, 40, KVD_F16);
    ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c[0].a, 0, &tickets[0]), KVD_E_LIMIT);
    says("attend_request_bytes");
    at_call_deinit(&c[0]);
    for (; n < 64 && r == KVD_OK; n++) {
        at_call_init(&c[n], &bed, 30, KVD_F16);
        r = kvd_attend_submit(bed.prefix, &c[n].a, 0, &tickets[n]);
    }
    ck_assert_int_eq(r, KVD_E_LIMIT);
    says("attend_bytes");
    for (int i = 0; i < n; i++) {
        if (i + 1 < n)
            ck_assert_int_eq(kvd_attend_collect(bed.prefix, tickets[i], 20000), KVD_OK);
        at_call_deinit(&c[i]);
    }
    at_teardown_space(&bed);
    at_teardown(&bed);
}
END_TEST

/* ---- ends ---- */

START_TEST(daemon_killed)
{
    at_setup(&bed, "daemon_killed", NULL);
    for (int round = 0; round < 3; round++) {
        struct at_call c[50];
        uint64_t tickets[50];
        int n_gone = 0;

        at_setup_space(&bed, &shapes[0], BLOCKS);
        for (int i = 0; i < 50; i++) {
            at_call_init(&c[i], &bed, 4, KVD_F16);
            ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c[i].a, 0, &tickets[i]), KVD_OK);
        }
        harness_kill(&bed.h);
        for (int i = 0; i < 50; i++) {
            int r = kvd_attend_collect(bed.prefix, tickets[i], -1);

            ck_assert(r == KVD_OK || r == KVD_E_GONE);
            if (r == KVD_OK)
                at_compare(&bed, &c[i], bed.shape.bound, "before it was killed");
            n_gone += r == KVD_E_GONE;
        }
        printf("daemon killed: %d of 50 were not answered\n", n_gone);
        ck_assert_int_eq(kvd_attend_submit(bed.prefix, &c[0].a, 0, &tickets[0]), KVD_E_GONE);
        for (int i = 0; i < 50; i++)
            at_call_deinit(&c[i]);
        at_teardown_space(&bed);
        harness_start(&bed.h);
        while (kvd_ping(bed.k) != KVD_OK)
            test_sleep_usec(20000);
    }
    at_teardown(&bed);
}
END_TEST

/* A worker whose session the daemon ends while it lives. */
START_TEST(cut_off)
{
    struct at_call c;
    char junk[30] = "this is not a frame of kvd's";
    uint64_t ticket;
    int r = KVD_OK, fd = -1;

    at_setup(&bed, "cut_off", NULL);
    at_setup_space(&bed, &shapes[0], BLOCKS);
    at_call_init(&c, &bed, 1, KVD_F16);
    ck_assert_int_eq(attend(bed.prefix, &c.a), KVD_OK);
    for (int i = 3; i < 100; i++) { /* the last of ours that is an attach socket: the harness has one too, but had it before */
        struct sockaddr_un peer = {0};
        socklen_t n = sizeof(peer);

        if (getpeername(i, (struct sockaddr *)&peer, &n) == 0 && strcmp(peer.sun_path, bed.h.socket) == 0)
            fd = i;
    }
    for (int i = 0; i < 40; i++)
        if (send(fd, junk, sizeof(junk), MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
            break;
    while (r == KVD_OK) {
        r = kvd_attend_submit(bed.prefix, &c.a, 0, &ticket);
        if (r == KVD_OK)
            r = kvd_attend_collect(bed.prefix, ticket, -1);
    }
    ck_assert_int_eq(r, KVD_E_STALE);
    ck_assert_uint_eq(harness_stat(&bed.h, "kvd_attend_rings", NULL), 0);
    at_call_deinit(&c);
    at_teardown_space(&bed);
    at_teardown(&bed);
}
END_TEST

/* A stop in order while there is work: the daemon ends, and nobody waits for ever. */
START_TEST(daemon_stops)
{
    pid_t pid;
    struct at_call c;
    int r = KVD_OK;

    at_setup(&bed, "daemon_stops", NULL);
    at_setup_space(&bed, &shapes[0], BLOCKS);
    at_call_init(&c, &bed, 4, KVD_F16);
    pid = test_fork();
    if (pid == 0) {
        test_sleep_usec(200000);
        kill(bed.h.pid, SIGTERM);
        _exit(0);
    }
    while (r == KVD_OK)
        r = attend(bed.prefix, &c.a);
    ck_assert_msg(r == KVD_E_GONE || r == KVD_E_STALE, "%s (%s)", kvd_strerror(r), kvd_message(bed.k));
    ck_assert_int_eq(exit_of(pid), 0);
    at_call_deinit(&c);
    at_teardown_space(&bed);
    bed.k = kvd_detach(bed.k);
    ck_assert_int_eq(harness_stop(&bed.h), 0);
    harness_deinit(&bed.h);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("attend_daemon");
    TCase *tc = tcase_create("daemon");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(tc, 240);
    tcase_add_test(tc, every_shape);
    tcase_add_test(tc, many_processes);
    tcase_add_test(tc, killed_in_a_batch);
    tcase_add_test(tc, under_eviction);
    tcase_add_test(tc, several_threads);
    tcase_add_test(tc, ring_full);
    tcase_add_test(tc, ticket_rules);
    tcase_add_test(tc, memory_limits);
    tcase_add_test(tc, daemon_killed);
    tcase_add_test(tc, cut_off);
    tcase_add_test(tc, daemon_stops);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
