/* kvctl ls, show: what is there. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ctl_select.h"
#include "ctl_text.h"
#include "kvctl.h"

const struct ctl_opt ls_opts[] = {
    SELECT_OPTS,
    {"limit", 'n', "N", "at most N lines"},
    {"long", 'l', NULL, "whole keys"},
    {"json", 'j', NULL, "one JSON array"},
    {NULL, 0, NULL, NULL},
};
enum { OPT_LIMIT = SELECT_N, OPT_LONG, OPT_JSON };

const struct ctl_opt show_opts[] = {
    ONE_OPTS,
    {"json", 'j', NULL, "one JSON array"},
    {NULL, 0, NULL, NULL},
};

struct list {
    bool json, whole;
    uint64_t left, n;
};

/* Begins an item; returns false when the limit is reached. */
static bool next(struct list *l)
{
    if (l->left == 0)
        return false;
    l->left--;
    if (l->json)
        fputs(l->n ? ",\n  {" : "\n  {", stdout);
    l->n++;
    return true;
}

static void block_json(const struct kvd_block_info *b)
{
    json_key(stdout, true, "key", b->key);
    json_key(stdout, false, "parent", b->parent);
    json_text(stdout, false, "tenant", b->tenant);
    json_u64(stdout, false, "space", b->space);
    json_u64(stdout, false, "group", b->group);
    json_bool(stdout, false, "first", b->first != 0);
    json_u64(stdout, false, "bytes", b->bytes);
    json_u64(stdout, false, "crc32c", b->crc32c);
    json_u64(stdout, false, "children", b->children);
    json_u64(stdout, false, "leases", b->leases);
    json_u64(stdout, false, "pins", b->pins);
    json_u64(stdout, false, "idle_usec", b->idle_usec);
    json_u64(stdout, false, "age_usec", b->age_usec);
    json_text(stdout, false, "tier", b->tier);
}

static int on_block(void *ctx, const struct kvd_block_info *b)
{
    struct list *l = ctx;
    char key[65], bytes[24], idle[24], age[24];

    if (l->n == 0 && !l->json)
        printf("%-*s %5s %5s %9s %8s %6s %4s %8s %8s %-5s %s\n", l->whole ? 64 : 16, "key", "space", "group", "bytes",
               "children", "leases", "pins", "idle", "age", "tier", "tenant");
    if (!next(l))
        return 1;
    if (l->json) {
        block_json(b);
        putchar('}');
        return 0;
    }
    printf("%s %5" PRIu32 " %5" PRIu32 " %9s %8" PRIu32 " %6" PRIu32 " %4" PRIu32 " %8s %8s %-5s %s\n",
           text_key(b->key, l->whole ? 32 : 8, key), b->space, b->group, text_bytes(b->bytes, bytes), b->children,
           b->leases, b->pins, text_usec(b->idle_usec, idle), text_usec(b->age_usec, age), b->tier, b->tenant);
    return 0;
}

static int on_space(void *ctx, const struct kvd_space_info *s)
{
    struct list *l = ctx;
    char key[65], bytes[24];

    if (l->n == 0 && !l->json)
        printf("%5s %-24s %-12s %-6s %6s %6s %6s %-12s %-12s %4s %8s %9s %-*s %s\n", "space", "model", "revision",
               "dtype", "block", "layers", "groups", "codec k", "codec v", "open", "blocks", "bytes",
               l->whole ? 64 : 16, "fingerprint", "tenant");
    if (!next(l))
        return 1;
    if (l->json) {
        json_u64(stdout, true, "space", s->id);
        json_text(stdout, false, "tenant", s->tenant);
        json_text(stdout, false, "model", s->model);
        json_text(stdout, false, "revision", s->revision);
        json_text(stdout, false, "shard", s->shard);
        json_text(stdout, false, "dtype", s->dtype);
        json_text(stdout, false, "codec_k", s->codec_k);
        json_text(stdout, false, "codec_v", s->codec_v);
        json_u64(stdout, false, "block_tokens", s->block_tokens);
        json_u64(stdout, false, "layers", s->n_layers);
        json_u64(stdout, false, "groups", s->n_groups);
        json_u64(stdout, false, "open", s->open);
        json_u64(stdout, false, "blocks", s->blocks);
        json_u64(stdout, false, "bytes", s->bytes);
        json_key(stdout, false, "fingerprint", s->fingerprint);
        putchar('}');
        return 0;
    }
    printf("%5" PRIu32 " %-24s %-12.12s %-6s %6" PRIu32 " %6" PRIu32 " %6" PRIu32 " %-12s %-12s %4" PRIu32 " %8" PRIu64
           " %9s %s %s\n",
           s->id, s->model, s->revision, s->dtype, s->block_tokens, s->n_layers, s->n_groups, s->codec_k, s->codec_v,
           s->open, s->blocks, text_bytes(s->bytes, bytes), text_key(s->fingerprint, l->whole ? 32 : 8, key),
           s->tenant);
    return 0;
}

