/* The rpc thread: the completion queue, connections and calls.
 *
 *   grpc_server_request_call ---> accepted ---> a message ---> handed over (away) ---> answered: another message, or the status
 *                                    |              ^                                     |
 *                                    |              +------------- streams --------------+
 *                                    +---- close: comes once a call, cancelled or not
 *   destroyed when it is closed, no batch is out and it is not away */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>

#include "daemon/probes.h"
#include "daemon/rpc-internal.h"
#include "proto/kvd.pb-c.h"

/* Calls that are asked for ahead: so many can begin between two turns of this thread without waiting in the library. */
enum { POSTED = 4, SMALL_BODY = 64 << 10 };

#define OF(type, member, p) ((type *)((char *)(p) - offsetof(type, member)))

void rpc_count(struct rpc *rpc, enum rpc_count what, uint64_t n)
{
    atomic_fetch_add_explicit(&rpc->counts[what], n, memory_order_relaxed);
}

static void start(struct rpc_call *c, const grpc_op *ops, size_t n, struct rpc_tag *tag)
{
    grpc_call_error e = grpc_call_start_batch(c->call, ops, n, tag, NULL);

    if (e != GRPC_CALL_OK)
        abort(); /* ours: two batches of one kind, or one that the library does not know */
    c->n_pending++;
}

/* ---- who keeps us waiting: in the order in which they began ---- */

static void slow_add(struct rpc_call *c)
{
    struct rpc *rpc = c->conn->rpc;

    c->slow_usec = daemon_now_usec();
    c->next_slow = NULL;
    c->at_slow = rpc->slow_last;
    *rpc->slow_last = c;
    rpc->slow_last = &c->next_slow;
}

static void slow_remove(struct rpc_call *c)
{
    struct rpc *rpc = c->conn->rpc;

    if (!c->at_slow)
        return;
    *c->at_slow = c->next_slow;
    if (c->next_slow)
        c->next_slow->at_slow = c->at_slow;
    else
        rpc->slow_last = c->at_slow;
    c->at_slow = NULL;
}

/* Ends who has been waited for too long. Returns when to look again, UINT64_MAX: nobody is waited for. */
static uint64_t slow_expire(struct rpc *rpc)
{
    uint64_t limit = atomic_load_explicit(&rpc->slow_limit_usec, memory_order_relaxed), now = rpc->slow ? daemon_now_usec() : 0;

    while (rpc->slow && rpc->slow->slow_usec + limit <= now) {
        struct rpc_call *c = rpc->slow;

        slow_remove(c);
        grpc_call_cancel_with_status(c->call, GRPC_STATUS_RESOURCE_EXHAUSTED,
                                     "the client neither reads nor writes; allowed: a pause of stuck_timeout", NULL);
    }
    return rpc->slow ? rpc->slow->slow_usec + limit : UINT64_MAX;
}

/* ---- the end of a call ---- */

static void give_charge(struct rpc_call *c)
{
    rpc_total_give(&c->conn->rpc->total, c->n_charged);
    c->n_charged = 0;
}

static void call_free(struct rpc_call *c)
{
    arena_deinit(&c->arena);
    give_charge(c);
    free(c->body);
    free(c->reply);
    grpc_byte_buffer_destroy(c->received);
    grpc_metadata_array_destroy(&c->metadata);
    grpc_call_details_destroy(&c->details);
    if (c->call)
        grpc_call_unref(c->call);
    c->call = NULL;
}

static void conn_maybe_gone(struct rpc_conn *conn)
{
    struct rpc *rpc = conn->rpc;

    if (!conn->shut || conn->n_calls || conn->n_posted)
        return;
    grpc_server_destroy(conn->server);
    conn->server = NULL;
    *conn->at = conn->next;
    if (conn->next)
        conn->next->at = conn->at;
    rpc_send_to_loop(rpc, &conn->gone_post); /* refused: rpc_destroy() finds it */
    if (rpc->ending && !rpc->conns)
        grpc_completion_queue_shutdown(rpc->cq);
}

