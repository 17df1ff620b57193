/* Eviction policies: against a naive model, under the discipline of prefixes, and by what they cost in steps. */
#include "store/policy.h"
#include "store/policy_ghost.h"
#include "tests/policy_model.h"

#include <check.h>
#include <errno.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t rnd(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static uint64_t hash_of(uint64_t key)
{
    return rnd(&key);
}

static uint64_t seed_of(const char *what)
{
    const char *env = getenv("KVD_SEED");
    uint64_t seed = env ? strtoull(env, NULL, 0) : UINT64_C(20240607);

    printf("check_policy: %s: KVD_SEED=%#llx\n", what, (unsigned long long)seed);
    return seed;
}

static struct policy *make(int which, uint32_t n_max)
{
    struct policy *p = NULL;

    ck_assert_int_eq(policy_at((size_t)which)->create(n_max, &p), 0);
    ck_assert_ptr_nonnull(p);
    return p;
}

/* ---- the table, and limits ---- */

START_TEST(names)
{
    ck_assert_str_eq(policy_find(NULL)->name, "s3fifo");
    ck_assert_str_eq(policy_find("s3fifo")->name, "s3fifo");
    ck_assert_str_eq(policy_find("lru")->name, "lru");
    ck_assert_ptr_null(policy_find("LRU"));
    ck_assert_ptr_null(policy_find(""));
    ck_assert_ptr_nonnull(policy_at(1));
    ck_assert_ptr_null(policy_at(2));
}
END_TEST

START_TEST(sizes_refused)
{
    const struct policy_ops *ops = policy_at((size_t)_i);
    struct policy *p = (void *)&p;

    ck_assert_int_eq(ops->create(0, &p), -EINVAL);
    ck_assert_int_eq(ops->create(POLICY_N_MAX + 1, &p), -EINVAL);
    ck_assert_int_eq(ops->create(UINT32_MAX, &p), -EINVAL);
    ck_assert_ptr_eq(p, (void *)&p); /* untouched on failure */
    ck_assert_ptr_null(ops->destroy(NULL));
}
END_TEST

START_TEST(memory_bounded)
{
    static const uint32_t ns[] = {1, 7, 8, 9, 63, 1000, 100000, 1000000};

    for (size_t i = 0; i < sizeof(ns) / sizeof(ns[0]); i++) {
        struct policy *p = make(_i, ns[i]);

        ck_assert_uint_le(malloc_usable_size(p), (size_t)ns[i] * POLICY_BYTES_PER_ID + POLICY_FIXED_BYTES + 8192);
        ck_assert_ptr_null(p->ops->destroy(p));
    }
}
END_TEST

/* The smallest tables: one id, and fewer than a ghost bucket. */
START_TEST(few_ids)
{
    for (uint32_t n = 1; n <= 9; n++) {
        struct policy *p = make(_i, n);
        uint32_t v;

        ck_assert_int_eq(p->ops->victim(p, &v), -ENOENT);
        for (int round = 0; round < 20; round++) {
            for (uint32_t id = 0; id < n; id++)
                p->ops->insert(p, id, hash_of(id));
            p->ops->hit(p, 0);
            if (n > 1)
                p->ops->park(p, n - 1);
            ck_assert_uint_eq(policy_n_evictable(p), n == 1 ? 1 : n - 1);
            for (uint32_t left = n == 1 ? 1 : n - 1; left > 0; left--) {
                ck_assert_int_eq(p->ops->victim(p, &v), 0);
                ck_assert_uint_lt(v, n == 1 ? 1 : n - 1);
                p->ops->evicted(p, v);
                p->ops->assert_valid(p);
            }
            ck_assert_int_eq(p->ops->victim(p, &v), -ENOENT);
            if (n > 1)
                p->ops->remove(p, n - 1);
            ck_assert_uint_eq(p->n_present, 0);
        }
        p->ops->destroy(p);
    }
}
END_TEST

/* ---- against the model ---- */

struct both {
    struct policy *p;
    struct model m;
    uint64_t rng, n_keys;
};

static bool pick(struct both *b, enum model_state state, uint32_t *ret_id)
{
    uint32_t start = (uint32_t)(rnd(&b->rng) % b->m.n_max);

    for (uint32_t i = 0; i < b->m.n_max; i++) {
        uint32_t id = (start + i) % b->m.n_max;

        if (b->m.ids[id].state == state) {
            *ret_id = id;
            return true;
        }
    }
    return false;
}

