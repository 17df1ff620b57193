/* The attention rings of the daemon, threads and all, with what a worker writes written by hand: layout, right answers, everything that
 * a request can have wrong, rings with nonsense, queues that are full, deadlines, cancelling, leases, ends of workers and tenants. */
#include <check.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "tests/ring_fixture.h"

static struct ring_bed bed;
static struct ring_worker worker;

static void setup_threads(unsigned n)
{
    rb_setup(&bed, n);
    rb_worker_open(&bed, &worker);
}

static void setup(void)
{
    setup_threads(2);
}

static void teardown(void)
{
    rb_worker_close(&worker);
    rb_teardown(&bed);
}

static struct shm_completion await(struct ring_worker *w)
{
    struct shm_completion c = {0};

    ck_assert_msg(rb_next(w, 10000000, &c), "no completion within 10 s");
    return c;
}

static struct metrics measure(void)
{
    struct metrics m = {0};

    attend_measure(bed.attend, &m);
    return m;
}

/* Submits what has been laid out at 0 and expects the reason. */
static struct shm_completion expect(uint64_t bytes, enum ring_reason reason)
{
    struct shm_completion c;

    rb_submit(&bed, &worker, 77, 0, bytes);
    c = await(&worker);
    ck_assert_uint_eq(c.ticket, 77);
    ck_assert_msg(c.reason == reason, "reason %u, not %u", c.reason, reason);
    return c;
}

static void check_output(const struct ring_worker *w, uint64_t off, uint32_t n_blocks, uint32_t heads)
{
    const struct shm_request *h = rb_header(w, off);
    const float *o = (const float *)(const void *)(w->memory + off + h->o_off), *lse = (const float *)(const void *)(w->memory + off + h->lse_off);

    for (uint32_t i = 0; i < heads * RB_DIM; i++)
        ck_assert_msg(fabsf(o[i] - rb_mean(n_blocks)) < 1e-4f, "output %u of %u blocks is %g", i, n_blocks, (double)o[i]);
    for (uint32_t i = 0; i < heads; i++)
        ck_assert_float_eq_tol(lse[i], logf((float)(n_blocks * RB_TOKENS)), 1e-4f);
}

/* ---- layout ---- */

START_TEST(layout)
{
    uint8_t memory[4096] __attribute__((aligned(64)));
    struct ring_view v;
    char text[200];

    ring_view_init(&v, memory, 16);
    ck_assert_uint_eq(ring_bytes(16), 256 + 16 * 128);
    ck_assert_ptr_eq(v.submissions, memory + 256);
    ck_assert_ptr_eq(v.completions, memory + 256 + 16 * 64);
    ck_assert_uint_eq(offsetof(struct shm_rings, done_tail), 128);
    ck_assert_uint_eq(offsetof(struct shm_rings, sleepers), 196);
    ck_assert_uint_eq(offsetof(struct shm_submission, memory), 24);
    ck_assert_uint_eq(offsetof(struct shm_completion, given), 16);
    ck_assert_uint_eq(offsetof(struct shm_completion, waited_usec), 32);
    ck_assert_uint_eq(offsetof(struct shm_request, scale), 48);
    ck_assert_uint_eq(offsetof(struct shm_request, positions_off), 64);
    ck_assert_uint_eq(offsetof(struct shm_request, cancelled), 112);
    for (uint32_t r = 0; r < RING_REASON_COUNT; r++) {
        ck_assert_int_ne(strlen(ring_reason_text(r, 12345, 678, text, sizeof(text))), 0);
        ck_assert_int_le(ring_reason_error(r), 24);
        ck_assert(r == RING_DONE || ring_reason_error(r) > 0);
    }
    ck_assert_str_eq(ring_reason_text(RING_REFS, 9, 5, text, sizeof(text)), "9 blocks; allowed: 5, option attend_blocks");
    ck_assert_int_eq(ring_reason_error(RING_REASON_COUNT), 23);
    ck_assert_ptr_nonnull(strstr(ring_reason_text(99, 0, 0, text, sizeof(text)), "99"));
}
END_TEST

