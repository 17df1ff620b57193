#include "daemon/staging.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

static int refuse(const char *reason, const char **ret_reason)
{
    *ret_reason = reason;
    return -EINVAL;
}

int staging_check(int fd, uint64_t bytes, const char **ret_reason)
{
    int seals = fcntl(fd, F_GET_SEALS);
    struct statfs fs;
    struct stat st;

    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || seals < 0)
        return refuse("the descriptor is no memfd; allowed: a memfd with MFD_ALLOW_SEALING", ret_reason);
    if (!(seals & F_SEAL_SHRINK))
        return refuse("the memfd can still shrink; allowed: sealed with F_SEAL_SHRINK", ret_reason);
    /* Huge pages that a worker punches out again could not be had when the daemon reads there. */
    if (fstatfs(fd, &fs) < 0 || fs.f_type != TMPFS_MAGIC)
        return refuse("the memfd is of another kind; allowed: ordinary pages, not MFD_HUGETLB", ret_reason);
    if (bytes == 0 || bytes % (uint64_t)sysconf(_SC_PAGESIZE))
        return refuse("bytes is not a multiple of the page size above 0", ret_reason);
    if ((uint64_t)st.st_size != bytes)
        return refuse("the memfd's size is not the bytes that the request says", ret_reason);
    return 0;
}

int staging_create(int fd, uint64_t bytes, uint32_t id, uint64_t *total_bytes, struct staging **ret, const char **ret_reason)
{
    int r = staging_check(fd, bytes, ret_reason);
    struct staging *s;
    void *map;

    if (r < 0)
        return r;
    s = malloc(sizeof(*s));
    *ret_reason = "the daemon has no memory for it";
    if (!s)
        return -ENOMEM;
    map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        r = -errno;
        *ret_reason = "the memfd cannot be mapped for reading";
        free(s);
        return r;
    }
    *s = (struct staging){.id = id, .n_refs = 1, .map = map, .bytes = bytes, .total_bytes = total_bytes};
    *total_bytes += bytes;
    *ret = s;
    return 0;
}

int staging_create_own(uint64_t bytes, uint32_t id, uint64_t *total_bytes, struct staging **ret, uint8_t **ret_data)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), size = (bytes / page + 1) * page;
    struct staging *s = malloc(sizeof(*s));
    void *map;

    if (!s)
        return -ENOMEM;
    map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
        free(s);
        return -ENOMEM;
    }
    *s = (struct staging){.id = id, .n_refs = 1, .map = map, .bytes = size, .total_bytes = total_bytes};
    *total_bytes += size;
    *ret = s;
    *ret_data = map;
    return 0;
}

struct staging *staging_ref(struct staging *s)
{
    s->n_refs++;
    return s;
}

struct staging *staging_unref(struct staging *s)
{
    if (s && --s->n_refs == 0) {
        *s->total_bytes -= s->bytes;
        munmap((void *)s->map, s->bytes);
        free(s);
    }
    return NULL;
}
