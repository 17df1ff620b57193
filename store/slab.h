/* Slabs: sealed memfds that hold slots of one size, and the host budget they are charged to.
 *
 * A slab belongs to one tenant for its life (rule I4): it is made, exported whole, and when it has emptied it goes back to the
 * system; it is never handed to another tenant. Its backing is reserved before use (fallocate), so that a full system is an error
 * and not a SIGBUS in some worker. Huge pages (memfd with MFD_HUGETLB) where granted; else ordinary ones with a
 * madvise. Sealed F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL after the daemon has its own mapping.
 *
 * Loop thread only. Includes: proto/shm.h. */
#ifndef KVD_STORE_SLAB_H
#define KVD_STORE_SLAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum slab_hugepages { SLAB_HUGE_AUTO = 0, SLAB_HUGE_ON = 1, SLAB_HUGE_OFF = 2 };

/* Host bytes shared by all tenants. */
struct budget {
    uint64_t limit_bytes;
    uint64_t used_bytes;
    enum slab_hugepages hugepages;
    bool numa_interleave;   /* spread pages over the memory nodes that the process may use */
    uint64_t n_huge_slabs;
    uint64_t n_huge_refused; /* wanted huge pages and did not get them */
    uint64_t n_refused;      /* not made, within the limit: the system had no memory (or hugepages is ON and it had no huge pages) */
};

/* A sealed memfd with the daemon's own writable mapping. */
struct slab_memory {
    int fd;
    void *map;
    uint64_t bytes;
    bool huge;
};

/* Makes one of bytes (rounded up to pages), reserved and zero, NOT yet sealed against future writes (so that more mappings may follow).
 * Errors: -ENOSPC / -ENOMEM (no memory), -errno. */
int slab_memory_create(const char *name, uint64_t bytes, enum slab_hugepages hugepages, bool numa_interleave,
                       struct slab_memory *ret);
/* Seals it: nobody else gets a writable mapping from now on, whatever way the descriptor is reopened. */
int slab_memory_seal(struct slab_memory *memory);
void slab_memory_release(struct slab_memory *memory);

#endif
