/* What a worker may send: a whole daemon in this process, and one session that is given packet after packet. Whatever they are, the daemon
 * lives, answers frames only with frames, and is as empty as before when the session has gone.
 *
 * Input: packets, each a byte of flags and two bytes of length (little-endian) before its bytes.
 *   flags & 1: the header is made right (magic, version, length, number of descriptors; type and body stay as they are)
 *   flags & 2: a sealed memfd comes with it
 *   flags & 4: the loop goes round until nothing is left to do before the next packet
 *   flags & 8: first a HELLO that is right, if there was none */
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/daemon.h"
#include "daemon/publish.h"
#include "daemon/session.h"
#include "daemon/tenants.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { STAGING_BYTES = 16384, INDEX_ENTRIES = 64, PACKETS_MAX = 64 };

/* The daemon lives from input to input: starting one takes a thousand times as long as a session. */
static struct daemon *the_daemon(void)
{
    static struct daemon *d;
    static const char config[] = "host_bytes = 16M\nslab_bytes = 2M\nindex_entries = 64\njob_threads = 1\nlog_level = error\n"
                                 "malformed_max = 1000\nleases = 64\nhit_log = 64\nspaces_max = 65534\nstaging_bytes = 64K\n";
    struct option_error error;
    struct options o;

    if (d)
        return d;
    if (options_init(&o) < 0 || options_read_text(&o, "fuzz", config, strlen(config), &id_resolver_system, &error) < 0 ||
        daemon_create(&o, &d) < 0)
        abort();
    return d;
}

static void settle(struct daemon *d)
{
    while (sd_event_run(d->event, 0) > 0)
        ;
}

/* Every packet that the daemon has sent is a frame. */
static void read_replies(int fd)
{
    static uint8_t packet[FRAME_MAX];
    int fds[FRAME_FDS_MAX];
    size_t n, n_fds;

    while (frame_recv(fd, packet, sizeof(packet), MSG_DONTWAIT, &n, fds, &n_fds) == 0 && n > 0) {
        struct frame_header h;
        const uint8_t *body;
        const char *reason = "";
        int r = frame_parse(packet, n, n_fds, &h, &body, &reason);

        if (r < 0 || !(h.type & FRAME_REPLY)) {
            fprintf(stderr, "the daemon's reply is no frame: %s\n", reason);
            abort();
        }
        while (n_fds > 0)
            close(fds[--n_fds]);
    }
}

static int staging_fd(void)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0 || ftruncate(fd, STAGING_BYTES) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) < 0)
        abort();
    return fd;
}

static void say_hello(int fd)
{
    static const uint8_t hello[] = {8, 1, 16, 1}; /* version_min 1, version_max 1 */

    frame_send(fd, FRAME_HELLO, 1, hello, sizeof(hello), NULL, 0, MSG_DONTWAIT);
}

static void send_packet(int fd, const uint8_t *bytes, size_t n, unsigned flags)
{
    static uint8_t packet[FRAME_MAX];
    int memfd = flags & 2 ? staging_fd() : -1;
    struct iovec iov = {packet, n};
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

    memcpy(packet, bytes, n);
    if ((flags & 1) && n >= FRAME_HEADER_BYTES) {
        struct frame_header h;

        memcpy(&h, packet, sizeof(h));
        frame_header_pack(packet, h.type, h.request_id ? h.request_id : 1, (uint32_t)(n - FRAME_HEADER_BYTES), memfd >= 0);
    }
    if (memfd >= 0) {
        struct cmsghdr *c;

        memset(&control, 0, sizeof(control));
        msg.msg_control = control.buf;
        msg.msg_controllen = sizeof(control.buf);
        c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &memfd, sizeof(int));
    }
    sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL); /* a session that was ended takes nothing */
    if (memfd >= 0)
        close(memfd);
}

static void converse(struct daemon *d, int fd, const uint8_t *data, size_t size)
{
    bool greeted = false;

    for (int i = 0; i < PACKETS_MAX && size >= 3; i++) {
        unsigned flags = data[0];
        size_t n = (size_t)(data[1] | data[2] << 8);

        data += 3;
        size -= 3;
        n = n < size ? n : size;
        if ((flags & 8) && !greeted) {
            say_hello(fd);
            greeted = true;
        }
        send_packet(fd, data, n, flags);
        data += n;
        size -= n;
        if (flags & 4) {
            settle(d);
            read_replies(fd);
        }
    }
    settle(d);
    read_replies(fd);
}

static void check_empty(struct daemon *d)
{
    struct cache_stats s;

    /* A DRAIN, a CONFIG or a PIN that came through would change what later inputs meet. */
    d->draining = false;
    cache_assert_valid(d->tenants->first->cache);
    cache_stats(d->tenants->first->cache, &s);
    if (d->n_sessions || d->staging_bytes || s.n_reserved || publishing_blocks(d->publishing) || d->n_walks) {
        fprintf(stderr, "left: %u sessions, %llu bytes of staging, %llu blocks reserved, %u walks\n", d->n_sessions,
                (unsigned long long)d->staging_bytes, (unsigned long long)s.n_reserved, d->n_walks);
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct daemon *d = the_daemon();
    int fds[2];

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) < 0)
        abort();
    session_accept(d, fds[1]);
    converse(d, fds[0], data, size);
    close(fds[0]);
    settle(d);
    while (publishing_blocks(d->publishing) || d->n_walks)
        if (sd_event_run(d->event, UINT64_MAX) < 0)
            abort();
    settle(d);
    check_empty(d);
    return 0;
}
