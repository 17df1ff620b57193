#include "kvd_mux.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "kvd_error.h"
#include "proto/kvd.pb-c.h"

/* The receiver blocks in recvmsg() for at most this long (SO_RCVTIMEO), so that a long wait costs one system call a
 * reply and a deadline is still kept: what is left of a wait below it is waited for with poll(). */
#define RECEIVE_MSEC 1000u

uint64_t mux_now_msec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

int mux_init(struct mux *mux, int fd, uint64_t cookie)
{
    struct timeval receive = {.tv_sec = RECEIVE_MSEC / 1000};

    *mux = (struct mux){.fd = fd, .cookie = cookie, .buf = malloc(FRAME_MAX)};
    if (!mux->buf)
        return error_set(cookie, KVD_E_NOMEM, "no memory for a receive buffer of %u bytes", FRAME_MAX);
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &receive, sizeof(receive)) < 0) {
        int r = errno;

        free(mux->buf);
        return error_set(cookie, KVD_E_CONNECT, "SO_RCVTIMEO: %s", strerror(r));
    }
    pthread_mutex_init(&mux->lock, NULL);
    return 0;
}

void mux_deinit(struct mux *mux)
{
    close(mux->fd);
    free(mux->buf);
    pthread_mutex_destroy(&mux->lock);
}

void mux_reply_clear(struct mux_reply *reply)
{
    for (size_t i = 0; i < reply->n_fds; i++)
        if (reply->fds[i] >= 0)
            close(reply->fds[i]);
    free(reply->body);
    *reply = (struct mux_reply){0};
}

static void finish(struct mux_call *call, int error, const char *reason)
{
    call->done = true;
    call->error = error;
    snprintf(call->reason, sizeof(call->reason), "%s", reason);
    if (call->waiting)
        pthread_cond_signal(&call->cond);
}

static const char *dead_reason(int error)
{
    return error == KVD_E_GONE ? "the daemon closed the connection"
                               : "the connection was given up after a broken reply";
}

static void kill_locked(struct mux *mux, int error, const char *reason)
{
    if (atomic_load(&mux->dead) == 0)
        atomic_store(&mux->dead, error);
    for (struct mux_call *c = mux->pending; c; c = c->next)
        if (!c->done)
            finish(c, error, reason);
}

void mux_kill(struct mux *mux, int error)
{
    pthread_mutex_lock(&mux->lock);
    kill_locked(mux, error, dead_reason(error));
    pthread_mutex_unlock(&mux->lock);
    shutdown(mux->fd, SHUT_RDWR); /* ends a receiver's wait; closing would let the number be reused under it */
}

/* An error reply's code and text. */
static void finish_error(struct mux_call *call, const uint8_t *body, size_t n)
{
    Kvd__V1__Error *e = kvd__v1__error__unpack(NULL, n, body);
    char text[sizeof(call->reason)];

    if (!e || e->code == 0) {
        finish(call, KVD_E_PROTOCOL, "an error reply that cannot be read");
    } else {
        snprintf(text, sizeof(text), "%s%s%s", e->reason, e->allowed[0] ? "; allowed: " : "", e->allowed);
        finish(call, (int)e->code, text);
    }
    if (e)
        kvd__v1__error__free_unpacked(e, NULL);
}

/* Hands a checked packet to its call. Returns false if it fits none of the protocol's rules. By lock. */
static bool dispatch(struct mux *mux, const struct frame_header *h, const uint8_t *body, int *fds, size_t n_fds)
{
    struct mux_call *call = mux->pending;

    while (call && (call->id != h->request_id || call->done))
        call = call->next;
    if (!call || h->type == (FRAME_ERROR | FRAME_REPLY)) {
        /* No call: its owner's time was over. */
        for (size_t i = 0; i < n_fds; i++)
            close(fds[i]);
        if (call)
            finish_error(call, body, h->length);
        return true;
    }
    if (h->type != (call->type | FRAME_REPLY)) {
        for (size_t i = 0; i < n_fds; i++)
            close(fds[i]);
        return false;
    }
    call->reply.body = malloc(h->length ? h->length : 1);
    if (!call->reply.body) {
        for (size_t i = 0; i < n_fds; i++)
            close(fds[i]);
        finish(call, KVD_E_NOMEM, "no memory for a reply");
        return true;
    }
    memcpy(call->reply.body, body, h->length);
    call->reply.n = h->length;
    memcpy(call->reply.fds, fds, n_fds * sizeof(*fds));
    call->reply.n_fds = n_fds;
    finish(call, 0, "");
    return true;
}

/* One packet, or none within the time that is left. Called without the lock by the receiver; returns with the lock. */
static void receive_one(struct mux *mux, uint64_t left_msec)
{
    struct frame_header h;
    const uint8_t *body = NULL;
    const char *reason = "a packet or its descriptors were cut (is the limit of open files reached?)";
    int fds[FRAME_FDS_MAX];
    size_t n = 0, n_fds = 0;
    int r = 0;

    if (left_msec < RECEIVE_MSEC) {
        struct pollfd p = {.fd = mux->fd, .events = POLLIN};

        r = poll(&p, 1, (int)left_msec + 1) > 0 ? 0 : -EAGAIN;
    }
    if (r == 0)
        r = frame_recv(mux->fd, mux->buf, FRAME_MAX, 0, &n, fds, &n_fds);
    if (r == 0 && n > 0) {
        r = frame_parse(mux->buf, n, n_fds, &h, &body, &reason);
        if (r < 0)
            for (size_t i = 0; i < n_fds; i++)
                close(fds[i]);
    }
    pthread_mutex_lock(&mux->lock);
    mux->receiving = false;
    if (r == -EAGAIN || r == -EINTR)
        return;
    if ((r == 0 && n == 0) || r == -ECONNRESET || r == -EPIPE)
        kill_locked(mux, KVD_E_GONE, dead_reason(KVD_E_GONE));
    else if (r < 0)
        kill_locked(mux, KVD_E_PROTOCOL, reason);
    else if (!dispatch(mux, &h, body, fds, n_fds))
        kill_locked(mux, KVD_E_PROTOCOL, "a reply of another type than the request");
}

