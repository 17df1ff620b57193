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
    if (n == 0)
        return;
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
    if (m->n_pins)
        ret->kept_pinned++;
    else if (m->n_holds)
        ret->kept_leased++;
    else if (m->n_children)
        ret->kept_parents++;
    else
        return true;
    return false;
}

void cache_evict(struct cache *c, const uint32_t *entries, size_t n, bool (*want)(void *ctx, uint32_t entry), void *ctx,
                 uint64_t max_bytes, struct cache_evicted *ret)
{
    uint32_t batch[EVICT_BATCH_MAX], up = CACHE_NONE; /* up: parent of what has just retired */

    while ((n > 0 || up != CACHE_NONE) && (!max_bytes || ret->bytes < max_bytes)) {
        uint64_t bytes = ret->bytes;
        size_t here = 0;

        while (here < EVICT_BATCH_MAX && (!max_bytes || bytes < max_bytes)) {
            uint32_t e = up;

            /* Up the chain as far as it is wanted (a retiring child no longer counts), then on with the next one. */
            up = CACHE_NONE;
            if (e == CACHE_NONE || c->meta[e].state != ENTRY_VALID || c->meta[e].n_children || !want(ctx, e)) {
                if (n == 0)
                    break;
                n--;
                e = *entries++;
            }
            if (!may_retire(c, e, ret))
                continue;
            bytes += entry_bytes(c, e);
            retire(c, e);
            batch[here++] = e;
            up = want ? c->meta[e].parent : CACHE_NONE;
        }
        conclude(c, batch, here, ret);
    }
    cache_reap_zombies(c);
}

/* ---- making room ---- */

enum { ROUNDS_MAX = 8, LOOKS_MAX = 16384, SLAB_UNIT = 2 << 20 };

/* As many as go at once when one more is wanted: one scan of the lease tables serves them all. */
static uint64_t batch_for(uint64_t n_blocks)
{
    return n_blocks / 64 + 1 < EVICT_BATCH_MAX ? n_blocks / 64 + 1 : EVICT_BATCH_MAX;
}

/* After a batch of which every block was leased. */
static uint64_t more_than(uint64_t batch)
{
    return batch * 2 < EVICT_BATCH_MAX ? batch * 2 : EVICT_BATCH_MAX;
}

/* Takes victims from the policy, want at most. ret_asked: how many there were, leased ones included. */
static uint64_t evict_some(struct cache *c, uint64_t want, uint64_t *ret_asked)
{
    uint32_t batch[EVICT_BATCH_MAX];
    struct cache_evicted done = {0};
    size_t n = 0;

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
    *ret_asked = n;
    return done.blocks;
}

/* Evicts by the policy. Where leases are in the way it asks for more and more. False: there is nothing more to ask for. */
static bool evict_round(struct cache *c, uint64_t *want)
{
    uint64_t asked;

    if (evict_some(c, *want, &asked) == 0)
        *want = more_than(*want);
    return asked > 0;
}

int cache_room_for_entry(struct cache *c)
{
    uint64_t want = batch_for(c->n_valid);

    if (c->n_free)
        return 0;
    cache_drain_hits(c);
    for (int round = 0; round < ROUNDS_MAX && !c->n_free; round++)
        if (!evict_round(c, &want))
            break;
    return c->n_free ? 0 : -ENOSPC;
}

struct entry_list {
    uint32_t *entries;
    size_t n, room;
};

static int list_add(struct cache *c, struct entry_list *l, uint32_t e)
{
    if (c->meta[e].listed)
        return 0;
    if (l->n == l->room) {
        size_t room = l->room ? l->room * 2 : 256;
        uint32_t *grown = realloc(l->entries, room * sizeof(*grown));

        if (!grown)
            return -ENOMEM;
        l->entries = grown;
        l->room = room;
    }
    c->meta[e].listed = true;
    l->entries[l->n++] = e;
    return 0;
}