static void call_maybe_end(struct rpc_call *c)
{
    struct rpc_conn *conn = c->conn;
    struct rpc *rpc = conn->rpc;

    if (!c->closed || c->n_pending || c->away)
        return;
    if (!c->finished)
        rpc_count(rpc, c->deadline_usec <= daemon_now_usec() ? RPC_DEADLINE : RPC_CANCELLED, 1);
    if (c->at_watch)
        rpc_watch_end(c);
    slow_remove(c);
    call_free(c);
    if (c->counted)
        atomic_fetch_sub_explicit(&rpc->n_calls, 1, memory_order_relaxed);
    conn->n_calls--;
    c->step = STEP_GONE;
    c->post.arrive = rpc_call_arrived;
    if (!c->has_work || !rpc_send_to_loop(rpc, &c->post))
        free(c);
    conn_maybe_gone(conn);
}

static enum rpc_count count_of(grpc_status_code status)
{
    switch (status) {
    case GRPC_STATUS_OK: return RPC_OK;
    case GRPC_STATUS_CANCELLED: return RPC_CANCELLED;
    case GRPC_STATUS_INVALID_ARGUMENT: return RPC_INVALID;
    case GRPC_STATUS_DEADLINE_EXCEEDED: return RPC_DEADLINE;
    case GRPC_STATUS_NOT_FOUND: return RPC_NOT_FOUND;
    case GRPC_STATUS_PERMISSION_DENIED: return RPC_DENIED;
    case GRPC_STATUS_RESOURCE_EXHAUSTED: return RPC_EXHAUSTED;
    case GRPC_STATUS_FAILED_PRECONDITION: return RPC_PRECONDITION;
    case GRPC_STATUS_UNIMPLEMENTED: return RPC_UNIMPLEMENTED;
    case GRPC_STATUS_UNAVAILABLE: return RPC_UNAVAILABLE;
    default: return RPC_OTHER;
    }
}

/* The reply's bytes, which the library frees when they have been sent. */
static grpc_byte_buffer *reply_buffer(struct rpc_call *c)
{
    grpc_slice slice = c->n_reply ? grpc_slice_new(c->reply, c->n_reply, free) : grpc_empty_slice();
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);

    grpc_slice_unref(slice);
    if (!c->n_reply)
        free(c->reply);
    rpc_count(c->conn->rpc, RPC_BYTES_OUT, c->n_reply);
    c->reply = NULL;
    c->n_reply = 0;
    return buffer;
}

/* Adds what is sent before a status or as a stream's message. Returns how many operations; *ret_buffer is to be destroyed. */
static size_t sending(struct rpc_call *c, grpc_op *ops, grpc_byte_buffer **ret_buffer)
{
    size_t n = 0;

    *ret_buffer = NULL;
    if (!c->metadata_sent)
        ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    c->metadata_sent = true;
    if (c->send) {
        *ret_buffer = reply_buffer(c);
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = *ret_buffer;
    }
    c->send = false;
    return n;
}

static grpc_slice details_of(const struct rpc_call *c)
{
    char text[sizeof(c->reason) + sizeof(c->allowed) + 16];

    snprintf(text, sizeof(text), "%s%s%s", c->reason, *c->allowed ? "; allowed: " : "", c->allowed);
    return grpc_slice_from_copied_string(text);
}

/* kvd.v1.Error, for programs. */
static grpc_slice error_of(struct rpc_call *c)
{
    Kvd__V1__Error e = KVD__V1__ERROR__INIT;
    grpc_slice slice;

    e.code = c->error;
    e.reason = c->reason;
    e.allowed = c->allowed;
    slice = grpc_slice_malloc(kvd__v1__error__get_packed_size(&e));
    kvd__v1__error__pack(&e, GRPC_SLICE_START_PTR(slice));
    return slice;
}

