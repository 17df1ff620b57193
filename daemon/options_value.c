/* Values of options: text to value, value to text, by kind. */
#include "daemon/options_value.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct unit {
    const char *name;
    uint64_t factor;
};

/* Ascending, so that the last that divides a value is its best. */
static const struct unit byte_units[] = {
    {"", 1}, {"K", 1 << 10}, {"M", 1 << 20}, {"G", 1 << 30}, {"T", UINT64_C(1) << 40}};
static const struct unit time_units[] = {{"us", 1},
                                         {"ms", 1000},
                                         {"s", 1000000},
                                         {"min", 60 * UINT64_C(1000000)},
                                         {"h", 3600 * UINT64_C(1000000)}};
/* Spellings that are taken but not written. */
static const struct unit byte_spellings[] = {{"k", 1 << 10},   {"KiB", 1 << 10}, {"MiB", 1 << 20},
                                             {"GiB", 1 << 30}, {"B", 1},         {"TiB", UINT64_C(1) << 40}};
static const struct unit time_spellings[] = {{"", 1000000}, {"m", 60 * UINT64_C(1000000)}};

#define N_ELEMENTS(a) (sizeof(a) / sizeof((a)[0]))

static const struct unit *find_unit(const struct unit *units, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(units[i].name, name) == 0)
            return &units[i];
    return NULL;
}

/* Digits, then a unit of one of both tables. */
static int parse_scaled(const char *text, const struct unit *a, size_t n_a, const struct unit *b, size_t n_b,
                        uint64_t *ret)
{
    const struct unit *unit;
    uint64_t value;
    char *end;

    if (text[0] < '0' || text[0] > '9') /* strtoull would take a sign */
        return -EINVAL;
    errno = 0;
    value = strtoull(text, &end, 10);
    if (errno)
        return -ERANGE;
    while (*end == ' ')
        end++;
    unit = find_unit(a, n_a, end);
    if (!unit)
        unit = find_unit(b, n_b, end);
    if (!unit)
        return -EINVAL;
    return __builtin_mul_overflow(value, unit->factor, ret) ? -ERANGE : 0;
}

static int parse_octal(const char *text, uint64_t *ret)
{
    uint64_t v = 0;

    if (!*text || strlen(text) > 6)
        return -EINVAL;
    for (; *text; text++) {
        if (*text < '0' || *text > '7')
            return -EINVAL;
        v = v * 8 + (uint64_t)(*text - '0');
    }
    *ret = v;
    return 0;
}

static int parse_bool(const char *text, uint64_t *ret)
{
    static const char *const words[2][4] = {{"no", "off", "false", "0"}, {"yes", "on", "true", "1"}};

    for (unsigned v = 0; v < 2; v++)
        for (size_t i = 0; i < 4; i++)
            if (strcmp(text, words[v][i]) == 0) {
                *ret = v;
                return 0;
            }
    return -EINVAL;
}

static int parse_enum(const char *words, const char *text, uint64_t *ret)
{
    size_t n = strlen(text);
    uint64_t i = 0;

    for (const char *w = words; n > 0; i++) {
        size_t n_w = strcspn(w, "|");

        if (n_w == n && memcmp(w, text, n) == 0) {
            *ret = i;
            return 0;
        }
        if (!w[n_w])
            break;
        w += n_w + 1;
    }
    return -EINVAL;
}

int option_value_parse(const struct option *o, const char *text, uint64_t *ret_value)
{
    uint64_t v = 0;
    int r = -EINVAL;

    switch (o->kind) {
    case OPTION_BYTES:
        r = parse_scaled(text, byte_units, N_ELEMENTS(byte_units), byte_spellings, N_ELEMENTS(byte_spellings), &v);
        break;
    case OPTION_COUNT:
        r = parse_scaled(text, byte_units, 1, NULL, 0, &v);
        break;
    case OPTION_USEC:
        r = parse_scaled(text, time_units, N_ELEMENTS(time_units), time_spellings, N_ELEMENTS(time_spellings), &v);
        break;
    case OPTION_BOOL:
        r = parse_bool(text, &v);
        break;
    case OPTION_MODE:
        r = parse_octal(text, &v);
        break;
    case OPTION_ENUM:
        r = parse_enum(o->unit, text, &v);
        break;
    case OPTION_STRING:
    case OPTION_IDS:
        break;
    }
    if (r < 0)
        return r;
    if (v < o->minimum || v > o->maximum)
        return -ERANGE;
    *ret_value = v;
    return 0;
}

