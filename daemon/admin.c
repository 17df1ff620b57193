/* Admin requests about the daemon itself: STATS, CONFIG, DRAIN. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/daemon.h"
#include "daemon/request.h"
#include "daemon/rpc.h"
#include "daemon/session.h"
#include "daemon/tenants.h"
#include "proto/kvd.pb-c.h"

/* ---- STATS ---- */

struct stats {
    Kvd__V1__Metric *metrics, **list;
    char (*labels)[64];
    size_t n, cap;
    bool help; /* the names come for the first time */
};

static int stats_grow(struct stats *st)
{
    size_t cap = st->cap ? st->cap * 2 : 256;
    Kvd__V1__Metric *metrics = realloc(st->metrics, cap * sizeof(*metrics));
    char (*labels)[64] = metrics ? realloc(st->labels, cap * sizeof(*labels)) : NULL;

    if (metrics)
        st->metrics = metrics;
    if (labels)
        st->labels = labels;
    if (!metrics || !labels)
        return -ENOMEM;
    st->cap = cap;
    return 0;
}

static int stats_add(void *ctx, const struct metric *from)
{
    struct stats *st = ctx;
    Kvd__V1__Metric *m;

    if (st->n == st->cap && stats_grow(st) < 0)
        return -ENOMEM;
    m = &st->metrics[st->n];
    kvd__v1__metric__init(m);
    m->name = (char *)from->name;
    if (st->help) {
        m->help = (char *)from->help;
        m->unit = (char *)from->unit;
    }
    m->counter = from->counter;
    m->value = from->value;
    strncpy(st->labels[st->n], from->label, sizeof(st->labels[0]) - 1);
    st->labels[st->n][sizeof(st->labels[0]) - 1] = 0;
    st->n++;
    return 0;
}

static void stats_send(struct session *s, const struct request *rq, struct stats *st)
{
    Kvd__V1__StatsReply out = KVD__V1__STATS_REPLY__INIT;

    st->list = malloc(st->n * sizeof(*st->list));
    if (!st->list) {
        reply_error(s, rq->id, ERROR_FULL, "", "the daemon has no memory for this request");
        return;
    }
    for (size_t i = 0; i < st->n; i++) {
        st->metrics[i].label = st->labels[i]; /* where the labels are only now do they stay */
        st->list[i] = &st->metrics[i];
    }
    out.n_metric = st->n;
    out.metric = st->list;
    /* With very many tenants the last ones' values are left out rather than all. */
    while (out.n_metric > 64 && kvd__v1__stats_reply__get_packed_size(&out) > FRAME_BODY_MAX)
        out.n_metric -= out.n_metric / 16;
    reply(s, rq->type, rq->id, &out.base, NULL, 0);
}

void request_stats(struct session *s, const struct request *rq)
{
    struct daemon *d = s->daemon;
    struct stats st = {.help = true};
    struct cache_stats cache;
    int r;

    daemon_measure(d);
    r = metrics_each(&d->metrics, stats_add, &st);
    for (struct tenant *t = tenants_from(d->tenants, 1); t && r == 0; t = tenants_from(d->tenants, t->id + 1)) {
        cache_drain_hits(t->cache);
        cache_stats(t->cache, &cache);
        r = metrics_each_tenant(t->name, &cache, stats_add, &st);
        st.help = false;
    }
    if (r == 0)
        stats_send(s, rq, &st);
    else
        reply_error(s, rq->id, ERROR_FULL, "", "the daemon has no memory for this request");
    free(st.metrics);
    free(st.labels);
    free(st.list);
}

/* ---- CONFIG ---- */

struct option_text {
    char value[OPTION_TEXT_MAX], minimum[32], maximum[32];
};

static void option_message(const struct options *options, const struct option *o, struct option_text *text, Kvd__V1__Option *m)
{
    char buf[OPTION_TEXT_MAX];

    kvd__v1__option__init(m);
    m->name = (char *)o->name;
    m->value = option_format(options, o, text->value);
    m->unit = (char *)o->unit;
    if (o->kind != OPTION_STRING && o->kind != OPTION_IDS && o->kind != OPTION_ENUM) {
        strncpy(text->minimum, option_format_value(o, o->minimum, buf), sizeof(text->minimum) - 1);
        m->minimum = text->minimum;
        strncpy(text->maximum, option_format_value(o, o->maximum, buf), sizeof(text->maximum) - 1);
        m->maximum = text->maximum;
    }
    m->default_value = (char *)o->default_text;
    m->help = (char *)o->help;
    m->live = o->live;
}

/* The named option, or all. */
static void config_send(struct session *s, const struct request *rq, const struct option *only)
{
    Kvd__V1__ConfigReply out = KVD__V1__CONFIG_REPLY__INIT;
    struct option_text *texts = calloc(64, sizeof(*texts));
    Kvd__V1__Option messages[64], *list[64];
    const struct option *o;

    if (!texts) {
        reply_error(s, rq->id, ERROR_FULL, "", "the daemon has no memory for this request");
        return;
    }
    for (size_t i = 0; (o = option_at(i)) && out.n_option < 64; i++) {
        if (only && o != only)
            continue;
        option_message(&s->daemon->options, o, &texts[out.n_option], &messages[out.n_option]);
        list[out.n_option] = &messages[out.n_option];
        out.n_option++;
    }
    out.option = list;
    reply(s, rq->type, rq->id, &out.base, NULL, 0);
    free(texts);
}

/* Sets a live option of the running daemon; the file stays as it is. False: answered with an error. */
static bool config_set(struct session *s, const struct request *rq, const struct option *o, const char *value)
{
    struct daemon *d = s->daemon;
    struct option_error error;
    char before[OPTION_TEXT_MAX];

    if (!o->live) {
        reply_error(s, rq->id, ERROR_OPTION, "a change in the file and a restart", "%s cannot change while the daemon runs", o->name);
        return false;
    }
    option_format(&d->options, o, before);
    if (option_set(&d->options, o, value, &id_resolver_system, &error) < 0 || options_check(&d->options, &error) < 0) {
        struct option_error unused;

        option_set(&d->options, o, before, &id_resolver_system, &unused);
        reply_error(s, rq->id, ERROR_OPTION, "", "%.380s", error.text);
        return false;
    }
    log_write(&d->log, LOG_INFO, "%s is %.200s now, set by uid %u", o->name, value, s->uid);
    daemon_apply_options(d);
    return true;
}

void request_config(struct session *s, const struct request *rq)
{
    const Kvd__V1__Config *m = rq->message;
    const struct option *o = *m->name ? option_find(m->name) : NULL;

    if (!o && (*m->name || m->set)) {
        reply_error(s, rq->id, ERROR_OPTION, "one that kvctl config lists", "there is no option \"%.60s\"", m->name);
        return;
    }
    if (m->set && !config_set(s, rq, o, m->value))
        return;
    config_send(s, rq, o);
}

/* ---- DRAIN ---- */

void request_drain(struct session *s, const struct request *rq)
{
    const Kvd__V1__Drain *m = rq->message;
    struct daemon *d = s->daemon;

    d->draining = !m->undo;
    log_write(&d->log, LOG_INFO, "uid %u: %s", s->uid, m->undo ? "takes new workers and blocks again" : "takes no new workers and blocks");
    d->status_usec = 0;
    daemon_status(d);
    rpc_apply(d->rpc);
    reply(s, rq->type, rq->id, NULL, NULL, 0);
}
