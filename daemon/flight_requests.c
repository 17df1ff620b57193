#include "daemon/flight_requests.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "daemon/daemon.h"
#include "daemon/request.h"
#include "daemon/session.h"
#include "daemon/tenants.h"
#include "proto/kvd.pb-c.h"

enum { KEYS_MAX = 2048 }; /* that fit a frame, with room to spare */

/* A FLIGHT_WAIT that is not answered yet; the flights have its address as a token. */
struct wait {
    struct wait *next, **at; /* among the session's */
    struct session *session;
    uint32_t request_id;
};

bool key_landed(const struct cache *cache, const struct space *space, const uint8_t *key)
{
    for (uint32_t g = 0; g < space->n_groups; g++)
        if (cache_find(cache, space->id, (uint8_t)g, key) == CACHE_NONE)
            return false;
    return true;
}

static void wait_free(struct wait *w)
{
    *w->at = w->next;
    if (w->next)
        w->next->at = w->at;
    free(w);
}

static void reply_wait(struct session *s, uint32_t request_id, bool landed, bool timed_out)
{
    Kvd__V1__FlightWaitReply out = KVD__V1__FLIGHT_WAIT_REPLY__INIT;

    out.landed = landed;
    out.timed_out = timed_out;
    reply(s, FRAME_FLIGHT_WAIT, request_id, &out.base, NULL, 0);
}

void flight_request_told(void *ctx, uint64_t token, enum flight_outcome outcome)
{
    struct daemon *d = ctx;
    struct wait *w = (struct wait *)(uintptr_t)token;
    struct session *s = w->session;
    uint32_t id = w->request_id;

    if (outcome == FLIGHT_LANDED)
        d->metrics.flights_landed++;
    else if (outcome == FLIGHT_TIMED_OUT)
        d->metrics.flights_timed_out++;
    else
        d->metrics.flights_given_up++;
    wait_free(w);
    reply_wait(s, id, outcome == FLIGHT_LANDED, outcome == FLIGHT_TIMED_OUT);
}

void waits_session_gone(struct session *s)
{
    if (!s->worker)
        return;
    /* Tells those who wait for this one's flights, and drops its own waits without telling. */
    flights_worker_gone(s->daemon->flights, s->worker);
    while (s->waits)
        wait_free(s->waits);
}

/* The open space that a request names; answers and returns NULL if it is not open. */
static struct space *space_of(struct session *s, const struct request *rq, uint32_t id)
{
    struct session_space *open = session_space(s, id);

    if (!open)
        reply_error(s, rq->id, ERROR_SPACE, "one that SPACE_OPEN gave", "space %u is not open here", id);
    return open ? open->space : NULL;
}

static bool keys_good(struct session *s, const struct request *rq, const ProtobufCBinaryData *keys, size_t n)
{
    bool good = n > 0 && n <= KEYS_MAX;

    for (size_t i = 0; i < n && good; i++)
        good = keys[i].len == KEY_BYTES;
    if (!good)
        reply_error(s, rq->id, ERROR_PROTOCOL, "1 to 2048 keys of 32 bytes", "%zu keys, or one of another length", n);
    return good;
}

void request_flight_begin(struct session *s, const struct request *rq)
{
    const Kvd__V1__FlightBegin *m = rq->message;
    Kvd__V1__FlightBeginReply out = KVD__V1__FLIGHT_BEGIN_REPLY__INIT;
    Kvd__V1__FlightState states[KEYS_MAX];
    struct daemon *d = s->daemon;
    struct space *space = space_of(s, rq, m->space);

    if (!space || !keys_good(s, rq, m->key, m->n_key))
        return;
    for (size_t i = 0; i < m->n_key; i++) {
        const uint8_t *key = m->key[i].data;
        int r;

        if (key_landed(s->tenant->cache, space, key)) {
            states[i] = KVD__V1__FLIGHT_STATE__LANDED;
            continue;
        }
        r = flight_begin(d->flights, s->tenant->id, space->id, key, s->worker);
        if (r < 0) {
            while (i-- > 0) /* all or nothing; ending what this worker had before does no harm but to its own waiters */
                if (states[i] == KVD__V1__FLIGHT_STATE__GRANTED)
                    flight_end(d->flights, s->tenant->id, space->id, m->key[i].data, s->worker);
            reply_error(s, rq->id, ERROR_LIMIT, "fewer; options flights_per_worker and flights",
                        "too many flights; %" PRIu64 " of one worker, %" PRIu64 " in all are allowed", d->options.flights_per_worker,
                        d->options.flights);
            return;
        }
        states[i] = r == FLIGHT_GRANTED ? KVD__V1__FLIGHT_STATE__GRANTED : KVD__V1__FLIGHT_STATE__IN_FLIGHT;
        if (r == FLIGHT_GRANTED)
            d->metrics.flights_granted++;
        else
            d->metrics.flights_busy++;
    }
    out.n_state = m->n_key;
    out.state = states;
    reply(s, rq->type, rq->id, &out.base, NULL, 0);
}

static struct wait *wait_create(struct session *s, uint32_t request_id)
{
    struct wait *w = malloc(sizeof(*w));

    if (!w)
        return NULL;
    *w = (struct wait){.next = s->waits, .at = &s->waits, .session = s, .request_id = request_id};
    if (s->waits)
        s->waits->at = &w->next;
    s->waits = w;
    return w;
}

void request_flight_wait(struct session *s, const struct request *rq)
{
    const Kvd__V1__FlightWait *m = rq->message;
    struct daemon *d = s->daemon;
    struct space *space = space_of(s, rq, m->space);
    uint64_t timeout = m->timeout_usec, deadline;
    struct wait *w;
    int r;

    if (!space || !keys_good(s, rq, &m->key, 1))
        return;
    if (key_landed(s->tenant->cache, space, m->key.data)) {
        reply_wait(s, rq->id, true, false);
        return;
    }
    if (timeout > d->options.flight_wait_max)
        timeout = d->options.flight_wait_max;
    deadline = daemon_now_usec() + timeout;
    w = wait_create(s, rq->id);
    r = w ? flight_wait(d->flights, s->tenant->id, space->id, m->key.data, s->worker, (uintptr_t)w, deadline) : -ENOSPC;
    if (r == 0) {
        daemon_wake_at(d, deadline);
        return;
    }
    if (w)
        wait_free(w);
    if (r == -ENOENT)
        reply_wait(s, rq->id, false, false);
    else
        reply_error(s, rq->id, ERROR_LIMIT, "fewer at once; option flight_waiters", "%" PRIu64 " requests wait for flights already",
                    d->options.flight_waiters);
}

void request_flight_end(struct session *s, const struct request *rq)
{
    const Kvd__V1__FlightEnd *m = rq->message;
    struct space *space = space_of(s, rq, m->space);

    if (!space || !keys_good(s, rq, m->key, m->n_key))
        return;
    for (size_t i = 0; i < m->n_key; i++)
        flight_end(s->daemon->flights, s->tenant->id, space->id, m->key[i].data, s->worker);
    reply(s, rq->type, rq->id, NULL, NULL, 0);
}