/* Counters run over the end of 2^32. */
START_TEST(room_wraps)
{
    uint8_t memory[4096] __attribute__((aligned(64))) = {0};
    struct ring_view v;

    ring_view_init(&v, memory, 16);
    atomic_store(&v.words->submit_head, UINT32_MAX - 2);
    ck_assert_uint_eq(ring_room(&v, UINT32_MAX - 2), 16);
    ck_assert_uint_eq(ring_room(&v, 5), 8);
    ck_assert_uint_eq(ring_room(&v, 13), 0);
    ck_assert_uint_eq(ring_room(&v, 14), 0); /* nonsense */
    atomic_store(&v.words->submit_tail, 3);
    ck_assert_uint_eq(ring_waiting(&v, UINT32_MAX), 4);
    atomic_store(&v.words->done_head, 100);
    ck_assert_uint_eq(ring_unread(&v, 104), 4);
    ck_assert_uint_eq(ring_unread(&v, 90), 16);
}
END_TEST

/* ---- right answers ---- */

START_TEST(answers)
{
    for (uint32_t heads = 2; heads <= 64; heads *= 2)
        for (uint32_t n = 0; n <= RB_BLOCKS; n++) {
            uint64_t bytes = rb_request(&bed, &worker, 0, n, heads, n ? SHM_REQUEST_MASS : 0);
            const struct shm_request *h = rb_header(&worker, 0);

            expect(bytes, RING_DONE);
            if (n)
                check_output(&worker, 0, n, heads);
            else
                ck_assert(isinf(*(const float *)(const void *)(worker.memory + h->lse_off)));
            for (uint32_t i = 0; i < n; i++)
                ck_assert_float_eq_tol(((const float *)(const void *)(worker.memory + h->mass_off))[i], 1 / (float)n, 1e-5f);
        }
}
END_TEST

/* Blocks that are left out, positions in the middle, a window. */
START_TEST(sees_what_it_should)
{
    uint64_t bytes = rb_request(&bed, &worker, 0, RB_BLOCKS, 2, 0);
    struct shm_request *h = rb_header(&worker, 0);
    const float *o = (const float *)(const void *)(worker.memory + h->o_off);
    uint64_t *refs = (uint64_t *)(void *)(worker.memory + h->refs_off);
    uint32_t *pos = (uint32_t *)(void *)(worker.memory + h->positions_off);

    *pos = 3 * RB_TOKENS - 1; /* sees three blocks */
    expect(bytes, RING_DONE);
    ck_assert_float_eq_tol(o[0], 2, 1e-5f);
    h->window = RB_TOKENS; /* and of these the last */
    expect(bytes, RING_DONE);
    ck_assert_float_eq_tol(o[0], 3, 1e-5f);
    h->sink_tokens = RB_TOKENS; /* and the first */
    expect(bytes, RING_DONE);
    ck_assert_float_eq_tol(o[0], 2, 1e-5f);
    refs[1] = 0; /* which nobody sees */
    expect(bytes, RING_DONE);
    ck_assert_float_eq_tol(o[0], 2, 1e-5f);
    h->first_pos = 100 * RB_TOKENS; /* blocks in the future */
    h->sink_tokens = 0;
    expect(bytes, RING_DONE);
    ck_assert(isinf(*(const float *)(const void *)(worker.memory + h->lse_off)));
    ck_assert_float_eq(o[0], 0);
}
END_TEST

/* Queries of 16 bits. */
START_TEST(dtypes)
{
    for (uint32_t dtype = CODEC_F16; dtype <= CODEC_F32; dtype++) {
        uint64_t bytes = rb_request(&bed, &worker, 0, 5, 8, 0);

        rb_header(&worker, 0)->dtype = dtype;
        expect(bytes, RING_DONE);
        check_output(&worker, 0, 5, 8);
    }
}
END_TEST

/* ---- everything that can be wrong with a request ---- */

#define WRONG(reason_, change)                                                                                         \
    do {                                                                                                               \
        uint64_t bytes_ = rb_request(&bed, &worker, 0, 4, 4, SHM_REQUEST_MASS);                                        \
        struct shm_request *h = rb_header(&worker, 0);                                                                 \
        change;                                                                                                        \
        (void)h;                                                                                                       \
        expect(bytes_, reason_);                                                                                       \
    } while (0)

