/* FRAME_PUBLISH: everything that is looked at before the first byte is encoded. */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/fault.h"
#include "daemon/publish-internal.h"
#include "daemon/request.h"
#include "daemon/session.h"
#include "daemon/staging.h"
#include "daemon/tenants.h"
#include "proto/kvd.pb-c.h"

void block_fail(struct publish_block *b, enum error_code code, const char *format, ...)
{
    va_list ap;

    b->state = BLOCK_FAILED;
    b->error = code;
    va_start(ap, format);
    vsnprintf(b->reason, sizeof(b->reason), format, ap);
    va_end(ap);
}

/* Says no to the request as a whole. */
static bool publish_allowed(struct session *s, const struct request *rq, const Kvd__V1__Publish *m, enum codec_dtype *ret_dtype)
{
    struct daemon *d = s->daemon;
    const struct options *o = &d->options;

    if (d->draining)
        reply_error(s, rq->id, ERROR_DRAINING, "later, or another daemon", "the daemon takes no new blocks");
    else if (!session_space(s, m->space))
        reply_error(s, rq->id, ERROR_SPACE, "one that SPACE_OPEN gave", "space %u is not open here", m->space);
    else if (!session_staging(s, m->staging))
        reply_error(s, rq->id, ERROR_STAGING, "one that STAGING_ADD gave", "there is no staging %u", m->staging);
    else if (codec_dtype_parse(m->dtype, ret_dtype) < 0)
        reply_error(s, rq->id, ERROR_LAYOUT, "f16, bf16, f32", "dtype \"%.20s\" is not known", m->dtype);
    else if (m->n_block == 0 || m->n_block > o->publish_blocks)
        reply_error(s, rq->id, ERROR_LIMIT, "what the option publish_blocks says", "%zu blocks in one publish; 1 to %" PRIu64
                    " are allowed", m->n_block, o->publish_blocks);
    else if (s->n_publishing + m->n_block > o->publish_worker_blocks)
        reply_error(s, rq->id, ERROR_LIMIT, "when some have ended; option publish_worker_blocks",
                    "%u blocks of this worker are in progress, and %" PRIu64 " are allowed", s->n_publishing,
                    o->publish_worker_blocks);
    else if (publishing_blocks(d->publishing) + m->n_block > o->publish_total_blocks)
        reply_error(s, rq->id, ERROR_LIMIT, "when some have ended; option publish_total_blocks",
                    "%" PRIu64 " blocks are in progress, and %" PRIu64 " are allowed", publishing_blocks(d->publishing),
                    o->publish_total_blocks);
    else
        return true;
    return false;
}

/* A key as it came: 32 bytes, or an engine's shorter digest, which is filled up with zeros. */
static bool take_key(const ProtobufCBinaryData *from, uint32_t digest_bytes, uint8_t ret[KEY_BYTES])
{
    if (from->len != KEY_BYTES && (digest_bytes == 0 || from->len != digest_bytes))
        return false;
    memset(ret, 0, KEY_BYTES);
    memcpy(ret, from->data, from->len);
    return true;
}

static bool tokens_good(struct publish_block *b, const struct space *space, const Kvd__V1__PublishBlock *m)
{
    if (m->n_token != space->block_tokens) {
        block_fail(b, ERROR_TOKEN, "%zu tokens; allowed: %u", m->n_token, space->block_tokens);
        return false;
    }
    for (size_t i = 0; i < m->n_token && space->vocab_tokens; i++)
        if (m->token[i] >= space->vocab_tokens) {
            block_fail(b, ERROR_TOKEN, "token %zu is %u; allowed: below %u", i, m->token[i], space->vocab_tokens);
            return false;
        }
    return true;
}

