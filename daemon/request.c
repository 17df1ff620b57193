#include "daemon/request.h"

#include <errno.h>
#include <stdbool.h>
#include <unistd.h>

#include "daemon/daemon.h"
#include "daemon/session.h"
#include "proto/kvd.pb-c.h"

/* A reply to a frame whose request id could not be read has this one. */
#define ID_UNKNOWN UINT32_MAX

static void request_ping(struct session *s, const struct request *rq)
{
    reply(s, rq->type, rq->id, NULL, NULL, 0);
}

/* Who may send a frame, and when. */
enum access {
    ACCESS_FIRST,  /* as the first frame */
    ACCESS_ANY,    /* after HELLO */
    ACCESS_WORKER, /* after HELLO that asked for memory */
    ACCESS_ADMIN,  /* after HELLO, with the right */
};

struct kind {
    const char *name;
    const ProtobufCMessageDescriptor *message;
    enum access access;
    uint8_t n_fds;
    void (*handle)(struct session *s, const struct request *rq);
};

static const struct kind kinds[] = {
    [FRAME_HELLO] = {"HELLO", &kvd__v1__hello__descriptor, ACCESS_FIRST, 0, request_hello},
    [FRAME_PING] = {"PING", &kvd__v1__ping__descriptor, ACCESS_ANY, 0, request_ping},
    [FRAME_SPACE_OPEN] = {"SPACE_OPEN", &kvd__v1__space__descriptor, ACCESS_WORKER, 0, request_space_open},
    [FRAME_SPACE_CLOSE] = {"SPACE_CLOSE", &kvd__v1__space_close__descriptor, ACCESS_WORKER, 0, request_space_close},
    [FRAME_SLAB_GET] = {"SLAB_GET", &kvd__v1__slab_get__descriptor, ACCESS_WORKER, 0, request_slab_get},
    [FRAME_STAGING_ADD] = {"STAGING_ADD", &kvd__v1__staging_add__descriptor, ACCESS_WORKER, 1, request_staging_add},
    [FRAME_STAGING_DROP] = {"STAGING_DROP", &kvd__v1__staging_drop__descriptor, ACCESS_WORKER, 0, request_staging_drop},
    [FRAME_PUBLISH] = {"PUBLISH", &kvd__v1__publish__descriptor, ACCESS_WORKER, 0, request_publish},
    [FRAME_FLIGHT_BEGIN] = {"FLIGHT_BEGIN", &kvd__v1__flight_begin__descriptor, ACCESS_WORKER, 0, request_flight_begin},
    [FRAME_FLIGHT_WAIT] = {"FLIGHT_WAIT", &kvd__v1__flight_wait__descriptor, ACCESS_WORKER, 0, request_flight_wait},
    [FRAME_FLIGHT_END] = {"FLIGHT_END", &kvd__v1__flight_end__descriptor, ACCESS_WORKER, 0, request_flight_end},
    [FRAME_ATTEND_ADD] = {"ATTEND_ADD", &kvd__v1__attend_add__descriptor, ACCESS_WORKER, 1, request_attend_add},
    [FRAME_STATS] = {"STATS", &kvd__v1__stats__descriptor, ACCESS_ADMIN, 0, request_stats},
    [FRAME_LIST] = {"LIST", &kvd__v1__list__descriptor, ACCESS_ADMIN, 0, request_list},
    [FRAME_SHOW] = {"SHOW", &kvd__v1__show__descriptor, ACCESS_ADMIN, 0, request_show},
    [FRAME_EVICT] = {"EVICT", &kvd__v1__evict__descriptor, ACCESS_ADMIN, 0, request_evict},
    [FRAME_PIN] = {"PIN", &kvd__v1__pin__descriptor, ACCESS_ADMIN, 0, request_pin},
    [FRAME_VERIFY] = {"VERIFY", &kvd__v1__verify__descriptor, ACCESS_ADMIN, 0, request_verify},
    [FRAME_DRAIN] = {"DRAIN", &kvd__v1__drain__descriptor, ACCESS_ADMIN, 0, request_drain},
    [FRAME_CONFIG] = {"CONFIG", &kvd__v1__config__descriptor, ACCESS_ADMIN, 0, request_config},
};

void request_malformed(struct session *s, uint32_t id, const char *reason)
{
    struct daemon *d = s->daemon;

    d->metrics.frames_malformed++;
    s->n_malformed++;
    reply_error(s, id ? id : ID_UNKNOWN, ERROR_PROTOCOL, "frames as docs/protocol.md has them", "%s", reason);
    if (s->n_malformed >= d->options.malformed_max)
        session_close(s, "malformed_max frames in a row were malformed");
}

/* Answers and returns false where this session may not send this frame now. */
static bool allowed(struct session *s, const struct kind *kind, uint32_t id)
{
    if (kind->access == ACCESS_FIRST) {
        if (s->state == SESSION_NEW)
            return true;
        request_malformed(s, id, "HELLO came a second time");
        return false;
    }
    if (s->state == SESSION_NEW) {
        request_malformed(s, id, "the first frame must be HELLO");
        return false;
    }
    if (kind->access == ACCESS_WORKER && !s->tenant) {
        reply_error(s, id, ERROR_DENIED, "a session whose HELLO did not set admin_only", "%s needs memory of a tenant",
                    kind->name);
        return false;
    }
    if (kind->access == ACCESS_ADMIN && !s->admin) {
        reply_error(s, id, ERROR_DENIED, "root, the daemon's user, admin_uids and admin_gids", "%s is for admins, and uid %u is none",
                    kind->name, s->uid);
        return false;
    }
    return true;
}

static void dispatch(struct session *s, const struct frame_header *h, const uint8_t *body, int *fds, size_t n_fds)
{
    struct request rq = {.type = h->type, .id = h->request_id, .fds = fds, .n_fds = n_fds};
    const struct kind *kind = h->type < sizeof(kinds) / sizeof(kinds[0]) ? &kinds[h->type] : NULL;

    if (!kind || !kind->handle) {
        request_malformed(s, h->request_id, "frame type is not known; allowed: 1 to 12 and 32 to 39");
        return;
    }
    if (n_fds != kind->n_fds) {
        request_malformed(s, h->request_id,
                          kind->n_fds ? "STAGING_ADD or ATTEND_ADD came without its one descriptor" : "this frame type carries no descriptors");
        return;
    }
    if (!allowed(s, kind, h->request_id))
        return;
    if (h->length > 0 || kind->handle != request_ping) { /* the usual PING is empty, and then there is nothing to read */
        rq.message = wire_unpack(&s->daemon->wire, kind->message, body, h->length);
        if (!rq.message) {
            request_malformed(s, h->request_id, "the body is not a message of the frame's type");
            return;
        }
    }
    s->n_malformed = 0;
    kind->handle(s, &rq);
}

void request_handle(struct session *s, uint16_t type, uint32_t id, const void *message)
{
    struct request rq = {.type = type, .id = id, .message = message};

    if (allowed(s, &kinds[type], id))
        kinds[type].handle(s, &rq);
}

void request_take(struct session *s, const uint8_t *packet, size_t n, int *fds, size_t n_fds)
{
    struct frame_header h;
    const uint8_t *body;
    const char *reason;
    int r = frame_parse(packet, n, n_fds, &h, &body, &reason);

    s->daemon->metrics.frames++;
    if (r < 0)
        request_malformed(s, h.request_id, reason);
    else
        dispatch(s, &h, body, fds, n_fds);
    if (r == -EPROTONOSUPPORT)
        session_close(s, "it speaks another version of the frames");
    for (size_t i = 0; i < n_fds; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}
