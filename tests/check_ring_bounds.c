/* What one worker may cost the attention threads, whatever it asks for: memory for pieces, time after nobody waits any more, turns. */
#include <check.h>
#include <stdio.h>

#include "daemon/attend-internal.h"
#include "tests/ring_fixture.h"

enum { BIG_BYTES = 32 << 20, BIG_BLOCKS = 16384, BIG_TOKENS = 60000 };

static struct ring_bed bed;
static struct ring_worker worker;

static void teardown(void)
{
    rb_worker_close(&worker);
    rb_teardown(&bed);
}

static void setup(void)
{
    rb_setup(&bed, 2);
    rb_worker_open(&bed, &worker);
}

/* Limits as the options' defaults, and a memory for one request of that size. */
static void setup_big(void)
{
    const char *why = "";

    rb_setup(&bed, 2);
    bed.tenant = attend_tenant_destroy(bed.tenant);
    bed.attend = attend_destroy(bed.attend);
    bed.config.n_words = 4 * BIG_BLOCKS;
    bed.config.limits.request_bytes = BIG_BYTES;
    bed.config.limits.worker_bytes = bed.config.limits.memory_bytes = 4 * (uint64_t)BIG_BYTES;
    bed.config.limits.n_blocks = BIG_BLOCKS;
    RB_CHECK(attend_create(&bed.config, &bed.attend) == 0);
    bed.attend->nsec_per_unit = 100; /* as on a very slow machine: each piece is a block */
    RB_CHECK(attend_tenant_create(bed.attend, bed.cache, &bed.tenant) == 0);
    rb_worker_open(&bed, &worker);
    munmap(worker.memory, RB_MEMORY);
    close(worker.fd);
    worker.fd = rb_memfd(BIG_BYTES);
    worker.memory = mmap(NULL, BIG_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, worker.fd, 0);
    RB_CHECK(worker.memory != MAP_FAILED && attend_ring_add(worker.ring, worker.fd, BIG_BYTES, &worker.id, &why) == 0);
}

static struct shm_completion await(void)
{
    struct shm_completion c = {0};

    ck_assert_msg(rb_next(&worker, 20000000, &c), "no completion within 20 s");
    return c;
}

static struct metrics measure(void)
{
    struct metrics m = {0};

    attend_measure(bed.attend, &m);
    return m;
}

/* One block, over and over: its pieces would fill gigabytes if they were listed, and take days. */
static uint64_t endless(uint64_t deadline_usec)
{
    struct shm_request *h = rb_header(&worker, 0);
    uint64_t *refs, at = 128;

    memset(h, 0, sizeof(*h));
    *h = (struct shm_request){.header_bytes = sizeof(*h), .space = bed.space->id, .n_heads = RB_HEADS, .n_tokens = BIG_TOKENS,
                              .n_refs = BIG_BLOCKS, .dtype = CODEC_F32, .dim_o = RB_DIM, .scale = 1, .deadline_usec = deadline_usec};
    h->positions_off = at;
    h->refs_off = at += (BIG_TOKENS * 4 + 63) / 64 * 64;
    h->q_off = at += BIG_BLOCKS * 8;
    h->o_off = h->q_off; /* in its own memory it may do as it likes */
    at += (uint64_t)BIG_TOKENS * RB_HEADS * RB_DIM * 4;
    h->lse_off = at;
    refs = (uint64_t *)(void *)(worker.memory + h->refs_off);
    for (uint32_t i = 0; i < BIG_BLOCKS; i++)
        refs[i] = bed.refs[0];
    memset(worker.memory + h->positions_off, 0x7f, BIG_TOKENS * 4);
    return at + (uint64_t)BIG_TOKENS * RB_HEADS * 4;
}

static void await_pieces(void)
{
    while (measure().attend_pieces < 20)
        usleep(1000);
}

/* It ends where it is, not after having gone through what is left. */
START_TEST(endless_is_cancelled)
{
    uint64_t n;

    rb_submit(&bed, &worker, 1, 0, endless(0));
    await_pieces();
    pthread_mutex_lock(&bed.attend->lock);
    n = bed.tenant->jobs->n_pieces;
    pthread_mutex_unlock(&bed.attend->lock);
    ck_assert_uint_gt(n, 100000000);
    atomic_store(&rb_header(&worker, 0)->cancelled, 1);
    ck_assert_uint_eq(await().reason, RING_CANCELLED);
    rb_submit(&bed, &worker, 2, 0, rb_request(&bed, &worker, 0, 4, 4, 0));
    ck_assert_uint_eq(await().reason, RING_DONE);
}
END_TEST

START_TEST(endless_is_late)
{
    rb_submit(&bed, &worker, 1, 0, endless(rb_usec() + 300000));
    ck_assert_uint_eq(await().reason, RING_DEADLINE);
}
END_TEST

/* The worker goes: teardown waits for what is being computed. */
START_TEST(endless_is_left)
{
    rb_submit(&bed, &worker, 1, 0, endless(0));
    await_pieces();
}
END_TEST