START_TEST(wrong_header)
{
    WRONG(RING_HEADER, h->header_bytes = 120);
    WRONG(RING_HEADER, h->flags |= 2);
    WRONG(RING_HEADER, h->reserved[11] = 1);
    WRONG(RING_HEADER, bytes_ = 127);
    WRONG(RING_SPACE, h->space = 0);
    WRONG(RING_SPACE, h->space = 3);
    WRONG(RING_SPACE, h->space = UINT32_MAX);
    WRONG(RING_LAYER, h->layer = 1);
    WRONG(RING_LAYER, h->layer = UINT32_MAX);
    WRONG(RING_HEADS, h->n_heads = 0);
    WRONG(RING_HEADS, h->n_heads = 3);
    WRONG(RING_HEADS, h->n_heads = 4098);
    WRONG(RING_HEADS, h->n_heads = UINT32_MAX - 1);
    WRONG(RING_TOKENS, h->n_tokens = 0);
    WRONG(RING_TOKENS, h->n_tokens = 65537);
    WRONG(RING_TOKENS, h->n_tokens = UINT32_MAX);
    WRONG(RING_DTYPE, h->dtype = 0);
    WRONG(RING_DTYPE, h->dtype = 4);
    WRONG(RING_DIM, h->dim_o = 0);
    WRONG(RING_DIM, h->dim_o = RB_DIM - 1);
    WRONG(RING_DIM, h->dim_o = UINT32_MAX);
    WRONG(RING_NUMBERS, h->scale = NAN);
    WRONG(RING_NUMBERS, h->scale = INFINITY);
    WRONG(RING_NUMBERS, h->softcap = -1);
    WRONG(RING_NUMBERS, h->softcap = NAN);
    WRONG(RING_REFS, h->n_refs = 49);
    WRONG(RING_REFS, h->n_refs = UINT32_MAX);
    WRONG(RING_POSITION, h->first_pos = UINT32_MAX - 63);
    ck_assert_uint_eq(measure().attend_failed, 28);
    ck_assert_uint_eq(measure().attend_refused, 28);
}
END_TEST

START_TEST(wrong_parts)
{
    WRONG(RING_PART, h->positions_off = 0);
    WRONG(RING_PART, h->positions_off = UINT64_MAX - 63);
    WRONG(RING_PART, h->refs_off = 129);
    WRONG(RING_PART, h->refs_off = bytes_);
    WRONG(RING_PART, h->q_off = bytes_ - 64);
    WRONG(RING_PART, h->o_off = UINT64_C(1) << 63);
    WRONG(RING_PART, h->lse_off = RB_MEMORY);
    WRONG(RING_PART, h->mass_off = bytes_ + 64);
    WRONG(RING_PART, h->n_tokens = 60000);
    WRONG(RING_PLACE, bytes_ = RB_MEMORY + 64);
    WRONG(RING_PLACE, bytes_ = UINT64_MAX);
    WRONG(RING_BYTES, bytes_ = 513 << 10);
}
END_TEST

START_TEST(wrong_place)
{
    uint64_t bytes = rb_request(&bed, &worker, 0, 4, 4, 0);
    const struct shm_submission wrong[] = {
        {.ticket = 1, .off = 8, .bytes = bytes},
        {.ticket = 2, .off = RB_MEMORY, .bytes = bytes},
        {.ticket = 3, .off = RB_MEMORY - 64, .bytes = bytes},
        {.ticket = 4, .off = UINT64_MAX - 63, .bytes = bytes},
        {.ticket = 5, .off = 0, .bytes = bytes, .memory = 1},
        {.ticket = 6, .off = 0, .bytes = bytes, .memory = UINT32_MAX},
    };

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct shm_completion c;

        rb_put(&bed, &worker, &wrong[i]);
        c = await(&worker);
        ck_assert_uint_eq(c.ticket, i + 1);
        ck_assert_uint_eq(c.reason, RING_PLACE);
    }
}
END_TEST

START_TEST(wrong_queries)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};

    for (size_t i = 0; i < 3; i++) {
        struct shm_completion c = {0};

        uint64_t bytes = rb_request(&bed, &worker, 0, 4, 4, 0);
        memcpy(worker.memory + rb_header(&worker, 0)->q_off + 4 * 17, &bad[i], 4);
        c = expect(bytes, RING_QUERY);
        ck_assert_uint_eq(c.given, 17);
    }
}
END_TEST

static void evict(uint32_t n)
{
    struct cache_evicted evicted = {0};
    uint32_t entries[RB_BLOCKS];

    for (uint32_t i = 0; i < n; i++) /* the last of the chain first */
        entries[i] = shm_ref_entry(bed.refs[RB_BLOCKS - 1 - i]);
    cache_evict(bed.cache, entries, n, NULL, NULL, 0, &evicted);
    ck_assert_uint_eq(evicted.blocks, n);
}

