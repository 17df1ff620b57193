/* gRPC: the second socket, and the thread that serves it.
 *
 *   loop thread                                   rpc thread (one completion queue)
 *   accept, SO_PEERCRED -> session, tenant  --->  a grpc_server for this one connection
 *   request_handle(), rpc_cache             <---  request: unpacked message
 *   reply through the session's link        --->  bytes, status
 *
 * One grpc_server a connection: whose call it is follows from the server that it came in by, and from nothing that could be told
 * wrong. The connection is a session like one of the attach socket (daemon/session.h), so its rights, its limits, and what happens
 * when it or its process ends are the same.
 *
 * Without the library (configure --without-grpc), or with the socket off, there is no thread and nothing of gRPC's runs.
 * Loop thread only. */
#ifndef KVD_DAEMON_RPC_H
#define KVD_DAEMON_RPC_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

struct daemon;
struct rpc;

#ifdef KVD_GRPC
/* Starts library and thread. -errno. */
int rpc_create(struct daemon *d, struct rpc **ret);
/* No helper thread will take anything from now on. rpc may be NULL. */
void rpc_no_jobs(struct rpc *rpc);
/* Ends all calls and connections and the thread; after sessions_destroy(). NULL allowed; returns NULL. */
struct rpc *rpc_destroy(struct rpc *rpc);
/* Takes a connection (fd is the library's from now on, or closed). */
void rpc_accept(struct daemon *d, int fd);
/* d->draining or an option has changed. rpc may be NULL. */
void rpc_apply(struct rpc *rpc);
/* Brings the counters into d->metrics. rpc may be NULL. */
void rpc_measure(struct rpc *rpc);
static inline bool rpc_built(void)
{
    return true;
}
#else
static inline int rpc_create(struct daemon *d, struct rpc **ret)
{
    (void)d;
    (void)ret;
    return -ENOTSUP;
}
static inline void rpc_no_jobs(struct rpc *rpc)
{
    (void)rpc;
}
static inline struct rpc *rpc_destroy(struct rpc *rpc)
{
    (void)rpc;
    return NULL;
}
static inline void rpc_accept(struct daemon *d, int fd)
{
    (void)d;
    (void)fd;
}
static inline void rpc_apply(struct rpc *rpc)
{
    (void)rpc;
}
static inline void rpc_measure(struct rpc *rpc)
{
    (void)rpc;
}
static inline bool rpc_built(void)
{
    return false;
}
#endif
#endif
