#include "store/slab.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

#define HUGE_BYTES (UINT64_C(2) << 20)

/* Spreads the pages that are about to be reserved over all memory nodes that this process may use. On a machine with one node
 * this changes nothing; a refusal (no permission, no NUMA in the kernel) is no error: the memory is as good, only not spread. */
static void interleave(void *map, uint64_t bytes)
{
    unsigned long nodes[16] = {0};

    if (syscall(SYS_get_mempolicy, NULL, nodes, sizeof(nodes) * 8, NULL, MPOL_F_MEMS_ALLOWED) == 0)
        (void)syscall(SYS_mbind, map, bytes, MPOL_INTERLEAVE, nodes, sizeof(nodes) * 8, 0);
}

static int try_create(const char *name, uint64_t bytes, bool huge, bool numa_interleave, struct slab_memory *ret)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0));
    void *map = MAP_FAILED;
    int r;

    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)bytes) < 0)
        goto fail;
    map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        goto fail;
    if (!huge)
        (void)madvise(map, bytes, MADV_HUGEPAGE); /* a wish: tmpfs may not grant it */
    if (numa_interleave)
        interleave(map, bytes);
    if (fallocate(fd, 0, 0, (off_t)bytes) < 0) /* backing now: an error here, never a SIGBUS later */
        goto fail;
    (void)madvise(map, bytes, MADV_POPULATE_WRITE); /* page tables now, not in the first encoder's way; before Linux 5.14 they are */
    *ret = (struct slab_memory){.fd = fd, .map = map, .bytes = bytes, .huge = huge};
    return 0;
fail:
    r = -errno;
    if (map != MAP_FAILED)
        munmap(map, bytes);
    close(fd);
    return r;
}

int slab_memory_create(const char *name, uint64_t bytes, enum slab_hugepages hugepages, bool numa_interleave,
                       struct slab_memory *ret)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);

    if (bytes == 0 || bytes > (UINT64_C(1) << 47))
        return -EINVAL;
    if (hugepages != SLAB_HUGE_OFF && bytes >= HUGE_BYTES) {
        int r = try_create(name, (bytes + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES, true, numa_interleave, ret);

        if (r == 0 || hugepages == SLAB_HUGE_ON)
            return r;
    }
    return try_create(name, (bytes + page - 1) / page * page, false, numa_interleave, ret);
}

int slab_memory_seal(struct slab_memory *memory)
{
    if (fcntl(memory->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) < 0)
        return -errno;
    return 0;
}

void slab_memory_release(struct slab_memory *memory)
{
    if (memory->map)
        munmap(memory->map, memory->bytes);
    if (memory->map)
        close(memory->fd);
    *memory = (struct slab_memory){.fd = -1};
}
