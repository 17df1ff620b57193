/* The options that select blocks, the same for each command that has them. */
#ifndef KVD_CTL_SELECT_H
#define KVD_CTL_SELECT_H

#include "kvctl.h"

/* First in a command's table, in this order. */
#define SELECT_OPTS                                                                                                    \
    {"key", 'k', "HEX", "only the block with this key, or those whose key begins so"},                                 \
        {"space", 'S', "ID", "only of this space (see kvctl ls spaces)"},                                              \
        {"tenant", 't', "NAME", "only of this tenant"}, {"model", 'm', "NAME", "only of this model"},                  \
        {"idle", 'i', "TIME", "only if not used for this long (90s, 15min, 2h, 1d)"},                                  \
    {                                                                                                                  \
        "age", 'A', "TIME", "only if in the cache for this long"                                                       \
    }
enum { SELECT_KEY, SELECT_SPACE, SELECT_TENANT, SELECT_MODEL, SELECT_IDLE, SELECT_AGE, SELECT_N };

/* Of the commands that name one key. First in their tables, in this order. */
#define ONE_OPTS                                                                                                       \
    {"tenant", 't', "NAME", "of this tenant (the same key may be in several)"},                                        \
    {                                                                                                                  \
        "space", 'S', "ID", "of this space (see kvctl ls spaces)"                                                      \
    }
enum { ONE_TENANT, ONE_SPACE, ONE_N };

struct select {
    struct kvd_selector selector; /* points into this struct and argv */
    uint8_t key[32];
    int n_set;
};

/* EXIT_OK or EXIT_USAGE (printed). */
int select_parse(const struct ctl_args *args, struct select *ret);
/* The same for the command's argument KEY and ONE_OPTS. */
int select_parse_one(const struct ctl_args *args, struct select *ret);

#endif
