/* What a gRPC peer may say, in any order, to the daemon's own handlers: messages of any method with any body, unpacked as the rpc thread
 * and its helpers unpack them, on a connection whose thread is played by this program. Each call comes back exactly once a message; what
 * a reply says of its length is so; when the connection is gone, nothing is held, staged or charged, and every invariant of the cache
 * holds.
 *
 * The input is a list of | method | length u16 | body |. Method 254: the call before is cancelled (its work, if it has some, is given up);
 * 255: its stream ends. A call that is still streaming takes the bodies of the next items with the same method.
 *
 * Tenants live for RUNS_A_LIFE runs (fuzz_daemon.h). */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/rpc-internal.h"
#include "daemon/walk.h"
#include "proto/kvd.pb-c.h"
#include "tests/fuzz/fuzz_daemon.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { ITEMS_MAX = 64, RUNS_A_LIFE = 64, STREAMED_MAX = 64, CANCEL = 254, END = 255 };

static const char *const settings[][2] = {
    {"host_bytes", "8M"}, {"slab_bytes", "2M"}, {"hugepages", "off"}, {"index_entries", "32"}, {"spaces_max", "4"},
    {"leases", "64"}, {"staging_bytes", "64K"}, {"stagings", "3"}, {"publish_blocks", "8"}, {"publish_worker_blocks", "16"},
    {"log_level", "error"}, {"grpc_prefixes", "4"}, {"grpc_message_bytes", "64K"}, {"grpc_memory", "4M"},
};

/* The front without its thread: what is sent to it stays in the list, where this program takes it (kicked: nobody is to be woken). */
static struct rpc *make_rpc(struct daemon *d)
{
    struct rpc *rpc = calloc(1, sizeof(*rpc));

    if (!rpc)
        abort();
    rpc->daemon = d;
    rpc->total.limit_bytes = 4 << 20;
    rpc->message_bytes = 64 << 10;
    rpc->conn_calls = 8;
    rpc->calls_max = 8;
    rpc->to_loop_last = &rpc->to_loop;
    rpc->to_rpc_last = &rpc->to_rpc;
    rpc->kicked = true;
    pthread_mutex_init(&rpc->lock, NULL);
    return rpc;
}

static struct daemon *make_daemon(void)
{
    struct daemon *d = fuzz_daemon_create(NULL);

    d->rpc = make_rpc(d);
    return d;
}

/* ---- the rpc thread's part ---- */

/* The next that the loop has sent; waits for it if asked. NULL: nothing. */
static struct rpc_post *take_post(struct daemon *d, bool wait)
{
    struct rpc *rpc = d->rpc;

    for (int i = 0; i < 10000; i++) {
        struct rpc_post *post = rpc->to_rpc;

        if (post) {
            rpc->to_rpc = post->next;
            if (!rpc->to_rpc)
                rpc->to_rpc_last = &rpc->to_rpc;
            if (post != &rpc->apply_post)
                return post;
            rpc->apply_posted = false; /* health has changed, which no call here asks for */
            continue;
        }
        if (!wait)
            return NULL;
        must(sd_event_run(d->event, 1000));
    }
    abort(); /* a call has not come back */
}

static struct rpc_conn *open_conn(struct daemon *d, int *ret_peer)
{
    int fds[2];
    struct rpc_post *post;

    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds));
    *ret_peer = fds[1];
    rpc_accept(d, fds[0]);
    post = take_post(d, false);
    if (!post || !d->rpc->all || post != &d->rpc->all->open_post)
        abort();
    return d->rpc->all;
}

static struct rpc_call *call_begin(struct rpc_conn *conn, const struct rpc_method *method)
{
    struct rpc_call *c = calloc(1, sizeof(*c));

    if (!c)
        abort();
    c->conn = conn;
    c->method = method;
    c->deadline_usec = UINT64_MAX;
    return c;
}

static void forget(struct rpc_call *c)
{
    arena_deinit(&c->arena);
    free(c->body);
    free(c->reply);
    c->body = c->reply = NULL;
    c->message = NULL;
    c->n_reply = 0;
    rpc_total_give(&c->conn->rpc->total, c->n_charged);
    c->n_charged = 0;
}

/* Hands it to the loop, and waits until it is back. */
static void give(struct daemon *d, struct rpc_call *c, enum rpc_step step)
{
    struct rpc_post *post;

    c->step = step;
    c->send = c->want = c->end = false;
    rpc_call_arrived(&c->post);
    post = take_post(d, true);
    if (post != &c->post || d->rpc->to_rpc || c->send + c->want + c->end == 0)
        abort();
    if (c->send && (c->n_reply > c->conn->rpc->message_bytes || !c->reply))
        abort();
    if (c->end && c->has_work)
        abort();
}

static struct rpc_call *call_end(struct rpc_call *c)
{
    forget(c);
    c->step = STEP_GONE;
    if (c->has_work)
        rpc_call_arrived(&c->post); /* which frees it */
    else
        free(c);
    return NULL;
}

