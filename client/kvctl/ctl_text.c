#include "ctl_text.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

bool text_parse_u64(const char *text, uint64_t *ret)
{
    char *end;

    if (!isdigit((unsigned char)text[0]))
        return false;
    errno = 0;
    *ret = strtoull(text, &end, 0);
    return errno == 0 && *end == '\0';
}

/* A number and the unit that follows it. */
static bool parse_scaled(const char *text, const char *const *units, const double *scales, size_t n, double otherwise,
                         uint64_t *ret)
{
    char *end;
    double value = strtod(text, &end);

    if (end == text || !(value >= 0) || !(isdigit((unsigned char)text[0]) || text[0] == '.'))
        return false;
    while (*end == ' ')
        end++;
    if (*end) {
        size_t i;

        for (i = 0; i < n && strcmp(end, units[i]) != 0;)
            i++;
        if (i == n)
            return false;
        otherwise = scales[i];
    }
    value *= otherwise;
    if (value >= 0x1p64)
        return false;
    *ret = (uint64_t)value;
    return true;
}

bool text_parse_bytes(const char *text, uint64_t *ret)
{
    static const char *const units[] = {"B", "K", "M", "G", "T", "KiB", "MiB", "GiB", "TiB"};
    static const double scales[] = {1, 0x1p10, 0x1p20, 0x1p30, 0x1p40, 0x1p10, 0x1p20, 0x1p30, 0x1p40};

    return parse_scaled(text, units, scales, 9, 1, ret);
}

bool text_parse_usec(const char *text, uint64_t *ret)
{
    static const char *const units[] = {"us", "ms", "s", "min", "h", "d"};
    static const double scales[] = {1, 1e3, 1e6, 60e6, 3600e6, 86400e6};

    return parse_scaled(text, units, scales, 6, 1e6, ret);
}

bool text_parse_key(const char *text, uint8_t ret_key[32], size_t *ret_n)
{
    size_t n = strlen(text);

    if (n == 0 || n % 2 != 0 || n > 64)
        return false;
    for (size_t i = 0; i < n; i++) {
        int c = tolower((unsigned char)text[i]);
        unsigned digit = (unsigned)(isdigit(c) ? c - '0' : c - 'a' + 10);

        if (!isxdigit(c))
            return false;
        ret_key[i / 2] = (uint8_t)(i % 2 ? ret_key[i / 2] | digit : digit << 4);
    }
    *ret_n = n / 2;
    return true;
}

char *text_bytes(uint64_t bytes, char *buf)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    double value = (double)bytes;
    int unit = 0;

    for (; value >= 1024 && unit < 5; unit++)
        value /= 1024;
    snprintf(buf, 24, unit && value < 100 ? "%.1f %s" : "%.0f %s", value, units[unit]);
    return buf;
}

char *text_usec(uint64_t usec, char *buf)
{
    double s = (double)usec / 1e6;

    if (usec < 1000)
        snprintf(buf, 24, "%" PRIu64 "us", usec);
    else if (s < 1)
        snprintf(buf, 24, "%.0fms", s * 1e3);
    else if (s < 120)
        snprintf(buf, 24, "%.1fs", s);
    else if (s < 7200)
        snprintf(buf, 24, "%.0fmin", s / 60);
    else if (s < 172800)
        snprintf(buf, 24, "%.1fh", s / 3600);
    else
        snprintf(buf, 24, "%.0fd", s / 86400);
    return buf;
}

char *text_key(const uint8_t *key, size_t n, char *buf)
{
    for (size_t i = 0; i < n; i++)
        sprintf(buf + 2 * i, "%02x", key[i]);
    buf[2 * n] = '\0';
    return buf;
}

/* A JSON string with its quotes. */
static void json_string(FILE *out, const char *text)
{
    putc('"', out);
    for (const unsigned char *p = (const unsigned char *)text; *p; p++) {
        if (*p == '"' || *p == '\\')
            fprintf(out, "\\%c", *p);
        else if (*p < 0x20)
            fprintf(out, "\\u%04x", *p);
        else
            putc(*p, out);
    }
    putc('"', out);
}

static void json_name(FILE *out, bool first, const char *name)
{
    if (!first)
        fputs(", ", out);
    json_string(out, name);
    fputs(": ", out);
}

void json_text(FILE *out, bool first, const char *name, const char *value)
{
    json_name(out, first, name);
    json_string(out, value);
}

void json_u64(FILE *out, bool first, const char *name, uint64_t value)
{
    json_name(out, first, name);
    fprintf(out, "%" PRIu64, value);
}

void json_double(FILE *out, bool first, const char *name, double value)
{
    json_name(out, first, name);
    if (isfinite(value))
        fprintf(out, "%.9g", value);
    else
        fputs("null", out);
}

void json_bool(FILE *out, bool first, const char *name, bool value)
{
    json_name(out, first, name);
    fputs(value ? "true" : "false", out);
}

void json_key(FILE *out, bool first, const char *name, const uint8_t *key)
{
    char buf[65];

    json_text(out, first, name, text_key(key, 32, buf));
}
