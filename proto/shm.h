/* Shared memory between the daemon and its workers: layouts.
 *
 * Four kinds of memory, each a memfd sealed against shrinking:
 *
 *   index    one a tenant. The daemon writes, workers map it read-only (F_SEAL_FUTURE_WRITE: a second writable mapping is
 *            refused). header | buckets | entries.
 *   slab     a piece of a tenant's host tier; payloads in slots. The daemon writes, workers map it read-only.
 *   page     one a worker. The worker writes, the daemon reads and believes nothing: header | lease table | hit log | rings.
 *   attend   one or more a worker, its own (as staging is): requests for attention, and where their results go. Both write;
 *            the daemon believes nothing in it.
 *
 * Native byte order: shared memory is rebuilt after a restart, never repaired. Offsets, never pointers. Every field that
 * two processes touch at the same time is atomic; its writer is named beside it. docs/shared-memory.md tells the whole
 * protocol and lists every place where a race can start.
 *
 * Index invariants (asserted by index_assert_valid() in store/index.c):
 *   X1  An entry in use is reachable from exactly one bucket position, within SHM_PROBE_MAX buckets of its home bucket.
 *   X2  bucket.overflow counts the entries whose home this bucket is and that live in a later one; a reader stops probing
 *       as soon as it has read a home bucket whose overflow is 0.
 *   X3  entry.gen is even and at least 2 exactly while the entry is valid; it never returns to an earlier even value, but
 *       for a retirement that is taken back because a lease was found (then nothing else has changed meanwhile).
 *   X4  Between two reads of the same even gen no other field of the entry and no byte of its slot changes.
 *
 * Includes: the C library only. May be included by every folder. */
#ifndef KVD_PROTO_SHM_H
#define KVD_PROTO_SHM_H

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define SHM_INDEX_MAGIC UINT64_C(0x58444e4944564b31) /* "1KVDINDX" */
#define SHM_PAGE_MAGIC UINT64_C(0x4547415044564b31)  /* "1KVDPAGE" */
#define SHM_VERSION 1u

#define SHM_KEY_BYTES 32u
#define SHM_BUCKET_SLOTS 8u
#define SHM_PROBE_MAX 16u        /* buckets looked at for one key; at half load a chain of 3 has not been seen in 10^7 keys */
#define SHM_LOC_UNIT_BYTES 64u   /* slot offsets are multiples of this */
#define SHM_LOC_NONE UINT64_MAX
#define SHM_ENTRIES_MAX (1u << 28)

/* 64 bytes, one cache line. tag 0 = empty. Single writer: the daemon. */
struct shm_bucket {
    _Atomic uint16_t tag[SHM_BUCKET_SLOTS]; /* 15 bits of the hash, lowest bit always 1 */
    _Atomic uint32_t entry[SHM_BUCKET_SLOTS];
    _Atomic uint16_t overflow;
    uint16_t reserved[7];
};
static_assert(sizeof(struct shm_bucket) == 64, "bucket is a cache line");

enum shm_entry_flag {
    SHM_ENTRY_FIRST = 1, /* first block of a chain: coded with the space's codecs for first blocks */
};

/* 64 bytes, one cache line. Single writer: the daemon. Plain fields are stable between two equal even reads of gen. */
struct shm_entry {
    uint8_t key[SHM_KEY_BYTES];
    _Atomic uint32_t gen;
    _Atomic uint32_t crc32c; /* of the payload's bytes */
    _Atomic uint32_t bytes;  /* of the payload */
    _Atomic uint16_t space;  /* id within the tenant, never reused while the index lives */
    _Atomic uint8_t group;
    _Atomic uint8_t flags;
    _Atomic uint64_t host; /* shm_loc or SHM_LOC_NONE */
    _Atomic uint64_t dev;  /* the same for a device slab */
};
static_assert(sizeof(struct shm_entry) == 64, "entry is a cache line");
static_assert(offsetof(struct shm_entry, gen) == 32 && offsetof(struct shm_entry, host) == 48, "entry layout");

/* Location: slab number in the top 16 bits, offset / SHM_LOC_UNIT_BYTES below. */
static inline uint64_t shm_loc(uint32_t slab, uint64_t off)
{
    return (uint64_t)slab << 48 | off / SHM_LOC_UNIT_BYTES;
}
static inline uint32_t shm_loc_slab(uint64_t loc)
{
    return (uint32_t)(loc >> 48);
}
static inline uint64_t shm_loc_off(uint64_t loc)
{
    return (loc & ((UINT64_C(1) << 48) - 1)) * SHM_LOC_UNIT_BYTES;
}

enum shm_index_state { SHM_INDEX_SERVING = 1, SHM_INDEX_CLOSED = 2 };

