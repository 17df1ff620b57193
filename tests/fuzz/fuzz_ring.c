/* Attention rings as a hostile worker writes them: words, submissions, requests of which anything may be wrong, completions that are not
 * read, words that change between two pieces; beside it evictions, and ends of the worker. No thread runs: the input says when one would.
 * Nothing breaks, every request that was taken is answered once, and at the end nothing is held: no lease, no memory, no request.
 *
 * The input is a program: an operation a byte, its numbers behind it. The cache outlives a run, since making one takes longer than all that
 * a run does. */
#include <stdio.h>

#include "daemon/attend-internal.h"
#include "tests/ring_fixture.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SLOT = 8192, TURNS = 64 };

struct fuzz {
    struct ring_bed bed;
    struct ring_worker worker;
    struct attend_scratch scratch;
};

struct input {
    const uint8_t *at, *end;
};

static uint64_t number(struct input *in, size_t bytes)
{
    uint64_t v = 0;
    size_t n = (size_t)(in->end - in->at) < bytes ? (size_t)(in->end - in->at) : bytes;

    memcpy(&v, in->at, n);
    in->at += n;
    return v;
}

/* A request of the right form, then some bytes of it as the input has them. */
static void submit(struct fuzz *f, struct input *in)
{
    uint64_t how = number(in, 4), off = how % 8 * SLOT;
    uint32_t n = (uint32_t)(how >> 3) % (RB_BLOCKS + 1), heads = 2u << (how >> 8) % 3;
    uint64_t bytes = rb_request(&f->bed, &f->worker, off, n, heads, how >> 12 & 1);

    for (uint32_t k = (uint32_t)(how >> 16) % 4; k > 0; k--) {
        uint32_t what = (uint32_t)number(in, 1), width = 1u << what % 4;
        uint64_t at = number(in, 1) * (what & 16 ? 4 : 1), value = number(in, width);

        memcpy(f->worker.memory + off + at % SLOT, &value, width);
    }
    if (how >> 20 & 1)
        bytes = number(in, 8);
    if (f->worker.tail - atomic_load(&f->worker.view.words->submit_head) < RB_RING)
        rb_submit(&f->bed, &f->worker, how, off, bytes);
}

static void submit_raw(struct fuzz *f, struct input *in)
{
    struct shm_submission s;
    uint64_t *words = (uint64_t *)(void *)&s;

    for (size_t i = 0; i < sizeof(s) / 8; i++)
        words[i] = number(in, i < 4 ? 8 : 1);
    rb_put(&f->bed, &f->worker, &s);
}

static void scribble(struct fuzz *f, struct input *in)
{
    struct shm_rings *w = f->worker.view.words;
    uint8_t which = (uint8_t)number(in, 1);
    uint32_t value = (uint32_t)number(in, 4);

    switch (which % 5) {
    case 0:
        atomic_store(&w->submit_tail, value);
        f->worker.tail = value;
        break;
    case 1:
        atomic_store(&w->done_head, value);
        break;
    case 2:
        atomic_store(&w->sleepers, value);
        break;
    case 3:
        atomic_store(&w->submit_head, value);
        atomic_store(&w->done_tail, value);
        break;
    default: /* of a request that may be under way */
        memcpy(f->worker.memory + which / 5 % 8 * SLOT + value % SLOT / 4 * 4, &value, 4);
    }
}

static void turns(struct fuzz *f, unsigned n)
{
    while (n-- > 0 && attend_turn(f->bed.attend, &f->scratch))
        ;
}

static void evict(struct fuzz *f, uint8_t how)
{
    struct cache_evicted evicted = {0};
    uint32_t last = RB_BLOCKS - 1, entry = shm_ref_entry(f->bed.refs[last]);

    if (cache_find(f->bed.cache, f->bed.space->id, 0, f->bed.keys[last]) == CACHE_NONE)
        f->bed.refs[last] = rb_publish(&f->bed, f->bed.space, f->bed.keys[last], f->bed.keys[last - 1], RB_BLOCKS);
    else if (how % 2)
        cache_evict(f->bed.cache, &entry, 1, NULL, NULL, 0, &evicted);
    else
        cache_drain_hits(f->bed.cache);
}

