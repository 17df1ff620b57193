/* Every bound, and what is said when it is met: an error code, a sentence that names what was wrong and what is allowed, a counter
 * that moves, and nothing for the others to feel. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/content.h"
#include "tests/harness.h"
#include "tests/limits_fixture.h"
#include "tests/rawclient.h"

/* The raw client's last answer is this error, with a reason and with what is allowed. */
static void expect_refusal(const struct fixture *f, uint32_t error)
{
    const char *allowed = strstr(f->raw.reply.reason, "; allowed: ");

    ck_assert_msg(f->raw.reply.error == error, "error %u (%s) instead of %u", f->raw.reply.error, f->raw.reply.reason, error);
    ck_assert_msg(allowed - f->raw.reply.reason > 5, "no reason: %s", f->raw.reply.reason);
}

static void expect_log(const struct harness *h, const char *word)
{
    char *text = harness_log_text(h);

    ck_assert_msg(strstr(text, word), "no \"%s\" in what the daemon said:\n%s", word, text);
    free(text);
}

/* ---- starting ---- */

struct bad_line {
    const char *line, *word1, *word2;
};

static const struct bad_line bad_lines[] = {
    {"nonsense = 3", "nonsense", "kvd.conf:"},      {"host_bytes = tiny", "host_bytes", "allowed"},
    {"leases = 3", "leases", "16"},                 {"hugepages = perhaps", "hugepages", "auto"},
    {"slab_bytes = 3M", "slab_bytes", "2M"},        {"this is no line", "kvd.conf:", "="},
    {"socket_mode = 999", "socket_mode", "allowed"}, {"hello_timeout = 5 fortnights", "hello_timeout", "allowed"},
    {"[tenant x]\nweight = 0", "weight", "allowed"}, {"[nobody]\nuid = 1", "nobody", "kvd.conf:"},
    {"host_bytes = 99999999999999999999999", "host_bytes", "allowed"},
};

START_TEST(a_wrong_line_is_refused)
{
    struct harness h;
    int status;

    harness_init(&h);
    harness_option(&h, bad_lines[_i].line);
    harness_write_config(&h);
    status = harness_start_refused(&h, NULL);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) != 0);
    expect_log(&h, bad_lines[_i].word1);
    expect_log(&h, bad_lines[_i].word2);
    ck_assert_int_eq(access(h.socket, F_OK), -1);
    harness_deinit(&h);
}
END_TEST

START_TEST(a_wrong_flag_is_refused)
{
    struct harness h;
    int status;

    harness_init(&h);
    harness_write_config(&h);
    status = harness_start_refused(&h, "--frobnicate=7");
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) != 0);
    expect_log(&h, "frobnicate");
    harness_deinit(&h);
}
END_TEST

START_TEST(a_second_daemon_is_refused)
{
    struct fixture *f = setup(NULL, NULL);
    int status = harness_start_refused(&f->h, NULL);

    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) != 0);
    expect_log(&f->h, f->h.socket);
    ck_assert(harness_alive(&f->h));
    OK(f, "open 0 raw 8");
    teardown(f);
}
END_TEST

START_TEST(a_path_that_is_no_socket_is_left_alone)
{
    struct harness h;
    struct stat st;
    int status, fd;

    harness_init(&h);
    harness_write_config(&h);
    fd = open(h.socket, O_WRONLY | O_CREAT, 0600);
    ck_assert_int_eq((int)write(fd, "precious", 8), 8);
    close(fd);
    status = harness_start_refused(&h, NULL);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) != 0);
    expect_log(&h, h.socket);
    ck_assert_int_eq(stat(h.socket, &st), 0);
    ck_assert_int_eq((int)st.st_size, 8);
    harness_deinit(&h);
}
END_TEST

START_TEST(a_socket_of_a_dead_daemon_is_replaced)
{
    struct fixture *f = setup(NULL, NULL);

    harness_kill(&f->h);
    ck_assert_int_eq(access(f->h.socket, F_OK), 0);
    harness_start(&f->h);
    while (strcmp(worker_ask(&f->w, "ping"), "ok") != 0)
        test_sleep_usec(20000);
    teardown(f);
}
END_TEST

