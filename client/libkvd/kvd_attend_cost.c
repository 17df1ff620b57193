#include "kvd_attend_cost.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kvd_attend_job.h"

/* ---- Rates ---- */

static float rate_get(const attend_rate *rate)
{
    uint32_t bits = atomic_load_explicit(rate, memory_order_relaxed);
    float value;

    memcpy(&value, &bits, sizeof(value));
    return value;
}

static void rate_set(attend_rate *rate, float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof(bits));
    atomic_store_explicit(rate, bits, memory_order_relaxed);
}

/* A moving average that follows what is faster at once and what is slower with hesitation: on a shared machine a sample is often
 * too large, by being interrupted, and never too small. */
static void note_nsec(attend_rate *rate, double nsec)
{
    float sample = (float)nsec, old = rate_get(rate);

    if (old > 0 && sample > 4 * old)
        sample = 4 * old;
    rate_set(rate, old <= 0 ? sample : sample < old ? old + (sample - old) / 4 : old + (sample - old) / 16);
}

void attend_cost_note(attend_rate *rate, uint64_t n, uint64_t ticks, const attend_rate *less, double nsec_per_tick)
{
    double nsec = (double)ticks * nsec_per_tick, known = less ? (double)rate_get(less) : 0;

    if (n == 0 || (int64_t)ticks <= 0) /* a clock that ran backwards: another processor's */
        return;
    note_nsec(rate, fmax(nsec - known, nsec / 16) / (double)n);
}

static bool same_shape(const struct payload_layer *a, const struct payload_layer *b)
{
    return a->n_kv_heads == b->n_kv_heads && a->dim_k == b->dim_k && a->dim_v == b->dim_v && a->group == b->group &&
           codec_spec_equal(&a->k, &b->k) && codec_spec_equal(&a->v, &b->v);
}

int attend_rates_create(struct kvd_space *space)
{
    uint32_t n = 0, *first_of; /* layers that are the first of their kind */

    space->layer_rates = calloc(space->n_layers, sizeof(*space->layer_rates));
    first_of = calloc(space->n_layers, sizeof(*first_of));
    if (!space->layer_rates || !first_of) {
        free(first_of);
        return KVD_E_NOMEM;
    }
    for (uint32_t l = 0; l < space->n_layers; l++) {
        uint32_t kind = 0;

        while (kind < n && !same_shape(&space->layers[l], &space->layers[first_of[kind]]))
            kind++;
        if (kind == n)
            first_of[n++] = l;
        space->layer_rates[l] = kind;
    }
    free(first_of);
    space->rates = calloc(n, sizeof(*space->rates));
    return space->rates ? 0 : KVD_E_NOMEM;
}

/* ---- The model ---- */

/* What a call reads, and how it is cut. */
struct reading {
    size_t n_blocks;                  /* that are seen */
    uint64_t packed_bytes, own_bytes; /* as leased; decoded in the space's type */
    uint32_t n_chunks, n_units, rows_class;
};

static struct reading reading_of(const struct attend_call *c)
{
    const struct kvd_space *space = c->prefix->space;
    const struct held *held = &c->prefix->held[c->group];
    const struct payload_layer *layer = &space->layers[c->a.layer];
    uint64_t own = (uint64_t)space->block_tokens * layer->n_kv_heads * (layer->dim_k + layer->dim_v) *
                   codec_dtype_bytes(space->dtype);
    struct reading r = {0};

    r.n_chunks = (c->n_rows + ATTEND_CHUNK_ROWS - 1) / ATTEND_CHUNK_ROWS;
    r.n_units = r.n_chunks * c->n_kv_heads;
    r.rows_class = attend_rows_class((c->n_rows + r.n_chunks - 1) / r.n_chunks);
    for (size_t b = c->a.first_block; b < c->a.first_block + c->a.n_blocks; b++) {
        if (!attend_needs(c, b))
            continue;
        r.n_blocks++;
        r.packed_bytes += (uint64_t)layer->n_kv_heads *
                          space_layout_of(space, c->group, (held->hits[b].flags & SHM_ENTRY_FIRST) != 0)
                              ->parts[c->part].tile.bytes;
        r.own_bytes += own;
    }
    return r;
}