/* 4096 bytes. alive is a robust process-shared mutex that the daemon's main thread holds: when the daemon ends in any way
 * the kernel sets FUTEX_OWNER_DIED in its first word, so that a worker sees it by a load (shm_index_alive()). */
struct shm_index_header {
    uint64_t magic;
    uint32_t version;
    uint32_t header_bytes;
    uint64_t flags_compat;   /* bits that a reader may ignore; zero today */
    uint64_t flags_incompat; /* bits that a reader must know; zero today */
    uint64_t epoch;          /* random, differs from daemon start to daemon start */
    uint64_t seed;           /* of the hash */
    uint32_t n_buckets;      /* power of two */
    uint32_t n_entries;
    uint64_t buckets_off;
    uint64_t entries_off;
    uint64_t total_bytes;
    _Atomic uint32_t state;  /* enum shm_index_state */
    _Atomic uint32_t n_used; /* entries in use */
    _Atomic uint32_t retired_slabs; /* grows when a slab has gone: a worker then asks which (and unmaps) */
    uint32_t reserved0;
    uint8_t pad0[128 - 96];
    /* Non-zero while a thread of the daemon looks at the submission rings by itself; a worker that sees 0 after it has submitted
     * (and a full fence) rings its bell. On a line of its own: the daemon's attention threads write it, the rest is the loop's. */
    _Atomic uint32_t attend_awake;
    uint8_t pad2[256 - 132];
    pthread_mutex_t alive; /* at 256 */
    uint8_t pad1[4096 - 256 - sizeof(pthread_mutex_t)];
};
static_assert(sizeof(struct shm_index_header) == 4096, "index header is a page");
static_assert(offsetof(struct shm_index_header, alive) == 256, "alive word");
static_assert(offsetof(struct shm_index_header, attend_awake) == 128, "a line of its own");

#define SHM_FUTEX_OWNER_DIED 0x40000000u /* FUTEX_OWNER_DIED of linux/futex.h */
#define SHM_FUTEX_TID_MASK 0x3fffffffu   /* FUTEX_TID_MASK */

/* True while the daemon that made this index lives. No system call. */
static inline int shm_index_alive(const struct shm_index_header *h)
{
    uint32_t w = atomic_load_explicit((const _Atomic uint32_t *)(const void *)&h->alive, memory_order_relaxed);
    uint32_t state = atomic_load_explicit(&h->state, memory_order_acquire);

    return state == SHM_INDEX_SERVING && !(w & SHM_FUTEX_OWNER_DIED) && (w & SHM_FUTEX_TID_MASK) != 0;
}

/* The worker's page. The daemon fills the header once, before it hands out the descriptor, and never trusts it after. */
struct shm_page_header {
    uint64_t magic;
    uint32_t version;
    uint32_t header_bytes;
    uint64_t flags_compat;
    uint64_t flags_incompat;
    uint64_t worker;       /* id, unique in a daemon's life */
    uint32_t n_leases;     /* words in the lease table */
    uint32_t n_log;        /* words in the hit log, power of two */
    uint64_t leases_off;
    uint64_t log_off;
    uint64_t total_bytes;
    uint64_t rings_off;    /* of struct shm_rings; 0: this daemon has none */
    uint32_t n_ring;       /* entries of each ring, power of two */
    uint8_t pad0[128 - 84];
    _Atomic uint64_t log_head; /* words ever written; the worker writes. Slot = head % n_log; the oldest are lost, not awaited */
    _Atomic uint64_t n_match_blocks;  /* statistics, written by the worker */
    _Atomic uint64_t n_hit_blocks;
    _Atomic uint64_t n_load_blocks;
    _Atomic uint64_t n_load_bytes;
    _Atomic uint64_t n_stale;         /* look-ups lost to an eviction in between */
    _Atomic uint64_t n_corrupt;       /* payloads whose checksum did not match when asked to verify */
    /* The one word that the daemon writes later: non-zero once it has given up this worker (and before it lets go of its
     * leases), so that a worker cut off while the daemon lives sees it without a system call and trusts no lease any more. */
    _Atomic uint32_t revoked;
    uint32_t zero;
    _Atomic uint64_t n_attend;        /* statistics again: attention by the worker itself, calls and packed bytes read */
    _Atomic uint64_t n_attend_bytes;
    uint8_t pad1[4096 - 128 - 80];
};
static_assert(sizeof(struct shm_page_header) == 4096, "page header is a page");
static_assert(offsetof(struct shm_page_header, log_head) == 128 && offsetof(struct shm_page_header, rings_off) == 72, "page header");

