/* Starts the real daemon on a private socket in a folder of its own, and real worker processes (tests/worker) beside it.
 *
 * The daemon is $KVD_BIN, else kvd in $KVD_BUILDDIR; the worker $KVD_WORKER, else tests/worker there. Every child dies with the
 * test (PR_SET_PDEATHSIG). What goes wrong in here ends the test with a message and the daemon's log: calls return no errors
 * unless they say so. One thread. */
#ifndef KVD_TESTS_HARNESS_H
#define KVD_TESTS_HARNESS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "client/libkvd/kvd.h"

enum { HARNESS_WORKERS_MAX = 64, HARNESS_OPTIONS_MAX = 4096 };

struct harness {
    char dir[64];
    char socket[96];
    char config[96];
    char log[96];
    char options[HARNESS_OPTIONS_MAX]; /* text of the configuration file */
    uid_t uid;                         /* that the daemon runs as */
    pid_t pid;                         /* 0: not running */
    kvd *admin;                        /* opened when needed */
};

/* Makes the folder. host_bytes 64M, slab_bytes 2M and index_entries 8192 unless an option says otherwise. */
void harness_init(struct harness *h);
/* Stops what runs, removes the folder. */
void harness_deinit(struct harness *h);

/* Adds lines to the configuration file: options of the daemon first, then "[tenant NAME]" sections. Before start (or a reload). */
void harness_option(struct harness *h, const char *line);
/* Writes the file anew without starting anything. */
void harness_write_config(struct harness *h);

/* Starts it and waits until it answers. */
void harness_start(struct harness *h);
/* Starts one that is expected to refuse: waits for its end. Returns the exit status; what it said is appended to the log.
 * extra_flag may be NULL. */
int harness_start_refused(struct harness *h, const char *extra_flag);
/* SIGKILL, and the body is collected. */
void harness_kill(struct harness *h);
/* SIGTERM; returns the exit status as of waitpid(). */
int harness_stop(struct harness *h);
/* True if the daemon has not ended by itself. */
bool harness_alive(struct harness *h);
/* Everything that the daemon has said. Freed by the caller. */
char *harness_log_text(const struct harness *h);
/* True once text is in the log; waits up to 5 s for it. */
bool harness_logged(const struct harness *h, const char *text);

/* ---- what the daemon says of itself ---- */

/* Value of a metric; label NULL: the sum over all labels. A name that does not exist ends the test. */
uint64_t harness_stat(struct harness *h, const char *name, const char *label);
struct harness_workers {
    size_t n;
    uint64_t leases, staging_bytes, jobs;
};
/* All workers but the harness's own admin session. */
struct harness_workers harness_list_workers(struct harness *h);
/* Polls for up to timeout_msec until no more than n_left workers are listed and (n_left 0) no lease or staging is left. */
bool harness_quiet(struct harness *h, size_t n_left, unsigned timeout_msec);
/* Re-checks every payload; returns the number of bad blocks. */
uint64_t harness_verify(struct harness *h);
kvd *harness_admin(struct harness *h);

/* ---- workers ---- */

struct worker {
    pid_t pid;
    FILE *to, *from;
    char reply[512];
};
/* A worker that is told what to do line by line (see tests/worker.c). uid: that it runs as; (uid_t)-1: the test's. Its attempt to
 * attach is over when this returns. */
void worker_start(struct worker *w, const struct harness *h, uid_t uid);
/* Sends a line, waits for the reply line and returns it (valid until the next). A worker that has died ends the test. */
const char *worker_ask(struct worker *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Sends a line only. worker_answer() reads the reply. */
void worker_tell(struct worker *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *worker_answer(struct worker *w);
void worker_kill(struct worker *w);
/* Says quit, waits. Returns the exit status. */
int worker_stop(struct worker *w);

/* A worker under load: random publishes, matches, leases and loads, each use checked. Counts go to a board that outlives it. */
struct board_slot {
    _Atomic uint64_t n_uses, n_wrong;        /* blocks loaded and compared; elements that were wrong */
    _Atomic uint64_t n_published, n_present, n_failed, n_matched, n_gone, n_rounds;
    _Atomic uint64_t epoch;                  /* of the index that it works with */
    _Atomic uint64_t alive_usec;             /* last time that the daemon was alive for it: monotonic */
    _Atomic uint64_t n_errors[32];           /* by enum kvd_error */
};
struct board {
    struct board_slot slot[HARNESS_WORKERS_MAX];
};
/* In a file that board_path names; mapped shared. */
struct board *board_create(const struct harness *h, char ret_path[128]);
void board_destroy(struct board *board);
/* kinds: "raw,quant,slide". Returns the pid. */
pid_t stress_start(const struct harness *h, const char *board_path, unsigned slot, uint64_t seed, const char *kinds);

uint64_t test_usec(void);
void test_sleep_usec(uint64_t usec);
/* $KVD_SEED, else one from the clock; printed. */
uint64_t test_seed(const char *name);
/* fork() for a child that dies with the test. */
pid_t test_fork(void);
/* A message and exit(1); the daemon's log when h is not NULL. */
void test_die(const struct harness *h, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));

#endif
