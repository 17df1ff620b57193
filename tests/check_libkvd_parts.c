/* libkvd's parts that need no daemon: the stack of free leases, the multiplexer over a socket pair, errors, codecs. */
#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client/libkvd/kvd.h"
#include "client/libkvd/kvd_error.h"
#include "client/libkvd/kvd_lease.h"
#include "client/libkvd/kvd_mux.h"
#include "kernels/codec/codec.h"

/* ---- leases ---- */

START_TEST(lease_takes_all_once)
{
    struct lease_stack s;
    uint32_t words[10], more[4];
    bool seen[10] = {false};

    ck_assert_int_eq(lease_stack_init(&s, 10), 0);
    ck_assert_uint_eq(lease_take(&s, words, 4), 4);
    ck_assert_uint_eq(lease_take(&s, words + 4, 100), 6);
    ck_assert_uint_eq(lease_take(&s, more, 1), 0);
    for (int i = 0; i < 10; i++) {
        ck_assert_uint_lt(words[i], 10);
        ck_assert(!seen[words[i]]);
        seen[words[i]] = true;
    }
    lease_give(&s, words + 2, 3);
    ck_assert_uint_eq(lease_take(&s, more, 4), 3);
    lease_stack_deinit(&s);
}
END_TEST

START_TEST(lease_empty_table)
{
    struct lease_stack s;
    uint32_t word;

    ck_assert_int_eq(lease_stack_init(&s, 0), 0);
    ck_assert_uint_eq(lease_take(&s, &word, 1), 0);
    lease_give(&s, &word, 0);
    lease_stack_deinit(&s);
}
END_TEST

enum { LEASE_WORDS = 64, LEASE_THREADS = 4, LEASE_ROUNDS = 50000 };

struct lease_race {
    struct lease_stack stack;
    _Atomic int owner[LEASE_WORDS];
    _Atomic int n_wrong;
};

static void *lease_racer(void *ctx)
{
    struct lease_race *race = ctx;
    uint32_t words[16];

    for (int round = 0; round < LEASE_ROUNDS; round++) {
        size_t n = lease_take(&race->stack, words, 1 + (size_t)round % 16);

        for (size_t i = 0; i < n; i++)
            if (words[i] >= LEASE_WORDS || atomic_fetch_add(&race->owner[words[i]], 1) != 0)
                atomic_fetch_add(&race->n_wrong, 1);
        for (size_t i = 0; i < n; i++)
            atomic_fetch_sub(&race->owner[words[i]], 1);
        lease_give(&race->stack, words, n);
    }
    return NULL;
}

START_TEST(lease_no_word_twice_among_threads)
{
    struct lease_race race = {.n_wrong = 0};
    pthread_t t[LEASE_THREADS];
    uint32_t words[LEASE_WORDS];

    ck_assert_int_eq(lease_stack_init(&race.stack, LEASE_WORDS), 0);
    for (int i = 0; i < LEASE_THREADS; i++)
        ck_assert_int_eq(pthread_create(&t[i], NULL, lease_racer, &race), 0);
    for (int i = 0; i < LEASE_THREADS; i++)
        pthread_join(t[i], NULL);
    ck_assert_int_eq(race.n_wrong, 0);
    ck_assert_uint_eq(lease_take(&race.stack, words, LEASE_WORDS), LEASE_WORDS); /* none was lost */
    lease_stack_deinit(&race.stack);
}
END_TEST

/* ---- multiplexer ---- */

struct link {
    struct mux mux;
    int far; /* the other end */
};

static void link_setup(struct link *l)
{
    int fd[2];

    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fd), 0);
    ck_assert_int_eq(mux_init(&l->mux, fd[0], 1), 0);
    l->far = fd[1];
}

static void link_teardown(struct link *l)
{
    close(l->far);
    mux_deinit(&l->mux);
}

static void far_read(struct link *l, struct frame_header *ret)
{
    uint8_t buf[256];
    const uint8_t *body;
    const char *reason;
    int fds[FRAME_FDS_MAX];
    size_t n, n_fds;

    ck_assert_int_eq(frame_recv(l->far, buf, sizeof(buf), 0, &n, fds, &n_fds), 0);
    ck_assert_int_eq(frame_parse(buf, n, n_fds, ret, &body, &reason), 0);
}

