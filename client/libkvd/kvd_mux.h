/* Requests of many threads over one attach socket.
 *
 * There is no thread of our own. A caller sends its request (a packet is sent whole, so senders need no lock) and
 * waits for the reply. One of the waiting callers at a time is the receiver: it reads packets and hands each to the
 * call that it belongs to. When the receiver has its own reply it leaves and wakes another waiter to take its place.
 * So a long request of one thread (a publish) holds up no other (a ping), and an idle session costs nothing.
 *
 *                 mux_send()               reply came, or time over, or socket dead
 *     (no call) ------------> PENDING -----------------------------------------------> DONE -- mux_wait() returns
 *                               |  ^
 *          nobody receives:     |  |  its turn ends without its reply
 *          becomes the receiver +--+
 *
 * Invariants: M1 at most one call receives; M2 if somebody waits, somebody receives or is about to (it was
 * signalled); M3 a call is in the list from mux_send() to the end of mux_wait(), and only its owner takes it out.
 *
 * Any thread. Errors are enum kvd_error, details by error_set(). Includes: proto/frame.h. */
#ifndef KVD_MUX_H
#define KVD_MUX_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/frame.h"

struct mux_reply {
    uint8_t *body; /* malloc'ed; the owner of the reply frees it with mux_reply_clear() */
    size_t n;
    int fds[FRAME_FDS_MAX];
    size_t n_fds;
};

struct mux_call {
    struct mux_call *next;
    uint32_t id;
    uint16_t type;
    bool waiting;
    bool done;
    int error; /* of the transport or of the daemon; its text is in reason */
    char reason[256];
    pthread_cond_t cond;
    struct mux_reply reply;
};

struct mux {
    int fd;
    uint64_t cookie; /* of the session, for error_set() */
    pthread_mutex_t lock;
    struct mux_call *pending; /* by lock */
    bool receiving;           /* by lock */
    uint32_t last_id;         /* by lock */
    _Atomic int dead;         /* 0, or the enum kvd_error that ends every call from now on */
    uint8_t *buf;             /* FRAME_MAX; the receiver's */
};

/* Takes fd (on success only): a connected SOCK_SEQPACKET. KVD_E_NOMEM. */
int mux_init(struct mux *mux, int fd, uint64_t cookie);
/* Closes. No call may be pending. */
void mux_deinit(struct mux *mux);
/* Ends every pending and future call with error; the descriptor stays open until mux_deinit(). Any thread. */
void mux_kill(struct mux *mux, int error);

/* Sends a request; fds are borrowed. On success the caller owes mux_wait(). */
int mux_send(struct mux *mux, struct mux_call *call, uint16_t type, const void *body, size_t n, const int *fds,
             size_t n_fds, uint32_t timeout_msec);
/* Waits for the reply; ret_reply (may be NULL) is filled on success. */
int mux_wait(struct mux *mux, struct mux_call *call, uint32_t timeout_msec, struct mux_reply *ret_reply);

/* mux_send() and mux_wait(). */
int mux_request(struct mux *mux, uint16_t type, const void *body, size_t n, const int *fds, size_t n_fds,
                uint32_t timeout_msec, struct mux_reply *ret_reply);

/* Frees the body and closes what descriptors are left. */
void mux_reply_clear(struct mux_reply *reply);

uint64_t mux_now_msec(void);

#endif
