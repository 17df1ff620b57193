#include "tests/rawclient.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "client/libkvd/kvd.h"

void raw_init(struct raw *r)
{
    memset(r, 0, sizeof(*r));
    r->fd = r->page_fd = r->index_fd = -1;
}

int raw_connect(struct raw *r, const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};

    raw_init(r);
    snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
    r->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (r->fd < 0)
        return -errno;
    if (connect(r->fd, (struct sockaddr *)&a, sizeof(a)) < 0) {
        int e = -errno;

        close(r->fd);
        r->fd = -1;
        return e;
    }
    return 0;
}

static void drop_fds(struct raw_reply *y)
{
    while (y->n_fds)
        close(y->fds[--y->n_fds]);
}

void raw_close(struct raw *r)
{
    drop_fds(&r->reply);
    if (r->page)
        munmap(r->page, r->page_bytes);
    if (r->index)
        munmap(r->index, r->index_bytes);
    if (r->page_fd >= 0)
        close(r->page_fd);
    if (r->index_fd >= 0)
        close(r->index_fd);
    if (r->fd >= 0)
        close(r->fd);
    r->page = r->index = NULL;
    r->fd = r->page_fd = r->index_fd = -1;
}

int raw_send(struct raw *r, uint16_t type, const void *body, size_t n, const int *fds, size_t n_fds)
{
    return frame_send(r->fd, type, ++r->next_id, body, n, fds, n_fds, 0);
}

int raw_send_bytes(struct raw *r, const void *bytes, size_t n, const int *fds, size_t n_fds)
{
    struct iovec iov = {(void *)bytes, n};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    char *control = calloc(1, CMSG_SPACE(sizeof(int) * 256));
    ssize_t sent;

    if (!control || n_fds > 256)
        abort();
    if (n_fds) {
        struct cmsghdr *c;

        msg.msg_control = control;
        msg.msg_controllen = CMSG_SPACE(sizeof(int) * n_fds);
        c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * n_fds);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * n_fds);
    }
    sent = sendmsg(r->fd, &msg, MSG_NOSIGNAL);
    free(control);
    return sent < 0 ? -errno : 0;
}

int raw_receive(struct raw *r)
{
    struct raw_reply *y = &r->reply;
    uint8_t *packet = malloc(FRAME_MAX);
    struct pollfd p = {.fd = r->fd, .events = POLLIN};
    struct frame_header h;
    const uint8_t *body;
    const char *why;
    size_t n;
    int e;

    if (!packet)
        abort();
    drop_fds(y);
    y->error = 0;
    y->reason[0] = '\0';
    if (poll(&p, 1, 10000) <= 0) {
        free(packet);
        return -ETIMEDOUT;
    }
    e = frame_recv(r->fd, packet, FRAME_MAX, 0, &n, y->fds, &y->n_fds);
    if (e < 0 || n == 0) {
        free(packet);
        return 0; /* ended, or reset */
    }
    if (frame_parse(packet, n, y->n_fds, &h, &body, &why) < 0) {
        fprintf(stderr, "the daemon sent a bad frame: %s\n", why);
        abort();
    }
    y->type = h.type;
    y->request_id = h.request_id;
    y->n = h.length;
    memcpy(y->body, body, h.length);
    free(packet);
    if (h.type == (FRAME_ERROR | FRAME_REPLY) || h.type == FRAME_ERROR) {
        Kvd__V1__Error *m = kvd__v1__error__unpack(NULL, y->n, y->body);

        if (!m)
            abort();
        y->error = m->code ? m->code : KVD_E_INTERNAL;
        snprintf(y->reason, sizeof(y->reason), "%s; allowed: %s", m->reason, m->allowed);
        kvd__v1__error__free_unpacked(m, NULL);
    }
    return 1;
}

int raw_ask(struct raw *r, uint16_t type, const ProtobufCMessage *message, const int *fds, size_t n_fds)
{
    size_t n = protobuf_c_message_get_packed_size(message);
    uint8_t *body = malloc(n + 1);
    int e;

    if (!body)
        abort();
    protobuf_c_message_pack(message, body);
    e = raw_send(r, type, body, n, fds, n_fds);
    free(body);
    return e < 0 ? 0 : raw_receive(r);
}