/* Sends the status, and before it what c->send says. */
static void finish(struct rpc_call *c)
{
    grpc_op ops[3] = {0}, *op;
    grpc_metadata trailing = {.key = grpc_slice_from_static_string("kvd-error-bin"), .value = grpc_empty_slice()};
    grpc_slice details = grpc_empty_slice();
    grpc_byte_buffer *buffer;
    size_t n = sending(c, ops, &buffer);

    assert(!c->finished);
    op = &ops[n++];
    op->op = GRPC_OP_SEND_STATUS_FROM_SERVER;
    op->data.send_status_from_server.status = c->status;
    if (c->status != GRPC_STATUS_OK) {
        details = details_of(c);
        op->data.send_status_from_server.status_details = &details;
        if (c->error) {
            trailing.value = error_of(c);
            op->data.send_status_from_server.trailing_metadata = &trailing;
            op->data.send_status_from_server.trailing_metadata_count = 1;
        }
    }
    c->finished = true;
    PROBE3(grpc_call_end, c, c->status, daemon_now_usec() - c->begin_usec);
    rpc_count(c->conn->rpc, count_of(c->status), 1);
    slow_add(c);
    start(c, ops, n, &c->send_tag);
    grpc_slice_unref(details);
    grpc_slice_unref(trailing.value);
    grpc_byte_buffer_destroy(buffer);
}

/* An end that no kvd_error has to do with. */
static void refuse(struct rpc_call *c, grpc_status_code status, enum error_code error, const char *reason, const char *allowed)
{
    c->status = status;
    c->error = error;
    c->send = false;
    snprintf(c->reason, sizeof(c->reason), "%s", reason);
    snprintf(c->allowed, sizeof(c->allowed), "%s", allowed);
    finish(c);
}

void rpc_local_fail(struct rpc_call *c, grpc_status_code status, const char *reason)
{
    refuse(c, status, 0, reason, "");
}

/* ---- messages ---- */

static void receive(struct rpc_call *c)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &c->received};

    if (c->method->kind != RPC_BIDI)
        slow_add(c); /* a client of reflection may sit there for hours */
    start(c, &op, 1, &c->recv_tag);
}

static void send_message(struct rpc_call *c)
{
    grpc_op ops[2] = {0};
    grpc_byte_buffer *buffer;
    size_t n = sending(c, ops, &buffer);

    slow_add(c);
    start(c, ops, n, &c->send_tag);
    grpc_byte_buffer_destroy(buffer);
}

void rpc_local_answer(struct rpc_call *c, const ProtobufCMessage *message, bool more)
{
    size_t n = message ? protobuf_c_message_get_packed_size(message) : 0;

    c->reply = malloc(n ? n : 1);
    if (!c->reply) {
        refuse(c, GRPC_STATUS_RESOURCE_EXHAUSTED, ERROR_FULL, "the daemon has no memory for this reply", "");
        return;
    }
    if (message)
        protobuf_c_message_pack(message, c->reply);
    c->n_reply = n;
    c->send = true;
    c->status = GRPC_STATUS_OK;
    if (more)
        send_message(c);
    else
        finish(c);
}

static void hand_over(struct rpc_call *c, enum rpc_step step)
{
    c->step = step;
    c->away = true;
    c->post.arrive = rpc_call_arrived;
    if (rpc_send_to_loop(c->conn->rpc, &c->post))
        return;
    c->away = false;
    refuse(c, GRPC_STATUS_UNAVAILABLE, ERROR_DRAINING, "the daemon is stopping", "");
}

static void forget_message(struct rpc_call *c)
{
    arena_deinit(&c->arena);
    free(c->body);
    c->body = NULL;
    c->message = NULL;
    give_charge(c);
}

