/* kvctl stats: a table for people, JSON, and Prometheus' text format. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ctl_text.h"
#include "kvctl.h"

const struct ctl_opt stats_opts[] = {
    {"json", 'j', NULL, "one JSON object: {\"metrics\": [{name, label, value, unit, type, help}]}"},
    {"prometheus", 'p', NULL, "Prometheus' text exposition format"},
    {"watch", 'w', "[SEC]", "again every SEC seconds (1), with what changed a second"},
    {NULL, 0, NULL, NULL},
};
enum { OPT_JSON, OPT_PROMETHEUS, OPT_WATCH };

struct metric {
    char *name, *help, *unit, *label;
    int counter;
    uint64_t value;
};
struct metrics {
    struct metric *m;
    size_t n, room;
};

static int collect(void *ctx, const struct kvd_metric *from)
{
    struct metrics *all = ctx;
    struct metric *m;

    if (all->n == all->room) {
        size_t room = all->room ? all->room * 2 : 128;
        struct metric *grown = realloc(all->m, room * sizeof(*grown));

        if (!grown)
            return 1;
        all->m = grown;
        all->room = room;
    }
    m = &all->m[all->n];
    *m = (struct metric){strdup(from->name),  strdup(from->help), strdup(from->unit),
                         strdup(from->label), from->counter,      from->value};
    if (!m->name || !m->help || !m->unit || !m->label) {
        free(m->name), free(m->help), free(m->unit), free(m->label);
        return 1;
    }
    all->n++;
    return 0;
}

static void metrics_free(struct metrics *all)
{
    for (size_t i = 0; i < all->n; i++)
        free(all->m[i].name), free(all->m[i].help), free(all->m[i].unit), free(all->m[i].label);
    free(all->m);
    *all = (struct metrics){0};
}

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), e = strlen(end);

    return n >= e && strcmp(text + n - e, end) == 0;
}

/* Length of the name that a series of a histogram shares; 0: it belongs to none. */
static size_t histogram_base(const struct metrics *all, const char *name)
{
    static const char *const ends[] = {"_bucket", "_sum", "_count"};

    for (int i = 0; i < 3; i++) {
        size_t n = strlen(name) - strlen(ends[i]);

        if (!ends_with(name, ends[i]))
            continue;
        for (size_t k = 0; k < all->n; k++)
            if (strncmp(all->m[k].name, name, n) == 0 && strcmp(all->m[k].name + n, "_bucket") == 0)
                return n;
    }
    return 0;
}

/* ---- Prometheus ---- */

static void print_escaped(const char *text)
{
    for (; *text; text++)
        if (*text == '\n')
            fputs("\\n", stdout);
        else if (*text == '\\')
            fputs("\\\\", stdout);
        else
            putchar(*text);
}

/* All series of one metric stand together, whatever order they came in. */
static void print_prometheus(const struct metrics *all)
{
    bool *done = calloc(all->n ? all->n : 1, sizeof(*done));

    for (size_t i = 0; done && i < all->n; i++) {
        const struct metric *m = &all->m[i];
        size_t base = histogram_base(all, m->name), n = base ? base : strlen(m->name);

        if (done[i])
            continue;
        printf("# HELP %.*s ", (int)n, m->name);
        print_escaped(m->help);
        printf("\n# TYPE %.*s %s\n", (int)n, m->name, base ? "histogram" : m->counter ? "counter" : "gauge");
        for (size_t k = i; k < all->n; k++) {
            const struct metric *x = &all->m[k];
            size_t its = histogram_base(all, x->name);

            if (done[k] || (its ? its : strlen(x->name)) != n || (its != 0) != (base != 0) ||
                strncmp(x->name, m->name, n) != 0)
                continue;
            done[k] = true;
            printf("%s%s%s%s %" PRIu64 "\n", x->name, x->label[0] ? "{" : "", x->label, x->label[0] ? "}" : "",
                   x->value);
        }
    }
    free(done);
}

/* ---- JSON and table ---- */

