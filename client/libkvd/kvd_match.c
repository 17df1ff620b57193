/* Match, lease, release: the calls that make no system call and wait for nobody while the daemon lives.
 *
 *   keys (in waves, parent to child)  ->  look-up of the full groups until the first miss  ->  candidate n
 *   settle(n):   sliding groups, from the end backwards  ->  a smaller n, or all that they need
 *                lease words: take, store, one fence, generations again
 *                an entry was retired in between  ->  a smaller n, settle again (n only falls, so this ends)
 *   hit log, statistics
 *
 * A lease protects from the moment that its generation was confirmed (proto/lookup.h). Between settle()'s rounds
 * each group holds one run [lo, hi) of confirmed leases with hi <= n. */
#include <stdlib.h>
#include <string.h>

#include "kvd_impl.h"

/* Keys hashed before they are looked up: a miss wastes at most this many hashes. Measured: a wave of 16 keeps the
 * look-ups' cache misses overlapping; beyond 64 nothing is gained. */
#define WAVE_FIRST 16u
#define WAVE       64u

/* Look-ups of a sliding group at a time, backwards. */
#define SLIDING_WAVE 16u

/* ---- Leases ---- */

static void give_words(struct kvd_prefix *p, struct held *h, size_t from, size_t to)
{
    struct life *life = p->life;

    for (size_t i = from; i < to; i++) /* release: what was read under the lease was read before */
        atomic_store_explicit(&life->leases[h->words[i]], 0, memory_order_release);
    lease_give(&life->free_leases, h->words + from, to - from);
}

/* Shortens a group's run to its part within [lo, hi). */
static void keep_run(struct kvd_prefix *p, struct held *h, size_t lo, size_t hi)
{
    if (h->lo >= hi || h->hi <= lo) {
        give_words(p, h, h->lo, h->hi);
        h->lo = h->hi = lo;
        return;
    }
    if (h->hi > hi) {
        give_words(p, h, hi, h->hi);
        h->hi = hi;
    }
    if (h->lo < lo) {
        give_words(p, h, h->lo, lo);
        h->lo = lo;
    }
}

void prefix_drop_leases(struct kvd_prefix *p)
{
    if (!p->life)
        return;
    for (uint32_t g = 0; g < p->space->n_groups; g++) {
        give_words(p, &p->held[g], p->held[g].lo, p->held[g].hi);
        p->held[g].lo = p->held[g].hi = 0;
    }
    p->n_matched = 0;
    life_unref(p->life);
    p->life = NULL;
}

/* First block that a group needs for a prefix of n blocks. */
static size_t need_from(const struct kvd_space *space, uint32_t group, size_t n)
{
    size_t w = space->group[group].window_blocks;

    return w == 0 || w >= n ? 0 : n - w;
}

/* Leases [from, to) of a group, whose hits are filled. *io_n becomes smaller if not all could be leased: to the
 * length of prefix that is still possible. The run is extended only by what was confirmed. */
static void lease_run(struct kvd_prefix *p, uint32_t group, size_t from, size_t to, size_t *io_n)
{
    struct held *h = &p->held[group];
    struct life *life = p->life;
    bool full = p->space->group[group].window_blocks == 0;
    size_t got = lease_take(&life->free_leases, h->words + from, to - from), ok;

    for (size_t i = from; i < from + got; i++)
        atomic_store_explicit(&life->leases[h->words[i]], shm_ref(h->hits[i].entry, h->hits[i].gen),
                              memory_order_relaxed);
    ok = lookup_confirm(&life->view, h->hits + from, got);
    if (ok < got)
        atomic_fetch_add_explicit(&life->page->n_stale, 1, memory_order_relaxed);
    if (ok == to - from) {
        if (h->lo == h->hi)
            h->lo = from, h->hi = to;
        else
            h->lo = from < h->lo ? from : h->lo, h->hi = to > h->hi ? to : h->hi;
        return;
    }
    if (full) { /* what comes before the first that failed is held */
        give_words(p, h, from + ok, from + got);
        if (h->lo == h->hi)
            h->lo = from;
        h->hi = from + ok;
        *io_n = from + ok;
    } else { /* a prefix that ends before the first that failed needs none of those after it */
        give_words(p, h, from, from + got);
        if (from + ok < *io_n)
            *io_n = from + ok;
    }
}

/* Checks a sliding group for a prefix of n: looks up, backwards, what it does not hold of [need_from(n), n). hits
 * are filled. Returns the longest n' <= n that it allows as far as it saw (n itself if all is there). */
