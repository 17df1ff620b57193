/* libkvd: use the host's prefix KV cache from an inference worker.
 *
 * A worker attaches to the daemon over its Unix socket, opens the space of its model, and then matches prefixes in
 * memory that it shares with the daemon: a match, a lease and a release make no system call and never wait. Matched
 * blocks are decoded into the worker's own memory (kvd_load); new blocks are handed over with kvd_publish.
 *
 * Threads: a kvd and what was made from it may be used from any number of threads, except that one kvd_prefix or one
 * kvd_loading is used by one thread at a time where its calls do not say otherwise.
 * fork(): a child may read memory it had mapped, but its calls return KVD_E_FORKED; it attaches anew.
 * A daemon that dies or is restarted: memory under lease stays readable as it was; calls attach again by themselves (at
 * most once per reattach_msec) and until then a match finds nothing and a publish returns KVD_E_GONE.
 * A worker that the daemon cuts off while it lives (it misbehaved or hung) loses its leases: uses of them return
 * KVD_E_STALE.
 * Errors: every int result is 0 or an enum kvd_error; kvd_message() tells the details of this thread's last error.
 *
 * C99 and C++. Formats: docs/codecs.md, docs/protocol.md, docs/shared-memory.md. */
#ifndef KVD_H
#define KVD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#define KVD_VERSION_MAJOR 1 /* of this interface, as in libkvd.so.1 */
#define KVD_KEY_BYTES 32

/* Numbers are fixed for ever. */
enum kvd_error {
    KVD_OK = 0,
    KVD_E_NOMEM = 1,       /* the worker's own memory */
    KVD_E_ARG = 2,         /* an argument that no daemon would take */
    KVD_E_CONNECT = 3,     /* no daemon at the socket, or no permission */
    KVD_E_GONE = 4,        /* the daemon went away; the library attaches again by itself */
    KVD_E_PROTOCOL = 5,    /* version or framing */
    KVD_E_DENIED = 6,      /* the peer's credentials do not allow it */
    KVD_E_LIMIT = 7,       /* over a limit: frames, blocks in flight, leases, staging, spaces, sessions */
    KVD_E_QUOTA = 8,       /* over the tenant's or the space's quota and nothing could be evicted */
    KVD_E_FULL = 9,        /* no room in the tier or in the index, and nothing could be evicted */
    KVD_E_LAYOUT = 10,     /* a space that cannot be represented: sizes, codecs, groups */
    KVD_E_SPACE = 11,      /* no such space */
    KVD_E_PARENT = 12,     /* a block whose parent is not in the cache */
    KVD_E_TOKEN = 13,      /* token out of range or wrong number of tokens */
    KVD_E_VALUE = 14,      /* NaN, infinity or out of the codec's range */
    KVD_E_STAGING = 15,    /* staging memory that is short, unsealed or out of bounds */
    KVD_E_CORRUPT = 16,    /* checksum: the block is dropped, nothing was delivered */
    KVD_E_TIMEOUT = 17,
    KVD_E_FORKED = 18,
    KVD_E_DRAINING = 19,   /* the daemon takes nothing new */
    KVD_E_NOT_FOUND = 20,
    KVD_E_AMBIGUOUS = 21,  /* a key prefix that more than one block has */
    KVD_E_STALE = 22,      /* the prefix was matched in an earlier life of the daemon or released */
    KVD_E_INTERNAL = 23,
    KVD_E_OPTION = 24      /* an unknown option, or a value out of range */
};

/* A constant sentence. Never NULL. */
const char *kvd_strerror(int error);

typedef struct kvd kvd;                 /* an attached session */
typedef struct kvd_space kvd_space;     /* an open space */
typedef struct kvd_prefix kvd_prefix;   /* keys of a token sequence, and leases on its cached part */
typedef struct kvd_loading kvd_loading; /* a load in progress, layer by layer */

/* ---- Attach ---------------------------------------------------------------------------------------------------- */

