#include "daemon/options.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <ini.h>

#include "daemon/options_value.h"
#include "daemon/rpc.h"

#define ROW(type, f, k, u, lo, hi, def, is_live, h)                                                                    \
    {.name = #f, .kind = OPTION_##k, .unit = u, .minimum = lo, .maximum = hi, .default_text = def, .live = is_live,    \
     .help = h, .offset = offsetof(type, f)},

static const struct option options_table[] = {
#define OPTION(f, k, u, lo, hi, def, is_live, h) ROW(struct options, f, k, u, lo, hi, def, is_live, h)
#include "daemon/options.def"
#undef OPTION
};
static const struct option tenant_table[] = {
#define OPTION(...)
#define TENANT_OPTION(f, k, u, lo, hi, def, is_live, h) ROW(struct tenant_options, f, k, u, lo, hi, def, is_live, h)
#include "daemon/options.def"
#undef TENANT_OPTION
#undef OPTION
};

enum {
    N_OPTIONS = sizeof(options_table) / sizeof(options_table[0]),
    N_TENANT_OPTIONS = sizeof(tenant_table) / sizeof(tenant_table[0]),
    FILE_MAX_BYTES = 1 << 20,
};
static_assert(N_OPTIONS <= 64 && N_TENANT_OPTIONS <= 64, "a file's keys are remembered in 64 bits");

static int user_of_name(void *ctx, const char *name, uint32_t *ret_uid)
{
    struct passwd pw, *found = NULL;
    char buf[16384];

    (void)ctx;
    if (getpwnam_r(name, &pw, buf, sizeof(buf), &found) != 0 || !found)
        return -ENOENT;
    *ret_uid = pw.pw_uid;
    return 0;
}

static int group_of_name(void *ctx, const char *name, uint32_t *ret_gid)
{
    struct group gr, *found = NULL;
    char buf[65536]; /* groups list their members */

    (void)ctx;
    if (getgrnam_r(name, &gr, buf, sizeof(buf), &found) != 0 || !found)
        return -ENOENT;
    *ret_gid = gr.gr_gid;
    return 0;
}

const struct id_resolver id_resolver_system = {user_of_name, group_of_name, NULL};

const struct option *option_at(size_t i)
{
    return i < N_OPTIONS ? &options_table[i] : NULL;
}

const struct option *tenant_option_at(size_t i)
{
    return i < N_TENANT_OPTIONS ? &tenant_table[i] : NULL;
}

static bool same_name(const char *a, const char *b)
{
    for (; *a && *b; a++, b++)
        if ((*a == '-' ? '_' : *a) != (*b == '-' ? '_' : *b))
            return false;
    return *a == *b;
}

static const struct option *find_in(const struct option *table, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (same_name(table[i].name, name))
            return &table[i];
    return NULL;
}

const struct option *option_find(const char *name)
{
    return find_in(options_table, N_OPTIONS, name);
}

__attribute__((format(printf, 2, 3))) static int fail(struct option_error *e, const char *format, ...)
{
    va_list ap;

    va_start(ap, format);
    vsnprintf(e->text, sizeof(e->text), format, ap);
    va_end(ap);
    return -EINVAL;
}

static int no_memory(struct option_error *e)
{
    fail(e, "no memory for options");
    return -ENOMEM;
}

static int set_text(char **field, const struct option *o, const char *text, struct option_error *e)
{
    char allowed[OPTION_TEXT_MAX], *copy;
    size_t n = strlen(text);

    if (n < o->minimum || n > o->maximum)
        return fail(e, "%s: a text of %zu bytes; allowed: %s", o->name, n, option_allowed(o, allowed));
    copy = strdup(text);
    if (!copy)
        return no_memory(e);
    free(*field);
    *field = copy;
    return 0;
}

static int add_ids(struct id_list *list, const struct option *o, const char *text, const struct id_resolver *ids,
                   struct option_error *e)
{
    char allowed[OPTION_TEXT_MAX], word[64] = "";
    int r;