/* Of the size that was measured and is nearest. 0: none was. */
static double nearest(const attend_rate rates[ATTEND_SIZE_CLASSES], uint64_t bytes)
{
    uint32_t class = attend_size_class(bytes);

    for (uint32_t away = 0; away < ATTEND_SIZE_CLASSES; away++) {
        float at = 0;

        if (class + away < ATTEND_SIZE_CLASSES)
            at = rate_get(&rates[class + away]);
        if (at <= 0 && away <= class)
            at = rate_get(&rates[class - away]);
        if (at > 0)
            return (double)at;
    }
    return 0;
}

static double local_nsec(const struct attend_rates *rates, const struct reading *r)
{
    return (double)rate_get(&rates->local_call) + r->n_units * (double)rate_get(&rates->local_unit[r->rows_class]) +
           r->n_chunks * (double)r->packed_bytes * nearest(rates->local[r->rows_class], r->packed_bytes);
}

/* INFINITY: the daemon was never heard of. */
static double daemon_nsec(const struct attend_rates *rates, const struct reading *r)
{
    double rate = nearest(rates->daemon[r->rows_class], r->packed_bytes);

    return rate > 0 ? (double)rate_get(&rates->daemon_call[r->rows_class]) +
                          r->n_chunks * (double)r->packed_bytes * rate
                    : (double)INFINITY;
}

static double load_nsec(const struct attend_rates *rates, const struct reading *r, uint64_t n_steps)
{
    return (double)rate_get(&rates->load) * (double)r->packed_bytes +
           (double)n_steps * r->n_chunks * (double)r->own_bytes * (double)rate_get(&rates->own[r->rows_class]);
}

void attend_cost_note_daemon(const struct attend_call *call, uint64_t ticks, bool failed)
{
    struct attend_rates *rates = attend_rates_of(call);
    struct reading r = reading_of(call);

    atomic_store_explicit(failed ? &rates->daemon_failed_at : &rates->daemon_at, attend_ticks(), memory_order_relaxed);
    if (!failed)
        attend_cost_note(&rates->daemon[r.rows_class][attend_size_class(r.packed_bytes)], r.n_chunks * r.packed_bytes, ticks,
                         &rates->daemon_call[r.rows_class], call->prefix->space->session->nsec_per_tick);
}

/* ---- Trials: what is needed and was never measured ---- */

/* On so many of the last blocks that are seen; and, for what a call costs whatever it reads, on fewer. Each is done more than once, the
 * best counts: the first time brings the bytes into the cache. */
enum { TRIAL_BLOCKS = 8, TRIAL_FEW = 2, TRIAL_TIMES = 3 };

struct trial {
    const struct attend_call *call;
    size_t end;             /* behind the last block that is seen */
    struct attend_job *job; /* the prefix's */
    struct tile_layout raw; /* a tile of the space's own type */
    uint8_t *tiles;         /* decoded ones, as a worker has them in its own memory */
    float *o, *lse;         /* for what the daemon delivers */
};

static double nsec_since(const struct trial *t, uint64_t begun)
{
    return (double)(attend_ticks() - begun) * t->call->prefix->space->session->nsec_per_tick;
}

/* The same attention over the last n blocks. */
static struct kvd_attention last_blocks(const struct trial *t, size_t n)
{
    struct kvd_attention a = t->call->a;

    a.first_block = t->end - n;
    a.n_blocks = n;
    a.mass = NULL;
    a.dim_o = t->call->prefix->space->layers[a.layer].dim_v ? 0 : a.dim_o;
    a.o = t->o;
    a.lse = t->lse;
    a.o_token_stride = a.o_head_stride = 0;
    return a;
}

static int prepare_job(struct trial *t, size_t n)
{
    struct kvd_attention a = last_blocks(t, n);
    int r = attend_job_prepare(t->job, t->call->prefix, &a, 1);

    t->job->trial = true;
    return r;
}