static int send_all(struct mux *mux, const struct mux_call *call, const void *body, size_t n, const int *fds,
                    size_t n_fds, uint32_t timeout_msec)
{
    uint64_t deadline = mux_now_msec() + timeout_msec;
    int r;

    while ((r = frame_send(mux->fd, call->type, call->id, body, n, fds, n_fds, MSG_DONTWAIT)) == -EAGAIN) {
        struct pollfd p = {.fd = mux->fd, .events = POLLOUT};
        uint64_t now = mux_now_msec();

        if (now >= deadline)
            return error_set(mux->cookie, KVD_E_TIMEOUT, "the daemon took no request for %u ms", timeout_msec);
        poll(&p, 1, (int)(deadline - now));
    }
    if (r == -EPIPE || r == -ECONNRESET || r == -ENOTCONN) {
        mux_kill(mux, KVD_E_GONE);
        return error_set(mux->cookie, KVD_E_GONE, "%s", dead_reason(KVD_E_GONE));
    }
    if (r < 0)
        return error_set(mux->cookie, r == -EMSGSIZE ? KVD_E_LIMIT : KVD_E_INTERNAL,
                         "a request of %zu bytes was not sent: %s", n, strerror(-r));
    return 0;
}

/* Takes the call out and lets another waiter receive (M2, M3). By lock. */
static void unlink_call(struct mux *mux, struct mux_call *call)
{
    struct mux_call **p = &mux->pending;

    while (*p != call)
        p = &(*p)->next;
    *p = call->next;
    if (mux->receiving)
        return;
    for (struct mux_call *c = mux->pending; c; c = c->next)
        if (c->waiting) {
            pthread_cond_signal(&c->cond);
            return;
        }
}

/* Of a request that could not be sent. */
static void cancel(struct mux *mux, struct mux_call *call)
{
    pthread_mutex_lock(&mux->lock);
    unlink_call(mux, call);
    pthread_mutex_unlock(&mux->lock);
    pthread_cond_destroy(&call->cond);
    mux_reply_clear(&call->reply);
}

int mux_send(struct mux *mux, struct mux_call *call, uint16_t type, const void *body, size_t n, const int *fds,
             size_t n_fds, uint32_t timeout_msec)
{
    pthread_condattr_t attr;
    int r;

    *call = (struct mux_call){.type = type};
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&call->cond, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_lock(&mux->lock);
    r = atomic_load(&mux->dead);
    if (r == 0) {
        if (++mux->last_id == 0)
            mux->last_id = 1;
        call->id = mux->last_id;
        call->next = mux->pending;
        mux->pending = call;
    }
    pthread_mutex_unlock(&mux->lock);
    if (r != 0) {
        pthread_cond_destroy(&call->cond);
        return error_set(mux->cookie, r, "%s", dead_reason(r));
    }
    r = send_all(mux, call, body, n, fds, n_fds, timeout_msec);
    if (r != 0)
        cancel(mux, call);
    return r;
}

int mux_wait(struct mux *mux, struct mux_call *call, uint32_t timeout_msec, struct mux_reply *ret_reply)
{
    uint64_t deadline = mux_now_msec() + timeout_msec;
    struct timespec at = {.tv_sec = (time_t)(deadline / 1000), .tv_nsec = (long)(deadline % 1000) * 1000000};
    int error;

    pthread_mutex_lock(&mux->lock);
    while (!call->done) {
        uint64_t now = mux_now_msec();

        if (now >= deadline) {
            snprintf(call->reason, sizeof(call->reason), "the daemon did not answer within %u ms", timeout_msec);
            call->error = KVD_E_TIMEOUT;
            break;
        }
        if (!mux->receiving) {
            mux->receiving = true;
            pthread_mutex_unlock(&mux->lock);
            receive_one(mux, deadline - now);
        } else {
            call->waiting = true;
            pthread_cond_timedwait(&call->cond, &mux->lock, &at);
            call->waiting = false;
        }
    }
    error = call->error;
    unlink_call(mux, call);
    pthread_mutex_unlock(&mux->lock);
    pthread_cond_destroy(&call->cond);
    if (error == 0 && ret_reply)
        *ret_reply = call->reply;
    else
        mux_reply_clear(&call->reply);
    return error == 0 ? 0 : error_set(mux->cookie, error, "%s", call->reason);
}

int mux_request(struct mux *mux, uint16_t type, const void *body, size_t n, const int *fds, size_t n_fds,
                uint32_t timeout_msec, struct mux_reply *ret_reply)
{
    struct mux_call call;
    int r = mux_send(mux, &call, type, body, n, fds, n_fds, timeout_msec);

    return r != 0 ? r : mux_wait(mux, &call, timeout_msec, ret_reply);
}
