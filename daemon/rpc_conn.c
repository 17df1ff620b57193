/* The rpc thread: connections, each with a server of its own, and the completion queue that all share. */
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>

#include "daemon/rpc-internal.h"

/* Calls that are asked for ahead: so many can begin between two turns of this thread without waiting in the library. */
enum { POSTED = 4 };

#define OF(type, member, p) ((type *)((char *)(p) - offsetof(type, member)))

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

void rpc_conn_maybe_gone(struct rpc_conn *conn)
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

static void on_shutdown(struct rpc_tag *tag, bool ok)
{
    struct rpc_conn *conn = OF(struct rpc_conn, shutdown_tag, tag);

    (void)ok;
    conn->shut = true;
    rpc_conn_maybe_gone(conn);
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
        rpc_call_post(conn);
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
        uint64_t wake = rpc_slow_expire(rpc), now = wake == UINT64_MAX ? 0 : daemon_now_usec();
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