static void step_victim(struct both *b)
{
    uint32_t v = 0, w = 0;
    bool there = model_victim(&b->m, &w);

    ck_assert_int_eq(b->p->ops->victim(b->p, &v), there ? 0 : -ENOENT);
    if (there)
        ck_assert_uint_eq(v, w);
}

/* One random call, made to both. Weights decide whether a run is mostly growing, evicting or flapping. */
static void step(struct both *b, const unsigned weight[8])
{
    unsigned total = 0, what = 0, r;
    const struct policy_ops *ops = b->p->ops;
    uint64_t key;
    uint32_t id;

    for (int i = 0; i < 8; i++)
        total += weight[i];
    for (r = (unsigned)(rnd(&b->rng) % total); r >= weight[what]; what++)
        r -= weight[what];
    switch (what) {
    case 0:
        if (pick(b, MODEL_ABSENT, &id)) {
            key = hash_of(rnd(&b->rng) % b->n_keys);
            ops->insert(b->p, id, key);
            model_insert(&b->m, id, key);
        }
        break;
    case 1:
        if (pick(b, (enum model_state)(1 + rnd(&b->rng) % 3), &id)) {
            ops->hit(b->p, id);
            model_hit(&b->m, id);
        }
        break;
    case 2:
        if (pick(b, (enum model_state)(1 + rnd(&b->rng) % 3), &id)) {
            ops->remove(b->p, id);
            model_remove(&b->m, id);
        }
        break;
    case 3:
        if (pick(b, MODEL_EVICTABLE, &id)) {
            ops->park(b->p, id);
            model_park(&b->m, id);
        }
        break;
    case 4:
        if (pick(b, MODEL_PARKED, &id)) {
            ops->unpark(b->p, id);
            model_unpark(&b->m, id);
        }
        break;
    case 5:
        step_victim(b);
        break;
    case 6:
        if (pick(b, MODEL_PENDING, &id)) {
            ops->evicted(b->p, id);
            model_evicted(&b->m, id);
        }
        break;
    default:
        if (pick(b, MODEL_PENDING, &id)) {
            ops->keep(b->p, id);
            model_keep(&b->m, id);
        }
    }
}

START_TEST(same_as_model)
{
    static const unsigned weights[][8] = {
        {30, 30, 2, 10, 10, 30, 28, 4}, /* a cache at work */
        {30, 5, 1, 30, 25, 20, 20, 1},  /* mostly parked */
        {20, 40, 1, 5, 5, 30, 10, 20},  /* many leases */
        {40, 1, 1, 1, 1, 40, 40, 1},    /* a flood of new keys */
        {10, 10, 10, 10, 10, 10, 10, 10},
    };
    static const uint32_t sizes[] = {1, 2, 5, 8, 17, 64, 200};
    uint64_t seed = seed_of("same_as_model");

    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++)
        for (size_t w = 0; w < sizeof(weights) / sizeof(weights[0]); w++) {
            struct both b = {.p = make(_i, sizes[s]), .rng = seed + s * 100 + w, .n_keys = 3 * sizes[s]};

            model_init(&b.m, strcmp(b.p->ops->name, "s3fifo") == 0, sizes[s]);
            for (int i = 0; i < 4000; i++) {
                step(&b, weights[w]);
                ck_assert_uint_eq(b.p->n_present, sizes[s] - model_count(&b.m, MODEL_ABSENT));
                ck_assert_uint_eq(policy_n_evictable(b.p), model_count(&b.m, MODEL_EVICTABLE));
                if (i % 16 == 0)
                    b.p->ops->assert_valid(b.p);
            }
            model_deinit(&b.m);
            b.p->ops->destroy(b.p);
        }
}
END_TEST

