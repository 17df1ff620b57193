/* The loop's half: connections as sessions, requests to their handlers, replies back. */
#include <assert.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/fault.h"
#include "daemon/peer.h"
#include "daemon/request.h"
#include "daemon/rpc-internal.h"
#include "daemon/rpc_batch.h"
#include "daemon/tenants.h"

/* ---- answers ---- */

static void give_back(struct rpc_call *c)
{
    assert(!c->asked_id);
    c->post.arrive = rpc_call_answered;
    rpc_send_to_rpc(c->conn->rpc, &c->post);
}

static grpc_status_code status_of(enum error_code code)
{
    switch (code) {
    case ERROR_PROTOCOL:
    case ERROR_LAYOUT:
    case ERROR_TOKEN:
    case ERROR_VALUE:
    case ERROR_STAGING:
    case ERROR_OPTION: return GRPC_STATUS_INVALID_ARGUMENT;
    case ERROR_DENIED: return GRPC_STATUS_PERMISSION_DENIED;
    case ERROR_LIMIT:
    case ERROR_QUOTA:
    case ERROR_FULL: return GRPC_STATUS_RESOURCE_EXHAUSTED;
    case ERROR_SPACE:
    case ERROR_NOT_FOUND: return GRPC_STATUS_NOT_FOUND;
    case ERROR_PARENT:
    case ERROR_AMBIGUOUS: return GRPC_STATUS_FAILED_PRECONDITION;
    case ERROR_CORRUPT: return GRPC_STATUS_DATA_LOSS;
    case ERROR_TIMEOUT: return GRPC_STATUS_DEADLINE_EXCEEDED;
    case ERROR_DRAINING: return GRPC_STATUS_UNAVAILABLE;
    case ERROR_INTERNAL: break;
    }
    return GRPC_STATUS_INTERNAL;
}

/* The call may be with the rpc thread. */
static void work_drop(struct rpc_call *c)
{
    struct rpc_work *work = c->work;

    assert(!work->busy);
    *c->at_working = c->next_working;
    if (c->next_working)
        c->next_working->at_working = c->at_working;
    c->work = NULL;
    work->end(work);
}

static void work_end(struct rpc_call *c)
{
    if (c->work)
        work_drop(c);
    c->has_work = false;
}

static void fail_with(struct rpc_call *c, enum error_code code, const char *reason, const char *allowed)
{
    c->status = status_of(code);
    c->error = code;
    snprintf(c->reason, sizeof(c->reason), "%s", reason);
    snprintf(c->allowed, sizeof(c->allowed), "%s", allowed);
    free(c->reply);
    c->reply = NULL;
    c->n_reply = 0;
    c->send = false;
    c->end = true;
    work_end(c);
    give_back(c);
}

void rpc_fail(struct rpc_call *c, enum error_code code, const char *allowed, const char *format, ...)
{
    char reason[sizeof(c->reason)];
    va_list ap;

    va_start(ap, format);
    vsnprintf(reason, sizeof(reason), format, ap);
    va_end(ap);
    fail_with(c, code, reason, allowed);
}

void rpc_answer_bytes(struct rpc_call *c, uint8_t *bytes, size_t n, uint64_t n_charged, bool more)
{
    uint32_t most = c->conn->rpc->message_bytes;
    char allowed[sizeof(c->allowed)];

    c->n_charged += n_charged;
    c->reply = bytes;
    c->n_reply = n;
    if (n > most) {
        snprintf(allowed, sizeof(allowed), "%" PRIu32 " bytes (option grpc_message_bytes); ask for less at once, or by a stream", most);
        rpc_fail(c, ERROR_LIMIT, allowed, "the reply is %zu bytes", n);
        return;
    }
    c->status = GRPC_STATUS_OK;
    c->send = true;
    c->end = !more;
    if (!more)
        work_end(c);
    give_back(c);
}

void rpc_answer(struct rpc_call *c, const ProtobufCMessage *message, bool more)
{
    size_t n = message ? protobuf_c_message_get_packed_size(message) : 0;
    bool charged = rpc_total_charge(&c->conn->rpc->total, n);
    uint8_t *bytes = charged ? malloc(n ? n : 1) : NULL;

    if (!bytes) {
        rpc_total_give(&c->conn->rpc->total, charged ? n : 0);
        rpc_fail(c, ERROR_FULL, "later, or a greater grpc_memory", "the daemon has no memory for this reply");
        return;
    }
    if (message)
        protobuf_c_message_pack(message, bytes);
    rpc_answer_bytes(c, bytes, n, n, more);
}

void rpc_want(struct rpc_call *c)
{
    c->want = true;
    c->send = c->end = false;
    give_back(c);
}

void rpc_work_begin(struct rpc_call *c, struct rpc_work *work)
{
    struct rpc_conn *conn = c->conn;

    c->work = work;
    c->has_work = true;
    c->next_working = conn->working;
    c->at_working = &conn->working;
    if (c->next_working)
        c->next_working->at_working = &c->next_working;
    conn->working = c;
}

