/* Who is at the other end of a Unix socket, and what that gives him. Loop thread only. */
#ifndef KVD_DAEMON_PEER_H
#define KVD_DAEMON_PEER_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct options;

enum { PEER_GROUPS_MAX = 1024 };

struct peer {
    uid_t uid;
    gid_t gids[PEER_GROUPS_MAX + 1]; /* the primary one first, and the others as they were at connect() */
    size_t n_gids;
};

/* Fills in the groups of fd's peer, whose uid is known. What cannot be had is left out. */
void peer_read(int fd, uid_t uid, struct peer *ret);
/* root, the daemon's own user, admin_uids and admin_gids. */
bool peer_is_admin(const struct peer *peer, const struct options *options);

#endif
