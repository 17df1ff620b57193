#include "daemon/session.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "daemon/attend.h"
#include "daemon/daemon.h"
#include "daemon/flight_requests.h"
#include "daemon/listener.h"
#include "daemon/publish.h"
#include "daemon/reply.h"
#include "daemon/request.h"
#include "daemon/staging.h"
#include "daemon/tenants.h"
#include "daemon/walk.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77 /* Linux 6.5 */
#endif

enum {
    UID_SLACK = 8,      /* connections of one user that may wait to be told that there are too many */
    SESSIONS_SLACK = 64, /* the same of all */
};

static void session_set_state(struct session *s, enum session_state state)
{
    struct daemon *d = s->daemon;

    assert(state > s->state);
    if (s->state == SESSION_READY)
        d->n_attached--;
    if (state == SESSION_READY)
        d->n_attached++;
    if (state == SESSION_CLOSING) {
        s->next_closing = d->closing;
        d->closing = s;
        sd_event_source_set_enabled(d->reaper, SD_EVENT_ONESHOT);
    }
    s->state = state;
}

void session_ready(struct session *s)
{
    s->worker = ++s->daemon->last_worker;
    s->daemon->metrics.sessions_opened++;
    session_set_state(s, SESSION_READY);
    daemon_expire(s->daemon); /* the timer for its HELLO is not needed any more */
    daemon_status(s->daemon);
}

void session_close(struct session *s, const char *why)
{
    struct daemon *d = s->daemon;

    if (s->state == SESSION_CLOSING)
        return;
    if (why)
        log_write(&d->log, LOG_WARNING, "worker %llu (%s, pid %d, uid %u) is cut off: %s", (unsigned long long)s->worker,
                  *s->name ? s->name : "unnamed", s->pid, s->uid, why);
    if (s->state == SESSION_NEW)
        d->metrics.sessions_refused++;
    else
        d->metrics.sessions_closed++;
    session_set_state(s, SESSION_CLOSING);
    sd_event_source_set_enabled(s->io, SD_EVENT_OFF);
    if (s->process)
        sd_event_source_set_enabled(s->process, SD_EVENT_OFF);
}

static void close_spaces(struct session *s)
{
    for (uint32_t i = 0; i < s->n_spaces; i++)
        for (; s->spaces[i].n_open > 0; s->spaces[i].n_open--)
            cache_space_close(s->tenant->cache, s->spaces[i].space);
    free(s->spaces);
}

static void session_free(struct session *s)
{
    struct daemon *d = s->daemon;

    if (s->link)
        s->link->gone(s);
    s->attend = attend_ring_close(s->attend);
    if (s->page.map) {
        struct shm_page_header *header = s->page.map;

        session_count(s);
        /* Before its leases go: from here on nothing that it holds is promised. At the daemon's end nothing changes any more. */
        if (!d->ending)
            atomic_store_explicit(&header->revoked, 1, memory_order_seq_cst);
        cache_page_remove(s->tenant->cache, &s->cache_page);
        slab_memory_release(&s->page);
    }
    waits_session_gone(s);
    publish_session_gone(s);
    walks_session_gone(s);
    close_spaces(s);
    for (uint32_t i = 0; i < s->n_stagings; i++)
        staging_unref(s->stagings[i]);
    free(s->stagings);
    if (s->tenant) {
        s->tenant->n_sessions--;
        tenant_unref(d, s->tenant);
    }
    replies_drop(s);
    sd_event_source_disable_unref(s->io);
    sd_event_source_disable_unref(s->process);
    if (s->pidfd >= 0)
        close(s->pidfd);
    close(s->fd);
    if (s->prev)
        s->prev->next = s->next;
    else
        d->sessions = s->next;
    if (s->next)
        s->next->prev = s->prev;
    d->n_sessions--;
    free(s);
}

/* The reaper's handler: freeing one session may close others (who are told that a flight has ended and do not read). */
int sessions_reap(sd_event_source *source, void *ctx)
{
    struct daemon *d = ctx;

    (void)source;
    while (d->closing) {
        struct session *s = d->closing;

        d->closing = s->next_closing;
        session_free(s);
    }
    listener_resume(d->listener);
    daemon_status(d);
    return 0;
}

