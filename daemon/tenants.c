#include "daemon/tenants.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/attend.h"
#include "daemon/daemon.h"

enum { SLAB_UNIT = 2 << 20, SLABS_IN_BUDGET_MIN = 8 };

int reopen_read_only(int fd)
{
    char path[40];
    int copy;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    copy = open(path, O_RDONLY | O_CLOEXEC);
    if (copy >= 0 || errno == EMFILE || errno == ENFILE || errno == ENOMEM)
        return copy < 0 ? -errno : copy;
    /* No /proc: the memory's seals refuse a writable mapping just the same. */
    copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    return copy < 0 ? -errno : copy;
}

/* So many slabs should fit that several sizes of payload can have one. */
static uint64_t slab_bytes(const struct options *o)
{
    uint64_t most = o->host_bytes / SLABS_IN_BUDGET_MIN / SLAB_UNIT * SLAB_UNIT;

    if (most < SLAB_UNIT)
        most = SLAB_UNIT;
    return o->slab_bytes < most ? o->slab_bytes : most;
}

static uint64_t quota_of(const struct options *o, const struct tenant_options *t)
{
    if (t && t->quota)
        return t->quota;
    return o->tenant_quota ? o->tenant_quota : o->host_bytes;
}

static uint64_t cache_clock(void *ctx)
{
    (void)ctx;
    return daemon_now_usec();
}

static uint64_t index_entries_of(const struct options *o, const struct tenant_options *t)
{
    return t && t->index_entries ? t->index_entries : o->index_entries;
}

static uint64_t space_quota_of(const struct options *o, const struct tenant_options *t)
{
    return t && t->space_quota ? t->space_quota : o->space_quota;
}

static const char *domain_of(const char *name, const struct tenant_options *t)
{
    return t && *t->domain ? t->domain : name;
}

/* What a reload cannot change for a tenant whose cache is there. */
static void warn_of_restart(struct daemon *d, const struct tenant *t, const struct tenant_options *from)
{
    const char *what = strcmp(t->domain, domain_of(t->name, from)) != 0             ? "domain"
                       : t->index_entries != index_entries_of(&d->options, from) ? "index_entries"
                       : t->space_quota != space_quota_of(&d->options, from)     ? "space_quota"
                                                                                 : NULL;

    if (what)
        log_write(&d->log, LOG_WARNING, "tenant %s: its %s stays as it was; a change takes effect after a restart", t->name, what);
}

static int make_cache(struct daemon *d, struct tenant *t, const struct tenant_options *from, struct cache **ret)
{
    const struct options *o = &d->options;
    char word[OPTION_TEXT_MAX];
    struct cache_config c = {
        .tenant = t->name,
        .domain = t->domain,
        .n_entries = (uint32_t)index_entries_of(o, from),
        .quota_bytes = quota_of(o, from),
        .space_quota_bytes = space_quota_of(o, from),
        .n_spaces_max = (uint32_t)o->spaces_max,
        .slab_bytes = slab_bytes(o),
        .policy = policy_find(option_format(o, option_find("policy"), word)),
        .budget = &d->budget,
        .now_usec = cache_clock,
    };

    assert(c.policy);
    t->index_entries = c.n_entries;
    t->space_quota = c.space_quota_bytes;
    return cache_create(&c, ret);
}

static struct tenant *tenant_free(struct tenant *t)
{
    if (t) {
        attend_tenant_destroy(t->attend);
        cache_destroy(t->cache);
        if (t->index_fd >= 0)
            close(t->index_fd);
        free(t->uids);
        free(t->gids);
        free(t->name);
        free(t->domain);
        free(t);
    }
    return NULL;
}

static int copy_ids(const struct id_list *list, uint32_t **ids, size_t *n)
{
    uint32_t *copy = NULL;

    if (list->n) {
        copy = malloc(list->n * sizeof(*copy));
        if (!copy)
            return -ENOMEM;
        memcpy(copy, list->ids, list->n * sizeof(*copy));
    }
    free(*ids);
    *ids = copy;
    *n = list->n;
    return 0;
}