/* Of the first task, in nanoseconds: one KV head. */
static double time_task(const struct trial *t)
{
    double best = INFINITY;

    for (int i = 0; i < TRIAL_TIMES; i++) {
        uint64_t begun = attend_ticks();

        atomic_store_explicit(&t->job->runs_left[0], 1, memory_order_relaxed);
        attend_job_run(t->job, 0, 0);
        best = fmin(best, nsec_since(t, begun));
    }
    return best;
}

static double time_load(const struct trial *t)
{
    const struct kvd_space *space = t->call->prefix->space;
    size_t k_row = t->raw.dim_k * codec_dtype_bytes(space->dtype), v_row = t->raw.dim_v * codec_dtype_bytes(space->dtype);
    double best = INFINITY;

    for (int i = 0; i < TRIAL_TIMES; i++) {
        uint64_t begun = attend_ticks();

        for (size_t b = 0; b < t->job->n_used; b++) {
            const struct attend_source *s = &t->job->sources[b];
            uint8_t *tile = t->tiles + b * t->raw.bytes;

            (void)tile_decode(space->session->codecs, s->layout, NULL, NULL, s->tile, 0, space->block_tokens, space->dtype,
                              tile + t->raw.k_codes_off, k_row, v_row ? tile + t->raw.v_codes_off : NULL, v_row);
        }
        best = fmin(best, nsec_since(t, begun));
    }
    return best;
}

static double time_own(const struct trial *t)
{
    const struct attend_job *j = t->job;
    const struct attend_call *c = &j->call;
    const struct kvd_space *space = c->prefix->space;
    struct attn_params params = {c->a.scale, c->a.softcap, c->a.window_tokens, c->a.sink_tokens, c->a.dim_o};
    struct attn_rows rows = {j->chunk_rows, j->q, j->pos};
    struct attn_out out = {j->o, j->lse, NULL};
    struct attn_block blocks[TRIAL_BLOCKS];
    double best = INFINITY;

    for (size_t b = 0; b < j->n_used; b++)
        blocks[b] = (struct attn_block){t->tiles + b * t->raw.bytes, &t->raw, j->sources[b].block * space->block_tokens,
                                        space->block_tokens};
    for (int i = 0; i < TRIAL_TIMES; i++) {
        uint64_t begun = attend_ticks();

        (void)attn_partial(space->session->attn, &params, blocks, j->n_used, &rows, &out, j->seat_work);
        best = fmin(best, nsec_since(t, begun));
    }
    return best;
}

/* Splits what n and few blocks took into what each byte costs and what the call costs. Rates that calls have noted so far hold both
 * in one, and go. */
static void split(double nsec, uint64_t bytes, double few_nsec, uint64_t few_bytes, attend_rate per_byte[ATTEND_SIZE_CLASSES],
                  attend_rate *per_call)
{
    double rate = few_bytes && nsec > few_nsec ? (nsec - few_nsec) / (double)(bytes - few_bytes) : nsec / (double)bytes;

    for (int i = 0; i < ATTEND_SIZE_CLASSES; i++)
        rate_set(&per_byte[i], 0);
    rate_set(&per_byte[0], (float)rate);
    rate_set(per_call, (float)fmax(nsec - rate * (double)bytes, 1));
}

static uint64_t tile_bytes(const struct attend_job *j)
{
    uint64_t sum = 0;

    for (size_t i = 0; i < j->n_used; i++)
        sum += j->sources[i].layout->bytes;
    return sum;
}

static int try_local(struct trial *t, struct attend_rates *rates, const struct reading *reading, size_t n, size_t few)
{
    double nsec, few_nsec = 0, load, own;
    uint64_t bytes, few_bytes = 0;
    int r = prepare_job(t, n);

    if (r != 0)
        return r;
    nsec = time_task(t);
    bytes = tile_bytes(t->job);
    load = time_load(t);
    own = time_own(t);
    if (rate_get(&rates->load) <= 0) /* kvd_load() knows it better */
        note_nsec(&rates->load, load / (double)bytes);
    note_nsec(&rates->own[reading->rows_class], own / (double)(t->job->n_used * (uint64_t)t->raw.bytes));
    if (few) {
        r = prepare_job(t, few);
        if (r != 0)
            return r;
        few_nsec = time_task(t);
        few_bytes = tile_bytes(t->job);
    }
    split(nsec, bytes, few_nsec, few_bytes, rates->local[reading->rows_class], &rates->local_unit[reading->rows_class]);
    return 0;
}

