/* Death at random moments: workers under load are killed with SIGKILL, daemons with workers attached likewise. No use of a block
 * ever sees a wrong byte, nothing of the dead stays, and who lives attaches again.
 *
 *   test_kill [WORKERS DAEMONS]     default 40 and 8; with KVD_STRESS=full 1000 and 200
 *
 * KVD_SEED repeats a run's choices (not the scheduler's). Times are printed; they are asserted only in a full run, because a busy
 * machine that is late is no defect of the program. */
#include <check.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/content.h"
#include "tests/harness.h"

enum { VICTIMS = 6, WITNESS = HARNESS_WORKERS_MAX - 1 };

static const char kinds[] = "raw,quant,slide,digest";

/* What the command line and the environment say; the suite's functions take no arguments. */
static unsigned number_of(const char *variable, unsigned small, unsigned full)
{
    const char *given = getenv(variable), *stress = getenv("KVD_STRESS");

    if (given)
        return (unsigned)strtoul(given, NULL, 10);
    return stress && strcmp(stress, "full") == 0 ? full : small;
}

static bool full_run(void)
{
    const char *stress = getenv("KVD_STRESS");

    return stress && strcmp(stress, "full") == 0;
}

struct crowd {
    struct harness h;
    struct board *board;
    char board_path[128];
    pid_t pids[HARNESS_WORKERS_MAX];
    uint64_t seed;
    uint64_t worst_clean_usec, worst_attach_usec, n_evicted;
};

static void crowd_init(struct crowd *c, const char *name)
{
    memset(c, 0, sizeof(*c));
    c->seed = test_seed(name);
    harness_init(&c->h);
    harness_option(&c->h, "host_bytes = 8M"); /* less than the load wants: evictions go on all the time */
    harness_option(&c->h, "index_entries = 4096");
    harness_start(&c->h);
    c->board = board_create(&c->h, c->board_path);
}

static void enter(struct crowd *c, unsigned slot)
{
    c->pids[slot] = stress_start(&c->h, c->board_path, slot, test_random(&c->seed), kinds);
}

/* A worker ends by our hand and no other. */
static void kill_one(struct crowd *c, unsigned slot)
{
    int status;

    if (kill(c->pids[slot], SIGKILL) < 0 || waitpid(c->pids[slot], &status, 0) != c->pids[slot])
        test_die(&c->h, "kill worker: %s", strerror(errno));
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        test_die(&c->h, "a worker ended by itself: status 0x%x", status);
    c->pids[slot] = 0;
}

static void check_alive(struct crowd *c)
{
    int status;

    for (unsigned i = 0; i < HARNESS_WORKERS_MAX; i++)
        if (c->pids[i] && waitpid(c->pids[i], &status, WNOHANG) != 0)
            test_die(&c->h, "worker %u ended by itself: status 0x%x", i, status);
}

struct sums {
    uint64_t uses, wrong, published, rounds, gone;
    uint64_t errors[32];
};

static struct sums sum_board(const struct crowd *c)
{
    struct sums s = {0};

    for (unsigned i = 0; i < HARNESS_WORKERS_MAX; i++) {
        const struct board_slot *b = &c->board->slot[i];

        s.uses += b->n_uses;
        s.wrong += b->n_wrong;
        s.published += b->n_published;
        s.rounds += b->n_rounds;
        s.gone += b->n_gone;
        for (int e = 0; e < 32; e++)
            s.errors[e] += b->n_errors[e];
    }
    return s;
}

/* Under load a worker may meet what the situation explains, and nothing else. */
static void check_sums(const struct crowd *c, const char *what, bool daemon_dies)
{
    static const int explained[] = {KVD_E_PARENT, KVD_E_FULL, KVD_E_QUOTA, KVD_E_LIMIT};
    static const int by_death[] = {KVD_E_GONE, KVD_E_CONNECT, KVD_E_STALE, KVD_E_TIMEOUT, KVD_E_SPACE, KVD_E_STAGING};
    struct sums s = sum_board(c);

    printf("%s: %llu blocks used and compared, %llu elements wrong, %llu published, %llu evicted, %llu rounds, clean after %.3f s, "
           "attached again after %.3f s at worst\n",
           what, (unsigned long long)s.uses, (unsigned long long)s.wrong, (unsigned long long)s.published,
           (unsigned long long)c->n_evicted, (unsigned long long)s.rounds, (double)c->worst_clean_usec / 1e6, (double)c->worst_attach_usec / 1e6);
    fflush(stdout);
    ck_assert_uint_eq(s.wrong, 0);
    ck_assert_uint_gt(s.uses, 10);
    ck_assert_uint_gt(s.published, 10);
    for (size_t i = 0; i < sizeof(explained) / sizeof(explained[0]); i++)
        s.errors[explained[i]] = 0;
    for (size_t i = 0; daemon_dies && i < sizeof(by_death) / sizeof(by_death[0]); i++)
        s.errors[by_death[i]] = 0;
    for (int e = 0; e < 32; e++)
        if (s.errors[e])
            test_die(&c->h, "%s: %llu unexplained errors: %s", what, (unsigned long long)s.errors[e], kvd_strerror(e));
}

