/* Hit rates of a trace of prompts in a cache of `cap` blocks (at least 1), in percent of all uses of blocks.
 *
 * A request's blocks count as hits as far as they are present from its start without a gap. What misses is put in,
 * block by block, each a child of the one before; a block with a child, or at the end of the chain that is being put
 * in, is parked.
 *
 * The offline optimum knows the future. It throws out the block whose next use is furthest away, or does not take the
 * new one in if that is the furthest. A block is used in every request that uses a child of it, and before the child;
 * so the furthest next use is always that of a leaf (asserted), the chains stay whole, and since nothing beats this
 * rule without the wish to keep chains whole (Belady 1966, with bypass), nothing beats it with that wish. */
#ifndef KVD_BENCH_REPLAY_SIM_H
#define KVD_BENCH_REPLAY_SIM_H

#include "bench/replay_trace.h"
#include "store/policy.h"

#include <stdint.h>

double replay_policy(const struct trace *t, const struct policy_ops *ops, uint32_t cap);
double replay_optimum(const struct trace *t, uint32_t cap);

#endif
