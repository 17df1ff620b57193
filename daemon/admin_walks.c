/* Admin requests that walk the index: SHOW, PIN, EVICT, VERIFY. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/admin.h"
#include "daemon/daemon.h"
#include "daemon/request.h"
#include "daemon/session.h"
#include "daemon/tenants.h"
#include "daemon/walk.h"

static void out_of_memory(struct session *s, const struct request *rq)
{
    reply_error(s, rq->id, ERROR_FULL, "", "the daemon has no memory for this request");
}

/* ---- SHOW and PIN: one block ---- */

struct one_walk {
    struct walk walk;
    bool pin, unpin, ambiguous;
    uint32_t n;                              /* entries of the one key: a group each */
    uint32_t entries[SPACE_GROUPS_MAX];
    struct cache_entry_info first;
    struct tenant *tenant;                   /* whose it is; referenced */
};

static void one_visit(struct walk *w, unsigned pass, const struct cache_entry_info *info, bool selected)
{
    struct one_walk *o = (struct one_walk *)w;

    (void)pass;
    if (!selected)
        return;
    if (o->n == 0) {
        o->first = *info;
        o->tenant = tenant_ref(w->tenant);
    } else if (o->tenant != w->tenant || o->first.space != info->space || memcmp(o->first.key, info->key, KEY_BYTES) != 0 ||
               o->n == SPACE_GROUPS_MAX) {
        o->ambiguous = true;
        return;
    }
    o->entries[o->n++] = info->entry;
}

static bool one_satisfied(const struct walk *w, unsigned pass)
{
    (void)pass;
    return ((const struct one_walk *)w)->ambiguous;
}

static void one_pin(struct one_walk *o)
{
    Kvd__V1__PinReply out = KVD__V1__PIN_REPLY__INIT;
    struct cache_entry_info info;

    for (uint32_t i = 0; i < o->n; i++) {
        uint64_t blocks, bytes;

        if (!cache_entry_brief(o->tenant->cache, o->entries[i], &info) || memcmp(info.key, o->first.key, KEY_BYTES) != 0)
            continue; /* evicted in the turns since */
        cache_pin(o->tenant->cache, o->entries[i], o->unpin, &blocks, &bytes);
        out.blocks += blocks;
        out.bytes += bytes;
    }
    reply(o->walk.session, o->walk.type, o->walk.request_id, &out.base, NULL, 0);
}

static void no_such_block(struct walk *w)
{
    reply_error(w->session, w->request_id, ERROR_NOT_FOUND, "", "no block has a key that begins so");
}

static void one_show(struct one_walk *o)
{
    static const Kvd__V1__BlockInfo empty = KVD__V1__BLOCK_INFO__INIT;
    Kvd__V1__ListReply out = KVD__V1__LIST_REPLY__INIT;
    Kvd__V1__BlockInfo blocks[SPACE_GROUPS_MAX], *list[SPACE_GROUPS_MAX];
    struct cache_entry_info info[SPACE_GROUPS_MAX];
    size_t n = 0;

    for (uint32_t i = 0; i < o->n; i++) {
        if (!cache_entry_info(o->tenant->cache, o->entries[i], &info[n]) || memcmp(info[n].key, o->first.key, KEY_BYTES) != 0)
            continue; /* evicted in the turns since */
        blocks[n] = empty;
        block_info(o->tenant, &info[n], &blocks[n]);
        list[n] = &blocks[n];
        n++;
    }
    out.n_block = n;
    out.block = list;
    if (n)
        reply(o->walk.session, o->walk.type, o->walk.request_id, &out.base, NULL, 0);
    else
        no_such_block(&o->walk);
}

static void one_finish(struct walk *w)
{
    struct one_walk *o = (struct one_walk *)w;

    if (o->ambiguous)
        reply_error(w->session, w->request_id, ERROR_AMBIGUOUS, "more of the key, or tenant or space",
                    "more than one block has a key that begins so");
    else if (o->n == 0)
        no_such_block(w);
    else if (o->pin)
        one_pin(o);
    else
        one_show(o);
}

