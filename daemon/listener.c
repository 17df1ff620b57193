#include "daemon/listener.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <systemd/sd-daemon.h>

#include "daemon/daemon.h"
#include "daemon/rpc.h"
#include "daemon/session.h"

enum { SOCKETS_MAX = 8, ACCEPTS_A_TURN = 16, BACKLOG = 256, PAUSE_USEC = 1000000 };

/* What kinds of sockets there are. */
struct door {
    const char *option;       /* that names its path */
    const char *listen;       /* how a unit's file calls it */
    int type;
    void (*accept)(struct daemon *d, int fd);
};
static const struct door attach_door = {"socket", "ListenSequentialPacket=", SOCK_SEQPACKET, session_accept};
static const struct door grpc_door = {"grpc_socket", "ListenStream=", SOCK_STREAM, rpc_accept};

/* One that was made here. */
struct own {
    int lock_fd;              /* -1: none */
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    char lock_path[sizeof(((struct sockaddr_un *)0)->sun_path) + 5];
    bool bound;
};

struct listening {
    struct listener *listener;
    const struct door *door;
    int fd;
    sd_event_source *source;
};

struct listener {
    struct daemon *daemon;
    struct listening sockets[SOCKETS_MAX];
    unsigned n;
    uint64_t paused_until_usec; /* 0: not paused */
    struct own attach, grpc;
};

static void set_enabled(struct listener *l, int how)
{
    for (unsigned i = 0; i < l->n; i++)
        sd_event_source_set_enabled(l->sockets[i].source, how);
}

static int on_connection(sd_event_source *source, int fd, uint32_t events, void *ctx)
{
    struct listening *at = ctx;
    struct listener *l = at->listener;
    struct daemon *d = l->daemon;

    (void)source;
    (void)events;
    for (int i = 0; i < ACCEPTS_A_TURN; i++) {
        int conn = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (conn >= 0) {
            at->door->accept(d, conn);
            continue;
        }
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            /* The socket would stay readable and the loop spin: wait until a session goes, or for a while. */
            log_write(&d->log, LOG_WARNING, "no new workers for now: %s", strerror(errno));
            set_enabled(l, SD_EVENT_OFF);
            l->paused_until_usec = daemon_now_usec() + PAUSE_USEC;
            daemon_wake_at(d, l->paused_until_usec);
        }
        return 0;
    }
    return 0;
}

void listener_resume(struct listener *l)
{
    if (l && l->paused_until_usec) {
        l->paused_until_usec = 0;
        set_enabled(l, SD_EVENT_ON);
    }
}

uint64_t listener_expire(struct listener *l, uint64_t now_usec)
{
    if (l && l->paused_until_usec > now_usec)
        return l->paused_until_usec;
    listener_resume(l);
    return UINT64_MAX;
}

/* ---- sockets that were passed ---- */

static void add(struct listener *l, const struct door *door, int fd)
{
    l->sockets[l->n++] = (struct listening){.listener = l, .door = door, .fd = fd};
}

static bool has(const struct listener *l, const struct door *door)
{
    for (unsigned i = 0; i < l->n; i++)
        if (l->sockets[i].door == door)
            return true;
    return false;
}

/* Sequential packets are the attach socket's; a stream is gRPC's if its unit says so by FileDescriptorName=grpc. */
static const struct door *door_of(int fd, const char *name)
{
    if (sd_is_socket_unix(fd, SOCK_SEQPACKET, 1, NULL, 0) > 0)
        return &attach_door;
    if (strcmp(name, "grpc") == 0 && sd_is_socket_unix(fd, SOCK_STREAM, 1, NULL, 0) > 0)
        return &grpc_door;
    return NULL;
}

static int take_passed(struct listener *l, char *const *names, int n)
{
    struct daemon *d = l->daemon;

    if (n > SOCKETS_MAX - 2) {
        log_write(&d->log, LOG_ERROR, "%d sockets were passed; allowed: %d", n, SOCKETS_MAX - 2);
        return -E2BIG;
    }
    for (int i = 0; i < n; i++) {
        int fd = SD_LISTEN_FDS_START + i;
        const struct door *door = door_of(fd, names && names[i] ? names[i] : "");

        if (!door) {
            log_write(&d->log, LOG_ERROR,
                      "descriptor %d that was passed is no listening socket of the right kind; allowed: ListenSequentialPacket=, or "
                      "ListenStream= with FileDescriptorName=grpc",
                      fd);
            return -EINVAL;
        }
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
        fcntl(fd, F_SETFD, FD_CLOEXEC);
        add(l, door, fd);
    }
    return 0;
}

