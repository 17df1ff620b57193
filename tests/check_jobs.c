/* Helper threads: every job is run or told why not, and is done on the loop's thread, whatever comes in between. */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/jobs.h"

enum { JOBS = 2000 };

struct work {
    struct job job;
    sem_t *gate;         /* run() waits for it; NULL: it does not */
    _Atomic int *n_run;
    int *n_done;
    pthread_t loop;
    int order;           /* the how manieth it was run, from 1 */
};

static void work_run(struct job *job)
{
    struct work *w = (struct work *)job;

    ck_assert(!pthread_equal(pthread_self(), w->loop));
    while (w->gate && sem_wait(w->gate) < 0)
        ;
    w->order = atomic_fetch_add(w->n_run, 1) + 1;
    job->result = 17;
}

static void work_done(struct job *job)
{
    struct work *w = (struct work *)job;

    ck_assert(pthread_equal(pthread_self(), w->loop));
    (*w->n_done)++;
}

struct fixture {
    sd_event *event;
    struct jobs *jobs;
    struct work *work;
    _Atomic int n_run;
    int n_done;
    sem_t gate;
};

static void fixture_init(struct fixture *f, unsigned n_threads)
{
    memset(f, 0, sizeof(*f));
    ck_assert_int_ge(sd_event_new(&f->event), 0);
    ck_assert_int_eq(jobs_create(f->event, n_threads, &f->jobs), 0);
    ck_assert_uint_eq(jobs_threads(f->jobs), n_threads);
    f->work = calloc(JOBS, sizeof(*f->work));
    ck_assert_ptr_nonnull(f->work);
    sem_init(&f->gate, 0, 0);
    for (int i = 0; i < JOBS; i++)
        f->work[i] = (struct work){.job = {.run = work_run, .done = work_done}, .n_run = &f->n_run, .n_done = &f->n_done,
                                   .loop = pthread_self()};
}

static void fixture_deinit(struct fixture *f)
{
    f->jobs = jobs_destroy(f->jobs);
    sd_event_unref(f->event);
    sem_destroy(&f->gate);
    free(f->work);
}

/* Hands over work[from] ... work[to - 1] as one list. */
static void submit(struct fixture *f, int from, int to)
{
    for (int i = from; i < to; i++)
        f->work[i].job.next = i + 1 < to ? &f->work[i + 1].job : NULL;
    jobs_submit(f->jobs, &f->work[from].job);
}

static void run_loop_until(struct fixture *f, int n_done)
{
    while (f->n_done < n_done)
        ck_assert_int_ge(sd_event_run(f->event, UINT64_MAX), 0);
}

START_TEST(all_are_run_and_done)
{
    static const unsigned threads[] = {1, 2, 7};
    struct fixture f;

    fixture_init(&f, threads[_i]);
    for (int i = 0; i < JOBS; i += 10)
        submit(&f, i, i + 10);
    run_loop_until(&f, JOBS);
    ck_assert_int_eq(f.n_run, JOBS);
    ck_assert_uint_eq(jobs_waiting(f.jobs), 0);
    for (int i = 0; i < JOBS; i++) {
        ck_assert_int_eq(f.work[i].job.result, 17);
        if (threads[_i] == 1)
            ck_assert_int_eq(f.work[i].order, i + 1); /* one thread: in order */
    }
    fixture_deinit(&f);
}
END_TEST

START_TEST(what_has_not_begun_is_cancelled_at_the_end)
{
    struct fixture f;
    int n_cancelled = 0;

    fixture_init(&f, 1);
    f.work[0].gate = &f.gate;
    submit(&f, 0, 100);
    while (jobs_waiting(f.jobs) == 100)
        sched_yield(); /* until the first has been taken up */
    ck_assert_uint_eq(jobs_waiting(f.jobs), 99);
    sem_post(&f.gate);
    f.jobs = jobs_destroy(f.jobs);
    ck_assert_int_eq(f.n_done, 100);
    for (int i = 0; i < 100; i++)
        n_cancelled += f.work[i].job.result == -ECANCELED;
    ck_assert_int_eq(n_cancelled + f.n_run, 100);
    fixture_deinit(&f);
}
END_TEST

START_TEST(what_is_late_is_not_run)
{
    struct fixture f;

    fixture_init(&f, 2);
    f.work[1].job.deadline_usec = 1; /* long past */
    f.work[2].job.deadline_usec = UINT64_MAX;
    submit(&f, 0, 3);
    run_loop_until(&f, 3);
    ck_assert_int_eq(f.n_run, 2);
    ck_assert_int_eq(f.work[1].job.result, -ETIMEDOUT);
    ck_assert_int_eq(f.work[2].job.result, 17);
    fixture_deinit(&f);
}
END_TEST

/* done() may free its job and submit others. */
static struct fixture *of_chain;
static void chain_done(struct job *job)
{
    struct work *w = (struct work *)job;
    int next = ++*w->n_done;

    memset(job, 0xee, sizeof(*job));
    if (next < JOBS)
        submit(of_chain, next, next + 1);
}

START_TEST(done_may_submit)
{
    struct fixture f;

    fixture_init(&f, 2);
    of_chain = &f;
    for (int i = 0; i < JOBS; i++)
        f.work[i].job.done = chain_done;
    submit(&f, 0, 1);
    run_loop_until(&f, JOBS);
    ck_assert_int_eq(f.n_run, JOBS);
    fixture_deinit(&f);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("jobs");
    TCase *tc = tcase_create("jobs");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, all_are_run_and_done, 0, 3);
    tcase_add_test(tc, what_has_not_begun_is_cancelled_at_the_end);
    tcase_add_test(tc, what_is_late_is_not_run);
    tcase_add_test(tc, done_may_submit);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
