#include "daemon/walk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/daemon.h"
#include "daemon/session.h"
#include "daemon/tenants.h"

/* ---- selectors ---- */

bool selector_take(struct session *s, const struct request *rq, const Kvd__V1__Selector *m, struct selector *ret)
{
    memset(ret, 0, sizeof(*ret));
    if (!m)
        return true;
    if (m->key.len > KEY_BYTES || strlen(m->tenant) >= sizeof(ret->tenant) || strlen(m->model) >= sizeof(ret->model)) {
        reply_error(s, rq->id, ERROR_NOT_FOUND, "a key of at most 32 bytes, a tenant of 63, a model of 255",
                    "the selector can match nothing: key, tenant or model is too long");
        return false;
    }
    strcpy(ret->tenant, m->tenant);
    strcpy(ret->model, m->model);
    ret->space = m->space;
    ret->n_key = m->key.len;
    if (m->key.len)
        memcpy(ret->key, m->key.data, m->key.len);
    ret->idle_usec = m->idle_usec;
    ret->age_usec = m->age_usec;
    for (const struct tenant *t = s->daemon->tenants->first; t; t = t->next)
        if (selector_has_tenant(ret, t))
            return true;
    reply_error(s, rq->id, ERROR_NOT_FOUND, "one that kvctl ls tenants shows", "there is no tenant \"%s\"", ret->tenant);
    return false;
}

bool selector_has_tenant(const struct selector *sel, const struct tenant *t)
{
    return !*sel->tenant || strcmp(sel->tenant, t->name) == 0;
}

bool selector_has(const struct selector *sel, const struct tenant *t, const struct cache_entry_info *info)
{
    if (sel->space && sel->space != info->space)
        return false;
    if (sel->n_key && memcmp(sel->key, info->key, sel->n_key) != 0)
        return false;
    if (info->idle_usec < sel->idle_usec || info->age_usec < sel->age_usec)
        return false;
    return !*sel->model || strcmp(sel->model, cache_space_find(t->cache, info->space)->model) == 0;
}

/* ---- walks ---- */

static void walk_free(struct walk *w)
{
    struct daemon *d = w->daemon;

    if (w->ops->deinit)
        w->ops->deinit(w);
    if (w->session)
        w->session->n_walks--;
    if (w->at) {
        *w->at = w->next;
        if (w->next)
            w->next->at = w->at;
        d->n_walks--;
    }
    tenant_unref(d, w->tenant);
    sd_event_source_disable_unref(w->turn);
    free(w);
}

/* The next tenant that is selected becomes the current one. False: that was the last. */
static bool next_tenant(struct walk *w, int *ret_error)
{
    struct tenant *t = tenants_from(w->daemon->tenants, w->next_tenant);

    while (t && !selector_has_tenant(&w->selector, t))
        t = tenants_from(w->daemon->tenants, t->id + 1);
    tenant_unref(w->daemon, w->tenant);
    w->tenant = t ? tenant_ref(t) : NULL;
    if (!t)
        return false;
    w->next_tenant = t->id + 1;
    w->entry = 0;
    w->pass = 0;
    if (w->ops->begin)
        *ret_error = w->ops->begin(w);
    return true;
}

/* Some entries of the current tenant. True: its last pass is through. */
static bool walk_slice(struct walk *w)
{
    struct cache *cache = w->tenant->cache;
    uint32_t n = cache_n_entries(cache);
    uint64_t until = daemon_now_usec() + WALK_TURN_USEC;
    struct cache_entry_info info;

    for (uint32_t k = 0; k < WALK_SLICE && w->entry < n; k++) {
        if (w->n_jobs_max && w->n_jobs >= w->n_jobs_max)
            break;
        if (k % 64 == 63 && daemon_now_usec() > until)
            break;
        if (w->ops->satisfied && w->ops->satisfied(w, w->pass)) {
            w->entry = n;
            break;
        }
        if (cache_entry_brief(cache, w->entry++, &info))
            w->ops->visit(w, w->pass, &info, selector_has(&w->selector, w->tenant, &info));
    }
    if (w->ops->slice_end)
        w->ops->slice_end(w, w->pass);
    if (w->entry < n)
        return false;
    w->entry = 0;
    w->pass++;
    return w->pass >= w->ops->n_passes;
}

static int on_turn(sd_event_source *source, void *ctx)
{
    struct walk *w = ctx;
    int r = 0;

    (void)source;
    if (w->n_jobs && (!w->session || w->n_jobs >= w->n_jobs_max || w->pass >= w->ops->n_passes)) {
        sd_event_source_set_enabled(w->turn, SD_EVENT_OFF); /* walk_job_done() turns it on again */
        return 0;
    }
    if (!w->session) {
        walk_free(w);
        return 0;
    }
    if (w->tenant && w->pass < w->ops->n_passes && (!walk_slice(w) || w->n_jobs))
        return 0;
    if (next_tenant(w, &r) && r == 0)
        return 0;
    if (r < 0)
        reply_error(w->session, w->request_id, ERROR_FULL, "", "the daemon has no memory for this request: %s", strerror(-r));
    else
        w->ops->finish(w);
    walk_free(w);
    return 0;
}

void walk_job_done(struct walk *w)
{
    w->n_jobs--;
    sd_event_source_set_enabled(w->turn, SD_EVENT_ON);
}

void walk_start(struct session *s, const struct request *rq, struct walk *w, const struct walk_ops *ops)
{
    struct daemon *d = s->daemon;

    w->daemon = d;
    w->ops = ops;
    w->type = rq->type;
    w->request_id = rq->id;
    w->next_tenant = 1;
    if (d->n_walks >= d->options.admin_tasks) {
        reply_error(s, rq->id, ERROR_LIMIT, "later; option admin_tasks", "%u admin requests walk the index already", d->n_walks);
        walk_free(w);
        return;
    }
    if (sd_event_add_defer(d->event, &w->turn, on_turn, w) < 0 || sd_event_source_set_enabled(w->turn, SD_EVENT_ON) < 0) {
        reply_error(s, rq->id, ERROR_FULL, "", "the daemon has no memory for this request");
        walk_free(w);
        return;
    }
    w->session = s;
    s->n_walks++;
    w->next = d->walks;
    w->at = &d->walks;
    if (w->next)
        w->next->at = &w->next;
    d->walks = w;
    d->n_walks++;
}

void walks_session_gone(struct session *s)
{
    for (struct walk *w = s->n_walks ? s->daemon->walks : NULL; w; w = w->next)
        if (w->session == s) {
            w->session = NULL;
            sd_event_source_set_enabled(w->turn, SD_EVENT_ON); /* where it frees itself */
        }
    s->n_walks = 0;
}

void walks_destroy(struct daemon *d)
{
    while (d->walks)
        walk_free(d->walks);
}
