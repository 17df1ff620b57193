#include "npy.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* What follows 'key': in the header's dictionary. */
static const char *find_value(const char *header, const char *key)
{
    char quoted[32];
    const char *p;

    snprintf(quoted, sizeof(quoted), "'%s':", key);
    p = strstr(header, quoted);
    if (!p)
        return NULL;
    p += strlen(quoted);
    while (*p == ' ')
        p++;
    return p;
}

static const char *parse_shape(const char *p, struct npy *ret)
{
    if (!p || *p != '(')
        return "its header has no shape";
    p++;
    for (;;) {
        char *end;
        unsigned long long value;

        while (*p == ' ' || *p == ',')
            p++;
        if (*p == ')')
            return NULL;
        value = strtoull(p, &end, 10);
        if (end == p || *p == '-' || value > UINT32_MAX)
            return "its shape cannot be read";
        if (ret->n_dims == NPY_DIMS_MAX)
            return "it has more than 8 dimensions";
        ret->shape[ret->n_dims++] = (size_t)value;
        p = end;
    }
}

static const char *parse_dictionary(const char *header, struct npy *ret)
{
    const char *descr = find_value(header, "descr"), *order = find_value(header, "fortran_order"), *end;

    if (!descr || *descr != '\'' || !(end = strchr(descr + 1, '\'')) || (size_t)(end - descr - 1) >= sizeof(ret->descr))
        return "its header has no simple dtype";
    memcpy(ret->descr, descr + 1, (size_t)(end - descr - 1));
    if (!order || strncmp(order, "False", 5) != 0)
        return "it is in Fortran order; save it with numpy.ascontiguousarray()";
    if (ret->descr[0] == '>')
        return "it is big-endian";
    ret->item_bytes = (size_t)strtoul(ret->descr + (ret->descr[0] ? 2 : 0), NULL, 10);
    if (ret->item_bytes == 0 || ret->item_bytes > 16)
        return "its dtype has no size that is understood";
    return parse_shape(find_value(header, "shape"), ret);
}

const char *npy_parse(const uint8_t *file, size_t n, struct npy *ret)
{
    size_t at, length, want;
    const char *wrong;
    char *header;

    *ret = (struct npy){.n_dims = 0};
    if (n < 12 || memcmp(file, "\x93NUMPY", 6) != 0)
        return "it does not begin as a .npy file";
    if (file[6] == 1) {
        at = 10;
        length = file[8] | (size_t)file[9] << 8;
    } else if (file[6] == 2) {
        at = 12;
        length = file[8] | (size_t)file[9] << 8 | (size_t)file[10] << 16 | (size_t)file[11] << 24;
    } else {
        return "it is of another .npy version than 1 or 2";
    }
    if (length > n - at || length > 1 << 20)
        return "its header is cut";
    header = malloc(length + 1);
    if (!header)
        return "no memory for its header";
    memcpy(header, file + at, length);
    header[length] = '\0';
    wrong = parse_dictionary(header, ret);
    free(header);
    if (wrong)
        return wrong;
    want = ret->item_bytes;
    for (int i = 0; i < ret->n_dims; i++)
        if (__builtin_mul_overflow(want, ret->shape[i], &want))
            return "its shape is larger than memory";
    if (want != n - at - length)
        return "its data is not as long as its shape says";
    ret->data = file + at + length;
    ret->n_bytes = want;
    return NULL;
}

int npy_write_header(FILE *f, const char *descr, const size_t *shape, int n_dims)
{
    char text[512];
    size_t n = (size_t)snprintf(text, sizeof(text), "{'descr': '%s', 'fortran_order': False, 'shape': (", descr), total;
    uint8_t start[10] = "\x93NUMPY\x01";

    for (int i = 0; i < n_dims; i++)
        n += (size_t)snprintf(text + n, sizeof(text) - n, "%zu,%s", shape[i], i + 1 < n_dims ? " " : "");
    n += (size_t)snprintf(text + n, sizeof(text) - n, "), }");
    total = (sizeof(start) + n + 1 + 63) / 64 * 64; /* the data begins at a multiple of 64 */
    start[8] = (uint8_t)(total - sizeof(start));
    start[9] = (uint8_t)((total - sizeof(start)) >> 8);
    if (fwrite(start, 1, sizeof(start), f) != sizeof(start) || fwrite(text, 1, n, f) != n)
        return -1;
    for (size_t i = sizeof(start) + n; i + 1 < total; i++)
        putc(' ', f);
    return putc('\n', f) == EOF ? -1 : 0;
}
