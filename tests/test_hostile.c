/* A hostile worker floods, lies and sends nonsense: frames, descriptors, sizes, memory that changes while it is read. A well-behaved
 * worker beside it feels nothing: after each attack its bytes, all payloads and the daemon's life are checked. */
#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/content.h"
#include "tests/harness.h"
#include "tests/hostile_fixture.h"
#include "tests/rawclient.h"

/* ---- frames ---- */

START_TEST(floods)
{
    struct fixture *f = setup();
    uint64_t replies = 0;

    attach(f);
    for (int i = 0; i < 20000; i++) {
        ck_assert_int_eq(raw_send(&f->raw, FRAME_PING, NULL, 0, NULL, 0), 0);
        if (i % 50 == 49) {
            for (int k = 0; k < 50; k++) {
                ck_assert_int_eq(raw_receive(&f->raw), 1);
                ck_assert_uint_eq(f->raw.reply.error, 0);
                replies++;
            }
        }
        if (i % 2000 == 0)
            feels_nothing(f);
    }
    ck_assert_uint_eq(replies, 20000);
    teardown(f);
}
END_TEST

/* Asks and asks, reads nothing: the replies that wait are bounded, and the session ends. */
START_TEST(never_reads)
{
    struct fixture *f = setup();
    int r = 0, i;

    attach(f);
    fcntl(f->raw.fd, F_SETFL, O_NONBLOCK);
    for (i = 0; i < 1000000 && r != -EPIPE && r != -ECONNRESET; i++) {
        r = raw_send(&f->raw, FRAME_CONFIG, NULL, 0, NULL, 0);
        if (r == -EAGAIN)
            test_sleep_usec(1000);
        if (i % 5000 == 0)
            feels_nothing(f);
    }
    ck_assert_msg(r == -EPIPE || r == -ECONNRESET, "not cut off after %d frames: %s", i, strerror(-r));
    ck_assert(harness_quiet(&f->h, 1, 5000));
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_sessions_overrun_total", NULL), 0);
    teardown(f);
}
END_TEST

static void header(uint8_t wire[FRAME_HEADER_BYTES], const struct frame_header *h)
{
    memcpy(wire, h, FRAME_HEADER_BYTES);
}

/* Every malformed packet is answered with an error or the end, is counted, and leaves the rest in peace. */
START_TEST(malformed_frames)
{
    static const struct frame_header wrong[] = {
        {0, 1, FRAME_PING, 1, 0, 0, 0, 0},                            /* magic */
        {FRAME_MAGIC, 9, FRAME_PING, 1, 0, 0, 0, 0},                  /* version */
        {FRAME_MAGIC, 1, 0x1234, 1, 0, 0, 0, 0},                      /* type */
        {FRAME_MAGIC, 1, FRAME_PING | FRAME_REPLY, 1, 0, 0, 0, 0},    /* a reply that nobody asked for */
        {FRAME_MAGIC, 1, FRAME_PING, 0, 0, 0, 0, 0},                  /* id */
        {FRAME_MAGIC, 1, FRAME_PING, 1, 5, 0, 0, 0},                  /* longer than the packet */
        {FRAME_MAGIC, 1, FRAME_PING, 1, UINT32_MAX, 0, 0, 0},         /* huge */
        {FRAME_MAGIC, 1, FRAME_PING, 1, 0, 3, 0, 0},                  /* descriptors that did not come */
        {FRAME_MAGIC, 1, FRAME_PING, 1, 0, 0, 1, 0},                  /* reserved bits */
        {FRAME_MAGIC, 1, FRAME_PING, 1, 0, 0, 0, 1},
    };
    struct fixture *f = setup();
    uint64_t before = harness_stat(&f->h, "kvd_frames_malformed_total", NULL);
    uint8_t wire[FRAME_HEADER_BYTES];

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        int got;

        attach(f);
        header(wire, &wrong[i]);
        ck_assert_int_eq(raw_send_bytes(&f->raw, wire, sizeof(wire), NULL, 0), 0);
        got = raw_receive(&f->raw);
        ck_assert_msg(got == 0 || f->raw.reply.error != 0, "wrong header %zu was accepted", i);
        raw_close(&f->raw);
    }
    for (size_t n = 1; n < FRAME_HEADER_BYTES; n += 5) { /* half a header */
        attach(f);
        ck_assert_int_eq(raw_send_bytes(&f->raw, wire, n, NULL, 0), 0);
        ck_assert(raw_receive(&f->raw) == 0 || f->raw.reply.error != 0);
        raw_close(&f->raw);
    }
    ck_assert_uint_ge(harness_stat(&f->h, "kvd_frames_malformed_total", NULL) - before,
                      sizeof(wrong) / sizeof(wrong[0]));
    teardown(f);
}
END_TEST

