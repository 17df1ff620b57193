#include "frame.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

void frame_header_pack(uint8_t wire[FRAME_HEADER_BYTES], uint16_t type, uint32_t request_id, uint32_t length,
                       uint16_t n_fds)
{
    struct frame_header h = {
        .magic = htole32(FRAME_MAGIC),
        .version = htole16(FRAME_VERSION),
        .type = htole16(type),
        .request_id = htole32(request_id),
        .length = htole32(length),
        .n_fds = htole16(n_fds),
    };

    memcpy(wire, &h, sizeof(h));
}

static int bad(const char *reason, const char **ret_reason)
{
    *ret_reason = reason;
    return -EBADMSG;
}

int frame_parse(const uint8_t *packet, size_t n, size_t n_fds, struct frame_header *ret_header,
                const uint8_t **ret_body, const char **ret_reason)
{
    struct frame_header h;

    memset(ret_header, 0, sizeof(*ret_header));
    if (n < FRAME_HEADER_BYTES)
        return bad("packet is shorter than a frame header of 24 bytes", ret_reason);
    memcpy(&h, packet, sizeof(h));
    h.magic = le32toh(h.magic);
    h.version = le16toh(h.version);
    h.type = le16toh(h.type);
    h.request_id = le32toh(h.request_id);
    h.length = le32toh(h.length);
    h.n_fds = le16toh(h.n_fds);
    h.flags = le16toh(h.flags);
    h.reserved = le32toh(h.reserved);
    if (h.magic != FRAME_MAGIC)
        return bad("frame magic is not KVD1", ret_reason);
    *ret_header = h;
    if (h.version != FRAME_VERSION) {
        *ret_reason = "frame version is not 1, the only one spoken here";
        return -EPROTONOSUPPORT;
    }
    if (h.flags != 0 || h.reserved != 0)
        return bad("reserved bits of the frame header are not zero", ret_reason);
    if (h.request_id == 0)
        return bad("request id is 0; allowed: 1 to 4294967295", ret_reason);
    if (h.length > FRAME_BODY_MAX)
        return bad("frame body is longer than 98304 bytes", ret_reason);
    if (h.length != n - FRAME_HEADER_BYTES)
        return bad("frame length does not equal the packet's bytes after the header", ret_reason);
    if (h.n_fds != n_fds || n_fds > FRAME_FDS_MAX)
        return bad("descriptors that came do not equal the frame's n_fds (at most 4)", ret_reason);
    *ret_body = packet + FRAME_HEADER_BYTES;
    return 0;
}

int frame_send(int fd, uint16_t type, uint32_t request_id, const void *body, size_t n, const int *fds, size_t n_fds,
               int flags)
{
    uint8_t header[FRAME_HEADER_BYTES];
    struct iovec iov[2] = {{header, sizeof(header)}, {(void *)body, n}};
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(sizeof(int) * FRAME_FDS_MAX)];
    } control;
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n ? 2 : 1};
    ssize_t sent;

    if (n > FRAME_BODY_MAX)
        return -EMSGSIZE;
    if (n_fds > FRAME_FDS_MAX)
        return -EINVAL;
    frame_header_pack(header, type, request_id, (uint32_t)n, (uint16_t)n_fds);
    if (n_fds) {
        struct cmsghdr *c;

        memset(&control, 0, sizeof(control));
        msg.msg_control = control.buf;
        msg.msg_controllen = CMSG_SPACE(sizeof(int) * n_fds);
        c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * n_fds);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * n_fds);
    }
    do
        sent = sendmsg(fd, &msg, flags | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : 0;
}

/* Collects the descriptors of a received message; closes those beyond FRAME_FDS_MAX. */
static size_t take_fds(struct msghdr *msg, int *ret_fds)
{
    size_t n = 0;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        size_t here;

        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        here = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < here; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
            if (n < FRAME_FDS_MAX)
                ret_fds[n++] = fd;
            else
                close(fd);
        }
    }
    return n;
}

int frame_recv(int fd, uint8_t *buf, size_t buf_bytes, int flags, size_t *ret_n, int ret_fds[FRAME_FDS_MAX],
               size_t *ret_n_fds)
{
    struct iovec iov = {buf, buf_bytes};
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(sizeof(int) * FRAME_FDS_MAX)];
    } control;
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof(control.buf)};
    ssize_t got;
    size_t n_fds;
    int fds[FRAME_FDS_MAX];

    do
        got = recvmsg(fd, &msg, flags | MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return -errno;
    n_fds = take_fds(&msg, fds);
    if (got == 0 || (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC))) /* an empty packet looks like the end, and may carry descriptors */
        while (n_fds > 0)
            close(fds[--n_fds]);
    if (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        return -EMSGSIZE;
    memcpy(ret_fds, fds, n_fds * sizeof(int));
    *ret_n = (size_t)got;
    *ret_n_fds = n_fds;
    return 0;
}
