/* Retirement of entries against leases, and making room.
 *
 * The daemon's half of the lease protocol (rule I3); the worker's half is lookup_confirm(). For a batch of entries at once:
 *
 *   1  gen of each becomes odd                     worker: 1  reads gen (even), checks the key
 *   2  full fence                                          2  stores shm_ref(entry, gen) into its lease table
 *   3  reads the words of all lease tables                 3  full fence
 *   4  leased: gen back to what it was                     4  reads gen again: the same: leased; else a miss
 *      else: out of its bucket, slot freed
 *
 * Either the daemon's 3 sees the worker's 2, or the worker's 4 sees the daemon's 1. Where a race can start, and why it is safe:
 *   a  worker between 1 and 2 while the daemon does 1..4 and fills the slot anew: the worker's 4 sees another generation.
 *   b  worker sees the odd gen of a retirement that is then taken back: it has a miss, and clears its word.
 *   c  worker dies at any point: its page is removed by the session's end, its words count no more.
 *   d  worker writes nonsense into its table: only numbers of RETIRING entries with their generation count, so that all it can do is to
 *      keep blocks of its own tenant.
 *   e  the generation comes round after 2^31 uses of one entry while a worker stands between 1 and 4: not guarded.
 * tests/spin/lease.pml is a model of this. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "store/cache-internal.h"
#include "store/tier/host.h"

/* ---- hits ---- */

static void drain_page(struct cache *c, struct cache_page *page)
{
    uint64_t head = atomic_load_explicit(&page->header->log_head, memory_order_acquire);
    uint32_t now = cache_now_ds(c);

    if (head - page->log_seen > page->n_log) { /* more than fits, or nonsense: only the last n_log words are there */
        uint64_t lost = head - page->log_seen - page->n_log;

        c->n_hits_lost += lost < UINT32_MAX ? lost : UINT32_MAX; /* a worker can write anything there */
        page->log_seen = head - page->n_log;
    }
    for (; page->log_seen != head; page->log_seen++) {
        uint64_t ref = atomic_load_explicit(&page->log[page->log_seen % page->n_log], memory_order_relaxed);
        uint32_t e = shm_ref_entry(ref);

        if (e >= c->config.n_entries || c->meta[e].state != ENTRY_VALID || index_gen(&c->index, e) != shm_ref_gen(ref))
            continue;
        c->meta[e].last_use_ds = now;
        c->config.policy->hit(c->policy, e);
        c->n_hits_logged++;
    }
}

void cache_drain_hits(struct cache *c)
{
    for (uint32_t i = 0; i < c->n_pages; i++)
        drain_page(c, c->pages[i]);
}

/* ---- retirement ---- */

/* Sets leased on every RETIRING or ZOMBIE entry that some word holds. */
static void scan_leases(struct cache *c)
{
    atomic_thread_fence(memory_order_seq_cst);
    for (uint32_t i = 0; i < c->n_pages; i++) {
        const struct cache_page *page = c->pages[i];

        for (uint32_t k = 0; k < page->n_leases; k++) {
            uint64_t ref = atomic_load_explicit(&page->leases[k], memory_order_acquire);
            uint32_t e = shm_ref_entry(ref);

            if (ref == 0 || e >= c->config.n_entries)
                continue;
            if ((c->meta[e].state == ENTRY_RETIRING || c->meta[e].state == ENTRY_ZOMBIE) &&
                (index_gen(&c->index, e) & ~1u) == shm_ref_gen(ref))
                c->meta[e].leased = true;
        }
    }
}

/* VALID -> RETIRING. Its parent counts one child less from now on, so that it may follow in the same batch. */
static void retire(struct cache *c, uint32_t e)
{
    assert(c->meta[e].state == ENTRY_VALID);
    c->meta[e].state = ENTRY_RETIRING;
    c->meta[e].leased = false;
    index_retire(&c->index, e);
    if (c->meta[e].parent != CACHE_NONE) {
        c->meta[c->meta[e].parent].n_children--;
        cache_settle(c, c->meta[e].parent);
    }
}

/* RETIRING -> VALID. */
static void take_back(struct cache *c, uint32_t e)
{
    struct meta *m = &c->meta[e];

    index_restore(&c->index, e);
    m->state = ENTRY_VALID;
    if (m->pending_answer) {
        m->pending_answer = false;
        c->config.policy->keep(c->policy, e);
    }
    cache_settle(c, e);
    if (m->parent != CACHE_NONE) {
        c->meta[m->parent].n_children++;
        cache_settle(c, m->parent);
    }
}