/* ---- our own ---- */

/* Tells what failed with errno at the socket's path, and returns it. */
static int failed(struct daemon *d, const struct own *own, const char *doing)
{
    int r = -errno;

    log_write(&d->log, LOG_ERROR, "%s: %s: %s", own->path, doing, strerror(-r));
    return r;
}

static void lock_owner(int fd, char *buf, size_t n)
{
    ssize_t got = pread(fd, buf, n - 1, 0);

    buf[got > 0 ? got : 0] = 0;
    buf[strcspn(buf, "\n")] = 0;
}

/* Holds PATH.lock. A lock file that its owner has taken away meanwhile is tried again under its name. */
static int take_lock(struct daemon *d, const struct door *door, struct own *own)
{
    char owner[32];

    for (;;) {
        struct stat held, named;
        int r;

        own->lock_fd = open(own->lock_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (own->lock_fd < 0) {
            r = -errno;
            log_write(&d->log, LOG_ERROR, "%s: %s%s", own->lock_path, strerror(-r),
                      r == -ENOENT   ? "; make the folder of the socket first"
                      : r == -EACCES ? "; the folder of the socket must be writable, or choose another path"
                                     : "");
            return r;
        }
        if (flock(own->lock_fd, LOCK_EX | LOCK_NB) < 0) {
            lock_owner(own->lock_fd, owner, sizeof(owner));
            log_write(&d->log, LOG_ERROR, "%s: another daemon (pid %s) serves this socket; stop it, or choose another with --%s=PATH",
                      own->path, *owner ? owner : "unknown", door->option);
            return -EADDRINUSE;
        }
        if (fstat(own->lock_fd, &held) == 0 && stat(own->lock_path, &named) == 0 && held.st_ino == named.st_ino &&
            held.st_dev == named.st_dev)
            break;
        close(own->lock_fd);
    }
    snprintf(owner, sizeof(owner), "%d\n", getpid());
    if (ftruncate(own->lock_fd, 0) < 0 || pwrite(own->lock_fd, owner, strlen(owner), 0) < 0)
        log_write(&d->log, LOG_WARNING, "%s: %s", own->lock_path, strerror(errno));
    return 0;
}

/* What stands at the path: nothing (0), a socket that nobody listens at (removed, 0), or something that stays. */
static int clear_path(struct daemon *d, const struct door *door, const struct own *own, const struct sockaddr_un *address)
{
    struct stat st;
    int fd, r;

    if (lstat(own->path, &st) < 0)
        return errno == ENOENT ? 0 : failed(d, own, "looking at it");
    if (!S_ISSOCK(st.st_mode)) {
        log_write(&d->log, LOG_ERROR, "%s: there is a file that is no socket; move it away", own->path);
        return -EEXIST;
    }
    fd = socket(AF_UNIX, door->type | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return failed(d, own, "making a socket");
    r = connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0 ? -errno : 0;
    close(fd);
    if (r != -ECONNREFUSED && r != -ENOENT) {
        log_write(&d->log, LOG_ERROR, "%s: another program listens at this socket (%s)", own->path,
                  r == 0 ? "it took a connection" : strerror(-r));
        return -EADDRINUSE;
    }
    log_write(&d->log, LOG_INFO, "%s: left over from a daemon that is gone; replaced", own->path);
    return unlink(own->path) < 0 && errno != ENOENT ? failed(d, own, "removing it") : 0;
}

static int set_owner(struct daemon *d, const struct own *own)
{
    const struct options *o = &d->options;

    if (*o->socket_group) {
        uint32_t gid;

        if (id_resolver_system.group(NULL, o->socket_group, &gid) < 0) {
            log_write(&d->log, LOG_ERROR, "socket_group: there is no group \"%s\"", o->socket_group);
            return -EINVAL;
        }
        if (chown(own->path, (uid_t)-1, gid) < 0)
            return failed(d, own, "giving it to socket_group");
    }
    return chmod(own->path, (mode_t)o->socket_mode) < 0 ? failed(d, own, "setting socket_mode") : 0;
}

static int make_own(struct listener *l, const struct door *door, const char *path, struct own *own)
{
    struct daemon *d = l->daemon;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int r, fd;

    snprintf(own->path, sizeof(own->path), "%s", path);
    snprintf(own->lock_path, sizeof(own->lock_path), "%s.lock", own->path);
    memcpy(address.sun_path, own->path, sizeof(address.sun_path));
    r = take_lock(d, door, own);
    if (r < 0)
        return r;
    r = clear_path(d, door, own, &address);
    if (r < 0)
        return r;
    fd = socket(AF_UNIX, door->type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return failed(d, own, "making a socket");
    add(l, door, fd);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return failed(d, own, "binding");
    own->bound = true;
    r = set_owner(d, own); /* nobody can connect before listen() */
    if (r < 0)
        return r;
    return listen(fd, BACKLOG) < 0 ? failed(d, own, "listening") : 0;
}

/* The sockets that nobody passed, as far as they are wanted. */
static int make_rest(struct listener *l)
{
    const struct options *o = &l->daemon->options;
    int r = 0;

    if (!has(l, &attach_door))
        r = make_own(l, &attach_door, o->socket, &l->attach);
    if (r == 0 && !has(l, &grpc_door) && *o->grpc_socket)
        r = make_own(l, &grpc_door, o->grpc_socket, &l->grpc);
    return r;
}

static int start_grpc(struct daemon *d, const struct own *own)
{
    int r = rpc_create(d, &d->rpc);

    if (r == 0)
        log_write(&d->log, LOG_INFO, "gRPC: %s", own->bound ? own->path : "a socket of the service manager");
    if (r < 0)
        log_write(&d->log, LOG_ERROR, "gRPC cannot be had: %s", r == -ENOTSUP ? "this kvd was built without it" : strerror(-r));
    return r;
}

int listener_create(struct daemon *d, struct listener **ret)
{
    struct listener *l = calloc(1, sizeof(*l));
    char **names = NULL;
    int n = sd_listen_fds_with_names(1, &names), r;

    if (!l) {
        log_write(&d->log, LOG_ERROR, "the socket: no memory");
        r = -ENOMEM;
        goto out;
    }
    l->daemon = d;
    l->attach.lock_fd = l->grpc.lock_fd = -1;
    if (n < 0)
        log_write(&d->log, LOG_ERROR, "sockets of the service manager: %s", strerror(-n));
    r = n < 0 ? n : take_passed(l, names, n);
    if (r == 0)
        r = make_rest(l);
    if (r == 0 && has(l, &grpc_door))
        r = start_grpc(d, &l->grpc);
    for (unsigned i = 0; i < l->n && r >= 0; i++) {
        r = sd_event_add_io(d->event, &l->sockets[i].source, l->sockets[i].fd, EPOLLIN, on_connection, &l->sockets[i]);
        if (r < 0)
            log_write(&d->log, LOG_ERROR, "the socket cannot be watched: %s", strerror(-r));
    }
    if (r < 0)
        listener_destroy(l);
    else
        *ret = l;
out:
    for (int i = 0; names && names[i]; i++)
        free(names[i]);
    free(names);
    return r < 0 ? r : 0;
}

const char *listener_path(const struct listener *l)
{
    return l->attach.bound ? l->attach.path : "a socket of the service manager";
}

static void own_deinit(struct own *own)
{
    if (own->bound)
        unlink(own->path);
    if (own->lock_fd < 0)
        return;
    if (own->bound)
        unlink(own->lock_path); /* while it is held: whoever opened it meanwhile sees that the name is another file's */
    close(own->lock_fd);
}

struct listener *listener_destroy(struct listener *l)
{
    if (!l)
        return NULL;
    for (unsigned i = 0; i < l->n; i++) {
        sd_event_source_disable_unref(l->sockets[i].source);
        close(l->sockets[i].fd);
    }
    own_deinit(&l->attach);
    own_deinit(&l->grpc);
    free(l);
    return NULL;
}