static void fail_gone(struct rpc_call *c)
{
    fail_with(c, ERROR_DRAINING, "the connection is closed", "");
}

/* Nobody waits for it any more: nothing is to be started. False: answered. */
static bool is_wanted(struct rpc_call *c)
{
    if (!c->conn->session)
        fail_gone(c);
    else if (atomic_load(&c->cancelled))
        fail_with(c, ERROR_TIMEOUT, "the call was cancelled", "");
    else if (c->deadline_usec <= daemon_now_usec())
        fail_with(c, ERROR_TIMEOUT, "the call's deadline has passed before it was begun", "");
    else
        return true;
    return false;
}

static void job_back(struct job *job)
{
    struct rpc_call *c = rpc_call_of_job(job);
    void (*done)(struct rpc_call *call) = c->job_done;

    if (c->work)
        c->work->busy = false;
    if (!c->conn->session)
        fail_gone(c);
    else if (job->result == -ECANCELED)
        fail_with(c, ERROR_DRAINING, "the daemon is stopping", "");
    else if (job->result == -ETIMEDOUT)
        fail_with(c, ERROR_TIMEOUT, "the call's deadline has passed before a helper thread took it up", "");
    else
        done(c);
}

void rpc_job(struct rpc_call *c, void (*run)(struct job *job), void (*done)(struct rpc_call *call))
{
    if (c->work)
        c->work->busy = true;
    c->job_done = done;
    c->job = (struct job){.run = run, .done = job_back, .deadline_usec = c->deadline_usec == UINT64_MAX ? 0 : c->deadline_usec};
    if (c->conn->rpc->no_jobs || FAULT_DUE("grpc-job")) {
        c->job.result = -ECANCELED;
        job_back(&c->job);
        return;
    }
    jobs_submit(c->conn->rpc->daemon->jobs, &c->job);
}

/* ---- requests that the attach socket has too ---- */

static struct rpc_call *asked_take(struct rpc_conn *conn, uint32_t id)
{
    struct rpc_call *c = id && id <= conn->n_ids ? conn->asked[id - 1] : NULL;

    if (c) {
        conn->asked[id - 1] = NULL;
        conn->free_ids[conn->n_free_ids++] = id;
        c->asked_id = 0;
    }
    return c;
}

uint32_t rpc_ask(struct rpc_call *c)
{
    struct rpc_conn *conn = c->conn;
    uint32_t id = conn->free_ids[--conn->n_free_ids]; /* a connection has no more calls than ids */

    conn->asked[id - 1] = c;
    c->asked_id = id;
    return id;
}

static void link_reply(struct session *s, uint16_t type, uint32_t id, const ProtobufCMessage *message)
{
    struct rpc_conn *conn = s->link_ctx;
    struct rpc_call *c = type == FRAME_STAGING_DROP ? NULL : asked_take(conn, id); /* of our own making (rpc_publish.c) */

    if (c)
        rpc_answer(c, message, false);
}

static void link_reply_error(struct session *s, uint32_t id, enum error_code code, const char *reason, const char *allowed)
{
    struct rpc_call *c = asked_take(s->link_ctx, id);

    if (c)
        fail_with(c, code, reason, allowed);
}

static void link_gone(struct session *s)
{
    struct rpc_conn *conn = s->link_ctx;
    struct rpc_call *c, *next;

    conn->session = NULL;
    conn->batch = rpc_batch_close(conn->batch); /* fails what the attention threads have */
    for (uint32_t id = 1; id <= conn->n_ids; id++)
        if ((c = asked_take(conn, id)))
            fail_gone(c);
    for (c = conn->working; c; c = next) {
        next = c->next_working;
        if (!c->work->busy) /* else when its job is back */
            work_drop(c);
    }
    rpc_prefixes_drop(conn);
    rpc_send_to_rpc(conn->rpc, &conn->close_post);
}

const struct session_link rpc_link = {.reply = link_reply, .reply_error = link_reply_error, .gone = link_gone};

/* ---- calls ---- */

static void unpack_run(struct job *job)
{
    struct rpc_call *c = rpc_call_of_job(job);

    c->message = arena_unpack(&c->arena, &c->conn->rpc->total, c->method->input, c->body, c->n_body);
}

static bool has_right(struct rpc_call *c)
{
    const struct session *s = c->conn->session;

    if (c->method->right == RPC_TENANT && !s->tenant) {
        rpc_fail(c, ERROR_DENIED, "a user or group that a [tenant] section claims", "uid %u belongs to no tenant", s->uid);
        return false;
    }
    if (c->method->right == RPC_ADMIN && !s->admin) {
        rpc_fail(c, ERROR_DENIED, "root, the daemon's user, admin_uids and admin_gids", "%s is for admins, and uid %u is none",
                 c->method->path, s->uid);
        return false;
    }
    return true;
}