/* From any state: as long as all is refused, each evictable id is asked about once before any is asked about again. */
START_TEST(keep_asks_all)
{
    static const unsigned weight[8] = {30, 30, 1, 8, 5, 15, 12, 4};
    uint64_t seed = seed_of("keep_asks_all");

    for (uint64_t run = 0; run < 300; run++) {
        struct both b = {.p = make(_i, 60), .rng = seed + run, .n_keys = 150};
        bool asked[60] = {false};
        uint32_t n, v;

        model_init(&b.m, strcmp(b.p->ops->name, "s3fifo") == 0, 60);
        for (uint64_t i = 0; i < 50 + run * 4; i++)
            step(&b, weight);
        n = (uint32_t)policy_n_evictable(b.p);
        if (run % 2) { /* resting ones of before are asked about after the others, but are asked about */
            for (uint32_t i = 0; i < n / 2; i++) {
                step_victim(&b);
                if (pick(&b, MODEL_PENDING, &v)) {
                    b.p->ops->keep(b.p, v);
                    model_keep(&b.m, v);
                }
            }
            n = (uint32_t)policy_n_evictable(b.p);
        }
        for (uint32_t i = 0; i < n; i++) {
            ck_assert_int_eq(b.p->ops->victim(b.p, &v), 0);
            ck_assert(!asked[v]);
            asked[v] = true;
            b.p->ops->keep(b.p, v);
        }
        for (uint32_t id = 0; id < 60; id++)
            ck_assert_int_eq(asked[id], b.m.ids[id].state == MODEL_EVICTABLE);
        b.p->ops->assert_valid(b.p);
        model_deinit(&b.m);
        b.p->ops->destroy(b.p);
    }
}
END_TEST

/* ---- chains: children leave before their parents ---- */

#define FOREST_N 512u
#define FOREST_NONE UINT32_MAX

/* What the store does, small: a forest of blocks with counts of children and pins. */
struct forest {
    struct policy *p;
    uint64_t rng, serial;
    uint32_t parent[FOREST_N], n_children[FOREST_N], n_pins[FOREST_N];
    bool present[FOREST_N];
};

static void forest_hold(struct forest *f, uint32_t id, uint32_t *count)
{
    if (f->n_children[id] + f->n_pins[id] == 0)
        f->p->ops->park(f->p, id);
    (*count)++;
}

static void forest_let_go(struct forest *f, uint32_t id, uint32_t *count)
{
    (*count)--;
    if (f->n_children[id] + f->n_pins[id] == 0)
        f->p->ops->unpark(f->p, id);
}

static bool forest_evict(struct forest *f)
{
    uint32_t v, parent;

    if (f->p->ops->victim(f->p, &v) != 0)
        return false;
    ck_assert(f->present[v] && f->n_children[v] == 0 && f->n_pins[v] == 0);
    if (rnd(&f->rng) % 8 == 0) {
        f->p->ops->keep(f->p, v);
        return true;
    }
    f->present[v] = false;
    f->p->ops->evicted(f->p, v);
    parent = f->parent[v];
    if (parent != FOREST_NONE)
        forest_let_go(f, parent, &f->n_children[parent]);
    return true;
}

/* A chain of up to 40 new blocks under a random present one, or a new root. */
static void forest_grow(struct forest *f)
{
    uint32_t parent = (uint32_t)(rnd(&f->rng) % FOREST_N), n = 1 + (uint32_t)(rnd(&f->rng) % 40);

    if (!f->present[parent])
        parent = FOREST_NONE;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t id = (uint32_t)(rnd(&f->rng) % FOREST_N);

        if (f->present[id])
            continue;
        f->present[id] = true;
        f->parent[id] = parent;
        f->p->ops->insert(f->p, id, hash_of(f->serial++));
        if (parent != FOREST_NONE)
            forest_hold(f, parent, &f->n_children[parent]);
        parent = id;
    }
}

static void forest_use(struct forest *f)
{
    for (uint32_t id = (uint32_t)(rnd(&f->rng) % FOREST_N); id != FOREST_NONE && f->present[id]; id = f->parent[id])
        f->p->ops->hit(f->p, id);
}

static void forest_pin(struct forest *f)
{
    uint32_t id = (uint32_t)(rnd(&f->rng) % FOREST_N);

    if (!f->present[id])
        return;
    if (f->n_pins[id] > 0)
        forest_let_go(f, id, &f->n_pins[id]);
    else
        forest_hold(f, id, &f->n_pins[id]);
}

