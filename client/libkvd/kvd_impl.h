/* The objects behind kvd.h, shared by the files of libkvd.
 *
 * Locks, in the order in which they are taken; none is held while a match, a lease or a release runs:
 *   session.attach_lock   one thread attaches again, opens spaces in the new life
 *   session.list_lock     lists of spaces and prefixes
 *   staging.lock          pool of staging chunks (never held over a request)
 *   life.ring_lock        making the ring of attention
 *   ring.grow_lock        more memory for it (held over a request)
 *   ring.lock             its slots, submissions, completions
 *   life.slab_lock        mapping slabs
 *   mux.lock              pending calls */
#ifndef KVD_IMPL_H
#define KVD_IMPL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/attn/attn.h"
#include "kernels/codec/payload.h"
#include "kernels/crc32c.h"
#include "kvd.h"
#include "kvd_error.h"
#include "kvd_life.h"
#include "kvd_staging.h"
#include "proto/key.h"

enum { GROUPS_MAX = 16, LAYERS_MAX = 1024, BLOCK_TOKENS_MAX = 4096, TEXT_MAX = 255 };

#define SESSION_MAGIC 0x6b766431u

struct kvd {
    uint32_t magic;
    uint64_t cookie;
    const uint32_t *wiped; /* a page that fork() clears in the child: 1 here, 0 there */

    char *socket_path;
    char name[64];
    uint32_t timeout_msec;
    uint32_t reattach_msec;
    bool admin_only;

    _Atomic(struct life *) life; /* the current one; only replaced by attach_lock */
    pthread_mutex_t attach_lock;
    struct life *lives;             /* by attach_lock: all there were */
    uint32_t last_serial;           /* by attach_lock */
    _Atomic uint64_t retry_at_msec; /* no try to attach again before */
    uint32_t n_failed;              /* by attach_lock: tries in a row */
    _Atomic uint64_t n_reattached;

    pthread_mutex_t list_lock;
    struct kvd_space *spaces;
    struct kvd_prefix *prefixes;

    struct staging staging;

    const struct codec_ops *codecs;
    const struct attn_ops *attn;
    crc32c_fn crc32c;

    enum kvd_attend_form attend_form; /* that the environment asks for; KVD_ATTEND_AUTO: none */
    double nsec_per_tick;             /* of attend_ticks() */
};

struct space_group {
    uint32_t window_tokens;
    uint32_t window_blocks; /* ceil(window / block); 0 for full attention */
    struct payload_layout *plain, *first;
    uint64_t raw_elements; /* numbers of K and V in one block */
    uint32_t n_layers;
};

struct kvd_space {
    struct kvd *session;
    struct kvd_space *prev, *next;
    uint8_t fingerprint[KVD_KEY_BYTES];
    _Atomic uint64_t bound; /* life.serial << 32 | the space's id in that life; 0: not open anywhere */
    uint8_t *packed;        /* kvd.v1.Space, for opening it again */
    size_t n_packed;
    uint32_t block_tokens, vocab_tokens, digest_bytes;
    uint32_t n_groups, n_layers;
    uint32_t n_full_groups;
    enum codec_dtype dtype;
    struct space_group group[GROUPS_MAX];
    struct payload_layer *layers;
    uint32_t *layer_group;
    uint32_t *layer_index; /* of the layer among its group's */
    struct attend_rates *rates; /* of attention, for each kind of layer (kvd_attend_cost.h) */
    uint32_t *layer_rates;      /* which of them a layer has */
};

/* Leased blocks of one group: a run [lo, hi). */
struct held {
    size_t lo, hi;
    struct lookup_hit *hits; /* max_blocks; valid in [lo, hi) */
    uint32_t *words;         /* max_blocks; lease words of [lo, hi) */
};

struct prefix_extra {
    size_t block;
    size_t off, n; /* in extra_data */
};

struct kvd_prefix {
    struct kvd_space *space;
    struct kvd_prefix *prev, *next;
    size_t max_blocks;
    struct key_hasher *hasher;

    size_t n_seq;     /* whole blocks of the sequence */
    size_t n_keyed;   /* keys computed: [0, n_keyed) */
    uint8_t *keys;    /* max_blocks * 32 */
    uint32_t *tokens; /* of the blocks without keys yet, at their place in the sequence */

    struct prefix_extra *extras;
    size_t n_extras, extras_room, extra_at; /* extra_at: first that belongs to a block >= n_keyed */
    uint8_t *extra_data;
    size_t extra_data_room;

    struct life *life; /* that the leases are in; a reference. NULL: none */
    uint16_t id;       /* the space's in that life */
    size_t n_matched;
    struct held held[GROUPS_MAX];

    struct attend_job *attend; /* memory of the local form of attention; NULL: not used yet */
};

/* ---- Session ---- */

static inline bool session_forked(const struct kvd *session)
{
    return *(const volatile uint32_t *)session->wiped == 0;
}
int session_error_forked(const struct kvd *session);

/* A match that must attach again or open its space again waits for the daemon at most this long, in all: one that is
 * alive answers in well under a millisecond, and with one that hangs a miss is better than a scheduler that stands
 * still. */
#define MATCH_WAIT_MSEC 25u

/* A reference to the current life if it is alive. wait: attach again now if it is dead (a blocking call; KVD_E_GONE
 * while the time between tries is not over); else only when no other thread does and the time has come. On success
 * the caller owes life_unref(). */
int session_life(struct kvd *session, bool wait, struct life **ret_life);

/* The time has come for another try of what failed (attaching, opening a space in a new life); takes the turn. */
bool session_may_try(struct kvd *session);

/* One request of a session in a life that is taken and given back. */
int session_request(struct kvd *session, uint16_t type, const void *body, size_t n, uint32_t timeout_msec,
                    struct mux_reply *ret_reply);

/* ---- Spaces ---- */

/* The space's id in this life; false: it is not open there. No system call. */
static inline bool space_id(const struct kvd_space *space, const struct life *life, uint16_t *ret_id)
{
    uint64_t bound = atomic_load_explicit(&space->bound, memory_order_acquire);

    *ret_id = (uint16_t)bound;
    return (uint32_t)(bound >> 32) == life->serial;
}
/* Opens it in this life unless it is open there. KVD_E_TIMEOUT after timeout_msec. */
int space_bind(struct kvd_space *space, struct life *life, uint32_t timeout_msec);
void space_free(struct kvd_space *space);

static inline const struct payload_layout *space_layout_of(const struct kvd_space *space, uint32_t group, bool first)
{
    return first ? space->group[group].first : space->group[group].plain;
}

/* ---- Prefixes ---- */

void prefix_drop_leases(struct kvd_prefix *prefix);
void prefix_free(struct kvd_prefix *prefix);
/* Computes the keys up to n. KVD_E_INTERNAL. */
int prefix_key_to(struct kvd_prefix *prefix, size_t n);
/* What was given as extra of a block, or NULL with *ret_n 0. */
const uint8_t *prefix_extra_of(const struct kvd_prefix *prefix, size_t block, size_t *ret_n);

static inline bool prefix_holds(const struct kvd_prefix *prefix, uint32_t group, size_t block)
{
    return block >= prefix->held[group].lo && block < prefix->held[group].hi;
}
/* Address of a leased block's payload, its size checked against the space. */
int prefix_payload(const struct kvd_prefix *prefix, size_t block, uint32_t group, const void **ret);

/* ---- Numbers ---- */

enum codec_dtype dtype_of(enum kvd_dtype dtype); /* 0: none of the enum */

#endif