struct kvd_options {
    size_t size;               /* sizeof(struct kvd_options), set by KVD_OPTIONS_INIT */
    const char *socket_path;   /* NULL: $KVD_SOCKET, else /run/kvd/kvd.sock */
    const char *name;          /* shown by kvctl; NULL: the program's name */
    uint32_t timeout_msec;     /* for a request to be answered; 0: 10000 */
    uint32_t reattach_msec;    /* between two tries to attach again; 0: 200 */
    int admin_only;            /* no memory is mapped; only kvd_admin_* work */
    uint64_t staging_bytes;    /* staging that kvd_publish uses; 0: grows as needed up to the daemon's limit */
};
#define KVD_OPTIONS_INIT {sizeof(struct kvd_options), NULL, NULL, 0, 0, 0, 0}

/* Attaches; on success *ret is to be freed with kvd_detach(). options may be NULL. On failure a kvd_message(NULL)
 * tells more. */
int kvd_attach(const struct kvd_options *options, kvd **ret);

/* Releases everything made from it (prefixes, spaces), unmaps, closes. NULL is allowed. Returns NULL. */
kvd *kvd_detach(kvd *session);

/* Details of the calling thread's last error on session (or of kvd_attach with NULL). Never NULL; valid until this
 * thread's next call. */
const char *kvd_message(const kvd *session);

struct kvd_info {
    size_t size;           /* sizeof(struct kvd_info), set by the caller */
    uint64_t worker;       /* this session's id */
    uint64_t epoch;        /* of the index: differs after a restart of the daemon */
    uint64_t n_reattached;
    char tenant[64];
    char server[64];
    int alive;             /* the daemon lives */
    int admin;
};
int kvd_get_info(kvd *session, struct kvd_info *info);

/* A round trip to the daemon. */
int kvd_ping(kvd *session);

/* ---- Spaces ---------------------------------------------------------------------------------------------------- */

enum kvd_dtype { KVD_F16 = 0, KVD_BF16 = 1, KVD_F32 = 2 };

struct kvd_layer {
    uint32_t n_kv_heads;
    uint32_t dim_k;
    uint32_t dim_v;              /* 0: this layer has no V of its own */
    uint32_t group;              /* which layer group */
    const char *codec_k;         /* NULL: the default ("kc4"); see kvctl codec list */
    const char *codec_v;         /* NULL: the default ("tq4") */
    const char *codec_first_k;   /* for the first block of a chain; NULL: the default ("raw"), "" : as codec_k */
    const char *codec_first_v;
};
struct kvd_group {
    uint32_t window_tokens;      /* 0: full attention; else a sliding window, which needs only its last blocks */
};
struct kvd_space_desc {
    size_t size;                 /* sizeof(struct kvd_space_desc), set by KVD_SPACE_INIT */
    const char *model;           /* required, 1 to 255 bytes */
    const char *revision;        /* "" if there is none. Wrong revision, wrong answers: use a digest of the weights */
    const char *rope;            /* what changes K for equal tokens: base, scaling, … */
    const char *shard;           /* TP/PP rank or "" */
    enum kvd_dtype dtype;        /* that K and V are computed in; raw codecs keep it */
    uint32_t block_tokens;       /* 1 to 4096; 64 is the usual */
    uint32_t vocab_tokens;       /* token ids are below; 0: not checked */
    uint32_t digest_bytes;       /* 0: keys from tokens; 8 to 32: the engine brings digests of this length */
    const struct kvd_group *groups;
    uint32_t n_groups;           /* 1 to 16 */
    const struct kvd_layer *layers;
    uint32_t n_layers;           /* 1 to 1024 */
};
#define KVD_SPACE_INIT {sizeof(struct kvd_space_desc), NULL, "", "", "", KVD_F16, 64, 0, 0, NULL, 0, NULL, 0}

/* Opens (and makes, if need be) the space; desc is copied. Two descriptions that differ in anything are two spaces. */
int kvd_space_open(kvd *session, const struct kvd_space_desc *desc, kvd_space **ret);
kvd_space *kvd_space_close(kvd_space *space);

/* The fingerprint, 32 bytes: parent of every first block. Valid while the space is open. */
const uint8_t *kvd_space_fingerprint(const kvd_space *space);
/* Encoded bytes of one block of a group. */
uint64_t kvd_space_block_bytes(const kvd_space *space, uint32_t group, int first);

