#include "daemon/fault.h"

#ifdef KVD_FAULT_POINTS

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FAULTS_MAX = 16 };

/* The one mutable global of the daemon, in test builds only: the C library's own functions have no context to carry it. Written
 * by fault_setup() before there are threads; then only the counts change. */
static struct {
    size_t n;
    struct fault {
        char name[48];
        uint64_t at;
        bool onward;
        _Atomic uint64_t n_met;
    } f[FAULTS_MAX];
} faults;

void fault_setup(void)
{
    const char *p = getenv("KVD_FAULT");

    while (p && *p) {
        struct fault *f = &faults.f[faults.n];
        unsigned long long at;
        int n = 0;

        if (faults.n == FAULTS_MAX || sscanf(p, "%47[a-z_-]:%llu%n", f->name, &at, &n) != 2 || at == 0) {
            fprintf(stderr, "KVD_FAULT: \"%s\": not NAME:N, N >= 1, at most %d of them\n", p, FAULTS_MAX);
            exit(2);
        }
        p += n;
        f->at = at;
        f->onward = *p == '+';
        p += f->onward;
        p += *p == ',';
        faults.n++;
    }
}

bool fault_due(const char *name)
{
    for (size_t i = 0; i < faults.n; i++) {
        struct fault *f = &faults.f[i];
        uint64_t met;

        if (strcmp(f->name, name) != 0)
            continue;
        met = atomic_fetch_add_explicit(&f->n_met, 1, memory_order_relaxed) + 1;
        if (met == f->at || (f->onward && met > f->at))
            return true;
    }
    return false;
}

void fault_point(const char *name)
{
    if (fault_due(name))
        abort();
}

#else

/* ISO C wants a file to hold something. */
typedef int fault_points_are_not_compiled_in;

#endif
