#include "store/tier/host.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HOST_SLABS_MAX 65535u
#define FREE_END UINT32_MAX

struct host_slab {
    struct slab_memory memory; /* map NULL: given back */
    uint64_t slot_bytes;       /* 0: not cut */
    uint32_t n_slots, n_used;
    uint32_t free_head;        /* free slots, chained through owner[] */
    uint32_t *owner;           /* in use: the owner; free: next free slot */
    uint8_t *in_use;           /* a byte a slot */
    uint32_t next, prev;       /* in the class's list, FREE_END at the ends */
    uint64_t attempt;          /* the last that it was named in as cheapest */
    bool listed;
};

struct host_class {
    uint64_t slot_bytes;
    uint32_t head; /* slabs with a free slot */
    uint32_t n_slabs;
};

struct tier {
    char name[48];
    struct budget *budget;
    uint64_t limit_bytes, slab_bytes;
    struct host_slab *slabs;
    uint32_t n_slabs, slabs_cap; /* numbers ever given out: 0 .. n_slabs - 1 */
    uint32_t n_live;
    uint32_t slab_slots_max; /* that any slab ever had */
    struct host_class *classes;
    uint32_t n_classes;
    uint64_t held_bytes, slot_bytes, n_slots;
    uint64_t meta_bytes;
    uint32_t n_retired;
    _Atomic(const char *) *bases; /* of slabs by number, HOST_SLABS_MAX of them: what other threads may read */
    struct slab_memory spare; /* map NULL: none; charged to the budget already */
};

int host_create(const char *name, struct budget *budget, uint64_t limit_bytes, uint64_t slab_bytes, struct tier **ret)
{
    struct tier *t = calloc(1, sizeof(*t));

    if (!t)
        return -ENOMEM;
    t->bases = calloc(HOST_SLABS_MAX, sizeof(*t->bases)); /* pages that nobody touches cost nothing */
    if (!t->bases) {
        free(t);
        return -ENOMEM;
    }
    snprintf(t->name, sizeof(t->name), "kvd-slab-%s", name);
    t->budget = budget;
    t->limit_bytes = limit_bytes;
    t->slab_bytes = slab_bytes;
    t->spare.fd = -1;
    *ret = t;
    return 0;
}

static uint64_t round_slot(uint64_t bytes)
{
    return (bytes + SHM_LOC_UNIT_BYTES - 1) / SHM_LOC_UNIT_BYTES * SHM_LOC_UNIT_BYTES;
}

static struct host_class *find_class(const struct tier *t, uint64_t slot_bytes)
{
    for (uint32_t i = 0; i < t->n_classes; i++)
        if (t->classes[i].slot_bytes == slot_bytes)
            return &t->classes[i];
    return NULL;
}

static struct host_class *make_class(struct tier *t, uint64_t slot_bytes)
{
    struct host_class *c = find_class(t, slot_bytes);

    if (c)
        return c;
    c = realloc(t->classes, (t->n_classes + 1) * sizeof(*c));
    if (!c)
        return NULL;
    t->classes = c;
    c = &t->classes[t->n_classes++];
    *c = (struct host_class){.slot_bytes = slot_bytes, .head = FREE_END};
    return c;
}

static void list_slab(struct tier *t, struct host_class *c, uint32_t n)
{
    struct host_slab *s = &t->slabs[n];

    assert(!s->listed);
    s->prev = FREE_END;
    s->next = c->head;
    if (c->head != FREE_END)
        t->slabs[c->head].prev = n;
    c->head = n;
    s->listed = true;
}

static void unlist_slab(struct tier *t, struct host_class *c, uint32_t n)
{
    struct host_slab *s = &t->slabs[n];

    assert(s->listed);
    if (s->prev != FREE_END)
        t->slabs[s->prev].next = s->next;
    else
        c->head = s->next;
    if (s->next != FREE_END)
        t->slabs[s->next].prev = s->prev;
    s->listed = false;
}

/* An empty slab leaves its class. */
static void uncut(struct tier *t, uint32_t n)
{
    struct host_slab *s = &t->slabs[n];
    struct host_class *c = find_class(t, s->slot_bytes);

    assert(s->n_used == 0 && c);
    if (s->listed)
        unlist_slab(t, c, n);
    c->n_slabs--;
    t->meta_bytes -= (uint64_t)s->n_slots * (sizeof(*s->owner) + 1);
    free(s->owner);
    free(s->in_use);
    s->owner = NULL;
    s->in_use = NULL;
    s->slot_bytes = 0;
    s->n_slots = 0;
}

