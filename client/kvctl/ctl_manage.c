/* kvctl evict, pin, verify, drain, config, ping: what changes something, or asks the daemon to work. */
#include "ctl_select.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ctl_text.h"

static int parse_space(const char *text, struct select *ret)
{
    uint64_t number;

    if (!text_parse_u64(text, &number) || number == 0 || number > UINT32_MAX)
        return ctl_usage("--space=%s is no space's number; allowed: one that kvctl ls spaces shows", text);
    ret->selector.space = (uint32_t)number;
    return EXIT_OK;
}

int select_parse_one(const struct ctl_args *args, struct select *ret)
{
    *ret = (struct select){{0}};
    if (!text_parse_key(args->rest[0], ret->key, &ret->selector.n_key))
        return ctl_usage("\"%s\" is no key: an even number of hex digits, at most 64", args->rest[0]);
    ret->selector.key = ret->key;
    ret->selector.tenant = args->value[ONE_TENANT];
    return args->set[ONE_SPACE] ? parse_space(args->value[ONE_SPACE], ret) : EXIT_OK;
}

int select_parse(const struct ctl_args *args, struct select *ret)
{
    *ret = (struct select){{0}};
    for (int i = 0; i < SELECT_N; i++)
        ret->n_set += args->set[i];
    if (args->set[SELECT_KEY]) {
        if (!text_parse_key(args->value[SELECT_KEY], ret->key, &ret->selector.n_key))
            return ctl_usage("--key=%s: an even number of hex digits is needed, at most 64", args->value[SELECT_KEY]);
        ret->selector.key = ret->key;
    }
    if (args->set[SELECT_SPACE] && parse_space(args->value[SELECT_SPACE], ret) != EXIT_OK)
        return EXIT_USAGE;
    ret->selector.tenant = args->value[SELECT_TENANT];
    ret->selector.model = args->value[SELECT_MODEL];
    if (args->set[SELECT_IDLE] && !text_parse_usec(args->value[SELECT_IDLE], &ret->selector.idle_usec))
        return ctl_usage("--idle=%s is no time; allowed: 90s, 15min, 2h, 1d and the like", args->value[SELECT_IDLE]);
    if (args->set[SELECT_AGE] && !text_parse_usec(args->value[SELECT_AGE], &ret->selector.age_usec))
        return ctl_usage("--age=%s is no time; allowed: 90s, 15min, 2h, 1d and the like", args->value[SELECT_AGE]);
    return EXIT_OK;
}

/* ---- evict ---- */

const struct ctl_opt evict_opts[] = {
    SELECT_OPTS,
    {"bytes", 'b', "BYTES", "stop after so many bytes (64M, 2G)"},
    {"all", 'a', NULL, "everything that is not leased or pinned"},
    {"dry-run", 'd', NULL, "only say what would go"},
    {"json", 'j', NULL, "one JSON object"},
    {NULL, 0, NULL, NULL},
};
enum { EVICT_BYTES = SELECT_N, EVICT_ALL, EVICT_DRY, EVICT_JSON };

int run_evict(struct ctl *ctl, const struct ctl_args *args)
{
    struct kvd_evict_result result;
    struct select select;
    uint64_t bytes = 0;
    char text[24];
    kvd *session;
    int r = select_parse(args, &select);

    if (r != EXIT_OK)
        return r;
    if (args->set[EVICT_BYTES] && (!text_parse_bytes(args->value[EVICT_BYTES], &bytes) || bytes == 0))
        return ctl_usage("--bytes=%s is no size; allowed: above 0, as 64M or 2G", args->value[EVICT_BYTES]);
    if (!select.n_set && !args->set[EVICT_BYTES] && !args->set[EVICT_ALL])
        return ctl_usage("this would evict everything; say --all if that is meant");
    if (args->set[EVICT_ALL] && select.n_set)
        return ctl_usage("--all excludes options that select");
    r = ctl_attach(ctl, &session);
    if (r != EXIT_OK)
        return r;
    r = kvd_admin_evict(session, &select.selector, bytes, args->set[EVICT_DRY], &result);
    if (r != KVD_OK)
        return ctl_fail(ctl, r);
    if (args->set[EVICT_JSON]) {
        putchar('{');
        json_u64(stdout, true, "blocks", result.blocks);
        json_u64(stdout, false, "bytes", result.bytes);
        json_u64(stdout, false, "kept_leased", result.kept_leased);
        json_u64(stdout, false, "kept_pinned", result.kept_pinned);
        json_u64(stdout, false, "kept_parents", result.kept_parents);
        json_bool(stdout, false, "dry_run", args->set[EVICT_DRY]);
        puts("}");
        return EXIT_OK;
    }
    printf("%s %" PRIu64 " blocks, %s; kept: %" PRIu64 " leased, %" PRIu64 " pinned, %" PRIu64
           " with children that stay\n",
           args->set[EVICT_DRY] ? "would evict" : "evicted", result.blocks, text_bytes(result.bytes, text),
           result.kept_leased, result.kept_pinned, result.kept_parents);
    return EXIT_OK;
}

