/* Threads and rings of attention: who looks, who computes, who sleeps.
 *
 * All threads are alike. One that comes for work first polls the rings (if no other thread does), then takes a piece of the job whose turn
 * it is. Where there is no piece, one thread watches: it looks at the rings for a while (spin_usec), then sleeps on the workers' bells;
 * the others wait for a job with pieces for them.
 *
 *             +--> poll --> piece of a job? --yes--> compute it, merge it, answer those that it completes --+
 *             |                  | no                                                                       |
 *             |                  +--> nobody watches: watch --something in a ring-->+                       |
 *             |                  +--> else: wait for pieces ----------------------->+                       |
 *             +---------------------------------------------------------------------+-----------------------+
 *
 * Where a wake-up could be lost, and why it is not:
 *   a  worker submits while the watcher goes to sleep: the watcher clears attend_awake, full fence, looks at the rings again; the worker
 *      writes submit_tail, full fence, reads attend_awake. One of them sees the other.
 *   b  nobody watches while all threads compute: each polls before its next piece, and who finds no piece watches.
 *   c  a ring is full of completions that nobody has read: it is not ready, and no thread spins for it. Its worker has submitted more than
 *      it may; libkvd never does.
 *   d  a ring was not ready when the watcher looked, because a thread had written a completion and not counted it yet: that thread looks
 *      at the rings itself before it waits for pieces, and does not wait while there was something.
 *   e  a bell that a worker rings without need wakes the watcher for nothing: it costs that worker a system call each time. */
#include "daemon/attend.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "daemon/attend-internal.h"
#include "daemon/fault.h"
#include "daemon/probes.h"
#include "daemon/staging.h"

enum {
    SPIN_AGAIN = 64,     /* watches */
    HAND_OVER_USEC = 50, /* a watcher that goes to compute for longer than this leaves the rings to another thread */
};

#define NSEC_PER_UNIT_MIN 0.001

/* ---- jobs ---- */

static unsigned batch_class(uint32_t n)
{
    return n <= 1 ? 0 : n <= 4 ? 1 : n <= 16 ? 2 : n <= 64 ? 3 : 4;
}

static void count_end(struct attend *a, const struct attend_request *rq, uint64_t now)
{
    struct attend_stats *s = &a->stats;
    uint32_t reason = atomic_load_explicit(&rq->reason, memory_order_relaxed);
    uint64_t begun = rq->begun_usec ? rq->begun_usec : now;

    histogram_add(&s->wait, begun - rq->taken_usec);
    histogram_add(&s->took, now - begun);
    s->needed_bytes += rq->needed_bytes;
    s->n_done += reason == RING_DONE;
    s->n_failed += reason != RING_DONE;
    s->n_cancelled += reason == RING_CANCELLED;
    s->n_late += reason == RING_DEADLINE;
    s->n_stale += reason == RING_STALE || reason == RING_FOREIGN;
}

/* Answers requests, which then are gone. By lock, which is given up meanwhile: they belong to nobody else. */
static void complete_all(struct attend *a, struct attend_request **list, uint32_t n)
{
    uint64_t now;

    if (n == 0)
        return;
    pthread_mutex_unlock(&a->lock);
    for (uint32_t i = 0; i < n; i++)
        attend_complete(list[i]);
    now = attend_now_usec();
    pthread_mutex_lock(&a->lock);
    for (uint32_t i = 0; i < n; i++) {
        count_end(a, list[i], now);
        attend_request_end(a, list[i]);
    }
    pthread_cond_broadcast(&a->job_ended);
}

/* What was shared is given back to those who shared it. By lock. */
static void give_back_costs(struct attend_request *const *members, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        struct attend_ring *ring = members[i]->ring;
        double saved = members[i]->cost - members[i]->shared_cost, now = ring->tenant->now;

        if (saved > 0)
            ring->finish = ring->finish - saved > now ? ring->finish - saved : now;
    }
}

