#include "daemon/fault.h"

#ifdef KVD_FAULT_POINTS

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

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

/* ---- what the linker puts in the place of the C library's functions ---- */

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
int __real_memfd_create(const char *name, unsigned flags);
int __real_fallocate(int fd, int mode, off_t off, off_t len);
void *__real_mmap(void *addr, size_t n, int prot, int flags, int fd, off_t off);
ssize_t __real_sendmsg(int fd, const struct msghdr *msg, int flags);

void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
int __wrap_memfd_create(const char *name, unsigned flags);
int __wrap_fallocate(int fd, int mode, off_t off, off_t len);
void *__wrap_mmap(void *addr, size_t n, int prot, int flags, int fd, off_t off);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags);

static bool fails(const char *name, int error)
{
    if (!fault_due(name))
        return false;
    errno = error;
    return true;
}

void *__wrap_malloc(size_t n)
{
    return fails("malloc", ENOMEM) ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fails("calloc", ENOMEM) ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails("realloc", ENOMEM) ? NULL : __real_realloc(p, n);
}

int __wrap_memfd_create(const char *name, unsigned flags)
{
    return fails("memfd_create", ENOMEM) ? -1 : __real_memfd_create(name, flags);
}

int __wrap_fallocate(int fd, int mode, off_t off, off_t len)
{
    return fails("fallocate", ENOSPC) ? -1 : __real_fallocate(fd, mode, off, len);
}

void *__wrap_mmap(void *addr, size_t n, int prot, int flags, int fd, off_t off)
{
    return fails("mmap", ENOMEM) ? MAP_FAILED : __real_mmap(addr, n, prot, flags, fd, off);
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags)
{
    return fails("sendmsg", ENOBUFS) ? -1 : __real_sendmsg(fd, msg, flags);
}

#else

/* ISO C wants a file to hold something. */
typedef int fault_points_are_not_compiled_in;

#endif