/* The best of a few calls over the last n blocks, in nanoseconds; below 0: the daemon does not answer. */
static double time_daemon(const struct trial *t, size_t n)
{
    struct kvd_attention a = last_blocks(t, n);
    double best = INFINITY;

    for (int i = 0; i < TRIAL_TIMES; i++) {
        uint64_t begun = attend_ticks();

        if (attend_daemon(t->call->prefix, &a, ATTEND_TRIAL_MSEC, 0) != 0)
            return -1;
        best = fmin(best, nsec_since(t, begun));
    }
    return best;
}

static void try_daemon(const struct trial *t, struct attend_rates *rates, const struct reading *reading, size_t n, size_t few)
{
    double nsec = time_daemon(t, n), few_nsec = nsec >= 0 && few ? time_daemon(t, few) : 0;
    uint64_t bytes = reading->n_chunks * (reading->packed_bytes / reading->n_blocks);

    if (nsec < 0 || few_nsec < 0)
        atomic_store_explicit(&rates->daemon_failed_at, attend_ticks(), memory_order_relaxed);
    else
        split(nsec, n * bytes, few_nsec, few * bytes, rates->daemon[reading->rows_class],
              &rates->daemon_call[reading->rows_class]);
}

static int allocate_trial(struct trial *t)
{
    const struct attend_call *c = t->call;
    const struct kvd_space *space = c->prefix->space;
    const struct payload_layer *layer = &space->layers[c->a.layer];
    struct codec_spec raw = codec_spec_raw(space->dtype);
    size_t n_rows = (size_t)c->a.n_tokens * c->a.n_heads;

    t->job = attend_job_of(c->prefix);
    if (tile_layout_init(&t->raw, &raw, layer->dim_v ? &raw : NULL, space->block_tokens, layer->dim_k, layer->dim_v, NULL) < 0)
        return error_set(space->session->cookie, KVD_E_INTERNAL, "layer %u has no raw tile", c->a.layer);
    t->o = malloc(n_rows * c->a.dim_o * sizeof(*t->o));
    t->lse = malloc(n_rows * sizeof(*t->lse));
    if (!t->job || !t->o || !t->lse || posix_memalign((void **)&t->tiles, TILE_ALIGN, TRIAL_BLOCKS * (size_t)t->raw.bytes) != 0)
        return error_set(space->session->cookie, KVD_E_NOMEM, "no memory for a measurement");
    return 0;
}

static bool daemon_can_be_asked(const struct kvd_prefix *p)
{
    return p->space->session->attend_form != KVD_ATTEND_LOCAL && p->life && p->life->rings && life_alive(p->life);
}

/* Since ticks `at`, which is never if it is 0. */
static double seconds_since(const struct kvd *s, uint64_t at)
{
    return at == 0 ? (double)INFINITY : (double)(int64_t)(attend_ticks() - at) * s->nsec_per_tick / 1e9;
}

static bool daemon_failed_lately(const struct kvd *s, const struct attend_rates *rates)
{
    return seconds_since(s, atomic_load_explicit(&rates->daemon_failed_at, memory_order_relaxed)) < ATTEND_RETRY_SEC;
}

/* Measures what the model needs for this call and has never seen. */
static int learn(const struct attend_call *call, const struct reading *reading)
{
    struct attend_rates *rates = attend_rates_of(call);
    size_t n = reading->n_blocks < TRIAL_BLOCKS ? reading->n_blocks : TRIAL_BLOCKS, few = n >= 2 * TRIAL_FEW ? TRIAL_FEW : 0;
    bool local = rate_get(&rates->own[reading->rows_class]) <= 0 || rate_get(&rates->local_unit[reading->rows_class]) <= 0;
    bool daemon = rate_get(&rates->daemon_call[reading->rows_class]) <= 0 && daemon_can_be_asked(call->prefix) &&
                  !daemon_failed_lately(call->prefix->space->session, rates);
    struct trial t = {.call = call, .end = call->a.first_block + call->a.n_blocks};
    int r;

    if (n == 0 || (!local && !daemon))
        return 0;
    while (!attend_needs(call, t.end - 1))
        t.end--;
    for (size_t run = 1; run < n; run++) /* a gap, of positions far apart */
        if (!attend_needs(call, t.end - 1 - run))
            n = run, few = 0;
    r = allocate_trial(&t);
    if (r == 0 && local)
        r = try_local(&t, rates, reading, n, few);
    if (r == 0 && daemon)
        try_daemon(&t, rates, reading, n, few);
    free(t.o);
    free(t.lse);
    free(t.tiles);
    return r;
}

