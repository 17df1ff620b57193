#include "daemon/publish.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/fault.h"
#include "daemon/flight_requests.h"
#include "daemon/publish-internal.h"
#include "daemon/session.h"
#include "daemon/staging.h"
#include "daemon/tenants.h"
#include "proto/kvd.pb-c.h"

/* ---- blocks in progress, by key ---- */

int publishing_create(struct publishing **ret)
{
    *ret = calloc(1, sizeof(**ret));
    return *ret ? 0 : -ENOMEM;
}

struct publishing *publishing_destroy(struct publishing *p)
{
    assert(!p || p->n_blocks == 0);
    free(p);
    return NULL;
}

uint64_t publishing_blocks(const struct publishing *p)
{
    return p->n_blocks;
}

static size_t bucket_of(uint32_t tenant, uint32_t space, uint8_t group, const uint8_t *key)
{
    uint64_t w;

    memcpy(&w, key, sizeof(w));
    w = (w ^ tenant ^ (uint64_t)space << 32 ^ (uint64_t)group << 24) * UINT64_C(0x9e3779b97f4a7c15);
    return w >> 52;
}
static_assert(PUBLISH_BUCKETS == 1 << 12, "bucket_of gives 12 bits");

static struct publish_block **bucket(struct publishing *p, const struct publish_block *b)
{
    return &p->buckets[bucket_of(b->publish->tenant->id, b->publish->space->id, b->group, b->key)];
}

struct publish_block *publishing_find(const struct publishing *p, uint32_t tenant, uint32_t space, uint8_t group,
                                      const uint8_t *key)
{
    struct publish_block *b = p->buckets[bucket_of(tenant, space, group, key)];

    while (b && !(b->group == group && b->publish->tenant->id == tenant && b->publish->space->id == space &&
                  memcmp(b->key, key, KEY_BYTES) == 0))
        b = b->next_hash;
    return b;
}

void publishing_add(struct publishing *p, struct publish_block *b)
{
    struct publish_block **head = bucket(p, b);

    b->state = BLOCK_ENCODING;
    b->next_hash = *head;
    *head = b;
}

static void publishing_remove(struct publishing *p, struct publish_block *b)
{
    struct publish_block **at = bucket(p, b);

    while (*at != b)
        at = &(*at)->next_hash;
    *at = b->next_hash;
}

void publish_wait_on(struct publish_block *b, struct publish_block *other)
{
    assert(other);
    b->waits_on = other;
    if (other->publish == b->publish)
        return;
    b->next_waiter = other->waiters;
    other->waiters = b;
    b->publish->n_waits++;
}

/* ---- jobs ---- */

/* Helper thread. */
static void part_run(struct job *job)
{
    struct publish_part *part = (struct publish_part *)job;
    struct publish_block *b = part->block;
    const struct publish *p = b->publish;
    const struct payload_layout *layout = space_layout(p->space, b->group, b->first);
    struct payload_fault fault;
    int none = 0;

    job->result = payload_encode(layout, p->daemon->codec, p->dtype, b->raw, part->part0, part->part1, b->slot.payload, &fault);
    if (job->result < 0 && atomic_compare_exchange_strong(&b->result, &none, job->result) && job->result == -EDOM)
        b->fault = fault; /* read by the loop after this job is done */
    /* acq_rel: the last part sees what the others wrote. */
    if (atomic_fetch_sub_explicit(&b->n_parts_left, 1, memory_order_acq_rel) == 1 && atomic_load(&b->result) == 0)
        b->slot.crc32c = p->daemon->crc32c(0, b->slot.payload, b->slot.bytes);
}

static void publish_settle(struct publish *p);

static void part_done(struct job *job)
{
    struct publish_part *part = (struct publish_part *)job;
    struct publish_block *b = part->block;
    struct publish *p = b->publish;
    int none = 0;

    if (job->result == -ECANCELED || job->result == -ETIMEDOUT) /* was not run, so it has not told */
        atomic_compare_exchange_strong(&b->result, &none, job->result);
    else
        histogram_add(&p->daemon->metrics.encode, job->took_usec);
    p->n_jobs--;
    publish_settle(p);
}

/* Into how many jobs a block is cut: enough that few large blocks keep all helpers busy. */
static uint32_t parts_of(const struct publish *p, const struct publish_block *b, uint32_t n_encoding)
{
    enum { PART_MIN_BYTES = 256 << 10 };
    uint32_t layers = space_layout(p->space, b->group, b->first)->n_parts;
    uint32_t threads = jobs_threads(p->daemon->jobs);
    uint64_t n = n_encoding >= 2 * threads ? 1 : threads;
    uint64_t most = b->raw_bytes / PART_MIN_BYTES;

    n = n < most ? n : most;
    n = n < layers ? n : layers;
    return n ? (uint32_t)n : 1;
}