static void end_job(struct attend *a, struct attend_job *j)
{
    j->tenant->blocked = false;
    j->tenant->n_jobs--;
    attend_job_destroy(j);
    pthread_cond_broadcast(&a->job_ended);
}

/* What is left of a job is as urgent as the most urgent that waits for it. By lock. */
static void find_tag(struct attend_job *j)
{
    j->tag = INFINITY;
    for (uint32_t i = 0; i < j->n_members; i++)
        j->tag = j->tags[i] < j->tag ? j->tags[i] : j->tag;
}

/* Enters a job that has been made. By lock. */
static void start_job(struct attend *a, struct attend_job *j)
{
    struct attend_request *ended[ATTEND_MEMBERS_MAX];
    uint32_t n_ended = 0, n_wake;

    a->stats.n_jobs++;
    a->stats.n_together += j->n_members;
    a->stats.batch[batch_class(j->n_members)]++;
    give_back_costs(j->members, j->n_members);
    for (uint32_t i = 0; i < j->n_members; i++) {
        j->tags[i] = j->members[i]->n_left ? j->members[i]->tag : INFINITY;
        if (j->members[i]->n_left == 0) /* nothing to read */
            ended[n_ended++] = j->members[i];
    }
    find_tag(j);
    if (j->n_pieces == 0) {
        end_job(a, j);
        complete_all(a, ended, n_ended);
        return;
    }
    a->stats.n_put_off += attend_queue_job(j->tenant) != NULL;
    j->next = j->tenant->jobs;
    j->tenant->jobs = j;
    n_wake = j->n_pieces - 1 < a->n_idle ? (uint32_t)(j->n_pieces - 1) : a->n_idle;
    a->stats.n_wakes += n_wake;
    while (n_wake-- > 0)
        pthread_cond_signal(&a->work);
    complete_all(a, ended, n_ended);
}