START_TEST(random_bodies)
{
    static const uint16_t types[] = {FRAME_HELLO, FRAME_PING, FRAME_SPACE_OPEN, FRAME_SPACE_CLOSE, FRAME_SLAB_GET,
                                     FRAME_STAGING_ADD, FRAME_STAGING_DROP, FRAME_PUBLISH, FRAME_FLIGHT_BEGIN,
                                     FRAME_FLIGHT_END, FRAME_LIST, FRAME_SHOW};
    struct fixture *f = setup();
    uint64_t seed = test_seed("bodies");
    uint8_t body[600];

    attach(f);
    for (int i = 0; i < 4000; i++) {
        size_t n = test_random(&seed) % sizeof(body);
        int got;

        for (size_t b = 0; b < n; b++)
            body[b] = (uint8_t)(test_random(&seed) % 4 ? test_random(&seed) % 32 : test_random(&seed));
        if (raw_send(&f->raw, types[test_random(&seed) % 12], body, n, NULL, 0) < 0 ||
            (got = raw_receive(&f->raw)) == 0) { /* cut off after too many: come again */
            raw_close(&f->raw);
            attach(f);
            continue;
        }
        ck_assert_int_eq(got, 1);
    }
    feels_nothing(f);
    teardown(f);
}
END_TEST

START_TEST(silent_connections_are_closed)
{
    struct fixture *f = setup();
    struct raw silent[20];

    for (int i = 0; i < 20; i++)
        ck_assert_int_eq(raw_connect(&silent[i], f->h.socket), 0);
    for (int i = 0; i < 20; i++) {
        int got = raw_receive(&silent[i]);

        ck_assert_msg(got == 0 || silent[i].reply.error, "a silent connection was kept");
        raw_close(&silent[i]);
    }
    ck_assert_int_eq(raw_connect(&f->raw, f->h.socket), 0); /* work before hello */
    ck_assert_int_eq(raw_send(&f->raw, FRAME_STATS, NULL, 0, NULL, 0), 0);
    ck_assert(raw_receive(&f->raw) == 0 || f->raw.reply.error != 0);
    teardown(f);
}
END_TEST

/* ---- descriptors ---- */