static void one_deinit(struct walk *w)
{
    tenant_unref(w->daemon, ((struct one_walk *)w)->tenant);
}

static const struct walk_ops one_ops = {
    .n_passes = 1, .visit = one_visit, .satisfied = one_satisfied, .finish = one_finish, .deinit = one_deinit};

static void start_one(struct session *s, const struct request *rq, const Kvd__V1__Selector *m, bool pin, bool unpin)
{
    struct selector selector;
    struct one_walk *o;

    if (!selector_take(s, rq, m, &selector))
        return;
    if (selector.n_key == 0) {
        reply_error(s, rq->id, ERROR_NOT_FOUND, "a key, or the beginning of one", "no key is given");
        return;
    }
    o = calloc(1, sizeof(*o));
    if (!o) {
        out_of_memory(s, rq);
        return;
    }
    o->walk.selector = selector;
    o->pin = pin;
    o->unpin = unpin;
    walk_start(s, rq, &o->walk, &one_ops);
}

void request_show(struct session *s, const struct request *rq)
{
    start_one(s, rq, ((const Kvd__V1__Show *)rq->message)->selector, false, false);
}

void request_pin(struct session *s, const struct request *rq)
{
    const Kvd__V1__Pin *m = rq->message;

    start_one(s, rq, m->selector, true, m->unpin);
}

/* ---- EVICT ----
 *
 * pass 0: leaves that are selected go, and their parents up as far as they are selected and become leaves.
 * pass 1: what is selected and still there is counted by what keeps it. */

enum { EVICT_BATCH = 256 };

struct evict_walk {
    struct walk walk;
    uint64_t max_bytes;
    struct cache_evicted done;
    uint32_t batch[EVICT_BATCH];
    size_t n;
    /* dry run only: bit sets over the entries of the current tenant */
    uint64_t *stays, *leased;
};

static bool evict_wants(void *ctx, uint32_t entry)
{
    struct evict_walk *e = ctx;
    struct cache_entry_info info;

    return cache_entry_brief(e->walk.tenant->cache, entry, &info) && !info.n_pins &&
           selector_has(&e->walk.selector, e->walk.tenant, &info);
}

static bool evict_satisfied(const struct walk *w, unsigned pass)
{
    const struct evict_walk *e = (const struct evict_walk *)w;

    (void)pass;
    return e->max_bytes && e->done.bytes >= e->max_bytes;
}

static void evict_batch(struct evict_walk *e)
{
    struct cache_evicted done = {0};

    if (e->n && !evict_satisfied(&e->walk, 0))
        cache_evict(e->walk.tenant->cache, e->batch, e->n, evict_wants, e,
                    e->max_bytes ? e->max_bytes - e->done.bytes : 0, &done);
    e->done.blocks += done.blocks;
    e->done.bytes += done.bytes;
    e->n = 0;
}

static void evict_visit(struct walk *w, unsigned pass, const struct cache_entry_info *info, bool selected)
{
    struct evict_walk *e = (struct evict_walk *)w;

    if (!selected)
        return;
    if (pass == 0) {
        if (!info->is_leaf || info->n_pins)
            return;
        e->batch[e->n++] = info->entry;
        if (e->n == EVICT_BATCH)
            evict_batch(e);
    } else if (info->n_pins) {
        e->done.kept_pinned++;
    } else if (!info->is_leaf) {
        e->done.kept_parents++;
    } else {
        e->done.kept_leased++;
    }
}

static void evict_slice_end(struct walk *w, unsigned pass)
{
    if (pass == 0)
        evict_batch((struct evict_walk *)w);
}

static void evict_finish(struct walk *w)
{
    const struct cache_evicted *done = &((struct evict_walk *)w)->done;
    Kvd__V1__EvictReply out = KVD__V1__EVICT_REPLY__INIT;

    out.blocks = done->blocks;
    out.bytes = done->bytes;
    out.kept_leased = done->kept_leased;
    out.kept_pinned = done->kept_pinned;
    out.kept_parents = done->kept_parents;
    reply(w->session, w->type, w->request_id, &out.base, NULL, 0);
}

