/* Attention by the daemon for many workers over one prefix of 32K tokens: computed together, against one by one; a small request
 * beside them, against its own time; and what a waiting request costs when there are many.
 *
 * The workers are processes of their own; this one starts them, says when, and reads the clocks in memory that all share. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/bench.h"
#include "tests/harness.h"

enum {
    HEADS = 8, RATIO = 4, DIM = 128, BLOCK = 64, LONG_BLOCKS = 512, SHORT_BLOCKS = 32, WORKERS = 16,
    STEPS = 12, ROUNDS = 7, SMALL = 300, WAITING_MAX = 10000, PER_RING = 256,
};

enum order { ORDER_WAIT, ORDER_TOGETHER, ORDER_ALONE, ORDER_LOAD, ORDER_END };

struct desk {
    _Atomic uint32_t order, round, n_ready, n_done, turn, stop;
    _Atomic uint64_t n_steps;
};

struct bed {
    struct harness h;
    struct desk *desk;
    pid_t workers[WORKERS];
    kvd *k;
    kvd_space *space;
    kvd_prefix *prefix;
    uint32_t tokens[LONG_BLOCKS * BLOCK];
    struct kvd_attention a;
    float *q, *o, *lse;
};

static void die(const char *what, const kvd *k)
{
    fprintf(stderr, "bench_batch: %s: %s\n", what, k ? kvd_message(k) : strerror(errno));
    exit(1);
}

static void attach(struct bed *b)
{
    static const struct kvd_group group = {0};
    static const struct kvd_layer layer = {HEADS, DIM, DIM, 0, NULL, NULL, NULL, NULL};
    struct kvd_options o = KVD_OPTIONS_INIT;
    struct kvd_space_desc d = KVD_SPACE_INIT;

    o.socket_path = b->h.socket;
    o.timeout_msec = 60000;
    d.model = "bench";
    d.block_tokens = BLOCK;
    d.groups = &group;
    d.n_groups = 1;
    d.layers = &layer;
    d.n_layers = 1;
    if (kvd_attach(&o, &b->k))
        die("attach", NULL);
    if (kvd_space_open(b->k, &d, &b->space) || kvd_prefix_create(b->space, LONG_BLOCKS, &b->prefix))
        die("space", b->k);
}

/* Publishes the prefix, some blocks at a time. */
static void publish(struct bed *b)
{
    enum { PART = 64 };
    size_t n = (size_t)PART * BLOCK * HEADS * DIM;
    uint16_t *numbers = bench_alloc(2 * n * sizeof(*numbers));
    struct kvd_kv kv = {numbers, numbers + n, HEADS * DIM * 2, DIM * 2, HEADS * DIM * 2, DIM * 2};
    uint64_t seed = 1;

    for (size_t i = 0; i < 2 * n; i++) { /* fp16 between -2 and 2 */
        uint64_t r = bench_random(&seed);

        numbers[i] = (uint16_t)((r & 0x8000) | (0x3000 + (r >> 20) % 0x1000));
    }
    if (kvd_match(b->prefix, b->tokens, LONG_BLOCKS * BLOCK, NULL, 0, NULL))
        die("match", b->k);
    for (size_t at = 0; at < LONG_BLOCKS; at += PART)
        if (kvd_publish(b->prefix, b->tokens, LONG_BLOCKS * BLOCK, at, PART, 0, KVD_F16, &kv, NULL))
            die("publish", b->k);
    free(numbers);
}

static void lease(struct bed *b, size_t n_blocks)
{
    struct kvd_attention a = KVD_ATTENTION_INIT;
    uint64_t seed = (uint64_t)getpid();
    size_t got, n = HEADS * RATIO * DIM;

    if (kvd_match(b->prefix, b->tokens, n_blocks * BLOCK, NULL, 0, &got) || got != n_blocks * BLOCK)
        die("match", b->k);
    b->q = bench_alloc(n * sizeof(float));
    b->o = bench_alloc(n * sizeof(float));
    b->lse = bench_alloc(HEADS * RATIO * sizeof(float));
    for (size_t i = 0; i < n; i++)
        b->q[i] = (float)(bench_random(&seed) >> 40) / (1 << 23) - 1.0f;
    a.n_heads = HEADS * RATIO;
    a.n_tokens = 1;
    a.q = b->q;
    a.first_position = LONG_BLOCKS * BLOCK;
    a.scale = 0.088388f;
    a.n_blocks = n_blocks;
    a.o = b->o;
    a.lse = b->lse;
    b->a = a;
}