/* ---- Match and lease: no system call, no lock, no waiting ------------------------------------------------------ */

/* A reusable object for sequences of up to max_blocks blocks (keys and leases are stored in it: allocate once, match
 * often). */
int kvd_prefix_create(kvd_space *space, size_t max_blocks, kvd_prefix **ret);
/* Releases its leases and frees it. NULL is allowed. Returns NULL. */
kvd_prefix *kvd_prefix_destroy(kvd_prefix *prefix);

/* What else the content of a block depends on (LoRA name, image digest, salt): part of the key of the block `block`
 * of the sequence. An array, ascending by block; at most one for a block; at most 4096 bytes. */
struct kvd_extra {
    size_t block;
    const void *data;
    size_t n;
};

/* Finds the longest prefix of tokens[n_tokens] whose blocks every layer group has what it needs of, and leases it:
 * until kvd_release() (or the next match with the same object) its memory is neither moved nor reused. Full groups
 * hold all its blocks, sliding groups the last ceil(window / block). Only whole blocks match; ret_tokens (may be
 * NULL) is a multiple of block_tokens. Never an error for a miss: then *ret_tokens is 0. Errors: KVD_E_ARG,
 * KVD_E_TOKEN, KVD_E_LIMIT (sequence longer than max_blocks: nothing is matched), KVD_E_FORKED. When leases run out
 * the match is shorter. */
int kvd_match(kvd_prefix *prefix, const uint32_t *tokens, size_t n_tokens, const struct kvd_extra *extras,
              size_t n_extras, size_t *ret_tokens);
/* The same for n digests of digest_bytes each, contiguous. */
int kvd_match_digests(kvd_prefix *prefix, const uint8_t *digests, size_t n, size_t *ret_blocks);

/* Drops the leases; keys stay. */
void kvd_release(kvd_prefix *prefix);

/* Shortens the lease to the first n_blocks blocks that were matched (an engine that must recompute some tokens).
 * Returns the longest n <= n_blocks at which every group has what it needs, which is what is kept. */
size_t kvd_prefix_trim(kvd_prefix *prefix, size_t n_blocks);

size_t kvd_prefix_blocks(const kvd_prefix *prefix);  /* matched and leased */
/* Key of block i of the sequence, computed when needed. NULL if i is no whole block of it. */
const uint8_t *kvd_prefix_key(kvd_prefix *prefix, size_t i);

/* A leased block's encoded bytes, read-only, valid while leased. The first use of memory that this process has not
 * mapped yet is a round trip to the daemon; so is one use of each piece after the daemon has given memory back to
 * the system. Errors: KVD_E_NOT_FOUND (not leased: outside of a sliding window, or not matched), KVD_E_STALE (the
 * lease is lost), KVD_E_CORRUPT (the index contradicts the space), and, if memory is to be mapped, KVD_E_GONE,
 * KVD_E_TIMEOUT, KVD_E_NOMEM. Layout of the bytes: docs/codecs.md. */
struct kvd_block {
    const void *payload;
    size_t bytes;
    uint32_t crc32c;
    int first;   /* coded with the codecs for first blocks */
};
int kvd_prefix_block(const kvd_prefix *prefix, size_t i, uint32_t group, struct kvd_block *ret);

/* ---- Load: decode leased blocks into the worker's own memory --------------------------------------------------- */

/* Where K and V of one layer are, for the tokens of the call's range: element (token t, head h, channel c) of K is
 * at k + t * k_token_stride + h * k_head_stride + c * sizeof(dtype); t counts from the range's first token. Strides
 * in bytes. v is ignored where dim_v is 0. k == NULL: leave this layer out (load only). */
struct kvd_kv {
    void *k;
    void *v;
    size_t k_token_stride, k_head_stride;
    size_t v_token_stride, v_head_stride;
};

enum kvd_load_flag {
    KVD_LOAD_VERIFY = 1 /* check the CRC of each block before it is decoded; a bad block gives KVD_E_CORRUPT */
};