/* from NULL: the default tenant, which claims nobody by rule. */
static int set_rules(struct daemon *d, struct tenant *t, const struct tenant_options *from)
{
    static const struct id_list none = {0};
    int r = copy_ids(from ? &from->uid : &none, &t->uids, &t->n_uids);

    if (r == 0)
        r = copy_ids(from ? &from->gid : &none, &t->gids, &t->n_gids);
    if (r < 0)
        return r;
    t->weight = from ? from->weight : 100;
    t->gone = false;
    if (t->cache)
        cache_set_quota(t->cache, quota_of(&d->options, from));
    return 0;
}

static int tenant_create(struct daemon *d, const char *name, const struct tenant_options *from, struct tenant **ret)
{
    struct tenant *t = calloc(1, sizeof(*t));
    int r = -ENOMEM;

    if (!t)
        return -ENOMEM;
    t->index_fd = -1;
    t->name = strdup(name);
    t->domain = strdup(domain_of(name, from));
    if (t->name && t->domain)
        r = set_rules(d, t, from);
    if (r == 0)
        r = make_cache(d, t, from, &t->cache);
    if (r < 0) {
        tenant_free(t);
        return r;
    }
    t->id = ++d->tenants->last_id;
    *ret = t;
    return 0;
}

/* Takes the tenant of this name out of *list. */
static struct tenant *take(struct tenant **list, const char *name)
{
    for (struct tenant **at = list; *at; at = &(*at)->next)
        if (strcmp((*at)->name, name) == 0) {
            struct tenant *t = *at;

            *at = t->next;
            return t;
        }
    return NULL;
}

/* Moves or makes one tenant to the end of the new list. */
static int apply_one(struct daemon *d, struct tenant **old, struct tenant ***end, const char *name,
                     const struct tenant_options *from)
{
    struct tenant *t = take(old, name);
    int r = 0;

    if (!t) {
        r = tenant_create(d, name, from, &t);
    } else {
        warn_of_restart(d, t, from);
        r = set_rules(d, t, from);
    }
    if (r < 0)
        log_write(&d->log, LOG_ERROR, "tenant %s: %s", name, strerror(-r));
    if (!t)
        return r;
    t->next = NULL;
    **end = t;
    *end = &t->next;
    d->tenants->n++;
    return r;
}

/* Who holds more than a quota that has become smaller gives back what is neither leased nor pinned. */
static void keep_quotas(struct daemon *d)
{
    for (struct tenant *t = d->tenants->first; t; t = t->next) {
        struct cache_stats s;

        cache_stats(t->cache, &s);
        if (s.slab_bytes > s.quota_bytes)
            d->metrics.shrunk_bytes += cache_shrink(t->cache, s.quota_bytes);
    }
}

int tenants_apply(struct daemon *d)
{
    const struct options *o = &d->options;
    struct tenant *old, *fresh = NULL, **end = &fresh, **at;
    bool default_listed = strcmp(o->default_tenant, "none") == 0;
    int r = 0;

    if (!d->tenants) {
        d->tenants = calloc(1, sizeof(*d->tenants));
        if (!d->tenants) {
            log_write(&d->log, LOG_ERROR, "tenants: no memory");
            return -ENOMEM;
        }
    }
    old = d->tenants->first;
    d->tenants->n = 0;
    for (size_t i = 0; i < o->n_tenants; i++) {
        int one = apply_one(d, &old, &end, o->tenants[i].name, &o->tenants[i]);

        r = one < 0 ? one : r;
        default_listed |= strcmp(o->tenants[i].name, o->default_tenant) == 0;
    }
    if (!default_listed) {
        int one = apply_one(d, &old, &end, o->default_tenant, NULL);

        r = one < 0 ? one : r;
    }
    *end = old; /* what is left is not in the configuration any more */
    d->tenants->first = fresh;
    d->tenants->rest = NULL;
    for (struct tenant *t = fresh; t; t = t->next)
        if (strcmp(t->name, o->default_tenant) == 0)
            d->tenants->rest = t;
    for (at = end; *at;) {
        struct tenant *t = *at;

        t->gone = true;
        d->tenants->n++;
        if (t->n_refs > 0) {
            at = &t->next;
            continue;
        }
        *at = t->next;
        d->tenants->n--;
        tenant_free(t);
    }
    keep_quotas(d);
    return r;
}

void tenants_destroy(struct daemon *d)
{
    if (!d->tenants)
        return;
    while (d->tenants->first) {
        struct tenant *t = d->tenants->first;

        d->tenants->first = t->next;
        tenant_free(t);
    }
    free(d->tenants);
    d->tenants = NULL;
}