/* Its end beside one that goes on: the same blocks, and more of them. */
START_TEST(shared_goes_on)
{
    struct ring_worker other;
    struct shm_completion c;

    rb_submit(&bed, &worker, 1, 0, endless(0));
    rb_worker_open(&bed, &other);
    for (int i = 0; i < 20; i++) {
        rb_submit(&bed, &other, 2, 0, rb_request(&bed, &other, 0, 1 + (uint32_t)i % RB_BLOCKS, 4, 0));
        ck_assert(rb_next(&other, 20000000, &c));
        ck_assert_uint_eq(c.reason, RING_DONE);
        if (i == 10)
            atomic_store(&rb_header(&worker, 0)->cancelled, 1);
    }
    ck_assert_uint_eq(await().reason, RING_CANCELLED);
    rb_worker_close(&other);
}
END_TEST

/* Queries that are no numbers are found when all has been copied: that counts for how long a pass over the rings may take. */
START_TEST(wrong_queries_are_work)
{
    uint64_t bytes = rb_request(&bed, &worker, 0, 4, 4, 0);
    unsigned n;

    *(float *)(void *)(worker.memory + rb_header(&worker, 0)->q_off) = NAN;
    while (bed.attend->knocks || pthread_mutex_trylock(&bed.attend->rings_lock) != 0)
        ;
    for (uint64_t i = 0; i < 10; i++)
        rb_submit(&bed, &worker, i, 0, bytes);
    n = attend_poll(bed.attend);
    pthread_mutex_unlock(&bed.attend->rings_lock);
    ck_assert_uint_ge(n, 1);
    ck_assert_uint_le(n, 2); /* of 512 KiB each at most, by the limit; a pass is 1 MiB */
    for (uint64_t i = 0; i < 10; i++)
        ck_assert_uint_eq(await().reason, RING_QUERY);
}
END_TEST

/* Finite queries, and scores that are not. */
START_TEST(scores_beyond_fp32)
{
    uint64_t bytes = rb_request(&bed, &worker, 0, 4, 4, 0);
    const struct payload_part *part = &space_layout(bed.space, 0, false)->parts[0];
    uint64_t host = atomic_load(&cache_view(bed.cache)->entries[shm_ref_entry(bed.refs[0])].host);
    float *k = (float *)(void *)((char *)cache_leased_at(bed.cache, host) + part->off + part->tile.k_codes_off);

    for (uint32_t i = 0; i < RB_DIM; i++) {
        k[i] = 1e30f;
        ((float *)(void *)(worker.memory + rb_header(&worker, 0)->q_off))[i] = 1e30f;
    }
    rb_submit(&bed, &worker, 1, 0, bytes);
    ck_assert_uint_eq(await().reason, RING_RANGE);
}
END_TEST

/* Widths that the kernels do not compute. */
START_TEST(width_of_latent_values)
{
    static const uint32_t window = 0;
    static const struct space_layer_desc layer = {1, 64, 0, 0, "raw", "", "raw", ""};
    struct space_desc desc = {.model = "latent", .revision = "", .rope = "", .shard = "", .dtype = CODEC_F32, .block_tokens = RB_TOKENS,
                              .window_tokens = &window, .n_groups = 1, .layers = &layer, .n_layers = 1};
    uint64_t bytes = rb_request(&bed, &worker, 0, 1, 8, 0) + 8 * 64 * 8;
    struct space *space = NULL;
    const char *why = "";

    ck_assert_msg(cache_space_open(bed.cache, &desc, &space, &why) == 0, "%s", why);
    memset(worker.memory + rb_header(&worker, 0)->q_off, 0, 8 * 64 * sizeof(float));
    for (uint32_t dim = 0; dim <= 80; dim++) {
        struct shm_completion c;

        rb_header(&worker, 0)->space = space->id;
        rb_header(&worker, 0)->dim_o = dim;
        rb_submit(&bed, &worker, dim, 0, bytes);
        c = await();
        ck_assert_msg(c.reason == (dim && dim % 16 == 0 && dim <= 64 ? RING_FOREIGN : RING_DIM), "%u: %u", dim, c.reason);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ring_bounds");
    TCase *big = tcase_create("endless"), *small = tcase_create("turns");
    SRunner *runner;
    int n_failed;

    tcase_add_checked_fixture(big, setup_big, teardown);
    tcase_set_timeout(big, 120);
    tcase_add_test(big, endless_is_cancelled);
    tcase_add_test(big, endless_is_late);
    tcase_add_test(big, endless_is_left);
    tcase_add_test(big, shared_goes_on);
    suite_add_tcase(suite, big);
    tcase_add_checked_fixture(small, setup, teardown);
    tcase_set_timeout(small, 120);
    tcase_add_test(small, wrong_queries_are_work);
    tcase_add_test(small, scores_beyond_fp32);
    tcase_add_test(small, width_of_latent_values);
    suite_add_tcase(suite, small);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}