/* Cuts the blocks into p->parts, linked as one list. */
static int make_parts(struct publish *p)
{
    uint32_t n_encoding = 0, n = 0;

    for (uint32_t i = 0; i < p->n_blocks; i++)
        n_encoding += p->blocks[i].state == BLOCK_ENCODING;
    for (uint32_t i = 0; i < p->n_blocks; i++)
        if (p->blocks[i].state == BLOCK_ENCODING) {
            uint32_t here = parts_of(p, &p->blocks[i], n_encoding);

            p->blocks[i].n_parts_left = here;
            n += here;
        }
    if (n == 0)
        return 0;
    if (FAULT_DUE("job-submit"))
        return -ENOMEM;
    p->parts = calloc(n, sizeof(*p->parts));
    if (!p->parts)
        return -ENOMEM;
    for (uint32_t i = 0; i < p->n_blocks; i++) {
        struct publish_block *b = &p->blocks[i];
        uint32_t layers = space_layout(p->space, b->group, b->first)->n_parts, n_here = b->n_parts_left;

        for (uint32_t k = 0; k < n_here && b->state == BLOCK_ENCODING; k++) {
            struct publish_part *part = &p->parts[p->n_parts++];

            *part = (struct publish_part){
                .job = {.run = part_run, .done = part_done, .deadline_usec = p->begin_usec + p->daemon->options.publish_timeout},
                .block = b,
                .part0 = (uint32_t)((uint64_t)layers * k / n_here),
                .part1 = (uint32_t)((uint64_t)layers * (k + 1) / n_here)};
        }
    }
    for (uint32_t k = 0; k + 1 < p->n_parts; k++)
        p->parts[k].job.next = &p->parts[k + 1].job;
    return 0;
}

void publish_start(struct publish *p)
{
    int r = make_parts(p);

    if (r < 0)
        for (uint32_t i = 0; i < p->n_blocks; i++)
            if (p->blocks[i].state == BLOCK_ENCODING)
                atomic_store(&p->blocks[i].result, r);
    p->n_jobs = p->n_parts;
    if (p->session)
        p->session->n_jobs += p->n_parts;
    if (p->n_jobs == 0) {
        publish_settle(p);
        return;
    }
    jobs_submit(p->daemon->jobs, &p->parts[0].job);
    FAULT_POINT("publish-after-submit");
    tenant_spare(p->daemon, p->tenant);
}

/* ---- conclusion ---- */

static void fail_result(struct publish_block *b, int r)
{
    static const char *const kinds[] = {"a value", "NaN", "infinity", "a value out of range"};
    const struct payload_fault *f = &b->fault;

    if (r == -EDOM)
        block_fail(b, ERROR_VALUE, "%s in %s of layer %u, head %u, token %u, channel %u: %g", kinds[f->value.kind & 3],
                   f->role == CODEC_V ? "V" : "K", f->layer, f->head, f->value.token, f->value.channel, (double)f->value.value);
    else if (r == -ENOLINK)
        block_fail(b, ERROR_PARENT, "its parent could not be published");
    else if (r == -ETIMEDOUT)
        block_fail(b, ERROR_TIMEOUT, "no helper thread took it up within publish_timeout");
    else if (r == -ECANCELED)
        block_fail(b, ERROR_DRAINING, "the daemon is stopping");
    else if (r == -ENOMEM)
        block_fail(b, ERROR_FULL, "the daemon is out of memory");
    else
        block_fail(b, ERROR_INTERNAL, "encoding failed: %s", strerror(-r));
}

/* Commits or aborts one block; its parent has been concluded before. */
static void conclude_block(struct publish *p, struct publish_block *b)
{
    struct cache *cache = p->tenant->cache;
    struct metrics *m = &p->daemon->metrics;
    int r = atomic_load(&b->result);

    publishing_remove(p->daemon->publishing, b);
    if (b->waits_on && b->waits_on->state == BLOCK_FAILED) {
        cache_abort(cache, &b->slot);
        block_fail(b, ERROR_PARENT, "its parent could not be published");
        return;
    }
    if (r < 0) {
        cache_abort(cache, &b->slot);
        fail_result(b, r);
        return;
    }
    FAULT_POINT("publish-before-commit");
    r = cache_commit(cache, &b->slot);
    FAULT_POINT("publish-after-commit");
    if (r < 0) {
        block_fail(b, ERROR_FULL, "the index has no place for this key");
        return;
    }
    b->state = BLOCK_DONE;
    m->encoded_bytes += b->raw_bytes;
    m->stored_bytes += b->slot.bytes;
}

/* Blocks of other requests that wait for b: tells them what they need to know, for b will be freed. */
static void tell_waiters(struct publishing *all, struct publish_block *b)
{
    while (b->waiters) {
        struct publish_block *w = b->waiters;
        struct publish *p = w->publish;

        b->waiters = w->next_waiter;
        w->waits_on = NULL;
        if (b->state == BLOCK_FAILED && w->state == BLOCK_ELSEWHERE)
            block_fail(w, b->error, "%.100s (by another worker)", b->reason);
        else if (b->state == BLOCK_FAILED && w->state == BLOCK_ENCODING)
            atomic_store(&w->result, -ENOLINK); /* its parent failed; its own jobs may still run */
        else if (w->state == BLOCK_ELSEWHERE)
            w->state = BLOCK_PRESENT;
        if (--p->n_waits == 0 && p->n_jobs == 0) {
            p->next_ready = all->ready;
            all->ready = p;
        }
    }
}