START_TEST(no_permission)
{
    struct fixture *f = setup("socket_mode = 0600", NULL);
    struct worker other;
    struct harness h;
    int status;

    worker_start(&other, &f->h, 65534);
    expect_error(worker_ask(&other, "ping"), KVD_E_CONNECT, f->h.socket);
    worker_stop(&other);
    teardown(f);

    harness_init(&h); /* a daemon that may not make its socket where it is told to */
    harness_write_config(&h);
    ck_assert_int_eq(close(open(h.log, O_WRONLY | O_CREAT, 0666)), 0);
    ck_assert_int_eq(chmod(h.log, 0666), 0);
    h.uid = 65533;
    status = harness_start_refused(&h, NULL);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) != 0);
    expect_log(&h, h.dir);
    expect_log(&h, "ermission");
    h.uid = getuid();
    harness_deinit(&h);
}
END_TEST

/* ---- sessions ---- */

START_TEST(no_tenant_no_session)
{
    struct harness h;
    struct worker other;
    uint64_t before;

    harness_init(&h);
    harness_option(&h, "default_tenant = none");
    harness_option(&h, "socket_mode = 0666");
    harness_option(&h, "[tenant a]");
    harness_option(&h, "uid = 65532");
    harness_start(&h);
    before = harness_stat(&h, "kvd_sessions_refused_total", NULL);
    worker_start(&other, &h, 65534);
    expect_error(worker_ask(&other, "ping"), KVD_E_DENIED, "[tenant]");
    worker_stop(&other);
    ck_assert_uint_gt(harness_stat(&h, "kvd_sessions_refused_total", NULL), before);
    worker_start(&other, &h, 65532);
    ck_assert_ptr_nonnull(strstr(worker_ask(&other, "info"), "tenant=a "));
    worker_stop(&other);
    ck_assert_int_eq(harness_stop(&h), 0);
    harness_deinit(&h);
}
END_TEST

START_TEST(sessions_are_bounded)
{
    struct fixture *f = setup("sessions_max = 6", "sessions_per_uid = 6"); /* the first is not for root */
    struct raw raw[8];
    int n = 0, error = 0;

    for (; n < 8 && !error; n++) {
        ck_assert_int_eq(raw_connect(&raw[n], f->h.socket), 0);
        error = raw_hello(&raw[n], "one more");
    }
    ck_assert_int_eq(error, KVD_E_LIMIT);
    ck_assert_ptr_nonnull(strstr(raw[n - 1].reply.reason, "sessions_"));
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_sessions_refused_total", NULL), 0);
    while (n > 0)
        raw_close(&raw[--n]);
    ck_assert(harness_quiet(&f->h, 1, 5000));
    ck_assert_int_eq(raw_connect(&f->raw, f->h.socket), 0);
    ck_assert_int_eq(raw_hello(&f->raw, "room again"), 0);
    teardown(f);
}
END_TEST

/* Nobody is attached who could go and so make room. */
START_TEST(a_want_of_descriptors_passes)
{
    struct kvd_options o = KVD_OPTIONS_INIT;
    struct rlimit limit, few;
    struct harness h;
    kvd *k;

    harness_init(&h);
    harness_start(&h);
    h.admin = kvd_detach(h.admin);
    ck_assert_int_eq(prlimit(h.pid, RLIMIT_NOFILE, NULL, &limit), 0);
    few = (struct rlimit){.rlim_cur = 4, .rlim_max = limit.rlim_max};
    ck_assert_int_eq(prlimit(h.pid, RLIMIT_NOFILE, &few, NULL), 0);
    o.socket_path = h.socket;
    o.timeout_msec = 100;
    ck_assert_int_ne(kvd_attach(&o, &k), KVD_OK);
    ck_assert(harness_logged(&h, "no new workers"));
    ck_assert_int_eq(prlimit(h.pid, RLIMIT_NOFILE, &limit, NULL), 0);
    o.timeout_msec = 10000;
    ck_assert_msg(kvd_attach(&o, &k) == KVD_OK, "%s", kvd_message(NULL));
    kvd_detach(k);
    ck_assert_int_eq(harness_stop(&h), 0);
    harness_deinit(&h);
}
END_TEST

/* A daemon that is stopped in order takes nothing away from who holds it. */
START_TEST(leases_outlive_a_stop)
{
    struct fixture *f = setup(NULL, NULL);

    OK(f, "open 0 raw 40");
    SAYS(f, "ok 0", "match 0 1 480");
    OK(f, "publish 0 0 4 0");
    SAYS(f, "ok 64", "match 0 1 480");
    OK(f, "load 0");
    ck_assert_int_eq(harness_stop(&f->h), 0);
    OK(f, "load 0");
    harness_start(&f->h);
    OK(f, "load 0");
    teardown(f);
}
END_TEST

