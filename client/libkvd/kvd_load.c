/* Load: leased blocks, decoded into the caller's memory; all at once, or layer by layer. */
#include <errno.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kvd_attend_cost.h"
#include "kvd_impl.h"

/* One block's part in a load. */
struct source {
    const void *payload; /* NULL: not leased, skipped */
    bool first;
};

struct load {
    struct kvd_prefix *prefix;
    size_t first_block, n_blocks;
    enum codec_dtype dtype;
    uint32_t flags;
    const struct kvd_kv *layers;
};

static int check_load(struct load *load, enum kvd_dtype dtype)
{
    struct kvd_prefix *p = load->prefix;
    uint64_t cookie = p ? p->space->session->cookie : 0;

    if (!p || !load->layers)
        return error_set(cookie, KVD_E_ARG, "prefix or layers is NULL");
    if (session_forked(p->space->session))
        return session_error_forked(p->space->session);
    load->dtype = dtype_of(dtype);
    if (!codec_dtype_bytes(load->dtype) || (load->flags & ~(uint32_t)KVD_LOAD_VERIFY) != 0)
        return error_set(cookie, KVD_E_ARG,
                         "dtype is none of enum kvd_dtype, or flags has a bit that is none of KVD_LOAD_*");
    if (!p->life && load->n_blocks)
        return error_set(cookie, KVD_E_STALE, "nothing is leased");
    if (load->n_blocks > p->n_matched || load->first_block > p->n_matched - load->n_blocks)
        return error_set(cookie, KVD_E_STALE, "blocks %zu to %zu of %zu that are matched", load->first_block,
                         load->first_block + load->n_blocks, p->n_matched);
    return 0;
}

static int corrupt(struct kvd_prefix *p, size_t block, uint32_t group)
{
    atomic_fetch_add_explicit(&p->life->page->n_corrupt, 1, memory_order_relaxed);
    return error_set(p->space->session->cookie, KVD_E_CORRUPT, "block %zu of group %u does not match its checksum",
                     block, group);
}

static int verify(struct kvd_prefix *p, size_t block, uint32_t group, const void *payload)
{
    const struct lookup_hit *hit = &p->held[group].hits[block];

    return p->space->session->crc32c(0, payload, hit->bytes) == hit->crc32c ? 0 : corrupt(p, block, group);
}

/* One layer of one block, from its payload to its place. */
static int decode_part(const struct load *load, uint32_t layer, size_t block, bool first, const void *payload)
{
    const struct kvd_space *space = load->prefix->space;
    const struct payload_layout *layout = space_layout_of(space, space->layer_group[layer], first);
    const struct kvd_kv *kv = &load->layers[layer];
    size_t skip = (block - load->first_block) * space->block_tokens;
    struct payload_dst dst = {
        .k = (uint8_t *)kv->k + skip * kv->k_token_stride,
        .v = kv->v && space->layers[layer].dim_v ? (uint8_t *)kv->v + skip * kv->v_token_stride : NULL,
        .k_token_stride = kv->k_token_stride,
        .k_head_stride = kv->k_head_stride,
        .v_token_stride = kv->v_token_stride,
        .v_head_stride = kv->v_head_stride,
    };
    const struct payload_part *part = &layout->parts[space->layer_index[layer]];
    uint64_t ticks = attend_ticks();
    int r = payload_decode(layout, space->session->codecs, space->layer_index[layer], payload, 0, space->block_tokens,
                           load->dtype, &dst);

    if (r == 0 && load->dtype == space->dtype) /* kvd_attend_choose() may have to know */
        attend_cost_note(&space->rates[space->layer_rates[layer]].load, (uint64_t)part->n_kv_heads * part->tile.bytes,
                         attend_ticks() - ticks, NULL, space->session->nsec_per_tick);
    if (r < 0)
        return error_set(space->session->cookie, r == -EINVAL ? KVD_E_ARG : KVD_E_INTERNAL,
                         "layer %u cannot be decoded so: strides of %zu and %zu bytes a token", layer,
                         kv->k_token_stride, kv->v_token_stride);
    return 0;
}

/* What was decoded counts only if the leases held all the while. */
static int check_held(const struct kvd_prefix *p)
{
    return life_leases_hold(p->life) ? 0
                                     : error_set(p->space->session->cookie, KVD_E_STALE,
                                                 "the daemon gave up this session and its leases meanwhile");
}

static void count_load(const struct kvd_prefix *p, uint64_t n_blocks, uint64_t n_bytes)
{
    atomic_fetch_add_explicit(&p->life->page->n_load_blocks, n_blocks, memory_order_relaxed);
    atomic_fetch_add_explicit(&p->life->page->n_load_bytes, n_bytes, memory_order_relaxed);
}

