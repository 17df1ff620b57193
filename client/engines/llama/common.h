/* What every worker of an engine needs beside it. Includes: the C library. */
#ifndef KVD_ENGINES_COMMON_H
#define KVD_ENGINES_COMMON_H

#include <stddef.h>
#include <stdio.h>

/* All of a file, 0-terminated, to be freed with free(); "-": standard input. NULL: errno says why. */
char *common_read_file(const char *path, size_t *ret_n);

/* The file's SHA-256 in hexadecimal, what tells a model from others; ret[65]. Returns 0 or -1, with errno. */
int common_digest_file(const char *path, char *ret);

/* Writes text as a JSON string, bytes that are no UTF-8 replaced. */
void common_print_json(FILE *file, const char *text);

#endif
