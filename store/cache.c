/* Life of a cache, its spaces, and the way of a block from reservation to visibility. */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "store/cache-internal.h"
#include "store/tier/host.h"

#define CACHE_MAGIC 0x6b766463u /* "kvdc" */
#define ROOT_PARENT CACHE_NONE

uint32_t cache_now_ds(const struct cache *c)
{
    return (uint32_t)((c->config.now_usec(c->config.now_ctx) - c->born_usec) / 100000);
}

static int init_parts(struct cache *c)
{
    char name[64];
    int r;

    c->tenant = strdup(c->config.tenant);
    c->domain = strdup(c->config.domain);
    c->meta = calloc(c->config.n_entries, sizeof(*c->meta));
    c->spaces = calloc(c->config.n_spaces_max, sizeof(*c->spaces));
    if (!c->tenant || !c->domain || !c->meta || !c->spaces)
        return -ENOMEM;
    c->config.tenant = c->tenant;
    c->config.domain = c->domain;
    r = key_hasher_create(&c->hasher);
    if (r < 0)
        return r;
    r = c->config.policy->create(c->config.n_entries, &c->policy);
    if (r < 0)
        return r;
    r = host_create(c->tenant, c->config.budget, c->config.quota_bytes, c->config.slab_bytes, &c->host);
    if (r < 0)
        return r;
    snprintf(name, sizeof(name), "kvd-index-%.40s", c->tenant);
    return index_init(&c->index, name, c->config.n_entries);
}

int cache_create(const struct cache_config *config, struct cache **ret)
{
    struct cache *c;
    int r;

    if (config->n_entries == 0 || config->n_entries > SHM_ENTRIES_MAX || config->n_spaces_max == 0 ||
        config->n_spaces_max > UINT16_MAX || config->slab_bytes == 0)
        return -EINVAL;
    c = calloc(1, sizeof(*c));
    if (!c)
        return -ENOMEM;
    c->magic = CACHE_MAGIC;
    c->config = *config;
    c->tier = &host_tier_ops;
    c->index.memory.fd = -1;
    c->born_usec = config->now_usec(config->now_ctx);
    c->zombie_head = CACHE_NONE;
    r = init_parts(c);
    if (r < 0) {
        cache_destroy(c);
        return r;
    }
    for (uint32_t i = 0; i < PENDING_BUCKETS; i++)
        c->pending[i] = CACHE_NONE;
    for (uint32_t e = 0; e < config->n_entries; e++) {
        c->meta[e].next = e + 1 < config->n_entries ? e + 1 : CACHE_NONE;
        c->meta[e].parent = c->meta[e].first_child = CACHE_NONE;
    }
    c->n_free = config->n_entries;
    *ret = c;
    return 0;
}

struct cache *cache_destroy(struct cache *c)
{
    if (!c)
        return NULL;
    assert(c->n_pages == 0);
    index_deinit(&c->index);
    c->tier->destroy(c->host);
    if (c->policy)
        c->config.policy->destroy(c->policy);
    for (uint32_t i = 0; i < c->n_spaces; i++)
        space_destroy(c->spaces[i].space);
    key_hasher_destroy(c->hasher);
    free(c->pages);
    free(c->spaces);
    free(c->meta);
    free(c->tenant);
    free(c->domain);
    free(c);
    return NULL;
}

int cache_index_fd(const struct cache *c, uint64_t *ret_bytes)
{
    *ret_bytes = c->index.memory.bytes;
    return c->index.memory.fd;
}

uint64_t cache_epoch(const struct cache *c)
{
    return c->index.header->epoch;
}

int cache_slab_fd(const struct cache *c, uint32_t slab, uint64_t *ret_bytes)
{
    return host_slab_fd(c->host, slab, ret_bytes);
}

void cache_set_quota(struct cache *c, uint64_t quota_bytes)
{
    c->config.quota_bytes = quota_bytes;
    c->tier->set_limit(c->host, quota_bytes);
}

bool cache_spare_wanted(const struct cache *c, uint64_t *ret_bytes)
{
    return host_spare_wanted(c->host, ret_bytes);
}

