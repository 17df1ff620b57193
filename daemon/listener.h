/* The attach socket, and the gRPC socket if there is one: passed by the service manager, or made here. With the latter d->rpc begins.
 *
 * One that is made here is guarded by PATH.lock: who holds the lock owns the path, a socket file without an owner is left over
 * from a daemon that died and is replaced. Loop thread only. */
#ifndef KVD_DAEMON_LISTENER_H
#define KVD_DAEMON_LISTENER_H

#include <stdint.h>

struct daemon;
struct listener;

/* Listens; every failure is logged with what to do. -errno. */
int listener_create(struct daemon *d, struct listener **ret);
/* Where the attach socket is, for people. */
const char *listener_path(const struct listener *listener);
/* Takes its own socket files away. NULL allowed; returns NULL. */
struct listener *listener_destroy(struct listener *listener);
/* After a pause for want of descriptors: takes connections again. NULL allowed. */
void listener_resume(struct listener *listener);
/* The same if the pause is over. Returns when that will be, UINT64_MAX: no pause. NULL allowed. */
uint64_t listener_expire(struct listener *listener, uint64_t now_usec);

#endif
