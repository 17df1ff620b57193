/* The gRPC socket at the level of bytes: peers that speak no HTTP/2, break off anywhere, or say what gRPC forbids. Each is ended alone;
 * the daemon serves the next one, and keeps nothing of it. */
#include <check.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/harness.h"

static struct harness h;
static char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
static uint64_t seed;

static uint64_t next_random(void)
{
    uint64_t z = (seed += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static void start(void)
{
    char option[160];

    harness_init(&h);
    snprintf(path, sizeof(path), "%.90s.grpc", h.socket);
    snprintf(option, sizeof(option), "grpc_socket = %s", path);
    harness_option(&h, option);
    harness_option(&h, "grpc_connections = 8");
    harness_option(&h, "stuck_timeout = 1s");
    harness_option(&h, "grpc_memory = 16M");
    harness_start(&h);
}

static void stop(void)
{
    ck_assert_int_eq(harness_stop(&h), 0);
    harness_deinit(&h);
}

static int dial(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strcpy(address.sun_path, path);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

static void say(int fd, const void *bytes, size_t n)
{
    const char *at = bytes;

    while (n > 0) { /* it may have been hung up meanwhile */
        ssize_t done = send(fd, at, n, MSG_NOSIGNAL);

        if (done <= 0)
            return;
        at += done;
        n -= (size_t)done;
    }
}

/* Reads until the other side hangs up. */
static void hear_out(int fd)
{
    char buf[4096];
    struct pollfd p = {.fd = fd, .events = POLLIN};

    while (poll(&p, 1, 30000) == 1)
        if (recv(fd, buf, sizeof(buf), 0) <= 0)
            return;
    ck_abort_msg("it has not hung up");
}

/* ---- frames of HTTP/2 ---- */

static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
enum { DATA = 0, HEADERS = 1, RST_STREAM = 3, SETTINGS = 4, PING = 6, WINDOW_UPDATE = 8, END_STREAM = 1, END_HEADERS = 4, FRAME_HEAD = 9 };

struct text {
    uint8_t bytes[8192];
    size_t n;
};

static void add(struct text *t, const void *bytes, size_t n)
{
    ck_assert_uint_le(n, sizeof(t->bytes) - t->n);
    memcpy(t->bytes + t->n, bytes, n);
    t->n += n;
}

static void add_frame(struct text *t, uint8_t type, uint8_t flags, uint32_t stream, const void *body, size_t n)
{
    uint8_t head[FRAME_HEAD] = {(uint8_t)(n >> 16), (uint8_t)(n >> 8), (uint8_t)n, type, flags,
                                (uint8_t)(stream >> 24), (uint8_t)(stream >> 16), (uint8_t)(stream >> 8), (uint8_t)stream};

    add(t, head, sizeof(head));
    add(t, body, n);
}

static void add_hello(struct text *t)
{
    add(t, preface, sizeof(preface) - 1);
    add_frame(t, SETTINGS, 0, 0, "", 0);
}

/* A literal header field without indexing. */
static void add_field(struct text *t, const char *name, const char *value)
{
    uint8_t lengths[2] = {0, (uint8_t)strlen(name)}, value_length = (uint8_t)strlen(value);

    ck_assert_uint_lt(strlen(value), 127);
    add(t, lengths, 2);
    add(t, name, strlen(name));
    add(t, &value_length, 1);
    add(t, value, strlen(value));
}

static void add_call(struct text *t, uint32_t stream, const char *method)
{
    struct text fields = {0};

    add_field(&fields, ":method", "POST");
    add_field(&fields, ":scheme", "http");
    add_field(&fields, ":path", method);
    add_field(&fields, ":authority", "kvd");
    add_field(&fields, "te", "trailers");
    add_field(&fields, "content-type", "application/grpc");
    add_frame(t, HEADERS, END_HEADERS, stream, fields.bytes, fields.n);
}

static uint64_t calls_now(void)
{
    return harness_stat(&h, "kvd_grpc_calls_now", NULL);
}

/* Everything that the test's connections held goes. Not a matter of time: it only must not be for ever. */
static void wait_quiet(void)
{
    for (int i = 0; i < 3000 && (calls_now() || harness_stat(&h, "kvd_grpc_connections", NULL)); i++)
        usleep(10000);
    ck_assert_uint_eq(calls_now(), 0);
    ck_assert_uint_eq(harness_stat(&h, "kvd_grpc_connections", NULL), 0);
    ck_assert_uint_eq(harness_stat(&h, "kvd_grpc_memory_bytes", NULL), 0);
}

/* A whole call of Health/Check on a fresh connection: the daemon serves. */
static void serves(void)
{
    static const uint8_t empty_message[5] = {0};
    struct text t = {0};
    char buf[4096], all[8192] = "";
    size_t n = 0;
    int fd = dial();

    add_hello(&t);
    add_call(&t, 1, "/grpc.health.v1.Health/Check");
    add_frame(&t, DATA, END_STREAM, 1, empty_message, sizeof(empty_message));
    say(fd, t.bytes, t.n);
    for (struct pollfd p = {.fd = fd, .events = POLLIN}; poll(&p, 1, 30000) == 1;) {
        ssize_t got = recv(fd, buf, sizeof(buf), 0);

        ck_assert_int_gt(got, 0);
        ck_assert_uint_le((size_t)got, sizeof(all) - n);
        memcpy(all + n, buf, (size_t)got);
        n += (size_t)got;
        if (memmem(all, n, "\0\0\0\0\2\10\1", 7)) /* a message of 2 bytes: status SERVING */
            break;
    }
    ck_assert_msg(memmem(all, n, "\0\0\0\0\2\10\1", 7), "no reply");
    close(fd);
}

/* ---- tests ---- */

START_TEST(no_http)
{
    static const char *const said[] = {"", "GET / HTTP/1.1\r\nHost: kvd\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc", "PRI * HTTP/2.0\r\n\r\nXX"};

    for (size_t i = 0; i < sizeof(said) / sizeof(said[0]); i++) {
        int fd = dial();

        say(fd, said[i], strlen(said[i]));
        shutdown(fd, SHUT_WR);
        hear_out(fd);
        close(fd);
    }
    serves();
    wait_quiet();
}
END_TEST

/* Every prefix of a good conversation, and then the end. */
START_TEST(broken_off)
{
    struct text t = {0};
    static const uint8_t message[] = {0, 0, 0, 0, 2, 8, 1};

    add_hello(&t);
    add_call(&t, 1, "/kvd.v1.Cache/Match");
    add_frame(&t, DATA, END_STREAM, 1, message, sizeof(message));
    add_frame(&t, RST_STREAM, 0, 1, "\0\0\0\10", 4);
    for (size_t n = 0; n <= t.n; n++) {
        int fd = dial();

        say(fd, t.bytes, n);
        close(fd);
        if (n % 16 == 15)
            serves();
        while (harness_stat(&h, "kvd_grpc_connections", NULL) > 4)
            usleep(1000);
    }
    serves();
    wait_quiet();
}
END_TEST

/* Good conversations with some bytes changed. */
START_TEST(changed)
{
    static const uint8_t message[] = {0, 0, 0, 0, 2, 8, 1};

    for (int round = 0; round < 300; round++) {
        struct text t = {0};
        int fd = dial();

        add_hello(&t);
        add_call(&t, 1, round % 3 == 0 ? "/kvd.v1.Admin/List" : round % 3 == 1 ? "/kvd.v1.Cache/PublishStream" : "/grpc.health.v1.Health/Watch");
        add_frame(&t, DATA, round % 2 ? END_STREAM : 0, 1, message, sizeof(message));
        add_frame(&t, PING, 0, 0, "12345678", 8);
        for (uint64_t n = 1 + next_random() % 4; n > 0; n--)
            t.bytes[sizeof(preface) - 1 + next_random() % (t.n - sizeof(preface) + 1)] = (uint8_t)next_random();
        say(fd, t.bytes, t.n);
        if (next_random() % 2)
            usleep(next_random() % 500);
        close(fd);
        while (harness_stat(&h, "kvd_grpc_connections", NULL) > 4)
            usleep(1000);
    }
    serves();
    wait_quiet();
}
END_TEST

/* What the other side allows to be sent, and whether it has ended stream 1. */
struct flow {
    int fd;
    int64_t connection, stream;
    bool ended;
    uint8_t buf[1 << 16];
    size_t n;
};

static uint32_t word(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static void take_frame(struct flow *f, uint8_t type, uint8_t flags, uint32_t stream, const uint8_t *body, size_t n)
{
    struct text t = {0};

    if (type == WINDOW_UPDATE)
        *(stream ? &f->stream : &f->connection) += word(body);
    for (size_t i = 0; type == SETTINGS && i + 6 <= n; i += 6)
        if (body[i] == 0 && body[i + 1] == 4) /* INITIAL_WINDOW_SIZE */
            f->stream += (int64_t)word(body + i + 2) - 65535;
    if ((type == SETTINGS || type == PING) && !(flags & 1)) {
        add_frame(&t, type, 1, 0, body, type == PING ? n : 0);
        say(f->fd, t.bytes, t.n);
    }
    f->ended |= stream == 1 && (type == RST_STREAM || type == HEADERS);
}

static void take_frames(struct flow *f, int timeout_msec)
{
    struct pollfd p = {.fd = f->fd, .events = POLLIN};
    ssize_t got = poll(&p, 1, timeout_msec) == 1 ? recv(f->fd, f->buf + f->n, sizeof(f->buf) - f->n, 0) : -1;
    size_t at = 0;

    if (got == 0)
        f->ended = true;
    f->n += got > 0 ? (size_t)got : 0;
    while (f->n - at >= FRAME_HEAD) {
        const uint8_t *head = f->buf + at;
        size_t n = word(head) >> 8;

        if (f->n - at < FRAME_HEAD + n)
            break;
        take_frame(f, head[3], head[4], word(head + 5), head + FRAME_HEAD, n);
        at += FRAME_HEAD + n;
    }
    memmove(f->buf, f->buf + at, f->n - at);
    f->n -= at;
}

/* A message that says it is 4 GiB long: the library would take it all in before it looks, but the memory for all that is under way is
 * bounded, and then the call goes. Meanwhile others are served. */
START_TEST(endless_message)
{
    static const uint8_t begin[] = {0, 0xff, 0xff, 0xff, 0xff};
    static struct flow f;
    static struct text t;
    uint8_t chunk[4096] = {0};
    uint64_t sent = 0;

    f = (struct flow){.fd = dial(), .connection = 65535, .stream = 65535};
    add_hello(&t);
    add_call(&t, 1, "/kvd.v1.Cache/Match");
    add_frame(&t, DATA, 0, 1, begin, sizeof(begin));
    say(f.fd, t.bytes, t.n);
    f.connection -= (int64_t)sizeof(begin);
    f.stream -= (int64_t)sizeof(begin);
    while (!f.ended) {
        bool may = f.connection >= (int64_t)sizeof(chunk) && f.stream >= (int64_t)sizeof(chunk);

        take_frames(&f, may ? 0 : 10);
        if (!may || f.ended)
            continue;
        t.n = 0;
        add_frame(&t, DATA, 0, 1, chunk, sizeof(chunk));
        say(f.fd, t.bytes, t.n);
        f.connection -= (int64_t)sizeof(chunk);
        f.stream -= (int64_t)sizeof(chunk);
        sent += sizeof(chunk);
        if (sent % (4 << 20) == 0)
            serves();
        ck_assert_uint_lt(sent, 64 << 20); /* grpc_memory is 16M */
    }
    serves();
    close(f.fd);
    wait_quiet();
}
END_TEST

/* A call whose message never comes is ended. */
START_TEST(message_that_never_comes)
{
    static const uint8_t begun[] = {0, 0, 0, 1, 0, 8};
    struct text t = {0};
    int fd = dial();

    add_hello(&t);
    add_call(&t, 1, "/kvd.v1.Cache/Match");
    add_frame(&t, DATA, 0, 1, begun, sizeof(begun));
    say(fd, t.bytes, t.n);
    for (int i = 0; i < 3000 && calls_now() == 0; i++)
        usleep(1000);
    for (int i = 0; i < 3000 && calls_now() > 0; i++) /* stuck_timeout is a second */
        usleep(10000);
    ck_assert_uint_eq(calls_now(), 0);
    serves();
    close(fd);
    wait_quiet();
}
END_TEST

/* More connections than grpc_connections: the rest is hung up on, and others take their place when some go. */
START_TEST(many_connections)
{
    int fds[20];
    char byte;
    size_t n_refused = 0;

    for (size_t i = 0; i < 20; i++)
        fds[i] = dial();
    for (int i = 0; i < 3000 && n_refused < 12; i++) {
        n_refused = 0;
        for (size_t k = 0; k < 20; k++)
            n_refused += recv(fds[k], &byte, 1, MSG_DONTWAIT | MSG_PEEK) == 0;
        usleep(10000);
    }
    ck_assert_uint_eq(n_refused, 12);
    for (size_t i = 0; i < 20; i++)
        close(fds[i]);
    wait_quiet();
    serves();
}
END_TEST

int main(void)
{
    const char *text = getenv("KVD_SEED");
    Suite *suite = suite_create("grpc_wire");
    TCase *tc = tcase_create("wire");
    SRunner *runner;
    int failed;

    seed = text ? strtoull(text, NULL, 0) : (uint64_t)getpid() * 1000003u;
    printf("seed %llu\n", (unsigned long long)seed);
    fflush(stdout);
    tcase_set_timeout(tc, 120);
    tcase_add_checked_fixture(tc, start, stop);
    tcase_add_test(tc, no_http);
    tcase_add_test(tc, broken_off);
    tcase_add_test(tc, changed);
    tcase_add_test(tc, endless_message);
    tcase_add_test(tc, message_that_never_comes);
    tcase_add_test(tc, many_connections);
    suite_add_tcase(suite, tc);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
