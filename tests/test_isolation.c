/* What a worker has no business with: memory that others read, another tenant's blocks, the daemon itself. It tries every way that the
 * system offers, and each must be refused; its own page it may fill with what it likes. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proto/shm.h"
#include "tests/content.h"
#include "tests/harness.h"
#include "tests/hostile_fixture.h"
#include "tests/rawclient.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum { OTHER_UID = 65534 };

/* ---- memory that others read ---- */

/* In a child: the write must end it, or change nothing. */
static bool write_lands(volatile uint8_t *at)
{
    pid_t pid = test_fork();
    int status;

    if (pid == 0) {
        signal(SIGSEGV, SIG_DFL);
        signal(SIGBUS, SIG_DFL);
        *at ^= 0xff;
        _exit(0);
    }
    waitpid(pid, &status, 0);
    return !WIFSIGNALED(status);
}

static void try_to_write(int fd, uint64_t bytes)
{
    uint64_t before, after;
    char path[64];
    void *map, *again;
    int reopened;

    map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(map, MAP_FAILED);
    memcpy(&before, map, sizeof(before));

    ck_assert_int_eq(mprotect(map, bytes, PROT_READ | PROT_WRITE), -1);
    again = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert_ptr_eq(again, MAP_FAILED);
    ck_assert(write_lands(map) == false);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    reopened = open(path, O_RDWR | O_CLOEXEC);
    if (reopened >= 0) { /* the kernel allows the opening; the seals hold all the same */
        ck_assert_ptr_eq(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, reopened, 0), MAP_FAILED);
        ck_assert_int_lt((int)pwrite(reopened, "attack", 6, 0), 0);
        ck_assert_int_eq(ftruncate(reopened, 0), -1);
        ck_assert_int_eq(ftruncate(reopened, (off_t)bytes * 2), -1);
        ck_assert_int_eq(fallocate(reopened, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes), -1);
        ck_assert_int_eq(fcntl(reopened, F_ADD_SEALS, F_SEAL_WRITE), -1);
        close(reopened);
    }
    ck_assert_int_lt((int)write(fd, "attack", 6), 0);
    ck_assert_int_lt((int)pwrite(fd, "attack", 6, 0), 0);
    ck_assert_int_eq(ftruncate(fd, 0), -1);
    ck_assert_int_eq(ftruncate(fd, (off_t)bytes * 2), -1);
    ck_assert_int_eq(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes), -1);
    ck_assert_int_eq(fallocate(fd, FALLOC_FL_ZERO_RANGE, 0, (off_t)bytes), -1);
    ck_assert_int_eq(madvise(map, bytes, MADV_REMOVE), -1);
    madvise(map, bytes, MADV_DONTNEED);
    ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -1); /* nor may it make the daemon's own writes fail */

    memcpy(&after, map, sizeof(after));
    ck_assert_uint_eq(before, after);
    munmap(map, bytes);
}

START_TEST(cannot_write_index_or_slab)
{
    struct fixture *f = setup();
    uint64_t bytes;
    int fd;

    attach(f);
    try_to_write(f->raw.index_fd, f->raw.index_bytes);
    fd = slab_fd(&f->raw, 0, &bytes);
    ck_assert_int_ge(fd, 0);
    try_to_write(fd, bytes);
    close(fd);
    ck_assert_int_eq(slab_fd(&f->raw, 60000, &bytes), -1);
    ck_assert_uint_eq(f->raw.reply.error, KVD_E_NOT_FOUND);
    teardown(f);
}
END_TEST

/* The page is its own: it may write what it likes. It may not shrink it under the daemon, nor hold up or mislead anybody. */
START_TEST(scribbles_over_its_own_page)
{
    struct fixture *f = setup();
    uint64_t seed = test_seed("page");
    uint64_t *words;

    attach(f);
    ck_assert_int_eq(ftruncate(f->raw.page_fd, 0), -1);
    ck_assert_int_eq(ftruncate(f->raw.page_fd, 1 << 30), -1);
    words = f->raw.page;
    for (int round = 0; round < 40; round++) {
        struct kvd_evict_result evicted;
        struct kvd_selector one = {.model = "test-raw"};

        for (uint64_t i = 0; i < f->raw.page_bytes / 8; i++)
            words[i] = round % 2 ? test_random(&seed)
                                 : shm_ref((uint32_t)(test_random(&seed) % 8192), (uint32_t)(test_random(&seed) % 8));
        harness_list_workers(&f->h); /* counts its leases */
        harness_stat(&f->h, "kvd_hits_total", NULL);
        ck_assert_int_eq(kvd_admin_evict(harness_admin(&f->h), &one, 0, 1, &evicted), KVD_OK);
        feels_nothing(f);
    }
    ck_assert(harness_alive(&f->h));
    teardown(f);
}
END_TEST