/* Makes a job of what is next in a tenant's queue. By lock, which is given up meanwhile. */
static void form_job(struct attend *a, struct attend_tenant *t)
{
    struct attend_request *members[ATTEND_MEMBERS_MAX];
    uint32_t n = attend_queue_take(a, t, members), n_in = n;
    double nsec_per_unit = a->nsec_per_unit;
    uint64_t slice_usec = a->limits.slice_usec, now;
    struct attend_job *j = NULL;
    int r;

    t->n_jobs++;
    pthread_mutex_unlock(&a->lock);
    now = attend_now_usec();
    for (uint32_t i = 0; i < n; i++)
        attend_request_over(members[i], now);
    r = attend_job_create(members, n, nsec_per_unit, slice_usec, &j, &n_in);
    PROBE3(attend_batch, n, r == 0 ? j->n_blocks : 0, r == 0 ? j->n_pieces : 0);
    for (uint32_t i = 0; r == 0 && i < n_in; i++)
        members[i]->begun_usec = now;
    pthread_mutex_lock(&a->lock);
    for (uint32_t i = 0; r == 0 && i < n_in; i++)
        t->served += members[i]->read_cost;
    if (r == 0) {
        for (uint32_t i = n_in; i < n; i++)
            attend_queue_return(a, members[i]);
        start_job(a, j);
        return;
    }
    t->n_jobs--;
    pthread_cond_broadcast(&a->job_ended);
    if (r == -EAGAIN) {
        for (uint32_t i = 0; i < n; i++)
            attend_queue_return(a, members[i]);
        t->blocked = t->n_jobs > 0; /* until one of them ends */
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        attend_request_fail(members[i], RING_MEMORY, 0, 0);
    complete_all(a, members, n);
}

/* The next piece to be computed; NULL: there is none. By lock, which is given up while a job is made. */
static struct attend_job *take_piece(struct attend *a, struct attend_piece *ret)
{
    for (;;) {
        struct attend_tenant *t = attend_queue_tenant(a);
        struct attend_job *j = t ? attend_queue_job(t) : NULL;

        if (!t)
            return NULL;
        if (attend_queue_first(t, j)) {
            form_job(a, t);
            continue;
        }
        *ret = attend_job_next(j);
        t->served += attend_piece_units(j, ret);
        return j;
    }
}

/* A piece is done, or was skipped: who waits for no other is answered; the last piece ends the job. By lock. */
static void finish_piece(struct attend *a, struct attend_job *j, const struct attend_piece *p, bool skipped)
{
    const struct attend_segment *s = &j->segments[p->segment];
    struct attend_request *ended[ATTEND_MEMBERS_MAX];
    uint32_t n_ended = 0, row = 0;

    if (skipped)
        attend_job_skip(j, p);
    for (uint32_t m = 0; m < s->n_members; m++) {
        uint32_t member = j->order[s->member0 + m], n_rows = j->n_rows[member];
        struct attend_request *rq = isinf(j->tags[member]) ? NULL : j->members[member]; /* NULL: answered */

        if (row < p->row1 && row + n_rows > p->row0)
            rq->n_left--;
        row += n_rows;
        if (rq && rq->n_left == 0) {
            ended[n_ended++] = rq;
            j->tags[member] = INFINITY;
        }
    }
    if (n_ended)
        find_tag(j);
    if (--j->n_left == 0) {
        struct attend_job **at = &j->tenant->jobs;

        while (*at != j)
            at = &(*at)->next;
        *at = j->next;
        end_job(a, j);
    }
    complete_all(a, ended, n_ended);
}

/* What a unit takes. A thread that was interrupted measures its interruption: so a sample counts at most twice what is known, and a
 * machine that has become slower is believed slowly. By lock. */
static void learn(struct attend *a, double nsec_per_unit)
{
    if (nsec_per_unit > a->nsec_per_unit * 2)
        nsec_per_unit = a->nsec_per_unit * 2;
    a->nsec_per_unit += (nsec_per_unit - a->nsec_per_unit) / 32;
    if (a->nsec_per_unit < NSEC_PER_UNIT_MIN)
        a->nsec_per_unit = NSEC_PER_UNIT_MIN;
}

static void run_piece(struct attend *a, struct attend_job *j, const struct attend_piece *p, struct attend_scratch *scratch)
{
    double units = attend_piece_units(j, p), nsec;
    uint64_t bytes, begun;
    bool skipped;

    if (!a->watched && a->n_idle && units * a->nsec_per_unit > HAND_OVER_USEC * 1000.0) {
        a->stats.n_wakes++;
        pthread_cond_signal(&a->work);
    }
    pthread_mutex_unlock(&a->lock);
    begun = attend_now_usec();
    bytes = attend_piece_run(a, j, p, scratch, &skipped);
    nsec = (double)(attend_now_usec() - begun) * 1000;
    pthread_mutex_lock(&a->lock);
    a->stats.n_pieces++;
    a->stats.read_bytes += bytes;
    if (bytes)
        learn(a, nsec / units);
    finish_piece(a, j, p, skipped);
}

/* ---- watching ---- */

static void set_awake(const struct attend *a, uint32_t awake)
{
    for (const struct attend_tenant *t = a->tenants; t; t = t->next)
        atomic_store_explicit(t->awake, awake, memory_order_relaxed);
}

static bool anything(const struct attend *a)
{
    for (uint32_t i = 0; i < a->n_rings; i++)
        if (attend_ring_ready(a->rings[i]))
            return true;
    return false;
}

/* The loop goes first. */
static void lock_rings(struct attend *a)
{
    while (atomic_load_explicit(&a->knocks, memory_order_relaxed))
        sched_yield();
    pthread_mutex_lock(&a->rings_lock);
}

/* True: something came. */
static bool spin(struct attend *a, uint64_t usec)
{
    uint64_t until = attend_now_usec() + usec;
    bool any = false;

    while (usec && !any && attend_now_usec() < until) {
        for (int i = 0; i < 16 && !any; i++) {
            lock_rings(a);
            any = anything(a);
            pthread_mutex_unlock(&a->rings_lock);
            __builtin_ia32_pause();
        }
    }
    return any;
}

/* Looking pays only if something comes while one looks: after a look in vain the next is half as long. From time to time a whole one,
 * to see whether that has changed. */
static uint64_t spin_usec(struct attend *a)
{
    if (a->config.n_cpus == 1)
        return 0;
    if (a->n_vain >= 6 && ++a->n_vain % SPIN_AGAIN == 0)
        return a->limits.spin_usec;
    return a->n_vain < 6 ? a->limits.spin_usec >> a->n_vain : 0;
}

/* Returns when there may be something to take, or the end. */
static void watch(struct attend *a, uint64_t usec)
{
    struct epoll_event events[16];
    bool any;

    any = spin(a, usec);
    if (usec && any)
        a->n_vain = 0;
    else if (usec && a->n_vain < 6)
        a->n_vain++;
    lock_rings(a);
    any = any || anything(a);
    if (!any) {
        set_awake(a, 0);
        atomic_thread_fence(memory_order_seq_cst); /* partner: a worker's, between submit_tail and attend_awake */
        any = anything(a);
        if (any)
            set_awake(a, 1);
    }
    pthread_mutex_unlock(&a->rings_lock);
    if (any)
        return;
    epoll_wait(a->epoll_fd, events, 16, -1);
    lock_rings(a);
    set_awake(a, 1);
    pthread_mutex_unlock(&a->rings_lock);
    pthread_mutex_lock(&a->lock);
    a->stats.n_bells++;
    pthread_mutex_unlock(&a->lock);
}

bool attend_turn(struct attend *a, struct attend_scratch *scratch)
{
    struct attend_piece piece;
    struct attend_job *job;

    if (!atomic_load_explicit(&a->knocks, memory_order_relaxed) && pthread_mutex_trylock(&a->rings_lock) == 0) {
        attend_poll(a);
        pthread_mutex_unlock(&a->rings_lock);
    }
    pthread_mutex_lock(&a->lock);
    job = take_piece(a, &piece);
    if (job)
        run_piece(a, job, &piece, scratch);
    pthread_mutex_unlock(&a->lock);
    return job != NULL;
}

/* Where another thread watches: looks at the rings once, for the watcher may have seen one that was full until this thread had counted
 * what it answered; then waits for pieces. */
static void wait_for_pieces(struct attend *a)
{
    unsigned n;

    lock_rings(a); /* until whoever had them is done, so that the look does not fail for the same reason */
    n = attend_poll(a);
    pthread_mutex_unlock(&a->rings_lock);
    if (n)
        return;
    pthread_mutex_lock(&a->lock);
    if (a->watched && !a->stopping && !attend_queue_tenant(a)) {
        a->n_idle++;
        pthread_cond_wait(&a->work, &a->lock);
        a->n_idle--;
    }
    pthread_mutex_unlock(&a->lock);
}

/* Nothing was to be done: watches, or waits for pieces. False: it is the end. */
static bool rest(struct attend *a)
{
    bool stopping, watches;
    uint64_t usec;

    pthread_mutex_lock(&a->lock);
    stopping = a->stopping;
    watches = !stopping && !a->watched;
    a->watched |= watches;
    usec = watches ? spin_usec(a) : 0;
    pthread_mutex_unlock(&a->lock);
    if (watches) {
        watch(a, usec);
        pthread_mutex_lock(&a->lock);
        a->watched = false;
        pthread_mutex_unlock(&a->lock);
    } else if (!stopping) {
        wait_for_pieces(a);
    }
    return !stopping;
}

static void *attend_thread(void *ctx)
{
    struct attend *a = ctx;
    struct attend_scratch scratch = {0};

    pthread_setname_np(pthread_self(), "kvd-attend");
    do
        while (attend_turn(a, &scratch))
            ;
    while (rest(a));
    attend_scratch_deinit(&scratch);
    return NULL;
}

/* ---- life ---- */

static int start_threads(struct attend *a)
{
    sigset_t all, before;
    int r = 0;

    if (a->n_threads)
        return 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the loop's */
    while (a->n_threads < a->config.n_threads && r == 0) {
        r = FAULT_DUE("attend-thread") ? -EAGAIN : -pthread_create(&a->threads[a->n_threads], NULL, attend_thread, a);
        a->n_threads += r == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return a->n_threads ? 0 : r; /* fewer than wanted will do */
}

int attend_create(const struct attend_config *config, struct attend **ret)
{
    struct attend *a = calloc(1, sizeof(*a));
    struct epoll_event event = {.events = EPOLLIN};
    int r = -ENOMEM;

    if (!a)
        return -ENOMEM;
    a->config = *config;
    a->nsec_per_unit = 0.05;
    a->epoll_fd = a->stop_fd = -1;
    pthread_mutex_init(&a->rings_lock, NULL);
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->work, NULL);
    pthread_cond_init(&a->job_ended, NULL);
    attend_set_limits(a, &config->limits);
    a->threads = calloc(config->n_threads ? config->n_threads : 1, sizeof(*a->threads));
    a->buckets = calloc(ATTEND_BUCKETS, sizeof(*a->buckets));
    if (a->threads && a->buckets && getrandom(&a->hash_seed, sizeof(a->hash_seed), 0) == sizeof(a->hash_seed)) {
        a->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
        a->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        r = a->epoll_fd < 0 || a->stop_fd < 0 || epoll_ctl(a->epoll_fd, EPOLL_CTL_ADD, a->stop_fd, &event) < 0 ? -errno : 0;
    }
    if (r < 0) {
        attend_destroy(a);
        return r;
    }
    *ret = a;
    return 0;
}

struct attend *attend_destroy(struct attend *a)
{
    uint64_t one = 1;

    if (!a)
        return NULL;
    pthread_mutex_lock(&a->lock);
    a->stopping = true;
    pthread_cond_broadcast(&a->work);
    pthread_mutex_unlock(&a->lock);
    if (a->n_threads && write(a->stop_fd, &one, sizeof(one)) < 0)
        abort(); /* an eventfd of ours cannot refuse */
    for (unsigned i = 0; i < a->n_threads; i++)
        pthread_join(a->threads[i], NULL);
    assert(a->n_rings == 0 && !a->tenants && a->n_waiting == 0);
    if (a->epoll_fd >= 0)
        close(a->epoll_fd);
    if (a->stop_fd >= 0)
        close(a->stop_fd);
    pthread_cond_destroy(&a->work);
    pthread_cond_destroy(&a->job_ended);
    pthread_mutex_destroy(&a->lock);
    pthread_mutex_destroy(&a->rings_lock);
    free(a->threads);
    free(a->buckets);
    free(a->rings);
    free(a);
    return NULL;
}

void attend_set_limits(struct attend *a, const struct attend_limits *limits)
{
    pthread_mutex_lock(&a->lock);
    a->limits = *limits;
    if (a->limits.n_blocks > a->config.n_words)
        a->limits.n_blocks = a->config.n_words;
    pthread_mutex_unlock(&a->lock);
}

void attend_measure(struct attend *a, struct metrics *m)
{
    const struct attend_stats *s = &a->stats;

    pthread_mutex_lock(&a->lock);
    m->attend_requests = s->n_requests;
    m->attend_done = s->n_done;
    m->attend_failed = s->n_failed;
    m->attend_refused = s->n_refused;
    m->attend_cancelled = s->n_cancelled;
    m->attend_late = s->n_late;
    m->attend_stale = s->n_stale;
    m->attend_rings_broken = s->n_broken;
    m->attend_batches = s->n_jobs;
    m->attend_batched = s->n_together;
    m->attend_batch_of_1 = s->batch[0];
    m->attend_batch_of_4 = s->batch[1];
    m->attend_batch_of_16 = s->batch[2];
    m->attend_batch_of_64 = s->batch[3];
    m->attend_batch_of_more = s->batch[4];
    m->attend_put_off = s->n_put_off;
    m->attend_pieces = s->n_pieces;
    m->attend_read_bytes = s->read_bytes;
    m->attend_needed_bytes = s->needed_bytes;
    m->attend_sleeps = s->n_bells;
    m->attend_wakes = s->n_wakes;
    m->attend_wait = s->wait;
    m->attend_compute = s->took;
    m->attend_waiting = a->n_waiting;
    m->attend_queue_bytes = a->bytes;
    m->attend_rings = a->n_rings;
    pthread_mutex_unlock(&a->lock);
}

/* ---- tenants ---- */

/* The loop's way to rings_lock: pollers stand back. */
static void knock(struct attend *a)
{
    atomic_fetch_add_explicit(&a->knocks, 1, memory_order_relaxed);
    pthread_mutex_lock(&a->rings_lock);
    atomic_fetch_sub_explicit(&a->knocks, 1, memory_order_relaxed);
}

static void tenant_free(struct attend_tenant *t)
{
    pthread_mutex_destroy(&t->words_lock);
    free((void *)t->words);
    free(t->free_words);
    free(t->header);
    free(t->heap);
    free(t);
}

int attend_tenant_create(struct attend *a, struct cache *cache, struct attend_tenant **ret)
{
    uint32_t n = a->config.n_words;
    struct attend_tenant *t = calloc(1, sizeof(*t));
    int r = -ENOMEM;

    if (!t)
        return -ENOMEM;
    t->attend = a;
    t->cache = cache;
    t->awake = cache_awake_word(cache);
    pthread_mutex_init(&t->words_lock, NULL);
    t->words = calloc(n, sizeof(*t->words));
    t->free_words = malloc(n * sizeof(*t->free_words));
    t->header = calloc(1, sizeof(*t->header));
    if (t->words && t->free_words && t->header) {
        for (uint32_t i = 0; i < n; i++)
            t->free_words[i] = n - 1 - i;
        t->n_free = n;
        /* A log of one word, at which nothing is ever noted. */
        t->page = (struct cache_page){.header = t->header, .leases = t->words, .log = t->words, .n_leases = n, .n_log = 1};
        r = cache_page_add(cache, &t->page);
    }
    if (r < 0) {
        tenant_free(t);
        return r;
    }
    knock(a);
    pthread_mutex_lock(&a->lock);
    t->next = a->tenants;
    a->tenants = t;
    pthread_mutex_unlock(&a->lock);
    pthread_mutex_unlock(&a->rings_lock);
    *ret = t;
    return 0;
}

struct attend_tenant *attend_tenant_destroy(struct attend_tenant *t)
{
    struct attend *a;

    if (!t)
        return NULL;
    a = t->attend;
    pthread_mutex_lock(&a->lock);
    while (t->n_jobs || t->n_active)
        pthread_cond_wait(&a->job_ended, &a->lock);
    pthread_mutex_unlock(&a->lock);
    knock(a);
    pthread_mutex_lock(&a->lock);
    for (struct attend_tenant **at = &a->tenants; *at; at = &(*at)->next)
        if (*at == t) {
            *at = t->next;
            break;
        }
    pthread_mutex_unlock(&a->lock);
    pthread_mutex_unlock(&a->rings_lock);
    cache_page_remove(t->cache, &t->page);
    tenant_free(t);
    return NULL;
}

/* ---- rings ---- */

static int insert_ring(struct attend *a, struct attend_ring *ring)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET}; /* every ring of the bell, and no need to read it */
    int r = 0;

    knock(a);
    if (a->n_rings == a->rings_room) {
        uint32_t room = a->rings_room ? a->rings_room * 2 : 16;
        struct attend_ring **grown = realloc(a->rings, room * sizeof(*grown));

        r = grown ? 0 : -ENOMEM;
        a->rings = grown ? grown : a->rings;
        a->rings_room = grown ? room : a->rings_room;
    }
    if (r == 0 && epoll_ctl(a->epoll_fd, EPOLL_CTL_ADD, ring->bell, &event) < 0)
        r = -errno;
    if (r == 0)
        r = start_threads(a);
    if (r == 0)
        a->rings[a->n_rings++] = ring;
    pthread_mutex_unlock(&a->rings_lock);
    return r;
}