void cache_spare_give(struct cache *c, struct slab_memory *memory)
{
    host_spare_give(c->host, memory);
}

/* ---- spaces ---- */

int cache_space_open(struct cache *c, const struct space_desc *desc, struct space **ret_space, const char **ret_reason)
{
    struct space *space;
    int r = space_create(desc, c->domain, c->hasher, &space, ret_reason);

    if (r < 0)
        return r;
    for (uint32_t i = 0; i < c->n_spaces; i++) {
        if (memcmp(c->spaces[i].space->fingerprint, space->fingerprint, KEY_BYTES) != 0)
            continue;
        space_destroy(space);
        c->spaces[i].n_open++;
        *ret_space = c->spaces[i].space;
        return 0;
    }
    if (c->n_spaces >= c->config.n_spaces_max) {
        space_destroy(space);
        *ret_reason = "the tenant has as many spaces as spaces_max allows";
        return -ENOSPC;
    }
    space->id = c->n_spaces + 1; /* ids are never reused while the index lives (rule I1) */
    c->spaces[c->n_spaces] = (struct space_slot){.space = space, .n_open = 1, .oldest = CACHE_NONE, .newest = CACHE_NONE};
    atomic_store_explicit(&c->n_spaces, space->id, memory_order_release);
    *ret_space = space;
    return 0;
}

void cache_space_close(struct cache *c, struct space *space)
{
    assert(space_slot_of(c, space->id)->n_open > 0);
    space_slot_of(c, space->id)->n_open--;
}

struct space *cache_space_find(const struct cache *c, uint32_t id)
{
    return id >= 1 && id <= atomic_load_explicit(&c->n_spaces, memory_order_acquire) ? c->spaces[id - 1].space : NULL;
}

void cache_space_stats(const struct cache *c, const struct space *space, struct cache_space_stats *ret)
{
    const struct space_slot *s = space_slot_of(c, space->id);

    *ret = (struct cache_space_stats){.n_blocks = s->n_blocks, .bytes = s->bytes, .n_open = s->n_open};
}

void cache_space_list_add(struct cache *c, uint32_t e)
{
    struct space_slot *s = entry_space(c, e);

    c->meta[e].next = CACHE_NONE;
    c->meta[e].prev = s->newest;
    if (s->newest != CACHE_NONE)
        c->meta[s->newest].next = e;
    else
        s->oldest = e;
    s->newest = e;
    s->n_blocks++;
}

void cache_space_list_remove(struct cache *c, uint32_t e)
{
    struct space_slot *s = entry_space(c, e);
    struct meta *m = &c->meta[e];

    if (m->prev != CACHE_NONE)
        c->meta[m->prev].next = m->next;
    else
        s->oldest = m->next;
    if (m->next != CACHE_NONE)
        c->meta[m->next].prev = m->prev;
    else
        s->newest = m->prev;
    s->n_blocks--;
}

/* ---- family ---- */

void cache_settle(struct cache *c, uint32_t e)
{
    struct meta *m = &c->meta[e];
    bool park = m->n_children || m->n_pins || m->n_holds;

    if (m->state != ENTRY_VALID || !m->in_policy || m->pending_answer || park == m->parked)
        return;
    m->parked = park;
    if (park)
        c->config.policy->park(c->policy, e);
    else
        c->config.policy->unpark(c->policy, e);
}

/* CACHE_NONE as parent is allowed. */
static void link_child(struct cache *c, uint32_t parent, uint32_t child)
{
    struct meta *m = &c->meta[child];

    m->parent = parent;
    m->prev_sibling = m->next_sibling = CACHE_NONE;
    if (parent == CACHE_NONE)
        return;
    m->next_sibling = c->meta[parent].first_child;
    if (m->next_sibling != CACHE_NONE)
        c->meta[m->next_sibling].prev_sibling = child;
    c->meta[parent].first_child = child;
    c->meta[parent].n_children++;
    cache_settle(c, parent);
}