START_TEST(children_first)
{
    struct forest f = {.p = make(_i, FOREST_N), .rng = seed_of("children_first")};

    for (int i = 0; i < 60000; i++) {
        uint64_t r = rnd(&f.rng) % 100;

        if (r < 8)
            forest_grow(&f);
        else if (r < 40)
            forest_use(&f);
        else if (r < 44)
            forest_pin(&f);
        else
            (void)forest_evict(&f);
        if (i % 64 == 0)
            f.p->ops->assert_valid(f.p);
    }
    while (policy_n_evictable(f.p) > 0) /* all can go but what is pinned or has something pinned below it */
        ck_assert(forest_evict(&f));
    for (uint32_t id = 0; id < FOREST_N; id++)
        if (f.present[id])
            ck_assert_uint_gt(f.n_children[id] + f.n_pins[id], 0);
    f.p->ops->assert_valid(f.p);
    f.p->ops->destroy(f.p);
}
END_TEST

/* An old chain goes from its end to its root before anything of a newer chain does. */
START_TEST(chain_from_its_end)
{
    struct policy *p = make(_i, 64);
    uint32_t v;

    for (uint32_t id = 0; id < 64; id++) {
        p->ops->insert(p, id, hash_of(id));
        if (id % 32 != 0)
            p->ops->park(p, id - 1);
    }
    for (uint32_t i = 0; i < 64; i++) {
        uint32_t want = i < 32 ? 31 - i : 95 - i;

        ck_assert_int_eq(p->ops->victim(p, &v), 0);
        ck_assert_uint_eq(v, want);
        p->ops->evicted(p, v);
        if (v % 32 != 0)
            p->ops->unpark(p, v - 1);
    }
    p->ops->destroy(p);
}
END_TEST

/* ---- what each policy is for ---- */

/* A key that comes back soon after it left goes to main and outlives a flood of keys that come once. */
START_TEST(ghost_protects)
{
    const struct policy_ops *ops = policy_find("s3fifo");
    struct policy *p;
    uint32_t v, returned = 1000;

    ck_assert_int_eq(ops->create(1001, &p), 0);
    for (uint32_t id = 0; id < 1000; id++)
        ops->insert(p, id, hash_of(id));
    ck_assert_int_eq(ops->victim(p, &v), 0);
    ck_assert_uint_eq(v, 0);
    ops->evicted(p, v);
    ops->insert(p, returned, hash_of(0));
    for (uint32_t i = 0; i < 5000; i++) {
        ops->insert(p, v, hash_of(100000 + i));
        ck_assert_int_eq(ops->victim(p, &v), 0);
        ck_assert_uint_ne(v, returned);
        ops->evicted(p, v);
    }
    ops->assert_valid(p);
    ops->destroy(p);
}
END_TEST

/* A key that left by remove(), or as many evictions ago as main's share is, is new when it comes again: it leaves
 * before a key that came after it. One that left an eviction less long ago stays longer. */
START_TEST(ghost_forgets)
{
    static const struct {
        bool removed, known;
        uint32_t n_later; /* evictions in between */
    } cases[] = {{true, false, 0}, {false, false, 50}, {false, true, 49}, {false, true, 0}};
    const struct policy_ops *ops = policy_find("s3fifo");
    uint32_t v = 0, n_max = 64 * GHOST_WAYS; /* far more slots than evictions: only the window forgets */
    struct policy *p;

    ck_assert_int_eq(ops->create(n_max, &p), 0);
    for (uint32_t id = 0; id < 100; id++)
        ops->insert(p, id, hash_of(id));
    if (cases[_i].removed) {
        ops->remove(p, 0);
    } else {
        ck_assert_int_eq(ops->victim(p, &v), 0);
        ck_assert_uint_eq(v, 0);
        ops->evicted(p, v);
    }
    for (uint32_t i = 0; i < cases[_i].n_later; i++) {
        ops->insert(p, v, hash_of(1000 + i));
        ck_assert_int_eq(ops->victim(p, &v), 0);
        ops->evicted(p, v);
    }
    ops->insert(p, 200, hash_of(0)); /* again */
    for (uint32_t id = 201; id < 210; id++)
        ops->insert(p, id, hash_of(5000 + id));
    do {
        ck_assert_int_eq(ops->victim(p, &v), 0);
        ops->evicted(p, v);
    } while (v != 200 && v != 201);
    ck_assert_uint_eq(v, cases[_i].known ? 201 : 200);
    ops->destroy(p);
}
END_TEST

/* Two fifths of the cache are used again; then comes a scan ten times its capacity. S3-FIFO still has them, LRU has
 * lost them all. */