static void print_json(const struct metrics *all)
{
    fputs("{\"metrics\": [", stdout);
    for (size_t i = 0; i < all->n; i++) {
        const struct metric *m = &all->m[i];

        fputs(i ? ",\n  {" : "\n  {", stdout);
        json_text(stdout, true, "name", m->name);
        json_text(stdout, false, "label", m->label);
        json_u64(stdout, false, "value", m->value);
        json_text(stdout, false, "unit", m->unit);
        json_text(stdout, false, "type", m->counter ? "counter" : "gauge");
        json_text(stdout, false, "help", m->help);
        putchar('}');
    }
    fputs("\n]}\n", stdout);
}

static const struct metric *find(const struct metrics *all, const char *name, const char *label)
{
    for (size_t i = 0; all && i < all->n; i++)
        if (strcmp(all->m[i].name, name) == 0 && strcmp(all->m[i].label, label) == 0)
            return &all->m[i];
    return NULL;
}

/* A histogram's buckets are for machines; people get its mean. */
static bool print_histogram(const struct metrics *all, const struct metric *m, size_t base)
{
    const struct metric *sum = NULL;
    char name[128];

    if (!ends_with(m->name, "_count"))
        return false;
    snprintf(name, sizeof(name), "%.*s_sum", (int)base, m->name);
    sum = find(all, name, m->label);
    printf("%-44.*s %14" PRIu64 " requests", (int)base, m->name, m->value);
    if (sum && m->value)
        printf(", mean %.1f us", (double)sum->value / (double)m->value);
    putchar('\n');
    return true;
}

static void print_table(const struct metrics *all, const struct metrics *before, double seconds)
{
    const char *label = "";

    for (size_t i = 0; i < all->n; i++) {
        const struct metric *m = &all->m[i], *old = find(before, m->name, m->label);
        size_t base = histogram_base(all, m->name);
        char buf[24];

        if (base) {
            print_histogram(all, m, base);
            continue;
        }
        if (strcmp(m->label, label) != 0)
            printf("\n[%s]\n", m->label);
        label = m->label;
        printf("%-44s %14" PRIu64 " %s", m->name, m->value, strcmp(m->unit, "bytes") == 0 ? "" : m->unit);
        if (strcmp(m->unit, "bytes") == 0)
            printf("bytes (%s)", text_bytes(m->value, buf));
        if (old && m->counter && m->value > old->value)
            printf("  +%.0f/s", (double)(m->value - old->value) / seconds);
        putchar('\n');
    }
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int once(struct ctl *ctl, const struct ctl_args *args, struct metrics *before, double *io_at)
{
    struct metrics all = {0};
    double at = now();
    int r = kvd_admin_stats(ctl->session, collect, &all);

    if (r != KVD_OK) {
        metrics_free(&all);
        return ctl_fail(ctl, r);
    }
    if (args->set[OPT_JSON])
        print_json(&all);
    else if (args->set[OPT_PROMETHEUS])
        print_prometheus(&all);
    else
        print_table(&all, before->n ? before : NULL, at - *io_at);
    metrics_free(before);
    *before = all;
    *io_at = at;
    return EXIT_OK;
}

int run_stats(struct ctl *ctl, const struct ctl_args *args)
{
    struct metrics before = {0};
    uint64_t usec = 1000000;
    double at = 0;
    kvd *session;
    int r;

    if (args->set[OPT_JSON] && args->set[OPT_PROMETHEUS])
        return ctl_usage("--json and --prometheus exclude each other");
    if (args->set[OPT_WATCH] && args->value[OPT_WATCH][0] &&
        (!text_parse_usec(args->value[OPT_WATCH], &usec) || usec < 10000))
        return ctl_usage("--watch=%s is no time of at least 10ms", args->value[OPT_WATCH]);
    r = ctl_attach(ctl, &session);
    while (r == EXIT_OK) {
        if (args->set[OPT_WATCH] && isatty(STDOUT_FILENO) && !args->set[OPT_JSON] && !args->set[OPT_PROMETHEUS])
            fputs("\033[H\033[J", stdout);
        r = once(ctl, args, &before, &at);
        if (!args->set[OPT_WATCH] || r != EXIT_OK)
            break;
        if (fflush(stdout) != 0)
            break;
        usleep((useconds_t)(usec < 1000000000 ? usec : 1000000000));
        if (!isatty(STDOUT_FILENO))
            putchar('\n');
    }
    metrics_free(&before);
    return r;
}