static const struct walk_ops evict_ops = {.n_passes = 2,
                                          .visit = evict_visit,
                                          .slice_end = evict_slice_end,
                                          .satisfied = evict_satisfied,
                                          .finish = evict_finish};

/* The same without doing it. pass 0 marks those above a block that stays, pass 1 counts. */
static bool bit(const uint64_t *set, uint32_t i)
{
    return set[i / 64] >> i % 64 & 1;
}

static void set_bit(uint64_t *set, uint32_t i)
{
    set[i / 64] |= UINT64_C(1) << i % 64;
}

/* Words of lease tables, taken as they are: a worker that leaves old ones lying makes a dry run say "leased" once too often. */
static void mark_leased(struct evict_walk *e)
{
    uint32_t n = cache_n_entries(e->walk.tenant->cache);

    for (const struct session *s = e->walk.daemon->sessions; s; s = s->next) {
        if (s->tenant != e->walk.tenant || !s->page.map)
            continue;
        for (uint32_t k = 0; k < s->cache_page.n_leases; k++) {
            uint64_t ref = atomic_load_explicit(&s->cache_page.leases[k], memory_order_relaxed);

            if (ref && shm_ref_entry(ref) < n)
                set_bit(e->leased, shm_ref_entry(ref));
        }
    }
}

static int dry_begin(struct walk *w)
{
    struct evict_walk *e = (struct evict_walk *)w;
    size_t n = (cache_n_entries(w->tenant->cache) + 63) / 64;

    free(e->stays);
    free(e->leased);
    e->stays = calloc(n, sizeof(*e->stays));
    e->leased = calloc(n, sizeof(*e->leased));
    if (!e->stays || !e->leased)
        return -ENOMEM;
    mark_leased(e);
    return 0;
}

static void dry_visit(struct walk *w, unsigned pass, const struct cache_entry_info *info, bool selected)
{
    struct evict_walk *e = (struct evict_walk *)w;
    struct cache_entry_info up = *info;

    if (pass == 0) {
        if (selected && !info->n_pins && !bit(e->leased, info->entry))
            return;
        /* Stops where another child has been: each entry is marked once. */
        for (uint32_t p = up.parent_entry; p != CACHE_NONE && !bit(e->stays, p); p = up.parent_entry) {
            set_bit(e->stays, p);
            if (!cache_entry_brief(w->tenant->cache, p, &up))
                break;
        }
        return;
    }
    if (!selected)
        return;
    if (info->n_pins) {
        e->done.kept_pinned++;
    } else if (bit(e->leased, info->entry)) {
        e->done.kept_leased++;
    } else if (bit(e->stays, info->entry)) {
        e->done.kept_parents++;
    } else {
        e->done.blocks++;
        e->done.bytes += info->bytes;
    }
}

static void dry_deinit(struct walk *w)
{
    free(((struct evict_walk *)w)->stays);
    free(((struct evict_walk *)w)->leased);
}

static const struct walk_ops dry_ops = {.n_passes = 2,
                                        .begin = dry_begin,
                                        .visit = dry_visit,
                                        .satisfied = evict_satisfied,
                                        .finish = evict_finish,
                                        .deinit = dry_deinit};

void request_evict(struct session *s, const struct request *rq)
{
    const Kvd__V1__Evict *m = rq->message;
    struct selector selector;
    struct evict_walk *e;

    if (!selector_take(s, rq, m->selector, &selector))
        return;
    e = calloc(1, sizeof(*e));
    if (!e) {
        out_of_memory(s, rq);
        return;
    }
    e->walk.selector = selector;
    e->max_bytes = m->max_bytes;
    /* What workers noted since the last time counts as use. */
    for (struct tenant *t = tenants_from(s->daemon->tenants, 1); t; t = tenants_from(s->daemon->tenants, t->id + 1))
        if (selector_has_tenant(&selector, t))
            cache_drain_hits(t->cache);
    walk_start(s, rq, &e->walk, m->dry_run ? &dry_ops : &evict_ops);
}