/* All victims are dead: how long until the daemon knows, and is anything of theirs left? */
static void check_clean(struct crowd *c, size_t n_left)
{
    static const char *const must_be_zero[] = {"kvd_publishing_blocks", "kvd_jobs_waiting", "kvd_flights",
                                               "kvd_flight_waiters", "kvd_tenant_reserved_blocks", "kvd_staging_bytes"};
    struct kvd_selector all = {0};
    struct kvd_evict_result evicted;
    uint64_t begun = test_usec(), took;

    if (!harness_quiet(&c->h, n_left, 20000))
        test_die(&c->h, "dead workers are still listed after 20 s");
    for (size_t i = 0; n_left == 0 && i < sizeof(must_be_zero) / sizeof(must_be_zero[0]); i++)
        while (harness_stat(&c->h, must_be_zero[i], NULL) != 0) {
            if (test_usec() - begun > 20000000)
                test_die(&c->h, "%s is %llu, 20 s after everybody died", must_be_zero[i],
                         (unsigned long long)harness_stat(&c->h, must_be_zero[i], NULL));
            test_sleep_usec(2000);
        }
    took = test_usec() - begun;
    if (took > c->worst_clean_usec)
        c->worst_clean_usec = took;
    if (full_run())
        ck_assert_uint_lt(took, 1000000);
    if (n_left)
        return;
    ck_assert_uint_eq(harness_verify(&c->h), 0);
    c->n_evicted = harness_stat(&c->h, "kvd_tenant_evicted_total", NULL);
    ck_assert_int_eq(kvd_admin_evict(harness_admin(&c->h), &all, 0, 0, &evicted), KVD_OK);
    ck_assert_uint_eq(evicted.kept_leased, 0);
    ck_assert_uint_eq(evicted.kept_pinned, 0);
    ck_assert_uint_eq(harness_stat(&c->h, "kvd_tenant_blocks", NULL), 0);
    ck_assert_uint_eq(harness_stat(&c->h, "kvd_tenant_payload_bytes", NULL), 0);
}

static void crowd_deinit(struct crowd *c)
{
    ck_assert_uint_eq(harness_stat(&c->h, "kvd_corrupt_blocks_total", NULL), 0);
    ck_assert_uint_eq(harness_stat(&c->h, "kvd_worker_corrupt_total", NULL), 0);
    ck_assert_int_eq(harness_stop(&c->h), 0);
    board_destroy(c->board);
    harness_deinit(&c->h);
}

START_TEST(workers_die)
{
    unsigned n = number_of("KVD_KILL_WORKERS", 40, 1000);
    struct crowd c;

    crowd_init(&c, "workers");
    enter(&c, WITNESS);
    for (unsigned killed = 0; killed < n;) {
        for (unsigned i = 0; i < VICTIMS; i++)
            if (!c.pids[i])
                enter(&c, i);
        /* A third dies while it attaches or opens its spaces, the others in the middle of their work. */
        test_sleep_usec(test_random(&c.seed) % (test_random(&c.seed) % 3 ? 60000 : 4000));
        check_alive(&c);
        kill_one(&c, (unsigned)(test_random(&c.seed) % VICTIMS));
        if (++killed % 20 == 0) { /* all at once, and nothing stays */
            for (unsigned i = 0; i < VICTIMS; i++)
                if (c.pids[i])
                    kill_one(&c, i), killed++;
            check_clean(&c, 1);
        }
    }
    for (unsigned i = 0; i < VICTIMS; i++)
        if (c.pids[i])
            kill_one(&c, i);
    kill_one(&c, WITNESS);
    check_clean(&c, 0);
    ck_assert(harness_alive(&c.h));
    check_sums(&c, "workers killed", false);
    if (full_run()) /* a short one on a slow machine may not get so far */
        ck_assert_uint_gt(c.n_evicted, 0);
    crowd_deinit(&c);
}
END_TEST

/* Everybody works with the new daemon. */
static void await_attached(struct crowd *c, unsigned n_workers, uint64_t since_usec)
{
    for (unsigned i = 0; i < n_workers; i++)
        while (c->board->slot[i].alive_usec <= since_usec) {
            check_alive(c);
            if (test_usec() - since_usec > 30000000)
                test_die(&c->h, "worker %u has not attached again after 30 s", i);
            test_sleep_usec(1000);
        }
    if (test_usec() - since_usec > c->worst_attach_usec)
        c->worst_attach_usec = test_usec() - since_usec;
    if (full_run())
        ck_assert_uint_lt(c->worst_attach_usec, 5000000);
}

