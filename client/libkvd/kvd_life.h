/* What a session has of one life of the daemon: socket, index, page, slabs, free leases. After a restart the session
 * gets a new one; the old one stays mapped for as long as a prefix holds leases in it, so that leased memory stays
 * readable.
 *
 *   refs   1 for being the session's current life, 1 for each prefix with leases, 1 for each call in progress.
 *          At 0 all is unmapped and closed; the struct itself stays until the session is freed (a thread may be about
 *          to look at refs), and may be used for a later life.
 *
 * Slab table: slab number -> mapping, two levels, readable without a lock. A slot is a small seqlock: seq is odd
 * while the slot changes. A slab number may be used again for another slab after it was retired, therefore each slot
 * keeps what header.retired_slabs was before its descriptor was asked for. As long as header.retired_slabs is the
 * same, no slab has gone since, and the mapping is the slab of that number; else the daemon is asked again. Who
 * holds a lease on a block in the slab keeps it from being retired, so nobody reads a mapping that is being
 * replaced.
 *
 * Includes: proto. */
#ifndef KVD_LIFE_H
#define KVD_LIFE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "kvd_lease.h"
#include "kvd_mux.h"
#include "proto/lookup.h"
#include "proto/shm.h"

#define LIFE_SLAB_DIRS     256u
#define LIFE_SLABS_PER_DIR 256u

struct attend_ring;

struct life_slab {
    _Atomic uint32_t seq;
    _Atomic uint32_t retired_seen;
    _Atomic uintptr_t base; /* 0: not mapped */
    _Atomic uint64_t bytes;
    uint64_t inode; /* by slab_lock: tells whether a slab of the same number is the same */
};

struct life {
    _Atomic uint32_t refs;
    _Atomic bool torn; /* nothing is left in it: it may be used again */
    struct life *next; /* all of a session */
    uint32_t serial;   /* which life of the session this is: 1, 2, … */
    uint64_t cookie;
    uint32_t timeout_msec;

    struct mux mux;
    uint64_t worker;
    uint64_t epoch;
    uint64_t staging_max_bytes;
    uint32_t publish_max_blocks;
    bool admin;
    char tenant[64];
    char server[64];

    void *index_map; /* NULL for an admin */
    uint64_t index_bytes;
    struct lookup_view view;

    struct shm_page_header *page;
    uint64_t page_bytes;
    _Atomic uint64_t *leases;
    _Atomic uint64_t *log;
    uint32_t log_mask;
    _Atomic uint64_t log_taken; /* words of the log given to writers */
    struct lease_stack free_leases;

    void *rings; /* struct shm_rings in the page; NULL: this daemon has none */
    uint32_t n_ring;
    pthread_mutex_t ring_lock;          /* making the next */
    _Atomic(struct attend_ring *) ring; /* NULL: not asked for yet */

    pthread_mutex_t slab_lock;
    _Atomic(struct life_slab *) slab_dirs[LIFE_SLAB_DIRS];
    _Atomic uint32_t retired_reaped; /* header.retired_slabs when the table was last looked through */
};

struct life_options {
    const char *socket_path;
    const char *name;
    bool admin_only;
    uint32_t hello_msec;   /* for connecting and for hello */
    uint32_t timeout_msec; /* for the requests that come after */
    uint64_t cookie;
};

/* Connects, says hello, maps and checks. Fills *life (zeroed, or torn) and sets its refs to 1. */
int life_start(struct life *life, const struct life_options *options, uint32_t serial);

/* False: it was at 0. */
bool life_try_ref(struct life *life);
void life_unref(struct life *life);
/* Frees what a forked child has inherited: unmaps and closes, waits for nobody. */
void life_abandon(struct life *life);

/* The daemon lives and counts this session among its workers. No system call. */
static inline bool life_alive(const struct life *life)
{
    if (atomic_load_explicit(&life->mux.dead, memory_order_relaxed) != 0)
        return false;
    return !life->page || (shm_index_alive(life->view.header) &&
                           atomic_load_explicit(&life->page->revoked, memory_order_acquire) == 0);
}
/* Leases in it are kept: the daemon honours them, or is dead and changes nothing any more. No system call. */
static inline bool life_leases_hold(const struct life *life)
{
    return life->page && atomic_load_explicit(&life->page->revoked, memory_order_acquire) == 0;
}

/* Address of n bytes at a location whose block is under lease; maps the slab if need be (a round trip).
 * KVD_E_CORRUPT: outside of the slab. KVD_E_GONE, KVD_E_STALE: it cannot be mapped any more. */
int life_at(struct life *life, uint64_t loc, uint64_t n, const void **ret);
/* Unmaps slabs that the daemon has retired since the last time. Costs a load if there are none. */
void life_reap_slabs(struct life *life);

/* Appends to the hit log. The log is a hint: with several writers a reader may see a word before its writer has
 * stored it, and then finds an older one there. */
void life_log_begin(struct life *life, size_t n, uint64_t *ret_at);
static inline void life_log_put(struct life *life, uint64_t at, uint64_t ref)
{
    atomic_store_explicit(&life->log[at & life->log_mask], ref, memory_order_relaxed);
}
void life_log_end(struct life *life, uint64_t end);

#endif
