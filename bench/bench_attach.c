/* The attach socket: a PING round trip to a real daemon against a bare ping-pong of the same bytes over the same kind of socket,
 * in turns, with both ends on one processor and on two. Placement moves either figure several times as much as anything that a daemon
 * can do, so only rounds of the same placement are compared.
 *
 * Then what it takes to attach: connect, HELLO, two descriptors, two mappings. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/bench.h"
#include "proto/frame.h"
#include "tests/harness.h"
#include "tests/rawclient.h"

enum { ROUNDS = 41, TRIPS = 3000, ATTACHES = 200 };

static void die(const char *what)
{
    fprintf(stderr, "bench_attach: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void pin(pid_t pid, int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(pid, sizeof(set), &set) < 0)
        die("sched_setaffinity");
}

/* The first two processors that this process may use; the same one twice if there is no other. */
static void two_cpus(int ret[2])
{
    cpu_set_t set;
    int n = 0;

    if (sched_getaffinity(0, sizeof(set), &set) < 0)
        die("sched_getaffinity");
    ret[0] = ret[1] = -1;
    for (int i = 0; i < CPU_SETSIZE && n < 2; i++)
        if (CPU_ISSET(i, &set))
            ret[n++] = i;
    if (n < 2)
        ret[1] = ret[0];
}

/* Nanoseconds of one trip over fd, of TRIPS. */
static double trips(int fd)
{
    uint8_t packet[FRAME_HEADER_BYTES], back[FRAME_HEADER_BYTES];
    uint64_t begun;

    frame_header_pack(packet, FRAME_PING, 1, 0, 0);
    begun = bench_nsec();
    for (int i = 0; i < TRIPS; i++)
        if (send(fd, packet, sizeof(packet), MSG_NOSIGNAL) != (ssize_t)sizeof(packet) ||
            recv(fd, back, sizeof(back), 0) != (ssize_t)sizeof(back))
            die("trip");
    return (double)(bench_nsec() - begun) / TRIPS;
}

static void echo(int fd)
{
    uint8_t packet[FRAME_HEADER_BYTES];
    ssize_t n;

    while ((n = recv(fd, packet, sizeof(packet), 0)) > 0)
        if (send(fd, packet, (size_t)n, MSG_NOSIGNAL) != n)
            break;
    _exit(0);
}

static pid_t start_echo(int *ret_fd)
{
    int fds[2];
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) < 0)
        die("socketpair");
    pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(fds[0]);
        echo(fds[1]);
    }
    close(fds[1]);
    *ret_fd = fds[0];
    return pid;
}

static void compare(const char *name, const struct harness *h, int daemon_fd, pid_t echo_pid, int echo_fd, int here, int there)
{
    double daemon[ROUNDS], bare[ROUNDS];

    pin(0, here);
    pin(h->pid, there);
    pin(echo_pid, there);
    trips(daemon_fd);
    trips(echo_fd);
    for (int i = 0; i < ROUNDS; i++) {
        bare[i] = trips(echo_fd);
        daemon[i] = trips(daemon_fd);
    }
    bench_line("attach", name, bench_median(daemon, ROUNDS) / 1000, "us", bench_median(bare, ROUNDS) / 1000,
               "bare SEQPACKET ping-pong at the same placement; ratio at most 1.3");
}

static void attach(const struct harness *h)
{
    double took[ATTACHES];

    for (int i = 0; i < ATTACHES; i++) {
        uint64_t begun = bench_nsec();
        struct raw r;

        raw_init(&r);
        if (raw_connect(&r, h->socket) < 0 || raw_hello(&r, "bench") != 0)
            die("attach");
        took[i] = (double)(bench_nsec() - begun) / 1000;
        raw_close(&r);
    }
    bench_line("attach", "connect, hello, page and index mapped", bench_median(took, ATTACHES), "us", 0,
               "none: once in a worker's life");
}

int main(void)
{
    static struct raw r;
    struct harness h;
    int cpus[2], echo_fd;
    pid_t echo_pid;

    two_cpus(cpus);
    harness_init(&h);
    harness_start(&h);
    raw_init(&r);
    if (raw_connect(&r, h.socket) < 0 || raw_hello(&r, "bench") != 0)
        die("attach");
    echo_pid = start_echo(&echo_fd);
    compare("ping, one processor", &h, r.fd, echo_pid, echo_fd, cpus[0], cpus[0]);
    if (cpus[1] != cpus[0])
        compare("ping, two processors", &h, r.fd, echo_pid, echo_fd, cpus[0], cpus[1]);
    attach(&h);
    raw_close(&r);
    close(echo_fd);
    waitpid(echo_pid, NULL, 0);
    if (harness_stop(&h) != 0)
        die("the daemon's end");
    harness_deinit(&h);
    return 0;
}