/* Out of bucket, policy and lists. */
static void detach(struct cache *c, uint32_t e)
{
    struct meta *m = &c->meta[e];
    uint64_t bytes = entry_bytes(c, e);

    index_remove(&c->index, e);
    cache_space_list_remove(c, e);
    entry_space(c, e)->bytes -= bytes;
    c->bytes_used -= bytes;
    c->n_valid--;
    if (m->pending_answer)
        c->config.policy->evicted(c->policy, e);
    else
        c->config.policy->remove(c->policy, e);
    m->pending_answer = m->in_policy = m->parked = false;
    cache_unlink_child(c, e);
}

/* Ends the retirement of a batch, leaves first: what is leased, or has a child left, or is pinned or held, stays. */
static void conclude(struct cache *c, const uint32_t *entries, size_t n, struct cache_evicted *ret)
{
    scan_leases(c);
    for (size_t i = 0; i < n; i++) {
        uint32_t e = entries[i];
        struct meta *m = &c->meta[e];

        if (m->leased || m->n_children) {
            if (m->leased)
                ret->kept_leased++, c->n_leased_kept++;
            else
                ret->kept_parents++;
            take_back(c, e);
            continue;
        }
        ret->blocks++;
        ret->bytes += entry_bytes(c, e);
        c->n_evicted++;
        c->evicted_bytes += entry_bytes(c, e);
        detach(c, e);
        cache_free_entry(c, e);
    }
}

static bool may_retire(const struct cache *c, uint32_t e, struct cache_evicted *ret)
{
    const struct meta *m;

    if (e >= c->config.n_entries || c->meta[e].state != ENTRY_VALID)
        return false;
    m = &c->meta[e];
    if (m->n_pins || m->n_holds)
        ret->kept_pinned++;
    else if (m->n_children)
        ret->kept_parents++;
    else
        return true;
    return false;
}

void cache_evict(struct cache *c, const uint32_t *entries, size_t n, struct cache_evicted *ret)
{
    uint32_t batch[EVICT_BATCH_MAX];

    while (n > 0) {
        size_t here = 0;

        for (; n > 0 && here < EVICT_BATCH_MAX; n--, entries++)
            if (may_retire(c, *entries, ret)) {
                retire(c, *entries);
                batch[here++] = *entries;
            }
        conclude(c, batch, here, ret);
    }
    cache_reap_zombies(c);
}

void cache_evict_up(struct cache *c, const uint32_t *entries, size_t n, bool (*want)(void *ctx, uint32_t entry),
                    void *ctx, uint64_t max_bytes, struct cache_evicted *ret)
{
    uint32_t batch[EVICT_BATCH_MAX];

    for (size_t i = 0; i < n && (!max_bytes || ret->bytes < max_bytes);) {
        uint64_t bytes = ret->bytes;
        size_t here = 0;

        for (; i < n && here < EVICT_BATCH_MAX && (!max_bytes || bytes < max_bytes); i++) {
            uint32_t e = entries[i];

            if (!may_retire(c, e, ret))
                continue;
            do { /* up the chain as far as it is wanted: a retiring child no longer counts */
                bytes += entry_bytes(c, e);
                retire(c, e);
                batch[here++] = e;
                e = c->meta[e].parent;
            } while (e != CACHE_NONE && here < EVICT_BATCH_MAX && (!max_bytes || bytes < max_bytes) &&
                     c->meta[e].state == ENTRY_VALID && !c->meta[e].n_children && want(ctx, e) &&
                     may_retire(c, e, ret));
            if (e != CACHE_NONE && here == EVICT_BATCH_MAX && c->meta[e].state == ENTRY_VALID && want(ctx, e)) {
                conclude(c, batch, here, ret); /* a chain longer than a batch: go on with what is left of it */
                here = 0;
                if (!c->meta[e].n_children && (!max_bytes || ret->bytes < max_bytes))
                    cache_evict_up(c, &e, 1, want, ctx, max_bytes, ret);
                bytes = ret->bytes;
            }
        }
        conclude(c, batch, here, ret);
    }
    cache_reap_zombies(c);
}