static int cut(struct tier *t, uint32_t n, struct host_class *c)
{
    struct host_slab *s = &t->slabs[n];
    uint32_t n_slots = (uint32_t)(s->memory.bytes / c->slot_bytes);

    assert(s->slot_bytes == 0 && n_slots > 0);
    s->owner = malloc(n_slots * sizeof(*s->owner));
    s->in_use = calloc(n_slots, 1);
    if (!s->owner || !s->in_use) {
        free(s->owner);
        free(s->in_use);
        s->owner = NULL;
        s->in_use = NULL;
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < n_slots; i++)
        s->owner[i] = i + 1 < n_slots ? i + 1 : FREE_END;
    s->free_head = 0;
    s->slot_bytes = c->slot_bytes;
    s->n_slots = n_slots;
    s->n_used = 0;
    if (n_slots > t->slab_slots_max)
        t->slab_slots_max = n_slots;
    t->meta_bytes += (uint64_t)n_slots * (sizeof(*s->owner) + 1);
    c->n_slabs++;
    list_slab(t, c, n);
    return 0;
}

/* A number whose slab has gone, or the next one. */
static int take_number(struct tier *t, uint32_t *ret_n)
{
    uint32_t cap = t->slabs_cap ? t->slabs_cap * 2 : 16;
    struct host_slab *s;

    for (*ret_n = 0; *ret_n < t->n_slabs; ++*ret_n)
        if (!t->slabs[*ret_n].memory.map)
            return 0;
    if (t->n_slabs >= HOST_SLABS_MAX)
        return -ENOSPC;
    if (t->n_slabs == t->slabs_cap) {
        s = realloc(t->slabs, cap * sizeof(*s));
        if (!s)
            return -ENOMEM;
        t->slabs = s;
        t->slabs_cap = cap;
    }
    return 0;
}

static uint64_t slab_bytes_for(const struct tier *t, uint64_t slot_bytes)
{
    uint64_t unit = UINT64_C(2) << 20;

    return slot_bytes <= t->slab_bytes ? t->slab_bytes : (slot_bytes + unit - 1) / unit * unit;
}

static bool may_grow(const struct tier *t, uint64_t bytes)
{
    return bytes <= t->limit_bytes && t->held_bytes <= t->limit_bytes - bytes &&
           bytes <= t->budget->limit_bytes && t->budget->used_bytes <= t->budget->limit_bytes - bytes;
}

static int take_memory(struct tier *t, uint64_t bytes, struct slab_memory *ret)
{
    int r;

    if (t->spare.map && t->spare.bytes >= bytes) {
        *ret = t->spare;
        t->spare = (struct slab_memory){.fd = -1};
        return 0;
    }
    if (!may_grow(t, bytes))
        return -ENOSPC;
    r = slab_memory_create(t->name, bytes, t->budget->hugepages, t->budget->numa_interleave, ret);
    if (r < 0) {
        t->budget->n_refused++;
        if (t->budget->hugepages == SLAB_HUGE_ON)
            t->budget->n_huge_refused++;
        return r == -ENOMEM ? -ENOSPC : r;
    }
    t->held_bytes += ret->bytes;
    t->budget->used_bytes += ret->bytes;
    return 0;
}

/* A new slab, sealed and numbered, not cut. */
static int grow(struct tier *t, uint64_t bytes, uint32_t *ret_n)
{
    struct slab_memory memory;
    int r = take_number(t, ret_n);

    if (r < 0)
        return r;
    r = take_memory(t, bytes, &memory);
    if (r < 0)
        return r;
    r = slab_memory_seal(&memory);
    if (r < 0) {
        t->held_bytes -= memory.bytes;
        t->budget->used_bytes -= memory.bytes;
        slab_memory_release(&memory);
        return r;
    }
    if (memory.huge)
        t->budget->n_huge_slabs++;
    else if (t->budget->hugepages != SLAB_HUGE_OFF)
        t->budget->n_huge_refused++;
    t->slabs[*ret_n] = (struct host_slab){.memory = memory, .next = FREE_END, .prev = FREE_END};
    atomic_store_explicit(&t->bases[*ret_n], memory.map, memory_order_release);
    t->n_live++;
    if (*ret_n == t->n_slabs)
        t->n_slabs++;
    return 0;
}

/* An empty slab of another size, big enough for this one. */
static bool find_empty(const struct tier *t, uint64_t slot_bytes, uint32_t *ret_n)
{
    for (uint32_t n = 0; n < t->n_slabs; n++) {
        const struct host_slab *s = &t->slabs[n];

        if (s->memory.map && s->n_used == 0 && s->memory.bytes >= slot_bytes && s->slot_bytes != slot_bytes) {
            *ret_n = n;
            return true;
        }
    }
    return false;
}

