/* Two processes share prefixes through the daemon: what one has published the other finds, leases and decodes to the right bytes;
 * what differs in anything is never found; no prefix is computed twice at once. */
#include <check.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "tests/harness.h"

struct fixture {
    struct harness h;
    struct worker a, b;
};

static struct fixture *setup(const char *option)
{
    struct fixture *f = calloc(1, sizeof(*f));

    if (!f)
        abort();
    harness_init(&f->h);
    if (option)
        harness_option(&f->h, option);
    harness_start(&f->h);
    worker_start(&f->a, &f->h, (uid_t)-1);
    worker_start(&f->b, &f->h, (uid_t)-1);
    return f;
}

/* Both workers leave in peace, nothing of theirs stays, every payload is sound. */
static void teardown(struct fixture *f)
{
    ck_assert_int_eq(worker_stop(&f->a), 0);
    ck_assert_int_eq(worker_stop(&f->b), 0);
    ck_assert(harness_quiet(&f->h, 0, 1000));
    ck_assert_uint_eq(harness_verify(&f->h), 0);
    ck_assert_int_eq(harness_stop(&f->h), 0);
    harness_deinit(&f->h);
    free(f);
}

#define SAYS(worker, answer, ...) ck_assert_str_eq(worker_ask(worker, __VA_ARGS__), answer)
#define OPENS(worker, place, kind)                                                                                     \
    ck_assert_int_eq(strncmp(worker_ask(worker, "open %d %s 64", place, kind), "ok ", 3), 0)

/* ---- one publishes, the other uses ---- */

static const char *const shared_kinds[] = {"raw", "bf16", "default", "quant", "latent", "digest", "wide"};

START_TEST(other_process_sees_it)
{
    struct fixture *f = setup(NULL);
    int block = strcmp(shared_kinds[_i], "default") == 0 || strcmp(shared_kinds[_i], "wide") == 0 ? 64 : 16;
    char four[16];

    snprintf(four, sizeof(four), "ok %d", 4 * block);
    OPENS(&f->a, 0, shared_kinds[_i]);
    OPENS(&f->b, 0, shared_kinds[_i]);
    SAYS(&f->a, "ok 0", "match 0 5 %d", 4 * block);
    SAYS(&f->b, "ok 0", "match 0 5 %d", 4 * block);
    SAYS(&f->a, "ok 4 0 0", "publish 0 0 4 0");
    SAYS(&f->b, four, "match 0 5 %d", 4 * block);
    SAYS(&f->b, "ok 4 0 0", "load 0");
    SAYS(&f->b, "ok 4 0 0", "load 0 verify");
    SAYS(&f->b, "ok 4 0 0", "layers 0");
    SAYS(&f->b, "ok 0 4 0", "publish 0 0 4 0");
    SAYS(&f->b, "ok 0", "release 0");
    SAYS(&f->a, four, "match 0 5 %d", 4 * block);
    SAYS(&f->a, "ok 4 0 0", "load 0 verify");
    teardown(f);
}
END_TEST

START_TEST(lengths)
{
    struct fixture *f = setup(NULL);

    OPENS(&f->a, 0, "raw");
    OPENS(&f->b, 0, "raw");
    SAYS(&f->a, "ok 0", "match 0 9 80"); /* an exact multiple: 5 blocks */
    SAYS(&f->a, "ok 5 0 0", "publish 0 0 5 0");
    SAYS(&f->b, "ok 0", "match 0 9 15"); /* shorter than a block */
    SAYS(&f->b, "ok 0", "match 0 9 0");
    SAYS(&f->b, "ok 16", "match 0 9 16");
    SAYS(&f->b, "ok 16", "match 0 9 31"); /* half of a block is none */
    SAYS(&f->b, "ok 1 0 0", "load 0");
    SAYS(&f->b, "ok 80", "match 0 9 80");
    SAYS(&f->b, "ok 80", "match 0 9 1000"); /* longer than what is there */
    SAYS(&f->b, "ok 5 0 0", "load 0");
    SAYS(&f->b, "ok 3", "trim 0 3");
    SAYS(&f->b, "ok 3 0 0", "load 0");
    SAYS(&f->b, "ok 0", "trim 0 0");
    /* Prompts 9 and 25 share their first two blocks (the tree of tests/content.h). */
    SAYS(&f->b, "ok 32", "match 0 25 80");
    SAYS(&f->b, "ok 2 0 0", "load 0");
    SAYS(&f->b, "ok 3 0 0", "publish 0 2 3 0");
    SAYS(&f->a, "ok 80", "match 0 25 80");
    SAYS(&f->a, "ok 5 0 0", "load 0 verify");
    teardown(f);
}
END_TEST

