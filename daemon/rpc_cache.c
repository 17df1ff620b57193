/* kvd.v1.Cache: spaces, matches and what they hold. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/prefix.h"
#include "daemon/request.h"
#include "daemon/rpc-internal.h"
#include "daemon/tenants.h"
#include "proto/frame.h"
#include "proto/kvd.pb-c.h"

/* Up to so many keys are hashed where they come, a helper does more. */
enum { HASH_INLINE = 16 };

/* ---- spaces ---- */

void rpc_open_space(struct rpc_call *c)
{
    struct session *s = c->conn->session;

    if (s->daemon->draining && s->n_spaces == 0)
        rpc_fail(c, ERROR_DRAINING, "later, or another daemon", "the daemon takes no new workers");
    else
        request_handle(s, FRAME_SPACE_OPEN, rpc_ask(c), c->message);
}

/* ---- matched prefixes ---- */

struct rpc_prefixes {
    struct named_prefix {
        uint64_t id;
        struct prefix *prefix;
    } *list;
    uint32_t n, room;
    uint64_t last_id;
    uint64_t n_held;
};

struct prefix *rpc_prefix_find(struct rpc_conn *conn, uint64_t id)
{
    struct rpc_prefixes *all = conn->prefixes;

    for (uint32_t i = 0; all && id && i < all->n; i++)
        if (all->list[i].id == id)
            return all->list[i].prefix;
    return NULL;
}

void rpc_prefixes_drop(struct rpc_conn *conn)
{
    struct rpc_prefixes *all = conn->prefixes;

    if (!all)
        return;
    for (uint32_t i = 0; i < all->n; i++)
        prefix_unref(all->list[i].prefix);
    free(all->list);
    free(all);
    conn->prefixes = NULL;
}

uint64_t rpc_prefixes_held(const struct rpc_conn *conn)
{
    return conn->prefixes ? conn->prefixes->n_held : 0;
}