/* The received bytes as one piece at c->body. False: refused. */
static bool flatten(struct rpc_call *c)
{
    grpc_byte_buffer *from = c->received;
    grpc_byte_buffer_reader reader;
    grpc_slice slice;
    size_t at = 0, n = grpc_byte_buffer_length(from);

    if (from->data.raw.compression != GRPC_COMPRESS_NONE) {
        refuse(c, GRPC_STATUS_UNIMPLEMENTED, 0, "compressed messages are not read", "identity");
        return false;
    }
    if (!rpc_total_charge(&c->conn->rpc->total, n)) {
        refuse(c, GRPC_STATUS_RESOURCE_EXHAUSTED, ERROR_LIMIT, "too much is under way at once", "what the option grpc_memory says");
        return false;
    }
    c->n_charged = n;
    c->n_body = n;
    c->body = malloc(n ? n : 1);
    if (!c->body || !grpc_byte_buffer_reader_init(&reader, from)) {
        refuse(c, GRPC_STATUS_RESOURCE_EXHAUSTED, ERROR_FULL, "the daemon has no memory for this message", "");
        return false;
    }
    while (grpc_byte_buffer_reader_next(&reader, &slice)) {
        memcpy(c->body + at, GRPC_SLICE_START_PTR(slice), GRPC_SLICE_LENGTH(slice));
        at += GRPC_SLICE_LENGTH(slice);
        grpc_slice_unref(slice);
    }
    grpc_byte_buffer_reader_destroy(&reader);
    assert(at == n);
    return true;
}

static void take_message(struct rpc_call *c)
{
    bool flat = flatten(c);

    grpc_byte_buffer_destroy(c->received);
    c->received = NULL;
    if (!flat)
        return;
    rpc_count(c->conn->rpc, RPC_BYTES_IN, c->n_body);
    if (!c->method->local && c->n_body > SMALL_BODY) { /* a helper unpacks it */
        hand_over(c, STEP_MESSAGE);
        return;
    }
    c->message = arena_unpack(&c->arena, &c->conn->rpc->total, c->method->input, c->body, c->n_body);
    free(c->body);
    c->body = NULL;
    if (!c->message && c->arena.over_total)
        refuse(c, GRPC_STATUS_RESOURCE_EXHAUSTED, ERROR_LIMIT, "too much is under way at once", "what the option grpc_memory says");
    else if (!c->message)
        refuse(c, GRPC_STATUS_INVALID_ARGUMENT, ERROR_PROTOCOL, "the message is not one of this method's", "proto/kvd.proto");
    else if (c->method->local)
        c->method->local(c);
    else
        hand_over(c, STEP_MESSAGE);
    if (!c->away)
        forget_message(c);
}

static void end_of_messages(struct rpc_call *c)
{
    if (c->method->kind == RPC_BIDI) {
        c->status = GRPC_STATUS_OK;
        finish(c);
    } else if (c->method->kind == RPC_IN_STREAM && c->has_work) {
        hand_over(c, STEP_END);
    } else {
        refuse(c, GRPC_STATUS_INVALID_ARGUMENT, ERROR_PROTOCOL, "the call ended without a message", "one message");
    }
}

static bool is_over(const struct rpc_call *c)
{
    return c->finished || (c->closed && c->was_cancelled);
}

static void on_received(struct rpc_tag *tag, bool ok)
{
    struct rpc_call *c = OF(struct rpc_call, recv_tag, tag);

    c->n_pending--;
    slow_remove(c);
    if (!is_over(c)) {
        if (ok && c->received)
            take_message(c);
        else if (ok)
            end_of_messages(c);
    }
    call_maybe_end(c);
}

static void on_sent(struct rpc_tag *tag, bool ok)
{
    struct rpc_call *c = OF(struct rpc_call, send_tag, tag);

    c->n_pending--;
    slow_remove(c);
    give_charge(c);
    if (ok && !is_over(c)) {
        if (c->at_watch)
            rpc_health_sent(c);
        else if (c->method->kind == RPC_BIDI)
            receive(c);
        else
            hand_over(c, STEP_SENT);
    }
    call_maybe_end(c);
}

static void cancel(struct rpc_call *c)
{
    struct rpc *rpc = c->conn->rpc;

    atomic_store(&c->cancelled, true);
    pthread_mutex_lock(&rpc->lock);
    if (c->cancel_word)
        atomic_store(c->cancel_word, 1);
    pthread_mutex_unlock(&rpc->lock);
}