static void attend(struct bed *b)
{
    uint64_t ticket;

    if (kvd_attend_submit(b->prefix, &b->a, 0, &ticket) || kvd_attend_collect(b->prefix, ticket, -1))
        die("attention", b->k);
}

/* ---- workers ---- */

static void work(struct bed *b, uint32_t number)
{
    struct desk *t = b->desk;
    uint32_t round = 0;

    attach(b);
    lease(b, LONG_BLOCKS);
    attend(b);
    atomic_fetch_add(&t->n_ready, 1);
    for (;;) {
        uint32_t order;

        while (atomic_load(&t->round) == round)
            usleep(200);
        round = atomic_load(&t->round);
        order = atomic_load(&t->order);
        if (order == ORDER_END)
            break;
        if (order == ORDER_ALONE) /* one after another: nobody has company */
            while (atomic_load(&t->turn) != number)
                usleep(50);
        if (order == ORDER_LOAD)
            while (!atomic_load(&t->stop)) {
                attend(b);
                atomic_fetch_add(&t->n_steps, 1);
            }
        else
            for (int i = 0; i < STEPS; i++)
                attend(b);
        atomic_fetch_add(&t->turn, 1);
        atomic_fetch_add(&t->n_done, 1);
    }
    kvd_detach(b->k);
    _exit(0);
}

static void start_workers(struct bed *b)
{
    for (uint32_t i = 0; i < WORKERS; i++) {
        b->workers[i] = fork();
        if (b->workers[i] < 0)
            die("fork", NULL);
        if (b->workers[i] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            work(b, i);
        }
    }
    while (atomic_load(&b->desk->n_ready) < WORKERS)
        usleep(1000);
}

static void give_order(struct bed *b, enum order order)
{
    atomic_store(&b->desk->n_done, 0);
    atomic_store(&b->desk->turn, 0);
    atomic_store(&b->desk->stop, 0);
    atomic_store(&b->desk->order, order);
    atomic_fetch_add(&b->desk->round, 1);
}

static void await_all(struct bed *b)
{
    while (atomic_load(&b->desk->n_done) < WORKERS)
        usleep(200);
}

/* ---- what is measured ---- */

static void together(struct bed *b)
{
    double at_once[ROUNDS], alone[ROUNDS];
    uint64_t read, needed;

    for (int r = 0; r < ROUNDS; r++) {
        uint64_t begun = bench_nsec();

        give_order(b, ORDER_ALONE);
        await_all(b);
        alone[r] = (double)(bench_nsec() - begun) / 1e6;
        read = harness_stat(&b->h, "kvd_attend_read_bytes_total", NULL);
        needed = harness_stat(&b->h, "kvd_attend_needed_bytes_total", NULL);
        begun = bench_nsec();
        give_order(b, ORDER_TOGETHER);
        await_all(b);
        at_once[r] = (double)(bench_nsec() - begun) / 1e6;
    }
    bench_line("batch", "16 workers on one prefix of 32K tokens, 12 steps each", bench_median(at_once, ROUNDS), "ms",
               bench_median(alone, ROUNDS), "the same served one by one; ratio at most 0.4");
    read = harness_stat(&b->h, "kvd_attend_read_bytes_total", NULL) - read;
    needed = harness_stat(&b->h, "kvd_attend_needed_bytes_total", NULL) - needed;
    bench_line("batch", "bytes of blocks read for them", (double)read / 1e6, "MB", (double)needed / 1e6,
               "each by itself; the less the better");
}

static int compare(const void *a, const void *b)
{
    return bench_compare(a, b);
}

/* p99 of a request for 2K tokens, microseconds. */
static void small(struct bed *b, double *ret_median, double *ret_p99)
{
    static double took[SMALL];

    for (int i = 0; i < SMALL; i++) {
        uint64_t begun = bench_nsec();

        attend(b);
        took[i] = (double)(bench_nsec() - begun) / 1000;
        usleep(20000); /* below its fair share of the daemon beside 16 others */
    }
    qsort(took, SMALL, sizeof(*took), compare);
    *ret_median = took[SMALL / 2];
    *ret_p99 = took[SMALL * 99 / 100];
}

