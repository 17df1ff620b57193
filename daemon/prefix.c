#include "daemon/prefix.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "daemon/daemon.h"
#include "daemon/tenants.h"
#include "store/cache.h"

/* First block that a group needs for a prefix of n. */
static size_t need_from(const struct space *space, uint32_t group, size_t n)
{
    size_t w = (space->window_tokens[group] + space->block_tokens - 1) / space->block_tokens;

    return w == 0 || w >= n ? 0 : n - w;
}

static uint64_t held_by(const struct space *space, size_t n)
{
    uint64_t sum = 0;

    for (uint32_t g = 0; g < space->n_groups; g++)
        sum += n - need_from(space, g, n);
    return sum;
}

/* The longest prefix <= n for which at most this many blocks are held. */
static size_t clamp(const struct space *space, size_t n, uint64_t n_held_max)
{
    size_t lo = 0, hi = n;

    while (lo < hi) {
        size_t mid = lo + (hi - lo + 1) / 2;

        if (held_by(space, mid) <= n_held_max)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo;
}

/* Blocks that all full groups have. */
static size_t find_full(const struct cache *cache, const struct space *space, const uint8_t *keys, size_t n)
{
    for (size_t i = 0; i < n; i++)
        for (uint32_t g = 0; g < space->n_groups; g++)
            if (space_group_chained(space, g) && cache_find(cache, space->id, (uint8_t)g, keys + i * KEY_BYTES) == CACHE_NONE)
                return i;
    return n;
}

/* What the sliding groups make of it: a prefix that ends before the last block that is missing. Each block is looked up at most once a
 * group, but for those of a window. */
static size_t find_sliding(const struct cache *cache, const struct space *space, const uint8_t *keys, size_t n)
{
    size_t before;

    do {
        before = n;
        for (uint32_t g = 0; g < space->n_groups; g++) {
            if (space_group_chained(space, g))
                continue;
            for (size_t i = n; i-- > need_from(space, g, n);)
                if (cache_find(cache, space->id, (uint8_t)g, keys + i * KEY_BYTES) == CACHE_NONE)
                    n = i; /* and on from there, for the window that ends there */
        }
    } while (n != before);
    return n;
}

static int hold_group(struct prefix *p, uint32_t group, const uint8_t *keys)
{
    struct cache *cache = p->tenant->cache;
    struct prefix_group *g = &p->groups[group];
    uint32_t from = (uint32_t)need_from(p->space, group, p->n_blocks), n = p->n_blocks - from;

    g->from = p->n_blocks; /* nothing yet */
    g->blocks = calloc(n, sizeof(*g->blocks));
    if (!g->blocks)
        return -ENOMEM;
    g->from = from;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t e = cache_find(cache, p->space->id, (uint8_t)group, keys + (size_t)(from + i) * KEY_BYTES);
        struct cache_entry_info info;

        g->blocks[i].entry = CACHE_NONE;
        if (e == CACHE_NONE || !cache_hold(cache, e) || !cache_entry_brief(cache, e, &info))
            return -ENOENT;
        g->blocks[i] = (struct prefix_block){.payload = info.payload, .entry = e, .gen = info.gen, .crc32c = info.crc32c, .first = info.first};
        p->n_held++;
        cache_use(cache, e);
    }
    return 0;
}

static void give_back(struct prefix *p)
{
    for (uint32_t g = 0; g < p->space->n_groups; g++) {
        struct prefix_block *blocks = p->groups[g].blocks;

        for (uint32_t i = 0; blocks && i < p->n_blocks - p->groups[g].from && blocks[i].payload; i++)
            cache_unhold(p->tenant->cache, blocks[i].entry);
        free(blocks);
    }
}

int prefix_match(struct daemon *d, struct tenant *tenant, struct space *space, const uint8_t *keys, size_t n, uint64_t n_held_max,
                 struct prefix **ret)
{
    size_t found = find_full(tenant->cache, space, keys, n);
    struct prefix *p;
    int r = 0;

    found = find_sliding(tenant->cache, space, keys, clamp(space, found, n_held_max));
    *ret = NULL;
    if (found == 0)
        return 0;
    p = calloc(1, sizeof(*p));
    if (!p)
        return -ENOMEM;
    *p = (struct prefix){.n_refs = 1, .daemon = d, .tenant = tenant_ref(tenant), .space = space, .n_blocks = (uint32_t)found};
    for (uint32_t g = 0; g < space->n_groups && r == 0; g++)
        r = hold_group(p, g, keys);
    if (r < 0) {
        prefix_unref(p);
        return r == -ENOENT ? 0 : r; /* held by too many: a miss */
    }
    *ret = p;
    return 0;
}

struct prefix *prefix_ref(struct prefix *p)
{
    p->n_refs++;
    return p;
}

struct prefix *prefix_unref(struct prefix *p)
{
    if (p && --p->n_refs == 0) {
        give_back(p);
        tenant_unref(p->daemon, p->tenant);
        free(p);
    }
    return NULL;
}
