/* The rings of attention: round trip of a trivial request (one block of 16 tokens, one head) to a real daemon, while both look and while
 * the daemon sleeps, against bare ping-pongs between two processes in the same run at the same placement: of a word in shared memory that
 * both look at, and of a futex that both sleep on.
 *
 * Placement and the machine's way of waking a processor move either figure several times as much as anything that a daemon can do. */
#include <dirent.h>
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/bench.h"
#include "tests/harness.h"

enum { TOKENS = 16, DIM = 64, ROUNDS = 21, TRIPS = 2000, SLOW_TRIPS = 1500, PAUSE_USEC = 400 };

struct bed {
    struct harness h;
    kvd *k;
    kvd_prefix *prefix;
    struct kvd_attention a;
    float q[DIM], o[DIM], lse[1];
};

static void die(const char *what, const kvd *k)
{
    fprintf(stderr, "bench_ring: %s: %s\n", what, k ? kvd_message(k) : strerror(errno));
    exit(1);
}

/* ---- placement ---- */

static void pin(pid_t pid, int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(pid, sizeof(set), &set) < 0)
        die("sched_setaffinity", NULL);
}

/* All threads of a process. */
static void pin_all(pid_t pid, int cpu)
{
    char path[64];
    struct dirent *e;
    DIR *d;

    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    d = opendir(path);
    if (!d)
        die(path, NULL);
    while ((e = readdir(d)))
        if (e->d_name[0] != '.')
            pin(atoi(e->d_name), cpu);
    closedir(d);
}

static void two_cpus(int ret[2])
{
    cpu_set_t set;
    int n = 0;

    if (sched_getaffinity(0, sizeof(set), &set) < 0)
        die("sched_getaffinity", NULL);
    for (int i = 0; i < CPU_SETSIZE && n < 2; i++)
        if (CPU_ISSET(i, &set))
            ret[n++] = i;
    if (n < 2)
        ret[1] = ret[0];
}

/* ---- bare ping-pongs ---- */

struct table {
    _Atomic uint32_t ball; /* odd: with the other side */
    uint8_t pad[124];
    _Atomic uint32_t stop;
};

static void futex(_Atomic uint32_t *word, int op, uint32_t value)
{
    syscall(SYS_futex, word, op, value, NULL, NULL, 0);
}

static void play(struct table *t, int sleeps)
{
    while (!atomic_load(&t->stop)) {
        uint32_t ball = atomic_load(&t->ball);

        if (ball % 2 == 0) {
            if (sleeps)
                futex(&t->ball, FUTEX_WAIT, ball);
            continue;
        }
        atomic_store(&t->ball, ball + 1);
        if (sleeps)
            futex(&t->ball, FUTEX_WAKE, 1);
    }
    _exit(0);
}

static void hit(struct table *t, int sleeps)
{
    uint32_t ball = atomic_load(&t->ball) + 1;

    atomic_store(&t->ball, ball);
    if (sleeps)
        futex(&t->ball, FUTEX_WAKE, 1);
    while (atomic_load(&t->ball) == ball)
        if (sleeps)
            futex(&t->ball, FUTEX_WAIT, ball);
}

static pid_t start_player(struct table **ret, int sleeps, int cpu)
{
    pid_t pid;

    *ret = mmap(NULL, sizeof(**ret), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (*ret == MAP_FAILED)
        die("mmap", NULL);
    pid = fork();
    if (pid < 0)
        die("fork", NULL);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(0, cpu);
        play(*ret, sleeps);
    }
    return pid;
}

static void end_player(struct table *t, pid_t pid)
{
    atomic_store(&t->stop, 1);
    futex(&t->ball, FUTEX_WAKE, 1);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    munmap(t, sizeof(*t));
}

/* ---- the daemon ---- */

static void open_prefix(struct bed *b)
{
    static uint16_t numbers[2][TOKENS * DIM]; /* zeros are numbers too */
    uint32_t tokens[TOKENS] = {0};
    struct kvd_space_desc d = KVD_SPACE_INIT;
    struct kvd_group group = {0};
    struct kvd_layer layer = {1, DIM, DIM, 0, "raw", "raw", NULL, NULL};
    struct kvd_kv kv = {numbers[0], numbers[1], DIM * 2, DIM * 2, DIM * 2, DIM * 2};
    kvd_space *space;
    size_t got;

    d.model = "bench";
    d.block_tokens = TOKENS;
    d.groups = &group;
    d.n_groups = 1;
    d.layers = &layer;
    d.n_layers = 1;
    if (kvd_space_open(b->k, &d, &space) || kvd_prefix_create(space, 1, &b->prefix) ||
        kvd_match(b->prefix, tokens, TOKENS, NULL, 0, &got) ||
        kvd_publish(b->prefix, tokens, TOKENS, 0, 1, 0, KVD_F16, &kv, NULL) ||
        kvd_match(b->prefix, tokens, TOKENS, NULL, 0, &got) || got != TOKENS)
        die("a block", b->k);
}