START_TEST(mux_replies_in_any_order)
{
    struct mux_reply reply[2] = {{0}, {0}};
    struct mux_call call[2];
    struct frame_header h[2];
    struct link l;

    link_setup(&l);
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(mux_send(&l.mux, &call[i], FRAME_PING, "ab", 2, NULL, 0, 1000), 0);
        far_read(&l, &h[i]);
    }
    for (int i = 1; i >= 0; i--)
        ck_assert_int_eq(
            frame_send(l.far, FRAME_PING | FRAME_REPLY, h[i].request_id, i ? "one" : "zero", i ? 3 : 4, NULL, 0, 0), 0);
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(mux_wait(&l.mux, &call[i], 1000, &reply[i]), 0);
    ck_assert_uint_eq(reply[0].n, 4);
    ck_assert_mem_eq(reply[0].body, "zero", 4);
    ck_assert_mem_eq(reply[1].body, "one", 3);
    mux_reply_clear(&reply[0]);
    mux_reply_clear(&reply[1]);
    link_teardown(&l);
}
END_TEST

START_TEST(mux_timeout_then_late_reply_is_dropped)
{
    struct mux_reply reply = {0};
    struct frame_header h, h2;
    struct mux_call call;
    struct link l;

    link_setup(&l);
    ck_assert_int_eq(mux_send(&l.mux, &call, FRAME_PING, NULL, 0, NULL, 0, 1000), 0);
    far_read(&l, &h);
    ck_assert_int_eq(mux_wait(&l.mux, &call, 10, &reply), KVD_E_TIMEOUT);
    ck_assert_int_eq(mux_send(&l.mux, &call, FRAME_PING, NULL, 0, NULL, 0, 1000), 0);
    far_read(&l, &h2);
    ck_assert_uint_ne(h.request_id, h2.request_id);
    ck_assert_int_eq(frame_send(l.far, FRAME_PING | FRAME_REPLY, h.request_id, "late", 4, &l.far, 1, 0), 0);
    ck_assert_int_eq(frame_send(l.far, FRAME_PING | FRAME_REPLY, h2.request_id, "now", 3, NULL, 0, 0), 0);
    ck_assert_int_eq(mux_wait(&l.mux, &call, 5000, &reply), 0);
    ck_assert_mem_eq(reply.body, "now", 3);
    mux_reply_clear(&reply);
    link_teardown(&l);
}
END_TEST

START_TEST(mux_end_of_stream_ends_all)
{
    struct mux_call call[2];
    struct link l;

    link_setup(&l);
    ck_assert_int_eq(mux_send(&l.mux, &call[0], FRAME_PING, NULL, 0, NULL, 0, 1000), 0);
    ck_assert_int_eq(mux_send(&l.mux, &call[1], FRAME_PING, NULL, 0, NULL, 0, 1000), 0);
    shutdown(l.far, SHUT_RDWR);
    ck_assert_int_eq(mux_wait(&l.mux, &call[1], 5000, NULL), KVD_E_GONE);
    ck_assert_int_eq(mux_wait(&l.mux, &call[0], 5000, NULL), KVD_E_GONE);
    ck_assert_int_eq(mux_request(&l.mux, FRAME_PING, NULL, 0, NULL, 0, 1000, NULL), KVD_E_GONE);
    ck_assert_str_ne(error_get(1), "");
    link_teardown(&l);
}
END_TEST

enum { MUX_THREADS = 8, MUX_ROUNDS = 2000 };

static void *echo(void *ctx)
{
    struct link *l = ctx;
    static _Thread_local uint8_t buf[FRAME_MAX];

    for (;;) {
        struct frame_header h;
        const uint8_t *body;
        const char *reason;
        int fds[FRAME_FDS_MAX];
        size_t n = 0, n_fds = 0;

        if (frame_recv(l->far, buf, sizeof(buf), 0, &n, fds, &n_fds) < 0 || n == 0)
            return NULL;
        if (frame_parse(buf, n, n_fds, &h, &body, &reason) < 0 ||
            frame_send(l->far, h.type | FRAME_REPLY, h.request_id, body, h.length, NULL, 0, 0) < 0)
            return NULL;
    }
}

struct asker {
    struct link *link;
    uint32_t number;
    int n_wrong;
};