/* Adds a VALID entry and all below it that is not listed yet, children before their parents. */
static int list_subtree(struct cache *c, struct entry_list *l, uint32_t top)
{
    size_t from = l->n;
    int r = list_add(c, l, top);

    for (size_t at = from; r == 0 && at < l->n; at++)
        for (uint32_t e = c->meta[l->entries[at]].first_child; e != CACHE_NONE && r == 0; e = c->meta[e].next_sibling)
            r = list_add(c, l, e);
    for (size_t i = from, k = l->n; i + 1 < k; i++) { /* it came level by level from the top */
        uint32_t e = l->entries[i];

        l->entries[i] = l->entries[--k];
        l->entries[k] = e;
    }
    return r;
}

/* Entries of owners[] and all that descends from them, each once, in the order in which they may go. On success entries are the
 * caller's to free, and still marked as listed. */
static int gather_subtrees(struct cache *c, const uint32_t *owners, uint32_t n, struct entry_list *ret)
{
    int r = 0;

    *ret = (struct entry_list){0};
    for (uint32_t i = 0; i < n && r == 0; i++)
        if (c->meta[owners[i]].state == ENTRY_VALID)
            r = list_subtree(c, ret, owners[i]);
    return r;
}

static void list_done(struct cache *c, struct entry_list *l)
{
    for (size_t i = 0; i < l->n; i++)
        c->meta[l->entries[i]].listed = false;
}

/* Does anything keep one of the listed entries? A look ahead: a lease that comes later is found when they retire. */
static bool list_is_kept(const struct cache *c, const struct entry_list *l)
{
    for (size_t i = 0; i < l->n; i++) {
        const struct meta *m = &c->meta[l->entries[i]];

        if (m->state != ENTRY_VALID || m->n_pins || m->n_holds)
            return true;
    }
    for (uint32_t i = 0; i < c->n_pages; i++)
        for (uint32_t k = 0; k < c->pages[i]->n_leases; k++) {
            uint64_t ref = atomic_load_explicit(&c->pages[i]->leases[k], memory_order_relaxed);
            uint32_t e = shm_ref_entry(ref);

            if (ref != 0 && e < c->config.n_entries && c->meta[e].listed && index_gen(&c->index, e) == shm_ref_gen(ref))
                return true;
        }
    return false;
}

/* Evicts all owners of a slab's slots and what descends from them, or, if one of them has to stay, none: the slab is of no use
 * then. False: none. */
static bool evict_owners(struct cache *c, const uint32_t *owners, uint32_t n)
{
    struct cache_evicted done = {0};
    uint32_t batch[EVICT_BATCH_MAX];
    struct entry_list list;
    size_t here = 0;
    bool go = gather_subtrees(c, owners, n, &list) == 0;

    for (uint32_t i = 0; i < n && go; i++) /* being encoded, or found bad and leased */
        go = c->meta[owners[i]].state == ENTRY_VALID;
    go = go && !list_is_kept(c, &list);
    list_done(c, &list);
    for (size_t i = 0; i < list.n && go; i++) {
        uint32_t e = list.entries[i];

        if (may_retire(c, e, &done)) {
            retire(c, e);
            batch[here++] = e;
        }
        if (here == EVICT_BATCH_MAX || (i + 1 == list.n && here > 0)) {
            conclude(c, batch, here, &done);
            here = 0;
        }
    }
    free(list.entries);
    return go;
}

/* Room for the owners of any slab's slots. */
static uint32_t *owners_alloc(const struct cache *c)
{
    struct tier_info info;

    c->tier->info(c->host, &info);
    return malloc((info.slab_slots_max ? info.slab_slots_max : 1) * sizeof(uint32_t));
}

/* No block of this size leaves soon enough: empties the slab of another size that costs least, to be cut anew. */
static int steal_slab(struct cache *c, uint64_t bytes, uint32_t owner, uint64_t *ret_loc)
{
    uint32_t *owners = owners_alloc(c), n;
    int r = -ENOSPC;

    if (!owners)
        return -ENOMEM;
    c->attempt++;
    for (int i = 0; i < ROUNDS_MAX && r == -ENOSPC && c->tier->cheapest(c->host, bytes, c->attempt, owners, &n) >= 0; i++)
        if (evict_owners(c, owners, n))
            r = c->tier->reserve(c->host, bytes, owner, ret_loc);
    free(owners);
    return r;
}