/* Bytes that a group's wanted layers of one block take where they are decoded to. */
static uint64_t decoded_bytes(const struct load *load, uint32_t group)
{
    const struct kvd_space *space = load->prefix->space;
    uint64_t n = 0;

    for (uint32_t l = 0; l < space->n_layers; l++)
        if (space->layer_group[l] == group && load->layers[l].k)
            n += (uint64_t)space->block_tokens * space->layers[l].n_kv_heads *
                 (space->layers[l].dim_k + space->layers[l].dim_v) * codec_dtype_bytes(load->dtype);
    return n;
}

static int load_block(const struct load *load, uint32_t group, size_t block)
{
    struct kvd_prefix *p = load->prefix;
    const struct payload_layout *layout = p->space->group[group].plain;
    bool first = (p->held[group].hits[block].flags & SHM_ENTRY_FIRST) != 0;
    const void *payload;
    int r = prefix_payload(p, block, group, &payload);

    if (r == 0 && (load->flags & KVD_LOAD_VERIFY))
        r = verify(p, block, group, payload);
    for (uint32_t i = 0; r == 0 && i < layout->n_parts; i++)
        if (load->layers[layout->parts[i].layer].k)
            r = decode_part(load, layout->parts[i].layer, block, first, payload);
    return r;
}

int kvd_load(kvd_prefix *prefix, size_t first_block, size_t n_blocks, enum kvd_dtype dtype, const struct kvd_kv *layers,
             uint32_t flags)
{
    struct load load = {
        .prefix = prefix, .first_block = first_block, .n_blocks = n_blocks, .flags = flags, .layers = layers};
    uint64_t n = 0, bytes = 0;
    int r = check_load(&load, dtype);

    if (r != 0 || n_blocks == 0)
        return r;
    for (uint32_t g = 0; g < prefix->space->n_groups && r == 0; g++) {
        uint64_t block_bytes = decoded_bytes(&load, g);

        if (!block_bytes)
            continue;
        for (size_t i = first_block; i < first_block + n_blocks && r == 0; i++) {
            if (!prefix_holds(prefix, g, i))
                continue;
            r = load_block(&load, g, i);
            n++;
            bytes += block_bytes;
        }
    }
    count_load(prefix, n, bytes);
    return r != 0 ? r : check_held(prefix);
}

/* ---- Layer by layer ---- */

/* A layer's state word: also the futex that its waiters sleep on. */
enum { LAYER_OPEN = 0, LAYER_AWAITED = 1, LAYER_DONE = 2 }; /* DONE + error code */

/* A waiter looks this often before it sleeps: a layer of a small model takes some 10 us, a sleep and a wake-up the
 * same. */
#define SPINS 2000

struct kvd_loading {
    struct load load;
    struct kvd_kv *layers;
    _Atomic uint32_t next;
    _Atomic uint32_t *state;         /* a word a layer */
    struct source *source;           /* [n_groups][n_blocks] */
    _Atomic unsigned char *verified; /* the same; 1: its checksum was right */
};

static int fill_sources(struct kvd_loading *loading)
{
    const struct load *load = &loading->load;
    struct kvd_prefix *p = load->prefix;
    uint64_t n = 0, bytes = 0;

    for (uint32_t g = 0; g < p->space->n_groups; g++) {
        uint64_t block_bytes = decoded_bytes(load, g);

        for (size_t i = 0; block_bytes && i < load->n_blocks; i++) {
            struct source *s = &loading->source[g * load->n_blocks + i];
            size_t block = load->first_block + i;
            int r;

            if (!prefix_holds(p, g, block))
                continue;
            r = prefix_payload(p, block, g, &s->payload);
            if (r != 0)
                return r;
            s->first = (p->held[g].hits[block].flags & SHM_ENTRY_FIRST) != 0;
            n++;
            bytes += block_bytes;
        }
    }
    count_load(p, n, bytes);
    return 0;
}

int kvd_load_begin(kvd_prefix *prefix, size_t first_block, size_t n_blocks, enum kvd_dtype dtype,
                   const struct kvd_kv *layers, uint32_t flags, kvd_loading **ret)
{
    struct load load = {
        .prefix = prefix, .first_block = first_block, .n_blocks = n_blocks, .flags = flags, .layers = layers};
    struct kvd_loading *l;
    size_t n_sources;
    int r = check_load(&load, dtype);

    if (r != 0)
        return r;
    if (!ret)
        return error_set(prefix->space->session->cookie, KVD_E_ARG, "ret is NULL");
    l = calloc(1, sizeof(*l));
    if (!l)
        return error_set(prefix->space->session->cookie, KVD_E_NOMEM, "no memory for a load");
    n_sources = prefix->space->n_groups * n_blocks;
    l->layers = malloc(prefix->space->n_layers * sizeof(*l->layers));
    l->state = calloc(prefix->space->n_layers, sizeof(*l->state));
    l->source = calloc(n_sources ? n_sources : 1, sizeof(*l->source));
    l->verified = calloc(n_sources ? n_sources : 1, sizeof(*l->verified));
    l->load = load;
    if (!l->layers || !l->state || !l->source || !l->verified) {
        r = error_set(prefix->space->session->cookie, KVD_E_NOMEM, "no memory for a load of %zu blocks", n_blocks);
    } else {
        memcpy(l->layers, layers, prefix->space->n_layers * sizeof(*layers));
        l->load.layers = l->layers;
        r = n_blocks ? fill_sources(l) : 0;
    }
    if (r != 0) {
        kvd_load_end(l);
        return r;
    }
    *ret = l;
    return KVD_OK;
}