START_TEST(wrong_refs)
{
    struct shm_completion c;
    uint64_t bytes, *refs;

#define REF(i, value, reason)                                                                                          \
    do {                                                                                                               \
        bytes = rb_request(&bed, &worker, 0, 4, 4, 0);                                                                 \
        refs = (uint64_t *)(void *)(worker.memory + rb_header(&worker, 0)->refs_off);                                   \
        refs[i] = (value);                                                                                             \
        c = expect(bytes, reason);                                                                                     \
        ck_assert_uint_eq(c.given, i);                                                                                 \
    } while (0)
    REF(2, UINT64_MAX, RING_STALE);                                        /* no such entry */
    REF(0, shm_ref(RB_ENTRIES, 2), RING_STALE);
    REF(3, shm_ref(RB_ENTRIES - 1, 2), RING_STALE);                        /* never used */
    REF(1, bed.refs[1] + 1, RING_STALE);                                   /* a generation that is none */
    REF(1, bed.refs[1] + 2, RING_STALE);
    REF(1, shm_ref(shm_ref_entry(bed.refs[1]), 0), RING_STALE);
    REF(3, bed.other_ref, RING_FOREIGN);                                   /* of another space */
    evict(RB_BLOCKS - 2);
    bytes = rb_request(&bed, &worker, 0, 4, 4, 0);
    c = expect(bytes, RING_STALE);                                         /* evicted */
    ck_assert_uint_eq(c.given, 2);
    bytes = rb_request(&bed, &worker, 0, 2, 4, 0);                         /* those that are left are as before */
    expect(bytes, RING_DONE);
    check_output(&worker, 0, 2, 4);
    ck_assert_uint_eq(measure().attend_stale, 8);
}
END_TEST

/* ---- rings with nonsense ---- */

START_TEST(nonsense_tail)
{
    struct ring_worker other;
    uint64_t one = 1, bytes;
    struct shm_completion c;

    rb_worker_open(&bed, &other);
    atomic_store(&worker.view.words->submit_tail, 1000000);
    ck_assert_int_eq(write(attend_ring_bell(worker.ring), &one, sizeof(one)), sizeof(one));
    bytes = rb_request(&bed, &other, 0, 4, 4, 0);
    rb_submit(&bed, &other, 5, 0, bytes);
    ck_assert_uint_eq(await(&other).reason, RING_DONE);
    check_output(&other, 0, 4, 4);
    while (measure().attend_rings_broken == 0)
        usleep(100);
    worker.tail = 0; /* it stays so, whatever is in it now */
    bytes = rb_request(&bed, &worker, 0, 4, 4, 0);
    rb_submit(&bed, &worker, 5, 0, bytes);
    ck_assert(!rb_next(&worker, 50000, &c));
    ck_assert_uint_eq(measure().attend_rings_broken, 1);
    rb_worker_close(&other);
}
END_TEST

/* A worker that reads no completion: nothing is written over what it has not read, and others are served. */
START_TEST(never_drains)
{
    struct ring_worker other;
    struct shm_completion c;
    uint64_t bytes = rb_request(&bed, &worker, 0, 4, 4, 0);

    rb_worker_open(&bed, &other);
    for (uint64_t i = 0; i < RB_RING; i++)
        rb_submit(&bed, &worker, i, 0, bytes);
    while (atomic_load(&worker.view.words->done_tail) < RB_RING)
        usleep(100);
    for (uint64_t i = 0; i < RB_RING / 2; i++) /* more than there are places for */
        rb_submit(&bed, &worker, 100 + i, 0, bytes);
    rb_submit(&bed, &other, 7, 0, rb_request(&bed, &other, 0, 3, 2, 0));
    ck_assert_uint_eq(await(&other).reason, RING_DONE);
    ck_assert_uint_eq(atomic_load(&worker.view.words->done_tail), RB_RING);
    ck_assert_uint_eq(measure().attend_requests, RB_RING + 1);
    ck_assert_uint_eq(measure().attend_queue_bytes, 0); /* nothing is held for it */
    for (uint64_t i = 0; i < RB_RING; i++)
        ck_assert_uint_lt(await(&worker).ticket, RB_RING);
    rb_submit(&bed, &worker, 200, 0, bytes); /* and it is served again */
    for (uint64_t i = 0; i < RB_RING / 2 + 1; i++)
        ck_assert_uint_ge(await(&worker).ticket, 100);
    ck_assert(!rb_next(&worker, 20000, &c));
    rb_worker_close(&other);
}
END_TEST

