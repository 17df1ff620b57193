#include "tests/policy_model.h"

#include <stdlib.h>
#include <string.h>

static void *must(void *p)
{
    if (!p)
        abort();
    return p;
}

static void list_insert(struct model_list *l, size_t at, uint32_t x, size_t room)
{
    if (!l->v)
        l->v = must(calloc(room, sizeof(*l->v)));
    memmove(l->v + at + 1, l->v + at, (l->n - at) * sizeof(*l->v));
    l->v[at] = x;
    l->n++;
}

static void list_take(struct model_list *l, size_t at)
{
    l->n--;
    memmove(l->v + at, l->v + at + 1, (l->n - at) * sizeof(*l->v));
}

static bool list_find(const struct model_list *l, uint32_t x, size_t *ret_at)
{
    for (size_t i = 0; i < l->n; i++)
        if (l->v[i] == x) {
            *ret_at = i;
            return true;
        }
    return false;
}

void model_init(struct model *m, bool s3, uint32_t n_max)
{
    *m = (struct model){.s3 = s3, .n_max = n_max, .n_buckets = n_max < 8 ? 1 : n_max / 8};
    m->ids = must(calloc(n_max, sizeof(*m->ids)));
    m->ghost = must(calloc(m->n_buckets, sizeof(*m->ghost)));
    m->ghost_when = must(calloc(m->n_buckets, sizeof(*m->ghost)));
}

void model_deinit(struct model *m)
{
    for (uint32_t b = 0; b < m->n_buckets; b++) {
        free(m->ghost[b].v);
        free(m->ghost_when[b].v);
    }
    free(m->ghost);
    free(m->ghost_when);
    free(m->q[0].v);
    free(m->q[1].v);
    free(m->q[2].v);
    free(m->ids);
}

uint32_t model_count(const struct model *m, enum model_state state)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < m->n_max; i++)
        n += m->ids[i].state == state;
    return n;
}

/* Ids of queue k that take room: queued there or set aside from there. */
static uint32_t present_in(const struct model *m, int k)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < m->n_max; i++)
        n += (m->ids[i].state == MODEL_EVICTABLE || m->ids[i].state == MODEL_PARKED) && m->ids[i].queue == k;
    return n;
}

static uint32_t total(const struct model *m)
{
    return present_in(m, 0) + present_in(m, 1) + present_in(m, 2);
}

static uint32_t small_share(const struct model *m)
{
    return total(m) / 2;
}

static void enqueue(struct model *m, uint32_t id, int k)
{
    m->ids[id].queue = k;
    list_insert(&m->q[k], m->q[k].n, id, m->n_max);
}

static bool dequeue(struct model *m, uint32_t id)
{
    size_t at;

    for (int k = 0; k < 3; k++)
        if (list_find(&m->q[k], id, &at)) {
            list_take(&m->q[k], at);
            return true;
        }
    return false;
}

static uint32_t bucket_of(const struct model *m, uint32_t fp)
{
    return (uint32_t)((uint64_t)fp * m->n_buckets >> 32);
}

static void ghost_forget(struct model *m, uint32_t b, size_t at)
{
    list_take(&m->ghost[b], at);
    list_take(&m->ghost_when[b], at);
}

void model_insert(struct model *m, uint32_t id, uint64_t key_hash)
{
    uint32_t fp = (uint32_t)(key_hash >> 32), b = bucket_of(m, fp);
    bool known = false;
    size_t at;

    m->ids[id] = (struct model_id){.state = MODEL_EVICTABLE, .fp = fp};
    if (m->s3 && list_find(&m->ghost[b], fp, &at)) {
        /* The new one counts as present, but it stands in no queue yet. */
        m->ids[id].state = MODEL_ABSENT;
        known = m->n_evicted - m->ghost_when[b].v[at] < total(m) - small_share(m);
        m->ids[id].state = MODEL_EVICTABLE;
        if (known)
            ghost_forget(m, b, at);
    }
    enqueue(m, id, known ? 1 : 0);
}

void model_hit(struct model *m, uint32_t id)
{
    if (m->s3) {
        m->ids[id].freq += m->ids[id].freq < 3;
    } else if (m->ids[id].state != MODEL_PENDING) {
        (void)dequeue(m, id);
        enqueue(m, id, 0);
    }
}

void model_remove(struct model *m, uint32_t id)
{
    (void)dequeue(m, id);
    m->ids[id].state = MODEL_ABSENT;
}

void model_park(struct model *m, uint32_t id)
{
    m->ids[id].state = MODEL_PARKED;
}

void model_unpark(struct model *m, uint32_t id)
{
    size_t at;

    m->ids[id].state = MODEL_EVICTABLE;
    if (!list_find(&m->q[0], id, &at) && !list_find(&m->q[1], id, &at) && !list_find(&m->q[2], id, &at))
        list_insert(&m->q[m->ids[id].queue], 0, id, m->n_max);
}

static bool scan(struct model *m, int k, uint32_t *ret_id)
{
    while (m->q[k].n > 0) {
        uint32_t id = m->q[k].v[0];
        struct model_id *x = &m->ids[id];

        list_take(&m->q[k], 0);
        if (m->s3 && k == 0 && x->freq >= 1) {
            x->freq = 0;
            enqueue(m, id, 1);
        } else if (m->s3 && k == 1 && x->freq >= 1) {
            x->freq--;
            enqueue(m, id, 1);
        } else if (x->state == MODEL_EVICTABLE) {
            x->state = MODEL_PENDING;
            *ret_id = id;
            return true;
        } else if (k == 2) {
            x->queue = 1;
        }
    }
    return false;
}

bool model_victim(struct model *m, uint32_t *ret_id)
{
    bool main_first = m->s3 && present_in(m, 0) <= small_share(m);

    return (main_first && scan(m, 1, ret_id)) || scan(m, 0, ret_id) || scan(m, 1, ret_id) || scan(m, 2, ret_id);
}

void model_evicted(struct model *m, uint32_t id)
{
    struct model_id *x = &m->ids[id];
    uint32_t b = bucket_of(m, x->fp);
    size_t at;

    x->state = MODEL_ABSENT;
    if (m->q[2].n > 0) {
        uint32_t rested = m->q[2].v[0];

        list_take(&m->q[2], 0);
        enqueue(m, rested, 1);
    }
    if (!m->s3 || x->queue != 0)
        return;
    m->n_evicted++;
    if (list_find(&m->ghost[b], x->fp, &at))
        ghost_forget(m, b, at);
    else if (m->ghost[b].n == 8)
        ghost_forget(m, b, 0);
    list_insert(&m->ghost[b], m->ghost[b].n, x->fp, 8 + 1);
    list_insert(&m->ghost_when[b], m->ghost_when[b].n, m->n_evicted, 8 + 1);
}

void model_keep(struct model *m, uint32_t id)
{
    m->ids[id].state = MODEL_EVICTABLE;
    m->ids[id].freq += m->s3 && m->ids[id].freq < 3;
    enqueue(m, id, m->s3 ? 2 : 0);
}