/* ---- never what differs ---- */

START_TEST(spaces_do_not_meet)
{
    static const char *const others[] = {"raw@other", "bf16@raw", "quant@raw", "small-block@raw", "wide@raw", "slide@raw"};
    struct fixture *f = setup(NULL);

    OPENS(&f->a, 0, "raw");
    SAYS(&f->a, "ok 0", "match 0 3 128");
    SAYS(&f->a, "ok 8 0 0", "publish 0 0 8 0");
    for (int i = 0; i < 6; i++) {
        OPENS(&f->b, i + 1, others[i]);
        SAYS(&f->b, "ok 0", "match %d 3 128", i + 1);
        SAYS(&f->b, "ok 2 0 0", "publish %d 0 2 0", i + 1);
    }
    for (int i = 0; i < 6; i++)
        ck_assert_int_eq(strncmp(worker_ask(&f->b, "load %d", i + 1), "ok 0 0 ", 7), 0); /* nothing matched yet */
    SAYS(&f->a, "ok 128", "match 0 3 128");
    SAYS(&f->a, "ok 8 0 0", "load 0 verify");
    SAYS(&f->b, "ok 32", "match 1 3 128");
    SAYS(&f->b, "ok 2 0 0", "load 1 verify");
    teardown(f);
}
END_TEST

START_TEST(extras_are_part_of_the_key)
{
    struct fixture *f = setup(NULL);

    OPENS(&f->a, 0, "raw");
    OPENS(&f->b, 0, "raw");
    SAYS(&f->a, "ok 0", "match 0 3 64 2 lora-a");
    SAYS(&f->a, "ok 4 0 0", "publish 0 0 4 0");
    SAYS(&f->b, "ok 64", "match 0 3 64 2 lora-a");
    SAYS(&f->b, "ok 4 0 0", "load 0");
    SAYS(&f->b, "ok 32", "match 0 3 64 2 lora-b"); /* up to where they differ */
    SAYS(&f->b, "ok 32", "match 0 3 64");
    SAYS(&f->b, "ok 0", "match 0 3 64 0 lora-a");
    teardown(f);
}
END_TEST

/* ---- layer groups ---- */

START_TEST(sliding_groups_need_only_their_window)
{
    struct fixture *f = setup(NULL);

    /* Group 0: full. Group 1: a window of 40 tokens, so the last 3 blocks of 16. */
    OPENS(&f->a, 0, "slide");
    OPENS(&f->b, 0, "slide");
    SAYS(&f->a, "ok 0", "match 0 1 160");
    SAYS(&f->a, "ok 10 0 0", "publish 0 0 10 1"); /* the full group alone is of no use */
    SAYS(&f->b, "ok 0", "match 0 1 160");
    SAYS(&f->a, "ok 3 0 0", "publish 0 5 3 2"); /* the sliding one's blocks 5, 6, 7 */
    SAYS(&f->b, "ok 128", "match 0 1 160");
    SAYS(&f->b, "ok 8 0 5", "load 0 verify"); /* blocks 0 to 4 are not held for group 1 */
    SAYS(&f->b, "ok 0", "trim 0 7");          /* block 4 of group 1 would be needed */
    SAYS(&f->a, "ok 2 0 0", "publish 0 8 2 2");
    SAYS(&f->b, "ok 160", "match 0 1 160");
    SAYS(&f->b, "ok 10 0 7", "layers 0");
    SAYS(&f->b, "ok 9", "trim 0 9");
    SAYS(&f->b, "ok 9 0 6", "load 0"); /* block 6 of group 1 is leased anew */
    teardown(f);
}
END_TEST