/* ---- making room ---- */

/* Takes victims from the policy, as many as a 64th of the cache and at most a batch: one scan of the lease tables serves them all. */
static uint64_t evict_some(struct cache *c)
{
    uint64_t want = c->n_valid / 64 + 1;
    uint32_t batch[EVICT_BATCH_MAX];
    struct cache_evicted done = {0};
    size_t n = 0;

    if (want > EVICT_BATCH_MAX)
        want = EVICT_BATCH_MAX;
    while (n < want) {
        uint32_t e;

        if (c->config.policy->victim(c->policy, &e) < 0)
            break;
        assert(c->meta[e].state == ENTRY_VALID && !c->meta[e].n_children);
        c->meta[e].pending_answer = true;
        retire(c, e);
        batch[n++] = e;
    }
    conclude(c, batch, n, &done);
    cache_reap_zombies(c);
    return done.blocks;
}

int cache_room_for_entry(struct cache *c)
{
    if (c->n_free)
        return 0;
    cache_drain_hits(c);
    for (int round = 0; round < 8 && !c->n_free; round++) /* more than one round only where leases are in the way */
        if (evict_some(c) == 0 && round > 0)
            break;
    return c->n_free ? 0 : -ENOSPC;
}

/* Entries of owners[] and all that descends from them, leaves first: a chain's end before its beginning. Allocates. */
static int gather_subtrees(struct cache *c, const uint32_t *owners, uint32_t n, uint32_t **ret_list, size_t *ret_n)
{
    uint32_t *list = NULL;
    size_t used = 0, cap = 0;

    for (uint32_t i = 0; i < n; i++) {
        size_t from = used;

        if (c->meta[owners[i]].state != ENTRY_VALID)
            continue;
        for (size_t at = from; at == from || at < used; at++) {
            uint32_t child;

            if (used + 1 >= cap) {
                size_t more = cap ? cap * 2 : 256;
                uint32_t *grown = realloc(list, more * sizeof(*list));

                if (!grown) {
                    free(list);
                    return -ENOMEM;
                }
                list = grown;
                cap = more;
            }
            if (at == from && used == from)
                list[used++] = owners[i];
            for (child = c->meta[list[at]].first_child; child != CACHE_NONE; child = c->meta[child].next_sibling) {
                if (used + 1 >= cap) {
                    uint32_t *grown = realloc(list, cap * 2 * sizeof(*list));

                    if (!grown) {
                        free(list);
                        return -ENOMEM;
                    }
                    list = grown;
                    cap *= 2;
                }
                list[used++] = child;
            }
        }
    }
    *ret_list = list;
    *ret_n = used;
    return 0;
}

/* Evicts the owners and their descendants. An entry may stand in the list twice (below two owners): the second time it is gone. */
static void evict_subtrees(struct cache *c, const uint32_t *owners, uint32_t n)
{
    struct cache_evicted done = {0};
    uint32_t batch[EVICT_BATCH_MAX];
    uint32_t *list = NULL;
    size_t used = 0, here = 0;

    if (gather_subtrees(c, owners, n, &list, &used) < 0)
        return;
    while (used > 0) { /* backwards: breadth-first order has every child behind its parent */
        uint32_t e = list[--used];

        if (may_retire(c, e, &done)) {
            retire(c, e);
            batch[here++] = e;
        }
        if (here == EVICT_BATCH_MAX || (used == 0 && here > 0)) {
            conclude(c, batch, here, &done);
            here = 0;
        }
    }
    free(list);
}

enum { STEAL_TRIES = 3, STEAL_OWNERS_MAX = 4096, ROUNDS_MAX = 8 };

/* No block of this size leaves soon enough: empties the slab of another size that costs least, to be cut anew. */
static int steal_slab(struct cache *c, uint64_t bytes, uint32_t owner, uint64_t *ret_loc)
{
    uint32_t *owners = malloc(STEAL_OWNERS_MAX * sizeof(*owners));
    uint32_t n;
    int r = -ENOSPC;

    if (!owners)
        return -ENOMEM;
    for (uint32_t i = 0; i < STEAL_TRIES && r == -ENOSPC; i++) {
        if (c->tier->cheapest(c->host, bytes, i, owners, STEAL_OWNERS_MAX, &n) < 0)
            break;
        evict_subtrees(c, owners, n);
        r = c->tier->reserve(c->host, bytes, owner, ret_loc);
    }
    free(owners);
    return r;
}

