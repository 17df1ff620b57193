/* No room: a full tier, a full index, quotas, pins, leases, no huge pages. What can leave leaves, children before parents; what may not
 * leave stays; and where nothing can, that is said. */
#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/harness.h"
#include "tests/limits_fixture.h"

/* Chains without a common block, one after another. Returns how many blocks were stored before the first refusal. */
static int fill(struct fixture *f, int n_chains, int place)
{
    for (int p = 1; p <= n_chains; p++) {
        OK(f, "match %d %d 160", place, p * 64);
        if (strncmp(worker_ask(&f->w, "publish %d 0 10 0", place), "ok ", 3) != 0)
            return p - 1;
    }
    return n_chains;
}

struct family {
    uint8_t keys[8192][KVD_KEY_BYTES], parents[8192][KVD_KEY_BYTES];
    int first[8192];
    size_t n;
};

static int note(void *ctx, const struct kvd_block_info *b)
{
    struct family *all = ctx;

    ck_assert_uint_lt(all->n, 8192);
    memcpy(all->keys[all->n], b->key, KVD_KEY_BYTES);
    memcpy(all->parents[all->n], b->parent, KVD_KEY_BYTES);
    all->first[all->n++] = b->first;
    return 0;
}

/* Whoever is there has its parent there. */
static void no_orphans(struct fixture *f)
{
    struct family *all = calloc(1, sizeof(*all));
    struct kvd_selector any = {0};

    ck_assert_ptr_nonnull(all);
    ck_assert_int_eq(kvd_admin_blocks(harness_admin(&f->h), &any, note, all), KVD_OK);
    ck_assert_uint_gt(all->n, 0);
    for (size_t i = 0; i < all->n; i++) {
        bool found = all->first[i];

        for (size_t j = 0; j < all->n && !found; j++)
            found = memcmp(all->keys[j], all->parents[i], KVD_KEY_BYTES) == 0;
        ck_assert_msg(found, "block %zu of %zu has lost its parent", i, all->n);
    }
    free(all);
}

START_TEST(a_full_tier_evicts)
{
    struct fixture *f = setup("host_bytes = 8M", NULL);

    OK(f, "open 0 raw 40");
    ck_assert_int_eq(fill(f, 120, 0), 120); /* 1200 blocks of 16 KiB into 8 MiB */
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_tenant_evicted_total", NULL), 600);
    ck_assert_uint_le(harness_stat(&f->h, "kvd_host_used_bytes", NULL), 8 << 20);
    no_orphans(f);
    for (int p = 100; p <= 120; p++) { /* whatever of them is left is right */
        OK(f, "match 0 %d 160", p * 64);
        OK(f, "load 0 verify");
        ck_assert_ptr_nonnull(strstr(f->w.reply, " 0 0"));
    }
    teardown(f);
}
END_TEST

START_TEST(a_full_index_evicts)
{
    struct fixture *f = setup("index_entries = 64", NULL);

    OK(f, "open 0 raw 40");
    ck_assert_int_eq(fill(f, 50, 0), 50);
    ck_assert_uint_le(harness_stat(&f->h, "kvd_tenant_blocks", NULL), 64);
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_tenant_evicted_total", NULL), 400);
    no_orphans(f);
    teardown(f);
}
END_TEST

/* Everything is leased, by 8 chains of n_blocks: no room, said clearly; once released there is. */
static void full_of_leases(struct fixture *f, int n_blocks)
{
    struct worker other;
    uint64_t before;

    worker_start(&other, &f->h, (uid_t)-1);
    for (int place = 0; place < 8; place++) {
        OK(f, "open %d raw 40", place);
        OK(f, "match %d %d %d", place, (place + 1) * 64, n_blocks * 16);
        if (strncmp(worker_ask(&f->w, "publish %d 0 %d 0", place, n_blocks), "ok ", 3) != 0)
            break;
        OK(f, "match %d %d %d", place, (place + 1) * 64, n_blocks * 16);
    }
    before = harness_stat(&f->h, "kvd_tenant_full_total", NULL);
    ck_assert_int_eq(strncmp(worker_ask(&other, "open 0 raw 40"), "ok ", 3), 0);
    ck_assert_str_eq(worker_ask(&other, "match 0 6400 320"), "ok 0");
    worker_ask(&other, "publish 0 0 20 0");
    ck_assert_msg(strncmp(other.reply, "error 9 ", 8) == 0 || strncmp(other.reply, "error 8 ", 8) == 0, "%s", other.reply);
    ck_assert_uint_gt(strlen(other.reply), 30);
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_tenant_full_total", NULL), before);
    SAYS(f, "ok 160", "match 0 64 160");
    SAYS(f, "ok 10 0 0", "load 0 verify");
    for (int place = 0; place < 8; place++)
        worker_ask(&f->w, "release %d", place);
    ck_assert_int_eq(strncmp(worker_ask(&other, "match 0 6400 160"), "ok ", 3), 0);
    ck_assert_int_eq(strncmp(worker_ask(&other, "publish 0 0 10 0"), "ok ", 3), 0);
    ck_assert_str_eq(worker_ask(&other, "match 0 6400 160"), "ok 160");
    ck_assert_str_eq(worker_ask(&other, "load 0 verify"), "ok 10 0 0");
    ck_assert_int_eq(worker_stop(&other), 0);
}

START_TEST(leased_blocks_are_not_evicted)
{
    struct fixture *f = setup("index_entries = 64", NULL);

    full_of_leases(f, 10);
    teardown(f);
}
END_TEST