void cache_unlink_child(struct cache *c, uint32_t child)
{
    struct meta *m = &c->meta[child];
    uint32_t parent = m->parent;

    if (parent == CACHE_NONE)
        return;
    if (m->prev_sibling != CACHE_NONE)
        c->meta[m->prev_sibling].next_sibling = m->next_sibling;
    else
        c->meta[parent].first_child = m->next_sibling;
    if (m->next_sibling != CACHE_NONE)
        c->meta[m->next_sibling].prev_sibling = m->prev_sibling;
    m->parent = CACHE_NONE;
    if (m->state != ENTRY_RETIRING) { /* a retiring child was not counted any more */
        c->meta[parent].n_children--;
        cache_settle(c, parent);
    }
}

void cache_free_entry(struct cache *c, uint32_t e)
{
    uint64_t loc = atomic_load_explicit(&entry_of(c, e)->host, memory_order_relaxed);

    assert(c->meta[e].n_children == 0 && c->meta[e].first_child == CACHE_NONE);
    if (loc != SHM_LOC_NONE)
        c->tier->release(c->host, loc);
    atomic_store_explicit(&entry_of(c, e)->host, SHM_LOC_NONE, memory_order_relaxed);
    c->meta[e] = (struct meta){.parent = CACHE_NONE, .first_child = CACHE_NONE, .next = c->free_head};
    c->free_head = e;
    c->n_free++;
}

/* ---- publish ---- */

static uint32_t *pending_bucket(struct cache *c, const uint8_t *key, uint16_t space, uint8_t group)
{
    return &c->pending[lookup_hash(c->index.view.seed, key, space, group) % PENDING_BUCKETS];
}

static uint32_t find_pending(struct cache *c, const uint8_t *key, uint16_t space, uint8_t group)
{
    uint32_t e = *pending_bucket(c, key, space, group);

    for (; e != CACHE_NONE; e = c->meta[e].next)
        if (memcmp(entry_of(c, e)->key, key, KEY_BYTES) == 0 && entry_of(c, e)->space == space &&
            entry_of(c, e)->group == group)
            return e;
    return CACHE_NONE;
}

static void pending_add(struct cache *c, uint32_t e)
{
    uint32_t *head = pending_bucket(c, entry_of(c, e)->key, entry_of(c, e)->space, entry_of(c, e)->group);

    c->meta[e].next = *head;
    *head = e;
}

static void pending_remove(struct cache *c, uint32_t e)
{
    uint32_t *at = pending_bucket(c, entry_of(c, e)->key, entry_of(c, e)->space, entry_of(c, e)->group);

    while (*at != e)
        at = &c->meta[*at].next;
    *at = c->meta[e].next;
}

uint32_t cache_find(const struct cache *c, uint32_t space, uint8_t group, const uint8_t key[KEY_BYTES])
{
    struct lookup_hit hit;

    return lookup_find(&c->index.view, key, (uint16_t)space, group, &hit) ? hit.entry : CACHE_NONE;
}

/* The parent's entry: ROOT_PARENT for a first block or a group without chains. False: it is not here. */
static bool find_parent(struct cache *c, const struct space *space, uint8_t group, const uint8_t *parent, bool first,
                        uint32_t *ret)
{
    *ret = ROOT_PARENT;
    if (first || !space_group_chained(space, group))
        return true;
    *ret = cache_find(c, space->id, group, parent);
    if (*ret == CACHE_NONE)
        *ret = find_pending(c, parent, (uint16_t)space->id, group);
    return *ret != CACHE_NONE;
}

