/* The local form on several threads of the caller.
 *
 *   IDLE --begin--> RUNNING --(a waiter goes to sleep)--> AWAITED --the last unit's end--> DONE + error --begin--> RUNNING …
 *
 * `inside` counts the threads in kvd_attend_work(). A thread adds itself before it looks at the state, and begin() changes the
 * job only while the state is neither RUNNING nor AWAITED and, after that was so, nobody is inside. Therefore who is inside and
 * has seen RUNNING has the job to itself until it leaves; who comes too late sees another state and touches nothing. All four
 * accesses are sequentially consistent: each side writes its own word first and then reads the other's. */
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kvd_attend_job.h"

enum { IDLE = 0, RUNNING = 1, AWAITED = 2, DONE = 3 };

/* A waiter looks this often before it sleeps: a few threads that are evenly busy end within some 10 us of each other. */
#define SPINS 4000

struct kvd_attending {
    struct kvd_space *space;
    struct attend_job job;
    struct kvd *session; /* outlives what the caller may still do with this */
    _Atomic uint32_t state;
    _Atomic uint32_t inside;
    _Atomic uint32_t next;       /* task */
    _Atomic uint32_t units_left;
    _Atomic unsigned char seat_taken[ATTEND_PARTS_MAX];
    char message[ERROR_BYTES]; /* of the thread that found the error, for the one that waits */
};

int kvd_attending_create(kvd_space *space, kvd_attending **ret)
{
    struct kvd_attending *a;

    if (!space || !ret)
        return error_set(space ? space->session->cookie : 0, KVD_E_ARG, "space or ret is NULL");
    if (session_forked(space->session))
        return session_error_forked(space->session);
    a = calloc(1, sizeof(*a));
    if (!a)
        return error_set(space->session->cookie, KVD_E_NOMEM, "no memory for an attention");
    a->space = space;
    a->session = space->session;
    *ret = a;
    return KVD_OK;
}

kvd_attending *kvd_attending_destroy(kvd_attending *attending)
{
    if (attending) {
        attend_job_deinit(&attending->job);
        free(attending);
    }
    return NULL;
}

static bool is_running(uint32_t state)
{
    return state == RUNNING || state == AWAITED;
}

int kvd_attend_begin(kvd_attending *attending, kvd_prefix *prefix, const struct kvd_attention *attention,
                     uint32_t n_parts)
{
    struct kvd_attending *a = attending;
    uint64_t cookie = prefix ? prefix->space->session->cookie : 0;
    int r;

    if (!a || !prefix || prefix->space != a->space)
        return error_set(cookie, KVD_E_ARG, "attending or prefix is NULL, or they are of different spaces");
    if (session_forked(a->session))
        return session_error_forked(a->session);
    if (n_parts > ATTEND_PARTS_MAX)
        return error_set(cookie, KVD_E_ARG, "n_parts is %u; allowed: up to %d", n_parts, ATTEND_PARTS_MAX);
    if (is_running(atomic_load(&a->state)))
        return error_set(cookie, KVD_E_ARG, "the attention that was begun before is not complete");
    for (int i = 0; atomic_load(&a->inside) != 0; i++) /* who came too late is on its way out */
        if (i % SPINS == SPINS - 1)
            sched_yield();
        else
            __builtin_ia32_pause();
    r = attend_job_prepare(&a->job, prefix, attention, n_parts ? n_parts : 1);
    if (r != 0)
        return r;
    atomic_store_explicit(&a->next, 0, memory_order_relaxed);
    atomic_store_explicit(&a->units_left, a->job.n_units, memory_order_relaxed);
    atomic_store(&a->state, RUNNING);
    return KVD_OK;
}

static bool take_seat(struct kvd_attending *a, uint32_t *ret_seat)
{
    for (uint32_t i = 0; i < a->job.n_seats; i++)
        if (!atomic_load_explicit(&a->seat_taken[i], memory_order_relaxed) &&
            !atomic_exchange_explicit(&a->seat_taken[i], 1, memory_order_acquire)) {
            *ret_seat = i;
            return true;
        }
    return false;
}

static void end_all(struct kvd_attending *a)
{
    int r = attend_job_finish(&a->job);

    if (r != 0)
        error_keep(a->session->cookie, a->message);
    if (atomic_exchange(&a->state, DONE + (uint32_t)r) == AWAITED)
        syscall(SYS_futex, &a->state, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static int work(struct kvd_attending *a)
{
    uint32_t seat, task;
    bool last = false;

    if (!take_seat(a, &seat))
        return KVD_E_NOT_FOUND;
    task = atomic_load_explicit(&a->next, memory_order_relaxed) < a->job.n_tasks
               ? atomic_fetch_add_explicit(&a->next, 1, memory_order_relaxed)
               : a->job.n_tasks;
    if (task < a->job.n_tasks)
        last = attend_job_run(&a->job, task, seat);
    /* acq_rel: who ends the last unit sees all the others' results. Before the seat is free: its memory is read then. */
    if (last && atomic_fetch_sub_explicit(&a->units_left, 1, memory_order_acq_rel) == 1)
        end_all(a);
    atomic_store_explicit(&a->seat_taken[seat], 0, memory_order_release);
    return task < a->job.n_tasks ? KVD_OK : KVD_E_NOT_FOUND;
}

int kvd_attend_work(kvd_attending *attending)
{
    int r = KVD_E_NOT_FOUND;

    if (session_forked(attending->session))
        return session_error_forked(attending->session);
    atomic_fetch_add(&attending->inside, 1);
    if (is_running(atomic_load(&attending->state)))
        r = work(attending);
    atomic_fetch_sub(&attending->inside, 1);
    return r;
}

static int result(const struct kvd_attending *a, uint32_t state)
{
    int r = (int)(state - DONE);

    return r == 0 ? 0 : error_set(a->session->cookie, r, "%s", a->message);
}

int kvd_attend_wait(kvd_attending *attending, int timeout_msec)
{
    struct kvd_attending *a = attending;
    uint64_t deadline = 0;
    uint32_t seen;

    if (session_forked(a->session))
        return session_error_forked(a->session);
    seen = atomic_load_explicit(&a->state, memory_order_acquire);
    if (seen == IDLE)
        return error_set(a->session->cookie, KVD_E_ARG, "no attention was begun");
    for (int i = 0; i < SPINS && seen < DONE; i++) {
        __builtin_ia32_pause();
        seen = atomic_load_explicit(&a->state, memory_order_acquire);
    }
    if (seen < DONE && timeout_msec >= 0)
        deadline = mux_now_msec() + (uint64_t)timeout_msec;
    while (seen < DONE) {
        struct timespec left = {0};
        uint64_t now;

        seen = RUNNING;
        if (!atomic_compare_exchange_strong(&a->state, &seen, AWAITED) && seen >= DONE)
            break;
        now = timeout_msec >= 0 ? mux_now_msec() : 0;
        if (timeout_msec >= 0 && now >= deadline)
            return error_set(a->session->cookie, KVD_E_TIMEOUT, "the attention was not complete within %d ms",
                             timeout_msec);
        if (timeout_msec >= 0) {
            left.tv_sec = (time_t)((deadline - now) / 1000);
            left.tv_nsec = (long)((deadline - now) % 1000) * 1000000;
        }
        syscall(SYS_futex, &a->state, FUTEX_WAIT_PRIVATE, AWAITED, timeout_msec < 0 ? NULL : &left, NULL, 0);
        seen = atomic_load_explicit(&a->state, memory_order_acquire);
    }
    return result(a, seen);
}
