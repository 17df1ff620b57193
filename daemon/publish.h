/* Publish: the way of a block from a worker's staging into the cache.
 *
 *   request         checked; keys computed from parent and tokens; entries and slots reserved, in order
 *      |            nothing to encode: answered at once
 *      v
 *   jobs            encode staging -> slot, CRC32C of the slot; large blocks in parts so that several helpers share them
 *      |            all jobs of the request have ended, and every block of other requests that one of its blocks waits for
 *      v
 *   conclusion      in order, parents first: committed, or aborted (its own failure, or its parent's); flights land; the reply
 *
 * A block may continue one of another request (its parent is being encoded), or be one that another request encodes: then
 * it waits for that block. Such waits only point to blocks that were reserved earlier, so they form no cycle.
 *
 * The worker may go at any time: its publishes then end in the same way, unanswered. Nothing is ever left reserved.
 * Loop thread, but for the jobs. */
#ifndef KVD_DAEMON_PUBLISH_H
#define KVD_DAEMON_PUBLISH_H

#include <stdint.h>

struct daemon;
struct publishing;
struct session;

/* -ENOMEM. NULL allowed in destroy; all jobs must have ended. */
int publishing_create(struct publishing **ret);
struct publishing *publishing_destroy(struct publishing *publishing);
/* Blocks in progress, of all workers. */
uint64_t publishing_blocks(const struct publishing *publishing);

/* Its publishes go on without it. */
void publish_session_gone(struct session *s);

#endif
