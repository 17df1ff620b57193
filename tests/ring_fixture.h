/* The attention threads with a cache and one or more rings, all in this process: what a worker would write is written by hand.
 *
 * A space of one layer, raw codecs, 2 KV heads, so that a test knows every number: block b of the chain holds V that is b + 1 in every
 * channel, and K that is zero, so that all visible tokens weigh the same. Used by check_ring and fuzz_ring. */
#ifndef KVD_TESTS_RING_FIXTURE_H
#define KVD_TESTS_RING_FIXTURE_H

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "daemon/attend.h"
#include "daemon/metrics.h"
#include "proto/ring.h"
#include "store/cache.h"

enum { RB_BLOCKS = 12, RB_TOKENS = 16, RB_HEADS = 2, RB_DIM = 16, RB_RING = 16, RB_MEMORY = 1 << 20, RB_ENTRIES = 64 };

struct ring_bed {
    struct budget budget;
    struct cache *cache;
    struct space *space, *other; /* other: of another layout, with one block */
    uint64_t now;
    uint64_t refs[RB_BLOCKS], other_ref;
    uint8_t keys[RB_BLOCKS][KEY_BYTES];
    struct attend_config config;
    struct attend *attend;
    struct attend_tenant *tenant;
};

/* A worker. */
struct ring_worker {
    struct attend_ring *ring;
    void *page;
    struct ring_view view;
    uint8_t *memory;
    int fd;
    uint32_t id; /* of the memory */
    uint32_t tail, head;
};

