/* kvd_attend() with any arguments over blocks of any bytes: an error or numbers, and nothing is read or written that the strides do not
 * name. The session, the space and the lease are made by hand; there is no daemon.
 * | shape | what | KV heads | ratio | tokens | dtype | layer | 7 stride and range codes | window | sinks | position | scale | ... |
 * then bytes for strides and positions, for the queries, and for the blocks. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "client/libkvd/kvd_attend_cost.h"
#include "client/libkvd/kvd_attend_job.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { LAYERS = 2, BLOCKS = 4, TOKENS = 16, EXTENT_MAX = 1 << 16 };

static const struct {
    uint32_t dim_k, dim_v, window;
    const char *k, *v, *first;
} shapes[] = {
    {64, 64, 0, "kc4", "tq4", "raw"}, {16, 32, 0, "raw", "raw", "raw"},  {64, 0, 0, "kc4", "", "raw"},
    {32, 32, 20, "uq4", "fp8", ""},   {64, 64, 0, "int8", "tq3", "f32"}, {128, 128, 33, "kc4:grid=e2m1", "bf16", "fp8"},
};

struct input {
    const uint8_t *data;
    size_t size;
};

static void take(struct input *in, void *to, size_t n)
{
    size_t here = n < in->size ? n : in->size;

    memset(to, 0x35, n);
    if (here)
        memcpy(to, in->data, here);
    in->data += here;
    in->size -= here;
}

static uint8_t byte(struct input *in)
{
    uint8_t b;

    take(in, &b, 1);
    return b;
}

static uint64_t word(struct input *in)
{
    uint64_t w;

    take(in, &w, sizeof(w));
    return w;
}

/* ---- a session by hand ---- */

struct scene {
    uint32_t wiped;
    struct kvd session;
    struct kvd_space space;
    struct kvd_prefix prefix;
    struct life life;
    struct shm_index_header index;
    struct shm_page_header page;
    struct life_slab slabs[LIFE_SLABS_PER_DIR];
    struct payload_layer layers[LAYERS];
    uint32_t layer_group[LAYERS], layer_index[LAYERS];
    struct lookup_hit hits[BLOCKS];
    uint8_t *slab;
};

static void check(bool good)
{
    if (!good)
        abort();
}

static void make_space(struct scene *s, uint8_t shape, uint32_t n_kv_heads)
{
    struct kvd_space *space = &s->space;
    const char *first = shapes[shape].first;

    space->session = &s->session;
    space->block_tokens = TOKENS;
    space->n_groups = 1;
    space->n_layers = LAYERS;
    space->dtype = CODEC_F16;
    space->layers = s->layers;
    space->layer_group = s->layer_group;
    space->layer_index = s->layer_index;
    space->group[0].window_tokens = shapes[shape].window;
    for (uint32_t l = 0; l < LAYERS; l++) {
        s->layers[l] = (struct payload_layer){.n_kv_heads = n_kv_heads, .dim_k = shapes[shape].dim_k, .dim_v = shapes[shape].dim_v};
        s->layer_index[l] = l;
        check(payload_layer_codecs(&s->layers[l], CODEC_F16, shapes[shape].k, shapes[shape].v, first, first, NULL) == 0);
    }
    check(payload_layout_create(s->layers, LAYERS, 0, false, TOKENS, &space->group[0].plain, NULL) == 0);
    check(payload_layout_create(s->layers, LAYERS, 0, true, TOKENS, &space->group[0].first, NULL) == 0);
    check(attend_rates_create(space) == 0);
}