static char *format_scaled(uint64_t value, const struct unit *units, size_t n, char *buf)
{
    size_t best = 0;

    for (size_t i = 1; i < n && value > 0; i++)
        if (value % units[i].factor == 0)
            best = i;
    snprintf(buf, OPTION_TEXT_MAX, "%" PRIu64 "%s", value / units[best].factor, value ? units[best].name : "");
    return buf;
}

char *option_format_value(const struct option *o, uint64_t value, char *buf)
{
    const char *w = o->unit;

    switch (o->kind) {
    case OPTION_BYTES:
        return format_scaled(value, byte_units, N_ELEMENTS(byte_units), buf);
    case OPTION_USEC:
        return format_scaled(value, time_units, N_ELEMENTS(time_units), buf);
    case OPTION_BOOL:
        snprintf(buf, OPTION_TEXT_MAX, "%s", value ? "yes" : "no");
        return buf;
    case OPTION_MODE:
        snprintf(buf, OPTION_TEXT_MAX, "%04" PRIo64, value);
        return buf;
    case OPTION_ENUM:
        for (; value > 0 && strchr(w, '|'); value--)
            w = strchr(w, '|') + 1;
        snprintf(buf, OPTION_TEXT_MAX, "%.*s", (int)strcspn(w, "|"), w);
        return buf;
    case OPTION_COUNT:
    case OPTION_STRING:
    case OPTION_IDS:
        break;
    }
    snprintf(buf, OPTION_TEXT_MAX, "%" PRIu64, value);
    return buf;
}

/* "what is allowed", for messages and manuals. */
char *option_allowed(const struct option *o, char *buf)
{
    char low[OPTION_TEXT_MAX], high[OPTION_TEXT_MAX];

    switch (o->kind) {
    case OPTION_ENUM:
        snprintf(buf, OPTION_TEXT_MAX, "%s", o->unit);
        for (char *p = buf; (p = strchr(p, '|'));)
            *p = ' ';
        break;
    case OPTION_BOOL:
        snprintf(buf, OPTION_TEXT_MAX, "yes, no");
        break;
    case OPTION_STRING:
        snprintf(buf, OPTION_TEXT_MAX, "a text of %" PRIu64 " to %" PRIu64 " bytes (%s)", o->minimum, o->maximum, o->unit);
        break;
    case OPTION_IDS:
        snprintf(buf, OPTION_TEXT_MAX, "names or numbers of %s, separated by commas", o->unit);
        break;
    case OPTION_BYTES:
    case OPTION_COUNT:
    case OPTION_USEC:
    case OPTION_MODE:
        snprintf(buf, OPTION_TEXT_MAX, "%.40s to %.40s%s", option_format_value(o, o->minimum, low),
                 option_format_value(o, o->maximum, high),
                 o->kind == OPTION_BYTES  ? " (K, M, G, T)"
                 : o->kind == OPTION_USEC ? " (us, ms, s, min, h)"
                 : o->kind == OPTION_MODE ? " (octal)"
                                          : "");
        break;
    }
    return buf;
}

static int resolve(const struct option *o, const struct id_resolver *ids, const char *word, uint32_t *ret)
{
    char *end;
    unsigned long v;

    if (word[0] < '0' || word[0] > '9')
        return strcmp(o->unit, "groups") == 0 ? ids->group(ids->ctx, word, ret) : ids->user(ids->ctx, word, ret);
    errno = 0;
    v = strtoul(word, &end, 10);
    if (errno || *end || v >= UINT32_MAX) /* (uid_t)-1 means "no one" to the kernel */
        return -ERANGE;
    *ret = (uint32_t)v;
    return 0;
}

int id_list_add(struct id_list *list, const struct option *o, const struct id_resolver *ids, const char *text,
                char *ret_word, size_t word_bytes)
{
    size_t n_old = list->text ? strlen(list->text) : 0;
    char *joined = malloc(n_old + strlen(text) + 3);

    if (!joined)
        return -ENOMEM;
    sprintf(joined, "%s%s%s", n_old ? list->text : "", n_old && *text ? ", " : "", text);
    free(list->text);
    list->text = joined;
    for (const char *p = text; *(p += strspn(p, ", \t"));) {
        size_t n = strcspn(p, ", \t");
        uint32_t *grown;
        int r;

        snprintf(ret_word, word_bytes, "%.*s", (int)n, p);
        grown = realloc(list->ids, (list->n + 1) * sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        list->ids = grown;
        r = resolve(o, ids, ret_word, &grown[list->n]);
        if (r < 0)
            return r;
        list->n++;
        p += n;
    }
    return 0;
}

void id_list_clear(struct id_list *list)
{
    free(list->text);
    free(list->ids);
    *list = (struct id_list){0};
}
