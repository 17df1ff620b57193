/* kvd.v1.Cache/Publish and PublishStream: the data of the messages is gathered in staging memory of the daemon's own, and from there it
 * goes the way of every publish (daemon/publish.h).
 *
 *   message ---> unpacked ---> copied to the staging by a helper ---> [the next message of a stream] ---> request_publish() ---> reply */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/request.h"
#include "daemon/rpc-internal.h"
#include "daemon/staging.h"
#include "proto/frame.h"
#include "proto/kvd.pb-c.h"

enum { COPY_INLINE = 16 << 10 };

struct upload {
    struct rpc_work work;
    struct arena arena;        /* holds publish; the call's own is emptied with each message */
    Kvd__V1__Publish *publish;
    struct rpc_conn *conn;     /* whose session's staging_bytes it is counted in, if there is one any more */
    struct staging *staging;   /* NULL: the session has it */
    uint8_t *data;
    uint64_t bytes, filled;    /* said, and come so far */
};

static void upload_end(struct rpc_work *work)
{
    struct upload *u = (struct upload *)work;

    if (u->staging) {
        if (u->conn->session)
            u->conn->session->staging_bytes -= u->staging->bytes;
        staging_unref(u->staging);
    }
    arena_deinit(&u->arena);
    free(u);
}

/* Everything is there: the staging becomes one of the session's until no block reads it any more, and the request is as any other. */
static void submit(struct rpc_call *c)
{
    struct upload *u = (struct upload *)c->work;
    struct session *s = c->conn->session;
    struct staging *staging = u->staging, **grown;

    if (u->filled != u->bytes) {
        rpc_fail(c, ERROR_STAGING, "as many as its first message says", "the stream ended with %" PRIu64 " of %" PRIu64 " bytes", u->filled,
                 u->bytes);
        return;
    }
    grown = realloc(s->stagings, (s->n_stagings + 1) * sizeof(*grown));
    if (!grown) {
        rpc_fail(c, ERROR_FULL, "", "the daemon has no memory for this publish");
        return;
    }
    s->stagings = grown;
    s->stagings[s->n_stagings++] = staging;
    u->staging = NULL;
    u->publish->staging = staging->id = ++s->last_staging;
    staging_ref(staging);
    request_handle(s, FRAME_PUBLISH, rpc_ask(c), u->publish); /* may answer, and then u is gone */
    staging_unref(staging);
    staging->drop_request = 1; /* as if it had been dropped right afterwards */
    session_staging_idle(s, staging);
}

static void copied(struct rpc_call *c)
{
    struct upload *u = (struct upload *)c->work;

    if (c->message)
        u->filled += ((Kvd__V1__PublishRequest *)c->message)->data.len;
    if (c->method->kind == RPC_UNARY)
        submit(c);
    else
        rpc_want(c);
}

static void copy(struct upload *u, const Kvd__V1__PublishRequest *m)
{
    if (m->data.len)
        memcpy(u->data + u->filled, m->data.data, m->data.len);
}

static void copy_run(struct job *job)
{
    struct rpc_call *c = rpc_call_of_job(job);

    copy((struct upload *)c->work, c->message);
}

static void take_data(struct rpc_call *c)
{
    struct upload *u = (struct upload *)c->work;
    const Kvd__V1__PublishRequest *m = c->message;

    if (m->data.len > u->bytes - u->filled) {
        rpc_fail(c, ERROR_STAGING, "as many as the first message says", "%" PRIu64 " bytes of data came, and %" PRIu64 " were said",
                 u->filled + m->data.len, u->bytes);
        return;
    }
    if (m->data.len > COPY_INLINE) {
        rpc_job(c, copy_run, copied);
        return;
    }
    copy(u, m);
    copied(c);
}

static void upload_next(struct rpc_call *c)
{
    const Kvd__V1__PublishRequest *m = c->message;

    if (c->step == STEP_END)
        submit(c);
    else if (m->publish || m->bytes)
        rpc_fail(c, ERROR_PROTOCOL, "data alone", "publish and bytes belong to a stream's first message");
    else
        take_data(c);
}

static bool upload_allowed(struct rpc_call *c, const Kvd__V1__PublishRequest *m, uint64_t bytes)
{
    const struct session *s = c->conn->session;
    const struct options *o = &s->daemon->options;

    if (!m->publish)
        rpc_fail(c, ERROR_PROTOCOL, "a Publish", "the message does not say what is to be published");
    else if (m->publish->staging)
        rpc_fail(c, ERROR_STAGING, "0: offsets are places in the data", "there is no staging %" PRIu32 " here", m->publish->staging);
    else if (m->bytes && c->method->kind == RPC_UNARY && m->bytes != m->data.len)
        rpc_fail(c, ERROR_STAGING, "0, or the length of data", "bytes is %" PRIu64 ", and %zu came", m->bytes, m->data.len);
    else if (bytes > o->staging_bytes || s->staging_bytes > o->staging_bytes - bytes)
        rpc_fail(c, ERROR_LIMIT, "what the option staging_bytes says",
                 "%" PRIu64 " bytes of data on top of %" PRIu64 " that are being published; %" PRIu64 " are allowed", bytes,
                 s->staging_bytes, o->staging_bytes);
    else
        return true;
    return false;
}

void rpc_publish(struct rpc_call *c)
{
    const Kvd__V1__PublishRequest *m = c->message;
    uint64_t bytes = c->method->kind == RPC_UNARY ? m->data.len : m->bytes;
    struct session *s = c->conn->session;
    struct upload *u;

    if (!upload_allowed(c, m, bytes))
        return;
    u = calloc(1, sizeof(*u));
    if (!u || staging_create_own(bytes, 0, &s->daemon->staging_bytes, &u->staging, &u->data) < 0) {
        free(u);
        rpc_fail(c, ERROR_FULL, "", "the daemon has no memory for this publish");
        return;
    }
    s->staging_bytes += u->staging->bytes;
    u->work = (struct rpc_work){.next = upload_next, .end = upload_end};
    u->conn = c->conn;
    u->bytes = bytes;
    u->publish = m->publish;
    rpc_work_begin(c, &u->work);
    u->arena = c->arena; /* the message stays with it, and c->message good until the call is given back */
    c->arena = (struct arena){0};
    take_data(c);
}