/* Parent and key (rule I1: never taken from the worker where they can be computed). */
static bool key_good(struct publish_block *b, const struct space *space, const Kvd__V1__PublishBlock *m)
{
    uint32_t n_digest = space->digest_bytes;
    int r;

    if (n_digest && m->first) {
        memcpy(b->parent, space->fingerprint, KEY_BYTES);
        b->first = true;
    } else if (!take_key(&m->parent, n_digest, b->parent)) {
        block_fail(b, ERROR_PROTOCOL, "parent of %zu bytes; allowed: a key of 32 bytes", m->parent.len);
        return false;
    } else {
        b->first = memcmp(b->parent, space->fingerprint, KEY_BYTES) == 0;
    }
    if (n_digest) {
        if (m->digest.len == n_digest && take_key(&m->digest, n_digest, b->key))
            return true;
        block_fail(b, ERROR_TOKEN, "digest of %zu bytes; allowed: %u", m->digest.len, n_digest);
        return false;
    }
    if (!tokens_good(b, space, m))
        return false;
    r = key_block(b->publish->daemon->hasher, b->parent, m->token, m->n_token, m->extra.data, m->extra.len, b->key);
    if (r < 0)
        block_fail(b, r == -EINVAL ? ERROR_TOKEN : ERROR_INTERNAL, r == -EINVAL ? "extra of %zu bytes; allowed: 4096"
                                                                                : "SHA-256 failed (extra of %zu bytes)",
                   m->extra.len);
    return r == 0;
}

static bool place_good(struct publish_block *b, const struct publish *p, const Kvd__V1__PublishBlock *m)
{
    const struct payload_layout *layout = space_layout(p->space, b->group, b->first);
    uint64_t bytes = layout->raw_bytes[p->dtype];

    if (m->offset % 64 != 0 || m->offset > p->staging->bytes || bytes > p->staging->bytes - m->offset) {
        block_fail(b, ERROR_STAGING, "%" PRIu64 " bytes at %" PRIu64 "; allowed: a multiple of 64, within %" PRIu64, bytes,
                   m->offset, p->staging->bytes);
        return false;
    }
    b->raw = p->staging->map + m->offset;
    b->raw_bytes = bytes;
    return true;
}

static bool block_good(struct publish_block *b, const struct publish *p, const Kvd__V1__PublishBlock *m)
{
    if (m->group >= p->space->n_groups) {
        block_fail(b, ERROR_LAYOUT, "group %u; allowed: below %u", m->group, p->space->n_groups);
        return false;
    }
    b->group = (uint8_t)m->group;
    return key_good(b, p->space, m) && place_good(b, p, m);
}

/* Is it the tenant's own quota that keeps it from one more slab of at least bytes? */
static bool over_own_quota(const struct publish *p, const struct cache_stats *s, uint64_t bytes)
{
    uint64_t slab = p->daemon->options.slab_bytes;

    return s->slab_bytes + (bytes > slab ? bytes : slab) > s->quota_bytes && s->quota_bytes < p->daemon->budget.limit_bytes;
}

/* by_system: the memory that was asked for is within the limits, but the system has none. */
static void no_room(struct publish_block *b, int r, bool by_system)
{
    const struct publish *p = b->publish;
    const struct budget *budget = &p->daemon->budget;
    struct cache_space_stats space;
    struct cache_stats s;

    cache_stats(p->tenant->cache, &s);
    cache_space_stats(p->tenant->cache, p->space, &space);
    if (r == -EDQUOT)
        block_fail(b, ERROR_QUOTA, "the space holds %" PRIu64 " bytes, its quota is reached, nothing could be evicted", space.bytes);
    else if (r == -ENOMEM)
        block_fail(b, ERROR_FULL, "the daemon is out of memory");
    else if (by_system)
        block_fail(b, ERROR_FULL, "the system has no %s for another slab, %" PRIu64 " of %" PRIu64
                   " bytes of the host tier are held, nothing could be evicted",
                   budget->hugepages == SLAB_HUGE_ON ? "huge pages (hugepages = on allows no others)" : "memory",
                   budget->used_bytes, budget->limit_bytes);
    else if (s.n_valid + s.n_reserved >= s.n_entries)
        block_fail(b, ERROR_FULL, "all %u entries of the index are in use, and none could be evicted", s.n_entries);
    else if (over_own_quota(p, &s, space_layout(p->space, b->group, b->first)->bytes))
        block_fail(b, ERROR_QUOTA, "tenant %s holds %" PRIu64 " of %" PRIu64 " bytes, nothing could be evicted", p->tenant->name,
                   s.slab_bytes, s.quota_bytes);
    else
        block_fail(b, ERROR_FULL, "%" PRIu64 " of %" PRIu64 " bytes of the host tier are held, nothing could be evicted",
                   budget->used_bytes, budget->limit_bytes);
}

