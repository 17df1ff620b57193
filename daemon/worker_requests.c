/* Requests of workers about their session: HELLO, spaces, slabs, staging. */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/daemon.h"
#include "daemon/peer.h"
#include "daemon/request.h"
#include "daemon/session.h"
#include "daemon/staging.h"
#include "daemon/tenants.h"
#include "proto/kvd.pb-c.h"
#include "proto/ring.h"
#include "proto/shm.h"

enum { MESSAGES_VERSION = 1 };

/* ---- HELLO ---- */

__attribute__((format(printf, 5, 6))) static void refuse(struct session *s, const struct request *rq, enum error_code code,
                                                         const char *allowed, const char *format, ...)
{
    char reason[200];
    va_list ap;

    va_start(ap, format);
    vsnprintf(reason, sizeof(reason), format, ap);
    va_end(ap);
    reply_error(s, rq->id, code, allowed, "%s", reason);
    session_close(s, NULL);
}

uint64_t sessions_attached(const struct daemon *d, uid_t uid)
{
    uint64_t n = 0;

    for (const struct session *s = d->sessions; s; s = s->next)
        n += s->state == SESSION_READY && s->uid == uid;
    return n;
}

/* Lays the page out: header | leases | hit log | rings, each at a cache line. */
static int make_page(struct session *s)
{
    const struct options *o = &s->daemon->options;
    uint32_t n_leases = (uint32_t)o->leases, n_log = (uint32_t)o->hit_log;
    uint64_t log_off = (sizeof(struct shm_page_header) + n_leases * sizeof(uint64_t) + 63) / 64 * 64;
    uint32_t n_ring = (uint32_t)o->attend_ring;
    uint64_t rings_off = (log_off + n_log * sizeof(uint64_t) + 63) / 64 * 64;
    uint64_t bytes = (rings_off + ring_bytes(n_ring) + 4095) / 4096 * 4096;
    struct shm_page_header *h;
    int r = slab_memory_create("kvd-page", bytes, SLAB_HUGE_OFF, false, &s->page);

    if (r < 0)
        return r;
    h = s->page.map;
    h->magic = SHM_PAGE_MAGIC;
    h->version = SHM_VERSION;
    h->header_bytes = sizeof(*h);
    h->worker = s->daemon->last_worker + 1;
    h->n_leases = n_leases;
    h->n_log = n_log;
    h->leases_off = sizeof(*h);
    h->log_off = log_off;
    h->rings_off = rings_off;
    h->n_ring = n_ring;
    h->total_bytes = s->page.bytes;
    s->rings = (char *)s->page.map + rings_off;
    s->n_ring = n_ring;
    s->cache_page = (struct cache_page){
        .header = h,
        .leases = (const _Atomic uint64_t *)((const char *)s->page.map + sizeof(*h)),
        .log = (const _Atomic uint64_t *)((const char *)s->page.map + log_off),
        .n_leases = n_leases,
        .n_log = n_log,
    };
    r = fcntl(s->page.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0 ? -errno : 0;
    if (r == 0)
        r = cache_page_add(s->tenant->cache, &s->cache_page);
    if (r < 0)
        slab_memory_release(&s->page);
    if (r < 0)
        s->page = (struct slab_memory){.fd = -1};
    return r;
}

/* Gives the session its tenant and page, and the descriptors for the worker: page, index. */
static int give_memory(struct session *s, struct tenant *t, int ret_fds[2], uint64_t *ret_index_bytes)
{
    int fd = cache_index_fd(t->cache, ret_index_bytes), r;

    if (t->index_fd < 0)
        t->index_fd = reopen_read_only(fd);
    if (t->index_fd < 0) {
        r = t->index_fd;
        t->index_fd = -1;
        return r;
    }
    s->tenant = tenant_ref(t);
    t->n_sessions++;
    r = make_page(s);
    if (r < 0)
        return r;
    ret_fds[0] = s->page.fd;
    ret_fds[1] = t->index_fd;
    tenant_spare(s->daemon, t);
    return 0;
}

static void copy_name(struct session *s, const char *name)
{
    size_t n = 0;

    for (; name[n] && n < SESSION_NAME_MAX; n++)
        s->name[n] = (unsigned char)name[n] < 0x20 || name[n] == 0x7f ? '?' : name[n];
}

/* Says no where limits or rights say so. */
static bool hello_allowed(struct session *s, const struct request *rq, const Kvd__V1__Hello *m, const struct tenant *t)
{
    struct daemon *d = s->daemon;

    if (m->version_min > MESSAGES_VERSION || m->version_max < MESSAGES_VERSION)
        refuse(s, rq, ERROR_PROTOCOL, "a range that holds 1", "none of the messages' versions is spoken here");
    else if (strlen(m->name) > SESSION_NAME_MAX)
        refuse(s, rq, ERROR_PROTOCOL, "at most 63 bytes", "the name is %zu bytes long", strlen(m->name));
    else if (!t && !m->admin_only)
        refuse(s, rq, ERROR_DENIED, "a user or group that a [tenant] section claims", "uid %u belongs to no tenant", s->uid);
    else if (d->draining && !m->admin_only)
        refuse(s, rq, ERROR_DRAINING, "later, or another daemon", "the daemon takes no new workers");
    else if (s->admin && m->admin_only)
        return true; /* so that there is a way in when all is full */
    else if (d->n_attached >= d->options.sessions_max)
        refuse(s, rq, ERROR_LIMIT, "fewer workers, or a greater sessions_max", "all %" PRIu64 " sessions are taken",
               d->options.sessions_max);
    else if (sessions_attached(d, s->uid) >= d->options.sessions_per_uid)
        refuse(s, rq, ERROR_LIMIT, "fewer workers, or a greater sessions_per_uid", "all %" PRIu64 " sessions of uid %u are taken",
               d->options.sessions_per_uid, s->uid);
    else
        return true;
    return false;
}

void request_hello(struct session *s, const struct request *rq)
{
    const Kvd__V1__Hello *m = rq->message;
    struct daemon *d = s->daemon;
    Kvd__V1__HelloReply out = KVD__V1__HELLO_REPLY__INIT;
    struct tenant *t;
    struct peer peer;
    int fds[2], r;

    peer_read(s->fd, s->uid, &peer);
    s->admin = peer_is_admin(&peer, &d->options);
    t = tenants_match(d->tenants, s->uid, peer.gids, peer.n_gids);
    if (!hello_allowed(s, rq, m, t))
        return;
    copy_name(s, m->name);
    if (!m->admin_only) {
        r = give_memory(s, t, fds, &out.index_bytes);
        if (r < 0) {
            log_write(&d->log, LOG_WARNING, "memory for a worker: %s", strerror(-r));
            refuse(s, rq, ERROR_FULL, "fewer workers, or more memory and descriptors for the daemon",
                   "the daemon has no memory or descriptors for a worker's page");
            return;
        }
        out.page_bytes = s->page.bytes;
        out.epoch = cache_epoch(t->cache);
        out.tenant = t->name;
        out.staging_max_bytes = d->options.staging_bytes;
        out.publish_max_blocks = (uint32_t)d->options.publish_blocks;
    }
    session_ready(s);
    out.version = MESSAGES_VERSION;
    out.worker = s->worker;
    out.server = (char *)(PACKAGE_NAME " " PACKAGE_VERSION);
    out.admin = s->admin;
    log_write(&d->log, LOG_DEBUG, "worker %" PRIu64 " (%s, pid %d, uid %u) attached to %s", s->worker, s->name, s->pid, s->uid,
              m->admin_only ? "admin" : t->name);
    reply(s, rq->type, rq->id, &out.base, fds, m->admin_only ? 0 : 2);
}

/* ---- spaces ---- */

static int convert_layers(const Kvd__V1__Space *m, struct space_layer_desc *layers)
{
    for (size_t i = 0; i < m->n_layer; i++) {
        const Kvd__V1__Layer *l = m->layer[i];

        layers[i] = (struct space_layer_desc){.n_kv_heads = l->n_kv_heads,
                                              .dim_k = l->dim_k,
                                              .dim_v = l->dim_v,
                                              .group = l->group,
                                              .codec_k = l->codec_k,
                                              .codec_v = l->codec_v,
                                              .codec_first_k = l->codec_first_k,
                                              .codec_first_v = l->codec_first_v};
    }
    return 0;
}

/* Opens the space in the tenant's cache. Errors as cache_space_open(), with a reason. */
static int open_space(struct session *s, const Kvd__V1__Space *m, struct space **ret, const char **ret_reason)
{
    struct space_layer_desc *layers;
    uint32_t windows[SPACE_GROUPS_MAX];
    enum codec_dtype dtype;
    struct space_desc desc;
    int r;

    *ret_reason = "dtype is not known; allowed: f16, bf16, f32";
    if (codec_dtype_parse(m->dtype, &dtype) < 0)
        return -EINVAL;
    *ret_reason = "groups or layers are too many; allowed: 1 to 16 groups, 1 to 1024 layers";
    if (m->n_group > SPACE_GROUPS_MAX || m->n_layer > SPACE_LAYERS_MAX)
        return -EINVAL;
    layers = calloc(m->n_layer ? m->n_layer : 1, sizeof(*layers));
    *ret_reason = "the daemon has no memory for it";
    if (!layers)
        return -ENOMEM;
    convert_layers(m, layers);
    for (size_t i = 0; i < m->n_group; i++)
        windows[i] = m->group[i]->window_tokens;
    desc = (struct space_desc){.model = m->model,
                               .revision = m->revision,
                               .rope = m->rope,
                               .shard = m->shard,
                               .dtype = (uint8_t)dtype,
                               .block_tokens = m->block_tokens,
                               .vocab_tokens = m->vocab_tokens,
                               .digest_bytes = m->digest_bytes,
                               .window_tokens = windows,
                               .n_groups = (uint32_t)m->n_group,
                               .layers = layers,
                               .n_layers = (uint32_t)m->n_layer};
    r = cache_space_open(s->tenant->cache, &desc, ret, ret_reason);
    free(layers);
    return r;
}

/* Notes that this session has it open. */
static int note_space(struct session *s, struct space *space)
{
    struct session_space *grown;

    for (uint32_t i = 0; i < s->n_spaces; i++)
        if (s->spaces[i].space == space) {
            if (s->spaces[i].n_open == UINT32_MAX)
                return -ENOSPC;
            s->spaces[i].n_open++;
            return 0;
        }
    grown = realloc(s->spaces, (s->n_spaces + 1) * sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    s->spaces = grown;
    s->spaces[s->n_spaces++] = (struct session_space){.space = space, .n_open = 1};
    return 0;
}

static void reply_space(struct session *s, const struct request *rq, const struct space *space)
{
    Kvd__V1__SpaceReply out = KVD__V1__SPACE_REPLY__INIT;
    uint64_t plain[SPACE_GROUPS_MAX], first[SPACE_GROUPS_MAX];

    for (uint32_t g = 0; g < space->n_groups; g++) {
        plain[g] = space_layout(space, g, false)->bytes;
        first[g] = space_layout(space, g, true)->bytes;
    }
    out.space = space->id;
    out.fingerprint = (ProtobufCBinaryData){.len = KEY_BYTES, .data = (uint8_t *)space->fingerprint};
    out.n_payload_bytes = out.n_first_payload_bytes = space->n_groups;
    out.payload_bytes = plain;
    out.first_payload_bytes = first;
    reply(s, rq->type, rq->id, &out.base, NULL, 0);
}

void request_space_open(struct session *s, const struct request *rq)
{
    const char *reason = "the layout cannot be represented";
    struct space *space;
    int r = open_space(s, rq->message, &space, &reason);

    if (r == 0) {
        r = note_space(s, space);
        if (r == 0) {
            s->daemon->metrics.spaces_opened++;
            reply_space(s, rq, space);
            return;
        }
        cache_space_close(s->tenant->cache, space);
    }
    if (r == -ENOSPC)
        reply_error(s, rq->id, ERROR_LIMIT, "spaces that are there, or a greater spaces_max", "tenant %s has its %" PRIu64 " spaces",
                    s->tenant->name, s->daemon->options.spaces_max);
    else
        reply_error(s, rq->id, r == -ENOMEM ? ERROR_FULL : ERROR_LAYOUT, "", "%s",
                    r == -ENOMEM ? "the daemon has no memory for it" : reason);
}

void request_space_close(struct session *s, const struct request *rq)
{
    const Kvd__V1__SpaceClose *m = rq->message;
    struct session_space *open = session_space(s, m->space);

    if (!open) {
        reply_error(s, rq->id, ERROR_SPACE, "one that SPACE_OPEN gave", "space %u is not open here", m->space);
        return;
    }
    cache_space_close(s->tenant->cache, open->space);
    open->n_open--;
    reply(s, rq->type, rq->id, NULL, NULL, 0);
}

void request_slab_get(struct session *s, const struct request *rq)
{
    const Kvd__V1__SlabGet *m = rq->message;
    Kvd__V1__SlabReply out = KVD__V1__SLAB_REPLY__INIT;
    int fd = cache_slab_fd(s->tenant->cache, m->slab, &out.bytes);

    if (fd < 0) {
        reply_error(s, rq->id, ERROR_NOT_FOUND, "a slab that an index entry names", "there is no slab %u (any more)", m->slab);
        return;
    }
    fd = reopen_read_only(fd);
    if (fd < 0) {
        reply_error(s, rq->id, ERROR_LIMIT, "", "the daemon has no descriptor for slab %u: %s", m->slab, strerror(-fd));
        return;
    }
    out.slab = m->slab;
    reply(s, rq->type, rq->id, &out.base, &fd, 1);
    close(fd);
}

/* ---- staging ---- */

void request_staging_add(struct session *s, const struct request *rq)
{
    const Kvd__V1__StagingAdd *m = rq->message;
    const struct options *o = &s->daemon->options;
    Kvd__V1__StagingReply out = KVD__V1__STAGING_REPLY__INIT;
    struct staging *staging, **grown;
    const char *reason;

    if (m->bytes > o->staging_bytes || s->staging_bytes > o->staging_bytes - m->bytes || s->n_stagings >= o->stagings) {
        reply_error(s, rq->id, ERROR_LIMIT, "what the options staging_bytes and stagings say",
                    "staging of %" PRIu64 " bytes on top of %" PRIu64 " in %u, and at most %" PRIu64 " in %" PRIu64 " are allowed",
                    m->bytes, s->staging_bytes, s->n_stagings, o->staging_bytes, o->stagings);
        return;
    }
    grown = realloc(s->stagings, (s->n_stagings + 1) * sizeof(*grown));
    if (grown)
        s->stagings = grown;
    if (!grown || staging_create(rq->fds[0], m->bytes, s->last_staging + 1, &s->daemon->staging_bytes, &staging, &reason) < 0) {
        reply_error(s, rq->id, ERROR_STAGING, "", "%s", grown ? reason : "the daemon has no memory for it");
        return;
    }
    s->stagings[s->n_stagings++] = staging;
    s->staging_bytes += m->bytes;
    out.staging = s->last_staging = staging->id;
    reply(s, rq->type, rq->id, &out.base, NULL, 0);
}

struct staging *session_staging(const struct session *s, uint32_t id)
{
    for (uint32_t i = 0; i < s->n_stagings; i++)
        if (s->stagings[i]->id == id && !s->stagings[i]->drop_request)
            return s->stagings[i];
    return NULL;
}

void session_staging_idle(struct session *s, struct staging *staging)
{
    uint32_t id = staging->drop_request;

    if (!id || staging->n_refs > 1)
        return;
    for (uint32_t i = 0; i < s->n_stagings; i++)
        if (s->stagings[i] == staging)
            s->stagings[i] = s->stagings[--s->n_stagings];
    s->staging_bytes -= staging->bytes;
    staging_unref(staging);
    reply(s, FRAME_STAGING_DROP, id, NULL, NULL, 0);
}

void request_staging_drop(struct session *s, const struct request *rq)
{
    const Kvd__V1__StagingDrop *m = rq->message;
    struct staging *staging = session_staging(s, m->staging);

    if (!staging) {
        reply_error(s, rq->id, ERROR_STAGING, "one that STAGING_ADD gave", "there is no staging %u", m->staging);
        return;
    }
    staging->drop_request = rq->id; /* answered when no publish reads it any more; until then it counts */
    session_staging_idle(s, staging);
}