/* All blocks, or a sliding group's last ones. */
static void make_lease(struct scene *s, struct input *in)
{
    struct kvd_prefix *p = &s->prefix;
    size_t slot = s->space.group[0].first->bytes + s->space.group[0].plain->bytes;

    s->slab = aligned_alloc(TILE_ALIGN, slot * BLOCKS);
    check(s->slab != NULL);
    p->space = &s->space;
    p->max_blocks = p->n_matched = BLOCKS;
    p->life = &s->life;
    p->held[0] = (struct held){.lo = s->space.group[0].window_tokens ? 2 : 0, .hi = BLOCKS, .hits = s->hits};
    for (uint32_t b = 0; b < BLOCKS; b++) {
        s->hits[b].host = shm_loc(0, slot * b);
        s->hits[b].flags = b == 0 ? SHM_ENTRY_FIRST : 0;
        s->hits[b].bytes = (uint32_t)space_layout_of(&s->space, 0, b == 0)->bytes;
    }
    take(in, s->slab, slot * BLOCKS);
    s->life.page = &s->page;
    s->life.view.header = &s->index;
    atomic_store(&s->slabs[0].base, (uintptr_t)s->slab);
    atomic_store(&s->slabs[0].bytes, slot * BLOCKS);
    atomic_store(&s->life.slab_dirs[0], s->slabs);
}

static struct scene *make(uint8_t shape, uint32_t n_kv_heads)
{
    struct scene *s = calloc(1, sizeof(*s));
    struct cpu_features cpu;

    check(s != NULL);
    cpu_detect(&cpu);
    s->wiped = 1;
    s->session.wiped = &s->wiped;
    s->session.codecs = codec_ops_choose(&cpu);
    s->session.attn = attn_ops_choose(&cpu);
    s->session.nsec_per_tick = 0.5;
    make_space(s, shape, n_kv_heads);
    return s;
}

static void destroy(struct scene *s)
{
    payload_layout_destroy(s->space.group[0].plain);
    payload_layout_destroy(s->space.group[0].first);
    free(s->space.rates);
    free(s->space.layer_rates);
    if (s->prefix.attend)
        attend_job_deinit(s->prefix.attend);
    free(s->prefix.attend);
    free(s->slab);
    free(s);
}

/* ---- an attention ---- */

/* 0: as it is by default; some reasonable ones; any. */
static size_t stride(struct input *in, uint8_t code, size_t row)
{
    switch (code % 6) {
    case 0:
    case 1:
        return 0;
    case 2:
        return row;
    case 3:
        return row + 16;
    case 4:
        return row * (code / 6 % 8);
    }
    return (size_t)word(in);
}

static struct kvd_attention read_call(struct input *in, const struct scene *s, uint8_t what, uint32_t positions[16])
{
    struct kvd_attention a = KVD_ATTENTION_INIT;
    size_t q_row, o_row;
    uint16_t small;

    a.n_heads = s->layers[0].n_kv_heads * (byte(in) % 5);
    a.n_tokens = byte(in) % 17;
    a.dtype = (enum kvd_dtype)(byte(in) % 4);
    a.layer = byte(in) % (LAYERS + 1);
    a.dim_o = s->layers[0].dim_v ? 0 : 16 * (uint32_t)(byte(in) % 6);
    q_row = s->layers[0].dim_k * (a.dtype == KVD_F32 ? 4 : 2);
    o_row = (s->layers[0].dim_v ? s->layers[0].dim_v : a.dim_o) * sizeof(float);
    a.q_head_stride = stride(in, byte(in), q_row);
    a.q_token_stride = stride(in, byte(in), q_row * a.n_heads);
    a.o_head_stride = stride(in, byte(in), o_row);
    a.o_token_stride = stride(in, byte(in), o_row * a.n_heads);
    a.first_block = byte(in) % (BLOCKS + 1);
    a.n_blocks = what & 1 ? (size_t)word(in) : BLOCKS - a.first_block;
    take(in, &small, sizeof(small));
    a.window_tokens = what & 2 ? small % 80 : 0;
    a.sink_tokens = what & 4 ? small / 256 % 40 : 0;
    a.first_position = what & 8 ? (uint32_t)word(in) : BLOCKS * TOKENS;
    a.softcap = what & 16 ? 30 : 0;
    a.scale = 0.2f;
    if (what & 32)
        take(in, &a.scale, sizeof(a.scale));
    if (what & 64) {
        take(in, positions, 16 * sizeof(*positions));
        for (int i = 0; i < 16; i++)
            positions[i] %= 2 * BLOCKS * TOKENS;
        a.positions = a.n_tokens <= 16 ? positions : NULL;
    }
    return a;
}

static size_t reach(size_t n_tokens, size_t n_heads, size_t token_stride, size_t head_stride, size_t row)
{
    return (n_tokens - 1) * token_stride + (n_heads - 1) * head_stride + row; /* checked: it does not overflow */
}