/* Completions and words that somebody writes over while answers are written: other workers notice nothing. */
START_TEST(scribbling)
{
    struct ring_worker other;
    uint64_t bytes, random = 42;
    pid_t pid;

    rb_worker_open(&bed, &other);
    for (uint64_t off = 0; off < 16; off++)
        bytes = rb_request(&bed, &worker, off * 4096, 8, 8, SHM_REQUEST_MASS);
    pid = fork(); /* another process, as a worker is */
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) {
            random = random * UINT64_C(6364136223846793005) + 1442695040888963407;
            if (random >> 62 == 0)
                memcpy((char *)worker.page + 256 + (random >> 20) % (RB_RING * 128 - 8), &random, 8);
            else if (random >> 62 == 1) /* words of the rings, within what a ring may have */
                atomic_store(&worker.view.words->done_head, (uint32_t)(random >> 30));
            else
                memcpy(worker.memory + (random >> 20) % (16 * 4096 - 8), &random, 8);
        }
    }
    for (int i = 0; i < 300; i++) {
        for (int k = 0; k < 4; k++) /* what becomes of these is of no interest */
            rb_submit(&bed, &worker, (uint64_t)k, (uint64_t)(k % 16) * 4096, bytes);
        rb_submit(&bed, &other, 9, 0, rb_request(&bed, &other, 0, 9, 8, 0));
        ck_assert_uint_eq(await(&other).reason, RING_DONE);
        check_output(&other, 0, 9, 8);
        worker.tail = atomic_load(&worker.view.words->submit_head);
    }
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    cache_assert_valid(bed.cache);
    rb_worker_close(&other);
}
END_TEST

/* ---- limits ---- */

START_TEST(queue_full)
{
    struct attend_limits l = bed.config.limits;
    struct shm_completion c;
    uint64_t bytes;

    l.worker_bytes = 4096;
    attend_set_limits(bed.attend, &l);
    bytes = rb_request(&bed, &worker, 0, 8, 64, 0);
    c = expect(bytes, RING_QUEUE);
    ck_assert_uint_eq(c.allowed, 4096);
    l = bed.config.limits;
    l.queue_bytes = 4096;
    attend_set_limits(bed.attend, &l);
    c = expect(bytes, RING_QUEUE);
    l = bed.config.limits;
    attend_set_limits(bed.attend, &l);
    expect(bytes, RING_DONE);
    bytes = rb_request(&bed, &worker, 0, 1, 4096, 0); /* what it would take of ours */
    l.request_bytes = bytes;
    attend_set_limits(bed.attend, &l);
    expect(bytes, RING_BYTES);
}
END_TEST

