/* LIST: spaces, blocks, workers and tenants, a page at a time. A page is bounded by time as well as by size, so it may come
 * short, or even empty, with more to follow: next says so. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/admin.h"
#include "daemon/daemon.h"
#include "daemon/request.h"
#include "daemon/session.h"
#include "daemon/tenants.h"
#include "daemon/walk.h"

enum { PAGE_MAX = 128, BLOCKS_TURN_USEC = 2000, SPACE_TEXTS = 4 };

struct page {
    struct session *session;
    const struct request *rq;
    struct selector selector;
    uint64_t cursor;
    uint32_t limit;
    Kvd__V1__ListReply out;
};

static void page_send(struct page *p)
{
    reply(p->session, p->rq->type, p->rq->id, &p->out.base, NULL, 0);
}

static uint64_t cursor_of(uint32_t tenant, uint32_t at)
{
    return (uint64_t)tenant << 32 | at;
}

/* The first selected tenant at or after id; *at is only good for the tenant that the cursor names. */
static struct tenant *tenant_at(const struct page *p, uint32_t id, uint32_t *at)
{
    struct tenant *t = tenants_from(p->session->daemon->tenants, id);

    while (t && !selector_has_tenant(&p->selector, t))
        t = tenants_from(p->session->daemon->tenants, t->id + 1);
    if (t && t->id != id)
        *at = 0;
    return t;
}

/* ---- blocks ---- */

void block_info(const struct tenant *t, const struct cache_entry_info *info, Kvd__V1__BlockInfo *b)
{
    b->tenant = t->name;
    b->space = info->space;
    b->key = (ProtobufCBinaryData){.len = KEY_BYTES, .data = (uint8_t *)info->key};
    b->parent = (ProtobufCBinaryData){.len = KEY_BYTES, .data = (uint8_t *)info->parent};
    b->group = info->group;
    b->first = info->first;
    b->bytes = info->bytes;
    b->crc32c = info->crc32c;
    b->children = info->n_children;
    b->leases = info->n_leases;
    b->pins = info->n_pins;
    b->idle_usec = info->idle_usec;
    b->age_usec = info->age_usec;
    b->tier = (char *)"host";
}

static void list_blocks(struct page *p)
{
    static const Kvd__V1__BlockInfo empty = KVD__V1__BLOCK_INFO__INIT;
    struct cache_entry_info info[PAGE_MAX];
    Kvd__V1__BlockInfo blocks[PAGE_MAX], *list[PAGE_MAX];
    uint64_t until = daemon_now_usec() + BLOCKS_TURN_USEC;
    uint32_t id = (uint32_t)(p->cursor >> 32), at = (uint32_t)p->cursor;
    struct tenant *t = tenant_at(p, id ? id : 1, &at);
    bool late = false;
    size_t n = 0;

    for (uint32_t looked = 1; t; looked++) {
        if (at >= cache_n_entries(t->cache)) {
            t = tenant_at(p, t->id + 1, &at);
            at = 0;
            continue;
        }
        if (n == p->limit || late || (looked % 64 == 0 && daemon_now_usec() > until)) {
            p->out.next = cursor_of(t->id, at);
            break;
        }
        /* The brief form first: counting leases reads all lease tables. */
        if (!cache_entry_brief(t->cache, at++, &info[n]) || !selector_has(&p->selector, t, &info[n]))
            continue;
        cache_entry_info(t->cache, at - 1, &info[n]);
        late = daemon_now_usec() > until;
        blocks[n] = empty;
        block_info(t, &info[n], &blocks[n]);
        list[n] = &blocks[n];
        n++;
    }
    p->out.n_block = n;
    p->out.block = list;
    page_send(p);
}

/* ---- spaces ---- */

struct space_text {
    char text[SPACE_TEXTS][CODEC_TEXT_MAX];
};

/* A space's message with all that hangs on it, in one piece of memory each. */
struct space_message {
    Kvd__V1__SpaceInfo info;
    Kvd__V1__Space space;
    Kvd__V1__Group groups[SPACE_GROUPS_MAX], *group_list[SPACE_GROUPS_MAX];
    Kvd__V1__Layer *layers, **layer_list;
    struct space_text *texts;
};