static void *asker_run(void *ctx)
{
    struct asker *a = ctx;

    for (uint32_t i = 0; i < MUX_ROUNDS; i++) {
        uint32_t said[2] = {a->number, i};
        struct mux_reply reply = {0};

        if (mux_request(&a->link->mux, FRAME_PING, said, sizeof(said), NULL, 0, 20000, &reply) != 0 ||
            reply.n != sizeof(said) || memcmp(reply.body, said, sizeof(said)) != 0)
            a->n_wrong++;
        mux_reply_clear(&reply);
    }
    return NULL;
}

START_TEST(mux_threads_get_their_own)
{
    struct asker asker[MUX_THREADS];
    pthread_t t[MUX_THREADS], far;
    struct link l;

    link_setup(&l);
    ck_assert_int_eq(pthread_create(&far, NULL, echo, &l), 0);
    for (uint32_t i = 0; i < MUX_THREADS; i++) {
        asker[i] = (struct asker){.link = &l, .number = i};
        ck_assert_int_eq(pthread_create(&t[i], NULL, asker_run, &asker[i]), 0);
    }
    for (int i = 0; i < MUX_THREADS; i++) {
        pthread_join(t[i], NULL);
        ck_assert_int_eq(asker[i].n_wrong, 0);
    }
    ck_assert_ptr_null(l.mux.pending);
    mux_kill(&l.mux, KVD_E_GONE);
    pthread_join(far, NULL);
    link_teardown(&l);
}
END_TEST

/* ---- errors ---- */

START_TEST(error_strings)
{
    for (int e = 0; e <= KVD_E_OPTION; e++)
        ck_assert_str_ne(kvd_strerror(e), "an unknown error");
    ck_assert_str_eq(kvd_strerror(KVD_E_OPTION + 1), "an unknown error");
    ck_assert_str_eq(kvd_strerror(-1), "an unknown error");
}
END_TEST

static void *other_thread(void *ctx)
{
    *(bool *)ctx = error_get(5)[0] == '\0';
    error_set(5, 1, "mine");
    return NULL;
}

START_TEST(error_notes_by_session_and_thread)
{
    bool was_empty = false;
    pthread_t t;

    ck_assert_int_eq(error_set(5, KVD_E_ARG, "five %d", 5), KVD_E_ARG);
    error_set(6, KVD_E_ARG, "six");
    ck_assert_str_eq(error_get(5), "five 5");
    ck_assert_int_eq(pthread_create(&t, NULL, other_thread, &was_empty), 0);
    pthread_join(t, NULL);
    ck_assert(was_empty);
    ck_assert_str_eq(error_get(5), "five 5");
    for (uint64_t cookie = 100; cookie < 110; cookie++) /* more sessions than notes: the oldest go */
        error_set(cookie, KVD_E_ARG, "other");
    ck_assert_str_eq(error_get(5), "");
    ck_assert_str_eq(error_get(109), "other");
}
END_TEST

/* ---- codecs ---- */

START_TEST(codec_names_are_codecs)
{
    struct codec_spec spec;

    for (const char *const *name = kvd_codec_names(); *name; name++) {
        ck_assert_msg(codec_spec_parse(*name, CODEC_K, &spec, NULL) == 0, "%s", *name);
        ck_assert_ptr_nonnull(kvd_codec_help(*name));
    }
    for (size_t i = 0; codec_spec_example(i); i++) { /* and every codec has a name */
        char text[CODEC_TEXT_MAX];

        snprintf(text, sizeof(text), "%s", codec_spec_example(i));
        ck_assert_msg(kvd_codec_help(text) != NULL || strcmp(text, "f16") == 0, "%s", text);
    }
    ck_assert_ptr_null(kvd_codec_help("nothing"));
}
END_TEST

START_TEST(codec_round_trip)
{
    enum { T = 64, D = 128 };
    static float x[T * D], y[T * D];
    double error[2] = {0}, power = 0;
    size_t n = 0;
    void *code;

    for (int i = 0; i < T * D; i++)
        x[i] = sinf((float)i * 0.37f) * 3;
    for (int is_v = 0; is_v < 2; is_v++) {
        const char *spec = is_v ? "tq4" : "kc4";

        ck_assert_int_eq(kvd_codec_bytes(spec, is_v, T, D, &n, NULL), KVD_OK);
        ck_assert_uint_lt(n, sizeof(x) / 6);
        code = malloc(n);
        ck_assert_int_eq(kvd_codec_encode(spec, is_v, KVD_F32, x, T, D, code), KVD_OK);
        ck_assert_int_eq(kvd_codec_decode(spec, is_v, code, T, D, KVD_F32, y), KVD_OK);
        free(code);
        power = 0;
        for (int i = 0; i < T * D; i++) {
            error[is_v] += (double)(x[i] - y[i]) * (x[i] - y[i]);
            power += (double)x[i] * x[i];
        }
        ck_assert_msg(error[is_v] / power < 0.02, "%s: %g", spec, error[is_v] / power);
    }
}
END_TEST