START_TEST(a_parent_must_be_there)
{
    struct fixture *f = setup(NULL);

    OPENS(&f->a, 0, "raw");
    SAYS(&f->a, "ok 0", "match 0 1 64");
    ck_assert_int_eq(strncmp(worker_ask(&f->a, "publish 0 1 1 0"), "error 12 ", 9), 0); /* KVD_E_PARENT */
    SAYS(&f->a, "ok 1 0 0", "publish 0 0 1 0");
    SAYS(&f->a, "ok 1 0 0", "publish 0 1 1 0");
    SAYS(&f->a, "ok 32", "match 0 1 64");
    SAYS(&f->a, "ok 2 0 0", "load 0");
    teardown(f);
}
END_TEST

START_TEST(nan_is_refused_by_codecs_that_cannot_hold_it)
{
    struct fixture *f = setup(NULL);

    OPENS(&f->a, 0, "quant");
    SAYS(&f->a, "ok 0", "match 0 1 64");
    ck_assert_int_eq(strncmp(worker_ask(&f->a, "spoil 0 0 4"), "error 14 ", 9), 0); /* KVD_E_VALUE */
    SAYS(&f->a, "ok 0", "match 0 1 64");
    SAYS(&f->a, "ok 4 0 0", "publish 0 0 4 0");
    SAYS(&f->a, "ok 64", "match 0 1 64");
    SAYS(&f->a, "ok 4 0 0", "load 0 verify");
    teardown(f);
}
END_TEST

/* ---- flights ---- */

START_TEST(one_computes_the_other_waits)
{
    struct fixture *f = setup(NULL);

    OPENS(&f->a, 0, "raw");
    OPENS(&f->b, 0, "raw");
    SAYS(&f->a, "ok 0", "match 0 1 48");
    SAYS(&f->b, "ok 0", "match 0 1 64");
    SAYS(&f->a, "ok ggg", "flight 0 0 3");
    SAYS(&f->a, "ok ggg", "flight 0 0 3"); /* its own: granted again */
    SAYS(&f->b, "ok bbbg", "flight 0 0 4");
    worker_tell(&f->b, "wait 0 2 10000");
    SAYS(&f->a, "ok 3 0 0", "publish 0 0 3 0");
    ck_assert_str_eq(worker_answer(&f->b), "ok landed");
    SAYS(&f->b, "ok lllg", "flight 0 0 4");
    SAYS(&f->b, "ok 48", "match 0 1 64");
    SAYS(&f->b, "ok 3 0 0", "load 0 verify");
    SAYS(&f->b, "ok", "end 0 3 1");
    SAYS(&f->a, "ok landed", "wait 0 0 100000"); /* it is there: no waiting */
    SAYS(&f->a, "ok 0", "match 0 65 48");
    SAYS(&f->a, "ok given-up", "wait 0 0 100000"); /* nobody is on it */
    teardown(f);
}
END_TEST

START_TEST(a_flight_ends_with_its_owner)
{
    struct fixture *f = setup(NULL);
    struct worker c;

    OPENS(&f->a, 0, "raw");
    worker_start(&c, &f->h, (uid_t)-1);
    OPENS(&c, 0, "raw");
    SAYS(&c, "ok 0", "match 0 1 64");
    SAYS(&f->a, "ok 0", "match 0 1 64");
    SAYS(&c, "ok gggg", "flight 0 0 4");
    SAYS(&f->a, "ok bbbb", "flight 0 0 4");
    SAYS(&f->a, "ok timeout", "wait 0 1 20");
    worker_tell(&f->a, "wait 0 1 60000");
    test_sleep_usec(20000);
    worker_kill(&c);
    ck_assert_str_eq(worker_answer(&f->a), "ok given-up");
    SAYS(&f->a, "ok gggg", "flight 0 0 4");
    worker_tell(&f->b, "open 0 raw 64");
    ck_assert_int_eq(strncmp(worker_answer(&f->b), "ok ", 3), 0);
    SAYS(&f->b, "ok 0", "match 0 1 64");
    worker_tell(&f->b, "wait 0 3 60000");
    test_sleep_usec(20000);
    SAYS(&f->a, "ok", "end 0 0 4");
    ck_assert_str_eq(worker_answer(&f->b), "ok given-up");
    teardown(f);
}
END_TEST