static int on_worker(void *ctx, const struct kvd_worker_info *w)
{
    struct list *l = ctx;
    char staging[24], age[24];

    if (l->n == 0 && !l->json)
        printf("%8s %-20s %8s %8s %8s %10s %8s %12s %12s %10s %s\n", "worker", "name", "pid", "uid", "leases",
               "staging", "age", "lookups", "hits", "jobs", "tenant");
    if (!next(l))
        return 1;
    if (l->json) {
        json_u64(stdout, true, "worker", w->worker);
        json_text(stdout, false, "name", w->name);
        json_text(stdout, false, "tenant", w->tenant);
        json_u64(stdout, false, "pid", (uint64_t)w->pid);
        json_u64(stdout, false, "uid", w->uid);
        json_u64(stdout, false, "leases", w->leases);
        json_u64(stdout, false, "staging_bytes", w->staging_bytes);
        json_u64(stdout, false, "age_usec", w->age_usec);
        json_u64(stdout, false, "lookups", w->lookups);
        json_u64(stdout, false, "hits", w->hits);
        json_u64(stdout, false, "jobs", w->jobs);
        putchar('}');
        return 0;
    }
    printf("%8" PRIu64 " %-20s %8" PRId32 " %8" PRIu32 " %8" PRIu64 " %10s %8s %12" PRIu64 " %12" PRIu64 " %10" PRIu64
           " %s\n",
           w->worker, w->name, w->pid, w->uid, w->leases, text_bytes(w->staging_bytes, staging),
           text_usec(w->age_usec, age), w->lookups, w->hits, w->jobs, w->tenant);
    return 0;
}

static int on_tenant(void *ctx, const struct kvd_tenant_info *t)
{
    struct list *l = ctx;
    char bytes[24], quota[24];

    if (l->n == 0 && !l->json)
        printf("%-24s %8s %10s %10s %8s %8s %8s\n", "tenant", "blocks", "bytes", "quota", "workers", "spaces", "slabs");
    if (!next(l))
        return 1;
    if (l->json) {
        json_text(stdout, true, "tenant", t->name);
        json_u64(stdout, false, "blocks", t->blocks);
        json_u64(stdout, false, "bytes", t->bytes);
        json_u64(stdout, false, "quota_bytes", t->quota_bytes);
        json_u64(stdout, false, "workers", t->workers);
        json_u64(stdout, false, "spaces", t->spaces);
        json_u64(stdout, false, "slabs", t->slabs);
        putchar('}');
        return 0;
    }
    printf("%-24s %8" PRIu64 " %10s %10s %8" PRIu32 " %8" PRIu32 " %8" PRIu32 "\n", t->name, t->blocks,
           text_bytes(t->bytes, bytes), t->quota_bytes ? text_bytes(t->quota_bytes, quota) : "-", t->workers, t->spaces,
           t->slabs);
    return 0;
}

int run_ls(struct ctl *ctl, const struct ctl_args *args)
{
    static const char *const kinds[] = {"blocks", "spaces", "workers", "tenants"};
    struct list list = {.json = args->set[OPT_JSON], .whole = args->set[OPT_LONG], .left = UINT64_MAX};
    const char *what = args->n_rest ? args->rest[0] : "blocks";
    struct select select;
    kvd *session;
    int kind, r;

    for (kind = 0; kind < 4 && strcmp(kinds[kind], what) != 0;)
        kind++;
    if (kind == 4)
        return ctl_usage("\"%s\" cannot be listed; allowed: blocks, spaces, workers, tenants", what);
    if (args->set[OPT_LIMIT] && !text_parse_u64(args->value[OPT_LIMIT], &list.left))
        return ctl_usage("--limit=%s is no number; allowed: 0 and more", args->value[OPT_LIMIT]);
    r = select_parse(args, &select);
    if (r == EXIT_OK && kind >= 2 && select.n_set)
        r = ctl_usage("%s cannot be selected", what);
    if (r == EXIT_OK)
        r = ctl_attach(ctl, &session);
    if (r != EXIT_OK)
        return r;
    if (list.json)
        putchar('[');
    r = kind == 0   ? kvd_admin_blocks(session, &select.selector, on_block, &list)
        : kind == 1 ? kvd_admin_spaces(session, &select.selector, on_space, &list)
        : kind == 2 ? kvd_admin_workers(session, on_worker, &list)
                    : kvd_admin_tenants(session, on_tenant, &list);
    if (list.json)
        puts(list.n ? "\n]" : "]");
    return r == KVD_OK ? EXIT_OK : ctl_fail(ctl, r);
}

static int on_show(void *ctx, const struct kvd_block_info *b)
{
    char key[65], parent[65], bytes[24], idle[24], age[24];

    struct list *l = ctx;

    if (l->json && l->n == 0)
        putchar('[');
    next(l);
    if (l->json) {
        block_json(b);
        putchar('}');
        return 0;
    }
    if (l->n > 1)
        putchar('\n');
    printf("key       %s\nparent    %s\ntenant    %s\nspace     %" PRIu32 "\ngroup     %" PRIu32 "\nfirst     %s\n"
           "bytes     %" PRIu64 " (%s)\ncrc32c    %08" PRIx32 "\ntier      %s\nchildren  %" PRIu32
           "\nleases    %" PRIu32 "\npins      %" PRIu32 "\nidle      %s\nage       %s\n",
           text_key(b->key, 32, key), text_key(b->parent, 32, parent), b->tenant, b->space, b->group,
           b->first ? "yes" : "no", b->bytes, text_bytes(b->bytes, bytes), b->crc32c, b->tier, b->children, b->leases,
           b->pins, text_usec(b->idle_usec, idle), text_usec(b->age_usec, age));
    return 0;
}

int run_show(struct ctl *ctl, const struct ctl_args *args)
{
    struct list list = {.json = args->set[ONE_N], .left = UINT64_MAX};
    struct select select;
    kvd *session;
    int r = select_parse_one(args, &select);

    if (r == EXIT_OK)
        r = ctl_attach(ctl, &session);
    if (r != EXIT_OK)
        return r;
    r = kvd_admin_show(session, &select.selector, on_show, &list);
    if (r != KVD_OK)
        return ctl_fail(ctl, r);
    if (list.json)
        puts("\n]");
    return EXIT_OK;
}