static int host_reserve(struct tier *t, uint64_t bytes, uint32_t owner, uint64_t *ret_loc)
{
    uint64_t slot_bytes = round_slot(bytes);
    struct host_class *c = make_class(t, slot_bytes);
    struct host_slab *s;
    uint32_t n, slot;
    int r;

    if (!c)
        return -ENOMEM;
    if (c->head == FREE_END) {
        if (!find_empty(t, slot_bytes, &n)) {
            r = grow(t, slab_bytes_for(t, slot_bytes), &n);
            if (r < 0)
                return r;
        } else if (t->slabs[n].slot_bytes) {
            uncut(t, n);
        }
        r = cut(t, n, c);
        if (r < 0)
            return r;
    }
    n = c->head;
    s = &t->slabs[n];
    slot = s->free_head;
    s->free_head = s->owner[slot];
    s->owner[slot] = owner;
    s->in_use[slot] = 1;
    if (++s->n_used == s->n_slots)
        unlist_slab(t, c, n);
    t->n_slots++;
    t->slot_bytes += slot_bytes;
    *ret_loc = shm_loc(n, slot * slot_bytes);
    return 0;
}

static struct host_slab *slab_of(const struct tier *t, uint64_t loc, uint32_t *ret_slot)
{
    uint32_t n = shm_loc_slab(loc);
    struct host_slab *s;

    if (loc == SHM_LOC_NONE || n >= t->n_slabs)
        return NULL;
    s = &t->slabs[n];
    if (!s->memory.map || !s->slot_bytes || shm_loc_off(loc) % s->slot_bytes)
        return NULL;
    *ret_slot = (uint32_t)(shm_loc_off(loc) / s->slot_bytes);
    return *ret_slot < s->n_slots ? s : NULL;
}

static void host_release(struct tier *t, uint64_t loc)
{
    uint32_t slot = 0;
    struct host_slab *s = slab_of(t, loc, &slot);

    assert(s && s->in_use[slot]);
    s->in_use[slot] = 0;
    s->owner[slot] = s->free_head;
    s->free_head = slot;
    if (s->n_used-- == s->n_slots)
        list_slab(t, find_class(t, s->slot_bytes), (uint32_t)(s - t->slabs));
    t->n_slots--;
    t->slot_bytes -= s->slot_bytes;
}

static void host_set_owner(struct tier *t, uint64_t loc, uint32_t owner)
{
    uint32_t slot = 0;
    struct host_slab *s = slab_of(t, loc, &slot);

    assert(s && s->in_use[slot]);
    s->owner[slot] = owner;
}

static uint32_t host_owner(const struct tier *t, uint64_t loc)
{
    uint32_t slot = 0;
    struct host_slab *s = slab_of(t, loc, &slot);

    return s && s->in_use[slot] ? s->owner[slot] : UINT32_MAX;
}

static void *host_at(const struct tier *t, uint64_t loc)
{
    uint32_t slot = 0;
    struct host_slab *s = slab_of(t, loc, &slot);

    return s ? (char *)s->memory.map + shm_loc_off(loc) : NULL;
}

const void *host_leased_at(const struct tier *t, uint64_t loc)
{
    uint32_t n = shm_loc_slab(loc);
    const char *base = n < HOST_SLABS_MAX ? atomic_load_explicit(&t->bases[n], memory_order_acquire) : NULL;

    return base ? base + shm_loc_off(loc) : NULL;
}

static bool host_has_class(const struct tier *t, uint64_t bytes)
{
    const struct host_class *c = find_class(t, round_slot(bytes));

    return c && c->n_slabs > 0;
}

static int host_cheapest(struct tier *t, uint64_t bytes, uint64_t attempt, uint32_t *ret_owners, uint32_t *ret_n)
{
    uint64_t avoid = bytes ? round_slot(bytes) : UINT64_MAX, best_used = UINT64_MAX;
    struct host_slab *best = NULL;

    for (uint32_t n = 0; n < t->n_slabs; n++) {
        struct host_slab *s = &t->slabs[n];
        uint64_t used = (uint64_t)s->n_used * s->slot_bytes;

        if (!s->memory.map || s->attempt == attempt || s->slot_bytes == avoid || (bytes && s->memory.bytes < avoid))
            continue;
        if (used < best_used) {
            best_used = used;
            best = s;
        }
    }
    if (!best)
        return -ENOENT;
    best->attempt = attempt;
    *ret_n = 0;
    for (uint32_t i = 0; i < best->n_slots; i++)
        if (best->in_use[i])
            ret_owners[(*ret_n)++] = best->owner[i];
    return (int)(best - t->slabs);
}