    if (strlen(text) + (list->text ? strlen(list->text) : 0) > o->maximum)
        return fail(e, "%s: the list is longer than %llu bytes", o->name, (unsigned long long)o->maximum);
    r = id_list_add(list, o, ids, text, word, sizeof(word));
    if (r == -ENOMEM)
        return no_memory(e);
    if (r < 0)
        return fail(e, "%s: \"%s\" is not among the %s of this system; allowed: %s", o->name, word, o->unit,
                    option_allowed(o, allowed));
    return 0;
}

/* base: the struct that o's offset belongs to. */
static int set_field(void *base, const struct option *o, const char *text, bool append, const struct id_resolver *ids,
                     struct option_error *e)
{
    void *field = (char *)base + o->offset;
    char allowed[OPTION_TEXT_MAX];
    int r;

    if (o->kind == OPTION_STRING)
        return set_text(field, o, text, e);
    if (o->kind == OPTION_IDS) {
        struct id_list *list = field, fresh = {0};

        if (append)
            return add_ids(list, o, text, ids, e);
        r = add_ids(&fresh, o, text, ids, e);
        if (r < 0) {
            id_list_clear(&fresh);
            return r;
        }
        id_list_clear(list);
        *list = fresh;
        return 0;
    }
    r = option_value_parse(o, text, field);
    if (r < 0)
        return fail(e, "%s: \"%.200s\" %s; allowed: %s", o->name, text,
                    r == -ERANGE ? "is out of range" : "cannot be understood", option_allowed(o, allowed));
    return 0;
}

int option_set(struct options *options, const struct option *o, const char *text, const struct id_resolver *ids,
               struct option_error *ret_error)
{
    return set_field(options, o, text, false, ids, ret_error);
}

char *option_format(const struct options *options, const struct option *o, char *buf)
{
    const void *field = (const char *)options + o->offset;
    const char *text;

    if (o->kind != OPTION_STRING && o->kind != OPTION_IDS)
        return option_format_value(o, *(const uint64_t *)field, buf);
    text = o->kind == OPTION_STRING ? *(char *const *)field : ((const struct id_list *)field)->text;
    snprintf(buf, OPTION_TEXT_MAX, "%s", text ? text : "");
    return buf;
}

static int init_fields(void *base, const struct option *table, size_t n)
{
    struct option_error e;

    for (size_t i = 0; i < n; i++) {
        int r = set_field(base, &table[i], table[i].default_text, false, &id_resolver_system, &e);

        if (r < 0)
            return r; /* -ENOMEM, or a default that its own row does not allow: check_options looks */
    }
    return 0;
}

static void deinit_fields(void *base, const struct option *table, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        void *field = (char *)base + table[i].offset;

        if (table[i].kind == OPTION_STRING)
            free(*(char **)field);
        else if (table[i].kind == OPTION_IDS)
            id_list_clear(field);
    }
}

int options_init(struct options *options)
{
    int r;

    memset(options, 0, sizeof(*options));
    r = init_fields(options, options_table, N_OPTIONS);
    if (r < 0)
        options_deinit(options);
    return r;
}

void options_deinit(struct options *options)
{
    deinit_fields(options, options_table, N_OPTIONS);
    for (size_t i = 0; i < options->n_tenants; i++) {
        deinit_fields(&options->tenants[i], tenant_table, N_TENANT_OPTIONS);
        free(options->tenants[i].name);
    }
    free(options->tenants);
    memset(options, 0, sizeof(*options));
}

/* ---- the file ---- */

struct reading {
    struct options *options;
    const struct id_resolver *ids;
    const char *path;
    const char *at, *end; /* text that is left */
    int line;
    int failed_line; /* 0: none yet; the first one counts */
    int r;
    uint64_t keys_set;
    struct option_error *error;
};

static bool is_tenant_name(const char *name)
{
    return *name && strlen(name) <= TENANT_NAME_MAX &&
           strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == strlen(name);
}