static int reserve(struct publish *p, struct publish_block *b)
{
    struct cache *cache = p->tenant->cache;
    uint64_t bytes = space_layout(p->space, b->group, b->first)->bytes, slab = p->daemon->options.slab_bytes;
    int r = cache_reserve(cache, p->space, b->group, b->key, b->parent, b->first, &b->slot);
    struct cache_stats s;

    if (r != -ENOSPC)
        return r;
    cache_stats(cache, &s);
    if (over_own_quota(p, &s, bytes) || tenants_make_room(p->daemon, p->tenant, bytes > slab ? bytes : slab) == 0)
        return r;
    return cache_reserve(cache, p->space, b->group, b->key, b->parent, b->first, &b->slot);
}

/* Reserves one block that has passed the checks. */
static void take_block(struct publish *p, struct publish_block *b)
{
    struct publishing *all = p->daemon->publishing;
    struct publish_block *other;
    uint64_t refused = p->daemon->budget.n_refused;
    int r = reserve(p, b);

    switch (r) {
    case CACHE_PRESENT:
        b->state = BLOCK_PRESENT;
        return;
    case CACHE_IN_PROGRESS:
        b->state = BLOCK_ELSEWHERE;
        publish_wait_on(b, publishing_find(all, p->tenant->id, p->space->id, b->group, b->key));
        return;
    case CACHE_NO_PARENT:
        block_fail(b, ERROR_PARENT, "its parent %02x%02x%02x%02x… is not in the cache", b->parent[0], b->parent[1], b->parent[2],
                   b->parent[3]);
        return;
    case CACHE_RESERVED:
        FAULT_POINT("publish-after-reserve");
        other = b->first || !space_group_chained(p->space, b->group)
                    ? NULL
                    : publishing_find(all, p->tenant->id, p->space->id, b->group, b->parent);
        publishing_add(all, b);
        if (other)
            publish_wait_on(b, other);
        return;
    default:
        no_room(b, r, p->daemon->budget.n_refused > refused);
    }
}

static struct publish *publish_new(struct session *s, const struct request *rq, const Kvd__V1__Publish *m, enum codec_dtype dtype)
{
    struct publish *p = calloc(1, sizeof(*p) + m->n_block * sizeof(p->blocks[0]));

    if (!p)
        return NULL;
    p->daemon = s->daemon;
    p->session = s;
    p->tenant = tenant_ref(s->tenant);
    p->staging = staging_ref(session_staging(s, m->staging));
    p->space = session_space(s, m->space)->space;
    p->dtype = dtype;
    p->request_id = rq->id;
    p->begin_usec = daemon_now_usec();
    p->n_blocks = (uint32_t)m->n_block;
    p->next = s->publishes;
    p->at = &s->publishes;
    if (p->next)
        p->next->at = &p->next;
    s->publishes = p;
    s->n_publishing += p->n_blocks;
    s->daemon->publishing->n_blocks += p->n_blocks;
    return p;
}

void request_publish(struct session *s, const struct request *rq)
{
    const Kvd__V1__Publish *m = rq->message;
    enum codec_dtype dtype;
    struct publish *p;

    if (!publish_allowed(s, rq, m, &dtype))
        return;
    p = publish_new(s, rq, m, dtype);
    if (!p) {
        reply_error(s, rq->id, ERROR_FULL, "", "the daemon has no memory for this publish");
        return;
    }
    s->daemon->metrics.publish_requests++;
    for (uint32_t i = 0; i < p->n_blocks; i++) {
        struct publish_block *b = &p->blocks[i];

        b->publish = p;
        if (block_good(b, p, m->block[i]))
            take_block(p, b);
    }
    publish_start(p);
}
