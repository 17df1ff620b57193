/* Values of options by kind. For options*.c and the programs that print the table. */
#ifndef KVD_DAEMON_OPTIONS_VALUE_H
#define KVD_DAEMON_OPTIONS_VALUE_H

#include "daemon/options.h"

/* A number of o's kind and range. Errors: -EINVAL (not of this form), -ERANGE. */
int option_value_parse(const struct option *o, const char *text, uint64_t *ret_value);
/* What o takes, in words. buf holds OPTION_TEXT_MAX bytes. Returns buf. */
char *option_allowed(const struct option *o, char *buf);

/* Adds the names and numbers in text. Errors: -ENOENT, -ERANGE (ret_word says which word), -ENOMEM. */
int id_list_add(struct id_list *list, const struct option *o, const struct id_resolver *ids, const char *text,
                char *ret_word, size_t word_bytes);
void id_list_clear(struct id_list *list);

#endif