#define RB_CHECK(x)                                                                                                    \
    do {                                                                                                               \
        if (!(x)) {                                                                                                    \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x);                                                     \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

static inline uint64_t rb_clock(void *ctx)
{
    struct ring_bed *b = ctx;

    return b->now += 1000;
}

static inline uint64_t rb_usec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* V of a block all `value` (fp32), K zero. The ref of the entry. */
static inline uint64_t rb_publish(struct ring_bed *b, struct space *space, const uint8_t *key, const uint8_t *parent, float value)
{
    const struct payload_layout *layout = space_layout(space, 0, false);
    struct cache_slot slot;
    uint32_t entry;

    RB_CHECK(cache_reserve(b->cache, space, 0, key, parent, false, &slot) == CACHE_RESERVED);
    memset(slot.payload, 0, slot.bytes);
    for (uint32_t h = 0; h < RB_HEADS; h++) {
        const struct payload_part *part = &layout->parts[0];
        float *v = (float *)(void *)((char *)slot.payload + part->off + (uint64_t)h * part->tile.bytes + part->tile.v_codes_off);

        for (uint32_t i = 0; i < RB_TOKENS * RB_DIM; i++)
            v[i] = value;
    }
    entry = slot.entry;
    RB_CHECK(cache_commit(b->cache, &slot) == 0);
    return shm_ref(entry, atomic_load(&cache_view(b->cache)->entries[entry].gen));
}

static inline struct space *rb_space(struct ring_bed *b, const char *model)
{
    static const uint32_t window = 0;
    static const struct space_layer_desc layer = {RB_HEADS, RB_DIM, RB_DIM, 0, "raw", "raw", "raw", "raw"};
    struct space_desc desc = {.model = model, .revision = "", .rope = "", .shard = "", .dtype = CODEC_F32, .block_tokens = RB_TOKENS,
                              .window_tokens = &window, .n_groups = 1, .layers = &layer, .n_layers = 1};
    struct space *space = NULL;
    const char *why;

    RB_CHECK(cache_space_open(b->cache, &desc, &space, &why) == 0);
    return space;
}

static inline void rb_setup(struct ring_bed *b, unsigned n_threads)
{
    struct cache_config config = {.tenant = "t", .domain = "d", .n_entries = RB_ENTRIES, .quota_bytes = 8 << 20, .n_spaces_max = 4,
                                  .slab_bytes = 2 << 20, .policy = policy_find(NULL), .now_usec = rb_clock, .now_ctx = b};
    struct cpu_features cpu;
    uint8_t key[KEY_BYTES] = {99};

    memset(b, 0, sizeof(*b));
    cpu_detect(&cpu);
    b->budget = (struct budget){.limit_bytes = 16 << 20, .hugepages = SLAB_HUGE_OFF};
    config.budget = &b->budget;
    RB_CHECK(cache_create(&config, &b->cache) == 0);
    b->space = rb_space(b, "m");
    b->other = rb_space(b, "n");
    for (int i = 0; i < RB_BLOCKS; i++) {
        b->keys[i][0] = (uint8_t)(i + 1);
        b->refs[i] = rb_publish(b, b->space, b->keys[i], i ? b->keys[i - 1] : b->space->fingerprint, (float)(i + 1));
    }
    b->other_ref = rb_publish(b, b->other, key, b->other->fingerprint, 1);
    b->config = (struct attend_config){.n_threads = n_threads, .n_cpus = 2, .n_words = 64, .ops = &attn_ops_scalar,
                                       .codec = codec_ops_choose(&cpu),
                                       .limits = {.request_bytes = 512 << 10, .worker_bytes = 8 << 20, .queue_bytes = 64 << 20,
                                                  .memory_bytes = 4 << 20, .spin_usec = 20, .slice_usec = 50, .n_blocks = 48}};
    RB_CHECK(attend_create(&b->config, &b->attend) == 0);
    RB_CHECK(attend_tenant_create(b->attend, b->cache, &b->tenant) == 0);
}

static inline void rb_teardown(struct ring_bed *b)
{
    b->tenant = attend_tenant_destroy(b->tenant);
    b->attend = attend_destroy(b->attend);
    b->cache = cache_destroy(b->cache);
}

static inline int rb_memfd(uint64_t bytes)
{
    int fd = memfd_create("attend", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    RB_CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
    return fd;
}

static inline void rb_worker_open(struct ring_bed *b, struct ring_worker *w)
{
    const char *why = "";

    memset(w, 0, sizeof(*w));
    w->page = mmap(NULL, ring_bytes(RB_RING), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    RB_CHECK(w->page != MAP_FAILED);
    ring_view_init(&w->view, w->page, RB_RING);
    RB_CHECK(attend_ring_open(b->attend, b->tenant, w->page, RB_RING, &w->ring) == 0);
    w->fd = rb_memfd(RB_MEMORY);
    w->memory = mmap(NULL, RB_MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, w->fd, 0);
    RB_CHECK(w->memory != MAP_FAILED);
    RB_CHECK(attend_ring_add(w->ring, w->fd, RB_MEMORY, &w->id, &why) == 0);
}

static inline void rb_worker_close(struct ring_worker *w)
{
    w->ring = attend_ring_close(w->ring);
    munmap(w->memory, RB_MEMORY);
    munmap(w->page, ring_bytes(RB_RING));
    close(w->fd);
}

/* A right request at `off` of the memory: n blocks from the first, one query token behind them, heads query heads. Returns its bytes. */
static inline uint64_t rb_request(const struct ring_bed *b, struct ring_worker *w, uint64_t off, uint32_t n, uint32_t heads, uint32_t flags)
{
    struct shm_request h = {.header_bytes = sizeof(h), .flags = flags, .space = b->space->id, .n_heads = heads, .n_tokens = 1, .n_refs = n,
                            .dtype = CODEC_F32, .dim_o = RB_DIM, .scale = 1, .positions_off = 128, .refs_off = 192};
    uint32_t pos = RB_BLOCKS * RB_TOKENS;

    h.q_off = h.refs_off + (n * 8 + 63) / 64 * 64;
    h.o_off = h.q_off + (heads * RB_DIM * 4 + 63) / 64 * 64;
    h.lse_off = h.o_off + (heads * RB_DIM * 4 + 63) / 64 * 64;
    h.mass_off = h.lse_off + (heads * 4 + 63) / 64 * 64;
    memset(w->memory + off + h.q_off, 0, heads * RB_DIM * 4);
    memset(w->memory + off + h.o_off, 0xff, heads * RB_DIM * 4);
    memcpy(w->memory + off, &h, sizeof(h));
    memcpy(w->memory + off + h.positions_off, &pos, sizeof(pos));
    memcpy(w->memory + off + h.refs_off, b->refs, (n < RB_BLOCKS ? n : RB_BLOCKS) * 8);
    return h.mass_off + (n * 4 + 63) / 64 * 64;
}

static inline struct shm_request *rb_header(const struct ring_worker *w, uint64_t off)
{
    return (struct shm_request *)(void *)(w->memory + off);
}

static inline void rb_put(struct ring_bed *b, struct ring_worker *w, const struct shm_submission *s)
{
    uint64_t one = 1;

    w->view.submissions[w->tail++ % RB_RING] = *s;
    atomic_store_explicit(&w->view.words->submit_tail, w->tail, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (!atomic_load(cache_awake_word(b->cache)))
        RB_CHECK(write(attend_ring_bell(w->ring), &one, sizeof(one)) == sizeof(one));
}

static inline void rb_submit(struct ring_bed *b, struct ring_worker *w, uint64_t ticket, uint64_t off, uint64_t bytes)
{
    rb_put(b, w, &(struct shm_submission){.ticket = ticket, .off = off, .bytes = bytes, .memory = w->id});
}

/* The next completion, within usec. False: none came. */
static inline bool rb_next(struct ring_worker *w, uint64_t usec, struct shm_completion *ret)
{
    uint64_t until = rb_usec() + usec;

    while (atomic_load_explicit(&w->view.words->done_tail, memory_order_acquire) == w->head) {
        if (rb_usec() > until)
            return false;
        usleep(20);
    }
    *ret = w->view.completions[w->head++ % RB_RING];
    atomic_store_explicit(&w->view.words->done_head, w->head, memory_order_release);
    return true;
}

/* Mean of V over n blocks, which is every number of the output. */
static inline float rb_mean(uint32_t n)
{
    return (float)(n + 1) / 2;
}

#endif