static struct tenant_options *tenant_section(struct reading *rd, const char *name, struct option_error *e)
{
    struct options *o = rd->options;
    struct tenant_options *grown;

    for (size_t i = 0; i < o->n_tenants; i++)
        if (strcmp(o->tenants[i].name, name) == 0)
            return &o->tenants[i];
    if (!is_tenant_name(name) || strcmp(name, "none") == 0) {
        rd->r = fail(e, "[tenant %s]: not a tenant's name; allowed: 1 to %d of a-z A-Z 0-9 _ . - (and not \"none\")", name,
                     TENANT_NAME_MAX);
        return NULL;
    }
    if (o->n_tenants == TENANTS_MAX) {
        rd->r = fail(e, "[tenant %s]: too many tenants; allowed: %d", name, TENANTS_MAX);
        return NULL;
    }
    grown = realloc(o->tenants, (o->n_tenants + 1) * sizeof(*grown));
    if (!grown) {
        rd->r = no_memory(e);
        return NULL;
    }
    o->tenants = grown;
    grown += o->n_tenants;
    memset(grown, 0, sizeof(*grown));
    grown->name = strdup(name);
    o->n_tenants++; /* deinit frees what there is */
    if (!grown->name || init_fields(grown, tenant_table, N_TENANT_OPTIONS) < 0) {
        rd->r = no_memory(e);
        return NULL;
    }
    return grown;
}

static int set_key(struct reading *rd, void *base, const struct option *table, size_t n, uint64_t *keys_set,
                   const char *section, const char *name, const char *value, struct option_error *e)
{
    const struct option *o = find_in(table, n, name);
    uint64_t bit;

    if (!o)
        return fail(e, "[%s] has no key \"%s\"; kvd --help lists all", section, name);
    bit = UINT64_C(1) << (o - table);
    if ((*keys_set & bit) && o->kind != OPTION_IDS)
        return fail(e, "%s: given a second time; allowed: once", o->name);
    *keys_set |= bit;
    return set_field(base, o, value, true, rd->ids, e);
}

/* Where the keys of a section go: a tenant, or the daemon (NULL), whose keys may stand before any section. */
static bool open_section(struct reading *rd, const char *section, struct tenant_options **ret_tenant, struct option_error *e)
{
    *ret_tenant = NULL;
    if (!*section || strcmp(section, "kvd") == 0)
        return true;
    if (strncmp(section, "tenant ", 7) == 0) {
        *ret_tenant = tenant_section(rd, section + 7 + strspn(section + 7, " \t"), e);
        return *ret_tenant != NULL;
    }
    rd->r = fail(e, "[%s]: no such section; allowed: [kvd] and [tenant NAME]", section);
    return false;
}

static void failed_here(struct reading *rd, const struct option_error *e)
{
    rd->failed_line = rd->line;
    snprintf(rd->error->text, sizeof(rd->error->text), "%s:%d: %.1200s", rd->path, rd->line, e->text);
}

/* inih's handler: 0 is a failure. */
static int take_line(void *user, const char *section, const char *name, const char *value)
{
    struct reading *rd = user;
    struct tenant_options *t;
    struct option_error e;

    if (rd->failed_line)
        return 0;
    if (open_section(rd, section, &t, &e))
        rd->r = t ? set_key(rd, t, tenant_table, N_TENANT_OPTIONS, &t->keys_set, section, name, value, &e)
                  : set_key(rd, rd->options, options_table, N_OPTIONS, &rd->keys_set, "kvd", name, value, &e);
    if (rd->r == 0)
        return 1;
    failed_here(rd, &e);
    return 0;
}

/* inih tells of keys only: a section without any is looked at here. */
static void look_at_section(struct reading *rd, const char *line)
{
    const char *end = line[0] == '[' ? strchr(line, ']') : NULL;
    char section[256];
    struct tenant_options *t;
    struct option_error e;

    if (!end)
        return;
    snprintf(section, sizeof(section), "%.*s", (int)(end - line - 1), line + 1);
    if (!open_section(rd, section, &t, &e))
        failed_here(rd, &e);
}