static void hello_versions(struct fixture *f, uint32_t from, uint32_t to)
{
    Kvd__V1__Hello hello = KVD__V1__HELLO__INIT;

    ck_assert_int_eq(raw_connect(&f->raw, f->h.socket), 0);
    hello.version_min = from;
    hello.version_max = to;
    hello.name = (char *)"versions";
    ck_assert_int_eq(raw_ask(&f->raw, FRAME_HELLO, &hello.base, NULL, 0), 1);
}

START_TEST(versions)
{
    struct fixture *f = setup(NULL, NULL);

    hello_versions(f, 2, 9);
    expect_refusal(f, KVD_E_PROTOCOL);
    raw_close(&f->raw);
    hello_versions(f, 0, 0);
    expect_refusal(f, KVD_E_PROTOCOL);
    raw_close(&f->raw);
    hello_versions(f, 5, 1);
    expect_refusal(f, KVD_E_PROTOCOL);
    raw_close(&f->raw);
    hello_versions(f, 1, 9); /* a newer one that still knows ours */
    ck_assert_uint_eq(f->raw.reply.error, 0);
    teardown(f);
}
END_TEST

START_TEST(unknown_types_and_long_frames)
{
    struct fixture *f = setup(NULL, NULL);
    uint64_t before = harness_stat(&f->h, "kvd_frames_malformed_total", NULL);
    uint8_t *packet = calloc(1, FRAME_MAX + 4096);

    ck_assert_int_eq(raw_connect(&f->raw, f->h.socket), 0);
    ck_assert_int_eq(raw_hello(&f->raw, "types"), 0);
    ck_assert_int_eq(raw_send(&f->raw, 1000, NULL, 0, NULL, 0), 0);
    ck_assert_int_eq(raw_receive(&f->raw), 1);
    expect_refusal(f, KVD_E_PROTOCOL);
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_frames_malformed_total", NULL), before);
    frame_header_pack(packet, FRAME_PING, 7, FRAME_BODY_MAX + 4096, 0);
    ck_assert_int_eq(raw_send_bytes(&f->raw, packet, FRAME_MAX + 4096, NULL, 0), 0);
    ck_assert(raw_receive(&f->raw) == 0 || f->raw.reply.error != 0);
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_frames_malformed_total", NULL), before + 1);
    free(packet);
    teardown(f);
}
END_TEST

START_TEST(draining)
{
    struct fixture *f = setup(NULL, NULL);
    struct raw late;

    OK(f, "open 0 raw 8");
    SAYS(f, "ok 0", "match 0 1 64");
    SAYS(f, "ok 1 0 0", "publish 0 0 1 0");
    ck_assert_int_eq(kvd_admin_drain(harness_admin(&f->h), 0), KVD_OK);
    ck_assert_uint_eq(harness_stat(&f->h, "kvd_draining", NULL), 1);
    expect_error(worker_ask(&f->w, "publish 0 1 1 0"), KVD_E_DRAINING, NULL);
    SAYS(f, "ok 16", "match 0 1 64"); /* what is there may be used to the end */
    SAYS(f, "ok 1 0 0", "load 0 verify");
    ck_assert_int_eq(raw_connect(&late, f->h.socket), 0);
    ck_assert_int_eq(raw_hello(&late, "late"), KVD_E_DRAINING);
    raw_close(&late);
    ck_assert_int_eq(kvd_admin_drain(harness_admin(&f->h), 1), KVD_OK);
    SAYS(f, "ok 3 0 0", "publish 0 1 3 0");
    teardown(f);
}
END_TEST

