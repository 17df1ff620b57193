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
#include "daemon/session.h"

enum { SOCKETS_MAX = 8, ACCEPTS_A_TURN = 16, BACKLOG = 256, PAUSE_USEC = 1000000 };

struct listener {
    struct daemon *daemon;
    int fds[SOCKETS_MAX];
    sd_event_source *sources[SOCKETS_MAX];
    unsigned n;
    uint64_t paused_until_usec; /* 0: not paused */
    int lock_fd;              /* -1: the socket was passed */
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    char lock_path[sizeof(((struct sockaddr_un *)0)->sun_path) + 5];
    bool bound;
};

static void set_enabled(struct listener *l, int how)
{
    for (unsigned i = 0; i < l->n; i++)
        sd_event_source_set_enabled(l->sources[i], how);
}

static int on_connection(sd_event_source *source, int fd, uint32_t events, void *ctx)
{
    struct listener *l = ctx;
    struct daemon *d = l->daemon;

    (void)source;
    (void)events;
    for (int i = 0; i < ACCEPTS_A_TURN; i++) {
        int conn = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (conn >= 0) {
            session_accept(d, conn);
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

static int take_passed(struct listener *l, int n)
{
    struct daemon *d = l->daemon;

    if (n > SOCKETS_MAX) {
        log_write(&d->log, LOG_ERROR, "%d sockets were passed; allowed: %d", n, SOCKETS_MAX);
        return -E2BIG;
    }
    for (int fd = SD_LISTEN_FDS_START; fd < SD_LISTEN_FDS_START + n; fd++) {
        if (sd_is_socket_unix(fd, SOCK_SEQPACKET, 1, NULL, 0) <= 0) {
            log_write(&d->log, LOG_ERROR,
                      "descriptor %d that was passed is no listening socket of the right kind; allowed: ListenSequentialPacket=",
                      fd);
            return -EINVAL;
        }
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
        fcntl(fd, F_SETFD, FD_CLOEXEC);
        l->fds[l->n++] = fd;
    }
    return 0;
}

/* ---- our own ---- */

/* Tells what failed with errno at the socket's path, and returns it. */
static int failed(struct listener *l, const char *doing)
{
    int r = -errno;

    log_write(&l->daemon->log, LOG_ERROR, "%s: %s: %s", l->path, doing, strerror(-r));
    return r;
}

static void lock_owner(int fd, char *buf, size_t n)
{
    ssize_t got = pread(fd, buf, n - 1, 0);

    buf[got > 0 ? got : 0] = 0;
    buf[strcspn(buf, "\n")] = 0;
}

/* Holds PATH.lock. A lock file that its owner has taken away meanwhile is tried again under its name. */
static int take_lock(struct listener *l)
{
    struct daemon *d = l->daemon;
    char owner[32];

    for (;;) {
        struct stat held, named;
        int r;

        l->lock_fd = open(l->lock_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (l->lock_fd < 0) {
            r = -errno;
            log_write(&d->log, LOG_ERROR, "%s: %s%s", l->lock_path, strerror(-r),
                      r == -ENOENT   ? "; make the folder of the socket first"
                      : r == -EACCES ? "; the folder of the socket must be writable, or choose another with --socket=PATH"
                                     : "");
            return r;
        }
        if (flock(l->lock_fd, LOCK_EX | LOCK_NB) < 0) {
            lock_owner(l->lock_fd, owner, sizeof(owner));
            log_write(&d->log, LOG_ERROR, "%s: another daemon (pid %s) serves this socket; stop it, or choose another with --socket=PATH",
                      l->path, *owner ? owner : "unknown");
            return -EADDRINUSE;
        }
        if (fstat(l->lock_fd, &held) == 0 && stat(l->lock_path, &named) == 0 && held.st_ino == named.st_ino &&
            held.st_dev == named.st_dev)
            break;
        close(l->lock_fd);
    }
    snprintf(owner, sizeof(owner), "%d\n", getpid());
    if (ftruncate(l->lock_fd, 0) < 0 || pwrite(l->lock_fd, owner, strlen(owner), 0) < 0)
        log_write(&d->log, LOG_WARNING, "%s: %s", l->lock_path, strerror(errno));
    return 0;
}

/* What stands at the path: nothing (0), a socket that nobody listens at (removed, 0), or something that stays. */
static int clear_path(struct listener *l, const struct sockaddr_un *address)
{
    struct daemon *d = l->daemon;
    struct stat st;
    int fd, r;

    if (lstat(l->path, &st) < 0)
        return errno == ENOENT ? 0 : failed(l, "looking at it");
    if (!S_ISSOCK(st.st_mode)) {
        log_write(&d->log, LOG_ERROR, "%s: there is a file that is no socket; move it away", l->path);
        return -EEXIST;
    }
    fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return failed(l, "making a socket");
    r = connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0 ? -errno : 0;
    close(fd);
    if (r != -ECONNREFUSED && r != -ENOENT) {
        log_write(&d->log, LOG_ERROR, "%s: another program listens at this socket (%s)", l->path,
                  r == 0 ? "it took a connection" : strerror(-r));
        return -EADDRINUSE;
    }
    log_write(&d->log, LOG_INFO, "%s: left over from a daemon that is gone; replaced", l->path);
    return unlink(l->path) < 0 && errno != ENOENT ? failed(l, "removing it") : 0;
}

static int set_owner(struct listener *l)
{
    const struct options *o = &l->daemon->options;

    if (*o->socket_group) {
        uint32_t gid;

        if (id_resolver_system.group(NULL, o->socket_group, &gid) < 0) {
            log_write(&l->daemon->log, LOG_ERROR, "socket_group: there is no group \"%s\"", o->socket_group);
            return -EINVAL;
        }
        if (chown(l->path, (uid_t)-1, gid) < 0)
            return failed(l, "giving it to socket_group");
    }
    return chmod(l->path, (mode_t)o->socket_mode) < 0 ? failed(l, "setting socket_mode") : 0;
}

static int make_own(struct listener *l)
{
    const struct options *o = &l->daemon->options;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int r;

    snprintf(l->path, sizeof(l->path), "%s", o->socket);
    snprintf(l->lock_path, sizeof(l->lock_path), "%s.lock", l->path);
    memcpy(address.sun_path, l->path, sizeof(address.sun_path));
    r = take_lock(l);
    if (r < 0)
        return r;
    r = clear_path(l, &address);
    if (r < 0)
        return r;
    l->fds[0] = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (l->fds[0] < 0)
        return failed(l, "making a socket");
    l->n = 1;
    if (bind(l->fds[0], (struct sockaddr *)&address, sizeof(address)) < 0)
        return failed(l, "binding");
    l->bound = true;
    r = set_owner(l); /* nobody can connect before listen() */
    if (r < 0)
        return r;
    return listen(l->fds[0], BACKLOG) < 0 ? failed(l, "listening") : 0;
}

int listener_create(struct daemon *d, struct listener **ret)
{
    struct listener *l = calloc(1, sizeof(*l));
    int n = sd_listen_fds(1), r;

    if (!l) {
        log_write(&d->log, LOG_ERROR, "the socket: no memory");
        return -ENOMEM;
    }
    l->daemon = d;
    l->lock_fd = -1;
    if (n < 0)
        log_write(&d->log, LOG_ERROR, "sockets of the service manager: %s", strerror(-n));
    r = n < 0 ? n : n > 0 ? take_passed(l, n) : make_own(l);
    for (unsigned i = 0; i < l->n && r >= 0; i++) {
        r = sd_event_add_io(d->event, &l->sources[i], l->fds[i], EPOLLIN, on_connection, l);
        if (r < 0)
            log_write(&d->log, LOG_ERROR, "the socket cannot be watched: %s", strerror(-r));
    }
    if (r < 0) {
        listener_destroy(l);
        return r;
    }
    *ret = l;
    return 0;
}

const char *listener_path(const struct listener *l)
{
    return l->bound ? l->path : "a socket of the service manager";
}

struct listener *listener_destroy(struct listener *l)
{
    if (!l)
        return NULL;
    for (unsigned i = 0; i < l->n; i++) {
        sd_event_source_disable_unref(l->sources[i]);
        close(l->fds[i]);
    }
    if (l->bound)
        unlink(l->path);
    if (l->lock_fd >= 0) {
        if (l->bound)
            unlink(l->lock_path); /* while it is held: whoever opened it meanwhile sees that the name is another file's */
        close(l->lock_fd);
    }
    free(l);
    return NULL;
}