START_TEST(daemons_die)
{
    unsigned n = number_of("KVD_KILL_DAEMONS", 8, 200), n_workers = 4;
    struct crowd c;

    crowd_init(&c, "daemons");
    for (unsigned i = 0; i < n_workers; i++)
        enter(&c, i);
    await_attached(&c, n_workers, test_usec());
    c.worst_attach_usec = 0;
    for (unsigned killed = 0; killed < n; killed++) {
        uint64_t dead;

        test_sleep_usec(test_random(&c.seed) % (test_random(&c.seed) % 4 ? 80000 : 5000));
        ck_assert(harness_alive(&c.h));
        harness_kill(&c.h);
        dead = test_usec();
        if (test_random(&c.seed) % 4 == 0)
            test_sleep_usec(test_random(&c.seed) % 50000);
        harness_start(&c.h);
        await_attached(&c, n_workers, dead);
    }
    test_sleep_usec(100000);
    check_alive(&c);
    for (unsigned i = 0; i < n_workers; i++)
        kill_one(&c, i);
    check_clean(&c, 0);
    check_sums(&c, "daemons killed", true);
    crowd_deinit(&c);
}
END_TEST

#ifdef KVD_FAULT_POINTS
/* The daemon dies at a chosen instruction of a publish, not at a random one. */
static const char *const points[] = {"publish-after-reserve", "publish-after-submit", "publish-before-commit",
                                     "publish-after-commit", "publish-before-reply"};
enum { N_POINTS = sizeof(points) / sizeof(points[0]), MEETINGS = 6 };

START_TEST(a_daemon_dies_at_a_point)
{
    struct harness h;
    struct worker w;
    char fault[64];
    uint64_t begun;

    snprintf(fault, sizeof(fault), "%s:%d", points[_i / MEETINGS], 2 + _i % MEETINGS);
    harness_init(&h);
    setenv("KVD_FAULT", fault, 1);
    harness_start(&h);
    unsetenv("KVD_FAULT");
    worker_start(&w, &h, (uid_t)-1);
    ck_assert_int_eq(strncmp(worker_ask(&w, "open 0 raw 64"), "ok ", 3), 0);
    ck_assert_int_eq(strncmp(worker_ask(&w, "open 1 raw 64"), "ok ", 3), 0);
    ck_assert_str_eq(worker_ask(&w, "match 0 1 16"), "ok 0");
    ck_assert_str_eq(worker_ask(&w, "publish 0 0 1 0"), "ok 1 0 0"); /* the first meeting is let pass */
    ck_assert_str_eq(worker_ask(&w, "match 0 1 16"), "ok 16");
    for (int p = 1; p <= 2 * MEETINGS && harness_alive(&h); p++) {
        worker_ask(&w, "match 1 %d 96", p * 64);
        worker_ask(&w, "publish 1 0 6 0");
    }
    ck_assert_msg(!harness_alive(&h), "%s was never met", fault);
    h.pid = 0; /* collected by harness_alive() */
    ck_assert_int_eq(strncmp(w.reply, "error ", 6), 0);
    ck_assert_str_eq(worker_ask(&w, "load 0 verify"), "ok 1 0 0"); /* what is leased stays */
    harness_start(&h);
    for (begun = test_usec(); strcmp(worker_ask(&w, "ping"), "ok") != 0; test_sleep_usec(10000))
        if (test_usec() - begun > 30000000)
            test_die(&h, "the worker has not attached again after 30 s");
    ck_assert_str_eq(worker_ask(&w, "match 1 64 96"), "ok 0");
    ck_assert_str_eq(worker_ask(&w, "publish 1 0 6 0"), "ok 6 0 0");
    ck_assert_str_eq(worker_ask(&w, "match 1 64 96"), "ok 96");
    ck_assert_str_eq(worker_ask(&w, "load 1 verify"), "ok 6 0 0");
    ck_assert_int_eq(worker_stop(&w), 0);
    ck_assert(harness_quiet(&h, 0, 20000));
    ck_assert_uint_eq(harness_stat(&h, "kvd_tenant_reserved_blocks", NULL), 0);
    ck_assert_int_eq(harness_stop(&h), 0);
    harness_deinit(&h);
}
END_TEST
#endif

int main(int argc, char **argv)
{
    Suite *suite = suite_create("kill");
    TCase *tc = tcase_create("death at random moments");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    if (argc == 3) {
        setenv("KVD_KILL_WORKERS", argv[1], 1);
        setenv("KVD_KILL_DAEMONS", argv[2], 1);
    } else if (argc != 1) {
        fprintf(stderr, "usage: %s [WORKERS DAEMONS]\n", argv[0]);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(tc, 3600);
    tcase_add_test(tc, workers_die);
    tcase_add_test(tc, daemons_die);
#ifdef KVD_FAULT_POINTS
    tcase_add_loop_test(tc, a_daemon_dies_at_a_point, 0, N_POINTS * MEETINGS);
#endif
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