/* Decodes blocks [first_block, first_block + n_blocks) of a matched prefix; layers: one struct a layer of the space.
 * Blocks that a sliding group does not hold are skipped: its layers get only what is leased (ask kvd_prefix_block).
 * Runs on the calling thread. dtype: of the destination, any. Maps memory as kvd_prefix_block() does. On an error
 * what was written means nothing. Errors: KVD_E_ARG, KVD_E_STALE (not leased, or no more), KVD_E_CORRUPT, those of
 * kvd_prefix_block(). */
int kvd_load(kvd_prefix *prefix, size_t first_block, size_t n_blocks, enum kvd_dtype dtype, const struct kvd_kv *layers,
             uint32_t flags);

/* The same layer by layer, so that compute overlaps: begin once, then any number of threads call kvd_load_work(),
 * each call decodes one more layer and marks it complete; other threads await the layers they need. The prefix must
 * stay leased. */
int kvd_load_begin(kvd_prefix *prefix, size_t first_block, size_t n_blocks, enum kvd_dtype dtype,
                   const struct kvd_kv *layers, uint32_t flags, kvd_loading **ret);
/* Decodes the next layer. Returns KVD_OK, or KVD_E_NOT_FOUND when every layer has been taken, or the error of this
 * layer. */
int kvd_load_work(kvd_loading *loading);
/* Waits until layer is complete (spins, then sleeps). timeout_msec < 0: for ever. KVD_OK, the layer's error, or
 * KVD_E_TIMEOUT. */
int kvd_load_wait(kvd_loading *loading, uint32_t layer, int timeout_msec);
/* True when layer is complete; no waiting. */
int kvd_load_done(const kvd_loading *loading, uint32_t layer);
kvd_loading *kvd_load_end(kvd_loading *loading);

/* ---- Attention over leased blocks, without fetching them ------------------------------------------------------- */

/* One layer's attention of some query tokens over a run of a matched prefix's blocks: a partial result, to be merged
 * with the attention over the worker's own tail (kvd_attend_merge). For each query token and head, over the tokens t of
 * the blocks that it sees (position not after its own; within the window, or among the first sink_tokens):
 *   s[t] = scale * dot(q, K[t]), or softcap * tanh(that / softcap);  lse = log(sum exp(s[t]));
 *   o = sum exp(s[t] - lse) * V[t]. Nothing seen: lse -infinity, o zero.
 * Head h reads KV head h / (n_heads / n_kv_heads). Token i of block b of the prefix has position
 * b * block_tokens + i. */
struct kvd_attention {
    size_t size;                 /* sizeof(struct kvd_attention), set by KVD_ATTENTION_INIT */
    uint32_t layer;
    uint32_t n_heads;            /* query heads: a multiple of the layer's n_kv_heads */
    uint32_t n_tokens;           /* query tokens, at least 1 */
    enum kvd_dtype dtype;        /* of q */
    const void *q;               /* [n_tokens][n_heads][dim_k], with these strides in bytes (0: contiguous) */
    size_t q_token_stride, q_head_stride;
    const uint32_t *positions;   /* [n_tokens]; NULL: first_position, first_position + 1, … */
    uint32_t first_position;
    float scale;                 /* often 1 / sqrt(dim_k) */
    float softcap;               /* 0: none */
    uint32_t window_tokens;      /* 0: that of the layer's group (none, if it has full attention) */
    uint32_t sink_tokens;        /* first tokens of the sequence that every query sees; with full attention */
    size_t first_block, n_blocks;
    float *o;                    /* out: [n_tokens][n_heads][dim_v], with these strides in bytes (0: contiguous) */
    size_t o_token_stride, o_head_stride;
    float *lse;                  /* out: [n_tokens][n_heads], contiguous */
    float *mass;                 /* out, or NULL: [n_blocks], share of all the attention of this call that went to each
                                    block: sums to 1 where anything was seen */
    uint32_t dim_o;              /* layers without V (dim_v 0): the first dim_o channels of K are the values, a
                                    multiple of 16; else 0 */
};
#define KVD_ATTENTION_INIT {sizeof(struct kvd_attention), 0, 0, 1, KVD_F32, NULL, 0, 0, NULL, 0, 0, 0, 0, 0, 0, 0, \
                            NULL, 0, 0, NULL, NULL, 0}

