/* Host memory tier: sealed memfds cut into slots. One object a tenant; see tier.h for its contract.
 *
 * A slab is cut for one slot size at a time; an empty one may be cut anew for another size (it stays the tenant's own).
 * New slabs are made until the tenant's limit or the shared budget is reached. Making one takes milliseconds (its pages are
 * reserved and cleared), so that the loop can have one made ahead by a job: host_spare_wanted(), host_spare_give().
 *
 *   slab number --> struct host_slab { memory | slot_bytes | n_slots | owner[n_slots] | free stack inside owner[] }
 *   size class  --> list of its slabs that have a free slot
 *
 * Invariants: H1 a slab is in its class's list exactly if it has a free slot and is cut; H2 n_used + free = n_slots;
 * H3 a slab's number is used again only after host_n_retired() has grown and the cache has told the workers so (who may still map
 * the old one). Includes: tier.h, slab.h. */
#ifndef KVD_STORE_TIER_HOST_H
#define KVD_STORE_TIER_HOST_H

#include "store/slab.h"
#include "store/tier/tier.h"

extern const struct tier_ops host_tier_ops;

/* name is for people (memfd's name); copied. budget is borrowed. -ENOMEM. */
int host_create(const char *name, struct budget *budget, uint64_t limit_bytes, uint64_t slab_bytes, struct tier **ret);
/* Descriptor and size of a slab, borrowed. -ENOENT. */
int host_slab_fd(const struct tier *tier, uint32_t slab, uint64_t *ret_bytes);
/* Address of a payload whose block the caller holds by a lease; NULL: loc is none of the tier's. Any thread: the lease keeps the
 * block's slab, and the generation that was read under it orders this after the slab's making. */
const void *host_leased_at(const struct tier *tier, uint64_t loc);
/* Slabs given back so far; mirrored into the index header. */
uint32_t host_n_retired(const struct tier *tier);
/* Would a slab made ahead be of use (none is spare, limit and budget allow it)? Its size. */
bool host_spare_wanted(const struct tier *tier, uint64_t *ret_bytes);
/* Takes memory (made by slab_memory_create, unsealed) as spare; released at once if no longer wanted. */
void host_spare_give(struct tier *tier, struct slab_memory *memory);
void host_assert_valid(const struct tier *tier);

#endif