int attend_ring_open(struct attend *a, struct attend_tenant *t, void *at, uint32_t n, struct attend_ring **ret)
{
    struct attend_ring *ring = calloc(1, sizeof(*ring));
    int r = 0;

    if (!ring)
        return -ENOMEM;
    ring->attend = a;
    ring->tenant = t;
    ring->n_refs = 1;
    ring->tell_fd = -1;
    ring_view_init(&ring->view, at, n);
    pthread_mutex_init(&ring->done_lock, NULL);
    ring->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r = ring->bell < 0 ? -errno : insert_ring(a, ring);
    if (r < 0) {
        if (ring->bell >= 0)
            close(ring->bell);
        pthread_mutex_destroy(&ring->done_lock);
        free(ring);
        return r;
    }
    *ret = ring;
    return 0;
}

void attend_ring_tell(struct attend_ring *ring, int fd)
{
    pthread_mutex_lock(&ring->done_lock);
    ring->tell_fd = fd;
    pthread_mutex_unlock(&ring->done_lock);
}

/* Drops what waits; what is being worked on is skipped from now on. By lock. */
static void drop_requests(struct attend *a, struct attend_ring *ring)
{
    struct attend_request *next;

    for (struct attend_request *rq = ring->requests; rq; rq = next) {
        next = rq->next;
        if (rq->state == ATTEND_WAITING) {
            attend_queue_remove(a, rq);
            a->stats.n_cancelled++;
            a->stats.n_failed++;
            attend_request_end(a, rq);
        } else {
            attend_request_fail(rq, RING_CANCELLED, 0, 0);
        }
    }
}

