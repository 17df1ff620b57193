/* What the suites of bounds share: a daemon, a well-behaved worker, a raw client. */
#ifndef KVD_TESTS_LIMITS_FIXTURE_H
#define KVD_TESTS_LIMITS_FIXTURE_H

#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "tests/harness.h"
#include "tests/rawclient.h"

struct fixture {
    struct harness h;
    struct worker w;
    struct raw raw;
};

static inline struct fixture *setup(const char *option1, const char *option2)
{
    struct fixture *f = calloc(1, sizeof(*f));

    if (!f)
        abort();
    raw_init(&f->raw);
    harness_init(&f->h);
    if (option1)
        harness_option(&f->h, option1);
    if (option2)
        harness_option(&f->h, option2);
    harness_start(&f->h);
    worker_start(&f->w, &f->h, (uid_t)-1);
    return f;
}

static inline void teardown(struct fixture *f)
{
    raw_close(&f->raw);
    ck_assert_str_eq(worker_ask(&f->w, "ping"), "ok");
    ck_assert_int_eq(worker_stop(&f->w), 0);
    ck_assert(harness_quiet(&f->h, 0, 5000));
    ck_assert_uint_eq(harness_verify(&f->h), 0);
    ck_assert_int_eq(harness_stop(&f->h), 0);
    harness_deinit(&f->h);
    free(f);
}

#define SAYS(f, answer, ...) ck_assert_str_eq(worker_ask(&(f)->w, __VA_ARGS__), answer)
#define OK(f, ...) ck_assert_msg(strncmp(worker_ask(&(f)->w, __VA_ARGS__), "ok ", 3) == 0, "%s", (f)->w.reply)

/* "error NUMBER ...": the number, and the text holds word. */
static inline void expect_error(const char *reply, int error, const char *word)
{
    ck_assert_msg(strncmp(reply, "error ", 6) == 0, "%s", reply);
    ck_assert_msg(atoi(reply + 6) == error, "%s", reply);
    ck_assert_msg(!word || strstr(reply, word), "no \"%s\" in: %s", word, reply);
}

#endif
