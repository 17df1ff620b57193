#include "kvd_error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define NOTES 4

/* One thread's last errors, the oldest is overwritten. */
struct notes {
    struct {
        uint64_t cookie;
        uint32_t age;
        int used;
        char text[ERROR_BYTES];
    } note[NOTES];
    uint32_t clock;
};

static _Thread_local struct notes notes;

static int find(uint64_t cookie)
{
    for (int i = 0; i < NOTES; i++)
        if (notes.note[i].used && notes.note[i].cookie == cookie)
            return i;
    return -1;
}

static int find_or_take(uint64_t cookie)
{
    int oldest = 0, i = find(cookie);

    if (i >= 0)
        return i;
    for (i = 0; i < NOTES; i++) {
        if (!notes.note[i].used) {
            oldest = i;
            break;
        }
        if (notes.clock - notes.note[i].age > notes.clock - notes.note[oldest].age)
            oldest = i;
    }
    notes.note[oldest].used = 1;
    notes.note[oldest].cookie = cookie;
    return oldest;
}

int error_set(uint64_t cookie, int error, const char *format, ...)
{
    int i = find_or_take(cookie);
    va_list ap;

    notes.note[i].age = ++notes.clock;
    va_start(ap, format);
    vsnprintf(notes.note[i].text, ERROR_BYTES, format, ap);
    va_end(ap);
    return error;
}

const char *error_get(uint64_t cookie)
{
    int i = find(cookie);

    return i < 0 ? "" : notes.note[i].text;
}

void error_keep(uint64_t cookie, char ret_text[ERROR_BYTES])
{
    snprintf(ret_text, ERROR_BYTES, "%s", error_get(cookie));
}

void error_move(uint64_t from, uint64_t to)
{
    int i = find(from);

    if (i >= 0 && from != to)
        error_set(to, 0, "%s", notes.note[i].text);
}

const char *kvd_strerror(int error)
{
    static const char *const text[] = {
        [KVD_OK] = "no error",
        [KVD_E_NOMEM] = "out of memory",
        [KVD_E_ARG] = "an argument is not allowed",
        [KVD_E_CONNECT] = "no daemon answers at the socket, or it may not be opened",
        [KVD_E_GONE] = "the daemon went away",
        [KVD_E_PROTOCOL] = "the other side speaks another protocol or version",
        [KVD_E_DENIED] = "not allowed for this user",
        [KVD_E_LIMIT] = "over a limit",
        [KVD_E_QUOTA] = "over the quota of the tenant or space",
        [KVD_E_FULL] = "the cache is full and nothing can be evicted",
        [KVD_E_LAYOUT] = "a layout or codec that cannot be represented",
        [KVD_E_SPACE] = "no such space",
        [KVD_E_PARENT] = "the block before is not in the cache",
        [KVD_E_TOKEN] = "a token is out of range, or the number of tokens is wrong",
        [KVD_E_VALUE] = "a number is NaN, infinite or out of the codec's range",
        [KVD_E_STAGING] = "staging memory is short, unsealed or out of bounds",
        [KVD_E_CORRUPT] = "a block's bytes do not match their checksum",
        [KVD_E_TIMEOUT] = "no answer in time",
        [KVD_E_FORKED] = "the session belongs to the parent process",
        [KVD_E_DRAINING] = "the daemon takes nothing new",
        [KVD_E_NOT_FOUND] = "not found",
        [KVD_E_AMBIGUOUS] = "more than one block has a key that begins so",
        [KVD_E_STALE] = "the prefix holds no lease in this life of the daemon",
        [KVD_E_INTERNAL] = "an internal error",
        [KVD_E_OPTION] = "no such option, or a value out of its range",
    };

    if (error < 0 || (size_t)error >= sizeof(text) / sizeof(text[0]) || !text[error])
        return "an unknown error";
    return text[error];
}