/* Bytes of o that are no row's are as they were. */
static void check_gaps(const struct attend_call *c, const uint8_t *o, size_t bytes)
{
    uint8_t *is_row = calloc(bytes, 1);

    check(is_row != NULL);
    for (uint32_t t = 0; t < c->a.n_tokens; t++)
        for (uint32_t h = 0; h < c->a.n_heads; h++)
            memset(is_row + t * c->a.o_token_stride + h * c->a.o_head_stride, 1, c->a.dim_o * sizeof(float));
    for (size_t i = 0; i < bytes; i++)
        check(is_row[i] || o[i] == 0xa5);
    free(is_row);
}

static void in_parts(struct scene *s, const struct kvd_attention *a, uint32_t n_parts)
{
    kvd_attending *attending;

    check(kvd_attending_create(&s->space, &attending) == 0);
    if (kvd_attend_begin(attending, &s->prefix, a, n_parts) == 0) {
        while (kvd_attend_work(attending) == KVD_OK) {
        }
        (void)kvd_attend_wait(attending, -1);
    }
    kvd_attending_destroy(attending);
}

static void run(struct scene *s, struct input *in, struct kvd_attention a, uint8_t how)
{
    struct kvd_attend_costs costs = {.size = sizeof(costs)};
    float anything = 0;
    struct attend_call call;
    size_t q_bytes, o_bytes, n_rows;
    int r;

    a.q = a.o = a.lse = &anything;
    r = attend_check(&s->prefix, &a, &call);
    if (r != 0) {
        check(kvd_attend(&s->prefix, &a, KVD_ATTEND_LOCAL) == r && kvd_attend(&s->prefix, &a, KVD_ATTEND_AUTO) == r);
        return;
    }
    q_bytes = reach(a.n_tokens, a.n_heads, call.a.q_token_stride, call.a.q_head_stride,
                    call.dim_k * codec_dtype_bytes(dtype_of(a.dtype)));
    o_bytes = reach(a.n_tokens, a.n_heads, call.a.o_token_stride, call.a.o_head_stride, call.a.dim_o * sizeof(float));
    if (q_bytes > EXTENT_MAX || o_bytes > EXTENT_MAX)
        return;
    n_rows = (size_t)a.n_tokens * a.n_heads;
    a.q = malloc(q_bytes); /* exactly: the sanitizer sees one byte more */
    a.o = malloc(o_bytes);
    a.lse = malloc(n_rows * sizeof(float));
    a.mass = how & 1 ? malloc((a.n_blocks ? a.n_blocks : 1) * sizeof(float)) : NULL;
    check(a.q && a.o && a.lse && (a.mass || !(how & 1)));
    take(in, (void *)(uintptr_t)a.q, q_bytes);
    memset(a.o, 0xa5, o_bytes);
    r = kvd_attend(&s->prefix, &a, how & 2 ? KVD_ATTEND_AUTO : KVD_ATTEND_LOCAL);
    check(r == KVD_OK || r == KVD_E_ARG || r == KVD_E_VALUE);
    for (size_t i = 0; r == KVD_OK && i < n_rows; i++)
        check(a.lse[i] < INFINITY);
    check_gaps(&call, (const uint8_t *)a.o, o_bytes);
    if (how & 4)
        in_parts(s, &a, how / 16);
    if ((how & 8) && r == KVD_OK)
        check(kvd_attend_choose(&s->prefix, &a, 3, &costs) == 0);
    check_gaps(&call, (const uint8_t *)a.o, o_bytes);
    free((void *)(uintptr_t)a.q);
    free(a.o);
    free(a.lse);
    free(a.mass);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    uint32_t positions[16];
    struct kvd_attention a;
    struct scene *s;
    uint8_t shape, what, how;

    if (size < 16)
        return 0;
    shape = byte(&in) % (sizeof(shapes) / sizeof(shapes[0]));
    what = byte(&in);
    how = byte(&in);
    s = make(shape, 1 + byte(&in) % 3);
    a = read_call(&in, s, what, positions);
    make_lease(s, &in);
    run(s, &in, a, how);
    destroy(s);
    return 0;
}
