/* Replies: packed, sent, and queued where the worker does not read. */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/daemon.h"
#include "daemon/reply.h"
#include "daemon/session.h"
#include "proto/kvd.pb-c.h"

struct out {
    struct out *next;
    uint16_t type;
    uint32_t id;
    int fds[FRAME_FDS_MAX];
    size_t n_fds;
    size_t n;
    uint8_t body[];
};

static struct out *out_free(struct out *o)
{
    while (o->n_fds > 0)
        close(o->fds[--o->n_fds]);
    free(o);
    return NULL;
}

void replies_drop(struct session *s)
{
    while (s->out_first) {
        struct out *o = s->out_first;

        s->out_first = o->next;
        out_free(o);
    }
    s->out_last = &s->out_first;
    s->out_bytes = 0;
}

static void enqueue(struct session *s, uint16_t type, uint32_t id, const void *body, size_t n, const int *fds, size_t n_fds)
{
    struct daemon *d = s->daemon;
    size_t cost = sizeof(struct out) + n;
    struct out *o;

    if (s->out_bytes + cost > d->options.reply_queue_bytes) {
        d->metrics.sessions_overrun++;
        session_close(s, "its replies are more than reply_queue_bytes and it does not read them");
        return;
    }
    o = malloc(cost);
    if (!o) {
        session_close(s, "no memory for its replies");
        return;
    }
    *o = (struct out){.type = type, .id = id, .n = n};
    if (n)
        memcpy(o->body, body, n);
    for (; o->n_fds < n_fds; o->n_fds++) {
        o->fds[o->n_fds] = fcntl(fds[o->n_fds], F_DUPFD_CLOEXEC, 3);
        if (o->fds[o->n_fds] < 0) {
            out_free(o);
            session_close(s, "no descriptors for its replies");
            return;
        }
    }
    if (!s->out_first) {
        s->out_since_usec = daemon_now_usec();
        daemon_wake_at(d, s->out_since_usec + d->options.stuck_timeout);
    }
    *s->out_last = o;
    s->out_last = &o->next;
    s->out_bytes += cost;
    sd_event_source_set_io_events(s->io, EPOLLOUT); /* and not EPOLLIN: no new requests before these are read */
}

static void send_failed(struct session *s, int r)
{
    if (r == -EPIPE || r == -ECONNRESET || r == -ENOTCONN) {
        session_close(s, NULL);
        return;
    }
    log_write(&s->daemon->log, LOG_WARNING, "worker %llu: sending: %s", (unsigned long long)s->worker, strerror(-r));
    session_close(s, NULL);
}

static void send_body(struct session *s, uint16_t type, uint32_t id, const void *body, size_t n, const int *fds, size_t n_fds)
{
    int r;

    if (s->state == SESSION_CLOSING)
        return;
    if (!s->out_first) {
        r = frame_send(s->fd, type, id, body, n, fds, n_fds, MSG_DONTWAIT);
        if (r == 0)
            return;
        if (r != -EAGAIN) {
            send_failed(s, r);
            return;
        }
    }
    enqueue(s, type, id, body, n, fds, n_fds);
}

void replies_flush(struct session *s)
{
    while (s->out_first) {
        struct out *o = s->out_first;
        int r = frame_send(s->fd, o->type, o->id, o->body, o->n, o->fds, o->n_fds, MSG_DONTWAIT);

        if (r == -EAGAIN)
            return;
        if (r < 0) {
            send_failed(s, r);
            return;
        }
        s->out_first = o->next;
        s->out_bytes -= sizeof(*o) + o->n;
        s->out_since_usec = daemon_now_usec(); /* it does read */
        out_free(o);
    }
    s->out_last = &s->out_first;
    sd_event_source_set_io_events(s->io, s->paused ? 0 : EPOLLIN);
}

/* Descriptors that wait in a socket count against the daemon's own limit, whoever ought to read them. */
static bool too_many_fds(struct session *s, size_t n_fds)
{
    int unread = 0;

    if (ioctl(s->fd, SIOCOUTQ, &unread) == 0 && unread == 0 && !s->out_first)
        s->unread_fds = 0;
    if (s->unread_fds + n_fds > SESSION_UNREAD_FDS_MAX)
        return true;
    s->unread_fds += (uint32_t)n_fds;
    return false;
}

void reply(struct session *s, uint16_t type, uint32_t id, const ProtobufCMessage *message, const int *fds, size_t n_fds)
{
    struct daemon *d = s->daemon;
    size_t n = 0;

    if (s->state == SESSION_CLOSING)
        return;
    if (s->link) {
        assert(n_fds == 0);
        s->link->reply(s, type, id, message);
        return;
    }
    if (n_fds && too_many_fds(s, n_fds)) {
        reply_error(s, id, ERROR_LIMIT, "read the replies that came before", "%u descriptors wait in the socket to be read",
                    s->unread_fds);
        return;
    }
    if (message) {
        n = protobuf_c_message_get_packed_size(message);
        if (n > sizeof(d->tx)) {
            reply_error(s, id, ERROR_LIMIT, "ask for less at once", "the reply is %zu bytes, and a frame holds %zu", n,
                        sizeof(d->tx));
            return;
        }
        protobuf_c_message_pack(message, d->tx);
    }
    send_body(s, type | FRAME_REPLY, id, d->tx, n, fds, n_fds);
}

void reply_error(struct session *s, uint32_t id, enum error_code code, const char *allowed, const char *format, ...)
{
    Kvd__V1__Error e = KVD__V1__ERROR__INIT;
    uint8_t body[1024];
    char reason[400];
    va_list ap;
    size_t n;

    va_start(ap, format);
    vsnprintf(reason, sizeof(reason), format, ap);
    va_end(ap);
    if (s->link) {
        s->daemon->metrics.errors_replied++;
        if (s->state != SESSION_CLOSING)
            s->link->reply_error(s, id, code, reason, allowed ? allowed : "");
        return;
    }
    e.code = code;
    e.reason = reason;
    e.allowed = (char *)(allowed ? allowed : "");
    n = kvd__v1__error__get_packed_size(&e);
    assert(n <= sizeof(body)); /* allowed is a constant of ours or an option's description */
    kvd__v1__error__pack(&e, body);
    s->daemon->metrics.errors_replied++;
    send_body(s, FRAME_ERROR | FRAME_REPLY, id, body, n, NULL, 0);
}