int raw_hello(struct raw *r, const char *name)
{
    Kvd__V1__Hello hello = KVD__V1__HELLO__INIT;
    Kvd__V1__HelloReply *reply;
    int e;

    hello.version_min = hello.version_max = 1;
    hello.name = (char *)name;
    if (raw_ask(r, FRAME_HELLO, &hello.base, NULL, 0) != 1)
        return KVD_E_GONE;
    if (r->reply.error)
        return (int)r->reply.error;
    reply = kvd__v1__hello_reply__unpack(NULL, r->reply.n, r->reply.body);
    if (!reply || r->reply.n_fds != 2)
        return KVD_E_PROTOCOL;
    r->page_fd = r->reply.fds[0];
    r->index_fd = r->reply.fds[1];
    r->reply.n_fds = 0;
    r->page_bytes = reply->page_bytes;
    r->index_bytes = reply->index_bytes;
    r->worker = reply->worker;
    kvd__v1__hello_reply__free_unpacked(reply, NULL);
    r->page = mmap(NULL, r->page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, r->page_fd, 0);
    r->index = mmap(NULL, r->index_bytes, PROT_READ, MAP_SHARED, r->index_fd, 0);
    if (r->page == MAP_FAILED || r->index == MAP_FAILED)
        return KVD_E_NOMEM;
    e = lookup_view_init(r->index, r->index_bytes, &r->view);
    return e < 0 ? KVD_E_PROTOCOL : 0;
}

uint32_t raw_space(struct raw *r, const char *model, uint8_t ret_fingerprint[32])
{
    Kvd__V1__Space space = KVD__V1__SPACE__INIT;
    Kvd__V1__Group group = KVD__V1__GROUP__INIT, *groups[] = {&group};
    Kvd__V1__Layer layer = KVD__V1__LAYER__INIT, *layers[] = {&layer};
    Kvd__V1__SpaceReply *reply;
    uint32_t id;

    space.model = (char *)model;
    space.dtype = (char *)"f16";
    space.block_tokens = RAW_BLOCK_TOKENS;
    space.n_group = 1;
    space.group = groups;
    space.n_layer = 1;
    space.layer = layers;
    layer.n_kv_heads = 1;
    layer.dim_k = layer.dim_v = 64;
    layer.codec_k = layer.codec_v = layer.codec_first_k = layer.codec_first_v = (char *)"raw";
    if (raw_ask(r, FRAME_SPACE_OPEN, &space.base, NULL, 0) != 1 || r->reply.error)
        return 0;
    reply = kvd__v1__space_reply__unpack(NULL, r->reply.n, r->reply.body);
    if (!reply || reply->fingerprint.len != 32)
        return 0;
    memcpy(ret_fingerprint, reply->fingerprint.data, 32);
    id = reply->space;
    kvd__v1__space_reply__free_unpacked(reply, NULL);
    return id;
}

int raw_memfd(uint64_t bytes, unsigned seals, void **ret_map)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
        abort();
    if (ret_map) {
        *ret_map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (*ret_map == MAP_FAILED)
            abort();
    }
    if (seals && fcntl(fd, F_ADD_SEALS, seals) < 0)
        abort();
    return fd;
}

uint32_t raw_staging(struct raw *r, int fd, uint64_t bytes)
{
    Kvd__V1__StagingAdd add = KVD__V1__STAGING_ADD__INIT;
    Kvd__V1__StagingReply *reply;
    uint32_t id;

    add.bytes = bytes;
    if (raw_ask(r, FRAME_STAGING_ADD, &add.base, &fd, 1) != 1 || r->reply.error)
        return 0;
    reply = kvd__v1__staging_reply__unpack(NULL, r->reply.n, r->reply.body);
    if (!reply)
        return 0;
    id = reply->staging;
    kvd__v1__staging_reply__free_unpacked(reply, NULL);
    return id;
}

int raw_publish(struct raw *r, uint32_t space, uint32_t staging, const uint8_t *parent, size_t n_parent,
                const uint32_t *tokens, size_t n_tokens, uint64_t offset)
{
    Kvd__V1__Publish publish = KVD__V1__PUBLISH__INIT;
    Kvd__V1__PublishBlock block = KVD__V1__PUBLISH_BLOCK__INIT, *blocks[] = {&block};
    Kvd__V1__PublishReply *reply;
    int status;

    publish.space = space;
    publish.staging = staging;
    publish.dtype = (char *)"f16";
    publish.n_block = 1;
    publish.block = blocks;
    block.parent.data = (uint8_t *)parent;
    block.parent.len = n_parent;
    block.token = (uint32_t *)tokens;
    block.n_token = n_tokens;
    block.offset = offset;
    if (raw_ask(r, FRAME_PUBLISH, &publish.base, NULL, 0) != 1)
        return -KVD_E_GONE;
    if (r->reply.error)
        return -(int)r->reply.error;
    reply = kvd__v1__publish_reply__unpack(NULL, r->reply.n, r->reply.body);
    if (!reply || reply->n_status != 1)
        return -KVD_E_PROTOCOL;
    status = (int)reply->status[0];
    if (status == KVD__V1__PUBLISH_STATUS__FAILED) {
        r->reply.error = reply->n_error ? reply->error[0]->code : KVD_E_INTERNAL;
        snprintf(r->reply.reason, sizeof(r->reply.reason), "%s; allowed: %s",
                 reply->n_error ? reply->error[0]->reason : "", reply->n_error ? reply->error[0]->allowed : "");
    }
    kvd__v1__publish_reply__free_unpacked(reply, NULL);
    return status;
}