/* Makes room for one more. */
static int prefixes_grow(struct rpc_conn *conn)
{
    struct rpc_prefixes *all = conn->prefixes;
    struct named_prefix *grown;
    uint32_t room;

    if (!all)
        all = conn->prefixes = calloc(1, sizeof(*all));
    if (!all)
        return -ENOMEM;
    if (all->n < all->room)
        return 0;
    room = all->room ? all->room * 2 : 8;
    grown = realloc(all->list, room * sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    all->list = grown;
    all->room = room;
    return 0;
}

/* ---- Match ---- */

struct match {
    struct rpc_work work;
    struct daemon *daemon;
    struct tenant *tenant;         /* referenced: it keeps the space while a helper looks at it */
    struct space *space;
    struct key_hasher *hasher;
    size_t n;                      /* whole blocks of the sequence */
    bool failed;
    size_t bad_token;              /* 1 + place of one that is not in the vocabulary; 0: none */
    uint8_t keys[][KEY_BYTES];
};

static void match_end(struct rpc_work *work)
{
    struct match *m = (struct match *)work;

    key_hasher_destroy(m->hasher);
    tenant_unref(m->daemon, m->tenant);
    free(m);
}

/* The keys of all whole blocks. Any thread. */
static void hash(struct match *m, struct key_hasher *hasher, const Kvd__V1__MatchRequest *rq)
{
    uint32_t block_tokens = m->space->block_tokens, vocab = m->space->vocab_tokens;
    size_t x = 0;

    for (size_t i = 0; i < m->n * block_tokens && vocab; i++)
        if (rq->token[i] >= vocab) {
            m->bad_token = i + 1;
            return;
        }
    for (size_t i = 0; i < m->n && !m->failed; i++) {
        const Kvd__V1__Extra *extra = x < rq->n_extra && rq->extra[x]->block == i ? rq->extra[x++] : NULL;

        m->failed = key_block(hasher, i ? m->keys[i - 1] : m->space->fingerprint, rq->token + i * block_tokens, block_tokens,
                              extra ? extra->data.data : NULL, extra ? extra->data.len : 0, m->keys[i]) < 0;
    }
}

static void hash_run(struct job *job)
{
    struct rpc_call *c = rpc_call_of_job(job);
    struct match *m = (struct match *)c->work;

    hash(m, m->hasher, c->message);
}

static void reply_match(struct rpc_call *c, const struct match *m, uint64_t id, const struct prefix *p)
{
    const Kvd__V1__MatchRequest *rq = c->message;
    Kvd__V1__MatchReply out = KVD__V1__MATCH_REPLY__INIT;
    ProtobufCBinaryData *keys = rq->keys ? calloc(m->n ? m->n : 1, sizeof(*keys)) : NULL;

    if (rq->keys && !keys) {
        rpc_fail(c, ERROR_FULL, "", "the daemon has no memory for this reply");
        return;
    }
    for (size_t i = 0; keys && i < m->n; i++)
        keys[i] = (ProtobufCBinaryData){.len = KEY_BYTES, .data = (uint8_t *)m->keys[i]};
    out.prefix = id;
    out.blocks = p ? p->n_blocks : 0;
    out.tokens = (uint64_t)out.blocks * m->space->block_tokens;
    out.n_key = keys ? m->n : 0;
    out.key = keys;
    rpc_answer(c, &out.base, false); /* and m is gone */
    free(keys);
}

/* With the keys: what is there is held from here on. */
static void match_keyed(struct rpc_call *c)
{
    struct match *m = (struct match *)c->work;
    struct rpc_conn *conn = c->conn;
    struct session *s = conn->session;
    struct daemon *d = s->daemon;
    uint64_t held = rpc_prefixes_held(conn), most = d->options.leases, id = 0;
    struct prefix *p = NULL;
    int r;

    if (m->bad_token) {
        rpc_fail(c, ERROR_TOKEN, "tokens below the space's vocab_tokens", "token %zu is not below %" PRIu32, m->bad_token - 1,
                 m->space->vocab_tokens);
        return;
    }
    if (m->failed) {
        rpc_fail(c, ERROR_TOKEN, "extras of at most 4096 bytes", "a block's key cannot be computed");
        return;
    }
    r = prefixes_grow(conn);
    if (r == 0)
        r = prefix_match(d, s->tenant, m->space, m->keys[0], m->n, held < most ? most - held : 0, &p);
    if (r < 0) {
        rpc_fail(c, ERROR_FULL, "", "the daemon has no memory for this match");
        return;
    }
    d->metrics.lookups += m->n;
    if (p) {
        struct rpc_prefixes *all = conn->prefixes;

        d->metrics.hits += p->n_blocks;
        all->list[all->n++] = (struct named_prefix){.id = ++all->last_id, .prefix = p};
        all->n_held += p->n_held;
        id = all->last_id;
    }
    d->metrics.misses += m->n - (p ? p->n_blocks : 0);
    reply_match(c, m, id, p);
}

/* Whole blocks, or SIZE_MAX: answered, the request is wrong. */
static size_t check_match(struct rpc_call *c, const struct space *space)
{
    const Kvd__V1__MatchRequest *rq = c->message;

    if (space->digest_bytes ? rq->n_token || rq->n_extra : rq->n_digest) {
        rpc_fail(c, ERROR_TOKEN, space->digest_bytes ? "digests" : "tokens and extras", "the space's keys come from %s",
                 space->digest_bytes ? "digests" : "tokens");
        return SIZE_MAX;
    }
    for (size_t i = 0; i < rq->n_digest; i++)
        if (rq->digest[i].len != space->digest_bytes) {
            rpc_fail(c, ERROR_TOKEN, "digests of the space's length", "digest %zu has %zu bytes, not %" PRIu32, i, rq->digest[i].len,
                     space->digest_bytes);
            return SIZE_MAX;
        }
    for (size_t i = 0; i < rq->n_extra; i++)
        if ((i && rq->extra[i]->block <= rq->extra[i - 1]->block) || rq->extra[i]->data.len > KEY_EXTRA_MAX) {
            rpc_fail(c, ERROR_TOKEN, "ascending blocks, data of at most 4096 bytes", "extra %zu is for block %" PRIu32 " and has %zu bytes",
                     i, rq->extra[i]->block, rq->extra[i]->data.len);
            return SIZE_MAX;
        }
    return space->digest_bytes ? rq->n_digest : rq->n_token / space->block_tokens;
}

static bool match_allowed(struct rpc_call *c, size_t n)
{
    const struct options *o = &c->conn->session->daemon->options;

    if (n > o->leases)
        rpc_fail(c, ERROR_LIMIT, "what the option leases says", "the sequence has %zu blocks, and %" PRIu64 " can be held", n, o->leases);
    else if (c->conn->prefixes && c->conn->prefixes->n >= o->grpc_prefixes)
        rpc_fail(c, ERROR_LIMIT, "Release, or a greater grpc_prefixes", "this connection holds %" PRIu64 " prefixes already",
                 o->grpc_prefixes);
    else
        return true;
    return false;
}

static void take_digests(struct match *m, const Kvd__V1__MatchRequest *rq)
{
    for (size_t i = 0; i < m->n; i++) {
        memset(m->keys[i], 0, KEY_BYTES);
        memcpy(m->keys[i], rq->digest[i].data, rq->digest[i].len);
    }
}

static void match_next(struct rpc_call *c)
{
    rpc_fail(c, ERROR_PROTOCOL, "one message", "a match is one message");
}

void rpc_match(struct rpc_call *c)
{
    const Kvd__V1__MatchRequest *rq = c->message;
    struct session *s = c->conn->session;
    struct session_space *open = session_space(s, rq->space);
    struct match *m;
    size_t n;

    if (!open) {
        rpc_fail(c, ERROR_SPACE, "one that OpenSpace gave on this connection", "space %" PRIu32 " is not open here", rq->space);
        return;
    }
    n = check_match(c, open->space);
    if (n == SIZE_MAX || !match_allowed(c, n))
        return;
    m = calloc(1, sizeof(*m) + (n ? n : 1) * KEY_BYTES);
    if (!m) {
        rpc_fail(c, ERROR_FULL, "", "the daemon has no memory for this match");
        return;
    }
    *m = (struct match){.work = {.next = match_next, .end = match_end}, .daemon = s->daemon, .tenant = tenant_ref(s->tenant),
                        .space = open->space, .n = n};
    rpc_work_begin(c, &m->work);
    if (open->space->digest_bytes) {
        take_digests(m, rq);
    } else if (n <= HASH_INLINE) {
        hash(m, s->daemon->hasher, rq);
    } else if (key_hasher_create(&m->hasher) < 0) {
        rpc_fail(c, ERROR_FULL, "", "the daemon has no memory for this match");
        return;
    } else {
        rpc_job(c, hash_run, match_keyed);
        return;
    }
    match_keyed(c);
}

/* ---- Release ---- */

static bool release_prefix(struct rpc_call *c, uint64_t id)
{
    struct rpc_prefixes *all = c->conn->prefixes;

    for (uint32_t i = 0; all && i < all->n; i++)
        if (all->list[i].id == id) {
            all->n_held -= all->list[i].prefix->n_held;
            prefix_unref(all->list[i].prefix);
            all->list[i] = all->list[--all->n];
            return true;
        }
    rpc_fail(c, ERROR_NOT_FOUND, "one that Match gave on this connection", "there is no prefix %" PRIu64, id);
    return false;
}

void rpc_release(struct rpc_call *c)
{
    const Kvd__V1__ReleaseRequest *rq = c->message;
    struct session *s = c->conn->session;
    struct session_space *open = rq->space ? session_space(s, rq->space) : NULL;

    if (rq->space && !open) {
        rpc_fail(c, ERROR_SPACE, "one that OpenSpace gave on this connection", "space %" PRIu32 " is not open here", rq->space);
        return;
    }
    if (rq->prefix && !release_prefix(c, rq->prefix))
        return;
    if (open) {
        cache_space_close(s->tenant->cache, open->space);
        open->n_open--;
    }
    rpc_answer(c, NULL, false);
}
