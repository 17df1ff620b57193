/* kvctl: one table of commands, each with its options; parsing, --help and the completion come from it. */
#ifndef KVD_KVCTL_H
#define KVD_KVCTL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "client/libkvd/kvd.h"

enum { EXIT_OK = 0, EXIT_REFUSED = 1, EXIT_USAGE = 2, EXIT_NO_DAEMON = 3, EXIT_CORRUPT = 4 };

enum { CTL_OPTS_MAX = 16 };

struct ctl_opt {
    const char *name;
    char letter;     /* 0: none */
    const char *arg; /* name of its argument; NULL: takes none; "[X]": may be given with = */
    const char *help;
};

struct ctl;

struct ctl_args {
    const char *value[CTL_OPTS_MAX]; /* by place in the command's table; "" if given without an argument */
    bool set[CTL_OPTS_MAX];
    int n_rest;
    char **rest;
};

struct ctl_command {
    const char *name;
    const char *args; /* synopsis of what follows the options */
    const char *summary;
    const char *detail;         /* may be NULL */
    const struct ctl_opt *opts; /* ends with a NULL name */
    int rest_min, rest_max;
    int (*run)(struct ctl *ctl, const struct ctl_args *args);
};

struct ctl {
    const char *socket;
    kvd *session; /* opened when needed */
};

extern const struct ctl_opt stats_opts[], ls_opts[], show_opts[], evict_opts[], pin_opts[], verify_opts[], drain_opts[],
    config_opts[], ping_opts[], doctor_opts[], codec_opts[];

int run_stats(struct ctl *ctl, const struct ctl_args *args);
int run_ls(struct ctl *ctl, const struct ctl_args *args);
int run_show(struct ctl *ctl, const struct ctl_args *args);
int run_evict(struct ctl *ctl, const struct ctl_args *args);
int run_pin(struct ctl *ctl, const struct ctl_args *args);
int run_unpin(struct ctl *ctl, const struct ctl_args *args);
int run_verify(struct ctl *ctl, const struct ctl_args *args);
int run_drain(struct ctl *ctl, const struct ctl_args *args);
int run_config(struct ctl *ctl, const struct ctl_args *args);
int run_ping(struct ctl *ctl, const struct ctl_args *args);
int run_doctor(struct ctl *ctl, const struct ctl_args *args);
int run_codec(struct ctl *ctl, const struct ctl_args *args);

/* The admin session. Returns 0 or an exit code; what went wrong was printed. */
int ctl_attach(struct ctl *ctl, kvd **ret_session);
/* Prints the session's message and returns the exit code that belongs to a kvd_error. */
int ctl_fail(struct ctl *ctl, int error);
/* Prints a line about wrong usage and returns EXIT_USAGE. */
int ctl_usage(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