static void trip(struct bed *b)
{
    uint64_t ticket;

    if (kvd_attend_submit(b->prefix, &b->a, 0, &ticket) || kvd_attend_collect(b->prefix, ticket, 1000))
        die("attention", b->k);
}

static void start(struct bed *b)
{
    struct kvd_options o = KVD_OPTIONS_INIT;
    struct kvd_attention a = KVD_ATTENTION_INIT;

    harness_init(&b->h);
    harness_start(&b->h);
    o.socket_path = b->h.socket;
    if (kvd_attach(&o, &b->k))
        die("attach", NULL);
    open_prefix(b);
    a.n_heads = 1;
    a.n_tokens = 1;
    a.q = b->q;
    a.first_position = TOKENS;
    a.scale = 0.125f;
    a.n_blocks = 1;
    a.o = b->o;
    a.lse = b->lse;
    b->a = a;
    trip(b); /* threads and memory are made with the first */
}

/* ---- what is measured ---- */

static void both_look(struct bed *b, const int cpus[2])
{
    double ours[ROUNDS], bare[ROUNDS];
    struct table *t;
    pid_t pid;

    pin(0, cpus[0]);
    pin_all(b->h.pid, cpus[1]);
    for (int r = 0; r < ROUNDS; r++) {
        uint64_t begun = bench_nsec();

        for (int i = 0; i < TRIPS; i++)
            trip(b);
        ours[r] = (double)(bench_nsec() - begun) / TRIPS / 1000;
        pid = start_player(&t, 0, cpus[1]);
        hit(t, 0);
        begun = bench_nsec();
        for (int i = 0; i < TRIPS; i++)
            hit(t, 0);
        bare[r] = (double)(bench_nsec() - begun) / TRIPS / 1000;
        end_player(t, pid);
    }
    bench_line("ring", "round trip, both look", bench_median(ours, ROUNDS), "us", bench_median(bare, ROUNDS),
               "a word in shared memory that both look at; value at most 5 us");
}

static void pause_busy(void)
{
    uint64_t until = bench_nsec() + PAUSE_USEC * UINT64_C(1000);

    while (bench_nsec() < until)
        __builtin_ia32_pause();
}

static void one_sleeps(struct bed *b, const char *name, int here, int there)
{
    static double ours[SLOW_TRIPS], bare[SLOW_TRIPS];
    struct table *t;
    pid_t pid = start_player(&t, 1, there);

    pin(0, here);
    pin_all(b->h.pid, there);
    for (int i = 0; i < 50; i++)
        trip(b);
    for (int i = 0; i < SLOW_TRIPS; i++) {
        uint64_t begun;

        if (here == there)
            test_sleep_usec(PAUSE_USEC); /* the other side needs the processor to fall asleep */
        else
            pause_busy();
        begun = bench_nsec();
        trip(b);
        ours[i] = (double)(bench_nsec() - begun) / 1000;
        if (here == there)
            test_sleep_usec(PAUSE_USEC);
        else
            pause_busy();
        begun = bench_nsec();
        hit(t, 1);
        bare[i] = (double)(bench_nsec() - begun) / 1000;
    }
    end_player(t, pid);
    bench_line("ring", name, bench_median(ours, SLOW_TRIPS), "us", bench_median(bare, SLOW_TRIPS),
               "futex ping-pong at the same placement and pause; ratio at most 1.3");
}

static uint64_t sleeps(struct bed *b)
{
    return harness_stat(&b->h, "kvd_attend_sleeps_total", NULL);
}

static void idle(struct bed *b)
{
    uint64_t before;

    test_sleep_usec(100000);
    before = sleeps(b);
    test_sleep_usec(1000000);
    bench_line("ring", "wake-ups of an idle daemon's attention threads in a second", (double)(sleeps(b) - before), "times", 0,
               "none is right");
}

int main(void)
{
    static struct bed b;
    int cpus[2];

    two_cpus(cpus);
    start(&b);
    if (cpus[0] != cpus[1]) {
        both_look(&b, cpus);
        one_sleeps(&b, "round trip, the daemon sleeps, two processors", cpus[0], cpus[1]);
    }
    one_sleeps(&b, "round trip, both sleep, one processor", cpus[0], cpus[0]);
    idle(&b);
    kvd_detach(b.k);
    if (harness_stop(&b.h) != 0)
        die("the daemon's end", NULL);
    harness_deinit(&b.h);
    return 0;
}