static size_t find_sliding(struct kvd_prefix *p, uint32_t group, uint16_t id, size_t n)
{
    struct held *h = &p->held[group];
    size_t lo = need_from(p->space, group, n);
    size_t at = h->lo < h->hi ? h->lo : n; /* held is [at, n): keep_run() saw to it */

    while (at > lo) {
        size_t here = at - lo < SLIDING_WAVE ? at - lo : SLIDING_WAVE;
        size_t from = at - here;

        lookup_find_many(&p->life->view, p->keys + from * KVD_KEY_BYTES, here, id, (uint8_t)group, false,
                         h->hits + from);
        for (size_t i = at; i-- > from;)
            if (h->hits[i].gen == 0 || h->hits[i].host == SHM_LOC_NONE)
                return i;
        at = from;
    }
    return n;
}

/* How many words settle() would have to take for n. */
static uint64_t words_needed(const struct kvd_prefix *p, size_t n)
{
    uint64_t words = 0;

    for (uint32_t g = 0; g < p->space->n_groups; g++)
        words += n - need_from(p->space, g, n);
    return words;
}

/* The longest prefix <= n that the table could lease if nobody else held a word. */
static size_t clamp_to_table(const struct kvd_prefix *p, size_t n)
{
    size_t lo = 0, hi = n;

    if (words_needed(p, n) <= p->life->free_leases.n)
        return n;
    while (lo < hi) {
        size_t mid = lo + (hi - lo + 1) / 2;

        if (words_needed(p, mid) <= p->life->free_leases.n)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo;
}

/* Leases what every group needs for the longest possible prefix <= n and nothing else; the full groups' hits up to n
 * are filled. Returns its length. */
static size_t settle(struct kvd_prefix *p, uint16_t id, size_t n)
{
    const struct kvd_space *space = p->space;
    size_t before;

    n = clamp_to_table(p, n);
    do {
        before = n;
        for (uint32_t g = 0; g < space->n_groups; g++)
            keep_run(p, &p->held[g], need_from(space, g, n), n);
        for (uint32_t g = 0; g < space->n_groups && n == before; g++)
            if (space->group[g].window_blocks)
                n = find_sliding(p, g, id, n);
        for (uint32_t g = 0; g < space->n_groups && n == before; g++) {
            struct held *h = &p->held[g];
            size_t lo = need_from(space, g, n), hi = n;

            if (h->lo == h->hi)
                h->lo = h->hi = space->group[g].window_blocks ? hi : lo;
            if (space->group[g].window_blocks)
                hi = h->lo; /* held: [h->lo, n) */
            else
                lo = h->hi; /* held: [0, h->hi) */
            if (lo < hi)
                lease_run(p, g, lo, hi, &n);
        }
    } while (n != before);
    return n;
}

/* ---- Match ---- */

/* Looks up keys [from, to) in all full groups. Returns the end of what all of them have. */
static size_t find_full(struct kvd_prefix *p, uint16_t id, size_t from, size_t to)
{
    const struct kvd_space *space = p->space;

    for (uint32_t g = 0; g < space->n_groups && from < to; g++) {
        struct lookup_hit *hits = p->held[g].hits;

        if (space->group[g].window_blocks)
            continue;
        to = from + lookup_find_many(&p->life->view, p->keys + from * KVD_KEY_BYTES, to - from, id, (uint8_t)g, true,
                                     hits + from);
        for (size_t i = from; i < to; i++)
            if (hits[i].host == SHM_LOC_NONE) /* in another tier only */
                to = i;
    }
    return to;
}

static void note_hits(struct kvd_prefix *p)
{
    struct life *life = p->life;
    size_t n_words = (size_t)life->log_mask + 1;

    atomic_fetch_add_explicit(&life->page->n_match_blocks, p->n_seq, memory_order_relaxed);
    if (p->n_matched == 0)
        return;
    atomic_fetch_add_explicit(&life->page->n_hit_blocks, p->n_matched, memory_order_relaxed);
    for (uint32_t g = 0; g < p->space->n_groups; g++) {
        const struct held *h = &p->held[g];
        size_t from = h->hi - h->lo > n_words ? h->hi - n_words : h->lo;
        uint64_t at;

        life_log_begin(life, h->hi - from, &at);
        for (size_t i = from; i < h->hi; i++)
            life_log_put(life, at + (i - from), shm_ref(h->hits[i].entry, h->hits[i].gen));
        life_log_end(life, at + (h->hi - from));
    }
}

/* A life to match in, and the space's id in it. False: none, which is a miss. */
static bool match_life(struct kvd_prefix *p, uint16_t *ret_id)
{
    struct life *life;

    if (session_life(p->space->session, false, &life) != 0)
        return false;
    if (!space_id(p->space, life, ret_id) &&
        (!session_may_try(p->space->session) || space_bind(p->space, life, MATCH_WAIT_MSEC) != 0 ||
         !space_id(p->space, life, ret_id))) {
        life_unref(life);
        return false;
    }
    p->life = life;
    p->id = *ret_id;
    return true;
}

/* With the candidate n: leases, notes, and lets go of the life if nothing is leased. */
static void finish_match(struct kvd_prefix *p, uint16_t id, size_t n)
{
    p->n_matched = settle(p, id, n);
    note_hits(p);
    if (!life_leases_hold(p->life))
        p->n_matched = 0;
    if (p->n_matched == 0)
        prefix_drop_leases(p);
}

static size_t match_tokens(struct kvd_prefix *p, const uint32_t *tokens, uint16_t id)
{
    const struct kvd_space *space = p->space;
    size_t found = 0, wave = space->n_full_groups ? WAVE_FIRST : p->n_seq;

    while (found < p->n_seq) {
        size_t from = p->n_keyed, to = p->n_seq - from < wave ? p->n_seq : from + wave;

        for (; p->n_keyed < to; p->n_keyed++) { /* as prefix_key_to(), but straight from the caller's tokens */
            size_t i = p->n_keyed, n_extra = 0;
            const uint8_t *extra = p->n_extras ? prefix_extra_of(p, i, &n_extra) : NULL;

            if (key_block(p->hasher, i ? p->keys + (i - 1) * KVD_KEY_BYTES : space->fingerprint,
                          tokens + i * space->block_tokens, space->block_tokens, extra, n_extra,
                          p->keys + i * KVD_KEY_BYTES) < 0)
                return found;
        }
        found = find_full(p, id, from, to);
        if (found < to)
            break;
        wave = WAVE;
    }
    return found;
}

static int keep_extras(struct kvd_prefix *p, const struct kvd_extra *extras, size_t n_extras)
{
    uint64_t cookie = p->space->session->cookie;
    size_t bytes = 0;

    p->n_extras = 0;
    for (size_t i = 0; i < n_extras; i++) {
        if ((i && extras[i].block <= extras[i - 1].block) || extras[i].n > KEY_EXTRA_MAX ||
            (extras[i].n && !extras[i].data))
            return error_set(cookie, KVD_E_ARG, "extra %zu: blocks must ascend and data have at most %u bytes", i,
                             KEY_EXTRA_MAX);
        bytes += extras[i].n;
    }
    if (n_extras > p->extras_room) {
        struct prefix_extra *grown = realloc(p->extras, n_extras * sizeof(*grown));

        if (!grown)
            return error_set(cookie, KVD_E_NOMEM, "no memory for %zu extras", n_extras);
        p->extras = grown;
        p->extras_room = n_extras;
    }
    if (bytes > p->extra_data_room) {
        uint8_t *grown = realloc(p->extra_data, bytes);

        if (!grown)
            return error_set(cookie, KVD_E_NOMEM, "no memory for %zu bytes of extras", bytes);
        p->extra_data = grown;
        p->extra_data_room = bytes;
    }
    bytes = 0;
    for (size_t i = 0; i < n_extras; i++) {
        p->extras[i] = (struct prefix_extra){.block = extras[i].block, .off = bytes, .n = extras[i].n};
        if (extras[i].n)
            memcpy(p->extra_data + bytes, extras[i].data, extras[i].n);
        bytes += extras[i].n;
    }
    p->n_extras = n_extras;
    return 0;
}

/* True if every token is below the vocabulary's size. */
static bool tokens_in_range(const struct kvd_space *space, const uint32_t *tokens, size_t n)
{
    uint32_t most = 0;

    if (!space->vocab_tokens)
        return true;
    for (size_t i = 0; i < n; i++)
        most = tokens[i] > most ? tokens[i] : most;
    return n == 0 || most < space->vocab_tokens;
}

static int check_match(struct kvd_prefix *p, const void *data, size_t n_blocks, bool digests)
{
    uint64_t cookie = p->space->session->cookie;

    if ((p->space->digest_bytes != 0) != digests)
        return error_set(cookie, KVD_E_ARG, "the space's keys come from %s", digests ? "tokens" : "digests");
    if (n_blocks && !data)
        return error_set(cookie, KVD_E_ARG, "%s is NULL", digests ? "digests" : "tokens");
    if (n_blocks > p->max_blocks)
        return error_set(cookie, KVD_E_LIMIT, "the sequence has %zu blocks; allowed by this prefix: %zu", n_blocks,
                         p->max_blocks);
    return 0;
}

static void forget(struct kvd_prefix *p)
{
    prefix_drop_leases(p);
    p->n_seq = p->n_keyed = p->n_extras = 0;
}

int kvd_match(kvd_prefix *p, const uint32_t *tokens, size_t n_tokens, const struct kvd_extra *extras, size_t n_extras,
              size_t *ret_tokens)
{
    size_t n_blocks, block_tokens;
    uint16_t id;
    int r;

    if (!p || (n_extras && !extras))
        return error_set(p ? p->space->session->cookie : 0, KVD_E_ARG, "prefix or extras is NULL");
    if (session_forked(p->space->session))
        return session_error_forked(p->space->session);
    block_tokens = p->space->block_tokens;
    n_blocks = n_tokens / block_tokens;
    r = check_match(p, tokens, n_blocks, false);
    if (r != 0)
        return r;
    if (!tokens_in_range(p->space, tokens, n_blocks * block_tokens))
        return error_set(p->space->session->cookie, KVD_E_TOKEN, "a token is not below the vocabulary's %u",
                         p->space->vocab_tokens);
    forget(p);
    r = keep_extras(p, extras, n_extras);
    if (r != 0)
        return r;
    p->n_seq = n_blocks;
    if (n_blocks && match_life(p, &id))
        finish_match(p, id, match_tokens(p, tokens, id));
    /* Keys of the rest are computed when they are asked for. */
    if (p->n_keyed < n_blocks)
        memcpy(p->tokens + p->n_keyed * block_tokens, tokens + p->n_keyed * block_tokens,
               (n_blocks - p->n_keyed) * block_tokens * sizeof(*tokens));
    if (ret_tokens)
        *ret_tokens = p->n_matched * block_tokens;
    return KVD_OK;
}

int kvd_match_digests(kvd_prefix *p, const uint8_t *digests, size_t n, size_t *ret_blocks)
{
    uint32_t digest_bytes;
    uint16_t id;
    int r;

    if (!p)
        return error_set(0, KVD_E_ARG, "prefix is NULL");
    if (session_forked(p->space->session))
        return session_error_forked(p->space->session);
    r = check_match(p, digests, n, true);
    if (r != 0)
        return r;
    forget(p);
    digest_bytes = p->space->digest_bytes;
    if (digest_bytes == KVD_KEY_BYTES) {
        memcpy(p->keys, digests, n * KVD_KEY_BYTES);
    } else {
        for (size_t i = 0; i < n; i++) {
            memcpy(p->keys + i * KVD_KEY_BYTES, digests + i * digest_bytes, digest_bytes);
            memset(p->keys + i * KVD_KEY_BYTES + digest_bytes, 0, KVD_KEY_BYTES - digest_bytes);
        }
    }
    p->n_seq = p->n_keyed = n;
    if (n && match_life(p, &id)) {
        /* Several full groups: in waves, so that a miss of one ends the others' look-ups. */
        size_t wave = p->space->n_full_groups == 1 ? n : WAVE, found = p->space->n_full_groups ? 0 : n;

        while (found < n) {
            size_t to = n - found < wave ? n : found + wave, end = find_full(p, id, found, to);

            found = end;
            if (end < to)
                break;
        }
        finish_match(p, id, found);
    }
    if (ret_blocks)
        *ret_blocks = p->n_matched;
    return KVD_OK;
}

void kvd_release(kvd_prefix *prefix)
{
    if (prefix && !session_forked(prefix->space->session))
        prefix_drop_leases(prefix);
}

size_t kvd_prefix_trim(kvd_prefix *p, size_t n_blocks)
{
    if (!p || session_forked(p->space->session))
        return 0;
    if (n_blocks >= p->n_matched)
        return p->n_matched;
    p->n_matched = life_leases_hold(p->life) ? settle(p, p->id, n_blocks) : 0;
    if (p->n_matched == 0)
        prefix_drop_leases(p);
    return p->n_matched;
}