static void land(struct publish *p, const struct publish_block *b)
{
    if ((b->state == BLOCK_DONE || b->state == BLOCK_PRESENT) && key_landed(p->tenant->cache, p->space, b->key))
        flight_landed(p->daemon->flights, p->tenant->id, p->space->id, b->key);
}

static void send_reply(struct publish *p)
{
    Kvd__V1__PublishReply out = KVD__V1__PUBLISH_REPLY__INIT;
    uint32_t n = p->n_blocks, n_failed = 0;
    Kvd__V1__PublishStatus *status = calloc(n, sizeof(*status));
    Kvd__V1__Error *errors = calloc(n, sizeof(*errors)), **list = calloc(n, sizeof(*list));

    if (!status || !errors || !list) {
        reply_error(p->session, p->request_id, ERROR_FULL, "", "the daemon is out of memory; match again to see what was published");
        goto out;
    }
    for (uint32_t i = 0; i < n; i++) {
        struct publish_block *b = &p->blocks[i];

        status[i] = b->state == BLOCK_DONE      ? KVD__V1__PUBLISH_STATUS__PUBLISHED
                    : b->state == BLOCK_PRESENT ? KVD__V1__PUBLISH_STATUS__PRESENT
                                                : KVD__V1__PUBLISH_STATUS__FAILED;
        if (b->state != BLOCK_FAILED)
            continue;
        kvd__v1__error__init(&errors[n_failed]);
        errors[n_failed].code = b->error;
        errors[n_failed].reason = b->reason;
        list[n_failed] = &errors[n_failed];
        n_failed++;
    }
    out.n_status = n;
    out.status = status;
    out.n_error = n_failed;
    out.error = list;
    if (kvd__v1__publish_reply__get_packed_size(&out) > FRAME_BODY_MAX)
        for (uint32_t i = 1; i < n_failed; i++)
            errors[i].reason = (char *)""; /* thousands failed: the first one's reason, the others' numbers */
    reply(p->session, FRAME_PUBLISH, p->request_id, &out.base, NULL, 0);
out:
    free(status);
    free(errors);
    free(list);
}

static void publish_free(struct publish *p)
{
    struct daemon *d = p->daemon;
    struct session *s = p->session;

    d->publishing->n_blocks -= p->n_blocks;
    staging_unref(p->staging);
    if (s) { /* which has a reference of its own */
        *p->at = p->next;
        if (p->next)
            p->next->at = p->at;
        s->n_publishing -= p->n_blocks;
        session_staging_idle(s, p->staging);
    }
    tenant_unref(d, p->tenant);
    free(p->parts);
    free(p);
}

static void count(struct publish *p)
{
    struct metrics *m = &p->daemon->metrics;

    for (uint32_t i = 0; i < p->n_blocks; i++) {
        m->blocks_published += p->blocks[i].state == BLOCK_DONE;
        m->blocks_present += p->blocks[i].state == BLOCK_PRESENT;
        m->blocks_failed += p->blocks[i].state == BLOCK_FAILED;
    }
    histogram_add(&m->publish, daemon_now_usec() - p->begin_usec);
}

static void conclude(struct publish *p)
{
    for (uint32_t i = 0; i < p->n_blocks; i++) {
        struct publish_block *b = &p->blocks[i];

        if (b->state == BLOCK_ENCODING) {
            conclude_block(p, b);
        } else if (b->state == BLOCK_ELSEWHERE) { /* an earlier block of this request */
            if (b->waits_on->state == BLOCK_FAILED)
                block_fail(b, b->waits_on->error, "%.120s", b->waits_on->reason);
            else
                b->state = BLOCK_PRESENT;
        }
    }
    for (uint32_t i = 0; i < p->n_blocks; i++) {
        tell_waiters(p->daemon->publishing, &p->blocks[i]);
        land(p, &p->blocks[i]);
    }
    count(p);
    FAULT_POINT("publish-before-reply");
    if (p->session)
        send_reply(p);
    daemon_status(p->daemon);
    publish_free(p);
}

/* Concludes p if nothing is left to wait for, and then those that waited for it; no recursion, however long they hang together. */
static void publish_settle(struct publish *p)
{
    struct publishing *all = p->daemon->publishing;

    if (p->n_jobs || p->n_waits)
        return;
    p->next_ready = all->ready;
    all->ready = p;
    if (all->concluding)
        return;
    all->concluding = true;
    while (all->ready) {
        struct publish *next = all->ready;

        all->ready = next->next_ready;
        conclude(next);
    }
    all->concluding = false;
}

void publish_session_gone(struct session *s)
{
    struct publish *next;

    for (struct publish *p = s->publishes; p; p = next) {
        next = p->next;
        p->session = NULL;
        p->at = NULL;
    }
    s->publishes = NULL;
    s->n_publishing = 0;
}
