#include "daemon/peer.h"

#include <sys/socket.h>
#include <unistd.h>

#include "daemon/options.h"

void peer_read(int fd, uid_t uid, struct peer *ret)
{
    socklen_t bytes = PEER_GROUPS_MAX * sizeof(gid_t);
    struct ucred cred;
    socklen_t len = sizeof(cred);

    ret->uid = uid;
    ret->n_gids = 0;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) == 0)
        ret->gids[ret->n_gids++] = cred.gid;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, ret->gids + ret->n_gids, &bytes) == 0)
        ret->n_gids += bytes / sizeof(gid_t);
}

bool peer_is_admin(const struct peer *peer, const struct options *o)
{
    if (peer->uid == 0 || peer->uid == geteuid())
        return true;
    for (size_t i = 0; i < o->admin_uids.n; i++)
        if (o->admin_uids.ids[i] == peer->uid)
            return true;
    for (size_t i = 0; i < o->admin_gids.n; i++)
        for (size_t k = 0; k < peer->n_gids; k++)
            if (o->admin_gids.ids[i] == peer->gids[k])
                return true;
    return false;
}