static void limit(struct fuzz *f, uint8_t how)
{
    struct attend_limits l = f->bed.config.limits;

    if (how & 1)
        l.worker_bytes = 64 << (how >> 4);
    if (how & 2)
        l.queue_bytes = 64 << (how >> 4);
    if (how & 4)
        l.slice_usec = 1 + (how >> 4);
    if (how & 8)
        l.n_blocks = how >> 4;
    attend_set_limits(f->bed.attend, &l);
}

/* Attention that touches all that it may and computes nothing: what it computes is of no interest here. */
static void touch(const struct attn_params *params, const struct attn_block *blocks, size_t n_blocks, const struct attn_rows *rows,
                  const struct attn_out *out, void *work)
{
    float sum = 0;

    (void)work;
    for (size_t b = 0; b < n_blocks; b++) {
        const uint8_t *tile = blocks[b].tile;

        sum += (float)(tile[0] + tile[blocks[b].layout->bytes - 1]);
    }
    for (uint32_t r = 0; r < rows->n; r++) {
        sum += rows->q[(size_t)r * RB_DIM] + rows->q[(size_t)(r + 1) * RB_DIM - 1] + (float)rows->q_pos[r];
        out->o[(size_t)r * params->dim_o] = out->o[(size_t)(r + 1) * params->dim_o - 1] = sum;
        out->lse[r] = 0;
        for (size_t b = 0; out->block_lse && b < n_blocks; b++)
            out->block_lse[r * n_blocks + b] = 0;
    }
}
static const struct attn_ops touch_ops = {"touch", touch};

static void reopen(struct fuzz *f)
{
    rb_worker_close(&f->worker);
    rb_worker_open(&f->bed, &f->worker);
}

/* A ring as a new worker has it. By hand, for mapping one anew takes longer than a run. */
static void renew(struct fuzz *f)
{
    struct attend_ring *ring = f->worker.ring;

    memset(f->worker.page, 0, ring_bytes(RB_RING));
    f->worker.head = f->worker.tail = 0;
    ring->head = 0;
    ring->broken = false;
    atomic_store(&ring->done, 0);
}

/* All that was taken has been answered; nothing is held. */
static void settle(struct fuzz *f)
{
    struct metrics m = {0};

    attend_set_limits(f->bed.attend, &f->bed.config.limits);
    turns(f, UINT32_MAX);
    RB_CHECK(atomic_load(&f->worker.ring->n_open) == 0 && !f->worker.ring->requests && f->worker.ring->bytes == 0);
    renew(f);
    attend_measure(f->bed.attend, &m);
    RB_CHECK(m.attend_waiting == 0 && m.attend_queue_bytes == 0);
    RB_CHECK(m.attend_done + m.attend_failed == m.attend_requests);
    RB_CHECK(f->bed.tenant->n_free == f->bed.config.n_words && f->bed.tenant->n_jobs == 0 && f->bed.tenant->n_active == 0);
    for (uint32_t i = 0; i < f->bed.config.n_words; i++)
        RB_CHECK(atomic_load(&f->bed.tenant->words[i]) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct fuzz *f; /* see above */
    struct input in = {data, data + size};

    if (!f) {
        f = calloc(1, sizeof(*f));
        RB_CHECK(f);
        rb_setup(&f->bed, 0);
        f->bed.attend->config.ops = &touch_ops;
        rb_worker_open(&f->bed, &f->worker);
    }
    while (in.at < in.end) {
        uint8_t op = (uint8_t)number(&in, 1);

        switch (op % 10) {
        case 0:
        case 1:
        case 2:
            submit(f, &in);
            break;
        case 3:
            submit_raw(f, &in);
            break;
        case 4:
            scribble(f, &in);
            break;
        case 5:
            turns(f, 1 + op / 10);
            break;
        case 6: /* reads what has come */
            f->worker.head = atomic_load(&f->worker.view.words->done_tail);
            atomic_store(&f->worker.view.words->done_head, f->worker.head);
            break;
        case 7:
            evict(f, (uint8_t)number(&in, 1));
            break;
        case 8:
            limit(f, (uint8_t)number(&in, 1));
            break;
        default:
            if (op >= 250)
                reopen(f);
            else
                turns(f, TURNS);
        }
    }
    turns(f, UINT32_MAX);
    settle(f);
    return 0;
}