int cache_room_for_slot(struct cache *c, uint64_t bytes, uint32_t owner, uint64_t *ret_loc)
{
    int r = c->tier->reserve(c->host, bytes, owner, ret_loc);

    if (r != -ENOSPC)
        return r;
    cache_drain_hits(c);
    for (int round = 0; round < ROUNDS_MAX && r == -ENOSPC; round++) {
        if (round > 0 && !c->tier->has_class(c->host, bytes))
            break;
        if (evict_some(c) == 0 && round > 0)
            break;
        r = c->tier->reserve(c->host, bytes, owner, ret_loc);
    }
    return r == -ENOSPC ? steal_slab(c, bytes, owner, ret_loc) : r;
}

int cache_room_in_space(struct cache *c, struct space_slot *s, uint64_t bytes)
{
    uint64_t quota = c->config.space_quota_bytes;

    if (!quota || s->bytes + bytes <= quota)
        return 0;
    if (bytes > quota)
        return -EDQUOT;
    for (uint32_t e = s->oldest, tries = 0; e != CACHE_NONE && tries < EVICT_BATCH_MAX && s->bytes + bytes > quota; tries++) {
        uint32_t next = c->meta[e].next;

        evict_subtrees(c, &e, 1); /* the oldest goes with what hangs on it */
        e = c->meta[e].state == ENTRY_VALID ? next : s->oldest;
    }
    return s->bytes + bytes <= quota ? 0 : -EDQUOT;
}

uint64_t cache_shrink(struct cache *c, uint64_t target_bytes)
{
    uint32_t *owners = malloc(STEAL_OWNERS_MAX * sizeof(*owners));
    uint64_t given = c->tier->trim(c->host);
    struct tier_info info;
    uint32_t n, skip = 0;

    c->tier->info(c->host, &info);
    while (owners && info.slab_bytes > target_bytes && c->tier->cheapest(c->host, 0, skip, owners, STEAL_OWNERS_MAX, &n) >= 0) {
        uint64_t now;

        evict_subtrees(c, owners, n);
        now = c->tier->trim(c->host);
        given += now;
        if (now == 0 && n < STEAL_OWNERS_MAX)
            skip++; /* leased or pinned: the next one */
        c->tier->info(c->host, &info);
    }
    free(owners);
    atomic_store_explicit(&c->index.header->retired_slabs, host_n_retired(c->host), memory_order_release);
    return given;
}

/* ---- corruption ---- */

void cache_reap_zombies(struct cache *c)
{
    uint32_t *at = &c->zombie_head;

    if (c->zombie_head == CACHE_NONE)
        return;
    for (uint32_t e = c->zombie_head; e != CACHE_NONE; e = c->meta[e].next)
        c->meta[e].leased = false;
    scan_leases(c);
    while (*at != CACHE_NONE) {
        uint32_t e = *at;

        if (c->meta[e].leased || c->meta[e].n_holds) {
            at = &c->meta[e].next;
            continue;
        }
        *at = c->meta[e].next;
        cache_free_entry(c, e);
    }
}

void cache_drop_corrupt(struct cache *c, uint32_t entry)
{
    uint32_t *list = NULL;
    size_t used = 0;

    c->n_corrupt++;
    if (c->meta[entry].state != ENTRY_VALID)
        return;
    if (gather_subtrees(c, &entry, 1, &list, &used) < 0) { /* no memory for the list: the bad block alone, its children orphans */
        while (c->meta[entry].first_child != CACHE_NONE)
            cache_unlink_child(c, c->meta[entry].first_child);
        list = &entry;
        used = 1;
    }
    for (size_t i = used; i-- > 0;) {
        uint32_t e = list[i];

        while (c->meta[e].first_child != CACHE_NONE) /* RESERVED children: on their own */
            cache_unlink_child(c, c->meta[e].first_child);
        if (c->meta[e].state != ENTRY_VALID)
            continue;
        retire(c, e);
        detach(c, e);
        c->meta[e].n_pins = 0;
        c->meta[e].state = ENTRY_ZOMBIE;
        c->meta[e].next = c->zombie_head;
        c->zombie_head = e;
    }
    if (list != &entry)
        free(list);
    cache_reap_zombies(c);
}
