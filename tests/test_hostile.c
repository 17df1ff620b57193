/* A hostile worker tries everything it has hands on; a well-behaved one beside it feels nothing.
 *
 * Each case starts a daemon, a victim that keeps checking a leased chain, and an attacker that speaks the socket by hand. After
 * the attack the victim's bytes, a full verify of all payloads, and the daemon's life are checked. */
#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/content.h"
#include "tests/harness.h"
#include "tests/rawclient.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum { OTHER_UID = 65534 };

struct fixture {
    struct harness h;
    struct worker victim;
    struct raw raw;
    uint8_t fingerprint[32];
    uint32_t space;
};

static struct fixture *setup(void)
{
    struct fixture *f = calloc(1, sizeof(*f));

    if (!f)
        abort();
    raw_init(&f->raw);
    harness_init(&f->h);
    harness_option(&f->h, "hello_timeout = 300ms");
    harness_option(&f->h, "stuck_timeout = 500ms");
    harness_option(&f->h, "reply_queue_bytes = 128K");
    harness_start(&f->h);
    worker_start(&f->victim, &f->h, (uid_t)-1);
    ck_assert_int_eq(strncmp(worker_ask(&f->victim, "open 0 raw 64"), "ok ", 3), 0);
    ck_assert_str_eq(worker_ask(&f->victim, "match 0 7 160"), "ok 0");
    ck_assert_str_eq(worker_ask(&f->victim, "publish 0 0 10 0"), "ok 10 0 0");
    ck_assert_str_eq(worker_ask(&f->victim, "match 0 7 160"), "ok 160");
    return f;
}

/* The victim works on as before. */
static void feels_nothing(struct fixture *f)
{
    ck_assert_str_eq(worker_ask(&f->victim, "load 0 verify"), "ok 10 0 0");
    ck_assert_str_eq(worker_ask(&f->victim, "match 0 7 160"), "ok 160");
    ck_assert_str_eq(worker_ask(&f->victim, "load 0 verify"), "ok 10 0 0");
    ck_assert_str_eq(worker_ask(&f->victim, "ping"), "ok");
}

static void teardown(struct fixture *f)
{
    raw_close(&f->raw);
    feels_nothing(f);
    ck_assert_uint_eq(harness_verify(&f->h), 0);
    ck_assert_int_eq(worker_stop(&f->victim), 0);
    ck_assert(harness_quiet(&f->h, 0, 5000));
    ck_assert_uint_eq(harness_stat(&f->h, "kvd_staging_bytes", NULL), 0);
    ck_assert_int_eq(harness_stop(&f->h), 0);
    harness_deinit(&f->h);
    free(f);
}

static void attach(struct fixture *f)
{
    ck_assert_int_eq(raw_connect(&f->raw, f->h.socket), 0);
    ck_assert_int_eq(raw_hello(&f->raw, "attacker"), 0);
}

static void attach_with_space(struct fixture *f)
{
    attach(f);
    f->space = raw_space(&f->raw, "hostile", f->fingerprint);
    ck_assert_uint_gt(f->space, 0);
}

static int slab_fd(struct raw *r, uint32_t slab, uint64_t *ret_bytes)
{
    Kvd__V1__SlabGet get = KVD__V1__SLAB_GET__INIT;
    Kvd__V1__SlabReply *reply;
    int fd;

    get.slab = slab;
    if (raw_ask(r, FRAME_SLAB_GET, &get.base, NULL, 0) != 1 || r->reply.error || r->reply.n_fds != 1)
        return -1;
    reply = kvd__v1__slab_reply__unpack(NULL, r->reply.n, r->reply.body);
    if (!reply)
        return -1;
    *ret_bytes = reply->bytes;
    kvd__v1__slab_reply__free_unpacked(reply, NULL);
    fd = r->reply.fds[0];
    r->reply.n_fds = 0;
    return fd;
}

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
    struct fixture *f = calloc(1, sizeof(*f));
    struct worker other;
    uint8_t key[32];
    const char *said;
    pid_t pid;
    int status;

    ck_assert_ptr_nonnull(f);
    raw_init(&f->raw);
    harness_init(&f->h);
    harness_option(&f->h, "socket_mode = 0666");
    harness_option(&f->h, "[tenant other]");
    harness_option(&f->h, "uid = 65534");
    harness_start(&f->h);
    worker_start(&f->victim, &f->h, (uid_t)-1);
    ck_assert_int_eq(strncmp(worker_ask(&f->victim, "open 0 raw 64"), "ok ", 3), 0);
    ck_assert_str_eq(worker_ask(&f->victim, "match 0 7 160"), "ok 0");
    ck_assert_str_eq(worker_ask(&f->victim, "publish 0 0 10 0"), "ok 10 0 0");
    ck_assert_str_eq(worker_ask(&f->victim, "match 0 7 160"), "ok 160");
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
    Suite *suite = suite_create("hostile");
    TCase *tc = tcase_create("attacks");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, cannot_write_index_or_slab);
    tcase_add_test(tc, scribbles_over_its_own_page);
    tcase_add_test(tc, hoards_leases);
    tcase_add_test(tc, floods);
    tcase_add_test(tc, never_reads);
    tcase_add_test(tc, malformed_frames);
    tcase_add_test(tc, random_bodies);
    tcase_add_test(tc, silent_connections_are_closed);
    tcase_add_test(tc, wrong_descriptors);
    tcase_add_test(tc, lies_in_a_publish);
    tcase_add_test(tc, staging_changes_while_it_is_encoded);
    tcase_add_test(tc, staging_goes_while_it_is_encoded);
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
