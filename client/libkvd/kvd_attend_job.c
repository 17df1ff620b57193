#include "kvd_attend_job.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvd_attend_cost.h"

/* More tasks than threads, so that one that is held up does not hold up the others; but no task of a few blocks only. */
enum { TASKS_PER_PART = 4, RUN_BLOCKS_MIN = 4 };

static uint32_t greatest_common(uint32_t a, uint32_t b)
{
    while (b != 0) {
        uint32_t rest = a % b;

        a = b;
        b = rest;
    }
    return a;
}

/* Runs a unit, so that n_parts threads are evenly busy. */
static uint32_t choose_runs(uint32_t n_units, uint32_t n_parts, size_t n_used)
{
    uint32_t enough = TASKS_PER_PART * n_parts, runs, least, step;

    if (n_parts <= 1 || n_units >= enough || n_used < 2)
        return 1;
    runs = (enough + n_units - 1) / n_units;
    least = (n_parts + n_units - 1) / n_units;
    if (runs > n_used / RUN_BLOCKS_MIN)
        runs = n_used / RUN_BLOCKS_MIN > least ? (uint32_t)(n_used / RUN_BLOCKS_MIN) : least;
    step = n_parts / greatest_common(n_units, n_parts); /* units times this is a multiple of the parts */
    runs = (runs + step - 1) / step * step;
    return runs > n_used ? (uint32_t)n_used : runs;
}

static void choose_cut(struct attend_job *j, uint32_t n_parts)
{
    uint32_t n_rows = j->call.n_rows;

    j->n_chunks = (n_rows + ATTEND_CHUNK_ROWS - 1) / ATTEND_CHUNK_ROWS;
    j->chunk_rows = (n_rows + j->n_chunks - 1) / j->n_chunks;
    j->n_units = j->call.n_kv_heads * j->n_chunks;
    j->n_runs = choose_runs(j->n_units, n_parts, j->n_used);
    j->n_tasks = j->n_units * j->n_runs;
    j->n_seats = n_parts < j->n_tasks ? n_parts : j->n_tasks;
}

/* ---- Memory ---- */

#define ALIGN ((size_t)64)

static void *carve(uint8_t *base, size_t *at, size_t bytes)
{
    uint8_t *p = base ? base + *at : NULL;

    *at += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return p;
}

/* Where everything is, from base on. Returns the bytes of the whole. */
static size_t place(struct attend_job *j, uint8_t *base)
{
    const struct attend_call *c = &j->call;
    size_t slots = j->n_runs > 1 ? j->n_tasks : j->n_seats, lse_slots = j->n_runs > 1 ? j->n_units : j->n_seats, at = 0;
    size_t with_mass = c->a.mass ? 1 : 0;

    j->work_bytes = attn_work_bytes(j->chunk_rows, c->prefix->space->block_tokens, c->dim_k, c->a.dim_o);
    j->work_bytes = (j->work_bytes + ALIGN - 1) / ALIGN * ALIGN;
    j->q = carve(base, &at, (size_t)c->n_kv_heads * c->n_rows * c->dim_k * sizeof(*j->q));
    j->pos = carve(base, &at, c->n_rows * sizeof(*j->pos));
    j->sources = carve(base, &at, j->n_used * sizeof(*j->sources));
    j->o = carve(base, &at, slots * j->chunk_rows * c->a.dim_o * sizeof(*j->o));
    j->lse = carve(base, &at, slots * j->chunk_rows * sizeof(*j->lse));
    j->block_lse = carve(base, &at, with_mass * lse_slots * j->chunk_rows * j->n_used * sizeof(*j->block_lse));
    j->mass = carve(base, &at, with_mass * j->n_seats * j->n_used * sizeof(*j->mass));
    j->n_seen = carve(base, &at, j->n_seats * sizeof(*j->n_seen));
    j->runs_left = carve(base, &at, j->n_units * sizeof(*j->runs_left));
    j->seat_blocks = carve(base, &at, j->n_seats * j->n_used * sizeof(*j->seat_blocks));
    j->seat_work = carve(base, &at, j->n_seats * j->work_bytes);
    return at;
}

static int allocate(struct attend_job *j)
{
    size_t bytes = place(j, NULL);

    if (bytes > j->memory_bytes) {
        void *grown = NULL;

        if (posix_memalign(&grown, ALIGN, bytes) != 0)
            return error_set(j->call.prefix->space->session->cookie, KVD_E_NOMEM,
                             "no memory for an attention: %zu bytes", bytes);
        free(j->memory);
        j->memory = grown;
        j->memory_bytes = bytes;
    }
    place(j, j->memory);
    return 0;
}

void attend_job_deinit(struct attend_job *j)
{
    free(j->memory);
    *j = (struct attend_job){0};
}

struct attend_job *attend_job_of(struct kvd_prefix *p)
{
    if (!p->attend)
        p->attend = calloc(1, sizeof(*p->attend));
    return p->attend;
}

/* ---- Prepare ---- */

