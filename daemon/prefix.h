/* A matched prefix that the daemon holds for a worker without a page of his own: the same promise as a lease (rule I3), kept by holds.
 *
 *   full groups      blocks [0, n_blocks)
 *   sliding groups   the last ceil(window / block) of them: [from, n_blocks)
 *
 * Counted references: the connection's table has one, each job that reads the blocks another; the last one gives the holds back. What
 * is in it does not change once it is made, so jobs may read it. Loop thread only, but for reading. */
#ifndef KVD_DAEMON_PREFIX_H
#define KVD_DAEMON_PREFIX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "store/space.h"

struct daemon;
struct tenant;

struct prefix_block {
    const void *payload;
    uint32_t entry, gen;
    uint32_t crc32c;
    bool first;
};

struct prefix_group {
    uint32_t from;
    struct prefix_block *blocks; /* that of block i at [i - from] */
};

struct prefix {
    uint32_t n_refs;
    struct daemon *daemon;
    struct tenant *tenant;     /* referenced */
    struct space *space;
    uint32_t n_blocks;
    uint64_t n_held;           /* blocks of all groups */
    struct prefix_group groups[SPACE_GROUPS_MAX];
};

/* The longest prefix of keys[n][KEY_BYTES] that every group has what it needs of, with at most n_held_max blocks held. *ret is NULL if
 * nothing matched. -ENOMEM. */
int prefix_match(struct daemon *d, struct tenant *tenant, struct space *space, const uint8_t *keys, size_t n, uint64_t n_held_max,
                 struct prefix **ret);
struct prefix *prefix_ref(struct prefix *prefix);
/* NULL allowed; returns NULL. */
struct prefix *prefix_unref(struct prefix *prefix);

/* Block i of a group; NULL: not held. Any thread that has a reference. */
static inline const struct prefix_block *prefix_block(const struct prefix *p, uint32_t group, uint32_t i)
{
    const struct prefix_group *g = &p->groups[group];

    return i < g->from || i >= p->n_blocks ? NULL : &g->blocks[i - g->from];
}

#endif