/* inih's reader: fgets over memory, and where lines are counted. */
static char *read_line(char *buf, int n, void *stream)
{
    struct reading *rd = stream;
    size_t left = (size_t)(rd->end - rd->at), take;
    const char *eol;

    if (left == 0 || rd->failed_line)
        return NULL;
    rd->line++;
    eol = memchr(rd->at, '\n', left);
    take = eol ? (size_t)(eol - rd->at) + 1 : left;
    if (take >= (size_t)n || memchr(rd->at, 0, take)) {
        rd->failed_line = rd->line;
        rd->r = fail(rd->error, "%s:%d: %s", rd->path, rd->line,
                     take >= (size_t)n ? "the line is longer than 198 bytes; a list may be given in several lines"
                                       : "a zero byte; allowed: text");
        return NULL;
    }
    memcpy(buf, rd->at, take);
    buf[take] = 0;
    rd->at += take;
    look_at_section(rd, buf);
    return rd->failed_line ? NULL : buf;
}

int options_read_text(struct options *options, const char *path, const char *text, size_t n, const struct id_resolver *ids,
                      struct option_error *ret_error)
{
    struct reading rd = {
        .options = options, .ids = ids, .path = path, .at = text, .end = text + n, .error = ret_error};
    int line = ini_parse_stream(read_line, &rd, take_line, &rd);

    if (line < 0)
        return no_memory(ret_error);
    if (line > 0 && (!rd.failed_line || line < rd.failed_line))
        return fail(ret_error, "%s:%d: neither a [section] nor key = value", path, line);
    return rd.failed_line ? rd.r : 0;
}

int options_read_file(struct options *options, const char *path, const struct id_resolver *ids,
                      struct option_error *ret_error)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), r = 0;
    char *text = fd < 0 ? NULL : malloc(FILE_MAX_BYTES + 1);
    size_t n = 0;
    ssize_t got = 1;

    if (fd < 0) {
        r = -errno;
        fail(ret_error, "%s: %s", path, strerror(errno));
        return r;
    }
    if (!text) {
        close(fd);
        return no_memory(ret_error);
    }
    while (n <= FILE_MAX_BYTES && (got = read(fd, text + n, FILE_MAX_BYTES + 1 - n)) > 0)
        n += (size_t)got;
    if (got < 0) {
        r = -errno;
        fail(ret_error, "%s: %s", path, strerror(errno));
    } else if (n > FILE_MAX_BYTES) {
        r = fail(ret_error, "%s: longer than %d bytes", path, FILE_MAX_BYTES);
    } else {
        r = options_read_text(options, path, text, n, ids, ret_error);
    }
    free(text);
    close(fd);
    return r;
}

/* ---- flags ---- */

static int take_flag(struct options *options, const char *name, const char *value, const struct id_resolver *ids,
                     struct option_flags *flags, struct option_error *e)
{
    const struct option *o = option_find(name);
    struct option_error inner;
    int r;

    if (strcmp(name, "config") == 0) {
        flags->config = value;
        return 0;
    }
    if (!o)
        return fail(e, "--%s: no such option; kvd --help lists all", name);
    r = set_field(options, o, value, false, ids, &inner);
    if (r < 0)
        snprintf(e->text, sizeof(e->text), "--%.1200s", inner.text);
    return r;
}

static bool take_word(const char *name, struct option_flags *flags)
{
    if (strcmp(name, "help") == 0)
        flags->help = true;
    else if (strcmp(name, "version") == 0)
        flags->version = true;
    else if (strcmp(name, "check") == 0)
        flags->check = true;
    else
        return false;
    return true;
}

int options_read_flags(struct options *options, int argc, char **argv, const struct id_resolver *ids,
                       struct option_flags *ret_flags, struct option_error *ret_error)
{
    struct option_flags flags = {0};

    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *value;
        char name[64];
        size_t n;
        int r;