static size_t count_used(const struct attend_call *c)
{
    size_t n = 0;

    for (size_t b = c->a.first_block; b < c->a.first_block + c->a.n_blocks; b++)
        n += attend_needs(c, b);
    return n;
}

static int fill_sources(struct attend_job *j)
{
    const struct attend_call *c = &j->call;
    struct kvd_prefix *p = c->prefix;
    size_t n = 0;

    j->bytes = 0;
    for (size_t b = c->a.first_block; n < j->n_used; b++) {
        const void *payload;
        const struct payload_part *part;
        int r;

        if (!attend_needs(c, b))
            continue;
        r = prefix_payload(p, b, c->group, &payload);
        if (r != 0)
            return r;
        if ((uintptr_t)payload % TILE_ALIGN != 0)
            return error_set(p->space->session->cookie, KVD_E_CORRUPT,
                             "block %zu of group %u begins at no multiple of %u bytes", b, c->group, TILE_ALIGN);
        part = &space_layout_of(p->space, c->group, (p->held[c->group].hits[b].flags & SHM_ENTRY_FIRST) != 0)
                    ->parts[c->part];
        j->bytes += (uint64_t)part->n_kv_heads * part->tile.bytes;
        j->sources[n++] = (struct attend_source){(const uint8_t *)payload + part->off, &part->tile, (uint32_t)b};
    }
    return 0;
}

int attend_job_prepare(struct attend_job *j, struct kvd_prefix *prefix, const struct kvd_attention *attention,
                       uint32_t n_parts)
{
    int r = attend_check(prefix, attention, &j->call);

    if (r != 0)
        return r;
    j->n_used = count_used(&j->call);
    j->trial = false;
    choose_cut(j, n_parts);
    r = allocate(j);
    if (r == 0)
        r = fill_sources(j);
    if (r == 0)
        r = attend_gather(&j->call, j->q, j->pos);
    if (r != 0)
        return r;
    if (j->call.a.mass)
        memset(j->mass, 0, j->n_seats * j->n_used * sizeof(*j->mass));
    memset(j->n_seen, 0, j->n_seats * sizeof(*j->n_seen));
    for (uint32_t u = 0; u < j->n_units; u++)
        atomic_store_explicit(&j->runs_left[u], j->n_runs, memory_order_relaxed);
    atomic_store_explicit(&j->n_bad, 0, memory_order_relaxed);
    atomic_store_explicit(&j->error, 0, memory_order_relaxed);
    return 0;
}

/* ---- Run ---- */

/* A part of the work: rows [row0, row0 + n) of a KV head, blocks [from, to) of those that are seen. */
struct task {
    uint32_t unit, kv, row0, n;
    size_t from, to;
    float *o, *lse;   /* of its slot */
    float *block_lse; /* of its unit's first run; NULL without mass */
};

static struct task task_of(const struct attend_job *j, uint32_t number, uint32_t seat)
{
    uint32_t run = number % j->n_runs, chunk;
    size_t slot = j->n_runs > 1 ? number : seat, lse_slot;
    struct task t = {.unit = number / j->n_runs};

    lse_slot = j->n_runs > 1 ? t.unit : seat;
    t.kv = t.unit / j->n_chunks;
    chunk = t.unit % j->n_chunks;
    t.row0 = chunk * j->chunk_rows;
    t.n = j->call.n_rows - t.row0 < j->chunk_rows ? j->call.n_rows - t.row0 : j->chunk_rows;
    t.from = j->n_used * run / j->n_runs;
    t.to = j->n_used * (run + 1) / j->n_runs;
    t.o = j->o + slot * j->chunk_rows * j->call.a.dim_o;
    t.lse = j->lse + slot * j->chunk_rows;
    t.block_lse = j->call.a.mass ? j->block_lse + lse_slot * j->chunk_rows * j->n_used : NULL;
    return t;
}

/* A run's log-sum-exps of blocks are [n][its blocks], behind those of the runs before it. */
static float *block_lse_at(const struct task *t, size_t from)
{
    return t->block_lse ? t->block_lse + from * t->n : NULL;
}

static void add_mass(struct attend_job *j, const struct task *unit, uint32_t seat)
{
    double *mass = j->mass + seat * j->n_used;

    for (uint32_t r = 0; r < unit->n; r++)
        j->n_seen[seat] += unit->lse[r] > -INFINITY;
    for (uint32_t run = 0; run < j->n_runs; run++) {
        size_t from = j->n_used * run / j->n_runs, to = j->n_used * (run + 1) / j->n_runs;
        const float *of_run = block_lse_at(unit, from);

        for (uint32_t r = 0; r < unit->n; r++)
            for (size_t b = from; b < to && unit->lse[r] > -INFINITY; b++)
                mass[b] += (double)expf(of_run[r * (to - from) + (b - from)] - unit->lse[r]);
    }
}