int cache_room_for_slot(struct cache *c, uint64_t bytes, uint32_t owner, uint64_t *ret_loc)
{
    uint64_t want = batch_for(c->n_valid);
    int r = c->tier->reserve(c->host, bytes, owner, ret_loc);

    if (r != -ENOSPC)
        return r;
    cache_drain_hits(c);
    for (int round = 0; round < ROUNDS_MAX && r == -ENOSPC; round++) {
        if (round > 0 && !c->tier->has_class(c->host, bytes))
            break;
        if (!evict_round(c, &want))
            break;
        r = c->tier->reserve(c->host, bytes, owner, ret_loc);
    }
    if (r == -ENOSPC)
        r = steal_slab(c, bytes, owner, ret_loc);
    if (r == -ENOSPC && bytes > c->config.slab_bytes) { /* the others are too small: as much of them as one for it takes */
        struct tier_info info;
        uint64_t slab = (bytes + SLAB_UNIT - 1) / SLAB_UNIT * SLAB_UNIT;

        c->tier->info(c->host, &info);
        cache_shrink(c, info.slab_bytes > slab ? info.slab_bytes - slab : 0);
        r = c->tier->reserve(c->host, bytes, owner, ret_loc);
    }
    return r;
}

/* Evicts a batch of the space's oldest blocks that nothing hangs on, and those above that are then such. What is passed over goes to
 * the end of the list, so that the next look is at others. False: there was none. */
static bool evict_oldest(struct cache *c, struct space_slot *s, uint64_t *want)
{
    uint64_t looks = s->n_blocks < LOOKS_MAX ? s->n_blocks : LOOKS_MAX;
    struct cache_evicted done = {0};
    uint32_t batch[EVICT_BATCH_MAX];
    size_t n = 0;

    for (; n < *want && looks > 0; looks--) {
        uint32_t e = s->oldest;

        cache_space_list_remove(c, e);
        cache_space_list_add(c, e);
        for (; n < *want && e != CACHE_NONE && may_retire(c, e, &done); e = c->meta[e].parent) {
            retire(c, e);
            batch[n++] = e;
        }
    }
    conclude(c, batch, n, &done);
    if (done.blocks == 0)
        *want = more_than(*want);
    return n > 0;
}

int cache_room_in_space(struct cache *c, struct space_slot *s, uint64_t bytes)
{
    uint64_t quota = c->config.space_quota_bytes, want = batch_for(s->n_blocks);

    if (!quota || s->bytes + bytes <= quota)
        return 0;
    if (bytes > quota)
        return -EDQUOT;
    for (int round = 0; round < ROUNDS_MAX && s->bytes + bytes > quota; round++)
        if (!evict_oldest(c, s, &want) && s->n_blocks <= LOOKS_MAX)
            break;
    return s->bytes + bytes <= quota ? 0 : -EDQUOT;
}

uint64_t cache_shrink(struct cache *c, uint64_t target_bytes)
{
    uint64_t given = c->tier->trim(c->host);
    uint32_t *owners = owners_alloc(c), n;
    struct tier_info info;

    c->attempt++;
    for (;;) {
        c->tier->info(c->host, &info);
        if (!owners || info.slab_bytes <= target_bytes || c->tier->cheapest(c->host, 0, c->attempt, owners, &n) < 0)
            break;
        if (evict_owners(c, owners, n))
            given += c->tier->trim(c->host);
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
    struct entry_list list = {0};
    uint32_t *entries = &entry;
    size_t n = 1;

    c->n_corrupt++;
    if (c->meta[entry].state != ENTRY_VALID)
        return;
    if (gather_subtrees(c, &entry, 1, &list) == 0) { /* else no memory for the list: the bad block alone, its children orphans */
        entries = list.entries;
        n = list.n;
    }
    list_done(c, &list);
    for (size_t i = 0; i < n; i++) {
        uint32_t e = entries[i];

        while (c->meta[e].first_child != CACHE_NONE) /* RESERVED children, or without a list all: on their own */
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
    free(list.entries);
    cache_reap_zombies(c);
}