        if (strcmp(arg, "-h") == 0)
            arg = "--help";
        if (strncmp(arg, "--", 2) != 0)
            return fail(ret_error, "\"%s\": not a flag; allowed: --name=value, see kvd --help", arg);
        n = strcspn(arg + 2, "=");
        snprintf(name, sizeof(name), "%.*s", (int)n, arg + 2);
        value = arg[2 + n] ? arg + 2 + n + 1 : NULL;
        if (!value && take_word(name, &flags))
            continue;
        if (!value && i + 1 < argc)
            value = argv[++i];
        if (!value)
            return fail(ret_error, "--%s: needs a value: --%s=value", name, name);
        r = take_flag(options, name, value, ids, &flags, ret_error);
        if (r < 0)
            return r;
    }
    *ret_flags = flags;
    return 0;
}

int options_check(const struct options *o, struct option_error *ret_error)
{
    if (o->attend_ring & (o->attend_ring - 1))
        return fail(ret_error, "attend_ring: %llu is not a power of two", (unsigned long long)o->attend_ring);
    if (o->hit_log & (o->hit_log - 1))
        return fail(ret_error, "hit_log: %llu is not a power of two", (unsigned long long)o->hit_log);
    if (o->slab_bytes % (2 << 20))
        return fail(ret_error, "slab_bytes: %llu is not a multiple of 2M", (unsigned long long)o->slab_bytes);
    if (o->publish_blocks > o->publish_worker_blocks || o->publish_worker_blocks > o->publish_total_blocks)
        return fail(ret_error, "publish_blocks (%llu), publish_worker_blocks (%llu) and publish_total_blocks (%llu) must not "
                               "fall in this order",
                    (unsigned long long)o->publish_blocks, (unsigned long long)o->publish_worker_blocks,
                    (unsigned long long)o->publish_total_blocks);
    if (o->grpc_memory / 4 < o->grpc_message_bytes)
        return fail(ret_error, "grpc_memory: %llu is less than 4 times grpc_message_bytes (%llu)", (unsigned long long)o->grpc_memory,
                    (unsigned long long)o->grpc_message_bytes);
    if (*o->grpc_socket && !rpc_built())
        return fail(ret_error, "grpc_socket: this kvd was built without gRPC; allowed: nothing");
    if (!is_tenant_name(o->default_tenant))
        return fail(ret_error, "default_tenant: \"%s\" is not a tenant's name; allowed: 1 to %d of a-z A-Z 0-9 _ . -, \"none\" among them",
                    o->default_tenant, TENANT_NAME_MAX);
    return 0;
}

int options_load(struct options *ret_options, int argc, char **argv, const char *default_config,
                 const struct id_resolver *ids, struct option_flags *ret_flags, struct option_error *ret_error)
{
    struct option_flags flags;
    struct options o;
    const char *config;
    uint32_t gid;
    int r = options_init(&o);

    if (r < 0)
        return no_memory(ret_error);
    r = options_read_flags(&o, argc, argv, ids, &flags, ret_error); /* first for --config, and for what is wrong at all */
    if (r < 0)
        goto fail;
    config = flags.config ? flags.config : default_config && access(default_config, F_OK) == 0 ? default_config : NULL;
    if (config && !flags.help && !flags.version) {
        options_deinit(&o);
        r = options_init(&o);
        if (r < 0)
            return no_memory(ret_error);
        r = options_read_file(&o, config, ids, ret_error);
        if (r == 0)
            r = options_read_flags(&o, argc, argv, ids, &flags, ret_error);
        if (r < 0)
            goto fail;
    }
    r = options_check(&o, ret_error);
    if (r == 0 && *o.socket_group && ids->group(ids->ctx, o.socket_group, &gid) < 0)
        r = fail(ret_error, "socket_group: there is no group \"%s\" on this system; allowed: the name of one, or nothing",
                 o.socket_group);
    if (r < 0)
        goto fail;
    *ret_options = o;
    *ret_flags = flags;
    return 0;
fail:
    options_deinit(&o);
    return r;
}
