/* grpc.health.v1.Health, answered where it arrives. */
#include <string.h>

#include "daemon/rpc-internal.h"
#include "proto/grpc/health/v1/health.pb-c.h"

typedef Grpc__Health__V1__HealthCheckRequest request;
typedef Grpc__Health__V1__HealthCheckResponse response;
#define STATUS(x) GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__##x

/* Those that have a health; which of them stops serving while the daemon drains. */
static const struct {
    const char *name;
    bool drains;
} services[] = {{"", true}, {"kvd.v1.Cache", true}, {"kvd.v1.Admin", false}, {"grpc.health.v1.Health", false}};

enum { SERVICES = sizeof(services) / sizeof(services[0]) };

static int find(const char *name)
{
    for (int i = 0; i < SERVICES; i++)
        if (strcmp(services[i].name, name) == 0)
            return i;
    return -1;
}

static int status_of(struct rpc *rpc, int service)
{
    if (service < 0)
        return STATUS(SERVICE_UNKNOWN);
    return services[service].drains && atomic_load(&rpc->draining) ? STATUS(NOT_SERVING) : STATUS(SERVING);
}

static void answer(struct rpc_call *c, int status, bool more)
{
    response out = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;

    out.status = status;
    rpc_local_answer(c, &out.base, more);
}

void rpc_health_check(struct rpc_call *c)
{
    const request *m = c->message;
    int service = find(m->service);

    if (service < 0)
        rpc_local_fail(c, GRPC_STATUS_NOT_FOUND, "there is no such service; allowed: \"\", kvd.v1.Cache, kvd.v1.Admin");
    else
        answer(c, status_of(c->conn->rpc, service), false);
}

/* ---- Watch ---- */

static void tell(struct rpc_call *c)
{
    c->watch_status = status_of(c->conn->rpc, c->watch_what);
    c->watch_busy = true;
    answer(c, c->watch_status, true);
}

void rpc_health_watch(struct rpc_call *c)
{
    struct rpc *rpc = c->conn->rpc;
    const request *m = c->message;

    c->watch_what = find(m->service);
    c->next_watch = rpc->watches;
    c->at_watch = &rpc->watches;
    if (c->next_watch)
        c->next_watch->at_watch = &c->next_watch;
    rpc->watches = c;
    tell(c);
}

void rpc_watch_end(struct rpc_call *c)
{
    *c->at_watch = c->next_watch;
    if (c->next_watch)
        c->next_watch->at_watch = c->at_watch;
    c->at_watch = NULL;
}

void rpc_health_sent(struct rpc_call *c)
{
    c->watch_busy = false;
    if (status_of(c->conn->rpc, c->watch_what) != c->watch_status)
        tell(c);
}

void rpc_health_changed(struct rpc *rpc)
{
    struct rpc_call *next;

    for (struct rpc_call *c = rpc->watches; c; c = next) {
        next = c->next_watch;
        if (!c->watch_busy && !c->finished && !c->closed && status_of(rpc, c->watch_what) != c->watch_status)
            tell(c);
    }
}
