/* Admin calls: a message there, a message back. */
#include <stdlib.h>
#include <string.h>

#include "kvd_impl.h"
#include "proto/kvd.pb-c.h"

#define PAGE_ITEMS 256u
/* Verifying reads every selected byte, evicting may walk a large index: they may take longer than a session's
 * timeout. */
#define LONG_MSEC 600000u

static int check_session(const struct kvd *s)
{
    if (!s)
        return error_set(0, KVD_E_ARG, "session is NULL");
    return session_forked(s) ? session_error_forked(s) : 0;
}

/* Packs m, asks, and unpacks the answer, which the caller frees with protobuf_c_message_free_unpacked(). answer
 * NULL: none is expected. */
static int ask(struct kvd *s, uint16_t type, const ProtobufCMessage *m, const ProtobufCMessageDescriptor *answer,
               uint32_t timeout_msec, void *ret)
{
    struct mux_reply reply = {0};
    ProtobufCMessage *a;
    size_t n = protobuf_c_message_get_packed_size(m);
    uint8_t *body = malloc(n ? n : 1);
    int r;

    if (!body)
        return error_set(s->cookie, KVD_E_NOMEM, "no memory for a request");
    protobuf_c_message_pack(m, body);
    r = session_request(s, type, body, n, timeout_msec, &reply);
    free(body);
    if (r == 0 && answer) {
        a = protobuf_c_message_unpack(answer, NULL, reply.n, reply.body);
        if (a)
            *(ProtobufCMessage **)ret = a;
        else
            r = error_set(s->cookie, KVD_E_PROTOCOL, "an answer cannot be read as %s", answer->name);
    }
    mux_reply_clear(&reply);
    return r;
}

static void fill_selector(const struct kvd_selector *from, Kvd__V1__Selector *to)
{
    kvd__v1__selector__init(to);
    if (!from)
        return;
    to->tenant = (char *)(from->tenant ? from->tenant : "");
    to->model = (char *)(from->model ? from->model : "");
    to->space = from->space;
    to->key.data = (uint8_t *)from->key;
    to->key.len = from->key ? from->n_key : 0;
    to->idle_usec = from->idle_usec;
    to->age_usec = from->age_usec;
}

int kvd_admin_stats(kvd *session, int (*each)(void *ctx, const struct kvd_metric *), void *ctx)
{
    Kvd__V1__Stats m = KVD__V1__STATS__INIT;
    Kvd__V1__StatsReply *a;
    int r = check_session(session), stop = 0;

    if (r == 0)
        r = ask(session, FRAME_STATS, &m.base, &kvd__v1__stats_reply__descriptor, session->timeout_msec, &a);
    if (r != 0)
        return r;
    for (size_t i = 0; i < a->n_metric && !stop; i++) {
        const Kvd__V1__Metric *x = a->metric[i];
        struct kvd_metric metric = {x->name, x->help, x->unit, x->label, x->counter, x->value};

        stop = each(ctx, &metric);
    }
    kvd__v1__stats_reply__free_unpacked(a, NULL);
    return KVD_OK;
}

/* ---- Lists ---- */

static void copy_key(uint8_t to[KVD_KEY_BYTES], const ProtobufCBinaryData *from)
{
    memset(to, 0, KVD_KEY_BYTES);
    memcpy(to, from->data, from->len < KVD_KEY_BYTES ? from->len : KVD_KEY_BYTES);
}

static void fill_block(const Kvd__V1__BlockInfo *x, struct kvd_block_info *b)
{
    *b = (struct kvd_block_info){
        .tenant = x->tenant,
        .tier = x->tier,
        .space = x->space,
        .group = x->group,
        .first = x->first,
        .bytes = x->bytes,
        .crc32c = x->crc32c,
        .children = x->children,
        .leases = x->leases,
        .pins = x->pins,
        .idle_usec = x->idle_usec,
        .age_usec = x->age_usec,
    };
    copy_key(b->key, &x->key);
    copy_key(b->parent, &x->parent);
}

struct each {
    int (*block)(void *, const struct kvd_block_info *);
    int (*space)(void *, const struct kvd_space_info *);
    int (*worker)(void *, const struct kvd_worker_info *);
    int (*tenant)(void *, const struct kvd_tenant_info *);
    void *ctx;
};

/* What most layers have, or "mixed". */
static const char *common_codec(const Kvd__V1__Space *s, bool v)
{
    const char *name = "";

    for (size_t i = 0; i < s->n_layer; i++) {
        const char *here = v ? s->layer[i]->codec_v : s->layer[i]->codec_k;

        if (v && s->layer[i]->dim_v == 0)
            continue;
        if (name[0] && strcmp(name, here) != 0)
            return "mixed";
        name = here;
    }
    return name;
}