/* ---- pin ---- */

const struct ctl_opt pin_opts[] = {
    ONE_OPTS,
    {NULL, 0, NULL, NULL},
};

static int pin(struct ctl *ctl, const struct ctl_args *args, int unpin)
{
    struct select select;
    uint64_t blocks, bytes;
    char text[24];
    kvd *session;
    int r = select_parse_one(args, &select);

    if (r == EXIT_OK)
        r = ctl_attach(ctl, &session);
    if (r != EXIT_OK)
        return r;
    r = kvd_admin_pin(session, &select.selector, unpin, &blocks, &bytes);
    if (r != KVD_OK)
        return ctl_fail(ctl, r);
    printf("%s %" PRIu64 " blocks, %s\n", unpin ? "unpinned" : "pinned", blocks, text_bytes(bytes, text));
    return EXIT_OK;
}

int run_pin(struct ctl *ctl, const struct ctl_args *args)
{
    return pin(ctl, args, 0);
}

int run_unpin(struct ctl *ctl, const struct ctl_args *args)
{
    return pin(ctl, args, 1);
}

/* ---- verify ---- */

const struct ctl_opt verify_opts[] = {
    SELECT_OPTS,
    {"json", 'j', NULL, "one JSON object"},
    {NULL, 0, NULL, NULL},
};
enum { VERIFY_JSON = SELECT_N };

int run_verify(struct ctl *ctl, const struct ctl_args *args)
{
    struct kvd_verify_result *result;
    struct select select;
    char key[65], text[24];
    kvd *session;
    int r = select_parse(args, &select);

    if (r == EXIT_OK)
        r = ctl_attach(ctl, &session);
    if (r != EXIT_OK)
        return r;
    result = calloc(1, sizeof(*result));
    if (!result)
        return ctl_fail(ctl, KVD_E_NOMEM);
    r = kvd_admin_verify(session, &select.selector, result);
    if (r != KVD_OK) {
        free(result);
        return ctl_fail(ctl, r);
    }
    if (args->set[VERIFY_JSON]) {
        putchar('{');
        json_u64(stdout, true, "blocks", result->blocks);
        json_u64(stdout, false, "bytes", result->bytes);
        json_u64(stdout, false, "bad", result->n_bad);
        fputs(", \"keys\": [", stdout);
        for (uint64_t i = 0; i < result->n_keys; i++)
            printf("%s\"%s\"", i ? ", " : "", text_key(result->bad[i], 32, key));
        puts("]}");
    } else {
        printf("verified %" PRIu64 " blocks, %s: %" PRIu64 " bad\n", result->blocks, text_bytes(result->bytes, text),
               result->n_bad);
        for (uint64_t i = 0; i < result->n_keys; i++)
            printf("bad and dropped: %s\n", text_key(result->bad[i], 32, key));
    }
    r = result->n_bad ? EXIT_CORRUPT : EXIT_OK;
    free(result);
    return r;
}

/* ---- drain, config, ping ---- */

const struct ctl_opt drain_opts[] = {
    {"undo", 'u', NULL, "takes them again"},
    {NULL, 0, NULL, NULL},
};

