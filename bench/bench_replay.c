/* Replay of a trace of prompts: hit rate against capacity, for each eviction policy and for the offline optimum.
 *
 *   bench_replay [--trace FILE] [--svg FILE]     FILE of JSON lines with "hash_ids", else $KVD_TRACE, else made up
 *
 * Capacity is in blocks, from 1/64 of the trace's different blocks to all of them. bench/replay_sim.h says what is counted. */
#include "bench/bench.h"
#include "bench/replay_sim.h"
#include "bench/replay_trace.h"
#include "bench/svg_plot.h"
#include "store/policy.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <string.h>

#define N_CAPS       13u
#define N_CURVES_MAX 8u
#define MAKE_SEED    UINT64_C(7)

struct curves {
    double x[N_CAPS]; /* capacity as a part of the trace's blocks */
    uint32_t cap[N_CAPS];
    double y[N_CURVES_MAX][N_CAPS]; /* [0] the optimum, then the policies */
    size_t n;
    double most; /* hit rate with room for all */
};

static void measure(const struct trace *t, struct curves *c)
{
    char name[64];

    c->most = 100.0 * (double)(t->n_uses - t->n_blocks) / (double)t->n_uses;
    for (size_t i = 0; i < N_CAPS; i++) {
        c->x[i] = exp2(((double)i - (N_CAPS - 1)) / 2);
        c->cap[i] = (uint32_t)(c->x[i] * (double)t->n_blocks + 0.5);
        c->cap[i] += c->cap[i] == 0;
        c->y[0][i] = replay_optimum(t, c->cap[i]);
        snprintf(name, sizeof(name), "optimum capacity=%.4f", c->x[i]);
        bench_line("replay", name, c->y[0][i], "% of blocks", c->most, "room for all blocks, more is better");
        c->n = 1;
        for (const struct policy_ops *ops; c->n < N_CURVES_MAX && (ops = policy_at(c->n - 1)); c->n++) {
            c->y[c->n][i] = replay_policy(t, ops, c->cap[i]);
            snprintf(name, sizeof(name), "%s capacity=%.4f", ops->name, c->x[i]);
            bench_line("replay", name, c->y[c->n][i], "% of blocks", c->y[0][i],
                       "the offline optimum with the same capacity, more is better");
        }
    }
}

/* The last part of the path, with nothing in it that XML minds. */
static void file_name(const char *path, char *ret, size_t room)
{
    const char *slash = strrchr(path, '/');

    snprintf(ret, room, "%s", slash ? slash + 1 : path);
    for (; *ret; ret++)
        if (!isalnum((unsigned char)*ret) && !strchr("._-", *ret))
            *ret = '_';
}

static int draw(const struct trace *t, const struct curves *c, const char *trace_path, const char *path)
{
    static const char *const colours[N_CURVES_MAX] = {"#555",    "#d1495b", "#00798c", "#edae49",
                                                      "#6a4c93", "#2e8b57", "#888",    "#000"};
    struct plot_series series[N_CURVES_MAX];
    char subtitle[200], name[60] = "made-up agents";
    struct plot p = {
        .title = "Hit rate against capacity",
        .subtitle = subtitle,
        .x_label = "capacity as a part of the different blocks of the trace",
        .y_label = "blocks that hit, %",
        .x = c->x,
        .n_x = N_CAPS,
        .series = series,
        .n_series = c->n,
    };
    FILE *f = fopen(path, "we");
    int r;

    if (!f)
        return -errno;
    if (trace_path)
        file_name(trace_path, name, sizeof(name));
    snprintf(subtitle, sizeof(subtitle), "%s: %zu requests, %zu uses of %zu blocks; room for all gives %.1f %%", name,
             t->n_requests, t->n_uses, t->n_blocks, c->most);
    for (size_t i = 0; i < c->n; i++)
        series[i] = (struct plot_series){
            .name = i == 0 ? "offline optimum" : policy_at(i - 1)->name,
            .colour = colours[i],
            .y = c->y[i],
            .dashed = i == 0,
        };
    r = plot_write_svg(&p, f);
    if (fclose(f) != 0 && r == 0)
        r = -errno;
    return r;
}

int main(int argc, char **argv)
{
    const char *path = getenv("KVD_TRACE"), *svg = NULL;
    struct curves curves = {0};
    struct trace t;
    size_t line = 0;
    int r;

    for (int i = 1; i < argc; i += 2) {
        if (i + 1 < argc && strcmp(argv[i], "--trace") == 0)
            path = argv[i + 1];
        else if (i + 1 < argc && strcmp(argv[i], "--svg") == 0)
            svg = argv[i + 1];
        else {
            fprintf(stderr, "usage: bench_replay [--trace FILE] [--svg FILE]\n");
            return 2;
        }
    }
    if (path && !*path)
        path = NULL;
    r = path ? trace_read(&t, path, &line) : trace_make(&t, MAKE_SEED);
    if (r < 0) {
        fprintf(stderr, "bench_replay: %s%s: %s\n", path ? path : "made-up trace",
                r == -EINVAL ? ": wants JSON lines with \"hash_ids\": [number, ...]" : "", strerror(-r));
        if (r == -EINVAL)
            fprintf(stderr, "bench_replay: line %zu is none\n", line);
        trace_deinit(&t);
        return 1;
    }
    measure(&t, &curves);
    if (svg && (r = draw(&t, &curves, path, svg)) < 0)
        fprintf(stderr, "bench_replay: %s: %s\n", svg, strerror(-r));
    trace_deinit(&t);
    return r < 0;
}