static void handle(struct rpc_call *c)
{
    if (c->work)
        c->work->next(c);
    else if (!has_right(c))
        return;
    else if (c->method->frame)
        request_handle(c->conn->session, c->method->frame, rpc_ask(c), c->message);
    else
        c->method->handle(c);
}

static void unpack_done(struct rpc_call *c)
{
    if (c->message)
        handle(c);
    else if (c->arena.over_total)
        rpc_fail(c, ERROR_LIMIT, "what the option grpc_memory says", "too much is under way at once");
    else
        rpc_fail(c, ERROR_PROTOCOL, "proto/kvd.proto", "the message is not one of this method's");
}

/* The rpc thread has done with a call that had work. */
static void call_gone(struct rpc_call *c)
{
    if (c->work)
        work_drop(c);
    free(c);
}

void rpc_call_arrived(struct rpc_post *post)
{
    struct rpc_call *c = (struct rpc_call *)((char *)post - offsetof(struct rpc_call, post));

    if (c->step == STEP_GONE)
        call_gone(c);
    else if (!is_wanted(c))
        return;
    else if (c->step == STEP_MESSAGE && !c->message)
        rpc_job(c, unpack_run, unpack_done);
    else
        handle(c);
}

/* ---- connections ---- */

static struct rpc_conn *conn_free(struct rpc_conn *conn)
{
    if (!conn)
        return NULL;
    if (conn->fd >= 0)
        close(conn->fd);
    free(conn->asked);
    free(conn->free_ids);
    free(conn);
    return NULL;
}

void rpc_conn_gone(struct rpc_post *post)
{
    struct rpc_conn *conn = (struct rpc_conn *)((char *)post - offsetof(struct rpc_conn, gone_post));

    *conn->at_conn = conn->next_conn;
    if (conn->next_conn)
        conn->next_conn->at_conn = conn->at_conn;
    conn->rpc->n_conns--;
    conn_free(conn);
}

static void refused_gone(struct session *s)
{
    (void)s;
}
/* Of a session that is closed before it begins. */
static const struct session_link refused_link = {.reply = link_reply, .reply_error = link_reply_error, .gone = refused_gone};

static struct rpc_conn *conn_create(struct rpc *rpc, int fd)
{
    struct rpc_conn *conn = calloc(1, sizeof(*conn));

    if (!conn)
        return NULL;
    *conn = (struct rpc_conn){.rpc = rpc, .fd = fd, .open_post.arrive = rpc_conn_open, .close_post.arrive = rpc_conn_close,
                              .gone_post.arrive = rpc_conn_gone, .n_ids = 2 * rpc->conn_calls + 2};
    conn->asked = calloc(conn->n_ids, sizeof(*conn->asked));
    conn->free_ids = calloc(conn->n_ids, sizeof(*conn->free_ids));
    if (!conn->asked || !conn->free_ids) {
        conn->fd = -1;
        return conn_free(conn);
    }
    while (conn->n_free_ids < conn->n_ids) {
        conn->free_ids[conn->n_free_ids] = conn->n_ids - conn->n_free_ids;
        conn->n_free_ids++;
    }
    return conn;
}

/* Rights by the rules of the attach socket; limits too, but for admins, so that there is a way in when all is full. */
static bool admit(struct session *s)
{
    struct daemon *d = s->daemon;
    struct tenant *t;
    struct peer peer;

    peer_read(s->fd, s->uid, &peer);
    s->admin = peer_is_admin(&peer, &d->options);
    t = tenants_match(d->tenants, s->uid, peer.gids, peer.n_gids);
    if (!s->admin && (d->n_attached >= d->options.sessions_max || sessions_attached(d, s->uid) >= d->options.sessions_per_uid))
        return false;
    if (t) {
        s->tenant = tenant_ref(t);
        t->n_sessions++;
    }
    strcpy(s->name, "grpc");
    return true;
}

void rpc_accept(struct daemon *d, int fd)
{
    struct rpc *rpc = d->rpc;
    struct rpc_conn *conn = rpc->n_conns < d->options.grpc_connections ? conn_create(rpc, fd) : NULL;
    int watch = conn ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -1;
    struct session *s = watch >= 0 ? session_accept_link(d, watch, &rpc_link, conn) : NULL;

    if (!s || !admit(s)) {
        d->metrics.sessions_refused += !s && watch < 0;
        log_write(&d->log, LOG_WARNING, "a gRPC connection is refused: grpc_connections, sessions_max, sessions_per_uid or memory");
        if (s) {
            s->link = &refused_link;
            session_close(s, NULL);
        }
        if (conn)
            conn_free(conn);
        else
            close(fd);
        return;
    }
    conn->session = s;
    conn->worker = s->worker;
    conn->next_conn = rpc->all;
    conn->at_conn = &rpc->all;
    if (conn->next_conn)
        conn->next_conn->at_conn = &conn->next_conn;
    rpc->all = conn;
    rpc->n_conns++;
    session_ready(s);
    rpc_send_to_rpc(rpc, &conn->open_post);
}
