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
void attend_cost_note(attend_rate *rate, uint64_t n, uint64_t ticks, double nsec_per_tick)
{
    float sample, old = rate_get(rate);

    if (n == 0 || (int64_t)ticks <= 0) /* a clock that ran backwards: another processor's */
        return;
    sample = (float)((double)ticks * nsec_per_tick / (double)n);
    if (old > 0 && sample > 4 * old)
        sample = 4 * old;
    rate_set(rate, old <= 0 ? sample : sample < old ? old + (sample - old) / 4 : old + (sample - old) / 16);
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

/* ---- Trials: a rate that is needed and was never measured ---- */

enum { TRIAL_BLOCKS = 8 };

struct trial {
    struct attend_job *job; /* of the last blocks that are seen, all their rows */
    struct tile_layout raw; /* a tile of the space's own type */
    uint8_t *tiles;         /* decoded ones, as a worker has them in its own memory */
    uint8_t *o;
};

static double nsec_per_tick(const struct trial *t)
{
    return t->job->call.prefix->space->session->nsec_per_tick;
}

/* Each is done twice; the first time brings the bytes into the cache and does not count. */
static void time_local(const struct trial *t, attend_rate *rate)
{
    uint64_t bytes = 0, begun = 0;

    for (size_t i = 0; i < t->job->n_used; i++)
        bytes += t->job->sources[i].layout->bytes;
    for (int i = 0; i < 2; i++) {
        atomic_store_explicit(&t->job->runs_left[0], 1, memory_order_relaxed);
        begun = attend_ticks();
        attend_job_run(t->job, 0, 0);
    }
    attend_cost_note(rate, bytes, attend_ticks() - begun, nsec_per_tick(t));
}

static void time_load(const struct trial *t, attend_rate *rate)
{
    const struct kvd_space *space = t->job->call.prefix->space;
    size_t k_row = t->raw.dim_k * codec_dtype_bytes(space->dtype), v_row = t->raw.dim_v * codec_dtype_bytes(space->dtype);
    uint64_t bytes = 0, begun = 0;

    for (int i = 0; i < 2; i++) {
        bytes = 0;
        begun = attend_ticks();
        for (size_t b = 0; b < t->job->n_used; b++) {
            const struct attend_source *s = &t->job->sources[b];
            uint8_t *tile = t->tiles + b * t->raw.bytes;

            (void)tile_decode(space->session->codecs, s->layout, NULL, NULL, s->tile, 0, space->block_tokens, space->dtype,
                              tile + t->raw.k_codes_off, k_row, v_row ? tile + t->raw.v_codes_off : NULL, v_row);
            bytes += s->layout->bytes;
        }
    }
    attend_cost_note(rate, bytes, attend_ticks() - begun, nsec_per_tick(t));
}

static void time_own(const struct trial *t, attend_rate *rate)
{
    const struct attend_job *j = t->job;
    const struct attend_call *c = &j->call;
    const struct kvd_space *space = c->prefix->space;
    struct attn_params params = {c->a.scale, c->a.softcap, c->a.window_tokens, c->a.sink_tokens, c->a.dim_o};
    struct attn_rows rows = {j->chunk_rows, j->q, j->pos};
    struct attn_out out = {j->o, j->lse, NULL};
    struct attn_block blocks[TRIAL_BLOCKS];
    uint64_t begun = 0;

    for (size_t b = 0; b < j->n_used; b++)
        blocks[b] = (struct attn_block){t->tiles + b * t->raw.bytes, &t->raw, j->sources[b].block * space->block_tokens,
                                        space->block_tokens};
    for (int i = 0; i < 2; i++) {
        begun = attend_ticks();
        (void)attn_partial(space->session->attn, &params, blocks, j->n_used, &rows, &out, j->seat_work);
    }
    attend_cost_note(rate, j->n_used * (uint64_t)t->raw.bytes, attend_ticks() - begun, nsec_per_tick(t));
}

static int prepare_trial(struct trial *t, const struct attend_call *call)
{
    struct kvd_prefix *p = call->prefix;
    struct kvd_attention few = call->a;
    struct codec_spec raw = codec_spec_raw(p->space->dtype);
    const struct payload_layer *layer = &p->space->layers[call->a.layer];
    size_t end = call->a.first_block + call->a.n_blocks;
    int r;

    while (end > call->a.first_block && !attend_needs(call, end - 1))
        end--;
    few.n_blocks = 0;
    while (few.n_blocks < TRIAL_BLOCKS && end > call->a.first_block + few.n_blocks &&
           attend_needs(call, end - few.n_blocks - 1))
        few.n_blocks++;
    few.first_block = end - few.n_blocks;
    few.mass = NULL;
    few.dim_o = layer->dim_v ? 0 : few.dim_o;
    t->job = attend_job_of(p);
    if (!t->job)
        return error_set(p->space->session->cookie, KVD_E_NOMEM, "no memory for an attention");
    r = attend_job_prepare(t->job, p, &few, 1);
    if (r != 0)
        return r;
    t->job->trial = true;
    if (tile_layout_init(&t->raw, &raw, layer->dim_v ? &raw : NULL, p->space->block_tokens, layer->dim_k, layer->dim_v,
                         NULL) < 0)
        return error_set(p->space->session->cookie, KVD_E_INTERNAL, "layer %u has no raw tile", call->a.layer);
    if (posix_memalign((void **)&t->tiles, TILE_ALIGN, t->job->n_used * t->raw.bytes + TILE_ALIGN) != 0)
        return error_set(p->space->session->cookie, KVD_E_NOMEM, "no memory for a measurement");
    return 0;
}

/* Measures what was never measured, on a few blocks of one KV head. */
static int run_trial(const struct attend_call *call)
{
    struct attend_rates *rates = attend_rates_of(call);
    struct trial t = {0};
    int r = prepare_trial(&t, call);

    if (r == 0) {
        uint32_t class = attend_rows_class(t.job->chunk_rows);
        attend_rate fresh = 0;

        time_load(&t, rate_get(&rates->load) > 0 ? &fresh : &rates->load);
        time_own(&t, &rates->own[class]);
        time_local(&t, &rates->local[class][0]);
    }
    free(t.tiles);
    return r;
}

/* ---- The model ---- */

/* What a call reads. */
struct reading {
    uint64_t packed_bytes, own_bytes; /* as leased; decoded in the space's type */
    uint32_t n_chunks, chunk_rows;
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
    r.chunk_rows = (c->n_rows + r.n_chunks - 1) / r.n_chunks;
    for (size_t b = c->a.first_block; b < c->a.first_block + c->a.n_blocks; b++) {
        if (!attend_needs(c, b))
            continue;
        r.packed_bytes += (uint64_t)layer->n_kv_heads *
                          space_layout_of(space, c->group, (held->hits[b].flags & SHM_ENTRY_FIRST) != 0)
                              ->parts[c->part].tile.bytes;
        r.own_bytes += own;
    }
    return r;
}

/* Of the class that was measured and is nearest in size. 0: none of these rows was. */
static double local_rate(const struct attend_rates *rates, uint32_t rows_class, uint32_t size_class)
{
    for (uint32_t away = 0; away < ATTEND_SIZE_CLASSES; away++) {
        float at = 0;

        if (size_class + away < ATTEND_SIZE_CLASSES)
            at = rate_get(&rates->local[rows_class][size_class + away]);
        if (at <= 0 && away <= size_class)
            at = rate_get(&rates->local[rows_class][size_class - away]);
        if (at > 0)
            return (double)at;
    }
    return 0;
}

static double local_nsec(const struct attend_call *c, const struct reading *reading)
{
    const struct attend_rates *rates = attend_rates_of(c);

    return (double)rate_get(&rates->fixed) +
           reading->n_chunks * (double)reading->packed_bytes *
               local_rate(rates, attend_rows_class(reading->chunk_rows), attend_size_class(reading->packed_bytes));
}

static double load_nsec(const struct attend_call *c, const struct reading *reading, uint64_t n_steps)
{
    const struct attend_rates *rates = attend_rates_of(c);

    return (double)rate_get(&rates->load) * (double)reading->packed_bytes +
           (double)n_steps * reading->n_chunks * (double)reading->own_bytes *
               (double)rate_get(&rates->own[attend_rows_class(reading->chunk_rows)]);
}

int kvd_attend_choose(kvd_prefix *prefix, const struct kvd_attention *attention, uint64_t n_steps,
                      struct kvd_attend_costs *ret)
{
    struct kvd_attend_costs full = {.form = KVD_ATTEND_LOCAL, .daemon_usec = INFINITY};
    struct attend_call call;
    struct reading reading;
    uint32_t class;
    int r = attend_check(prefix, attention, &call);

    if (r != 0)
        return r;
    if (!ret || ret->size < sizeof(*ret) || n_steps == 0)
        return error_set(prefix->space->session->cookie, KVD_E_ARG,
                         "ret is NULL, its size below %zu, or n_steps 0", sizeof(*ret));
    reading = reading_of(&call);
    class = attend_rows_class(reading.chunk_rows);
    if (reading.packed_bytes != 0 && (rate_get(&attend_rates_of(&call)->own[class]) <= 0 ||
                                      local_rate(attend_rates_of(&call), class, 0) <= 0)) {
        r = run_trial(&call);
        if (r != 0)
            return r;
    }
    full.size = ret->size;
    full.local_usec = (double)n_steps * local_nsec(&call, &reading) / 1000;
    full.load_usec = load_nsec(&call, &reading, n_steps) / 1000;
    if (full.load_usec < full.local_usec)
        full.form = KVD_ATTEND_LOAD;
    if (prefix->space->session->attend_form != KVD_ATTEND_AUTO)
        full.form = prefix->space->session->attend_form;
    *ret = full;
    return KVD_OK;
}
