/* Looking at a cache: entries, pins, holds, pages, counts, and its invariants. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "store/cache-internal.h"
#include "store/tier/host.h"

/* ---- readers in other threads ---- */

const struct lookup_view *cache_view(const struct cache *c)
{
    return &c->index.view;
}

const void *cache_leased_at(const struct cache *c, uint64_t host)
{
    return host_leased_at(c->host, host);
}

_Atomic uint32_t *cache_awake_word(const struct cache *c)
{
    return &c->index.header->attend_awake;
}

/* ---- pages ---- */

int cache_page_add(struct cache *c, struct cache_page *page)
{
    struct cache_page **grown = realloc(c->pages, (c->n_pages + 1) * sizeof(*grown));

    assert(page->n_log > 0 && (page->n_log & (page->n_log - 1)) == 0);
    if (!grown)
        return -ENOMEM;
    c->pages = grown;
    c->pages[c->n_pages++] = page;
    page->log_seen = atomic_load_explicit(&page->header->log_head, memory_order_relaxed);
    return 0;
}

void cache_page_remove(struct cache *c, struct cache_page *page)
{
    for (uint32_t i = 0; i < c->n_pages; i++)
        if (c->pages[i] == page) {
            c->pages[i] = c->pages[--c->n_pages];
            cache_reap_zombies(c);
            return;
        }
    assert(!"a page that was added");
}

static bool is_lease_of(const struct cache *c, uint64_t ref, uint32_t *ret_entry)
{
    uint32_t e = shm_ref_entry(ref);

    *ret_entry = e;
    return ref != 0 && e < c->config.n_entries && c->meta[e].state >= ENTRY_VALID &&
           (index_gen(&c->index, e) & ~1u) == shm_ref_gen(ref);
}

uint64_t cache_page_leases(const struct cache *c, const struct cache_page *page)
{
    uint64_t n = 0;
    uint32_t e;

    for (uint32_t k = 0; k < page->n_leases; k++)
        n += is_lease_of(c, atomic_load_explicit(&page->leases[k], memory_order_relaxed), &e);
    return n;
}

static uint32_t count_leases(const struct cache *c, uint32_t entry)
{
    uint32_t n = 0, e;

    for (uint32_t i = 0; i < c->n_pages; i++)
        for (uint32_t k = 0; k < c->pages[i]->n_leases; k++)
            n += is_lease_of(c, atomic_load_explicit(&c->pages[i]->leases[k], memory_order_relaxed), &e) && e == entry;
    return n;
}

/* ---- entries ---- */

uint32_t cache_n_entries(const struct cache *c)
{
    return c->config.n_entries;
}

static void parent_key(const struct cache *c, uint32_t e, uint8_t ret[KEY_BYTES])
{
    const struct shm_entry *x = entry_of(c, e);

    memset(ret, 0, KEY_BYTES);
    if (c->meta[e].parent != CACHE_NONE)
        memcpy(ret, entry_of(c, c->meta[e].parent)->key, KEY_BYTES);
    else if (x->flags & SHM_ENTRY_FIRST)
        memcpy(ret, entry_space(c, e)->space->fingerprint, KEY_BYTES);
}

bool cache_entry_brief(const struct cache *c, uint32_t e, struct cache_entry_info *ret)
{
    const struct meta *m = &c->meta[e];
    const struct shm_entry *x = entry_of(c, e);
    uint32_t now = cache_now_ds(c);

    if (e >= c->config.n_entries || m->state != ENTRY_VALID)
        return false;
    *ret = (struct cache_entry_info){
        .entry = e,
        .gen = index_gen(&c->index, e),
        .space = x->space,
        .group = x->group,
        .first = x->flags & SHM_ENTRY_FIRST,
        .bytes = x->bytes,
        .crc32c = x->crc32c,
        .n_children = m->n_children,
        .n_pins = m->n_pins,
        .idle_usec = (uint64_t)(now - m->last_use_ds) * 100000,
        .age_usec = (uint64_t)(now - m->born_ds) * 100000,
        .payload = c->tier->at(c->host, x->host),
        .is_leaf = m->n_children == 0,
        .parent_entry = m->parent,
    };
    memcpy(ret->key, x->key, KEY_BYTES);
    parent_key(c, e, ret->parent);
    return true;
}

bool cache_entry_info(const struct cache *c, uint32_t e, struct cache_entry_info *ret)
{
    if (!cache_entry_brief(c, e, ret))
        return false;
    ret->n_leases = count_leases(c, e) + c->meta[e].n_holds;
    return true;
}