/* Where it is computed. */
enum kvd_attend_form {
    KVD_ATTEND_AUTO = 0,   /* what is cheapest of the next two; local if the daemon cannot be asked */
    KVD_ATTEND_LOCAL = 1,  /* here, on the calling thread, over the mapped blocks: no system call */
    KVD_ATTEND_DAEMON = 2, /* by the daemon, which runs requests of all workers over the same blocks as one */
    KVD_ATTEND_LOAD = 3    /* (of kvd_attend_choose only) kvd_load once and attend over one's own pages */
};

/* Computes it. The prefix stays leased meanwhile. Errors: KVD_E_ARG (shapes, sizes, a query or scale that is not
 * finite, a layer that is none; blocks of a window that the lease does not hold: kvd_message() says which),
 * KVD_E_STALE, KVD_E_VALUE (scores beyond fp32: a query or the scale is too large), KVD_E_NOMEM, and of the daemon form
 * KVD_E_GONE, KVD_E_TIMEOUT, KVD_E_LIMIT (its queue is full, or the request too large). On an error o, lse and mass mean
 * nothing. */
int kvd_attend(kvd_prefix *prefix, const struct kvd_attention *attention, enum kvd_attend_form form);

/* Local, on several threads of the caller. An object is reusable, one attention at a time: begin, then any number of
 * threads call kvd_attend_work() until it returns KVD_E_NOT_FOUND (nothing left to take); kvd_attend_wait() returns
 * when all parts have been computed and merged. */
typedef struct kvd_attending kvd_attending;
int kvd_attending_create(kvd_space *space, kvd_attending **ret);
/* No thread may be in a call with it. NULL is allowed. Returns NULL. */
kvd_attending *kvd_attending_destroy(kvd_attending *attending);
/* Checks and copies the queries. n_parts: as many as threads that will work, up to 1024; 0: 1. The prefix is of the
 * attending's space and is left alone until kvd_attend_wait() has returned. Errors: those of kvd_attend(); KVD_E_ARG
 * also if what was begun before is not complete. */
int kvd_attend_begin(kvd_attending *attending, kvd_prefix *prefix, const struct kvd_attention *attention,
                     uint32_t n_parts);
/* Computes one more part on the calling thread. KVD_OK, or KVD_E_NOT_FOUND: nothing is left to take, or n_parts threads
 * are at it already. A thread that comes too late, or while the next attention is being begun, is told the same. */
int kvd_attend_work(kvd_attending *attending);
/* Waits until all is complete (spins, then sleeps; computes nothing itself). timeout_msec < 0: for ever. KVD_OK, the
 * errors of kvd_attend(), or KVD_E_TIMEOUT. */
int kvd_attend_wait(kvd_attending *attending, int timeout_msec);

/* By the daemon, without waiting: submit copies the queries; collect waits for the result and writes it to o, lse and
 * mass as they were given at submit (they must live until then). A ticket is used up by collect (but for
 * KVD_E_TIMEOUT) and by cancel. timeout_usec of submit: the daemon gives up after it; 0: the session's timeout. */
int kvd_attend_submit(kvd_prefix *prefix, const struct kvd_attention *attention, uint64_t timeout_usec,
                      uint64_t *ret_ticket);
int kvd_attend_collect(kvd_prefix *prefix, uint64_t ticket, int timeout_msec);
void kvd_attend_cancel(kvd_prefix *prefix, uint64_t ticket);

/* What each form would cost, in microseconds, for n_steps such calls over the same blocks (a generation of so many
 * tokens), by a model that measures itself (docs/attention.md). */
struct kvd_attend_costs {
    size_t size;                 /* set by the caller */
    enum kvd_attend_form form;   /* the cheapest */
    double local_usec, daemon_usec, load_usec;
};
int kvd_attend_choose(kvd_prefix *prefix, const struct kvd_attention *attention, uint64_t n_steps,
                      struct kvd_attend_costs *ret);