/* All runs of a unit are there: one result. */
static void end_unit(struct attend_job *j, const struct task *any, uint32_t seat)
{
    struct task unit = task_of(j, any->unit * j->n_runs, seat);
    uint32_t dim = j->call.a.dim_o, n_bad = 0;

    for (uint32_t run = 1; run < j->n_runs; run++) {
        struct task other = task_of(j, any->unit * j->n_runs + run, seat);

        for (uint32_t r = 0; r < unit.n; r++)
            attn_merge(unit.o + (size_t)r * dim, &unit.lse[r], other.o + (size_t)r * dim, other.lse[r], dim);
    }
    for (uint32_t r = 0; r < unit.n; r++)
        n_bad += !(unit.lse[r] < INFINITY);
    if (n_bad)
        atomic_fetch_add_explicit(&j->n_bad, n_bad, memory_order_relaxed);
    if (unit.block_lse && !n_bad)
        add_mass(j, &unit, seat);
    if (!j->trial)
        attend_scatter(&j->call, unit.kv, unit.row0, unit.n, unit.o, unit.lse);
}

static void note(const struct attend_call *c, uint32_t n_rows, uint64_t call_bytes, uint64_t bytes, uint64_t ticks)
{
    struct attend_rates *rates = attend_rates_of(c);
    uint32_t class = attend_rows_class(n_rows);

    attend_cost_note(&rates->local[class][attend_size_class(call_bytes)], bytes, ticks, &rates->local_unit[class],
                     c->prefix->space->session->nsec_per_tick);
}

bool attend_job_run(struct attend_job *j, uint32_t number, uint32_t seat)
{
    const struct attend_call *c = &j->call;
    const struct kvd_space *space = c->prefix->space;
    struct task t = task_of(j, number, seat);
    struct attn_block *blocks = j->seat_blocks + seat * j->n_used;
    struct attn_params params = {c->a.scale, c->a.softcap, c->a.window_tokens, c->a.sink_tokens, c->a.dim_o};
    struct attn_rows rows = {t.n, j->q + ((size_t)t.kv * c->n_rows + t.row0) * c->dim_k, j->pos + t.row0};
    struct attn_out out = {t.o, t.lse, block_lse_at(&t, t.from)};
    uint64_t bytes = 0, ticks = attend_ticks();
    int r;

    for (size_t i = t.from; i < t.to; i++) {
        const struct attend_source *s = &j->sources[i];

        blocks[i - t.from] = (struct attn_block){s->tile + (size_t)t.kv * s->layout->bytes, s->layout,
                                                 s->block * space->block_tokens, space->block_tokens};
        bytes += s->layout->bytes;
    }
    r = attn_partial(space->session->attn, &params, blocks, t.to - t.from, &rows, &out, j->seat_work + seat * j->work_bytes);
    if (r < 0)
        atomic_store_explicit(&j->error, r, memory_order_relaxed);
    else if (!j->trial && t.to > t.from)
        note(c, t.n, j->bytes, bytes, attend_ticks() - ticks);
    /* acq_rel: who ends the unit sees what the others wrote. */
    if (atomic_fetch_sub_explicit(&j->runs_left[t.unit], 1, memory_order_acq_rel) != 1)
        return false;
    if (r == 0)
        end_unit(j, &t, seat);
    return true;
}

/* ---- Finish ---- */

static void finish_mass(struct attend_job *j)
{
    const struct kvd_attention *a = &j->call.a;
    uint64_t n_seen = 0;

    memset(a->mass, 0, a->n_blocks * sizeof(*a->mass));
    for (uint32_t s = 0; s < j->n_seats; s++)
        n_seen += j->n_seen[s];
    for (size_t i = 0; i < j->n_used && n_seen != 0; i++) {
        double sum = 0;

        for (uint32_t s = 0; s < j->n_seats; s++)
            sum += j->mass[s * j->n_used + i];
        a->mass[j->sources[i].block - a->first_block] = (float)(sum / (double)n_seen);
    }
}

int attend_job_finish(struct attend_job *j)
{
    uint64_t cookie = j->call.prefix->space->session->cookie;
    uint32_t n_bad = atomic_load_explicit(&j->n_bad, memory_order_relaxed);

    if (j->n_used && !life_leases_hold(j->call.prefix->life))
        return error_set(cookie, KVD_E_STALE, "the daemon gave up this session and its leases meanwhile");
    if (atomic_load_explicit(&j->error, memory_order_relaxed) != 0)
        return error_set(cookie, KVD_E_INTERNAL, "layer %u cannot be attended to: %d", j->call.a.layer,
                         atomic_load_explicit(&j->error, memory_order_relaxed));
    if (n_bad != 0)
        return error_set(cookie, KVD_E_VALUE,
                         "%u of %u rows have no result within fp32: their queries, or scale %g, are too large", n_bad,
                         j->call.a.n_tokens * j->call.a.n_heads, (double)j->call.a.scale);
    if (j->call.a.mass)
        finish_mass(j);
    if (j->n_used) {
        struct shm_page_header *page = j->call.prefix->life->page;

        atomic_fetch_add_explicit(&page->n_attend, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&page->n_attend_bytes, j->n_chunks * j->bytes, memory_order_relaxed);
    }
    return 0;
}