/* Leases on everything, for ever: others still publish once it is gone, and get a clear answer while it is there. */
START_TEST(hoards_leases)
{
    struct fixture *f = setup();
    struct shm_page_header *page;
    _Atomic uint64_t *leases;
    const char *said;

    attach(f);
    page = f->raw.page;
    leases = (void *)((char *)f->raw.page + page->leases_off);
    for (uint32_t e = 0; e < 8192 && e < page->n_leases; e++) /* any generation that an entry may have soon */
        leases[e] = shm_ref(e, 2);
    for (int p = 64; p < 64 * 700; p += 64) {
        ck_assert_int_eq(strncmp(worker_ask(&f->victim, "match 0 %d 160", p), "ok ", 3), 0);
        said = worker_ask(&f->victim, "publish 0 0 10 0");
        if (strncmp(said, "ok ", 3) != 0)
            break;
    }
    ck_assert_msg(strncmp(said, "ok ", 3) == 0 || strncmp(said, "error 9 ", 8) == 0, "%s", said); /* KVD_E_FULL */
    raw_close(&f->raw);
    ck_assert(harness_quiet(&f->h, 1, 5000));
    ck_assert_int_eq(strncmp(worker_ask(&f->victim, "match 0 7 160"), "ok ", 3), 0);
    ck_assert_str_ne(worker_ask(&f->victim, "publish 0 0 10 0"), "");
    ck_assert_str_eq(worker_ask(&f->victim, "match 0 7 160"), "ok 160");
    teardown(f);
}
END_TEST

/* ---- another tenant ---- */

/* What an attacker of another user and tenant sees. Runs in a child under that uid. Returns 0 or the number of the failed step. */
static int as_other_tenant(const char *socket_path, pid_t daemon, const uint8_t *key, uint16_t space, const char *config)
{
    struct raw r;
    struct lookup_hit hit;
    uint8_t fingerprint[32];
    uint64_t bytes;
    char path[64];
    int r0;

    r0 = raw_connect(&r, socket_path);
    if (r0 < 0)
        return 1;
    if (raw_hello(&r, "other"))
        return 2;
    for (uint16_t s = 0; s < 64; s++)
        if (lookup_find(&r.view, key, s, 0, &hit) || lookup_find(&r.view, key, space, 0, &hit))
            return 3;
    if (r.view.header->n_used != 0)
        return 4;
    for (uint32_t s = 0; s < 64; s++) /* slabs are numbered a tenant: none of it holds anything, so there is none */
        if (slab_fd(&r, s, &bytes) >= 0)
            return 5;
    if (raw_space(&r, "test-raw", fingerprint) == 0)
        return 6;
    for (int fd = 0; fd < 64; fd++) {
        int got;

        snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)daemon, fd);
        got = open(path, O_RDWR);
        if (got >= 0)
            return 7;
    }
    snprintf(path, sizeof(path), "/proc/%d/mem", (int)daemon);
    if (open(path, O_RDONLY) >= 0)
        return 8;
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)daemon);
    r0 = open(path, O_RDONLY);
    if (r0 >= 0 && read(r0, path, sizeof(path)) > 0)
        return 9;
    if (raw_send(&r, FRAME_STATS, NULL, 0, NULL, 0) == 0 && raw_receive(&r) == 1 && !r.reply.error)
        return 10; /* counters tell of others: for admins */
    if (raw_send(&r, FRAME_LIST, "\x0a\x06" "blocks", 8, NULL, 0) == 0 && raw_receive(&r) == 1 && !r.reply.error)
        return 11;
    if (raw_send(&r, FRAME_EVICT, NULL, 0, NULL, 0) == 0 && raw_receive(&r) == 1 && !r.reply.error)
        return 12;
    if (open(config, O_RDWR) >= 0)
        return 13;
    raw_close(&r);
    return 0;
}

static uint8_t hex(char c)
{
    return (uint8_t)(c <= '9' ? c - '0' : c - 'a' + 10);
}