void cache_pin(struct cache *c, uint32_t e, bool unpin, uint64_t *ret_blocks, uint64_t *ret_bytes)
{
    *ret_blocks = *ret_bytes = 0;
    for (; e != CACHE_NONE; e = c->meta[e].parent) {
        struct meta *m = &c->meta[e];

        if (m->state != ENTRY_VALID || (unpin ? m->n_pins == 0 : m->n_pins == UINT32_MAX))
            continue;
        m->n_pins += unpin ? UINT32_MAX : 1;
        cache_settle(c, e);
        (*ret_blocks)++;
        *ret_bytes += entry_bytes(c, e);
    }
}

bool cache_hold(struct cache *c, uint32_t e)
{
    if (e >= c->config.n_entries || c->meta[e].state != ENTRY_VALID || c->meta[e].n_holds == UINT16_MAX)
        return false;
    c->meta[e].n_holds++;
    cache_settle(c, e);
    return true;
}

void cache_unhold(struct cache *c, uint32_t e)
{
    assert(c->meta[e].n_holds > 0);
    c->meta[e].n_holds--;
    if (c->meta[e].state == ENTRY_ZOMBIE)
        cache_reap_zombies(c);
    else
        cache_settle(c, e);
}

void cache_use(struct cache *c, uint32_t e)
{
    assert(c->meta[e].state == ENTRY_VALID);
    c->meta[e].last_use_ds = cache_now_ds(c);
    c->config.policy->hit(c->policy, e);
}

void cache_stats(const struct cache *c, struct cache_stats *ret)
{
    struct tier_info host;

    c->tier->info(c->host, &host);
    *ret = (struct cache_stats){
        .n_valid = c->n_valid,
        .n_reserved = c->n_reserved,
        .bytes_used = c->bytes_used,
        .slab_bytes = host.slab_bytes,
        .n_slabs = host.n_slabs,
        .quota_bytes = host.limit_bytes,
        .n_published = c->n_published,
        .n_evicted = c->n_evicted,
        .evicted_bytes = c->evicted_bytes,
        .n_aborted = c->n_aborted,
        .n_corrupt = c->n_corrupt,
        .n_full = c->n_full,
        .n_leased_kept = c->n_leased_kept,
        .n_hits_logged = c->n_hits_logged,
        .n_hits_lost = c->n_hits_lost,
        .index_bytes = c->index.memory.bytes,
        .meta_bytes = (uint64_t)c->config.n_entries * (sizeof(struct meta) + POLICY_BYTES_PER_ID) + host.meta_bytes,
        .n_spaces = c->n_spaces,
        .n_entries = c->config.n_entries,
    };
}

/* ---- invariants ---- */

static void assert_entry(const struct cache *c, uint32_t e)
{
    const struct meta *m = &c->meta[e];
    const struct shm_entry *x = entry_of(c, e);
    uint32_t n_children = 0;

    if (m->state == ENTRY_FREE) {
        assert((index_gen(&c->index, e) & 1) && m->first_child == CACHE_NONE && m->n_children == 0);
        return;
    }
    for (uint32_t k = m->first_child; k != CACHE_NONE; k = c->meta[k].next_sibling, n_children++)
        assert(c->meta[k].parent == e && (c->meta[k].state == ENTRY_VALID || c->meta[k].state == ENTRY_RESERVED));
    assert(n_children == m->n_children);
    if (m->state == ENTRY_VALID) {
        assert(cache_find(c, x->space, x->group, x->key) == e);                                    /* C1 */
        assert(m->in_policy && m->parked == (m->n_children || m->n_pins || m->n_holds));           /* C3 */
        assert(m->parent == CACHE_NONE || c->meta[m->parent].state == ENTRY_VALID ||
               c->meta[m->parent].state == ENTRY_RESERVED); /* C2 */
    }
    assert(m->state != ENTRY_RETIRING);
    assert(c->tier->owner(c->host, x->host) == e); /* C5 */
}

void cache_assert_valid(const struct cache *c)
{
    uint64_t n[ENTRY_ZOMBIE + 1] = {0}, bytes = 0, of_spaces = 0;
    struct tier_info host;

    for (uint32_t e = 0; e < c->config.n_entries; e++) {
        assert_entry(c, e);
        n[c->meta[e].state]++;
        if (c->meta[e].state == ENTRY_VALID || c->meta[e].state == ENTRY_RESERVED)
            bytes += entry_bytes(c, e);
    }
    for (uint32_t i = 0; i < c->n_spaces; i++)
        of_spaces += c->spaces[i].bytes;
    c->tier->info(c->host, &host);
    assert(n[ENTRY_FREE] == c->n_free && n[ENTRY_VALID] == c->n_valid && n[ENTRY_RESERVED] == c->n_reserved);
    assert(bytes == c->bytes_used && bytes == of_spaces); /* C4 */
    assert(host.n_slots == c->config.n_entries - c->n_free);
    assert(c->policy->n_present == c->n_valid);
    index_assert_valid(&c->index);
    host_assert_valid(c->host);
    c->config.policy->assert_valid(c->policy);
}
