#include "daemon/daemon.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "daemon/attend.h"
#include "daemon/flight_requests.h"
#include "daemon/listener.h"
#include "daemon/publish.h"
#include "daemon/rpc.h"
#include "daemon/session.h"
#include "daemon/tenants.h"
#include "daemon/walk.h"

enum { STATUS_USEC = 1000000 };

uint64_t daemon_now_usec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

void daemon_wake_at(struct daemon *d, uint64_t usec)
{
    if (usec >= d->timer_usec)
        return;
    d->timer_usec = usec;
    sd_event_source_set_time(d->timer, usec);
    sd_event_source_set_enabled(d->timer, SD_EVENT_ONESHOT);
}

void daemon_expire(struct daemon *d)
{
    uint64_t now = daemon_now_usec();
    uint64_t flights = flights_expire(d->flights, now), sessions = sessions_expire(d, now), pause = listener_expire(d->listener, now);

    d->timer_usec = UINT64_MAX;
    sd_event_source_set_enabled(d->timer, SD_EVENT_OFF);
    daemon_wake_at(d, flights);
    daemon_wake_at(d, sessions);
    daemon_wake_at(d, pause);
}

void daemon_measure(struct daemon *d)
{
    struct metrics *m = &d->metrics;

    for (struct session *s = d->sessions; s; s = s->next)
        if (s->state == SESSION_READY && s->page.map)
            session_count(s);
    m->sessions = d->n_attached;
    m->tenants = d->tenants->n;
    m->host_limit_bytes = d->budget.limit_bytes;
    m->host_used_bytes = d->budget.used_bytes;
    m->huge_slabs = d->budget.n_huge_slabs;
    m->huge_refused = d->budget.n_huge_refused;
    m->memory_refused = d->budget.n_refused;
    m->staging_bytes = d->staging_bytes;
    m->publishing_blocks = publishing_blocks(d->publishing);
    m->jobs_waiting = jobs_waiting(d->jobs);
    flights_count(d->flights, &m->flights, &m->flight_waiters);
    rpc_measure(d->rpc);
    m->draining = d->draining;
    attend_measure(d->attend, m);
}

/* Told when something happened, at most once a second, and never by a timer: an idle daemon does not wake up. */
void daemon_status(struct daemon *d)
{
    uint64_t now = daemon_now_usec(), blocks = 0;
    const struct metrics *m = &d->metrics;

    if (!d->notifies || (d->status_usec && now - d->status_usec < STATUS_USEC))
        return;
    d->status_usec = now;
    daemon_measure(d);
    for (struct tenant *t = d->tenants->first; t; t = t->next) {
        struct cache_stats s;

        cache_stats(t->cache, &s);
        blocks += s.n_valid;
    }
    sd_notifyf(0, "STATUS=%s%u workers, %llu blocks, %.1f of %.1f MiB, hit rate %.1f %%", d->draining ? "Draining: " : "",
               d->n_attached, (unsigned long long)blocks, (double)d->budget.used_bytes / (1 << 20),
               (double)d->budget.limit_bytes / (1 << 20), m->lookups ? 100.0 * (double)m->hits / (double)m->lookups : 0.0);
}

static void warn_of_host_bytes(struct daemon *d)
{
    uint64_t bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);

    if (d->budget.limit_bytes > bytes)
        log_write(&d->log, LOG_WARNING, "host_bytes is %llu, this machine has %llu bytes: it will run out of memory before blocks are evicted",
                  (unsigned long long)d->budget.limit_bytes, (unsigned long long)bytes);
}

static void fill_attend_limits(const struct options *o, struct attend_limits *ret)
{
    *ret = (struct attend_limits){.request_bytes = o->attend_request_bytes,
                                  .worker_bytes = o->attend_worker_bytes,
                                  .queue_bytes = o->attend_queue_bytes,
                                  .memory_bytes = o->attend_bytes,
                                  .spin_usec = o->attend_spin,
                                  .slice_usec = o->attend_slice,
                                  .n_blocks = (uint32_t)o->attend_blocks};
}

void daemon_apply_options(struct daemon *d)
{
    const struct options *o = &d->options;
    struct attend_limits limits;

    d->log.level = (enum log_level)o->log_level;
    d->budget.limit_bytes = o->host_bytes;
    warn_of_host_bytes(d);
    d->budget.hugepages = (enum slab_hugepages)o->hugepages;
    d->budget.numa_interleave = o->numa != 0;
    fill_attend_limits(o, &limits);
    attend_set_limits(d->attend, &limits);
    rpc_apply(d->rpc);
    tenants_apply(d); /* says in the log what it could not do */
    while (d->budget.used_bytes > d->budget.limit_bytes &&
           tenants_make_room(d, NULL, d->budget.used_bytes - d->budget.limit_bytes) > 0)
        ;
    if (d->budget.used_bytes > d->budget.limit_bytes)
        log_write(&d->log, LOG_WARNING, "host_bytes is %llu, but %llu bytes are in use, leased or pinned",
                  (unsigned long long)d->budget.limit_bytes, (unsigned long long)d->budget.used_bytes);
}

/* ---- life ---- */