START_TEST(a_quota_holds)
{
    struct fixture *f = setup("tenant_quota = 2M", NULL); /* one slab, 128 slots of 16 KiB */

    full_of_leases(f, 20);
    ck_assert_uint_le(harness_stat(&f->h, "kvd_tenant_slab_bytes", NULL), 2 << 20);
    teardown(f);
}
END_TEST

START_TEST(a_smaller_quota_is_kept)
{
    struct fixture *f = setup(NULL, NULL);

    OK(f, "open 0 raw 10");
    ck_assert_int_eq(fill(f, 100, 0), 100); /* 16 MiB */
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_tenant_slab_bytes", NULL), 8 << 20);
    harness_option(&f->h, "tenant_quota = 4M");
    harness_write_config(&f->h);
    ck_assert_int_eq(kill(f->h.pid, SIGHUP), 0);
    for (int i = 0; i < 500 && harness_stat(&f->h, "kvd_reloads_total", NULL) == 0; i++)
        test_sleep_usec(10000);
    ck_assert_uint_le(harness_stat(&f->h, "kvd_tenant_slab_bytes", NULL), 4 << 20);
    ck_assert_int_eq(fill(f, 100, 0), 100);
    ck_assert_uint_le(harness_stat(&f->h, "kvd_tenant_slab_bytes", NULL), 4 << 20);
    teardown(f);
}
END_TEST

START_TEST(a_space_quota_holds)
{
    struct fixture *f = setup("space_quota = 320K", NULL);

    OK(f, "open 0 raw@a 40");
    OK(f, "open 1 raw@b 40");
    ck_assert_int_eq(fill(f, 5, 0), 5);
    ck_assert_int_eq(fill(f, 1, 1), 1);
    ck_assert_uint_le(harness_stat(&f->h, "kvd_tenant_payload_bytes", NULL), 2 * 320 * 1024);
    SAYS(f, "ok 160", "match 1 64 160"); /* the other space has lost nothing to it */
    SAYS(f, "ok 10 0 0", "load 1 verify");
    no_orphans(f);
    teardown(f);
}
END_TEST

START_TEST(pinned_blocks_stay)
{
    struct fixture *f = setup("host_bytes = 8M", NULL);
    uint8_t key[KVD_KEY_BYTES];
    struct kvd_selector one = {.key = key, .n_key = KVD_KEY_BYTES};
    uint64_t blocks, bytes;

    OK(f, "open 0 raw 40");
    OK(f, "match 0 100000 160");
    SAYS(f, "ok 10 0 0", "publish 0 0 10 0");
    OK(f, "key 0 9");
    for (int i = 0; i < KVD_KEY_BYTES; i++) {
        unsigned byte;

        ck_assert_int_eq(sscanf(f->w.reply + 3 + 2 * i, "%2x", &byte), 1);
        key[i] = (uint8_t)byte;
    }
    ck_assert_int_eq(kvd_admin_pin(harness_admin(&f->h), &one, 0, &blocks, &bytes), KVD_OK);
    ck_assert_uint_eq(blocks, 10);
    ck_assert_int_eq(fill(f, 100, 0), 100);
    SAYS(f, "ok 160", "match 0 100000 160");
    SAYS(f, "ok 10 0 0", "load 0 verify");
    SAYS(f, "ok 0", "release 0");
    ck_assert_int_eq(kvd_admin_pin(harness_admin(&f->h), &one, 1, &blocks, &bytes), KVD_OK);
    ck_assert_uint_eq(blocks, 10);
    key[0] ^= 0xff;
    ck_assert_int_eq(kvd_admin_pin(harness_admin(&f->h), &one, 0, &blocks, &bytes), KVD_E_NOT_FOUND);
    teardown(f);
}
END_TEST

/* Huge pages demanded where there are none: the block is refused, the daemon stays. */
START_TEST(no_huge_pages)
{
    struct fixture *f;
    FILE *meminfo = fopen("/proc/meminfo", "r");
    char line[128];
    unsigned long n_free = 0;

    ck_assert_ptr_nonnull(meminfo);
    while (fgets(line, sizeof(line), meminfo))
        sscanf(line, "HugePages_Free: %lu", &n_free);
    fclose(meminfo);
    if (n_free)
        return; /* this machine grants them */
    f = setup("hugepages = on", NULL);
    OK(f, "open 0 raw 8");
    SAYS(f, "ok 0", "match 0 1 64");
    expect_error(worker_ask(&f->w, "publish 0 0 4 0"), KVD_E_FULL, "huge pages");
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_blocks_failed_total", NULL), 0);
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_huge_refused", NULL), 0);
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_memory_refused", NULL), 0);
    teardown(f);
    f = setup("hugepages = auto", NULL);
    OK(f, "open 0 raw 8");
    SAYS(f, "ok 0", "match 0 1 64");
    SAYS(f, "ok 4 0 0", "publish 0 0 4 0");
    ck_assert_uint_gt(harness_stat(&f->h, "kvd_huge_refused", NULL), 0);
    teardown(f);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("room");
    TCase *tc = tcase_create("bounds");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    signal(SIGPIPE, SIG_IGN);
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, a_full_tier_evicts);
    tcase_add_test(tc, a_full_index_evicts);
    tcase_add_test(tc, leased_blocks_are_not_evicted);
    tcase_add_test(tc, a_quota_holds);
    tcase_add_test(tc, a_smaller_quota_is_kept);
    tcase_add_test(tc, a_space_quota_holds);
    tcase_add_test(tc, pinned_blocks_stay);
    tcase_add_test(tc, no_huge_pages);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