START_TEST(memories)
{
    int fd = rb_memfd(1 << 20), bad = memfd_create("x", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint32_t id;
    const char *why = "";

    ck_assert_int_eq(ftruncate(bad, 4096), 0);
    ck_assert_int_eq(attend_ring_add(worker.ring, bad, 4096, &id, &why), -EINVAL);
    ck_assert_ptr_nonnull(strstr(why, "F_SEAL_SHRINK"));
    ck_assert_int_eq(fcntl(bad, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_WRITE), 0);
    ck_assert_int_eq(attend_ring_add(worker.ring, bad, 4096, &id, &why), -EINVAL);
    ck_assert_ptr_nonnull(strstr(why, "written"));
    ck_assert_int_eq(attend_ring_add(worker.ring, fd, 8192, &id, &why), -EINVAL);
    ck_assert_int_eq(attend_ring_add(worker.ring, STDIN_FILENO, 4096, &id, &why), -EINVAL);
    for (uint32_t i = 1; i < 4; i++) {
        ck_assert_int_eq(attend_ring_add(worker.ring, fd, 1 << 20, &id, &why), 0);
        ck_assert_uint_eq(id, i);
    }
    ck_assert_int_eq(attend_ring_add(worker.ring, fd, 1 << 20, &id, &why), -ENOSPC); /* memory_bytes */
    close(fd);
    close(bad);
}
END_TEST

/* ---- deadline, cancel ---- */

START_TEST(deadline)
{
    uint64_t bytes = rb_request(&bed, &worker, 0, 4, 4, 0);

    rb_header(&worker, 0)->deadline_usec = 1; /* long ago */
    expect(bytes, RING_DEADLINE);
    rb_header(&worker, 0)->deadline_usec = rb_usec() + 20000000;
    expect(bytes, RING_DONE);
    ck_assert_uint_eq(measure().attend_late, 1);
}
END_TEST

START_TEST(cancel)
{
    uint64_t bytes = rb_request(&bed, &worker, 0, 4, 4, 0);

    rb_header(&worker, 0)->cancelled = 1;
    expect(bytes, RING_CANCELLED);
    ck_assert_uint_eq(measure().attend_cancelled, 1);
    rb_header(&worker, 0)->cancelled = 0;
    expect(bytes, RING_DONE);
}
END_TEST

/* ---- many ---- */

/* Chains that share some of their beginning, in one go, again and again: each its own answer, whoever shares what. */
START_TEST(cascade)
{
    struct ring_worker others[3];
    struct metrics m;
    unsigned random = 12345;

    for (int i = 0; i < 3; i++)
        rb_worker_open(&bed, &others[i]);
    for (int round = 0; round < 60; round++) {
        uint32_t n[3][RB_RING], heads[3][RB_RING];

        for (int w = 0; w < 3; w++)
            for (uint64_t k = 0; k < RB_RING; k++) {
                n[w][k] = 1 + (random = random * 1103515245 + 12345) / 65536 % RB_BLOCKS;
                heads[w][k] = 2u << (random >> 28) % 5;
                rb_submit(&bed, &others[w], k, k * 16384, rb_request(&bed, &others[w], k * 16384, n[w][k], heads[w][k], k % 2));
            }
        for (int w = 0; w < 3; w++)
            for (int k = 0; k < RB_RING; k++) {
                struct shm_completion c = await(&others[w]);

                ck_assert_uint_eq(c.reason, RING_DONE);
                check_output(&others[w], c.ticket * 16384, n[w][c.ticket], heads[w][c.ticket]);
            }
    }
    m = measure();
    ck_assert_uint_eq(m.attend_done, 60 * 3 * RB_RING);
    ck_assert_uint_eq(m.attend_batched, m.attend_done);
    ck_assert_uint_lt(m.attend_batches, m.attend_batched);
    ck_assert_uint_lt(m.attend_read_bytes, m.attend_needed_bytes);
    ck_assert_uint_eq(m.attend_waiting, 0);
    ck_assert_uint_eq(m.attend_queue_bytes, 0);
    for (int i = 0; i < 3; i++)
        rb_worker_close(&others[i]);
}
END_TEST

/* What is being computed is held, and only as long. */
START_TEST(leases_end)
{
    uint64_t bytes = rb_request(&bed, &worker, 0, RB_BLOCKS, 64, 0);

    for (int i = 0; i < 50; i++)
        expect(bytes, RING_DONE);
    evict(RB_BLOCKS);
    expect(bytes, RING_STALE);
    cache_assert_valid(bed.cache);
}
END_TEST

/* Evictions and publishes all the time: an answer is right or it is an error. */
START_TEST(eviction_beside)
{
    struct cache_evicted evicted = {0};
    uint32_t n_done = 0, n_stale = 0;

    for (int i = 0; i < 400; i++) {
        uint32_t last = RB_BLOCKS - 1, entry = shm_ref_entry(bed.refs[last]);
        struct shm_completion c;

        rb_submit(&bed, &worker, 1, 0, rb_request(&bed, &worker, 0, RB_BLOCKS, 8, 0));
        if (i % 3 == 1)
            usleep(30);
        cache_evict(bed.cache, &entry, 1, NULL, NULL, 0, &evicted);
        c = await(&worker);
        if (c.reason == RING_DONE)
            check_output(&worker, 0, RB_BLOCKS, 8);
        else
            ck_assert_uint_eq(c.reason, RING_STALE);
        n_done += c.reason == RING_DONE;
        n_stale += c.reason != RING_DONE;
        if (cache_find(bed.cache, bed.space->id, 0, bed.keys[last]) == CACHE_NONE)
            bed.refs[last] = rb_publish(&bed, bed.space, bed.keys[last], bed.keys[last - 1], RB_BLOCKS);
    }
    printf("eviction beside: %u right, %u stale, %llu evicted, %llu kept\n", n_done, n_stale, (unsigned long long)evicted.blocks,
           (unsigned long long)evicted.kept_leased);
    ck_assert_uint_gt(evicted.blocks, 0);
    cache_assert_valid(bed.cache);
}
END_TEST

/* ---- ends ---- */

/* A worker that goes with requests under way; its memory is gone when close returns. */
START_TEST(closed_in_the_middle)
{
    for (int i = 0; i < 100; i++) {
        struct ring_worker other;

        rb_worker_open(&bed, &other);
        for (uint64_t k = 0; k < RB_RING; k++)
            rb_submit(&bed, &other, k, k * 16384, rb_request(&bed, &other, k * 16384, RB_BLOCKS, 32, 1));
        rb_submit(&bed, &worker, 3, 0, rb_request(&bed, &worker, 0, 5, 8, 0));
        if (i % 2)
            usleep((unsigned)i * 10);
        rb_worker_close(&other);
        ck_assert_uint_eq(await(&worker).reason, RING_DONE);
        check_output(&worker, 0, 5, 8);
    }
    while (measure().attend_queue_bytes)
        usleep(100);
    ck_assert_uint_eq(measure().attend_rings, 1);
    evict(RB_BLOCKS);
}
END_TEST

/* A tenant goes while the threads still compute for a worker of it that has gone. */
START_TEST(tenant_ends)
{
    for (int i = 0; i < 20; i++) {
        for (uint64_t k = 0; k < RB_RING; k++)
            rb_submit(&bed, &worker, k, k * 16384, rb_request(&bed, &worker, k * 16384, RB_BLOCKS, 32, 1));
        usleep((unsigned)i * 20);
        rb_worker_close(&worker);
        bed.tenant = attend_tenant_destroy(bed.tenant);
        ck_assert_int_eq(attend_tenant_create(bed.attend, bed.cache, &bed.tenant), 0);
        rb_worker_open(&bed, &worker);
    }
}
END_TEST

/* One thread does all there is to do. */
START_TEST(one_thread)
{
    rb_worker_close(&worker);
    rb_teardown(&bed);
    setup_threads(1);
    for (uint64_t k = 0; k < RB_RING; k++)
        rb_submit(&bed, &worker, k, k * 16384, rb_request(&bed, &worker, k * 16384, RB_BLOCKS, 8, 1));
    for (int k = 0; k < RB_RING; k++)
        ck_assert_uint_eq(await(&worker).reason, RING_DONE);
}
END_TEST

/* Asleep when there is nothing to do, and awake at the first request. */
START_TEST(sleeps)
{
    for (int i = 0; i < 20; i++) {
        uint64_t before, tries = 0;

        expect(rb_request(&bed, &worker, 0, 2, 2, 0), RING_DONE);
        do { /* the bell of a request that was found without it may wake the thread once more */
            while (atomic_load(cache_awake_word(bed.cache)))
                usleep(100);
            before = measure().attend_sleeps;
            usleep(5000);
            ck_assert_uint_lt(tries++, 5);
        } while (measure().attend_sleeps != before);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ring");
    TCase *plain = tcase_create("layout"), *tc = tcase_create("threads");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    tcase_add_test(plain, layout);
    tcase_add_test(plain, room_wraps);
    tcase_set_timeout(tc, 120);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, answers);
    tcase_add_test(tc, sees_what_it_should);
    tcase_add_test(tc, dtypes);
    tcase_add_test(tc, wrong_header);
    tcase_add_test(tc, wrong_parts);
    tcase_add_test(tc, wrong_place);
    tcase_add_test(tc, wrong_queries);
    tcase_add_test(tc, wrong_refs);
    tcase_add_test(tc, nonsense_tail);
    tcase_add_test(tc, never_drains);
    tcase_add_test(tc, scribbling);
    tcase_add_test(tc, queue_full);
    tcase_add_test(tc, memories);
    tcase_add_test(tc, deadline);
    tcase_add_test(tc, cancel);
    tcase_add_test(tc, cascade);
    tcase_add_test(tc, leases_end);
    tcase_add_test(tc, eviction_beside);
    tcase_add_test(tc, closed_in_the_middle);
    tcase_add_test(tc, tenant_ends);
    tcase_add_test(tc, one_thread);
    tcase_add_test(tc, sleeps);
    suite_add_tcase(suite, plain);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
