/* Attention on the calling thread, and the merge of partial results. */
#include "kvd_attend_cost.h"
#include "kvd_attend_job.h"

#include <math.h>

static int attend_local(struct kvd_prefix *prefix, const struct kvd_attention *attention)
{
    struct attend_job *j = attend_job_of(prefix);
    uint64_t begun = attend_ticks(), outside;
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
    if (r == 0 && !j->call.a.mass)
        attend_cost_note(&attend_rates_of(&j->call)->fixed, 1, outside + attend_ticks() - begun,
                         prefix->space->session->nsec_per_tick);
    return r;
}

int kvd_attend(kvd_prefix *prefix, const struct kvd_attention *attention, enum kvd_attend_form form)
{
    if (!prefix)
        return error_set(0, KVD_E_ARG, "prefix is NULL");
    if (session_forked(prefix->space->session))
        return session_error_forked(prefix->space->session);
    switch (form) {
    case KVD_ATTEND_AUTO:
    case KVD_ATTEND_LOCAL:
        return attend_local(prefix, attention);
    case KVD_ATTEND_DAEMON:
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