int cache_reserve(struct cache *c, struct space *space, uint8_t group, const uint8_t key[KEY_BYTES],
                  const uint8_t parent[KEY_BYTES], bool first, struct cache_slot *ret_slot)
{
    struct space_slot *s = space_slot_of(c, space->id);
    uint32_t e, up;
    uint64_t bytes, loc;
    int r;

    assert(c->magic == CACHE_MAGIC && group < space->n_groups);
    first = first || memcmp(parent, space->fingerprint, KEY_BYTES) == 0;
    bytes = space_layout(space, group, first)->bytes;
    e = cache_find(c, space->id, group, key);
    if (e != CACHE_NONE) {
        c->meta[e].last_use_ds = cache_now_ds(c);
        return CACHE_PRESENT;
    }
    if (find_pending(c, key, (uint16_t)space->id, group) != CACHE_NONE)
        return CACHE_IN_PROGRESS;
    if (!find_parent(c, space, group, parent, first, &up))
        return CACHE_NO_PARENT;
    if (up != ROOT_PARENT) { /* so that making room does not take the parent */
        c->meta[up].n_holds++;
        cache_settle(c, up);
    }
    r = cache_room_in_space(c, s, bytes);
    if (r == 0)
        r = cache_room_for_entry(c);
    if (r == 0) {
        e = c->free_head;
        r = cache_room_for_slot(c, bytes, e, &loc);
    }
    if (r == 0) {
        assert(e == c->free_head || c->n_free > 0);
        e = c->free_head; /* making room frees entries: the slot's owner is set below */
    }
    if (up != ROOT_PARENT) {
        c->meta[up].n_holds--;
        cache_settle(c, up);
    }
    if (r < 0) {
        c->n_full++;
        return r;
    }
    c->tier->set_owner(c->host, loc, e);
    c->free_head = c->meta[e].next;
    c->n_free--;
    c->meta[e] = (struct meta){.parent = CACHE_NONE, .first_child = CACHE_NONE, .state = ENTRY_RESERVED,
                               .born_ds = cache_now_ds(c)};
    c->meta[e].last_use_ds = c->meta[e].born_ds;
    index_fill(&c->index, e, key, (uint16_t)space->id, group, first ? SHM_ENTRY_FIRST : 0, (uint32_t)bytes, 0, loc);
    pending_add(c, e);
    link_child(c, up, e);
    c->n_reserved++;
    c->bytes_used += bytes;
    s->bytes += bytes;
    *ret_slot = (struct cache_slot){.space = space, .entry = e, .group = group, .first = first,
                                    .payload = c->tier->at(c->host, loc), .bytes = bytes};
    return CACHE_RESERVED;
}

/* A child that waits for a parent that will not come: on its own from now on. Its key says what it holds, so it is right all the
 * same, and found again once the parent is. */
static void orphan_children(struct cache *c, uint32_t e)
{
    while (c->meta[e].first_child != CACHE_NONE)
        cache_unlink_child(c, c->meta[e].first_child);
}

void cache_abort(struct cache *c, struct cache_slot *slot)
{
    uint32_t e = slot->entry;

    assert(c->meta[e].state == ENTRY_RESERVED);
    pending_remove(c, e);
    orphan_children(c, e);
    cache_unlink_child(c, e);
    c->n_reserved--;
    c->n_aborted++;
    c->bytes_used -= slot->bytes;
    space_slot_of(c, slot->space->id)->bytes -= slot->bytes;
    cache_free_entry(c, e);
    slot->payload = NULL;
}

int cache_commit(struct cache *c, struct cache_slot *slot)
{
    uint32_t e = slot->entry;
    struct meta *m = &c->meta[e];
    const uint8_t *key = entry_of(c, e)->key;
    int r;

    assert(m->state == ENTRY_RESERVED);
    atomic_store_explicit(&entry_of(c, e)->crc32c, slot->crc32c, memory_order_relaxed);
    pending_remove(c, e);
    r = index_publish(&c->index, e);
    if (r < 0) {
        pending_add(c, e);
        cache_abort(c, slot);
        c->n_full++;
        return r;
    }
    m->state = ENTRY_VALID;
    c->n_reserved--;
    c->n_valid++;
    c->n_published++;
    cache_space_list_add(c, e);
    m->in_policy = true;
    c->config.policy->insert(c->policy, e, lookup_hash(c->index.view.seed, key, entry_of(c, e)->space, entry_of(c, e)->group));
    cache_settle(c, e);
    slot->payload = NULL;
    return 0;
}
