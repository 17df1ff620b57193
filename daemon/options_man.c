/* Fills the table of options into a text: what the build makes manual pages with.
 *
 *     options_man < TEMPLATE > RESULT
 *
 * A line that is @FLAGS@, @KEYS@ or @TENANT_KEYS@ is replaced by that form of the table; @VERSION@ anywhere by the version. */
#include <stdio.h>
#include <string.h>

#include "daemon/options_print.h"

static void put_line(const char *line)
{
    const char *at = strstr(line, "@VERSION@");

    if (at)
        printf("%.*s%s%s", (int)(at - line), line, PACKAGE_VERSION, at + strlen("@VERSION@"));
    else
        fputs(line, stdout);
}

int main(void)
{
    static const struct {
        const char *mark;
        void (*print)(FILE *out);
    } forms[] = {{"@FLAGS@\n", options_print_man_flags},
                 {"@KEYS@\n", options_print_man_keys},
                 {"@TENANT_KEYS@\n", options_print_man_tenant_keys}};
    char line[4096];

    while (fgets(line, sizeof(line), stdin)) {
        size_t i = 0;

        while (i < sizeof(forms) / sizeof(forms[0]) && strcmp(line, forms[i].mark) != 0)
            i++;
        if (i < sizeof(forms) / sizeof(forms[0]))
            forms[i].print(stdout);
        else
            put_line(line);
    }
    return ferror(stdin) || fflush(stdout) != 0;
}
