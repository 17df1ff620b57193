/* A daemon without a listener, for fuzz targets that speak to its own handlers. Loop and helper thread outlive a run (a thread and an
 * epoll set take longer to make than all that a run does); tenants, their caches, and options live for as many runs as the target says,
 * since making their memory takes ten times as long as what a run does with it. Included by one file a program. */
#ifndef KVD_TESTS_FUZZ_DAEMON_H
#define KVD_TESTS_FUZZ_DAEMON_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>

#include "daemon/attend.h"
#include "daemon/daemon.h"
#include "daemon/flight_requests.h"
#include "daemon/publish.h"
#include "daemon/session.h"
#include "daemon/tenants.h"

static void must(int r)
{
    if (r < 0)
        abort();
}

static int fuzz_on_timer(sd_event_source *source, uint64_t usec, void *ctx)
{
    struct daemon *d = ctx;

    (void)source;
    (void)usec;
    d->timer_usec = UINT64_MAX;
    flights_expire(d->flights, daemon_now_usec());
    sessions_expire(d, daemon_now_usec());
    return 0;
}

/* Without options and tenants. limits: of attention; NULL: nobody gets any, and its threads never start. */
static struct daemon *fuzz_daemon_create(const struct attend_limits *limits)
{
    struct attend_config attend = {.n_threads = 1, .n_cpus = 1, .n_words = 64};
    struct daemon *d = calloc(1, sizeof(*d));

    if (!d)
        abort();
    d->timer_usec = UINT64_MAX;
    log_init(&d->log, open("/dev/null", O_WRONLY | O_CLOEXEC), LOG_ERROR, daemon_now_usec);
    cpu_detect(&d->cpu);
    d->codec = codec_ops_choose(&d->cpu);
    d->crc32c = crc32c_choose(&d->cpu);
    must(sd_event_default(&d->event));
    must(sd_event_add_time(d->event, &d->timer, CLOCK_MONOTONIC, 0, 1000, fuzz_on_timer, d));
    must(sd_event_source_set_enabled(d->timer, SD_EVENT_OFF));
    must(sd_event_add_defer(d->event, &d->reaper, sessions_reap, d));
    must(sd_event_source_set_enabled(d->reaper, SD_EVENT_OFF));
    must(wire_init(&d->wire));
    must(key_hasher_create(&d->hasher));
    must(publishing_create(&d->publishing));
    must(flights_create(64, 32, 16, flight_request_told, d, &d->flights));
    must(jobs_create(d->event, 1, &d->jobs));
    attend.ops = attn_ops_choose(&d->cpu);
    attend.codec = d->codec;
    if (limits)
        attend.limits = *limits;
    must(attend_create(&attend, &d->attend));
    return d;
}

/* Options (n pairs of name and value, else defaults) and tenants; until fuzz_daemon_end_life(). */
static void fuzz_daemon_begin_life(struct daemon *d, const char *const settings[][2], size_t n)
{
    struct option_error error;

    must(options_init(&d->options));
    for (size_t i = 0; i < n; i++)
        must(option_set(&d->options, option_find(settings[i][0]), settings[i][1], &id_resolver_system, &error));
    d->budget = (struct budget){.limit_bytes = d->options.host_bytes, .hugepages = SLAB_HUGE_OFF};
    must(tenants_apply(d));
}

static void fuzz_daemon_end_life(struct daemon *d)
{
    tenants_destroy(d);
    if (d->budget.used_bytes)
        abort();
    options_deinit(&d->options);
}

/* A slab is being made ahead of need: its job may have left the queue and not be back. */
static bool fuzz_spare_coming(const struct daemon *d)
{
    for (const struct tenant *t = d->tenants->first; t; t = t->next)
        if (t->spare_coming)
            return true;
    return false;
}

/* Runs the loop until nothing is under way. */
static void fuzz_daemon_settle(struct daemon *d)
{
    for (int i = 0; i < 10000; i++) {
        bool busy = publishing_blocks(d->publishing) || d->n_walks || jobs_waiting(d->jobs) || fuzz_spare_coming(d);

        if (sd_event_run(d->event, busy ? 1000 : 0) == 0 && !busy)
            return;
    }
    abort(); /* something goes on for ever */
}

#endif
