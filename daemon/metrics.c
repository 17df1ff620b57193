#include "daemon/metrics.h"

#include <inttypes.h>
#include <stdio.h>

#include "store/cache.h"

void histogram_add(struct histogram *h, uint64_t usec)
{
    unsigned i = usec <= 1 ? 0 : 64 - (unsigned)__builtin_clzll(usec - 1);

    h->bucket[i < HISTOGRAM_BUCKETS ? i : HISTOGRAM_BUCKETS - 1]++;
    h->sum_usec += usec;
    h->n++;
}

/* Cumulative buckets, as Prometheus wants them; those beyond the largest value that was seen are left out. */
static int each_bucket(const struct histogram *h, const char *name, const char *help, metric_fn each, void *ctx)
{
    uint64_t sum = 0;
    int r = 0;

    for (unsigned i = 0; i < HISTOGRAM_BUCKETS - 1 && r == 0 && sum < h->n; i++) {
        char label[32];

        sum += h->bucket[i];
        snprintf(label, sizeof(label), "le=\"%" PRIu64 "\"", UINT64_C(1) << i);
        r = each(ctx, &(struct metric){name, help, "usec", label, true, sum});
    }
    return r ? r : each(ctx, &(struct metric){name, help, "usec", "le=\"+Inf\"", true, h->n});
}

int metrics_each(const struct metrics *m, metric_fn each, void *ctx)
{
    int r;

#define COUNTER(f, u, h)                                                                                               \
    if ((r = each(ctx, &(struct metric){"kvd_" #f "_total", h, u, "", true, m->f})))                                   \
        return r;
#define GAUGE(f, u, h)                                                                                                 \
    if ((r = each(ctx, &(struct metric){"kvd_" #f, h, u, "", false, m->f})))                                           \
        return r;
#define HISTOGRAM(f, h)                                                                                                \
    if ((r = each_bucket(&m->f, "kvd_" #f "_usec_bucket", h, each, ctx)) ||                                            \
        (r = each(ctx, &(struct metric){"kvd_" #f "_usec_sum", h, "usec", "", true, m->f.sum_usec})) ||                \
        (r = each(ctx, &(struct metric){"kvd_" #f "_usec_count", h, "requests", "", true, m->f.n})))                   \
        return r;
#include "daemon/metrics.def"
#undef COUNTER
#undef GAUGE
#undef HISTOGRAM
    return 0;
}

int metrics_each_tenant(const char *tenant, const struct cache_stats *s, metric_fn each, void *ctx)
{
    char label[64];
    int r;

    snprintf(label, sizeof(label), "tenant=\"%s\"", tenant);
#define COUNTER(...)
#define GAUGE(...)
#define HISTOGRAM(...)
#define TENANT_METRIC(f, member, is_counter, u, h)                                                                     \
    if ((r = each(ctx, &(struct metric){is_counter ? "kvd_" #f "_total" : "kvd_" #f, h, u, label, is_counter,          \
                                        s->member})))                                                                  \
        return r;
#include "daemon/metrics.def"
#undef TENANT_METRIC
#undef COUNTER
#undef GAUGE
#undef HISTOGRAM
    return 0;
}