static int give_space(const struct each *each, const Kvd__V1__SpaceInfo *x)
{
    static const Kvd__V1__Space none = KVD__V1__SPACE__INIT;
    const Kvd__V1__Space *d = x->space ? x->space : &none;
    struct kvd_space_info info = {
        .tenant = x->tenant,
        .model = d->model,
        .revision = d->revision,
        .shard = d->shard,
        .dtype = d->dtype,
        .codec_k = common_codec(d, false),
        .codec_v = common_codec(d, true),
        .id = x->id,
        .block_tokens = d->block_tokens,
        .n_layers = (uint32_t)d->n_layer,
        .n_groups = (uint32_t)d->n_group,
        .open = x->open,
        .blocks = x->blocks,
        .bytes = x->bytes,
    };

    copy_key(info.fingerprint, &x->fingerprint);
    return each->space(each->ctx, &info);
}

static int give_worker(const struct each *each, const Kvd__V1__WorkerInfo *x)
{
    struct kvd_worker_info info = {
        .name = x->name,
        .tenant = x->tenant,
        .worker = x->worker,
        .leases = x->leases,
        .staging_bytes = x->staging_bytes,
        .age_usec = x->age_usec,
        .hits = x->hits,
        .lookups = x->lookups,
        .jobs = x->jobs,
        .pid = x->pid,
        .uid = x->uid,
    };

    return each->worker(each->ctx, &info);
}

static int give_tenant(const struct each *each, const Kvd__V1__TenantInfo *x)
{
    struct kvd_tenant_info info = {
        .name = x->name,
        .blocks = x->blocks,
        .bytes = x->bytes,
        .quota_bytes = x->quota_bytes,
        .workers = x->workers,
        .spaces = x->spaces,
        .slabs = x->slabs,
    };

    return each->tenant(each->ctx, &info);
}

/* Returns non-zero when each() wants no more. */
static int give_page(const struct each *each, const Kvd__V1__ListReply *a)
{
    struct kvd_block_info block;
    int stop = 0;

    for (size_t i = 0; each->block && i < a->n_block && !stop; i++) {
        fill_block(a->block[i], &block);
        stop = each->block(each->ctx, &block);
    }
    for (size_t i = 0; each->space && i < a->n_space && !stop; i++)
        stop = give_space(each, a->space[i]);
    for (size_t i = 0; each->worker && i < a->n_worker && !stop; i++)
        stop = give_worker(each, a->worker[i]);
    for (size_t i = 0; each->tenant && i < a->n_tenant && !stop; i++)
        stop = give_tenant(each, a->tenant[i]);
    return stop;
}

static int list(struct kvd *s, const char *what, const struct kvd_selector *selector, const struct each *each)
{
    Kvd__V1__List m = KVD__V1__LIST__INIT;
    Kvd__V1__Selector sel;
    int r = check_session(s), stop = 0;

    if (r != 0)
        return r;
    fill_selector(selector, &sel);
    m.what = (char *)what;
    m.selector = &sel;
    m.limit = PAGE_ITEMS;
    do {
        Kvd__V1__ListReply *a;

        r = ask(s, FRAME_LIST, &m.base, &kvd__v1__list_reply__descriptor, s->timeout_msec, &a);
        if (r != 0)
            return r;
        stop = give_page(each, a);
        m.cursor = a->next;
        kvd__v1__list_reply__free_unpacked(a, NULL);
    } while (m.cursor && !stop);
    return KVD_OK;
}

int kvd_admin_blocks(kvd *session, const struct kvd_selector *selector,
                     int (*each)(void *ctx, const struct kvd_block_info *), void *ctx)
{
    return list(session, "blocks", selector, &(struct each){.block = each, .ctx = ctx});
}

int kvd_admin_spaces(kvd *session, const struct kvd_selector *selector,
                     int (*each)(void *ctx, const struct kvd_space_info *), void *ctx)
{
    return list(session, "spaces", selector, &(struct each){.space = each, .ctx = ctx});
}

int kvd_admin_workers(kvd *session, int (*each)(void *ctx, const struct kvd_worker_info *), void *ctx)
{
    return list(session, "workers", NULL, &(struct each){.worker = each, .ctx = ctx});
}

int kvd_admin_tenants(kvd *session, int (*each)(void *ctx, const struct kvd_tenant_info *), void *ctx)
{
    return list(session, "tenants", NULL, &(struct each){.tenant = each, .ctx = ctx});
}

/* ---- Single requests ---- */

