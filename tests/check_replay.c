/* What the replay bench says: the offline optimum against trying everything, the trace reader, and that no policy beats
 * the optimum. */
#include "bench/replay_sim.h"
#include "bench/replay_trace.h"

#include <check.h>
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char path[] = "/tmp/check_replay.XXXXXX";

static uint64_t rnd(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static int read_text(struct trace *t, const char *text, size_t *ret_line)
{
    FILE *f = fopen(path, "we");

    ck_assert_ptr_nonnull(f);
    ck_assert_int_ge(fputs(text, f), 0);
    ck_assert_int_eq(fclose(f), 0);
    return trace_read(t, path, ret_line);
}

static void make_file(void)
{
    int fd;

    strcpy(path + strlen(path) - 6, "XXXXXX");
    fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    close(fd);
}

static void drop_file(void)
{
    unlink(path);
}

/* ---- the reader ---- */

START_TEST(reads)
{
    struct trace t;
    size_t line = 0;

    ck_assert_int_eq(read_text(&t,
                               "{\"timestamp\": 1, \"hash_ids\": [5, 6, 7]}\n\n{\"hash_ids\":[5,6,9], \"x\":[1]}\r\n"
                               "{\"hash_ids\" : [ ] }\n{\"hash_ids\": [6]}",
                               &line),
                     0);
    ck_assert_uint_eq(t.n_requests, 4);
    ck_assert_uint_eq(t.n_uses, 7);
    ck_assert_uint_eq(t.n_blocks, 5); /* 5, 6, 7, 9 below 6, and a 6 with no parent, another than the first 6 */
    ck_assert_uint_eq(t.uses[0], t.uses[3]);
    ck_assert_uint_eq(t.parent[t.uses[5]], t.uses[4]);
    ck_assert_uint_eq(t.parent[t.uses[6]], TRACE_NO_PARENT);
    ck_assert_uint_eq(t.first[2], t.first[3]);
    ck_assert_uint_eq(t.first[4], 7);
    trace_deinit(&t);
}
END_TEST

static const char *const bad[] = {
    "",
    "{}",
    "{\"hash_ids\": 5}",
    "{\"hash_ids\": [1, 2}",
    "{\"hash_ids\": [1,, 2]}",
    "{\"hash_ids\": [-1]}",
    "{\"hash_ids\": [1, \"a\"]}",
    "{\"hash_ids\": [99999999999999999999999]}",
    "{\"hash_ids\": [",
    "{\"hash_ids\"",
};

START_TEST(refuses)
{
    struct trace t;
    char text[200];
    size_t line = 0;

    snprintf(text, sizeof(text), "%s%s\n", _i ? "{\"hash_ids\": [1]}\n" : "", bad[_i]);
    ck_assert_int_eq(read_text(&t, text, &line), -EINVAL);
    if (_i)
        ck_assert_uint_eq(line, 2);
    trace_deinit(&t);
    ck_assert_int_eq(trace_read(&t, "/nonexistent/trace", &line), -ENOENT);
    trace_deinit(&t);
}
END_TEST

START_TEST(made_up)
{
    struct trace a, b, c;

    ck_assert_int_eq(trace_make(&a, 1), 0);
    ck_assert_int_eq(trace_make(&b, 1), 0);
    ck_assert_int_eq(trace_make(&c, 2), 0);
    ck_assert_uint_eq(a.n_uses, b.n_uses);
    ck_assert_int_eq(memcmp(a.uses, b.uses, a.n_uses * sizeof(*a.uses)), 0);
    ck_assert(a.n_uses != c.n_uses || memcmp(a.uses, c.uses, a.n_uses * sizeof(*a.uses)) != 0);
    ck_assert_uint_lt(a.n_blocks, a.n_uses);
    trace_deinit(&a);
    trace_deinit(&b);
    trace_deinit(&c);
}
END_TEST

/* ---- the optimum ---- */

#define SMALL_BLOCKS 8u

static bool whole_chains(const struct trace *t, unsigned set)
{
    for (unsigned b = 0; b < t->n_blocks; b++)
        if (set >> b & 1 && t->parent[b] != TRACE_NO_PARENT && !(set >> t->parent[b] & 1))
            return false;
    return true;
}

/* The most hits that any sequence of decisions can have: all sets of blocks that keep chains whole, at each use. */
static int most_hits(const struct trace *t, int cap)
{
    int best[1u << SMALL_BLOCKS], next[1u << SMALL_BLOCKS], most = 0;
    unsigned n_sets = 1u << t->n_blocks;

    for (unsigned s = 0; s < n_sets; s++)
        best[s] = s == 0 ? 0 : -1;
    for (size_t i = 0; i < t->n_uses; i++) {
        unsigned x = 1u << t->uses[i];

        for (unsigned s = 0; s < n_sets; s++)
            next[s] = -1;
        for (unsigned s = 0; s < n_sets; s++) {
            if (best[s] < 0)
                continue;
            for (unsigned to = s | x;; to = (to - 1) & (s | x)) { /* all subsets of what is there and what has come */
                int hits = best[s] + ((s & x) != 0);

                if (__builtin_popcount(to) <= cap && whole_chains(t, to) && hits > next[to])
                    next[to] = hits;
                if (to == 0)
                    break;
            }
        }
        memcpy(best, next, sizeof(best));
    }
    for (unsigned s = 0; s < n_sets; s++)
        most = best[s] > most ? best[s] : most;
    return most;
}

/* A few requests along random paths of a small random forest. */
static void small_trace(struct trace *t, uint64_t *rng)
{
    char text[4096];
    size_t n = 0, line = 0;
    unsigned n_requests = 3 + (unsigned)(rnd(rng) % 8), parent[SMALL_BLOCKS];

    for (unsigned b = 0; b < SMALL_BLOCKS; b++)
        parent[b] = b == 0 || rnd(rng) % 4 == 0 ? SMALL_BLOCKS : (unsigned)(rnd(rng) % b);
    for (unsigned r = 0; r < n_requests; r++) {
        unsigned path_of[SMALL_BLOCKS], depth = 0;

        for (unsigned b = (unsigned)(rnd(rng) % SMALL_BLOCKS); b < SMALL_BLOCKS; b = parent[b])
            path_of[depth++] = b;
        n += (size_t)snprintf(text + n, sizeof(text) - n, "{\"hash_ids\": [");
        while (depth-- > 0)
            n += (size_t)snprintf(text + n, sizeof(text) - n, "%u%s", path_of[depth], depth ? ", " : "]}\n");
    }
    ck_assert_int_eq(read_text(t, text, &line), 0);
    ck_assert_uint_le(t->n_blocks, SMALL_BLOCKS);
}

START_TEST(optimum_is_the_most)
{
    const char *env = getenv("KVD_SEED");
    uint64_t rng = env ? strtoull(env, NULL, 0) : 42;

    printf("check_replay: KVD_SEED=%llu\n", (unsigned long long)rng);
    for (int run = 0; run < 100; run++) {
        struct trace t;

        small_trace(&t, &rng);
        for (uint32_t cap = 1; cap <= t.n_blocks; cap++) {
            double most = 100.0 * most_hits(&t, (int)cap) / (double)t.n_uses;

            ck_assert_double_eq_tol(replay_optimum(&t, cap), most, 1e-9);
            for (size_t i = 0; policy_at(i); i++)
                ck_assert_double_le(replay_policy(&t, policy_at(i), cap), most + 1e-9);
        }
        trace_deinit(&t);
    }
}
END_TEST

START_TEST(bounds)
{
    struct trace t;
    double room_for_all;

    ck_assert_int_eq(trace_make(&t, 3), 0);
    room_for_all = 100.0 * (double)(t.n_uses - t.n_blocks) / (double)t.n_uses;
    ck_assert_double_eq_tol(replay_optimum(&t, (uint32_t)t.n_blocks), room_for_all, 1e-9);
    for (size_t i = 0; policy_at(i); i++) {
        ck_assert_double_eq_tol(replay_policy(&t, policy_at(i), (uint32_t)t.n_blocks), room_for_all, 1e-9);
        for (uint32_t cap = 1; cap < t.n_blocks; cap *= 5)
            ck_assert_double_le(replay_policy(&t, policy_at(i), cap), replay_optimum(&t, cap) + 1e-9);
    }
    trace_deinit(&t);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("replay");
    TCase *c = tcase_create("replay");
    SRunner *r = srunner_create(s);
    int n_failed;

    tcase_add_checked_fixture(c, make_file, drop_file);
    tcase_set_timeout(c, 120);
    tcase_add_test(c, reads);
    tcase_add_loop_test(c, refuses, 0, (int)(sizeof(bad) / sizeof(bad[0])));
    tcase_add_test(c, made_up);
    tcase_add_test(c, optimum_is_the_most);
    tcase_add_test(c, bounds);
    suite_add_tcase(s, c);
    srunner_run_all(r, CK_NORMAL);
    n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