void sessions_destroy(struct daemon *d)
{
    d->ending = true;
    for (struct session *s = d->sessions; s; s = s->next)
        session_close(s, NULL);
    while (d->closing) {
        struct session *s = d->closing;

        d->closing = s->next_closing;
        session_free(s);
    }
}

struct session_space *session_space(const struct session *s, uint32_t id)
{
    for (uint32_t i = 0; i < s->n_spaces; i++)
        if (s->spaces[i].space->id == id && s->spaces[i].n_open > 0)
            return &s->spaces[i];
    return NULL;
}

/* What a page says more than when last looked at; less is nonsense and counts nothing. */
static uint64_t more(uint64_t *seen, const _Atomic uint64_t *counter, uint64_t at_most)
{
    uint64_t now = atomic_load_explicit(counter, memory_order_acquire), n = now > *seen ? now - *seen : 0;

    if (n > at_most)
        n = at_most;
    *seen += n;
    return n;
}

void session_count(struct session *s)
{
    const struct shm_page_header *h = s->cache_page.header;
    struct metrics *m = &s->daemon->metrics;
    /* Hits first: workers count the look-up before the hit, so what is seen here never has more hits than look-ups. */
    uint64_t hits_now = atomic_load_explicit(&h->n_hit_blocks, memory_order_acquire);
    uint64_t lookups = more(&s->seen.lookups, &h->n_match_blocks, UINT64_MAX);
    uint64_t hits = hits_now > s->seen.hits ? hits_now - s->seen.hits : 0;

    if (hits > lookups)
        hits = lookups;
    s->seen.hits += hits;
    m->lookups += lookups;
    m->hits += hits;
    m->misses += lookups - hits;
    m->loads += more(&s->seen.loads, &h->n_load_blocks, UINT64_MAX);
    m->load_bytes += more(&s->seen.load_bytes, &h->n_load_bytes, UINT64_MAX);
    m->attend_local += more(&s->seen.attend_local, &h->n_attend, UINT64_MAX);
    m->attend_local_bytes += more(&s->seen.attend_local_bytes, &h->n_attend_bytes, UINT64_MAX);
    m->stale_lookups += more(&s->seen.stale, &h->n_stale, UINT64_MAX);
    m->worker_corrupt += more(&s->seen.corrupt, &h->n_corrupt, UINT64_MAX);
}

/* ---- events ---- */

/* False: over frame_rate; the session's frames wait until the second is over. */
static bool within_rate(struct session *s)
{
    uint64_t rate = s->daemon->options.frame_rate, now;

    if (rate == 0)
        return true;
    now = daemon_now_usec();
    if (now - s->rate_usec >= 1000000) {
        s->rate_usec = now;
        s->rate_frames = 0;
    }
    if (s->rate_frames++ < rate)
        return true;
    s->paused = true;
    sd_event_source_set_io_events(s->io, 0);
    daemon_wake_at(s->daemon, s->rate_usec + 1000000);
    return false;
}

static int on_io(sd_event_source *source, int fd, uint32_t events, void *ctx)
{
    struct session *s = ctx;
    struct daemon *d = s->daemon;
    int fds[FRAME_FDS_MAX];
    size_t n, n_fds;
    int r;

    (void)source;
    if (events & EPOLLOUT)
        replies_flush(s);
    if (events & (EPOLLHUP | EPOLLERR)) {
        session_close(s, NULL);
        return 0;
    }
    if (!(events & EPOLLIN) || s->state == SESSION_CLOSING || s->out_first || !within_rate(s))
        return 0;
    r = frame_recv(fd, d->rx, sizeof(d->rx), MSG_DONTWAIT, &n, fds, &n_fds);
    if (r == -EAGAIN)
        return 0;
    if (r == -EMSGSIZE)
        request_malformed(s, 0, "the packet or its descriptors are more than a frame holds");
    else if (r < 0 || n == 0)
        session_close(s, NULL);
    else
        request_take(s, d->rx, n, fds, n_fds);
    return 0;
}

/* Another link's connection: nothing is read here, and whatever happens is its end. */
static int on_link_end(sd_event_source *source, int fd, uint32_t events, void *ctx)
{
    (void)source;
    (void)fd;
    (void)events;
    session_close(ctx, NULL);
    return 0;
}

static int on_process_end(sd_event_source *source, int fd, uint32_t events, void *ctx)
{
    (void)source;
    (void)fd;
    (void)events;
    session_close(ctx, NULL);
    return 0;
}

