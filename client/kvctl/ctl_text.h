/* Text in and out: sizes, times, keys, JSON. */
#ifndef KVD_CTL_TEXT_H
#define KVD_CTL_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* "1.5G", "64K", "123". False: not a size. */
bool text_parse_bytes(const char *text, uint64_t *ret);
/* "90s", "5min", "1.5h", "2d", "250ms"; a bare number is seconds. */
bool text_parse_usec(const char *text, uint64_t *ret);
bool text_parse_u64(const char *text, uint64_t *ret);
/* Hex digits, an even number of them, at most 64. */
bool text_parse_key(const char *text, uint8_t ret_key[32], size_t *ret_n);

/* In buf (24 bytes are enough); returns buf. */
char *text_bytes(uint64_t bytes, char *buf);
char *text_usec(uint64_t usec, char *buf);
/* n bytes as 2n hex digits. */
char *text_key(const uint8_t *key, size_t n, char *buf);

/* "name": "value" and the like, each with a comma before it unless first. */
void json_text(FILE *out, bool first, const char *name, const char *value);
void json_u64(FILE *out, bool first, const char *name, uint64_t value);
void json_double(FILE *out, bool first, const char *name, double value);
void json_bool(FILE *out, bool first, const char *name, bool value);
void json_key(FILE *out, bool first, const char *name, const uint8_t *key);

#endif
