/* The worker's half of the attention rings, one a life: requests in memory of the worker's own that the daemon has mapped, their
 * tickets, and who waits for which.
 *
 *   slot     FREE --submit--> SENT --completion read--> DONE --collected--> FREE
 *                              |                         |
 *                              +--cancel--> DROPPED -----+--> FREE, when its completion has come
 *
 * Invariants: R1 at most n_ring slots are not FREE, so that neither ring can be over-full; R2 a request's memory is not reused before its
 * completion has been read, whatever has become of its ticket; R3 completions are read by whoever holds the lock, for all.
 *
 * Any thread. Errors are enum kvd_error, details by error_set(). Includes: kvd_attend_impl.h, proto/ring.h. */
#ifndef KVD_ATTEND_RING_H
#define KVD_ATTEND_RING_H

#include "kvd_attend_impl.h"
#include "proto/ring.h"

struct attend_ring;

/* Frees the ring of a life that ends (NULL allowed); no call may be in it. */
void attend_ring_free(struct attend_ring *ring);

#endif