struct tenant *tenant_ref(struct tenant *t)
{
    t->n_refs++;
    return t;
}

void tenant_unref(struct daemon *d, struct tenant *t)
{
    if (!t || --t->n_refs > 0 || !t->gone)
        return;
    for (struct tenant **at = &d->tenants->first; *at; at = &(*at)->next)
        if (*at == t) {
            *at = t->next;
            d->tenants->n--;
            break;
        }
    log_write(&d->log, LOG_INFO, "tenant %s ends with its last worker", t->name);
    tenant_free(t);
}

static bool has(const uint32_t *list, size_t n, uint32_t id)
{
    for (size_t i = 0; i < n; i++)
        if (list[i] == id)
            return true;
    return false;
}

struct tenant *tenants_match(const struct tenants *tenants, uint32_t uid, const gid_t *gids, size_t n_gids)
{
    for (struct tenant *t = tenants->first; t; t = t->next) {
        if (t->gone)
            continue;
        if (has(t->uids, t->n_uids, uid))
            return t;
        for (size_t i = 0; i < n_gids; i++)
            if (has(t->gids, t->n_gids, gids[i]))
                return t;
    }
    return tenants->rest;
}

struct tenant *tenants_from(const struct tenants *tenants, uint32_t id)
{
    struct tenant *best = NULL;

    for (struct tenant *t = tenants->first; t; t = t->next)
        if (t->id >= id && (!best || t->id < best->id))
            best = t;
    return best;
}

static uint64_t held_bytes(const struct tenant *t)
{
    struct cache_stats s;

    cache_stats(t->cache, &s);
    return s.slab_bytes;
}

uint64_t tenants_make_room(struct daemon *d, const struct tenant *needy, uint64_t bytes)
{
    struct tenant *most = NULL;
    uint64_t most_over = 0, weights = 0, held, given;

    for (struct tenant *t = d->tenants->first; t; t = t->next)
        if (t == needy || held_bytes(t) > 0)
            weights += t->weight;
    for (struct tenant *t = d->tenants->first; t; t = t->next) {
        /* in units that cannot overflow: a share of 2^50 bytes times 10^4 is below 2^64 */
        uint64_t share = d->budget.limit_bytes * t->weight / weights;

        held = held_bytes(t);
        if (t != needy && held > share && held - share > most_over) {
            most = t;
            most_over = held - share;
        }
    }
    if (!most)
        return 0;
    held = held_bytes(most);
    given = cache_shrink(most->cache, held - (bytes < most_over ? bytes : most_over));
    d->metrics.shrunk_bytes += given;
    if (given)
        log_write(&d->log, LOG_DEBUG, "tenant %s gives %llu bytes back for %s", most->name, (unsigned long long)given,
                  needy ? needy->name : "the limit");
    return given;
}

/* ---- a slab ahead of need ---- */

struct spare {
    struct job job;
    struct daemon *daemon;
    struct tenant *tenant;
    struct slab_memory memory;
    uint64_t bytes;
    enum slab_hugepages hugepages;
    bool numa_interleave;
};

static void spare_run(struct job *job)
{
    struct spare *s = (struct spare *)job;

    job->result = slab_memory_create("kvd-slab", s->bytes, s->hugepages, s->numa_interleave, &s->memory);
}

static void spare_done(struct job *job)
{
    struct spare *s = (struct spare *)job;
    struct daemon *d = s->daemon;
    struct tenant *t = s->tenant;

    if (job->result == 0)
        cache_spare_give(t->cache, &s->memory);
    t->spare_coming = false;
    free(s);
    tenant_unref(d, t);
}

void tenant_spare(struct daemon *d, struct tenant *t)
{
    struct spare *s;
    uint64_t bytes;

    if (t->spare_coming || !cache_spare_wanted(t->cache, &bytes))
        return;
    s = calloc(1, sizeof(*s));
    if (!s)
        return; /* the loop makes one itself when it needs it */
    *s = (struct spare){.job = {.run = spare_run, .done = spare_done},
                        .daemon = d,
                        .tenant = tenant_ref(t),
                        .bytes = bytes,
                        .hugepages = d->budget.hugepages,
                        .numa_interleave = d->budget.numa_interleave};
    t->spare_coming = true;
    jobs_submit(d->jobs, &s->job);
}