static int load_layer(struct kvd_loading *l, uint32_t layer)
{
    const struct load *load = &l->load;
    uint32_t group = load->prefix->space->layer_group[layer];
    int r = 0;

    if (!l->layers[layer].k)
        return 0;
    for (size_t i = 0; i < load->n_blocks && r == 0; i++) {
        size_t at = group * load->n_blocks + i, block = load->first_block + i;

        if (!l->source[at].payload)
            continue;
        /* Whoever comes first to a block checks it; two at once both do, which is waste and no harm. */
        if ((load->flags & KVD_LOAD_VERIFY) && !atomic_load_explicit(&l->verified[at], memory_order_relaxed)) {
            r = verify(load->prefix, block, group, l->source[at].payload);
            if (r != 0)
                break;
            atomic_store_explicit(&l->verified[at], 1, memory_order_relaxed);
        }
        r = decode_part(load, layer, block, l->source[at].first, l->source[at].payload);
    }
    return r != 0 || load->n_blocks == 0 ? r : check_held(load->prefix);
}

int kvd_load_work(kvd_loading *loading)
{
    uint32_t n_layers = loading->load.prefix->space->n_layers, layer;
    _Atomic uint32_t *state;
    int r;

    if (atomic_load_explicit(&loading->next, memory_order_relaxed) >= n_layers)
        return KVD_E_NOT_FOUND;
    layer = atomic_fetch_add_explicit(&loading->next, 1, memory_order_relaxed);
    if (layer >= n_layers)
        return KVD_E_NOT_FOUND;
    r = load_layer(loading, layer);
    state = &loading->state[layer];
    /* release: pairs with the acquire in kvd_load_done() and kvd_load_wait(). */
    if (atomic_exchange_explicit(state, LAYER_DONE + (uint32_t)r, memory_order_acq_rel) == LAYER_AWAITED)
        syscall(SYS_futex, state, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    return r;
}

int kvd_load_done(const kvd_loading *loading, uint32_t layer)
{
    return layer < loading->load.prefix->space->n_layers &&
           atomic_load_explicit(&loading->state[layer], memory_order_acquire) >= LAYER_DONE;
}

static int layer_result(const struct kvd_loading *l, uint32_t layer, uint32_t state)
{
    int r = (int)(state - LAYER_DONE);

    return r == 0 ? 0
                  : error_set(l->load.prefix->space->session->cookie, r, "layer %u was not loaded: %s", layer,
                              kvd_strerror(r));
}

int kvd_load_wait(kvd_loading *loading, uint32_t layer, int timeout_msec)
{
    uint64_t cookie = loading->load.prefix->space->session->cookie, deadline;
    _Atomic uint32_t *state;
    uint32_t seen;

    if (layer >= loading->load.prefix->space->n_layers)
        return error_set(cookie, KVD_E_ARG, "layer %u of %u", layer, loading->load.prefix->space->n_layers);
    state = &loading->state[layer];
    for (int i = 0; i < SPINS; i++) {
        seen = atomic_load_explicit(state, memory_order_acquire);
        if (seen >= LAYER_DONE)
            return layer_result(loading, layer, seen);
        __builtin_ia32_pause();
    }
    deadline = mux_now_msec() + (timeout_msec < 0 ? 0 : (uint64_t)timeout_msec);
    for (;;) {
        struct timespec left = {0};
        uint64_t now;

        seen = LAYER_OPEN;
        if (!atomic_compare_exchange_strong_explicit(state, &seen, LAYER_AWAITED, memory_order_acquire,
                                                     memory_order_acquire) &&
            seen >= LAYER_DONE)
            return layer_result(loading, layer, seen);
        now = mux_now_msec();
        if (timeout_msec >= 0 && now >= deadline)
            return error_set(cookie, KVD_E_TIMEOUT, "layer %u was not complete within %d ms", layer, timeout_msec);
        if (timeout_msec >= 0) {
            left.tv_sec = (time_t)((deadline - now) / 1000);
            left.tv_nsec = (long)((deadline - now) % 1000) * 1000000;
        }
        syscall(SYS_futex, state, FUTEX_WAIT_PRIVATE, LAYER_AWAITED, timeout_msec < 0 ? NULL : &left, NULL, 0);
    }
}

kvd_loading *kvd_load_end(kvd_loading *loading)
{
    if (loading) {
        free(loading->layers);
        free((void *)loading->state);
        free(loading->source);
        free((void *)loading->verified);
        free(loading);
    }
    return NULL;
}
