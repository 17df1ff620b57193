#include "daemon/jobs.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* One lock, held for a few instructions: a job is at least tens of microseconds of work. */
struct jobs {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct job *first, **last;           /* queue */
    struct job *finished, **finished_last;
    uint64_t n_waiting;
    unsigned n_asleep;
    bool stopping;
    int event_fd;
    sd_event_source *source;
    unsigned n_threads;
    pthread_t threads[];
};

static uint64_t now_usec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void run_one(struct job *job, bool cancelled)
{
    uint64_t begin = now_usec();

    if (cancelled)
        job->result = -ECANCELED;
    else if (job->deadline_usec && begin > job->deadline_usec)
        job->result = -ETIMEDOUT;
    else
        job->run(job);
    job->took_usec = now_usec() - begin;
}

static void *helper(void *ctx)
{
    struct jobs *j = ctx;

    pthread_setname_np(pthread_self(), "kvd-job");
    pthread_mutex_lock(&j->lock);
    for (;;) {
        struct job *job;
        bool cancelled, tell;

        while (!j->first && !j->stopping) {
            j->n_asleep++;
            pthread_cond_wait(&j->wake, &j->lock);
            j->n_asleep--;
        }
        job = j->first;
        if (!job)
            break;
        j->first = job->next;
        if (!j->first)
            j->last = &j->first;
        j->n_waiting--;
        cancelled = j->stopping;
        pthread_mutex_unlock(&j->lock);

        run_one(job, cancelled);

        pthread_mutex_lock(&j->lock);
        tell = j->finished == NULL;
        job->next = NULL;
        *j->finished_last = job;
        j->finished_last = &job->next;
        if (tell) { /* the loop takes the whole list at once, so one word is enough */
            uint64_t one = 1;

            pthread_mutex_unlock(&j->lock);
            if (write(j->event_fd, &one, sizeof(one)) < 0)
                abort(); /* an eventfd of ours cannot refuse */
            pthread_mutex_lock(&j->lock);
        }
    }
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

static void collect(struct jobs *j)
{
    struct job *list, *next;

    pthread_mutex_lock(&j->lock);
    list = j->finished;
    j->finished = NULL;
    j->finished_last = &j->finished;
    pthread_mutex_unlock(&j->lock);
    for (; list; list = next) {
        next = list->next; /* done() may free the job */
        list->done(list);
    }
}

static int on_finished(sd_event_source *source, int fd, uint32_t events, void *ctx)
{
    uint64_t n;

    (void)source;
    (void)events;
    if (read(fd, &n, sizeof(n)) < 0 && errno != EAGAIN)
        return -errno;
    collect(ctx);
    return 0;
}

static int start_threads(struct jobs *j, unsigned n)
{
    sigset_t all, before;
    int r = 0;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the loop's */
    for (; j->n_threads < n && r == 0; j->n_threads += r == 0)
        r = -pthread_create(&j->threads[j->n_threads], NULL, helper, j);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return j->n_threads > 0 ? 0 : r; /* fewer than wanted will do */
}

int jobs_create(sd_event *event, unsigned n_threads, struct jobs **ret)
{
    struct jobs *j = calloc(1, sizeof(*j) + n_threads * sizeof(j->threads[0]));
    int r;

    if (!j)
        return -ENOMEM;
    pthread_mutex_init(&j->lock, NULL);
    pthread_cond_init(&j->wake, NULL);
    j->last = &j->first;
    j->finished_last = &j->finished;
    j->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r = j->event_fd < 0 ? -errno : sd_event_add_io(event, &j->source, j->event_fd, EPOLLIN, on_finished, j);
    if (r >= 0)
        r = start_threads(j, n_threads);
    if (r < 0) {
        jobs_destroy(j);
        return r;
    }
    sd_event_source_set_description(j->source, "jobs");
    *ret = j;
    return 0;
}

struct jobs *jobs_destroy(struct jobs *j)
{
    if (!j)
        return NULL;
    pthread_mutex_lock(&j->lock);
    j->stopping = true;
    pthread_cond_broadcast(&j->wake);
    pthread_mutex_unlock(&j->lock);
    for (unsigned i = 0; i < j->n_threads; i++)
        pthread_join(j->threads[i], NULL);
    collect(j);
    sd_event_source_disable_unref(j->source);
    if (j->event_fd >= 0)
        close(j->event_fd);
    pthread_cond_destroy(&j->wake);
    pthread_mutex_destroy(&j->lock);
    free(j);
    return NULL;
}

void jobs_submit(struct jobs *j, struct job *list)
{
    unsigned n = 0, n_wake;
    struct job *last = list;

    if (!list)
        return;
    for (n = 1; last->next; n++)
        last = last->next;
    pthread_mutex_lock(&j->lock);
    *j->last = list;
    j->last = &last->next;
    j->n_waiting += n;
    n_wake = n < j->n_asleep ? n : j->n_asleep;
    pthread_mutex_unlock(&j->lock);
    while (n_wake-- > 0)
        pthread_cond_signal(&j->wake);
}

uint64_t jobs_waiting(struct jobs *j)
{
    uint64_t n;

    pthread_mutex_lock(&j->lock);
    n = j->n_waiting;
    pthread_mutex_unlock(&j->lock);
    return n;
}

unsigned jobs_threads(const struct jobs *j)
{
    return j->n_threads;
}