static uint64_t host_trim(struct tier *t)
{
    uint64_t given = 0;

    for (uint32_t n = 0; n < t->n_slabs; n++) {
        struct host_slab *s = &t->slabs[n];

        if (!s->memory.map || s->n_used)
            continue;
        if (s->slot_bytes)
            uncut(t, n);
        given += s->memory.bytes;
        if (s->memory.huge)
            t->budget->n_huge_slabs--;
        atomic_store_explicit(&t->bases[n], NULL, memory_order_release);
        slab_memory_release(&s->memory);
        t->n_live--;
        t->n_retired++;
    }
    if (t->spare.map) {
        given += t->spare.bytes;
        slab_memory_release(&t->spare);
    }
    t->held_bytes -= given;
    t->budget->used_bytes -= given;
    return given;
}

static void host_set_limit(struct tier *t, uint64_t bytes)
{
    t->limit_bytes = bytes;
}

static void host_info(const struct tier *t, struct tier_info *ret)
{
    *ret = (struct tier_info){
        .limit_bytes = t->limit_bytes,
        .slab_bytes = t->held_bytes,
        .slot_bytes = t->slot_bytes,
        .n_slabs = t->n_live,
        .n_slots = t->n_slots,
        .slab_slots_max = t->slab_slots_max,
        .meta_bytes = t->meta_bytes + t->slabs_cap * sizeof(struct host_slab) + sizeof(*t),
    };
}

static struct tier *host_destroy(struct tier *t)
{
    if (!t)
        return NULL;
    for (uint32_t n = 0; n < t->n_slabs; n++) {
        struct host_slab *s = &t->slabs[n];

        if (s->memory.map && s->memory.huge)
            t->budget->n_huge_slabs--;
        slab_memory_release(&s->memory);
        free(s->owner);
        free(s->in_use);
    }
    slab_memory_release(&t->spare);
    t->budget->used_bytes -= t->held_bytes;
    free(t->slabs);
    free(t->classes);
    free(t->bases);
    free(t);
    return NULL;
}

int host_slab_fd(const struct tier *t, uint32_t slab, uint64_t *ret_bytes)
{
    if (slab >= t->n_slabs || !t->slabs[slab].memory.map)
        return -ENOENT;
    *ret_bytes = t->slabs[slab].memory.bytes;
    return t->slabs[slab].memory.fd;
}

uint32_t host_n_retired(const struct tier *t)
{
    return t->n_retired;
}

bool host_spare_wanted(const struct tier *t, uint64_t *ret_bytes)
{
    *ret_bytes = t->slab_bytes;
    return t->n_live > 0 && !t->spare.map && may_grow(t, t->slab_bytes);
}

void host_spare_give(struct tier *t, struct slab_memory *memory)
{
    if (t->spare.map || !may_grow(t, memory->bytes)) {
        slab_memory_release(memory);
        return;
    }
    t->spare = *memory;
    t->held_bytes += memory->bytes;
    t->budget->used_bytes += memory->bytes;
    *memory = (struct slab_memory){.fd = -1};
}

void host_assert_valid(const struct tier *t)
{
    uint64_t held = t->spare.map ? t->spare.bytes : 0, n_slots = 0, slot_bytes = 0;

    for (uint32_t n = 0; n < t->n_slabs; n++) {
        const struct host_slab *s = &t->slabs[n];
        uint32_t n_free = 0, n_used = 0;

        if (!s->memory.map)
            continue;
        held += s->memory.bytes;
        if (!s->slot_bytes)
            continue;
        for (uint32_t i = s->free_head, guard = 0; n_free + s->n_used < s->n_slots; i = s->owner[i], guard++) {
            assert(i < s->n_slots && !s->in_use[i] && guard <= s->n_slots);
            n_free++;
        }
        for (uint32_t i = 0; i < s->n_slots; i++)
            n_used += s->in_use[i];
        assert(n_used == s->n_used && n_used + n_free == s->n_slots); /* H2 */
        assert(s->listed == (s->n_used < s->n_slots));                /* H1 */
        n_slots += n_used;
        slot_bytes += n_used * s->slot_bytes;
    }
    assert(held == t->held_bytes && n_slots == t->n_slots && slot_bytes == t->slot_bytes);
}

const struct tier_ops host_tier_ops = {
    .name = "host",
    .destroy = host_destroy,
    .reserve = host_reserve,
    .release = host_release,
    .set_owner = host_set_owner,
    .owner = host_owner,
    .at = host_at,
    .has_class = host_has_class,
    .cheapest = host_cheapest,
    .trim = host_trim,
    .set_limit = host_set_limit,
    .info = host_info,
};