START_TEST(scan)
{
    enum { HOT = 400, N = 1000 };
    struct policy *p = make(_i, N);
    bool hot[N] = {false};
    uint32_t v, n_hot = HOT, id;

    for (id = 0; id < N; id++)
        p->ops->insert(p, id, hash_of(id));
    for (int use = 0; use < 2; use++)
        for (id = 0; id < HOT; id++) {
            p->ops->hit(p, id);
            hot[id] = true;
        }
    for (uint32_t i = 0; i < 10 * N; i++) {
        ck_assert_int_eq(p->ops->victim(p, &v), 0);
        n_hot -= hot[v];
        hot[v] = false;
        p->ops->evicted(p, v);
        p->ops->insert(p, v, hash_of(N + i));
    }
    ck_assert_uint_eq(n_hot, strcmp(p->ops->name, "lru") == 0 ? 0 : HOT);
    p->ops->destroy(p);
}
END_TEST

/* Without parents LRU is the textbook's: the victim is the one used longest ago. */
START_TEST(lru_exact)
{
    enum { N = 100 };
    const struct policy_ops *ops = policy_find("lru");
    uint64_t rng = seed_of("lru_exact"), now = 1, used[N] = {0};
    struct policy *p;

    ck_assert_int_eq(ops->create(N, &p), 0);
    for (int i = 0; i < 20000; i++) {
        uint32_t id = (uint32_t)(rnd(&rng) % N), v, oldest = 0;

        if (rnd(&rng) % 3 != 0) {
            if (used[id])
                ops->hit(p, id);
            else
                ops->insert(p, id, hash_of(id));
            used[id] = now++;
        } else if (p->n_present > 0) {
            while (!used[oldest])
                oldest++;
            for (uint32_t j = 0; j < N; j++)
                if (used[j] && used[j] < used[oldest])
                    oldest = j;
            ck_assert_int_eq(ops->victim(p, &v), 0);
            ck_assert_uint_eq(v, oldest);
            ops->evicted(p, v);
            used[v] = 0;
        }
    }
    ops->destroy(p);
}
END_TEST

/* ---- the ghost table ---- */

START_TEST(ghost_window)
{
    struct ghost_slot slots[1000 / GHOST_WAYS * GHOST_WAYS] = {{0}};
    struct ghost g = {.slots = slots, .n_buckets = ghost_n_buckets(1000)};
    uint32_t n_found = 0;
    uint64_t rng = seed_of("ghost_window");
    uint32_t fps[2000];

    ck_assert(!ghost_take(&g, 0, UINT32_MAX)); /* an empty slot is no fingerprint, not even 0 */
    for (uint32_t i = 0; i < 2000; i++)
        ghost_add(&g, fps[i] = (uint32_t)rnd(&rng));
    ghost_assert_valid(&g);
    for (uint32_t i = 0; i < 2000 - 500; i++)
        ck_assert(!ghost_take(&g, fps[i], 500));
    ck_assert(ghost_take(&g, fps[1999], 1));
    ck_assert(!ghost_take(&g, fps[1999], 1000)); /* taken once */
    ck_assert(!ghost_take(&g, fps[1998], 1));
    for (uint32_t i = 1500; i < 1999; i++) {
        uint32_t later = 0;
        bool found;

        for (uint32_t j = i + 1; j < 2000; j++)
            later += ghost_bucket(&g, fps[j]) == ghost_bucket(&g, fps[i]);
        found = ghost_take(&g, fps[i], 500);
        ck_assert_int_eq(found, later < GHOST_WAYS); /* G2, both ways */
        n_found += found;
    }
    ck_assert_uint_gt(n_found, 450);
}
END_TEST

START_TEST(ghost_wraps)
{
    struct ghost_slot slots[GHOST_WAYS] = {{0}};
    struct ghost g = {.slots = slots, .n_buckets = 1, .seq = UINT32_MAX - 3};

    for (uint32_t i = 1; i <= 9; i++)
        ghost_add(&g, i);
    ghost_assert_valid(&g);
    ck_assert(!ghost_take(&g, 1, 100));
    for (uint32_t i = 2; i <= 9; i++)
        ck_assert(ghost_take(&g, i, 100));
}
END_TEST

/* ---- cost ---- */