static void small_beside(struct bed *b)
{
    double own, own_p99, beside, beside_p99;

    small(b, &own, &own_p99);
    give_order(b, ORDER_LOAD);
    usleep(100000);
    small(b, &beside, &beside_p99);
    atomic_store(&b->desk->stop, 1);
    await_all(b);
    bench_line("batch", "a request for 2K tokens beside 16 workers, p99", beside_p99, "us", own,
               "its own time, median; ratio at most 3");
    bench_line("batch", "a request for 2K tokens beside 16 workers, median", beside, "us", own, "its own time, median");
    bench_line("batch", "a request for 2K tokens alone, p99", own_p99, "us", own, "its own time, median");
}

/* n requests for one block each of as many sessions as that takes, all submitted before the first is collected: microseconds of each. */
static double waiting(struct bed *b, size_t n)
{
    size_t n_sessions = (n + PER_RING - 1) / PER_RING;
    struct bed *beds = bench_alloc(n_sessions * sizeof(*beds));
    uint64_t *tickets = bench_alloc(n * sizeof(*tickets)), begun;
    double usec;

    for (size_t s = 0; s < n_sessions; s++) {
        memcpy(&beds[s], b, sizeof(*b));
        attach(&beds[s]);
        lease(&beds[s], 1);
        attend(&beds[s]);
    }
    begun = bench_nsec();
    for (size_t i = 0; i < n; i++)
        if (kvd_attend_submit(beds[i / PER_RING].prefix, &beds[i / PER_RING].a, 0, &tickets[i]))
            die("submit", beds[i / PER_RING].k);
    for (size_t i = 0; i < n; i++)
        if (kvd_attend_collect(beds[i / PER_RING].prefix, tickets[i], -1))
            die("collect", beds[i / PER_RING].k);
    usec = (double)(bench_nsec() - begun) / 1000 / (double)n;
    for (size_t s = 0; s < n_sessions; s++) {
        free(beds[s].q);
        free(beds[s].o);
        free(beds[s].lse);
        kvd_detach(beds[s].k);
    }
    free(beds);
    free(tickets);
    return usec;
}

static void many(struct bed *b)
{
    double ten[ROUNDS], most[ROUNDS], middle[ROUNDS];

    for (int r = 0; r < ROUNDS; r++) {
        ten[r] = waiting(b, 10);
        middle[r] = waiting(b, 256);
        most[r] = waiting(b, WAITING_MAX);
    }
    bench_line("batch", "a request of one block, 10,000 waiting", bench_median(most, ROUNDS), "us", bench_median(ten, ROUNDS),
               "the same with 10 waiting; ratio about 1 or less");
    bench_line("batch", "a request of one block, 256 waiting", bench_median(middle, ROUNDS), "us", bench_median(ten, ROUNDS),
               "the same with 10 waiting; ratio about 1 or less");
}

int main(void)
{
    static struct bed b;
    uint64_t seed = 7;

    harness_init(&b.h);
    harness_option(&b.h, "host_bytes = 512M");
    harness_option(&b.h, "slab_bytes = 16M");
    harness_option(&b.h, "attend_queue_bytes = 2G");
    harness_start(&b.h);
    b.desk = mmap(NULL, sizeof(*b.desk), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (b.desk == MAP_FAILED)
        die("mmap", NULL);
    for (size_t i = 0; i < LONG_BLOCKS * BLOCK; i++)
        b.tokens[i] = (uint32_t)(bench_random(&seed) % 50000);
    attach(&b);
    publish(&b);
    lease(&b, SHORT_BLOCKS);
    start_workers(&b);
    together(&b);
    small_beside(&b);
    give_order(&b, ORDER_END);
    for (int i = 0; i < WORKERS; i++)
        waitpid(b.workers[i], NULL, 0);
    many(&b);
    kvd_detach(b.k);
    if (harness_stop(&b.h) != 0)
        die("the daemon's end", NULL);
    harness_deinit(&b.h);
    return 0;
}
