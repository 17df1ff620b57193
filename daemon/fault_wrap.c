/* The C library's functions as kvd calls them in a build with fault points: linked with --wrap, into the program alone. */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "daemon/fault.h"

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
