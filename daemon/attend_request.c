/* The one request about attention that goes by the socket: memory for those that go by the rings. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "daemon/attend.h"
#include "daemon/daemon.h"
#include "daemon/request.h"
#include "daemon/session.h"
#include "daemon/tenants.h"
#include "proto/kvd.pb-c.h"

/* The session's rings are served from its first memory on. -errno. */
static int open_ring(struct session *s)
{
    struct tenant *t = s->tenant;
    int r = 0;

    if (!t->attend)
        r = attend_tenant_create(s->daemon->attend, t->cache, &t->attend);
    return r < 0 || s->attend ? r : attend_ring_open(s->daemon->attend, t->attend, s->rings, s->n_ring, &s->attend);
}

void request_attend_add(struct session *s, const struct request *rq)
{
    const Kvd__V1__AttendAdd *m = rq->message;
    const struct options *o = &s->daemon->options;
    Kvd__V1__AttendReply out = KVD__V1__ATTEND_REPLY__INIT;
    const char *reason = "";
    int r = open_ring(s), bell;

    if (r < 0) {
        reply_error(s, rq->id, ERROR_FULL, "fewer workers, or more memory and descriptors for the daemon",
                    "the daemon cannot serve attention: %s", strerror(-r));
        return;
    }
    r = attend_ring_add(s->attend, rq->fds[0], m->bytes, &out.memory, &reason);
    if (r == -ENOSPC) {
        reply_error(s, rq->id, ERROR_LIMIT, "what the option attend_bytes says, in at most 16 pieces",
                    "%" PRIu64 " bytes more for attention, and at most %" PRIu64 " in all are allowed", m->bytes, o->attend_bytes);
        return;
    }
    if (r < 0) {
        reply_error(s, rq->id, ERROR_STAGING, "", "%s", reason);
        return;
    }
    out.request_max_bytes = o->attend_request_bytes;
    out.memory_max_bytes = o->attend_bytes;
    bell = attend_ring_bell(s->attend);
    reply(s, rq->type, rq->id, &out.base, &bell, 1);
}
