#include "daemon/options_print.h"

#include <ctype.h>
#include <stdbool.h>
#include <string.h>

#include "daemon/options_value.h"

enum { WIDTH = 96 };

/* help in lines of at most WIDTH, each after indent. */
static void wrap(FILE *out, const char *text, const char *indent)
{
    while (*text) {
        size_t n = strlen(text), room = WIDTH - strlen(indent);

        if (n > room)
            for (n = room; n > 0 && text[n] != ' ';)
                n--;
        if (n == 0)
            n = strlen(text);
        fprintf(out, "%s%.*s\n", indent, (int)n, text);
        text += n;
        text += *text == ' ';
    }
}

static void flag_name(const struct option *o, char *buf, size_t n)
{
    snprintf(buf, n, "%s", o->name);
    for (; *buf; buf++)
        if (*buf == '_')
            *buf = '-';
}

void options_print_help(FILE *out, const char *default_config)
{
    const struct option *o;
    char name[64], allowed[OPTION_TEXT_MAX];

    fprintf(out, "usage: kvd [--config=FILE] [--NAME=VALUE ...]\n\n"
                 "The host's prefix KV cache for inference workers. Options are read from the file's section [kvd],\n"
                 "then from the command line; tenants are sections of the file. See kvd(8) and kvd.conf(5).\n\n"
                 "  --config=FILE    configuration file, which must exist; else %s if it does\n"
                 "  --check          read the configuration, say what is wrong with it, and end\n"
                 "  --version\n"
                 "  --help\n\nOptions (* can change while the daemon runs: by SIGHUP or kvctl config):\n\n",
            default_config);
    for (size_t i = 0; (o = option_at(i)); i++) {
        flag_name(o, name, sizeof(name));
        fprintf(out, "  --%s=%s%s\n", name, o->default_text, o->live ? " *" : "");
        wrap(out, o->help, "      ");
        fprintf(out, "      Allowed: %s.\n", option_allowed(o, allowed));
    }
}

/* Text for roff: no line begins with a dot, no backslash, and minus signs are minus signs. */
static void roff(FILE *out, const char *text)
{
    for (; *text; text++) {
        if (*text == '\\')
            fputs("\\e", out);
        else if (*text == '-')
            fputs("\\-", out);
        else
            fputc(*text, out);
    }
}

static void roff_item(FILE *out, const struct option *o, const char *prefix, const char *name)
{
    char allowed[OPTION_TEXT_MAX];

    fprintf(out, ".TP\n.BR %s", prefix);
    roff(out, name);
    fprintf(out, " =\\fI%s\\fR\n", o->kind == OPTION_ENUM ? "WORD" : o->unit);
    roff(out, o->help);
    fputs("\nAllowed: ", out);
    roff(out, option_allowed(o, allowed));
    fputs(". Default: ", out);
    roff(out, *o->default_text ? o->default_text : "empty");
    fprintf(out, ".%s\n", o->live ? "" : " Takes effect after a restart.");
}

void options_print_man_flags(FILE *out)
{
    const struct option *o;
    char name[64];

    for (size_t i = 0; (o = option_at(i)); i++) {
        flag_name(o, name, sizeof(name));
        roff_item(out, o, "\\-\\-", name);
    }
}

void options_print_man_keys(FILE *out)
{
    const struct option *o;

    for (size_t i = 0; (o = option_at(i)); i++)
        roff_item(out, o, "", o->name);
}

void options_print_man_tenant_keys(FILE *out)
{
    const struct option *o;

    for (size_t i = 0; (o = tenant_option_at(i)); i++)
        roff_item(out, o, "", o->name);
}
