#include "daemon/daemon.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include <systemd/sd-daemon.h>

#include "daemon/publish.h"
#include "daemon/session.h"
#include "daemon/tenants.h"

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
    m->staging_bytes = d->staging_bytes;
    m->publishing_blocks = publishing_blocks(d->publishing);
    m->jobs_waiting = jobs_waiting(d->jobs);
    flights_count(d->flights, &m->flights, &m->flight_waiters);
    m->draining = d->draining;
}

/* Told when something happened, at most once a second, and never by a timer: an idle daemon does not wake up. */
void daemon_status(struct daemon *d)
{
    uint64_t now = daemon_now_usec(), blocks = 0;
    const struct metrics *m = &d->metrics;

    if (d->status_usec && now - d->status_usec < STATUS_USEC)
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

void daemon_apply_options(struct daemon *d)
{
    const struct options *o = &d->options;

    d->log.level = (enum log_level)o->log_level;
    d->budget.limit_bytes = o->host_bytes;
    d->budget.hugepages = (enum slab_hugepages)o->hugepages;
    d->budget.numa_interleave = o->numa != 0;
    tenants_apply(d); /* says in the log what it could not do */
    while (d->budget.used_bytes > d->budget.limit_bytes &&
           tenants_make_room(d, NULL, d->budget.used_bytes - d->budget.limit_bytes) > 0)
        ;
    if (d->budget.used_bytes > d->budget.limit_bytes)
        log_write(&d->log, LOG_WARNING, "host_bytes is %llu, but %llu bytes are in use, leased or pinned",
                  (unsigned long long)d->budget.limit_bytes, (unsigned long long)d->budget.used_bytes);
}
