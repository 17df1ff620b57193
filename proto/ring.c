#include "ring.h"

#include <stdio.h>

/* One array, so that the numbers' order is the table's. */
static const struct {
    int error;
    const char *text;
} reasons[] = {
#define REASON(name, number, error, text) [number] = {error, text},
    RING_REASONS(REASON)
#undef REASON
};
static_assert(sizeof(reasons) / sizeof(reasons[0]) == RING_REASON_COUNT, "every reason has a number below RING_REASON_COUNT");

int ring_reason_error(uint32_t reason)
{
    return reason < RING_REASON_COUNT ? reasons[reason].error : 23;
}

char *ring_reason_text(uint32_t reason, uint64_t given, uint64_t allowed, char *buf, size_t n)
{
    if (reason >= RING_REASON_COUNT) {
        snprintf(buf, n, "the daemon gave a reason that is not known: %u", reason);
        return buf;
    }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(buf, n, reasons[reason].text, (unsigned long long)given, (unsigned long long)allowed);
#pragma GCC diagnostic pop
    return buf;
}