/* A word of the lease table or of the hit log: entry number and the generation that was seen. 0 = free. */
static inline uint64_t shm_ref(uint32_t entry, uint32_t gen)
{
    return (uint64_t)entry << 32 | gen;
}
static inline uint32_t shm_ref_entry(uint64_t ref)
{
    return (uint32_t)(ref >> 32);
}
static inline uint32_t shm_ref_gen(uint64_t ref)
{
    return (uint32_t)ref;
}

/* ---- Attention: two rings in the page, requests in attend memory ----
 *
 *   struct shm_rings | submissions n_ring * 64 B | completions n_ring * 64 B
 *
 *   submit_tail   the worker's     entries that it has written, ever (modulo 2^32); slot = number % n_ring
 *   submit_head   the daemon's     entries that it has taken
 *   done_tail     the daemon's     completions that it has written; the word that a sleeping worker waits on (futex)
 *   done_head     the worker's     completions that it has read
 *   sleepers      the worker's     threads of it that sleep on done_tail, or are about to
 *
 * The daemon takes a submission only while (requests taken and not completed) + (completions not read) < n_ring, so that each
 * has a place to be answered in; a worker that does not read its completions is served no more, and that is all. */
struct shm_rings {
    _Atomic uint32_t submit_tail;
    uint8_t pad0[60];
    _Atomic uint32_t submit_head;
    uint8_t pad1[60];
    _Atomic uint32_t done_tail;
    uint8_t pad2[60];
    _Atomic uint32_t done_head;
    _Atomic uint32_t sleepers;
    uint8_t pad3[56];
};
static_assert(sizeof(struct shm_rings) == 256, "a cache line a writer");

#define SHM_RING_MIN 16u
#define SHM_RING_MAX 4096u
#define SHM_ATTEND_ALIGN 64u /* of a request in attend memory, and of each part in it */

/* 64 bytes. The worker writes, before submit_tail. */
struct shm_submission {
    uint64_t ticket;  /* the worker's name for it; comes back in the completion */
    uint64_t off;     /* of its struct shm_request in the memory, a multiple of SHM_ATTEND_ALIGN */
    uint64_t bytes;   /* of the request and all its parts */
    uint32_t memory;  /* number that ATTEND_ADD gave */
    uint8_t reserved[36]; /* zero */
};
static_assert(sizeof(struct shm_submission) == 64, "submission is a cache line");

/* 64 bytes. The daemon writes, before done_tail. */
struct shm_completion {
    uint64_t ticket;
    uint32_t reason;      /* enum ring_reason (ring.h); 0: the results are there */
    uint32_t n_together;  /* requests that were computed as one with it, itself included */
    uint64_t given;       /* with a reason: what was given, and what would have been allowed */
    uint64_t allowed;
    uint32_t waited_usec; /* from being taken to the first of its blocks being read */
    uint32_t took_usec;   /* from there to here */
    uint8_t reserved[24];
};
static_assert(sizeof(struct shm_completion) == 64, "completion is a cache line");

enum shm_request_flag {
    SHM_REQUEST_MASS = 1, /* block masses are wanted */
};

/* 128 bytes, at the beginning of a request. Offsets of parts count from here, each a multiple of SHM_ATTEND_ALIGN. Rows are query
 * tokens by heads, a KV head's after another's: row (kv * n_tokens + t) * ratio + g is head kv * ratio + g of query token t,
 * ratio = n_heads / the layer's n_kv_heads.
 *
 *   positions  uint32_t [n_tokens]              of the query tokens in the sequence
 *   refs       uint64_t [n_refs]                shm_ref() of the blocks in order, under lease of the worker; 0: left out, for no query sees it
 *   q          dtype    [n_rows][dim_k]
 *   o          float    [n_rows][dim_o]         out
 *   lse        float    [n_rows]                out
 *   mass       float    [n_refs]                out, with SHM_REQUEST_MASS */
struct shm_request {
    uint32_t header_bytes; /* 128 */
    uint32_t flags;        /* enum shm_request_flag */
    uint32_t space, layer;
    uint32_t n_heads, n_tokens, n_refs;
    uint32_t dtype;        /* of q: enum codec_dtype */
    uint32_t dim_o;        /* the layer's dim_v; without one: a multiple of 16 up to dim_k */
    uint32_t first_pos;    /* of the first token of refs[0] */
    uint32_t window;       /* tokens; 0: none */
    uint32_t sink_tokens;
    float scale, softcap;
    uint64_t deadline_usec; /* CLOCK_MONOTONIC; 0: none */
    uint64_t positions_off, refs_off, q_off, o_off, lse_off, mass_off;
    /* Non-zero: the worker has lost interest. Looked at when the request's turn comes and before each piece of its work; the
     * completion comes in any case. */
    _Atomic uint32_t cancelled;
    uint8_t reserved[12];
};
static_assert(sizeof(struct shm_request) == 128 && offsetof(struct shm_request, deadline_usec) == 56, "request header");

#endif
