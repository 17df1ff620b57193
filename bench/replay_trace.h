/* A trace of requests to a prefix cache: read from a file, or made up.
 *
 * File: JSON lines, one request each, in order of arrival, with a member "hash_ids": [n, n, ...]: the numbers of the
 * blocks of its prompt from the start; a number stands for a block's content together with all before it (the published
 * Mooncake traces have this form, with blocks of 512 tokens). Other members are ignored. */
#ifndef KVD_BENCH_REPLAY_TRACE_H
#define KVD_BENCH_REPLAY_TRACE_H

#include <stddef.h>
#include <stdint.h>

#define TRACE_NO_PARENT UINT32_MAX

/* Blocks are numbered densely in order of first use. Request r's chain is uses[first[r]] .. uses[first[r + 1] - 1]. */
struct trace {
    uint32_t *uses;
    size_t n_uses, uses_room;
    size_t *first; /* n_requests + 1 of them */
    size_t n_requests, first_room;
    uint32_t *parent; /* of each block */
    size_t n_blocks, parent_room;
    struct trace_key *table; /* (parent, number) -> block; open addressing */
    size_t table_size;
};

/* -errno; -EINVAL with ret_line set if a line is not of the form. trace_deinit after either answer. */
int trace_read(struct trace *t, const char *path, size_t *ret_line);

/* Agents at work: each of many sessions starts from one of a few long system prompts (popular ones more often), then
 * sends its whole history again turn after turn, each time longer; some end early, some sleep long; between them come
 * prompts that never return. The same seed gives the same trace. -ENOMEM. */
int trace_make(struct trace *t, uint64_t seed);

void trace_deinit(struct trace *t);

#endif
