/* The daemon's counters. Loop thread only; the table is metrics.def. */
#ifndef KVD_DAEMON_METRICS_H
#define KVD_DAEMON_METRICS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Upper bounds 1, 2, 4 … 2^(N-2) microseconds, and the rest. */
enum { HISTOGRAM_BUCKETS = 26 };

struct histogram {
    uint64_t bucket[HISTOGRAM_BUCKETS]; /* not cumulative */
    uint64_t sum_usec, n;
};

struct metrics {
#define COUNTER(field, ...) uint64_t field;
#define GAUGE(field, ...) uint64_t field;
#define HISTOGRAM(field, ...) struct histogram field;
#include "daemon/metrics.def"
#undef COUNTER
#undef GAUGE
#undef HISTOGRAM
};

void histogram_add(struct histogram *h, uint64_t usec);

/* One line of output. Strings are constant, but for label, which lives until the call returns. */
struct metric {
    const char *name, *help, *unit, *label;
    bool counter;
    uint64_t value;
};
typedef int (*metric_fn)(void *ctx, const struct metric *metric);

/* Gives every value to each(); a non-zero result stops and is returned. */
int metrics_each(const struct metrics *metrics, metric_fn each, void *ctx);

struct cache_stats;
/* The same for one tenant's values. */
int metrics_each_tenant(const char *tenant, const struct cache_stats *stats, metric_fn each, void *ctx);

#endif
