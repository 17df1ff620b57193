/* Attention by the daemon with real processes: right against fp64 attention over loaded values, also when many ask at once, when one of
 * them dies in the middle, when blocks are evicted meanwhile, and when the daemon goes. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/attend_fixture.h"

static const struct at_shape shapes[] = {
    /* name, KV heads, ratio, K, V, codecs, first, window, block, dtype, bound */
    {"default", 2, 4, 128, 128, NULL, NULL, NULL, NULL, 0, 64, KVD_F16, 1e-2},
    {"mha", 4, 1, 64, 64, NULL, NULL, NULL, NULL, 0, 64, KVD_F16, 1e-2},
    {"mqa", 1, 8, 256, 256, NULL, NULL, NULL, NULL, 0, 64, KVD_BF16, 1e-2},
    {"raw", 2, 4, 64, 64, "raw", "raw", NULL, NULL, 0, 16, KVD_F16, 1e-2},
    {"f32", 1, 1, 80, 96, "raw", "raw", NULL, NULL, 0, 16, KVD_F32, 1e-2},
    {"latent", 1, 16, 576, 0, NULL, NULL, NULL, NULL, 0, 64, KVD_BF16, 1e-2},
    {"slide", 2, 4, 128, 128, NULL, NULL, NULL, NULL, 300, 64, KVD_F16, 1e-2},
};
enum { N_SHAPES = sizeof(shapes) / sizeof(shapes[0]), BLOCKS = 11, WORKERS = 6 };

static struct at_bed bed;

static uint32_t below(uint32_t n)
{
    return (uint32_t)(test_random(&bed.random) % n);
}

static int attend(kvd_prefix *prefix, const struct kvd_attention *a)
{
    uint64_t ticket;
    int r = kvd_attend_submit(prefix, a, 0, &ticket);

    return r == KVD_OK ? kvd_attend_collect(prefix, ticket, 20000) : r;
}

static void attend_and_compare(struct at_call *c, const char *what)
{
    int r = attend(bed.prefix, &c->a);

    ck_assert_msg(r == KVD_OK, "%s: %s: %s (%s)", bed.shape.name, what, kvd_strerror(r), kvd_message(bed.k));
    at_compare(&bed, c, bed.shape.bound, what);
}

/* ---- against the definition ---- */

START_TEST(every_shape)
{
    at_setup(&bed, "every_shape", NULL);
    for (size_t i = 0; i < N_SHAPES; i++) {
        at_setup_space(&bed, &shapes[i], BLOCKS);
        for (int round = 0; round < 6; round++) {
            struct at_call c;

            at_call_init(&c, &bed, round < 4 ? 1 : 1 + below(5), round % 3);
            c.a.layer = below(AT_LAYERS);
            c.a.softcap = round == 2 ? 20 : 0;
            if (round == 3)
                c.a.mass = NULL;
            if (round == 5 && !bed.shape.window) {
                c.a.first_block = below(BLOCKS);
                c.a.n_blocks = 1 + below((uint32_t)(BLOCKS - c.a.first_block));
                c.a.first_position = below(BLOCKS * bed.shape.block_tokens);
                c.a.window_tokens = 1 + below(200);
                c.a.sink_tokens = below(100);
            }
            attend_and_compare(&c, "random");
            at_call_deinit(&c);
        }
        at_teardown_space(&bed);
    }
    ck_assert_uint_ge(harness_stat(&bed.h, "kvd_attend_done_total", NULL), N_SHAPES * 6);
    ck_assert_uint_eq(harness_stat(&bed.h, "kvd_attend_failed_total", NULL), 0);
    at_teardown(&bed);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("attend_daemon");
    TCase *tc = tcase_create("daemon");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(tc, 240);
    tcase_add_test(tc, every_shape);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