struct attend_ring *attend_ring_close(struct attend_ring *ring)
{
    struct attend *a;

    if (!ring)
        return NULL;
    a = ring->attend;
    knock(a);
    for (uint32_t i = 0; i < a->n_rings; i++)
        if (a->rings[i] == ring) {
            a->rings[i] = a->rings[--a->n_rings];
            break;
        }
    epoll_ctl(a->epoll_fd, EPOLL_CTL_DEL, ring->bell, NULL);
    pthread_mutex_unlock(&a->rings_lock);
    pthread_mutex_lock(&ring->done_lock);
    ring->dead = true;
    pthread_mutex_unlock(&ring->done_lock);
    close(ring->bell);
    for (uint32_t i = 0; i < ring->n_memories; i++)
        munmap(ring->memories[i].map, ring->memories[i].bytes);
    pthread_mutex_lock(&a->lock);
    drop_requests(a, ring);
    if (--ring->n_refs == 0) {
        pthread_mutex_destroy(&ring->done_lock);
        free(ring);
    }
    pthread_cond_broadcast(&a->job_ended);
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

int attend_ring_bell(const struct attend_ring *ring)
{
    return ring->bell;
}

int attend_ring_add(struct attend_ring *ring, int fd, uint64_t bytes, uint32_t *ret_memory, const char **ret_reason)
{
    struct attend *a = ring->attend;
    uint64_t most;
    void *map;
    int r = staging_check(fd, bytes, ret_reason);

    if (r < 0)
        return r;
    if (fcntl(fd, F_GET_SEALS) & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) {
        *ret_reason = "the memfd is sealed against writing; allowed: one that results can be written to";
        return -EINVAL;
    }
    pthread_mutex_lock(&a->lock);
    most = a->limits.memory_bytes;
    pthread_mutex_unlock(&a->lock);
    if (bytes > most || ring->memory_bytes > most - bytes || ring->n_memories == ATTEND_MEMORIES_MAX)
        return -ENOSPC;
    map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        r = -errno;
        *ret_reason = "the memfd cannot be mapped for writing";
        return r;
    }
    knock(a);
    *ret_memory = ring->n_memories;
    ring->memories[ring->n_memories++] = (struct attend_memory){.map = map, .bytes = bytes};
    ring->memory_bytes += bytes;
    pthread_mutex_unlock(&a->rings_lock);
    return 0;
}
