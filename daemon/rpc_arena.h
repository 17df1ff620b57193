/* Messages out of gRPC bodies: each in memory of its own, in bounds that do not hang on what the body says (rule I7).
 *
 * An arena is a list of pieces; all of it is charged to a shared total before it is taken. A body of n bytes may become at most
 * ARENA_FACTOR * n + ARENA_FLOOR bytes: what honest messages need (varint tokens become 4 times as long, small sub-messages some 10 times),
 * and less than what a body of empty sub-messages would like.
 *
 * An arena is used by one thread at a time; the total by any. Includes: protobuf-c. */
#ifndef KVD_DAEMON_RPC_ARENA_H
#define KVD_DAEMON_RPC_ARENA_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <protobuf-c/protobuf-c.h>

enum { ARENA_FACTOR = 16, ARENA_FLOOR = 4096 };

/* What all calls together have taken. */
struct rpc_total {
    _Atomic uint64_t bytes;
    uint64_t limit_bytes;
};
/* False: over the limit, nothing is charged. */
bool rpc_total_charge(struct rpc_total *total, uint64_t bytes);
void rpc_total_give(struct rpc_total *total, uint64_t bytes);

struct arena {
    struct rpc_total *total;
    struct arena_piece *pieces;
    uint64_t left;      /* may still be taken */
    uint64_t n_charged;
    bool over_total;    /* something was refused because of the others, not of this message */
};

/* The message in the body, or NULL: not one of this type, or too large (over_total: only now). arena_deinit() frees it. */
void *arena_unpack(struct arena *arena, struct rpc_total *total, const ProtobufCMessageDescriptor *type, const uint8_t *body, size_t n);
/* A zeroed arena is fine. */
void arena_deinit(struct arena *arena);

#endif