START_TEST(reloading)
{
    struct fixture *f = setup(NULL, NULL);
    uint64_t limit;

    harness_option(&f->h, "nonsense = 1");
    harness_write_config(&f->h);
    ck_assert_int_eq(kill(f->h.pid, SIGHUP), 0);
    ck_assert(harness_logged(&f->h, "nonsense"));
    ck_assert_uint_eq(harness_stat(&f->h, "kvd_reloads_failed_total", NULL), 1);
    limit = harness_stat(&f->h, "kvd_host_limit_bytes", NULL);
    ck_assert_uint_eq(limit, 64 << 20); /* nothing of a wrong file is taken */
    strstr(f->h.options, "nonsense")[0] = '#';
    harness_option(&f->h, "host_bytes = 32M");
    harness_write_config(&f->h);
    ck_assert_int_eq(kill(f->h.pid, SIGHUP), 0);
    for (int i = 0; i < 500 && harness_stat(&f->h, "kvd_reloads_total", NULL) == 0; i++)
        test_sleep_usec(10000);
    ck_assert_uint_eq(harness_stat(&f->h, "kvd_host_limit_bytes", NULL), 32 << 20);
    OK(f, "open 0 raw 8");
    teardown(f);
}
END_TEST

/* ---- spaces, staging, publish ---- */

static int open_space(kvd *k, struct kvd_space_desc *desc)
{
    kvd_space *space = NULL;
    int r = kvd_space_open(k, desc, &space);

    kvd_space_close(space);
    return r;
}

START_TEST(spaces)
{
    struct fixture *f = setup("spaces_max = 3", NULL);
    struct kvd_options options = KVD_OPTIONS_INIT;
    struct world w;
    kvd *k;

    options.socket_path = f->h.socket;
    ck_assert_int_eq(kvd_attach(&options, &k), KVD_OK);
    world_init(&w, "raw");
    w.layers[0].dim_k = 100; /* no multiple of 16 */
    ck_assert_int_eq(open_space(k, &w.desc), KVD_E_LAYOUT);
    ck_assert_uint_gt(strlen(kvd_message(k)), 10);
    world_init(&w, "raw");
    w.layers[1].n_kv_heads = UINT32_MAX;
    ck_assert_int_eq(open_space(k, &w.desc), KVD_E_LAYOUT);
    world_init(&w, "raw");
    w.layers[1].group = 5;
    ck_assert_int_eq(open_space(k, &w.desc), KVD_E_LAYOUT);
    world_init(&w, "raw");
    w.layers[1].codec_v = "zip";
    ck_assert_int_eq(open_space(k, &w.desc), KVD_E_LAYOUT);
    ck_assert_ptr_nonnull(strstr(kvd_message(k), "codec"));
    world_init(&w, "raw");
    w.desc.block_tokens = 5000;
    ck_assert_int_eq(open_space(k, &w.desc), KVD_E_LAYOUT);
    OK(f, "open 0 raw@1 8");
    OK(f, "open 1 raw@2 8");
    OK(f, "open 2 raw@3 8");
    expect_error(worker_ask(&f->w, "open 3 raw@4 8"), KVD_E_LIMIT, "spaces_max");
    OK(f, "open 4 raw@2 8"); /* one that exists */
    kvd_detach(k);
    teardown(f);
}
END_TEST

START_TEST(tokens_out_of_range)
{
    struct fixture *f = setup(NULL, NULL);
    struct kvd_options options = KVD_OPTIONS_INIT;
    struct world w;
    uint32_t tokens[64] = {0};
    kvd_space *space;
    kvd_prefix *p;
    size_t got = 7;
    kvd *k;

    options.socket_path = f->h.socket;
    world_init(&w, "raw");
    ck_assert_int_eq(kvd_attach(&options, &k), KVD_OK);
    ck_assert_int_eq(kvd_space_open(k, &w.desc, &space), KVD_OK);
    ck_assert_int_eq(kvd_prefix_create(space, 3, &p), KVD_OK);
    tokens[20] = w.desc.vocab_tokens;
    ck_assert_int_eq(kvd_match(p, tokens, 48, NULL, 0, &got), KVD_E_TOKEN);
    ck_assert_ptr_nonnull(strstr(kvd_message(k), "50000"));
    tokens[20]--;
    ck_assert_int_eq(kvd_match(p, tokens, 48, NULL, 0, &got), KVD_OK);
    ck_assert_uint_eq(got, 0);
    ck_assert_int_eq(kvd_match(p, tokens, 64, NULL, 0, &got), KVD_E_LIMIT); /* a prefix object of 3 blocks */
    kvd_detach(k);
    teardown(f);
}
END_TEST