int kvd_admin_show(kvd *session, const struct kvd_selector *selector,
                   int (*each)(void *ctx, const struct kvd_block_info *), void *ctx)
{
    Kvd__V1__Show m = KVD__V1__SHOW__INIT;
    Kvd__V1__Selector sel;
    Kvd__V1__ListReply *a;
    int r = check_session(session), stop = 0;

    fill_selector(selector, &sel);
    m.selector = &sel;
    if (r == 0)
        r = ask(session, FRAME_SHOW, &m.base, &kvd__v1__list_reply__descriptor, session->timeout_msec, &a);
    if (r != 0)
        return r;
    for (size_t i = 0; i < a->n_block && !stop; i++) {
        struct kvd_block_info block;

        fill_block(a->block[i], &block);
        stop = each(ctx, &block);
    }
    kvd__v1__list_reply__free_unpacked(a, NULL);
    return KVD_OK;
}

int kvd_admin_evict(kvd *session, const struct kvd_selector *selector, uint64_t max_bytes, int dry_run,
                    struct kvd_evict_result *ret)
{
    Kvd__V1__Evict m = KVD__V1__EVICT__INIT;
    Kvd__V1__Selector sel;
    Kvd__V1__EvictReply *a;
    int r = check_session(session);

    fill_selector(selector, &sel);
    m.selector = &sel;
    m.max_bytes = max_bytes;
    m.dry_run = dry_run != 0;
    if (r == 0)
        r = ask(session, FRAME_EVICT, &m.base, &kvd__v1__evict_reply__descriptor, LONG_MSEC, &a);
    if (r != 0)
        return r;
    *ret = (struct kvd_evict_result){a->blocks, a->bytes, a->kept_leased, a->kept_pinned, a->kept_parents};
    kvd__v1__evict_reply__free_unpacked(a, NULL);
    return KVD_OK;
}

int kvd_admin_pin(kvd *session, const struct kvd_selector *selector, int unpin, uint64_t *ret_blocks,
                  uint64_t *ret_bytes)
{
    Kvd__V1__Pin m = KVD__V1__PIN__INIT;
    Kvd__V1__Selector sel;
    Kvd__V1__PinReply *a;
    int r = check_session(session);

    fill_selector(selector, &sel);
    m.selector = &sel;
    m.unpin = unpin != 0;
    if (r == 0)
        r = ask(session, FRAME_PIN, &m.base, &kvd__v1__pin_reply__descriptor, session->timeout_msec, &a);
    if (r != 0)
        return r;
    if (ret_blocks)
        *ret_blocks = a->blocks;
    if (ret_bytes)
        *ret_bytes = a->bytes;
    kvd__v1__pin_reply__free_unpacked(a, NULL);
    return KVD_OK;
}

int kvd_admin_verify(kvd *session, const struct kvd_selector *selector, struct kvd_verify_result *ret)
{
    Kvd__V1__Verify m = KVD__V1__VERIFY__INIT;
    Kvd__V1__Selector sel;
    Kvd__V1__VerifyReply *a;
    int r = check_session(session);

    fill_selector(selector, &sel);
    m.selector = &sel;
    if (r == 0)
        r = ask(session, FRAME_VERIFY, &m.base, &kvd__v1__verify_reply__descriptor, LONG_MSEC, &a);
    if (r != 0)
        return r;
    *ret = (struct kvd_verify_result){.blocks = a->blocks, .bytes = a->bytes, .n_bad = a->bad_blocks};
    for (size_t i = 0; i < a->n_bad && i < sizeof(ret->bad) / sizeof(ret->bad[0]); i++) {
        copy_key(ret->bad[i], &a->bad[i]);
        ret->n_keys++;
    }
    kvd__v1__verify_reply__free_unpacked(a, NULL);
    return KVD_OK;
}

int kvd_admin_drain(kvd *session, int undo)
{
    Kvd__V1__Drain m = KVD__V1__DRAIN__INIT;
    int r = check_session(session);

    m.undo = undo != 0;
    return r != 0 ? r : ask(session, FRAME_DRAIN, &m.base, NULL, session->timeout_msec, NULL);
}

int kvd_admin_config(kvd *session, const char *name, const char *value,
                     int (*each)(void *ctx, const struct kvd_option_info *), void *ctx)
{
    Kvd__V1__Config m = KVD__V1__CONFIG__INIT;
    Kvd__V1__ConfigReply *a;
    int r = check_session(session), stop = 0;

    m.name = (char *)(name ? name : "");
    m.value = (char *)(value ? value : "");
    m.set = value != NULL;
    if (r == 0)
        r = ask(session, FRAME_CONFIG, &m.base, &kvd__v1__config_reply__descriptor, session->timeout_msec, &a);
    if (r != 0)
        return r;
    for (size_t i = 0; each && i < a->n_option && !stop; i++) {
        const Kvd__V1__Option *x = a->option[i];
        struct kvd_option_info option = {x->name,    x->value,         x->unit, x->minimum,
                                         x->maximum, x->default_value, x->help, x->live};

        stop = each(ctx, &option);
    }
    kvd__v1__config_reply__free_unpacked(a, NULL);
    return KVD_OK;
}