static void space_message_deinit(struct space_message *m)
{
    free(m->layers);
    free(m->layer_list);
    free(m->texts);
}

static void fill_layer(const struct payload_layer *from, struct space_text *texts, Kvd__V1__Layer *l)
{
    const struct codec_spec *specs[SPACE_TEXTS] = {&from->k, &from->v, &from->first_k, &from->first_v};
    char **fields[SPACE_TEXTS] = {&l->codec_k, &l->codec_v, &l->codec_first_k, &l->codec_first_v};

    kvd__v1__layer__init(l);
    l->n_kv_heads = from->n_kv_heads;
    l->dim_k = from->dim_k;
    l->dim_v = from->dim_v;
    l->group = from->group;
    for (int i = 0; i < SPACE_TEXTS; i++)
        if (specs[i]->id)
            *fields[i] = codec_spec_format(specs[i], texts->text[i]);
}

static int space_message_init(struct space_message *m, const struct tenant *t, const struct space *space)
{
    struct cache_space_stats stats;

    memset(m, 0, sizeof(*m));
    m->layers = calloc(space->n_layers, sizeof(*m->layers));
    m->layer_list = calloc(space->n_layers, sizeof(*m->layer_list));
    m->texts = calloc(space->n_layers, sizeof(*m->texts));
    if (!m->layers || !m->layer_list || !m->texts) {
        space_message_deinit(m);
        return -ENOMEM;
    }
    kvd__v1__space_info__init(&m->info);
    kvd__v1__space__init(&m->space);
    m->space.model = space->model;
    m->space.revision = space->revision;
    m->space.rope = space->rope;
    m->space.shard = space->shard;
    m->space.dtype = (char *)codec_dtype_name(space->dtype);
    m->space.block_tokens = space->block_tokens;
    m->space.vocab_tokens = space->vocab_tokens;
    m->space.digest_bytes = space->digest_bytes;
    for (uint32_t g = 0; g < space->n_groups; g++) {
        kvd__v1__group__init(&m->groups[g]);
        m->groups[g].window_tokens = space->window_tokens[g];
        m->group_list[g] = &m->groups[g];
    }
    for (uint32_t i = 0; i < space->n_layers; i++) {
        fill_layer(&space->layers[i], &m->texts[i], &m->layers[i]);
        m->layer_list[i] = &m->layers[i];
    }
    m->space.n_group = space->n_groups;
    m->space.group = m->group_list;
    m->space.n_layer = space->n_layers;
    m->space.layer = m->layer_list;
    cache_space_stats(t->cache, space, &stats);
    m->info.tenant = t->name;
    m->info.id = space->id;
    m->info.fingerprint = (ProtobufCBinaryData){.len = KEY_BYTES, .data = (uint8_t *)space->fingerprint};
    m->info.space = &m->space;
    m->info.blocks = stats.n_blocks;
    m->info.bytes = stats.bytes;
    m->info.open = stats.n_open;
    return 0;
}

/* One space a page: a description may fill a frame. One that would not fit is shown without its last layers. */
static void list_spaces(struct page *p)
{
    uint32_t id = (uint32_t)(p->cursor >> 32), at = (uint32_t)p->cursor;
    struct tenant *t = tenant_at(p, id ? id : 1, &at);
    const struct selector *sel = &p->selector;
    Kvd__V1__SpaceInfo *list[1];
    struct space_message m;

    for (; t; t = tenant_at(p, t->id + 1, &at), at = 0)
        for (const struct space *space; (space = cache_space_find(t->cache, at + 1)); at++) {
            if ((sel->space && sel->space != space->id) || (*sel->model && strcmp(sel->model, space->model) != 0))
                continue;
            if (space_message_init(&m, t, space) < 0) {
                reply_error(p->session, p->rq->id, ERROR_FULL, "", "the daemon has no memory for this request");
                return;
            }
            while (m.space.n_layer && kvd__v1__space_info__get_packed_size(&m.info) > FRAME_BODY_MAX - 64)
                m.space.n_layer -= (m.space.n_layer + 7) / 8;
            list[0] = &m.info;
            p->out.n_space = 1;
            p->out.space = list;
            p->out.next = cursor_of(t->id, at + 1);
            page_send(p);
            space_message_deinit(&m);
            return;
        }
    page_send(p);
}

