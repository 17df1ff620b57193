/* The daemon's options: defaults, then the file, then the flags.
 *
 * The table is options.def; nothing about a single option is written anywhere else. A wrong line, flag or value is refused whole
 * with a message that names where, which key, and what is allowed.
 *
 * Loop thread. Includes: proto/shm.h; inih in the .c. */
#ifndef KVD_DAEMON_OPTIONS_H
#define KVD_DAEMON_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/shm.h"

enum option_kind {
    OPTION_BYTES,
    OPTION_COUNT,
    OPTION_USEC,
    OPTION_BOOL,
    OPTION_MODE,
    OPTION_ENUM,
    OPTION_STRING,
    OPTION_IDS,
};

/* A list of users or groups: as written, and as numbers. */
struct id_list {
    char *text;
    uint32_t *ids;
    size_t n;
};

#define OPTION_TYPE_BYTES uint64_t
#define OPTION_TYPE_COUNT uint64_t
#define OPTION_TYPE_USEC uint64_t
#define OPTION_TYPE_BOOL uint64_t
#define OPTION_TYPE_MODE uint64_t
#define OPTION_TYPE_ENUM uint64_t
#define OPTION_TYPE_STRING char *
#define OPTION_TYPE_IDS struct id_list

/* A [tenant NAME] section. */
struct tenant_options {
    char *name;
    uint64_t keys_set; /* bit i: the i-th key has been given in this file */
#define OPTION(...)
#define TENANT_OPTION(field, kind, ...) OPTION_TYPE_##kind field;
#include "daemon/options.def"
#undef TENANT_OPTION
#undef OPTION
};

struct options {
#define OPTION(field, kind, ...) OPTION_TYPE_##kind field;
#include "daemon/options.def"
#undef OPTION
    struct tenant_options *tenants; /* in the order of the file: the first that claims a peer has it */
    size_t n_tenants;
};

/* One row of the table. */
struct option {
    const char *name;
    enum option_kind kind;
    const char *unit; /* of an ENUM: the words, separated by | */
    uint64_t minimum, maximum;
    const char *default_text;
    bool live;
    const char *help;
    size_t offset; /* in struct options or struct tenant_options */
};

/* How names of users and groups become numbers. Errors: -ENOENT. */
struct id_resolver {
    int (*user)(void *ctx, const char *name, uint32_t *ret_uid);
    int (*group)(void *ctx, const char *name, uint32_t *ret_gid);
    void *ctx;
};
extern const struct id_resolver id_resolver_system;

enum { OPTION_TEXT_MAX = 1100, OPTION_ERROR_MAX = 1536, TENANT_NAME_MAX = 32, TENANTS_MAX = 1024 };

/* What was wrong: a whole sentence with place, key and what is allowed. */
struct option_error {
    char text[OPTION_ERROR_MAX];
};

/* The i-th row; NULL past the last. */
const struct option *option_at(size_t i);
const struct option *tenant_option_at(size_t i);
/* By name, - and _ being the same; NULL if there is none. */
const struct option *option_find(const char *name);

/* Fills in the defaults. Errors: -ENOMEM. Free with options_deinit(), which accepts a zeroed struct. */
int options_init(struct options *options);
void options_deinit(struct options *options);

/* Sets one option from text. Errors: -EINVAL with ret_error ("name: what; allowed: ..."), -ENOMEM. */
int option_set(struct options *options, const struct option *option, const char *text, const struct id_resolver *ids,
               struct option_error *ret_error);
/* The value, minimum or maximum as text that option_set() takes. buf holds OPTION_TEXT_MAX bytes. Return buf. */
char *option_format(const struct options *options, const struct option *option, char *buf);
char *option_format_value(const struct option *option, uint64_t value, char *buf);

/* Reads a configuration file, or its text (n bytes; path is for messages). Errors: -EINVAL or -errno, always with ret_error;
 * options then hold a part of it and are only good for options_deinit(). */
int options_read_text(struct options *options, const char *path, const char *text, size_t n, const struct id_resolver *ids,
                      struct option_error *ret_error);
int options_read_file(struct options *options, const char *path, const struct id_resolver *ids,
                      struct option_error *ret_error);

/* What flags say beside options. */
struct option_flags {
    const char *config; /* borrowed from argv; NULL: none named */
    bool help, version, check;
};
/* Applies argv[1] ...: --name=value or --name value. Errors: -EINVAL or -ENOMEM with ret_error. */
int options_read_flags(struct options *options, int argc, char **argv, const struct id_resolver *ids,
                       struct option_flags *ret_flags, struct option_error *ret_error);

/* Defaults, file, flags, and what options must be to each other. default_config is read if it exists and no flag names another
 * file (NULL: none). On failure nothing is left in *ret_options. */
int options_load(struct options *ret_options, int argc, char **argv, const char *default_config,
                 const struct id_resolver *ids, struct option_flags *ret_flags, struct option_error *ret_error);

/* Rules between options (included in options_load()). Errors: -EINVAL with ret_error. */
int options_check(const struct options *options, struct option_error *ret_error);

#endif