static void on_closed(struct rpc_tag *tag, bool ok)
{
    struct rpc_call *c = OF(struct rpc_call, close_tag, tag);

    (void)ok;
    c->n_pending--;
    c->closed = true;
    if (c->was_cancelled)
        cancel(c);
    call_maybe_end(c);
}

/* The loop gives a call back. */
void rpc_call_answered(struct rpc_post *post)
{
    struct rpc_call *c = OF(struct rpc_call, post, post);

    c->away = false;
    arena_deinit(&c->arena);
    free(c->body);
    c->body = NULL;
    c->message = NULL;
    if (is_over(c)) {
        give_charge(c);
    } else if (c->end) {
        finish(c);
    } else if (c->send) {
        send_message(c);
    } else {
        assert(c->want);
        c->want = false;
        give_charge(c);
        receive(c);
    }
    call_maybe_end(c);
}

/* ---- new calls ---- */

static void call_post(struct rpc_conn *conn);

/* CLOCK_MONOTONIC microseconds; the library's own clock may begin elsewhere. */
static uint64_t deadline_of(const grpc_call_details *details)
{
    gpr_timespec left;
    uint64_t now = daemon_now_usec();

    if (gpr_time_cmp(details->deadline, gpr_inf_future(details->deadline.clock_type)) == 0)
        return UINT64_MAX;
    left = gpr_time_sub(details->deadline, gpr_now(details->deadline.clock_type));
    return left.tv_sec < 0 ? now : now + (uint64_t)left.tv_sec * 1000000 + (uint64_t)left.tv_nsec / 1000;
}

static void begin(struct rpc_call *c)
{
    struct rpc *rpc = c->conn->rpc;
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER, .data.recv_close_on_server.cancelled = &c->was_cancelled};

    c->deadline_usec = deadline_of(&c->details);
    c->begin_usec = daemon_now_usec();
    c->method = rpc_method_find(GRPC_SLICE_START_PTR(c->details.method), GRPC_SLICE_LENGTH(c->details.method));
    rpc_count(rpc, RPC_CALLS, 1);
    PROBE3(grpc_call_begin, c, c->conn->worker, c->method ? c->method->path : "");
    start(c, &op, 1, &c->close_tag);
    if (!c->method) {
        refuse(c, GRPC_STATUS_UNIMPLEMENTED, ERROR_PROTOCOL, "there is no such method", "those that reflection lists");
        return;
    }
    if (c->conn->n_calls > 2 * rpc->conn_calls) { /* streams that the client has given up, and that are still being worked on */
        refuse(c, GRPC_STATUS_RESOURCE_EXHAUSTED, ERROR_LIMIT, "too many calls of this connection are still being worked on",
               "as many as the option grpc_connection_calls says");
        return;
    }
    if (atomic_fetch_add_explicit(&rpc->n_calls, 1, memory_order_relaxed) >= rpc->calls_max) {
        atomic_fetch_sub_explicit(&rpc->n_calls, 1, memory_order_relaxed);
        refuse(c, GRPC_STATUS_RESOURCE_EXHAUSTED, ERROR_LIMIT, "too many calls at once", "as many as the option grpc_calls says");
        return;
    }
    c->counted = true;
    receive(c);
}

static void on_new(struct rpc_tag *tag, bool ok)
{
    struct rpc_call *c = OF(struct rpc_call, new_tag, tag);
    struct rpc_conn *conn = c->conn;

    conn->n_posted--;
    if (!ok) { /* the server is shutting down */
        call_free(c);
        free(c);
        conn_maybe_gone(conn);
        return;
    }
    conn->n_calls++;
    call_post(conn);
    begin(c);
    call_maybe_end(c);
}