START_TEST(codec_refusals)
{
    float x[64] = {0};
    const char *reason = NULL;
    uint8_t code[1024];
    size_t n;

    ck_assert_int_eq(kvd_codec_bytes("nothing", 0, 64, 64, &n, &reason), KVD_E_LAYOUT);
    ck_assert_ptr_nonnull(reason);
    ck_assert_int_eq(kvd_codec_bytes("kc4", 0, 5000, 64, &n, NULL), KVD_E_LAYOUT);
    ck_assert_int_eq(kvd_codec_bytes("kc4", 0, 64, 63, &n, NULL), KVD_E_LAYOUT);
    ck_assert_int_eq(kvd_codec_encode("kc4", 0, (enum kvd_dtype)9, x, 1, 64, code), KVD_E_LAYOUT);
    x[3] = NAN;
    ck_assert_int_eq(kvd_codec_encode("tq4", 1, KVD_F32, x, 1, 64, code), KVD_E_VALUE);
    ck_assert_ptr_nonnull(strstr(kvd_message(NULL), "channel 3"));
    ck_assert_int_eq(kvd_codec_uq_page("kc4", "uq4", KVD_F32, x, x, 1, 64, code), KVD_E_LAYOUT);
}
END_TEST

START_TEST(codec_uq_page_layout)
{
    enum { T = 3, D = 64, SLOT = 2 * (D / 2 + D / 32) };
    float k[T * D], v[T * D];
    uint8_t page[T * SLOT + 1], code[T * SLOT];
    size_t n;

    for (int i = 0; i < T * D; i++) {
        k[i] = (float)(i % 7) - 3;
        v[i] = (float)(i % 5) - 2;
    }
    page[T * SLOT] = 0xaa;
    ck_assert_int_eq(kvd_codec_uq_page("uq4", "uq4", KVD_F32, k, v, T, D, page), KVD_OK);
    ck_assert_uint_eq(page[T * SLOT], 0xaa);
    /* A token's V codes and scales lie where the page has them. */
    ck_assert_int_eq(kvd_codec_bytes("uq4", 1, T, D, &n, NULL), KVD_OK);
    ck_assert_uint_eq(n, T * (D / 2 + D / 32));
    ck_assert_int_eq(kvd_codec_encode("uq4", 1, KVD_F32, v, T, D, code), KVD_OK);
    for (int t = 0; t < T; t++) {
        ck_assert_mem_eq(page + t * SLOT + D / 2 + D / 32, code + T * (D / 32) + t * (D / 2), D / 2);
        ck_assert_mem_eq(page + t * SLOT + D + D / 32, code + t * (D / 32), D / 32);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("libkvd_parts");
    TCase *lease = tcase_create("lease"), *mux = tcase_create("mux"), *rest = tcase_create("rest");
    SRunner *runner = srunner_create(s);
    int n_failed;

    tcase_add_test(lease, lease_takes_all_once);
    tcase_add_test(lease, lease_empty_table);
    tcase_add_test(lease, lease_no_word_twice_among_threads);
    tcase_set_timeout(lease, 120);
    suite_add_tcase(s, lease);
    tcase_add_test(mux, mux_replies_in_any_order);
    tcase_add_test(mux, mux_timeout_then_late_reply_is_dropped);
    tcase_add_test(mux, mux_end_of_stream_ends_all);
    tcase_add_test(mux, mux_threads_get_their_own);
    tcase_set_timeout(mux, 120);
    suite_add_tcase(s, mux);
    tcase_add_test(rest, error_strings);
    tcase_add_test(rest, error_notes_by_session_and_thread);
    tcase_add_test(rest, codec_names_are_codecs);
    tcase_add_test(rest, codec_round_trip);
    tcase_add_test(rest, codec_refusals);
    tcase_add_test(rest, codec_uq_page_layout);
    suite_add_tcase(s, rest);
    srunner_run_all(runner, CK_ENV);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