/* Merges a partial result into another over disjoint tokens: o[dim] and *lse become those of both. A learned sink is a
 * partial with o zero (other_o NULL) and other_lse its logit. */
void kvd_attend_merge(float *o, float *lse, const float *other_o, float other_lse, size_t dim);

/* ---- Publish --------------------------------------------------------------------------------------------------- */

enum kvd_publish_status { KVD_PUBLISHED = 0, KVD_PRESENT = 1, KVD_FAILED = 2 };

/* Hands over K and V of blocks [first_block, first_block + n_blocks) of the sequence that prefix was last matched
 * with (tokens and extras as given to kvd_match; they are remembered by their keys and, for the daemon to check,
 * tokens are passed again: all of the sequence). tokens may go on after the end of what was matched, up to
 * max_blocks: what a model has generated. layers: as for load, for the range's tokens, in dtype. groups: bit g =
 * group g (a sliding group's early blocks may be left out); 0: all. The call copies into staging, waits for the
 * daemon, and fills ret_status[n_blocks] (may be NULL; a block's status is the worst of its groups). Returns KVD_OK
 * if no block failed, else the first failure's error. Blocks until done; never holds up a match in another thread. A
 * block that is there already is neither copied nor sent.
 * Errors: KVD_E_ARG, KVD_E_TOKEN (others than were matched, or too few), KVD_E_LIMIT, KVD_E_GONE, KVD_E_TIMEOUT,
 * KVD_E_NOMEM, and what the daemon finds: KVD_E_PARENT, KVD_E_VALUE, KVD_E_QUOTA, KVD_E_FULL, KVD_E_DRAINING. */
int kvd_publish(kvd_prefix *prefix, const uint32_t *tokens, size_t n_tokens, size_t first_block, size_t n_blocks,
                uint32_t groups, enum kvd_dtype dtype, const struct kvd_kv *layers,
                enum kvd_publish_status *ret_status);

/* ---- Flights: no prefix computed twice at once ----------------------------------------------------------------- */

enum kvd_flight { KVD_FLIGHT_GRANTED = 0, KVD_FLIGHT_BUSY = 1, KVD_FLIGHT_LANDED = 2 };

/* Says that this worker is about to compute blocks [first_block, first_block + n) of the prefix's sequence.
 * ret_state[n]: granted (compute it: publishing ends the flight), busy (another worker is on it: wait, or compute
 * all the same), landed (match again). */
int kvd_flight_begin(kvd_prefix *prefix, size_t first_block, size_t n, enum kvd_flight *ret_state);
/* Waits until the block has landed (KVD_OK), was given up (KVD_E_NOT_FOUND), or the time is over (KVD_E_TIMEOUT). */
int kvd_flight_wait(kvd_prefix *prefix, size_t block, uint32_t timeout_msec);
/* Gives up flights that were granted and not published. */
int kvd_flight_end(kvd_prefix *prefix, size_t first_block, size_t n);

/* ---- Codecs, by themselves (what kvctl codec uses) ------------------------------------------------------------- */

/* Names of all codecs, NULL-terminated, constant. "raw" is fp16 here; in a space it keeps the space's dtype. These
 * calls need no session; their details are in kvd_message(NULL). */
const char *const *kvd_codec_names(void);
/* One sentence about a codec specification's codec; NULL if unknown. */
const char *kvd_codec_help(const char *spec);
/* Bytes of n_tokens vectors of dim numbers of one head. Errors: KVD_E_LAYOUT with a reason in ret_reason (may be
 * NULL). */
int kvd_codec_bytes(const char *spec, int is_v, size_t n_tokens, size_t dim, size_t *ret_bytes,
                    const char **ret_reason);
/* src, dst: [n_tokens][dim] row-major; code: kvd_codec_bytes() long: side data, then codes. Errors: KVD_E_LAYOUT,
 * KVD_E_VALUE, KVD_E_NOMEM. */
int kvd_codec_encode(const char *spec, int is_v, enum kvd_dtype dtype, const void *src, size_t n_tokens, size_t dim,
                     void *code);
int kvd_codec_decode(const char *spec, int is_v, const void *code, size_t n_tokens, size_t dim, enum kvd_dtype dtype,
                     void *dst);