static void call_post(struct rpc_conn *conn)
{
    struct rpc_call *c;

    if (conn->closing)
        return;
    c = calloc(1, sizeof(*c));
    if (!c)
        return; /* fewer at once; none: the connection answers nothing, and its client's deadline tells it */
    c->conn = conn;
    c->new_tag.done = on_new;
    c->close_tag.done = on_closed;
    c->recv_tag.done = on_received;
    c->send_tag.done = on_sent;
    grpc_call_details_init(&c->details);
    grpc_metadata_array_init(&c->metadata);
    if (grpc_server_request_call(conn->server, &c->call, &c->details, &c->metadata, conn->rpc->cq, conn->rpc->cq, &c->new_tag) !=
        GRPC_CALL_OK) {
        c->call = NULL;
        call_free(c);
        free(c);
        return;
    }
    conn->n_posted++;
}

/* ---- connections ---- */

static grpc_server *make_server(struct rpc *rpc)
{
    grpc_arg args[] = {
        {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_ARG_MAX_CONCURRENT_STREAMS, .value.integer = (int)rpc->conn_calls},
        {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, .value.integer = (int)rpc->message_bytes},
        /* A few bytes that are a great many when they are unpacked must not be. */
        {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_ARG_ENABLE_PER_MESSAGE_COMPRESSION, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, .value.integer = 1},
        {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_ARG_ENABLE_CHANNELZ, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER, .key = (char *)GRPC_ARG_HTTP2_BDP_PROBE, .value.integer = 0},
        {.type = GRPC_ARG_POINTER, .key = (char *)GRPC_ARG_RESOURCE_QUOTA,
         .value.pointer = {.p = rpc->quota, .vtable = grpc_resource_quota_arg_vtable()}},
    };
    grpc_channel_args all = {.num_args = sizeof(args) / sizeof(args[0]), .args = args};

    return grpc_server_create(&all, NULL);
}

static void on_shutdown(struct rpc_tag *tag, bool ok)
{
    struct rpc_conn *conn = OF(struct rpc_conn, shutdown_tag, tag);

    (void)ok;
    conn->shut = true;
    conn_maybe_gone(conn);
}

void rpc_conn_open(struct rpc_post *post)
{
    struct rpc_conn *conn = OF(struct rpc_conn, open_post, post);
    struct rpc *rpc = conn->rpc;

    conn->shutdown_tag.done = on_shutdown;
    conn->next = rpc->conns;
    conn->at = &rpc->conns;
    if (conn->next)
        conn->next->at = &conn->next;
    rpc->conns = conn;
    conn->server = make_server(rpc);
    grpc_server_register_completion_queue(conn->server, rpc->cq, NULL);
    grpc_server_start(conn->server);
    for (int i = 0; i < POSTED; i++)
        call_post(conn);
    grpc_server_add_channel_from_fd(conn->server, conn->fd, rpc->credentials);
    conn->fd = -1;
}

void rpc_conn_close(struct rpc_post *post)
{
    struct rpc_conn *conn = OF(struct rpc_conn, close_post, post);

    conn->closing = true;
    grpc_server_shutdown_and_notify(conn->server, conn->rpc->cq, &conn->shutdown_tag);
    grpc_server_cancel_all_calls(conn->server);
}

/* All sessions are gone, so every connection has been told to close. */
void rpc_stop(struct rpc_post *post)
{
    struct rpc *rpc = OF(struct rpc, stop_post, post);

    rpc->ending = true;
    if (!rpc->conns)
        grpc_completion_queue_shutdown(rpc->cq);
}

/* ---- the thread ---- */

void *rpc_thread(void *ctx)
{
    struct rpc *rpc = ctx;

    pthread_setname_np(pthread_self(), "kvd-grpc");
    for (;;) {
        uint64_t wake = slow_expire(rpc), now = wake == UINT64_MAX ? 0 : daemon_now_usec();
        gpr_timespec until = gpr_inf_future(GPR_CLOCK_MONOTONIC);
        grpc_event event;

        if (wake != UINT64_MAX)
            until = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                                 gpr_time_from_micros(wake > now ? (int64_t)(wake - now) : 0, GPR_TIMESPAN));
        event = grpc_completion_queue_next(rpc->cq, until, NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN)
            return NULL;
        if (event.type == GRPC_OP_COMPLETE)
            ((struct rpc_tag *)event.tag)->done(event.tag, event.success);
    }
}