/* One message for it; NULL: the call has ended. */
static struct rpc_call *say(struct daemon *d, struct rpc_call *c, const uint8_t *body, size_t n)
{
    if (n % 2) { /* the small way: unpacked before it is handed over */
        c->message = arena_unpack(&c->arena, &d->rpc->total, c->method->input, body, n);
        if (!c->message)
            return call_end(c);
    } else {
        c->body = malloc(n + 1);
        if (!c->body)
            abort();
        memcpy(c->body, body, n);
        c->n_body = n;
    }
    give(d, c, STEP_MESSAGE);
    for (int i = 0; i < STREAMED_MAX && c->send && !c->end; i++) {
        forget(c);
        give(d, c, STEP_SENT);
    }
    if (!c->want)
        return call_end(c);
    forget(c);
    return c;
}

static struct rpc_call *end_stream(struct daemon *d, struct rpc_call *c)
{
    give(d, c, STEP_END);
    return call_end(c);
}

/* ---- the end of a run ---- */

static void end_conn(struct daemon *d, int peer)
{
    struct rpc_post *post;

    close(peer);
    fuzz_daemon_settle(d); /* the hang-up is seen */
    for (struct session *s = d->sessions; s; s = s->next)
        session_close(s, NULL);
    fuzz_daemon_settle(d);
    post = take_post(d, true);
    if (!d->rpc->all || post != &d->rpc->all->close_post || d->rpc->to_rpc)
        abort();
    rpc_conn_gone(&d->rpc->all->gone_post);
    if (d->sessions || d->closing || d->staging_bytes || d->walks || publishing_blocks(d->publishing) || d->rpc->all ||
        d->rpc->n_conns || d->rpc->total.bytes)
        abort();
    for (struct tenant *t = d->tenants->first; t; t = t->next) {
        struct cache_stats stats;
        struct cache_entry_info info;

        cache_stats(t->cache, &stats);
        if (stats.n_reserved || t->n_sessions)
            abort();
        for (uint32_t e = 0; e < cache_n_entries(t->cache); e++)
            if (cache_entry_info(t->cache, e, &info) && info.n_leases)
                abort();
        cache_assert_valid(t->cache);
    }
}

/* A sound space and a sound block, so that the rest may be about something. */
static void prepare(struct daemon *d, struct rpc_conn *conn)
{
    Kvd__V1__Space space = KVD__V1__SPACE__INIT;
    Kvd__V1__Group groups[2] = {KVD__V1__GROUP__INIT, KVD__V1__GROUP__INIT}, *group_list[] = {&groups[0], &groups[1]};
    Kvd__V1__Layer layers[2] = {KVD__V1__LAYER__INIT, KVD__V1__LAYER__INIT}, *layer_list[] = {&layers[0], &layers[1]};
    uint8_t body[512];
    struct rpc_call *c = call_begin(conn, rpc_method_find("/kvd.v1.Cache/OpenSpace", 23));

    space.model = (char *)"m";
    space.dtype = (char *)"f16";
    space.block_tokens = 2;
    space.n_group = space.n_layer = 2;
    space.group = group_list;
    space.layer = layer_list;
    groups[1].window_tokens = 3;
    layers[1].group = 1;
    for (int i = 0; i < 2; i++) {
        layers[i].n_kv_heads = 1;
        layers[i].dim_k = layers[i].dim_v = 16;
        layers[i].codec_k = layers[i].codec_v = (char *)"raw";
    }
    if (say(d, c, body, kvd__v1__space__pack(&space, body)))
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct daemon *d; /* see above */
    static unsigned n_runs;
    struct rpc_conn *conn;
    struct rpc_call *c = NULL;
    uint8_t method = 0;
    int peer;

    if (!d)
        d = make_daemon();
    if (n_runs++ % RUNS_A_LIFE == 0)
        fuzz_daemon_begin_life(d, settings, sizeof(settings) / sizeof(settings[0]));
    d->draining = false;
    conn = open_conn(d, &peer);
    prepare(d, conn);
    for (int i = 0; i < ITEMS_MAX && size >= 3; i++) {
        size_t n = (size_t)data[1] | (size_t)data[2] << 8;
        const struct rpc_method *m = rpc_method_at(data[0]);
        uint8_t what = data[0];
        const uint8_t *body = data + 3;

        n = n < size - 3 ? n : size - 3;
        data += 3 + n;
        size -= 3 + n;
        if (c && what == END) {
            c = end_stream(d, c);
        } else if (c && (what != method || what == CANCEL)) {
            c = call_end(c);
        }
        if (!m || m->local)
            continue;
        method = what;
        c = say(d, c ? c : call_begin(conn, m), body, n);
    }
    if (c)
        call_end(c);
    end_conn(d, peer);
    if (n_runs % RUNS_A_LIFE == 0)
        fuzz_daemon_end_life(d);
    return 0;
}
