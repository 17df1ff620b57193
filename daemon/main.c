/* kvd: makes the daemon's parts in order, runs the loop, takes them down in reverse. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "daemon/daemon.h"
#include "daemon/fault.h"
#include "daemon/listener.h"
#include "daemon/options_print.h"
#include "daemon/tenants.h"

#ifndef KVD_DEFAULT_CONFIG
#define KVD_DEFAULT_CONFIG "/etc/kvd/kvd.conf"
#endif

/* What a reload needs besides the daemon. */
struct program {
    struct daemon *daemon;
    int argc;
    char **argv;
};

/* ---- the process ---- */

/* A worker may run under the daemon's own uid. Not dumpable, the process cannot be traced by it and its memory and descriptors cannot be
 * reached through /proc (rule I4). Sanitizers look at the process from outside when it ends, so it is taken back then. */
static void protect_process(bool on)
{
    prctl(PR_SET_DUMPABLE, on ? 0 : 1, 0, 0, 0);
}

static void raise_descriptor_limit(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static void block_signals(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
}

/* ---- events ---- */

static int on_stop(sd_event_source *source, const struct signalfd_siginfo *info, void *ctx)
{
    struct program *p = ctx;

    log_write(&p->daemon->log, LOG_INFO, "%s: stopping", info->ssi_signo == SIGINT ? "interrupted" : "told to end");
    sd_notify(0, "STOPPING=1\nSTATUS=Stopping");
    return sd_event_exit(sd_event_source_get_event(source), 0);
}

static void warn_of_restart_options(struct daemon *d, const struct options *fresh)
{
    char before[OPTION_TEXT_MAX], after[OPTION_TEXT_MAX];
    const struct option *o;

    for (size_t i = 0; (o = option_at(i)); i++)
        if (!o->live && strcmp(option_format(&d->options, o, before), option_format(fresh, o, after)) != 0)
            log_write(&d->log, LOG_WARNING, "%s stays %.200s; %.200s takes effect after a restart", o->name, before, after);
}

/* Brings what may change into force and keeps the rest as it is. */
static void take_options(struct daemon *d, struct options *fresh)
{
    char text[OPTION_TEXT_MAX];
    struct option_error error;
    const struct option *o;

    warn_of_restart_options(d, fresh);
    for (size_t i = 0; (o = option_at(i)); i++)
        if (!o->live && option_set(fresh, o, option_format(&d->options, o, text), &id_resolver_system, &error) < 0)
            log_write(&d->log, LOG_WARNING, "%.400s", error.text);
    options_deinit(&d->options);
    d->options = *fresh;
    daemon_apply_options(d);
}

static int on_reload(sd_event_source *source, const struct signalfd_siginfo *info, void *ctx)
{
    struct program *p = ctx;
    struct daemon *d = p->daemon;
    struct options fresh;
    struct option_flags flags;
    struct option_error error;

    (void)source;
    (void)info;
    sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%llu", (unsigned long long)daemon_now_usec());
    if (options_load(&fresh, p->argc, p->argv, KVD_DEFAULT_CONFIG, &id_resolver_system, &flags, &error) < 0) {
        d->metrics.reloads_failed++;
        log_write(&d->log, LOG_ERROR, "%.1500s; nothing has changed", error.text);
    } else {
        d->metrics.reloads++;
        take_options(d, &fresh);
        log_write(&d->log, LOG_INFO, "configuration read again");
    }
    sd_notify(0, "READY=1");
    d->status_usec = 0;
    daemon_status(d);
    return 0;
}

static int add_signals(struct program *p)
{
    sd_event *e = p->daemon->event;
    int r = sd_event_add_signal(e, NULL, SIGTERM, on_stop, p);

    if (r >= 0)
        r = sd_event_add_signal(e, NULL, SIGINT, on_stop, p);
    if (r >= 0)
        r = sd_event_add_signal(e, NULL, SIGHUP, on_reload, p);
    if (r >= 0)
        r = sd_event_set_watchdog(e, true);
    if (r < 0)
        log_write(&p->daemon->log, LOG_ERROR, "cannot start: signals: %s", strerror(-r));
    return r;
}

/* ---- life ---- */

static int run(struct program *p)
{
    struct daemon *d = p->daemon;
    int r = add_signals(p);

    if (r >= 0)
        r = listener_create(d, &d->listener);
    if (r >= 0) {
        log_write(&d->log, LOG_INFO, "ready: %s, %u tenants, %.1f MiB for blocks, %u helper threads, %s codecs",
                  listener_path(d->listener), d->tenants->n,
                  (double)d->budget.limit_bytes / (1 << 20), jobs_threads(d->jobs), d->codec->name);
        sd_notify(0, "READY=1");
        daemon_status(d);
        r = sd_event_loop(d->event);
        if (r < 0)
            log_write(&d->log, LOG_ERROR, "the event loop failed: %s", strerror(-r));
    }
    daemon_destroy(d);
    return r < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
    struct program program = {.argc = argc, .argv = argv};
    struct option_flags flags;
    struct option_error error;
    struct options options;
    int r;

    fault_setup();
    if (options_load(&options, argc, argv, KVD_DEFAULT_CONFIG, &id_resolver_system, &flags, &error) < 0) {
        fprintf(stderr, "kvd: %s\n", error.text);
        return 2;
    }
    if (flags.help || flags.version || flags.check) {
        if (flags.help)
            options_print_help(stdout, KVD_DEFAULT_CONFIG);
        else
            puts(flags.version ? PACKAGE_NAME " " PACKAGE_VERSION : "kvd: the configuration is right");
        options_deinit(&options);
        return 0;
    }
    protect_process(true);
    raise_descriptor_limit();
    block_signals();
    r = daemon_create(&options, &program.daemon) < 0 ? EXIT_FAILURE : run(&program);
    protect_process(false);
    return r;
}
