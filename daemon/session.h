/* A session: one connection of a worker or an admin, from accept to the last byte that is freed.
 *
 *   accept        HELLO taken
 *     |  NEW  -----------------> READY
 *     |   |                        |        hang-up, end of the process (pidfd), a stop, or misbehaviour: session_close()
 *     |   +----------+-------------+
 *     |              v
 *     |           CLOSING ---reaper, next turn of the loop---> freed
 *
 *     NEW      credentials are known; no tenant, no page; only HELLO is taken, until hello_timeout
 *     READY    with memory: has tenant, page (in the tenant's cache) and what its requests made; admin_only: none of these
 *     CLOSING  on d->closing; no event source is on; nothing is sent any more; handlers on the stack may still look at it
 *
 * session_set_state() makes every move and keeps counts and lists in step. Freeing gives back, in this order: rings, page and with it all
 * leases, flights and waits, publishes (they end by themselves, unanswered), walks, spaces, stagings, tenant.
 *
 * A session takes one frame a turn. While replies wait for the worker to read them, its requests wait too; so the queue holds
 * what was asked for before, and is bounded besides (reply_queue_bytes, stuck_timeout).
 *
 * Loop thread only. */
#ifndef KVD_DAEMON_SESSION_H
#define KVD_DAEMON_SESSION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <protobuf-c/protobuf-c.h>
#include <systemd/sd-event.h>

#include "daemon/errors.h"
#include "proto/frame.h"
#include "store/cache.h"
#include "store/slab.h"

struct attend_ring;
struct daemon;
struct session;
struct publish;
struct staging;
struct tenant;
struct wait;
struct walk;

enum session_state { SESSION_NEW, SESSION_READY, SESSION_CLOSING };
enum { SESSION_NAME_MAX = 63, SESSION_UNREAD_FDS_MAX = 16 };

/* How a session is answered that is not on the attach socket; no descriptors go that way. */
struct session_link {
    void (*reply)(struct session *s, uint16_t type, uint32_t id, const ProtobufCMessage *message); /* NULL: empty */
    void (*reply_error)(struct session *s, uint32_t id, enum error_code code, const char *reason, const char *allowed);
    void (*gone)(struct session *s); /* first of all when it is freed */
};

struct session_space {
    struct space *space;
    uint32_t n_open;
};

struct session {
    struct session *next, *prev;
    struct session *next_closing;
    struct daemon *daemon;
    enum session_state state;
    int fd, pidfd;               /* pidfd -1: the peer's process cannot be watched */
    pid_t pid;
    uid_t uid;
    sd_event_source *io, *process;
    const struct session_link *link; /* NULL: the attach socket */
    void *link_ctx;

    uint64_t worker;             /* 0 until READY */
    char name[SESSION_NAME_MAX + 1];
    bool admin;
    struct tenant *tenant;       /* referenced; NULL without memory */
    struct slab_memory page;     /* map NULL: none */
    struct cache_page cache_page;
    void *rings;                 /* in the page: struct shm_rings, n_ring entries each */
    uint32_t n_ring;
    struct attend_ring *attend;  /* NULL: it has asked for none */

    struct session_space *spaces;
    uint32_t n_spaces;
    struct staging **stagings;
    uint32_t n_stagings, last_staging;
    uint64_t staging_bytes;
    struct publish *publishes;   /* in progress */
    uint32_t n_publishing;       /* their blocks */
    uint64_t n_jobs;             /* blocks ever given to helpers */
    struct wait *waits;          /* for flights */
    uint32_t n_walks;

    struct out *out_first, **out_last; /* replies that wait */
    size_t out_bytes;
    uint64_t out_since_usec;     /* when the first of them began to wait */
    uint32_t unread_fds;         /* descriptors sent since the worker was last seen to have read everything */

    uint64_t born_usec;
    uint32_t n_malformed;        /* in a row */
    uint64_t rate_usec;          /* the second that rate_frames counts in */
    uint64_t rate_frames;
    bool paused;                 /* over frame_rate until the second is over */

    struct session_seen {        /* of the page's counters, as far as they are in the metrics */
        uint64_t lookups, hits, loads, load_bytes, attend_local, attend_local_bytes, stale, corrupt;
    } seen;
};

/* A request, for the time of its handler. */
struct request {
    uint16_t type;
    uint32_t id;
    const void *message; /* unpacked; NULL only where the table says "none" */
    int *fds;            /* those that a handler keeps it replaces by -1 */
    size_t n_fds;
};

/* Takes a connection (fd is the session's from now on, or closed). */
void session_accept(struct daemon *d, int fd);
/* The same for another link: fd is only watched for its end. NULL: it was refused, and fd is closed. */
struct session *session_accept_link(struct daemon *d, int fd, const struct session_link *link, void *ctx);
/* Attached sessions of one user. */
uint64_t sessions_attached(const struct daemon *d, uid_t uid);
/* Ends it; why is a constant sentence for the log, NULL: nothing to tell. May be called any number of times. */
void session_close(struct session *s, const char *why);
/* The READY move: counts and number. */
void session_ready(struct session *s);
/* What has a deadline among all sessions: ends who is late. Returns the next deadline, UINT64_MAX: none. */
uint64_t sessions_expire(struct daemon *d, uint64_t now_usec);
/* Frees those that are closing; the reaper's handler, with the daemon as ctx. */
int sessions_reap(sd_event_source *source, void *ctx);
/* Closes all and frees them at once. */
void sessions_destroy(struct daemon *d);
/* Brings the page's counters into the metrics. */
void session_count(struct session *s);
struct session_space *session_space(const struct session *s, uint32_t id);
struct staging *session_staging(const struct session *s, uint32_t id);
/* A publish has ended that read this staging: lets go of it if that was the last and its drop was asked for. */
void session_staging_idle(struct session *s, struct staging *staging);

/* Replies: message NULL is an empty body; descriptors are borrowed. */
void reply(struct session *s, uint16_t type, uint32_t id, const ProtobufCMessage *message, const int *fds, size_t n_fds);
__attribute__((format(printf, 5, 6))) void reply_error(struct session *s, uint32_t id, enum error_code code,
                                                       const char *allowed, const char *format, ...);

#endif