START_TEST(staging)
{
    struct fixture *f = setup("staging_bytes = 1M", "stagings = 2");
    int fd[4];

    ck_assert_int_eq(raw_connect(&f->raw, f->h.socket), 0);
    ck_assert_int_eq(raw_hello(&f->raw, "staging"), 0);
    for (int i = 0; i < 4; i++)
        fd[i] = raw_memfd(i == 0 ? 2 << 20 : 65536, F_SEAL_SHRINK, NULL);
    ck_assert_uint_eq(raw_staging(&f->raw, fd[0], 2 << 20), 0);
    expect_refusal(f, KVD_E_LIMIT);
    ck_assert_uint_ne(raw_staging(&f->raw, fd[1], 65536), 0);
    ck_assert_uint_ne(raw_staging(&f->raw, fd[2], 65536), 0);
    ck_assert_uint_eq(raw_staging(&f->raw, fd[3], 65536), 0);
    expect_refusal(f, KVD_E_LIMIT);
    ck_assert_uint_eq(harness_stat(&f->h, "kvd_staging_bytes", NULL), 2 * 65536);
    for (int i = 0; i < 4; i++)
        close(fd[i]);
    teardown(f);
}
END_TEST

/* libkvd keeps below what the daemon told it at hello: it splits what is too much for one request. */
START_TEST(many_blocks_with_little_staging)
{
    struct fixture *f = setup("staging_bytes = 256K", "publish_blocks = 2");

    OK(f, "open 0 raw 40");
    SAYS(f, "ok 0", "match 0 1 512");
    SAYS(f, "ok 32 0 0", "publish 0 0 32 0");
    SAYS(f, "ok 512", "match 0 1 512");
    SAYS(f, "ok 32 0 0", "load 0 verify");
    teardown(f);
}
END_TEST

START_TEST(leases_run_out)
{
    struct fixture *f = setup("leases = 16", NULL);

    OK(f, "open 0 raw 40");
    OK(f, "open 1 raw 40");
    SAYS(f, "ok 0", "match 0 1 480");
    SAYS(f, "ok 30 0 0", "publish 0 0 30 0");
    SAYS(f, "ok 256", "match 0 1 480"); /* 16 blocks of 16 */
    SAYS(f, "ok 0", "match 1 1 480");
    SAYS(f, "ok 16 0 0", "load 0 verify");
    SAYS(f, "ok 0", "release 0");
    SAYS(f, "ok 256", "match 1 1 480");
    SAYS(f, "ok 16 0 0", "load 1");
    teardown(f);
}
END_TEST

START_TEST(flights_are_bounded)
{
    struct fixture *f = setup("flights = 8", "flights_per_worker = 4");

    OK(f, "open 0 raw 40");
    SAYS(f, "ok 0", "match 0 1 480");
    SAYS(f, "ok gggg", "flight 0 0 4");
    expect_error(worker_ask(&f->w, "flight 0 4 1"), KVD_E_LIMIT, "flights_per_worker");
    SAYS(f, "ok", "end 0 0 4");
    SAYS(f, "ok g", "flight 0 4 1");
    teardown(f);
}
END_TEST

static void add_cases(TCase *tc)
{
    tcase_add_loop_test(tc, a_wrong_line_is_refused, 0, sizeof(bad_lines) / sizeof(bad_lines[0]));
    tcase_add_test(tc, a_wrong_flag_is_refused);
    tcase_add_test(tc, a_second_daemon_is_refused);
    tcase_add_test(tc, a_path_that_is_no_socket_is_left_alone);
    tcase_add_test(tc, a_socket_of_a_dead_daemon_is_replaced);
    if (getuid() == 0) { /* other users need root to become them */
        tcase_add_test(tc, no_permission);
        tcase_add_test(tc, no_tenant_no_session);
    }
    tcase_add_test(tc, sessions_are_bounded);
    tcase_add_test(tc, a_want_of_descriptors_passes);
    tcase_add_test(tc, leases_outlive_a_stop);
    tcase_add_test(tc, versions);
    tcase_add_test(tc, unknown_types_and_long_frames);
    tcase_add_test(tc, draining);
    tcase_add_test(tc, reloading);
    tcase_add_test(tc, spaces);
    tcase_add_test(tc, tokens_out_of_range);
    tcase_add_test(tc, staging);
    tcase_add_test(tc, many_blocks_with_little_staging);
    tcase_add_test(tc, leases_run_out);
    tcase_add_test(tc, flights_are_bounded);
}

int main(void)
{
    Suite *suite = suite_create("limits");
    TCase *tc = tcase_create("bounds");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(tc, 120);
    add_cases(tc);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