/* Two where there are only two processors: a worker copies into staging three times as fast as one helper encodes, and then waits. */
static unsigned job_threads(const struct options *o)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN), n = o->job_threads ? (long)o->job_threads : cpus == 2 ? 2 : cpus - 1;

    return n < 1 ? 1 : n > 256 ? 256 : (unsigned)n;
}

static int make_attend(struct daemon *d)
{
    const struct options *o = &d->options;
    struct attend_config c = {.ops = attn_ops_choose(&d->cpu), .codec = d->codec, .n_words = 4 * (uint32_t)o->attend_blocks};
    cpu_set_t cpus;

    c.n_cpus = sched_getaffinity(0, sizeof(cpus), &cpus) == 0 ? (unsigned)CPU_COUNT(&cpus) : (unsigned)sysconf(_SC_NPROCESSORS_ONLN);
    c.n_threads = o->attend_threads ? (unsigned)o->attend_threads : c.n_cpus < 256 ? c.n_cpus : 256;
    fill_attend_limits(o, &c.limits);
    return attend_create(&c, &d->attend);
}

static int on_timer(sd_event_source *source, uint64_t usec, void *ctx)
{
    (void)source;
    (void)usec;
    daemon_expire(ctx);
    return 0;
}

static int add_sources(struct daemon *d)
{
    int r = sd_event_default(&d->event);

    if (r >= 0)
        r = sd_event_add_time(d->event, &d->timer, CLOCK_MONOTONIC, 0, 1000, on_timer, d);
    if (r >= 0)
        r = sd_event_source_set_enabled(d->timer, SD_EVENT_OFF);
    if (r >= 0)
        r = sd_event_add_defer(d->event, &d->reaper, sessions_reap, d);
    if (r >= 0) /* the dead first: their leases are in the way of the living */
        r = sd_event_source_set_priority(d->reaper, SD_EVENT_PRIORITY_IMPORTANT);
    return r < 0 ? r : sd_event_source_set_enabled(d->reaper, SD_EVENT_OFF);
}

/* ret_what: what could not be had; NULL if that has been told. */
static int make_parts(struct daemon *d, const char **ret_what)
{
    const struct options *o = &d->options;
    int r;

    *ret_what = "event loop";
    r = add_sources(d);
    if (r < 0)
        return r;
    *ret_what = "messages and keys";
    r = wire_init(&d->wire);
    if (r == 0)
        r = key_hasher_create(&d->hasher);
    if (r == 0)
        r = publishing_create(&d->publishing);
    if (r == 0)
        r = flights_create((uint32_t)o->flights, (uint32_t)o->flights_per_worker, (uint32_t)o->flight_waiters,
                           flight_request_told, d, &d->flights);
    if (r < 0)
        return r;
    *ret_what = "helper threads";
    r = jobs_create(d->event, job_threads(o), &d->jobs);
    if (r < 0)
        return r;
    *ret_what = "attention";
    r = make_attend(d);
    if (r < 0)
        return r;
    *ret_what = NULL;
    return tenants_apply(d);
}

int daemon_create(struct options *options, struct daemon **ret)
{
    struct daemon *d = calloc(1, sizeof(*d));
    const char *what;
    int r;

    if (!d) {
        dprintf(STDERR_FILENO, "kvd: cannot start: no memory\n"); /* the log is a part of it */
        options_deinit(options);
        return -ENOMEM;
    }
    d->options = *options;
    d->timer_usec = UINT64_MAX;
    d->notifies = getenv("NOTIFY_SOCKET") != NULL;
    log_init(&d->log, STDERR_FILENO, (enum log_level)options->log_level, daemon_now_usec);
    cpu_detect(&d->cpu);
    d->codec = codec_ops_choose(&d->cpu);
    d->crc32c = crc32c_choose(&d->cpu);
    d->budget = (struct budget){.limit_bytes = options->host_bytes,
                                .hugepages = (enum slab_hugepages)options->hugepages,
                                .numa_interleave = options->numa != 0};
    warn_of_host_bytes(d);
    r = make_parts(d, &what);
    if (r < 0) {
        if (what)
            log_write(&d->log, LOG_ERROR, "cannot start: %s: %s", what, strerror(-r));
        daemon_destroy(d);
        return r;
    }
    *ret = d;
    return 0;
}

struct daemon *daemon_destroy(struct daemon *d)
{
    if (!d)
        return NULL;
    d->listener = listener_destroy(d->listener);
    rpc_no_jobs(d->rpc);
    d->jobs = jobs_destroy(d->jobs); /* concludes what is being published: sessions can still be answered */
    sessions_destroy(d);
    d->rpc = rpc_destroy(d->rpc);
    walks_destroy(d);
    tenants_destroy(d);
    d->attend = attend_destroy(d->attend);
    d->publishing = publishing_destroy(d->publishing);
    d->flights = flights_destroy(d->flights);
    wire_deinit(&d->wire);
    d->hasher = key_hasher_destroy(d->hasher);
    sd_event_source_disable_unref(d->reaper);
    sd_event_source_disable_unref(d->timer);
    sd_event_unref(d->event);
    options_deinit(&d->options);
    log_deinit(&d->log);
    free(d);
    return NULL;
}