/* UltraQuant slot bytes (vLLM's ultraquant_4bit): for each token K codes | K scales | V codes | V scales, 2 * (dim/2
 * + dim/32) bytes. */
int kvd_codec_uq_page(const char *spec_k, const char *spec_v, enum kvd_dtype dtype, const void *k, const void *v,
                      size_t n_tokens, size_t dim, void *page);

/* ---- Admin (peers that the configuration allows) --------------------------------------------------------------- */

struct kvd_selector {
    const char *tenant;    /* NULL or "": any */
    const char *model;     /* NULL or "": any */
    uint32_t space;        /* 0: any */
    const uint8_t *key;    /* or a prefix of it */
    size_t n_key;
    uint64_t idle_usec;    /* at least this long not used */
    uint64_t age_usec;     /* at least this long in the cache */
};
struct kvd_metric {
    const char *name, *help, *unit, *label;
    int counter;
    uint64_t value;
};
struct kvd_block_info {
    const char *tenant, *tier;
    uint32_t space, group;
    uint8_t key[KVD_KEY_BYTES], parent[KVD_KEY_BYTES];
    int first;
    uint64_t bytes;
    uint32_t crc32c, children, leases, pins;
    uint64_t idle_usec, age_usec;
};
struct kvd_space_info {
    const char *tenant, *model, *revision, *shard, *dtype, *codec_k, *codec_v;
    uint32_t id, block_tokens, n_layers, n_groups, open;
    uint8_t fingerprint[KVD_KEY_BYTES];
    uint64_t blocks, bytes;
};
struct kvd_worker_info {
    const char *name, *tenant;
    uint64_t worker, leases, staging_bytes, age_usec, hits, lookups, jobs;
    int32_t pid;
    uint32_t uid;
};
struct kvd_tenant_info {
    const char *name;
    uint64_t blocks, bytes, quota_bytes;
    uint32_t workers, spaces, slabs;
};
struct kvd_option_info {
    const char *name, *value, *unit, *minimum, *maximum, *default_value, *help;
    int live;
};
struct kvd_evict_result {
    uint64_t blocks, bytes, kept_leased, kept_pinned, kept_parents;
};
struct kvd_verify_result {
    uint64_t blocks, bytes, n_bad, n_keys;
    uint8_t bad[64][KVD_KEY_BYTES];
};

/* Each list call gives one item after another to each(), whose strings live until it returns; a non-zero result of
 * each() stops. */
int kvd_admin_stats(kvd *session, int (*each)(void *ctx, const struct kvd_metric *), void *ctx);
int kvd_admin_blocks(kvd *session, const struct kvd_selector *selector,
                     int (*each)(void *ctx, const struct kvd_block_info *), void *ctx);
int kvd_admin_spaces(kvd *session, const struct kvd_selector *selector,
                     int (*each)(void *ctx, const struct kvd_space_info *), void *ctx);
int kvd_admin_workers(kvd *session, int (*each)(void *ctx, const struct kvd_worker_info *), void *ctx);
int kvd_admin_tenants(kvd *session, int (*each)(void *ctx, const struct kvd_tenant_info *), void *ctx);
/* The blocks of one key (or the beginning of one): one for each layer group that has it. */
int kvd_admin_show(kvd *session, const struct kvd_selector *selector,
                   int (*each)(void *ctx, const struct kvd_block_info *), void *ctx);
int kvd_admin_evict(kvd *session, const struct kvd_selector *selector, uint64_t max_bytes, int dry_run,
                    struct kvd_evict_result *ret);
int kvd_admin_pin(kvd *session, const struct kvd_selector *selector, int unpin, uint64_t *ret_blocks,
                  uint64_t *ret_bytes);
int kvd_admin_verify(kvd *session, const struct kvd_selector *selector, struct kvd_verify_result *ret);
int kvd_admin_drain(kvd *session, int undo);
/* name NULL: all options. value not NULL: the option is set, in the running daemon only, and then told. */
int kvd_admin_config(kvd *session, const char *name, const char *value,
                     int (*each)(void *ctx, const struct kvd_option_info *), void *ctx);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif
