/* Helper threads: pure jobs on memory that the loop has lent (rule I6).
 *
 *     loop                          helper
 *     jobs_submit(list)  ---queue-->  job->run(job)          touches only what the job names
 *     job->done(job)     <--eventfd-- finished list          called by the loop in batches
 *
 * Every submitted job is run and then done, also while jobs_destroy() waits; jobs that are cancelled get run(job) skipped.
 * Loop thread, but for run(). Includes: libsystemd's event loop. */
#ifndef KVD_DAEMON_JOBS_H
#define KVD_DAEMON_JOBS_H

#include <stdint.h>

#include <systemd/sd-event.h>

struct jobs;

/* Embedded in what the job is about; the owner keeps it until done(). */
struct job {
    struct job *next;
    void (*run)(struct job *job);  /* helper thread */
    void (*done)(struct job *job); /* loop thread */
    int result;                    /* of run(); -ECANCELED: was not run, -ETIMEDOUT: was not taken up by its deadline */
    uint64_t deadline_usec;        /* CLOCK_MONOTONIC; 0: none */
    uint64_t took_usec;
};

/* n_threads >= 1. Errors: -ENOMEM, -errno of threads and eventfd. */
int jobs_create(sd_event *event, unsigned n_threads, struct jobs **ret);
/* Cancels what has not begun, waits for what has, calls done() for all. NULL allowed; returns NULL. */
struct jobs *jobs_destroy(struct jobs *jobs);

/* Hands over a list linked by next, in order. */
void jobs_submit(struct jobs *jobs, struct job *list);
/* Submitted and not taken up. */
uint64_t jobs_waiting(struct jobs *jobs);
unsigned jobs_threads(const struct jobs *jobs);

#endif
