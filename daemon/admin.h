/* What the admin requests share. Loop thread only. */
#ifndef KVD_DAEMON_ADMIN_H
#define KVD_DAEMON_ADMIN_H

#include "proto/kvd.pb-c.h"
#include "store/cache.h"

struct tenant;

/* Fills in the message, which borrows from tenant and info. */
void block_info(const struct tenant *t, const struct cache_entry_info *info, Kvd__V1__BlockInfo *ret);

#endif
