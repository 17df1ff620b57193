/* kvctl: looks into a running daemon and steers it. Uses libkvd's public header only. */
#include "kvctl.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct ctl_command commands[] = {
    {"stats", "", "counters and gauges of the daemon and its tenants", NULL, stats_opts, 0, 0, run_stats},
    {"ls", "[blocks|spaces|workers|tenants]", "lists what is there (blocks, if nothing is said)", NULL, ls_opts, 0, 1,
     run_ls},
    {"show", "KEY", "everything about one block",
     "KEY is a block's key in hex, or the beginning of it that no other has.", show_opts, 1, 1, run_show},
    {"evict", "", "drops blocks, children before their parents",
     "At least one of the selecting options, or --all. Leased and pinned blocks stay.", evict_opts, 0, 0, run_evict},
    {"pin", "KEY", "keeps a block and those before it in its chain from being evicted", NULL, pin_opts, 1, 1, run_pin},
    {"unpin", "KEY", "takes a pin back", NULL, pin_opts, 1, 1, run_unpin},
    {"verify", "", "reads every payload again and compares its checksum; bad ones are dropped",
     "Exit code 4 if any was bad.", verify_opts, 0, 0, run_verify},
    {"drain", "", "takes no new workers and no new blocks", NULL, drain_opts, 0, 0, run_drain},
    {"config", "[NAME[=VALUE]]", "shows options in force, or sets a live one until the next restart", NULL, config_opts,
     0, 1, run_config},
    {"ping", "", "round trips to the daemon", NULL, ping_opts, 0, 0, run_ping},
    {"doctor", "", "looks for what keeps a worker from using the daemon, and says what to do", NULL, doctor_opts, 0, 0,
     run_doctor},
    {"codec", "list | encode IN [V] OUT | decode IN OUT | error IN", "codecs by themselves: no daemon is needed",
     "IN is a .npy file of fp16 or fp32, or raw numbers with --shape and --dtype: [tokens][heads][dim] or "
     "[tokens][dim].\n"
     "encode writes, for each run of --block tokens and each head in it, side data, then codes. decode reads that and "
     "needs\n"
     "--shape. error codes, decodes and compares. With --format uq-page, encode takes K and V and writes UltraQuant's "
     "page:\n"
     "for each token and head K codes, K scales, V codes, V scales.",
     codec_opts, 1, 4, run_codec},
};
#define N_COMMANDS (sizeof(commands) / sizeof(commands[0]))

int ctl_usage(const char *format, ...)
{
    va_list ap;

    fputs("kvctl: ", stderr);
    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fputs("\nTry kvctl --help.\n", stderr);
    return EXIT_USAGE;
}

static int exit_code(int error)
{
    switch (error) {
    case KVD_OK:
        return EXIT_OK;
    case KVD_E_ARG:
        return EXIT_USAGE;
    case KVD_E_CONNECT:
    case KVD_E_GONE:
    case KVD_E_TIMEOUT:
    case KVD_E_PROTOCOL:
        return EXIT_NO_DAEMON;
    case KVD_E_CORRUPT:
        return EXIT_CORRUPT;
    default:
        return EXIT_REFUSED;
    }
}

int ctl_fail(struct ctl *ctl, int error)
{
    const char *message = kvd_message(ctl->session);

    if (error != KVD_OK)
        fprintf(stderr, "kvctl: %s%s%s\n", kvd_strerror(error), message[0] ? ": " : "", message);
    return exit_code(error);
}

int ctl_attach(struct ctl *ctl, kvd **ret_session)
{
    struct kvd_options options = KVD_OPTIONS_INIT;
    int r;

    options.socket_path = ctl->socket;
    options.name = "kvctl";
    options.admin_only = 1;
    r = kvd_attach(&options, &ctl->session);
    if (r != KVD_OK)
        return ctl_fail(ctl, r);
    *ret_session = ctl->session;
    return 0;
}

/* ---- Help ---- */

static void print_opt(const struct ctl_opt *o)
{
    char left[64];
    int n;

    if (o->letter)
        n = snprintf(left, sizeof(left), "-%c, --%s", o->letter, o->name);
    else
        n = snprintf(left, sizeof(left), "    --%s", o->name);
    if (o->arg)
        snprintf(left + n, sizeof(left) - (size_t)n, o->arg[0] == '[' ? "[=%.*s]" : "=%.*s",
                 o->arg[0] == '[' ? (int)strlen(o->arg) - 2 : (int)strlen(o->arg), o->arg + (o->arg[0] == '['));
    printf("  %-26s %s\n", left, o->help);
}

static const struct ctl_opt global_opts[] = {
    {"socket", 's', "PATH", "the daemon's socket ($KVD_SOCKET, else /run/kvd/kvd.sock)"},
    {"help", 'h', NULL, "this text"},
    {"version", 'V', NULL, "the version"},
    {NULL, 0, NULL, NULL},
};

static void print_command_help(const struct ctl_command *c)
{
    printf("Usage: kvctl %s [OPTION…]%s%s\n\n%c%s.\n", c->name, c->args[0] ? " " : "", c->args, toupper(c->summary[0]),
           c->summary + 1);
    if (c->detail)
        printf("%s\n", c->detail);
    putchar('\n');
    for (const struct ctl_opt *o = c->opts; o->name; o++)
        print_opt(o);
    for (const struct ctl_opt *o = global_opts; o->name; o++)
        print_opt(o);
}

