/* The table of options as text: for --help and the manual pages. */
#ifndef KVD_DAEMON_OPTIONS_PRINT_H
#define KVD_DAEMON_OPTIONS_PRINT_H

#include <stdio.h>

/* default_config: the file that is read if none is named. */
void options_print_help(FILE *out, const char *default_config);
/* roff list items: the flags of kvd(8) or the keys of kvd.conf(5). */
void options_print_man_flags(FILE *out);
void options_print_man_keys(FILE *out);
void options_print_man_tenant_keys(FILE *out);

#endif