START_TEST(another_tenant_sees_nothing)
{
    static const char *const options[] = {"socket_mode = 0666", "[tenant other]", "uid = 65534", NULL};
    struct fixture *f = setup_with(options);
    struct worker other;
    uint8_t key[32];
    const char *said;
    pid_t pid;
    int status;

    said = worker_ask(&f->victim, "key 0 0");
    ck_assert_uint_eq(strlen(said), 3 + 64);
    for (int i = 0; i < 32; i++)
        key[i] = (uint8_t)(hex(said[3 + 2 * i]) << 4 | hex(said[4 + 2 * i]));

    pid = test_fork();
    if (pid == 0) {
        if (setgid(OTHER_UID) < 0 || setuid(OTHER_UID) < 0)
            _exit(100);
        _exit(as_other_tenant(f->h.socket, f->h.pid, key, 1, f->h.config));
    }
    waitpid(pid, &status, 0);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "step %d", WEXITSTATUS(status));

    /* The same model and tokens through libkvd: other keys, no hit, and what it publishes meets nobody's. Whether a key is in another
     * tenant's index cannot change what a look-up does, because the only index that it reads is its own: same steps, same time. */
    worker_start(&other, &f->h, OTHER_UID);
    ck_assert_int_eq(strncmp(worker_ask(&other, "open 0 raw 64"), "ok ", 3), 0);
    ck_assert_str_eq(worker_ask(&other, "match 0 7 160"), "ok 0");
    ck_assert_str_ne(worker_ask(&other, "key 0 0"), said);
    ck_assert_str_eq(worker_ask(&other, "flight 0 0 4"), "ok gggg");
    ck_assert_str_eq(worker_ask(&f->victim, "flight 0 0 4"), "ok llll");
    ck_assert_str_eq(worker_ask(&other, "publish 0 0 4 0"), "ok 4 0 0");
    ck_assert_str_eq(worker_ask(&other, "match 0 7 160"), "ok 64");
    ck_assert_str_eq(worker_ask(&other, "load 0 verify"), "ok 4 0 0");
    ck_assert_uint_eq(harness_stat(&f->h, "kvd_tenant_blocks", "tenant=\"other\""), 4);
    ck_assert_uint_eq(harness_stat(&f->h, "kvd_tenant_blocks", "tenant=\"default\""), 10);
    ck_assert_int_eq(worker_stop(&other), 0);
    teardown(f);
}
END_TEST

/* A worker under the daemon's own uid: its descriptors, memory and maps are closed to it, and it cannot be traced. */
static int as_daemons_user(pid_t daemon)
{
    char path[64];

    for (int fd = 0; fd < 64; fd++) {
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)daemon, fd);
        if (open(path, O_RDWR) >= 0 || open(path, O_RDONLY) >= 0)
            return 1;
    }
    snprintf(path, sizeof(path), "/proc/%d/mem", (int)daemon);
    if (open(path, O_RDONLY) >= 0)
        return 2;
    if (ptrace(PTRACE_ATTACH, daemon, NULL, NULL) == 0)
        return 3;
    if (syscall(SYS_pidfd_getfd, syscall(SYS_pidfd_open, daemon, 0), 3, 0) >= 0)
        return 4;
    return 0;
}

static int in_child_as(uid_t uid, pid_t daemon)
{
    pid_t pid = test_fork();
    int status;

    if (pid == 0) {
        if (uid != getuid() && (setgid(uid) < 0 || setuid(uid) < 0))
            _exit(100);
        _exit(as_daemons_user(daemon));
    }
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 101;
}

/* The daemon as a user of its own, workers as others: nothing of the above needs root on its side. */
START_TEST(unprivileged_daemon)
{
    struct harness h;
    struct worker a, b;

    harness_init(&h);
    harness_option(&h, "socket_mode = 0666");
    h.uid = 65533;
    harness_start(&h);
    worker_start(&a, &h, OTHER_UID);
    worker_start(&b, &h, 65532);
    ck_assert_int_eq(strncmp(worker_ask(&a, "open 0 raw 64"), "ok ", 3), 0);
    ck_assert_int_eq(strncmp(worker_ask(&b, "open 0 raw 64"), "ok ", 3), 0);
    ck_assert_str_eq(worker_ask(&a, "match 0 7 160"), "ok 0");
    ck_assert_str_eq(worker_ask(&a, "publish 0 0 10 0"), "ok 10 0 0");
    ck_assert_str_eq(worker_ask(&b, "match 0 7 160"), "ok 160");
    ck_assert_str_eq(worker_ask(&b, "load 0 verify"), "ok 10 0 0");
    ck_assert_int_eq(in_child_as(65533, h.pid), 0);
    worker_kill(&a);
    ck_assert(harness_quiet(&h, 1, 5000));
    ck_assert_str_eq(worker_ask(&b, "load 0 verify"), "ok 10 0 0");
    ck_assert_int_eq(worker_stop(&b), 0);
    ck_assert_int_eq(harness_stop(&h), 0);
    harness_deinit(&h);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("isolation");
    TCase *tc = tcase_create("attacks");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, cannot_write_index_or_slab);
    tcase_add_test(tc, scribbles_over_its_own_page);
    tcase_add_test(tc, hoards_leases);
    if (getuid() == 0) { /* other users need root to become them */
        tcase_add_test(tc, another_tenant_sees_nothing);
        tcase_add_test(tc, unprivileged_daemon);
    } else {
        printf("not root: the cases with other users are left out\n");
    }
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
