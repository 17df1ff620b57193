/* Fills the table of options into a text: what the build makes manual pages with.
 *
 *     options_man < TEMPLATE > RESULT
 *
 * A line that is @FLAGS@, @KEYS@ or @TENANT_KEYS@ is replaced by that form of the table. */
#include <stdio.h>
#include <string.h>

#include "daemon/options_print.h"

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
            fputs(line, stdout);
    }
    return ferror(stdin) || fflush(stdout) != 0;
}