/* ---- a life with interruptions ---- */

START_TEST(a_restart_is_survived)
{
    struct fixture *f = setup(NULL);
    uint64_t begun;

    OPENS(&f->a, 0, "raw");
    SAYS(&f->a, "ok 0", "match 0 1 64");
    SAYS(&f->a, "ok 4 0 0", "publish 0 0 4 0");
    SAYS(&f->a, "ok 64", "match 0 1 64");
    harness_kill(&f->h);
    SAYS(&f->a, "ok 4 0 0", "load 0 verify"); /* leased memory outlives the daemon */
    harness_start(&f->h);
    begun = test_usec();
    while (strncmp(worker_ask(&f->a, "ping"), "ok", 2) != 0) {
        ck_assert_uint_lt(test_usec() - begun, 5000000);
        test_sleep_usec(10000);
    }
    SAYS(&f->a, "ok 0", "match 0 1 64"); /* the new daemon's cache is empty */
    SAYS(&f->a, "ok 4 0 0", "publish 0 0 4 0");
    SAYS(&f->a, "ok 64", "match 0 1 64");
    SAYS(&f->a, "ok 4 0 0", "load 0 verify");
    OPENS(&f->b, 0, "raw");
    SAYS(&f->b, "ok 64", "match 0 1 64");
    SAYS(&f->b, "ok 4 0 0", "load 0 verify");
    teardown(f);
}
END_TEST

START_TEST(a_forked_child_is_told)
{
    struct fixture *f = setup(NULL);

    SAYS(&f->a, "ok 18", "fork"); /* KVD_E_FORKED */
    SAYS(&f->a, "ok", "ping");
    teardown(f);
}
END_TEST

/* Far more than fits: what stays is right, a leased chain stays whole. */
START_TEST(a_leased_chain_stays_under_pressure)
{
    struct fixture *f = setup("host_bytes = 8M");
    size_t kept;

    OPENS(&f->a, 0, "raw");
    OPENS(&f->b, 0, "raw");
    SAYS(&f->a, "ok 0", "match 0 1 160");
    SAYS(&f->a, "ok 10 0 0", "publish 0 0 10 0");
    SAYS(&f->a, "ok 160", "match 0 1 160");
    for (int p = 64; p < 64 + 64 * 120; p += 64) { /* no common first block */
        ck_assert_int_eq(strncmp(worker_ask(&f->b, "match 0 %d 160", p), "ok ", 3), 0);
        SAYS(&f->b, "ok 10 0 0", "publish 0 0 10 0");
    }
    SAYS(&f->a, "ok 10 0 0", "load 0 verify");
    SAYS(&f->a, "ok 160", "match 0 1 160");
    SAYS(&f->a, "ok 10 0 0", "load 0 verify");
    ck_assert_int_eq(sscanf(worker_ask(&f->b, "match 0 %d 160", 64 * 120), "ok %zu", &kept), 1);
    ck_assert_uint_eq(kept, 160); /* the newest */
    SAYS(&f->b, "ok 10 0 0", "load 0 verify");
    teardown(f);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("share");
    TCase *tc = tcase_create("two processes");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, other_process_sees_it, 0, sizeof(shared_kinds) / sizeof(shared_kinds[0]));
    tcase_add_test(tc, lengths);
    tcase_add_test(tc, spaces_do_not_meet);
    tcase_add_test(tc, extras_are_part_of_the_key);
    tcase_add_test(tc, sliding_groups_need_only_their_window);
    tcase_add_test(tc, a_parent_must_be_there);
    tcase_add_test(tc, nan_is_refused_by_codecs_that_cannot_hold_it);
    tcase_add_test(tc, one_computes_the_other_waits);
    tcase_add_test(tc, a_flight_ends_with_its_owner);
    tcase_add_test(tc, a_restart_is_survived);
    tcase_add_test(tc, a_forked_child_is_told);
    tcase_add_test(tc, a_leased_chain_stays_under_pressure);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