int run_drain(struct ctl *ctl, const struct ctl_args *args)
{
    kvd *session;
    int r = ctl_attach(ctl, &session);

    if (r != EXIT_OK)
        return r;
    r = kvd_admin_drain(session, args->set[0]);
    if (r != KVD_OK)
        return ctl_fail(ctl, r);
    puts(args->set[0] ? "takes new workers and blocks again" : "takes no new workers and no new blocks");
    return EXIT_OK;
}

const struct ctl_opt config_opts[] = {
    {"json", 'j', NULL, "one JSON array"},
    {"all", 'a', NULL, "with limits, defaults and what each option means"},
    {NULL, 0, NULL, NULL},
};

struct config_print {
    bool json, all;
    int n;
};

static int on_option(void *ctx, const struct kvd_option_info *o)
{
    struct config_print *p = ctx;

    if (p->json) {
        fputs(p->n++ ? ",\n  {" : "\n  {", stdout);
        json_text(stdout, true, "name", o->name);
        json_text(stdout, false, "value", o->value);
        json_text(stdout, false, "unit", o->unit);
        json_text(stdout, false, "minimum", o->minimum);
        json_text(stdout, false, "maximum", o->maximum);
        json_text(stdout, false, "default", o->default_value);
        json_bool(stdout, false, "live", o->live != 0);
        json_text(stdout, false, "help", o->help);
        putchar('}');
        return 0;
    }
    if (!p->all) {
        printf("%s = %s\n", o->name, o->value);
        return 0;
    }
    printf("%s = %s\n    %s\n    %s", o->name, o->value, o->help, o->unit);
    if (o->minimum[0])
        printf(", %s to %s", o->minimum, o->maximum);
    printf(", default %s, %s\n", o->default_value[0] ? o->default_value : "empty",
           o->live ? "changes in a running daemon" : "changes at a restart");
    return 0;
}

int run_config(struct ctl *ctl, const struct ctl_args *args)
{
    struct config_print print = {.json = args->set[0], .all = args->set[1]};
    char *value = args->n_rest ? strchr(args->rest[0], '=') : NULL;
    kvd *session;
    int r = ctl_attach(ctl, &session);

    if (r != EXIT_OK)
        return r;
    if (value)
        *value++ = '\0';
    if (print.json)
        putchar('[');
    r = kvd_admin_config(session, args->n_rest ? args->rest[0] : NULL, value, on_option, &print);
    if (print.json)
        puts(print.n ? "\n]" : "]");
    return r == KVD_OK ? EXIT_OK : ctl_fail(ctl, r);
}

const struct ctl_opt ping_opts[] = {
    {"count", 'n', "N", "so many round trips (1)"},
    {NULL, 0, NULL, NULL},
};

static double now_usec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

int run_ping(struct ctl *ctl, const struct ctl_args *args)
{
    struct kvd_info info = {.size = sizeof(info)};
    uint64_t count = 1;
    double *usec;
    kvd *session;
    int r;

    if (args->set[0] && (!text_parse_u64(args->value[0], &count) || count == 0 || count > 10000000))
        return ctl_usage("--count=%s; allowed: 1 to 10000000", args->value[0]);
    r = ctl_attach(ctl, &session);
    if (r != EXIT_OK)
        return r;
    usec = malloc(count * sizeof(*usec));
    if (!usec)
        return ctl_fail(ctl, KVD_E_NOMEM);
    for (uint64_t i = 0; i < count; i++) {
        double start = now_usec();

        r = kvd_ping(session);
        usec[i] = now_usec() - start;
        if (r != KVD_OK) {
            free(usec);
            return ctl_fail(ctl, r);
        }
    }
    kvd_get_info(session, &info);
    qsort(usec, count, sizeof(*usec), compare);
    printf("%s: ", info.server);
    if (count == 1)
        printf("%.1f us\n", usec[0]);
    else
        printf("%" PRIu64 " round trips, median %.1f us, 99 %% below %.1f us, slowest %.1f us\n", count,
               usec[count / 2], usec[count - 1 - count / 100], usec[count - 1]);
    free(usec);
    return EXIT_OK;
}