/* ---- workers and tenants ---- */

static void worker_info(struct session *s, Kvd__V1__WorkerInfo *w)
{
    kvd__v1__worker_info__init(w);
    w->worker = s->worker;
    w->name = s->name;
    w->tenant = s->tenant ? s->tenant->name : (char *)"";
    w->pid = s->pid;
    w->uid = s->uid;
    w->age_usec = daemon_now_usec() - s->born_usec;
    w->staging_bytes = s->staging_bytes;
    w->jobs = s->n_jobs;
    if (!s->page.map)
        return;
    session_count(s);
    w->leases = cache_page_leases(s->tenant->cache, &s->cache_page);
    w->hits = s->seen.hits;
    w->lookups = s->seen.lookups;
}

/* The attached session with the smallest number above worker. */
static struct session *session_after(const struct page *p, uint64_t worker)
{
    struct session *best = NULL;

    for (struct session *s = p->session->daemon->sessions; s; s = s->next)
        if (s->state == SESSION_READY && s->worker > worker && (!best || s->worker < best->worker) &&
            (!*p->selector.tenant || (s->tenant && selector_has_tenant(&p->selector, s->tenant))))
            best = s;
    return best;
}

static void list_workers(struct page *p)
{
    Kvd__V1__WorkerInfo workers[PAGE_MAX], *list[PAGE_MAX];
    uint64_t last = p->cursor;
    struct session *s;
    size_t n = 0;

    for (; n < p->limit && (s = session_after(p, last)); n++) {
        worker_info(s, &workers[n]);
        list[n] = &workers[n];
        last = s->worker;
    }
    p->out.n_worker = n;
    p->out.worker = list;
    p->out.next = n && session_after(p, last) ? last : 0;
    page_send(p);
}

static void list_tenants(struct page *p)
{
    Kvd__V1__TenantInfo tenants[PAGE_MAX], *list[PAGE_MAX];
    uint32_t unused = 0;
    struct tenant *t = tenant_at(p, (uint32_t)p->cursor ? (uint32_t)p->cursor : 1, &unused);
    size_t n = 0;

    for (; t && n < p->limit; t = tenant_at(p, t->id + 1, &unused), n++) {
        struct cache_stats stats;

        cache_stats(t->cache, &stats);
        kvd__v1__tenant_info__init(&tenants[n]);
        tenants[n].name = t->name;
        tenants[n].blocks = stats.n_valid;
        tenants[n].bytes = stats.bytes_used;
        tenants[n].quota_bytes = stats.quota_bytes;
        tenants[n].workers = t->n_sessions;
        tenants[n].spaces = stats.n_spaces;
        tenants[n].slabs = (uint32_t)stats.n_slabs;
        list[n] = &tenants[n];
    }
    p->out.n_tenant = n;
    p->out.tenant = list;
    p->out.next = t ? t->id : 0;
    page_send(p);
}

void request_list(struct session *s, const struct request *rq)
{
    static const struct {
        const char *what;
        void (*list)(struct page *p);
    } lists[] = {{"blocks", list_blocks}, {"spaces", list_spaces}, {"workers", list_workers}, {"tenants", list_tenants}};
    const Kvd__V1__List *m = rq->message;
    struct page page = {.session = s, .rq = rq, .cursor = m->cursor, .limit = m->limit, .out = KVD__V1__LIST_REPLY__INIT};

    if (page.limit == 0 || page.limit > PAGE_MAX)
        page.limit = PAGE_MAX;
    if (!selector_take(s, rq, m->selector, &page.selector))
        return;
    for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]); i++)
        if (strcmp(m->what, lists[i].what) == 0) {
            lists[i].list(&page);
            return;
        }
    reply_error(s, rq->id, ERROR_NOT_FOUND, "blocks, spaces, workers, tenants", "there is no list of \"%.40s\"", m->what);
}