/* ---- VERIFY ---- */

enum { BAD_KEYS_MAX = 64 };

struct verify_walk {
    struct walk walk;
    uint64_t blocks, bytes, n_bad;
    uint8_t bad[BAD_KEYS_MAX][KEY_BYTES];
};

struct verify_job {
    struct job job;
    struct verify_walk *walk;
    uint32_t entry;
    struct cache_entry_info info;
};

static void verify_run(struct job *job)
{
    struct verify_job *v = (struct verify_job *)job;

    job->result = v->walk->walk.daemon->crc32c(0, v->info.payload, v->info.bytes) == v->info.crc32c ? 0 : -EBADMSG;
}

static void verify_done(struct job *job)
{
    struct verify_job *v = (struct verify_job *)job;
    struct verify_walk *w = v->walk;
    struct daemon *d = w->walk.daemon;
    struct cache *cache = w->walk.tenant->cache;

    cache_unhold(cache, v->entry);
    if (job->result != -ECANCELED) {
        w->blocks++;
        w->bytes += v->info.bytes;
        d->metrics.verified_blocks++;
    }
    if (job->result == -EBADMSG) {
        const uint8_t *k = v->info.key;

        log_write(&d->log, LOG_ERROR, "tenant %s: block %02x%02x%02x%02x%02x%02x%02x%02x… is corrupt and dropped", w->walk.tenant->name,
                  k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]);
        d->metrics.corrupt_blocks++;
        cache_drop_corrupt(cache, v->entry);
        if (w->n_bad < BAD_KEYS_MAX)
            memcpy(w->bad[w->n_bad], k, KEY_BYTES);
        w->n_bad++;
    }
    free(v);
    walk_job_done(&w->walk);
}

static void verify_visit(struct walk *w, unsigned pass, const struct cache_entry_info *info, bool selected)
{
    struct verify_job *v;

    (void)pass;
    if (!selected)
        return;
    v = calloc(1, sizeof(*v));
    if (!v || !cache_hold(w->tenant->cache, info->entry)) {
        free(v);
        return; /* not counted among the blocks that were read */
    }
    *v = (struct verify_job){.job = {.run = verify_run, .done = verify_done},
                             .walk = (struct verify_walk *)w, .entry = info->entry, .info = *info};
    w->n_jobs++;
    jobs_submit(w->daemon->jobs, &v->job);
}

static void verify_finish(struct walk *w)
{
    struct verify_walk *v = (struct verify_walk *)w;
    Kvd__V1__VerifyReply out = KVD__V1__VERIFY_REPLY__INIT;
    ProtobufCBinaryData bad[BAD_KEYS_MAX];

    out.blocks = v->blocks;
    out.bytes = v->bytes;
    out.bad_blocks = v->n_bad;
    out.n_bad = v->n_bad < BAD_KEYS_MAX ? v->n_bad : BAD_KEYS_MAX;
    out.bad = bad;
    for (size_t i = 0; i < out.n_bad; i++)
        bad[i] = (ProtobufCBinaryData){.len = KEY_BYTES, .data = v->bad[i]};
    reply(w->session, w->type, w->request_id, &out.base, NULL, 0);
}

static const struct walk_ops verify_ops = {.n_passes = 1, .visit = verify_visit, .finish = verify_finish};

void request_verify(struct session *s, const struct request *rq)
{
    const Kvd__V1__Verify *m = rq->message;
    struct selector selector;
    struct verify_walk *v;

    if (!selector_take(s, rq, m->selector, &selector))
        return;
    v = calloc(1, sizeof(*v));
    if (!v) {
        out_of_memory(s, rq);
        return;
    }
    v->walk.selector = selector;
    v->walk.n_jobs_max = (uint32_t)s->daemon->options.verify_blocks;
    walk_start(s, rq, &v->walk, &verify_ops);
}