/* ---- The choice ---- */

int kvd_attend_choose(kvd_prefix *prefix, const struct kvd_attention *attention, uint64_t n_steps,
                      struct kvd_attend_costs *ret)
{
    struct kvd_attend_costs full = {.form = KVD_ATTEND_LOCAL};
    const struct attend_rates *rates;
    struct attend_call call;
    struct reading reading;
    int r = attend_check(prefix, attention, &call);

    if (r != 0)
        return r;
    if (!ret || ret->size < sizeof(*ret) || n_steps == 0)
        return error_set(prefix->space->session->cookie, KVD_E_ARG,
                         "ret is NULL, its size below %zu, or n_steps 0", sizeof(*ret));
    reading = reading_of(&call);
    rates = attend_rates_of(&call);
    r = learn(&call, &reading);
    if (r != 0)
        return r;
    full.size = ret->size;
    full.local_usec = (double)n_steps * local_nsec(rates, &reading) / 1000;
    full.daemon_usec = daemon_can_be_asked(prefix) && !daemon_failed_lately(prefix->space->session, rates)
                           ? (double)n_steps * daemon_nsec(rates, &reading) / 1000
                           : (double)INFINITY;
    full.load_usec = load_nsec(rates, &reading, n_steps) / 1000;
    if (full.daemon_usec < full.local_usec)
        full.form = KVD_ATTEND_DAEMON;
    if (full.load_usec < fmin(full.local_usec, full.daemon_usec))
        full.form = KVD_ATTEND_LOAD;
    if (prefix->space->session->attend_form != KVD_ATTEND_AUTO)
        full.form = prefix->space->session->attend_form;
    *ret = full;
    return KVD_OK;
}

/* The form that is not used is tried now and then: each so many seconds, or as many as it is times as dear if these are more. */
#define OTHER_SEC 1.0
/* A daemon that takes so many times as long as expected (and so many milliseconds) is not waited for. */
#define PATIENCE_TIMES 20.0
#define PATIENCE_MSEC 20.0

static bool turn_of_other(const struct kvd *s, double its_nsec, double nsec, const _Atomic uint64_t *its_last)
{
    return seconds_since(s, atomic_load_explicit(its_last, memory_order_relaxed)) > OTHER_SEC * fmax(1, its_nsec / nsec);
}

int attend_cost_choose(const struct attend_call *call, enum kvd_attend_form *ret, uint32_t *ret_timeout_msec)
{
    const struct kvd *s = call->prefix->space->session;
    struct attend_rates *rates = attend_rates_of(call);
    struct reading reading;
    double local, daemon;
    int r;

    *ret = KVD_ATTEND_LOCAL;
    *ret_timeout_msec = s->timeout_msec;
    if (!daemon_can_be_asked(call->prefix) || daemon_failed_lately(s, rates))
        return 0;
    if (s->attend_form == KVD_ATTEND_DAEMON) {
        *ret = KVD_ATTEND_DAEMON;
        return 0;
    }
    reading = reading_of(call);
    r = learn(call, &reading);
    if (r != 0)
        return r;
    local = local_nsec(rates, &reading);
    daemon = daemon_nsec(rates, &reading);
    if (daemon < local ? !turn_of_other(s, local, daemon, &rates->local_at)
                       : daemon < (double)INFINITY && turn_of_other(s, daemon, local, &rates->daemon_at))
        *ret = KVD_ATTEND_DAEMON;
    *ret_timeout_msec = (uint32_t)fmin(fmax(PATIENCE_TIMES * daemon / 1e6, PATIENCE_MSEC), s->timeout_msec);
    return 0;
}
