#include "store/policy_ghost.h"

#include <assert.h>

/* Adds since this slot was written; a free slot is older than all. */
static uint32_t age(const struct ghost *g, const struct ghost_slot *s)
{
    return s->seq == 0 ? UINT32_MAX : g->seq - s->seq;
}

void ghost_add(struct ghost *g, uint32_t fp)
{
    struct ghost_slot *b = &g->slots[(uint64_t)ghost_bucket(g, fp) * GHOST_WAYS];
    struct ghost_slot *oldest = b;

    for (uint32_t i = 0; i < GHOST_WAYS; i++) {
        if (b[i].seq != 0 && b[i].fp == fp) {
            oldest = &b[i];
            break;
        }
        if (age(g, &b[i]) > age(g, oldest))
            oldest = &b[i];
    }
    if (++g->seq == 0) /* 0 means free */
        g->seq = 1;
    *oldest = (struct ghost_slot){.fp = fp, .seq = g->seq};
}

bool ghost_take(struct ghost *g, uint32_t fp, uint32_t window)
{
    struct ghost_slot *b = &g->slots[(uint64_t)ghost_bucket(g, fp) * GHOST_WAYS];

    for (uint32_t i = 0; i < GHOST_WAYS; i++) {
        if (b[i].seq == 0 || b[i].fp != fp)
            continue;
        if (age(g, &b[i]) >= window)
            return false;
        b[i] = (struct ghost_slot){0};
        return true;
    }
    return false;
}

void ghost_assert_valid(const struct ghost *g)
{
    for (uint32_t b = 0; b < g->n_buckets; b++) {
        const struct ghost_slot *s = &g->slots[(uint64_t)b * GHOST_WAYS];

        for (uint32_t i = 0; i < GHOST_WAYS; i++) {
            if (s[i].seq == 0)
                continue;
            assert(ghost_bucket(g, s[i].fp) == b);
            for (uint32_t j = 0; j < i; j++)
                assert(s[j].seq == 0 || s[j].fp != s[i].fp);
        }
    }
}
