/* One attention, start to end, in either form; and the merge of partial results. */
#include <math.h>

#include "kvd_attend_cost.h"
#include "kvd_attend_job.h"

enum { GRACE_MSEC = 1000 };

static int attend_local(struct kvd_prefix *prefix, const struct kvd_attention *attention)
{
    struct attend_job *j = attend_job_of(prefix);
    uint64_t begun = attend_ticks(), outside;
    struct attend_rates *rates;
    int r;

    if (!j)
        return error_set(prefix->space->session->cookie, KVD_E_NOMEM, "no memory for an attention");
    r = attend_job_prepare(j, prefix, attention, 1);
    if (r != 0)
        return r;
    outside = attend_ticks() - begun;
    for (uint32_t task = 0; task < j->n_tasks; task++)
        attend_job_run(j, task, 0);
    begun = attend_ticks();
    r = attend_job_finish(j);
    if (r != 0)
        return r;
    rates = attend_rates_of(&j->call);
    if (!j->call.a.mass)
        attend_cost_note(&rates->local_call, 1, outside + attend_ticks() - begun, NULL, prefix->space->session->nsec_per_tick);
    atomic_store_explicit(&rates->local_at, attend_ticks(), memory_order_relaxed);
    return 0;
}

int attend_daemon(struct kvd_prefix *prefix, const struct kvd_attention *attention, uint32_t timeout_msec,
                  uint32_t grace_msec)
{
    uint64_t ticket, wait_msec = (uint64_t)timeout_msec + grace_msec;
    int r = kvd_attend_submit(prefix, attention, (uint64_t)timeout_msec * 1000, &ticket);

    if (r != 0)
        return r;
    r = kvd_attend_collect(prefix, ticket, wait_msec < INT32_MAX ? (int)wait_msec : INT32_MAX);
    if (r == KVD_E_TIMEOUT)
        kvd_attend_cancel(prefix, ticket);
    return r;
}

/* Not the fault of who asks: another form may do it. */
static bool daemon_fails(int error)
{
    return error == KVD_E_GONE || error == KVD_E_TIMEOUT || error == KVD_E_LIMIT || error == KVD_E_QUOTA ||
           error == KVD_E_DRAINING || error == KVD_E_PROTOCOL || error == KVD_E_NOMEM || error == KVD_E_INTERNAL;
}

static int attend_daemon_noted(const struct attend_call *call, const struct kvd_attention *attention, uint32_t timeout_msec,
                               uint32_t grace_msec)
{
    uint64_t begun = attend_ticks();
    int r = attend_daemon(call->prefix, attention, timeout_msec, grace_msec);

    if (r == 0 || daemon_fails(r))
        attend_cost_note_daemon(call, attend_ticks() - begun, r != 0);
    return r;
}

static int attend_auto(struct kvd_prefix *prefix, const struct kvd_attention *attention)
{
    enum kvd_attend_form form;
    struct attend_call call;
    uint32_t timeout_msec;
    int r = attend_check(prefix, attention, &call);

    if (r == 0)
        r = attend_cost_choose(&call, &form, &timeout_msec);
    if (r != 0)
        return r;
    if (form == KVD_ATTEND_DAEMON) {
        r = attend_daemon_noted(&call, attention, timeout_msec, 0);
        if (!daemon_fails(r))
            return r;
    }
    return attend_local(prefix, attention);
}

int kvd_attend(kvd_prefix *prefix, const struct kvd_attention *attention, enum kvd_attend_form form)
{
    struct attend_call call;
    int r;

    if (!prefix)
        return error_set(0, KVD_E_ARG, "prefix is NULL");
    if (session_forked(prefix->space->session))
        return session_error_forked(prefix->space->session);
    switch (form) {
    case KVD_ATTEND_AUTO:
        return attend_auto(prefix, attention);
    case KVD_ATTEND_LOCAL:
        return attend_local(prefix, attention);
    case KVD_ATTEND_DAEMON:
        r = attend_check(prefix, attention, &call);
        return r != 0 ? r : attend_daemon_noted(&call, attention, prefix->space->session->timeout_msec, GRACE_MSEC);
    case KVD_ATTEND_LOAD:
        break;
    }
    return error_set(prefix->space->session->cookie, KVD_E_ARG,
                     "form is %d; allowed: KVD_ATTEND_AUTO, KVD_ATTEND_LOCAL, KVD_ATTEND_DAEMON", (int)form);
}

void kvd_attend_merge(float *o, float *lse, const float *other_o, float other_lse, size_t dim)
{
    float most, mine, others, sum;

    if (!(other_lse > -INFINITY))
        return;
    most = other_lse > *lse ? other_lse : *lse;
    mine = expf(*lse - most);
    others = expf(other_lse - most);
    sum = mine + others;
    for (size_t i = 0; i < dim; i++)
        o[i] = (mine * o[i] + (other_o ? others * other_o[i] : 0)) / sum;
    *lse = most + logf(sum);
}
