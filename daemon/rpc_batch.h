/* A gRPC connection as a worker of the attention threads (daemon/attend.h): rings and memory of the daemon's own, so that what comes by
 * gRPC is computed together with what workers ask for, in the same fair order, by the same threads.
 *
 *   attend_take_region ---> filled in (struct shm_request, proto/shm.h) ---> submit ---> completion, told by an eventfd ---> given back
 *
 * Loop thread; the bytes of a region are its owner's to write until it is submitted, and to read after its completion, from any
 * thread. Counted references: one of the connection, one a region. */
#ifndef KVD_DAEMON_RPC_BATCH_H
#define KVD_DAEMON_RPC_BATCH_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/shm.h"

struct attend_ring;
struct rpc_batch;
struct rpc_conn;

/* A piece of the memory. Embedded in what it is for. */
struct rpc_region {
    struct rpc_region *next;
    struct rpc_batch *batch;  /* referenced; NULL: not taken */
    uint64_t off, bytes;
    bool submitted;           /* the threads have it */
    uint64_t ticket;
    /* Of a submitted one: it is the owner's again. completion NULL: the connection has gone. */
    void (*done)(struct rpc_region *region, const struct shm_completion *completion);
};

/* Makes the connection's rings and memory when they are first needed. -errno. */
int rpc_batch_create(struct rpc_conn *conn, struct rpc_batch **ret);
/* The connection has gone: no thread looks at a region any more, and done() has been called for all that were submitted. NULL allowed;
 * returns NULL. */
struct rpc_batch *rpc_batch_close(struct rpc_batch *batch);

/* Takes bytes, a multiple of 64. False: they are not free. */
bool rpc_region_take(struct rpc_batch *batch, uint64_t bytes, struct rpc_region *region);
void *rpc_region_at(const struct rpc_region *region);
/* Not submitted, or done. May be called for one that was not taken. */
void rpc_region_give(struct rpc_region *region);
/* Hands it to the threads. False: the ring is full. */
bool rpc_region_submit(struct rpc_region *region);

#endif