/* Steps, not time: for each size a chain as long as the table, everything hot, and flapping parents. */
START_TEST(steps)
{
    for (uint32_t n = 1000; n <= 1000000; n *= 10) {
        struct policy *p = make(_i, n);
        uint64_t rng = seed_of("steps"), before, calls;
        uint32_t v;

        for (uint32_t id = 0; id < n; id++) { /* one chain, all of it hot */
            p->ops->insert(p, id, hash_of(id));
            if (id > 0)
                p->ops->park(p, id - 1);
        }
        for (int use = 0; use < 3; use++)
            for (uint32_t id = 0; id < n; id++)
                p->ops->hit(p, id);
        for (uint32_t i = 0; i < n; i++) { /* leaves one by one, from the end */
            ck_assert_int_eq(p->ops->victim(p, &v), 0);
            ck_assert_uint_eq(v, n - 1 - i);
            ck_assert_uint_le(p->n_steps, POLICY_STEPS_PER_CALL * p->n_calls);
            p->ops->evicted(p, v);
            if (v > 0)
                p->ops->unpark(p, v - 1);
        }
        for (uint32_t id = 0; id < n; id++) {
            p->ops->insert(p, id, hash_of(n + id));
            if (rnd(&rng) % 4 != 0)
                p->ops->park(p, id);
        }
        before = p->n_steps;
        calls = p->n_calls;
        for (uint32_t i = 0; i < n; i++) { /* a full cache, in balance */
            if (p->ops->victim(p, &v) != 0)
                break;
            p->ops->evicted(p, v);
            p->ops->insert(p, v, hash_of(2 * (uint64_t)n + i));
            p->ops->park(p, v);
            p->ops->unpark(p, v);
        }
        /* What was parked before is looked at once, the rest is paid for within. */
        ck_assert_uint_le(p->n_steps - before, n + POLICY_STEPS_PER_CALL * (p->n_calls - calls));
        p->ops->assert_valid(p);
        printf("check_policy: %s n=%u steps per call %.3f\n", p->ops->name, n, (double)p->n_steps / (double)p->n_calls);
        p->ops->destroy(p);
    }
}
END_TEST

/* Refused all the time: asking costs a bounded number of steps whatever the answer. */
START_TEST(steps_refused)
{
    for (uint32_t n = 1000; n <= 100000; n *= 10) {
        struct policy *p = make(_i, n);
        uint32_t v;

        for (uint32_t id = 0; id < n; id++)
            p->ops->insert(p, id, hash_of(id));
        for (uint32_t i = 0; i < 5 * n; i++) {
            ck_assert_int_eq(p->ops->victim(p, &v), 0);
            p->ops->keep(p, v);
            ck_assert_uint_le(p->n_steps, POLICY_STEPS_PER_CALL * p->n_calls);
        }
        p->ops->assert_valid(p);
        p->ops->destroy(p);
    }
}
END_TEST

static Suite *policy_suite(void)
{
    Suite *s = suite_create("policy");
    TCase *c = tcase_create("limits");

    tcase_add_test(c, names);
    tcase_add_loop_test(c, sizes_refused, 0, 2);
    tcase_add_loop_test(c, memory_bounded, 0, 2);
    tcase_add_loop_test(c, few_ids, 0, 2);
    suite_add_tcase(s, c);
    c = tcase_create("model");
    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, same_as_model, 0, 2);
    tcase_add_loop_test(c, keep_asks_all, 0, 2);
    suite_add_tcase(s, c);
    c = tcase_create("chains");
    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, children_first, 0, 2);
    tcase_add_loop_test(c, chain_from_its_end, 0, 2);
    suite_add_tcase(s, c);
    c = tcase_create("purpose");
    tcase_add_test(c, ghost_protects);
    tcase_add_loop_test(c, ghost_forgets, 0, 4);
    tcase_add_loop_test(c, scan, 0, 2);
    tcase_add_test(c, lru_exact);
    tcase_add_test(c, ghost_window);
    tcase_add_test(c, ghost_wraps);
    suite_add_tcase(s, c);
    c = tcase_create("cost");
    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, steps, 0, 2);
    tcase_add_loop_test(c, steps_refused, 0, 2);
    suite_add_tcase(s, c);
    return s;
}

int main(void)
{
    SRunner *r = srunner_create(policy_suite());
    int n_failed;

    srunner_run_all(r, CK_NORMAL);
    n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
