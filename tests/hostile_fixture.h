/* What the suites of attacks share: a daemon, a victim that keeps checking a leased chain, an attacker that speaks the socket by hand. */
#ifndef KVD_TESTS_HOSTILE_FIXTURE_H
#define KVD_TESTS_HOSTILE_FIXTURE_H

#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "tests/harness.h"
#include "tests/rawclient.h"

struct fixture {
    struct harness h;
    struct worker victim;
    struct raw raw;
    uint8_t fingerprint[32];
    uint32_t space;
};

/* options: lines of the daemon's file, up to a NULL. */
static inline struct fixture *setup_with(const char *const *options)
{
    struct fixture *f = calloc(1, sizeof(*f));

    if (!f)
        abort();
    raw_init(&f->raw);
    harness_init(&f->h);
    for (; *options; options++)
        harness_option(&f->h, *options);
    harness_start(&f->h);
    worker_start(&f->victim, &f->h, (uid_t)-1);
    ck_assert_int_eq(strncmp(worker_ask(&f->victim, "open 0 raw 64"), "ok ", 3), 0);
    ck_assert_str_eq(worker_ask(&f->victim, "match 0 7 160"), "ok 0");
    ck_assert_str_eq(worker_ask(&f->victim, "publish 0 0 10 0"), "ok 10 0 0");
    ck_assert_str_eq(worker_ask(&f->victim, "match 0 7 160"), "ok 160");
    return f;
}

static inline struct fixture *setup(void)
{
    static const char *const options[] = {"hello_timeout = 300ms", "stuck_timeout = 500ms", "reply_queue_bytes = 128K", NULL};

    return setup_with(options);
}

/* The victim works on as before. */
static inline void feels_nothing(struct fixture *f)
{
    ck_assert_str_eq(worker_ask(&f->victim, "load 0 verify"), "ok 10 0 0");
    ck_assert_str_eq(worker_ask(&f->victim, "match 0 7 160"), "ok 160");
    ck_assert_str_eq(worker_ask(&f->victim, "load 0 verify"), "ok 10 0 0");
    ck_assert_str_eq(worker_ask(&f->victim, "ping"), "ok");
}

static inline void teardown(struct fixture *f)
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

static inline void attach(struct fixture *f)
{
    ck_assert_int_eq(raw_connect(&f->raw, f->h.socket), 0);
    ck_assert_int_eq(raw_hello(&f->raw, "attacker"), 0);
}

static inline void attach_with_space(struct fixture *f)
{
    attach(f);
    f->space = raw_space(&f->raw, "hostile", f->fingerprint);
    ck_assert_uint_gt(f->space, 0);
}

static inline int slab_fd(struct raw *r, uint32_t slab, uint64_t *ret_bytes)
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

#endif