static void print_help(void)
{
    printf("Usage: kvctl [--socket=PATH] COMMAND [OPTION…]\n\nLooks into a running kvd and steers it.\n\n");
    for (size_t i = 0; i < N_COMMANDS; i++)
        printf("  %-8s %s\n", commands[i].name, commands[i].summary);
    printf(
        "\nkvctl COMMAND --help tells a command's options. Exit codes: 0 done, 1 refused or not found, 2 wrong usage,\n"
        "3 no daemon, 4 corrupt blocks were found.\n");
}

/* ---- Parsing ---- */

enum { GLOBAL_FIRST = 1000 };

static int takes_argument(const struct ctl_opt *o)
{
    return !o->arg ? no_argument : o->arg[0] == '[' ? optional_argument : required_argument;
}

/* getopt's tables from ours: long options, and the string of letters. */
static void build_tables(const struct ctl_opt *own, struct option *longs, char *letters)
{
    size_t n = 0, l = 0;

    letters[l++] =
        '+'; /* names end the options before a command; after it, getopt's own reordering is not needed either */
    if (own)
        l = 0;
    for (int table = 0; table < 2; table++) {
        const struct ctl_opt *opts = table ? global_opts : own;

        for (int i = 0; opts && opts[i].name; i++) {
            longs[n++] = (struct option){opts[i].name, takes_argument(&opts[i]), NULL, (table ? GLOBAL_FIRST : 0) + i};
            if (opts[i].letter) {
                letters[l++] = opts[i].letter;
                for (int k = takes_argument(&opts[i]); k > 0; k--)
                    letters[l++] = ':';
            }
        }
    }
    longs[n] = (struct option){0};
    letters[l] = '\0';
}

/* The number of an option that was given by its letter. */
static int by_letter(const struct ctl_opt *own, int letter)
{
    for (int i = 0; own && own[i].name; i++)
        if (own[i].letter == letter)
            return i;
    for (int i = 0; global_opts[i].name; i++)
        if (global_opts[i].letter == letter)
            return GLOBAL_FIRST + i;
    return -1;
}

/* Parses argv[1…] by a command's options (NULL: before the command) and the global ones. Returns -1 to go on, else
 * an exit code. */
static int parse(struct ctl *ctl, const struct ctl_command *c, int argc, char **argv, struct ctl_args *args)
{
    struct option longs[CTL_OPTS_MAX + 8];
    char letters[3 * CTL_OPTS_MAX + 16];
    const struct ctl_opt *own = c ? c->opts : NULL;
    int o;

    build_tables(own, longs, letters);
    optind = 0; /* glibc: start anew */
    while ((o = getopt_long(argc, argv, letters, longs, NULL)) != -1) {
        if (o == '?')
            return EXIT_USAGE;
        if (o >= ' ' && o < GLOBAL_FIRST)
            o = by_letter(own, o);
        if (o == GLOBAL_FIRST) {
            ctl->socket = optarg;
        } else if (o == GLOBAL_FIRST + 1) {
            if (c)
                print_command_help(c);
            else
                print_help();
            return EXIT_OK;
        } else if (o == GLOBAL_FIRST + 2) {
            printf("kvctl %s\n", PACKAGE_VERSION);
            return EXIT_OK;
        } else {
            args->set[o] = true;
            args->value[o] = optarg ? optarg : "";
        }
    }
    args->n_rest = argc - optind;
    args->rest = argv + optind;
    return -1;
}

static const struct ctl_command *find_command(const char *name)
{
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (strcmp(commands[i].name, name) == 0)
            return &commands[i];
    return NULL;
}

/* For the completion: `kvctl __complete` lists commands, `kvctl __complete COMMAND` its options. */
static int complete(int n, char **words)
{
    const struct ctl_command *c = n > 0 ? find_command(words[0]) : NULL;

    for (size_t i = 0; n == 0 && i < N_COMMANDS; i++)
        puts(commands[i].name);
    for (int table = 0; n > 0 && table < 2; table++)
        for (const struct ctl_opt *o = table ? global_opts : c ? c->opts : NULL; o && o->name; o++)
            printf("--%s%s\n", o->name, o->arg && o->arg[0] != '[' ? "=" : "");
    return EXIT_OK;
}

int main(int argc, char **argv)
{
    struct ctl ctl = {0};
    struct ctl_args args = {{0}};
    const struct ctl_command *c;
    int r = parse(&ctl, NULL, argc, argv, &args);

    if (r >= 0)
        return r;
    if (args.n_rest == 0)
        return ctl_usage("a command is needed");
    if (strcmp(args.rest[0], "__complete") == 0)
        return complete(args.n_rest - 1, args.rest + 1);
    c = find_command(args.rest[0]);
    if (!c)
        return ctl_usage("there is no command \"%s\"", args.rest[0]);
    r = parse(&ctl, c, args.n_rest, args.rest, &args);
    if (r >= 0)
        return r;
    if (args.n_rest < c->rest_min || args.n_rest > c->rest_max)
        return ctl_usage("usage: kvctl %s [OPTION…]%s%s", c->name, c->args[0] ? " " : "", c->args);
    r = c->run(&ctl, &args);
    kvd_detach(ctl.session);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "kvctl: standard output: %s\n", strerror(errno));
        return EXIT_REFUSED;
    }
    return r;
}