static size_t open_fds(pid_t pid)
{
    char path[64];
    struct dirent *e;
    size_t n = 0;
    DIR *d;

    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    d = opendir(path);
    if (!d) { /* without root nobody may look, not even the daemon's own user */
        ck_assert_int_eq(errno, EACCES);
        return 0;
    }
    while ((e = readdir(d)))
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static void refused_staging(struct fixture *f, int fd, uint64_t bytes, const char *what)
{
    uint32_t id = raw_staging(&f->raw, fd, bytes);

    ck_assert_msg(id == 0, "%s was taken as staging", what);
    ck_assert_msg(f->raw.reply.error != 0, "%s: the session was ended without an answer", what);
    ck_assert_msg(strlen(f->raw.reply.reason) > 10, "%s: no reason given", what);
    close(fd);
}

START_TEST(wrong_descriptors)
{
    struct fixture *f = setup();
    int pipes[2], sockets[2], fd, many[200];
    size_t before;
    uint8_t wire[FRAME_HEADER_BYTES];
    Kvd__V1__StagingAdd add = KVD__V1__STAGING_ADD__INIT;

    attach(f);
    before = open_fds(f->h.pid);
    refused_staging(f, raw_memfd(65536, 0, NULL), 65536, "an unsealed memfd");
    refused_staging(f, raw_memfd(65536, F_SEAL_GROW, NULL), 65536, "a memfd that can shrink");
    refused_staging(f, raw_memfd(4096, F_SEAL_SHRINK, NULL), 65536, "a short memfd");
    refused_staging(f, raw_memfd(4096, F_SEAL_SHRINK, NULL), UINT64_MAX, "a size of 2^64-1");
    refused_staging(f, raw_memfd(4096, F_SEAL_SHRINK, NULL), 0, "a size of 0");
    ck_assert_int_eq(pipe(pipes), 0);
    refused_staging(f, pipes[0], 65536, "a pipe's reader");
    refused_staging(f, pipes[1], 65536, "a pipe's writer");
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
    refused_staging(f, sockets[0], 65536, "a socket");
    close(sockets[1]);
    refused_staging(f, open("/tmp", O_RDONLY | O_DIRECTORY), 4096, "a folder");
    refused_staging(f, open("/dev/zero", O_RDWR), 4096, "a device");
    fd = open(f->h.config, O_RDONLY);
    refused_staging(f, fd, 4096, "a file");
    ck_assert(raw_ask(&f->raw, FRAME_STAGING_ADD, &add.base, NULL, 0) == 1 && f->raw.reply.error); /* none */
    raw_close(&f->raw);

    attach(f);
    for (int i = 0; i < 200; i++) /* more than a frame may carry, and more than it says */
        many[i] = open("/dev/null", O_RDONLY | O_CLOEXEC);
    frame_header_pack(wire, FRAME_PING, 1, 0, 200);
    ck_assert_int_eq(raw_send_bytes(&f->raw, wire, sizeof(wire), many, 200), 0);
    ck_assert(raw_receive(&f->raw) == 0 || f->raw.reply.error != 0);
    raw_close(&f->raw);
    attach(f);
    frame_header_pack(wire, FRAME_PING, 1, 0, 0);
    ck_assert_int_eq(raw_send_bytes(&f->raw, wire, sizeof(wire), many, 3), 0);
    ck_assert(raw_receive(&f->raw) == 0 || f->raw.reply.error != 0);
    for (int i = 0; i < 200; i++)
        close(many[i]);
    ck_assert_int_eq(raw_hello(&f->raw, "again") != -1, 1);
    raw_close(&f->raw);
    for (int i = 0; i < 200 && open_fds(f->h.pid) > before; i++)
        test_sleep_usec(10000);
    ck_assert_uint_le(open_fds(f->h.pid), before); /* none of them stayed */
    teardown(f);
}
END_TEST

/* ---- lies about sizes and offsets ---- */

START_TEST(lies_in_a_publish)
{
    static const uint64_t offsets[] = {1, 63, 65536 - 64, 65536, UINT64_MAX - 63, UINT64_C(1) << 63, 65536 - RAW_BLOCK_BYTES + 64};
    struct fixture *f = setup();
    uint32_t tokens[4097] = {0}, staging;
    uint8_t other[32] = {1, 2, 3};
    int fd;

    attach_with_space(f);
    fd = raw_memfd(65536, F_SEAL_SHRINK | F_SEAL_GROW, NULL);
    staging = raw_staging(&f->raw, fd, 65536);
    ck_assert_uint_gt(staging, 0);
    close(fd);
#define REFUSED(...)                                                                                                   \
    do {                                                                                                               \
        int said = raw_publish(&f->raw, __VA_ARGS__);                                                                  \
        ck_assert_msg(said < 0 || said == KVD_FAILED, "accepted: %s", #__VA_ARGS__);                                   \
        ck_assert_uint_ne(f->raw.reply.error, 0);                                                                      \
        ck_assert_uint_gt(strlen(f->raw.reply.reason), 10);                                                            \
    } while (0)
    for (size_t i = 0; i < sizeof(offsets) / sizeof(offsets[0]); i++)
        REFUSED(f->space, staging, f->fingerprint, 32, tokens, 16, offsets[i]);
    REFUSED(f->space + 999, staging, f->fingerprint, 32, tokens, 16, 0);
    REFUSED(f->space, staging + 999, f->fingerprint, 32, tokens, 16, 0);
    REFUSED(f->space, staging, f->fingerprint, 31, tokens, 16, 0);
    REFUSED(f->space, staging, f->fingerprint, 0, tokens, 16, 0);
    REFUSED(f->space, staging, other, 32, tokens, 16, 0);
    REFUSED(f->space, staging, f->fingerprint, 32, tokens, 15, 0);
    REFUSED(f->space, staging, f->fingerprint, 32, tokens, 17, 0);
    REFUSED(f->space, staging, f->fingerprint, 32, tokens, 4097, 0);
    REFUSED(f->space, staging, f->fingerprint, 32, tokens, 0, 0);
    ck_assert_int_eq(raw_publish(&f->raw, f->space, staging, f->fingerprint, 32, tokens, 16, 65536 - RAW_BLOCK_BYTES),
                     KVD_PUBLISHED);
    ck_assert_int_eq(raw_publish(&f->raw, f->space, staging, f->fingerprint, 32, tokens, 16, 0), KVD_PRESENT);
    teardown(f);
}
END_TEST

struct scribbler {
    uint64_t *words;
    size_t n;
    _Atomic int stop;
};

static void *scribble(void *arg)
{
    struct scribbler *s = arg;
    uint64_t seed = 1;

    while (!s->stop)
        for (size_t i = 0; i < s->n; i++)
            s->words[i] = test_random(&seed) & UINT64_C(0x3fff3fff3fff3fff); /* finite fp16 */
    return NULL;
}

/* Whatever the encoder saw of memory that changes under it, the block is whole: its checksum holds, its neighbours are untouched. */
START_TEST(staging_changes_while_it_is_encoded)
{
    struct fixture *f = setup();
    struct scribbler s = {0};
    uint32_t tokens[RAW_BLOCK_TOKENS], staging;
    pthread_t thread;
    void *map;
    int fd, n_published = 0;

    attach_with_space(f);
    fd = raw_memfd(65536, F_SEAL_SHRINK, &map);
    staging = raw_staging(&f->raw, fd, 65536);
    close(fd);
    s.words = map;
    s.n = 65536 / 8;
    ck_assert_int_eq(pthread_create(&thread, NULL, scribble, &s), 0);
    for (uint32_t i = 0; i < 300; i++) {
        for (uint32_t t = 0; t < RAW_BLOCK_TOKENS; t++)
            tokens[t] = i * 100 + t;
        n_published += raw_publish(&f->raw, f->space, staging, f->fingerprint, 32, tokens, RAW_BLOCK_TOKENS, 0) ==
                       KVD_PUBLISHED;
    }
    s.stop = 1;
    pthread_join(thread, NULL);
    munmap(map, 65536);
    ck_assert_int_gt(n_published, 250);
    ck_assert_uint_eq(harness_verify(&f->h), 0);
    teardown(f);
}
END_TEST

/* Drops and shrinks what an encoder may be reading. */
START_TEST(staging_goes_while_it_is_encoded)
{
    struct fixture *f = setup();

    for (uint32_t i = 0; i < 60; i++) {
        Kvd__V1__StagingDrop drop = KVD__V1__STAGING_DROP__INIT;
        uint32_t tokens[RAW_BLOCK_TOKENS] = {i}, staging;
        int fd = raw_memfd(65536, F_SEAL_SHRINK, NULL);

        attach_with_space(f);
        staging = raw_staging(&f->raw, fd, 65536);
        ck_assert_int_eq(ftruncate(fd, 0), -1);
        ck_assert_int_eq(raw_publish(&f->raw, f->space, staging, f->fingerprint, 32, tokens, RAW_BLOCK_TOKENS, 0),
                         i ? KVD_PUBLISHED : KVD_PUBLISHED);
        drop.staging = staging;
        ck_assert_int_eq(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 65536), 0);
        if (i % 2)
            ck_assert_int_eq(raw_ask(&f->raw, FRAME_STAGING_DROP, &drop.base, NULL, 0), 1);
        close(fd);
        raw_close(&f->raw);
    }
    teardown(f);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("hostile");
    TCase *tc = tcase_create("attacks");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, floods);
    tcase_add_test(tc, never_reads);
    tcase_add_test(tc, malformed_frames);
    tcase_add_test(tc, random_bodies);
    tcase_add_test(tc, silent_connections_are_closed);
    tcase_add_test(tc, wrong_descriptors);
    tcase_add_test(tc, lies_in_a_publish);
    tcase_add_test(tc, staging_changes_while_it_is_encoded);
    tcase_add_test(tc, staging_goes_while_it_is_encoded);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