uint64_t sessions_expire(struct daemon *d, uint64_t now)
{
    uint64_t next = UINT64_MAX;

    for (struct session *s = d->sessions; s; s = s->next) {
        uint64_t at = UINT64_MAX;

        if (s->state == SESSION_CLOSING)
            continue;
        if (s->state == SESSION_NEW && (at = s->born_usec + d->options.hello_timeout) <= now) {
            session_close(s, "it has not said hello within hello_timeout");
            continue;
        }
        if (s->out_first && (at = s->out_since_usec + d->options.stuck_timeout) <= now) {
            d->metrics.sessions_overrun++;
            session_close(s, "it has not read its replies for stuck_timeout");
            continue;
        }
        if (s->paused && s->rate_usec + 1000000 <= now) {
            s->paused = false;
            if (!s->out_first)
                sd_event_source_set_io_events(s->io, EPOLLIN);
        } else if (s->paused && s->rate_usec + 1000000 < at) {
            at = s->rate_usec + 1000000;
        }
        next = at < next ? at : next;
    }
    return next;
}

/* ---- accept ---- */

static int open_pidfd(int fd, pid_t pid)
{
    socklen_t len = sizeof(int);
    int pidfd;

    if (getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &len) == 0)
        return pidfd;
    if (pid <= 0)
        return -1; /* of a pid namespace that is not below ours: only the hang-up tells */
    /* Older kernels: between connect and here the process may have ended and its number may be another's; then the socket has
     * been hung up, unless it was passed on. */
    return (int)syscall(SYS_pidfd_open, pid, 0);
}

static bool too_many(const struct daemon *d, uid_t uid)
{
    uint64_t n = 0;

    if (d->n_sessions >= d->options.sessions_max + SESSIONS_SLACK)
        return true;
    for (const struct session *s = d->sessions; s; s = s->next)
        n += s->uid == uid;
    return n >= d->options.sessions_per_uid + UID_SLACK;
}

static int watch(struct session *s)
{
    sd_event *e = s->daemon->event;
    int r = sd_event_add_io(e, &s->io, s->fd, s->link ? EPOLLRDHUP : EPOLLIN, s->link ? on_link_end : on_io, s);

    if (r < 0)
        return r;
    sd_event_source_set_description(s->io, "session");
    if (s->pidfd < 0)
        return 0;
    r = sd_event_add_io(e, &s->process, s->pidfd, EPOLLIN, on_process_end, s);
    if (r >= 0) /* the dead first: their leases are in the way of the living */
        r = sd_event_source_set_priority(s->process, SD_EVENT_PRIORITY_IMPORTANT);
    return r;
}

static struct session *session_open(struct daemon *d, int fd, const struct session_link *link, void *ctx)
{
    struct ucred cred;
    socklen_t len = sizeof(cred);
    struct session *s;
    int r;

    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0 || too_many(d, cred.uid)) {
        d->metrics.sessions_refused++;
        log_write(&d->log, LOG_WARNING, "a connection is refused: sessions_max or sessions_per_uid is reached by far");
        close(fd);
        return NULL;
    }
    s = calloc(1, sizeof(*s));
    if (!s) {
        close(fd);
        return NULL;
    }
    *s = (struct session){.daemon = d, .fd = fd, .pidfd = open_pidfd(fd, cred.pid), .pid = cred.pid, .uid = cred.uid,
                          .link = link, .link_ctx = ctx, .born_usec = daemon_now_usec(), .next = d->sessions, .page.fd = -1};
    s->out_last = &s->out_first;
    if (d->sessions)
        d->sessions->prev = s;
    d->sessions = s;
    d->n_sessions++;
    r = watch(s);
    if (r < 0) {
        log_write(&d->log, LOG_WARNING, "a connection cannot be watched: %s", strerror(-r));
        d->metrics.sessions_refused++;
        s->link = NULL; /* knows nothing of it yet */
        session_free(s);
        return NULL;
    }
    return s;
}

void session_accept(struct daemon *d, int fd)
{
    struct session *s = session_open(d, fd, NULL, NULL);

    if (s)
        daemon_wake_at(d, s->born_usec + d->options.hello_timeout);
}

struct session *session_accept_link(struct daemon *d, int fd, const struct session_link *link, void *ctx)
{
    return session_open(d, fd, link, ctx);
}
