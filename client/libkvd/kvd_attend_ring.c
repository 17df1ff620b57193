/* Attention by the daemon: submit, collect, cancel. Layouts and protocol: proto/shm.h, docs/shared-memory.md. */
#include "kvd_attend_ring.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "proto/kvd.pb-c.h"

enum {
    CHUNKS_MAX = 16,     /* memories that a daemon takes of one worker */
    SPIN_USEC = 30,      /* for an answer, before the thread sleeps: a small request takes less */
    LOOK_USEC = 20000,   /* between two looks whether the daemon lives, in a thread that sleeps for an answer */
    ADD_MSEC = 1000,     /* for the daemon to map more memory */
};
#define CHUNK_BYTES (UINT64_C(4) << 20)

enum slot_state { SLOT_FREE, SLOT_SENT, SLOT_DONE, SLOT_DROPPED };

/* Free runs of a chunk, ascending, none next to another. */
struct extent {
    uint64_t off, bytes;
};
struct chunk {
    uint8_t *map;
    uint64_t bytes;
    uint32_t id;          /* the daemon's number for it */
    struct extent *free;  /* n_ring + 1 of them */
    uint32_t n_free;
};

struct slot {
    _Atomic uint32_t state; /* enum slot_state; written by lock */
    uint32_t gen;           /* grows with each use: a ticket of an earlier use is none any more */
    struct attend_call call;
    uint32_t chunk;
    uint64_t off, bytes, o_off, lse_off, mass_off;
    size_t ref_block;       /* block of the sequence that the first ref is of */
    uint32_t n_refs;
    struct shm_completion done;
};

struct attend_ring {
    pthread_mutex_t lock;
    pthread_mutex_t grow_lock; /* held over a request to the daemon; taken before lock */
    struct ring_view view;
    const _Atomic uint32_t *awake; /* of the daemon: somebody looks at the rings by himself */
    int bell;
    _Atomic uint32_t n_vain;  /* times in a row that spinning for an answer was in vain: the next time is shorter */
    uint32_t tail;            /* by lock: submissions written */
    uint32_t head;            /* by lock: completions read */
    uint64_t request_max_bytes, memory_max_bytes;
    struct chunk chunks[CHUNKS_MAX]; /* by lock */
    uint32_t n_chunks;
    uint64_t memory_bytes;
    struct slot *slots;
    uint32_t *free_slots, n_free; /* by lock */
};

static uint64_t now_usec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* ---- memory ---- */

static void chunk_free(struct chunk *c)
{
    if (c->map)
        munmap(c->map, c->bytes);
    free(c->free);
    *c = (struct chunk){0};
}

static int chunk_make(uint64_t cookie, uint64_t bytes, uint32_t n_ring, struct chunk *ret, int *ret_fd)
{
    int fd = memfd_create("kvd-attend", MFD_CLOEXEC | MFD_ALLOW_SEALING), r;
    struct chunk c = {.bytes = bytes, .free = malloc((n_ring + 1) * sizeof(*c.free)), .n_free = 1};

    if (fd < 0 || !c.free)
        goto fail;
    do /* makes the file as long as it is to be, and its pages real */
        r = fallocate(fd, 0, 0, (off_t)bytes) < 0 ? errno : 0;
    while (r == EINTR);
    errno = r;
    if (r != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        goto fail;
    c.map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (c.map == MAP_FAILED) {
        c.map = NULL;
        goto fail;
    }
    c.free[0] = (struct extent){0, bytes};
    *ret = c;
    *ret_fd = fd;
    return 0;
fail:
    r = error_set(cookie, KVD_E_NOMEM, "attention: memory of %llu bytes: %s", (unsigned long long)bytes, strerror(errno));
    if (fd >= 0)
        close(fd);
    chunk_free(&c);
    return r;
}

/* Tells the daemon; keeps its bell. */
static int chunk_add(struct life *life, struct attend_ring *ring, struct chunk *c, int fd)
{
    Kvd__V1__AttendAdd add = KVD__V1__ATTEND_ADD__INIT;
    Kvd__V1__AttendReply *answer;
    struct mux_reply reply = {0};
    uint8_t body[16];
    int r;

    add.bytes = c->bytes;
    r = mux_request(&life->mux, FRAME_ATTEND_ADD, body, kvd__v1__attend_add__pack(&add, body), &fd, 1, ADD_MSEC, &reply);
    if (r != 0)
        return r;
    answer = kvd__v1__attend_reply__unpack(NULL, reply.n, reply.body);
    if (answer && reply.n_fds == 1) {
        c->id = answer->memory;
        ring->request_max_bytes = answer->request_max_bytes;
        ring->memory_max_bytes = answer->memory_max_bytes;
        if (ring->bell < 0) {
            ring->bell = reply.fds[0];
            reply.fds[0] = -1;
        }
    } else {
        r = error_set(life->cookie, KVD_E_PROTOCOL, "the answer about attention cannot be read");
    }
    if (answer)
        kvd__v1__attend_reply__free_unpacked(answer, NULL);
    mux_reply_clear(&reply);
    return r;
}

static int add_chunk(struct life *life, struct attend_ring *ring, uint64_t size)
{
    struct chunk c;
    int fd = -1, r = chunk_make(life->cookie, size, ring->view.n, &c, &fd);

    if (r != 0)
        return r;
    r = chunk_add(life, ring, &c, fd);
    close(fd);
    if (r != 0) {
        chunk_free(&c);
        return r;
    }
    pthread_mutex_lock(&ring->lock);
    ring->chunks[ring->n_chunks++] = c;
    ring->memory_bytes += size;
    pthread_mutex_unlock(&ring->lock);
    return 0;
}

/* One chunk more, for a request of bytes: larger than that takes, unless the daemon allows no more. */
static int grow(struct life *life, struct attend_ring *ring, uint64_t bytes)
{
    uint64_t size = CHUNK_BYTES << (ring->n_chunks < 8 ? ring->n_chunks : 8), least = (bytes + 65535) / 65536 * 65536;
    uint64_t room = ring->memory_max_bytes > ring->memory_bytes ? ring->memory_max_bytes - ring->memory_bytes : 0;
    int r;

    if (ring->n_chunks == 0) { /* how much that is, is not known yet */
        r = size > least ? add_chunk(life, ring, size) : KVD_E_LIMIT;
        return r == KVD_E_LIMIT ? add_chunk(life, ring, least) : r;
    }
    if (size < least || size > room)
        size = least;
    if (ring->n_chunks == CHUNKS_MAX || size > room)
        return error_set(life->cookie, KVD_E_LIMIT,
                         "a request for attention of %llu bytes finds no place: %llu are in use; allowed: %llu, option attend_bytes",
                         (unsigned long long)bytes, (unsigned long long)ring->memory_bytes,
                         (unsigned long long)ring->memory_max_bytes);
    return add_chunk(life, ring, size);
}

/* First fit. By lock. */
static bool take_memory(struct attend_ring *ring, uint64_t bytes, uint32_t *ret_chunk, uint64_t *ret_off)
{
    for (uint32_t i = 0; i < ring->n_chunks; i++) {
        struct chunk *c = &ring->chunks[i];

        for (uint32_t k = 0; k < c->n_free; k++) {
            if (c->free[k].bytes < bytes)
                continue;
            *ret_chunk = i;
            *ret_off = c->free[k].off;
            c->free[k].off += bytes;
            c->free[k].bytes -= bytes;
            if (c->free[k].bytes == 0)
                memmove(&c->free[k], &c->free[k + 1], (--c->n_free - k) * sizeof(*c->free));
            return true;
        }
    }
    return false;
}

/* By lock. */
static void give_memory(struct attend_ring *ring, uint32_t chunk, uint64_t off, uint64_t bytes)
{
    struct chunk *c = &ring->chunks[chunk];
    uint32_t k = 0;

    while (k < c->n_free && c->free[k].off < off)
        k++;
    if (k > 0 && c->free[k - 1].off + c->free[k - 1].bytes == off) {
        c->free[--k].bytes += bytes;
    } else {
        memmove(&c->free[k + 1], &c->free[k], (c->n_free++ - k) * sizeof(*c->free));
        c->free[k] = (struct extent){off, bytes};
    }
    if (k + 1 < c->n_free && c->free[k].off + c->free[k].bytes == c->free[k + 1].off) {
        c->free[k].bytes += c->free[k + 1].bytes;
        memmove(&c->free[k + 1], &c->free[k + 2], (--c->n_free - k - 1) * sizeof(*c->free));
    }
}

/* ---- the ring of a life ---- */

void attend_ring_free(struct attend_ring *ring)
{
    if (!ring)
        return;
    for (uint32_t i = 0; i < ring->n_chunks; i++)
        chunk_free(&ring->chunks[i]);
    if (ring->bell >= 0)
        close(ring->bell);
    pthread_mutex_destroy(&ring->lock);
    pthread_mutex_destroy(&ring->grow_lock);
    free(ring->slots);
    free(ring->free_slots);
    free(ring);
}

static int ring_make(struct life *life, struct attend_ring **ret)
{
    uint32_t n = life->n_ring;
    struct attend_ring *ring = calloc(1, sizeof(*ring));
    int r;

    if (!ring)
        return error_set(life->cookie, KVD_E_NOMEM, "no memory for rings of attention");
    pthread_mutex_init(&ring->lock, NULL);
    pthread_mutex_init(&ring->grow_lock, NULL);
    ring->bell = -1;
    ring->awake = &life->view.header->attend_awake;
    ring_view_init(&ring->view, life->rings, n);
    ring->slots = calloc(n, sizeof(*ring->slots));
    ring->free_slots = malloc(n * sizeof(*ring->free_slots));
    r = ring->slots && ring->free_slots ? grow(life, ring, 1)
                                        : error_set(life->cookie, KVD_E_NOMEM, "no memory for rings of %u entries", n);
    if (r != 0) {
        attend_ring_free(ring);
        return r;
    }
    for (uint32_t i = 0; i < n; i++)
        ring->free_slots[i] = n - 1 - i;
    ring->n_free = n;
    *ret = ring;
    return 0;
}

static int ring_of(struct life *life, struct attend_ring **ret)
{
    int r = 0;

    *ret = atomic_load_explicit(&life->ring, memory_order_acquire);
    if (*ret)
        return 0;
    if (!life->rings)
        return error_set(life->cookie, KVD_E_PROTOCOL, "this daemon has no rings for attention");
    pthread_mutex_lock(&life->ring_lock);
    *ret = atomic_load_explicit(&life->ring, memory_order_acquire);
    if (!*ret) {
        r = ring_make(life, ret);
        if (r == 0)
            atomic_store_explicit(&life->ring, *ret, memory_order_release);
    }
    pthread_mutex_unlock(&life->ring_lock);
    return r;
}

/* ---- slots ---- */

static uint64_t ticket_of(const struct life *life, const struct attend_ring *ring, const struct slot *s)
{
    return (uint64_t)(life->serial & 0xffff) << 48 | (uint64_t)s->gen << 16 | (uint64_t)(s - ring->slots);
}

/* By lock. */
static void free_slot(struct attend_ring *ring, struct slot *s)
{
    give_memory(ring, s->chunk, s->off, s->bytes);
    s->gen++;
    atomic_store_explicit(&s->state, SLOT_FREE, memory_order_relaxed);
    ring->free_slots[ring->n_free++] = (uint32_t)(s - ring->slots);
}

/* Reads the completions that have come. By lock. */
static void reap(struct attend_ring *ring)
{
    uint32_t tail = atomic_load_explicit(&ring->view.words->done_tail, memory_order_acquire);

    if (tail == ring->head)
        return;
    for (; ring->head != tail; ring->head++) {
        const struct shm_completion *c = &ring->view.completions[ring->head % ring->view.n];
        struct slot *s = &ring->slots[(c->ticket & 0xffff) % ring->view.n];

        if ((uint32_t)(c->ticket >> 16) != s->gen)
            continue; /* of nothing that is under way: not from a daemon that keeps to the protocol */
        if (atomic_load_explicit(&s->state, memory_order_relaxed) == SLOT_DROPPED) {
            free_slot(ring, s);
        } else if (atomic_load_explicit(&s->state, memory_order_relaxed) == SLOT_SENT) {
            s->done = *c;
            atomic_store_explicit(&s->state, SLOT_DONE, memory_order_release);
        }
    }
    /* release: what was read of the completions was read before the daemon writes over them. */
    atomic_store_explicit(&ring->view.words->done_head, ring->head, memory_order_release);
}

/* The slot of a ticket, or NULL. By lock. */
static struct slot *find_slot(const struct life *life, struct attend_ring *ring, uint64_t ticket)
{
    struct slot *s = &ring->slots[(ticket & 0xffff) % ring->view.n];
    uint32_t state = atomic_load_explicit(&s->state, memory_order_relaxed);

    return (state == SLOT_SENT || state == SLOT_DONE) && ticket_of(life, ring, s) == ticket ? s : NULL;
}

/* A slot and memory for a request of bytes; the slot is then the caller's. */
static int take_slot(struct life *life, struct attend_ring *ring, uint64_t bytes, struct slot **ret)
{
    uint32_t chunk, n_chunks;
    uint64_t off;
    int r;

    for (;;) {
        bool room;

        pthread_mutex_lock(&ring->lock);
        reap(ring);
        n_chunks = ring->n_chunks;
        room = ring->n_free > 0 && ring_room(&ring->view, ring->tail) > 0;
        if (room && take_memory(ring, bytes, &chunk, &off)) {
            struct slot *s = &ring->slots[ring->free_slots[--ring->n_free]];

            s->chunk = chunk;
            s->off = off;
            s->bytes = bytes;
            pthread_mutex_unlock(&ring->lock);
            *ret = s;
            return 0;
        }
        pthread_mutex_unlock(&ring->lock);
        if (!room)
            return error_set(life->cookie, KVD_E_LIMIT,
                             "all %u requests for attention of this worker are under way; allowed: no more until some are "
                             "collected, option attend_ring",
                             ring->view.n);
        pthread_mutex_lock(&ring->grow_lock);
        r = n_chunks == ring->n_chunks ? grow(life, ring, bytes) : 0; /* else another thread was first */
        pthread_mutex_unlock(&ring->grow_lock);
        if (r != 0)
            return r;
    }
}

/* ---- submit ---- */

static uint64_t aligned(uint64_t n)
{
    return (n + SHM_ATTEND_ALIGN - 1) / SHM_ATTEND_ALIGN * SHM_ATTEND_ALIGN;
}

/* The run of blocks that some query sees; those in it that none does are left out. */
static void needed_run(const struct attend_call *c, size_t *ret_first, uint32_t *ret_n)
{
    size_t lo = c->a.first_block, hi = lo + c->a.n_blocks;

    while (lo < hi && !attend_needs(c, lo))
        lo++;
    while (hi > lo && !attend_needs(c, hi - 1))
        hi--;
    *ret_first = lo;
    *ret_n = (uint32_t)(hi - lo);
}

static void lay_out(const struct attend_call *c, const struct slot *s, struct shm_request *h, uint64_t *ret_bytes)
{
    uint64_t rows = (uint64_t)c->n_kv_heads * c->n_rows, at = sizeof(*h);

    h->positions_off = at;
    at += aligned(c->a.n_tokens * sizeof(uint32_t));
    h->refs_off = at;
    at += aligned(s->n_refs * sizeof(uint64_t));
    h->q_off = at;
    at += aligned(rows * c->dim_k * sizeof(float));
    h->o_off = at;
    at += aligned(rows * c->a.dim_o * sizeof(float));
    h->lse_off = at;
    at += aligned(rows * sizeof(float));
    h->mass_off = at;
    at += c->a.mass ? aligned(s->n_refs * sizeof(float)) : 0;
    *ret_bytes = at;
}

static void fill_header(const struct attend_call *c, const struct slot *s, uint64_t timeout_usec, struct shm_request *h)
{
    h->header_bytes = sizeof(*h);
    h->flags = c->a.mass && s->n_refs ? SHM_REQUEST_MASS : 0;
    h->space = c->prefix->id;
    h->layer = c->a.layer;
    h->n_heads = c->a.n_heads;
    h->n_tokens = c->a.n_tokens;
    h->n_refs = s->n_refs;
    h->dtype = CODEC_F32;
    h->dim_o = c->a.dim_o;
    h->first_pos = (uint32_t)(s->ref_block * c->prefix->space->block_tokens);
    h->window = c->a.window_tokens;
    h->sink_tokens = c->a.sink_tokens;
    h->scale = c->a.scale;
    h->softcap = c->a.softcap;
    h->deadline_usec = now_usec() + timeout_usec;
}

/* Writes the request into the slot's memory. */
static int fill(const struct attend_call *c, struct attend_ring *ring, const struct slot *s, const struct shm_request *h)
{
    uint8_t *at = ring->chunks[s->chunk].map + s->off;
    uint32_t *positions = (uint32_t *)(void *)(at + h->positions_off);
    uint64_t *refs = (uint64_t *)(void *)(at + h->refs_off);
    const struct held *held = &c->prefix->held[c->group];

    memcpy(at, h, sizeof(*h));
    for (uint32_t t = 0; t < c->a.n_tokens; t++)
        positions[t] = attend_position(c, t);
    for (uint32_t i = 0; i < s->n_refs; i++) {
        size_t block = s->ref_block + i;

        refs[i] = attend_needs(c, block) ? shm_ref(held->hits[block].entry, held->hits[block].gen) : 0;
    }
    return attend_gather(c, (float *)(void *)(at + h->q_off), NULL);
}

static void send(struct life *life, struct attend_ring *ring, struct slot *s)
{
    struct shm_submission *entry;
    uint64_t one = 1;

    pthread_mutex_lock(&ring->lock);
    entry = &ring->view.submissions[ring->tail % ring->view.n];
    *entry = (struct shm_submission){.ticket = ticket_of(life, ring, s), .off = s->off, .bytes = s->bytes,
                                     .memory = ring->chunks[s->chunk].id};
    atomic_store_explicit(&s->state, SLOT_SENT, memory_order_relaxed);
    ring->tail++;
    atomic_store_explicit(&ring->view.words->submit_tail, ring->tail, memory_order_release);
    pthread_mutex_unlock(&ring->lock);
    atomic_thread_fence(memory_order_seq_cst); /* partner: the daemon's, between attend_awake and submit_tail */
    if (!atomic_load_explicit(ring->awake, memory_order_relaxed) && write(ring->bell, &one, sizeof(one)) < 0)
        mux_kill(&life->mux, KVD_E_GONE); /* a bell that cannot be rung: nobody would hear of this request */
}

/* The life that the prefix is leased in, if it can be asked. */
static int live(const struct kvd_prefix *p)
{
    uint64_t cookie = p->space->session->cookie;

    if (!p->life)
        return error_set(cookie, KVD_E_STALE, "nothing is leased");
    if (!life_leases_hold(p->life))
        return error_set(cookie, KVD_E_STALE, "the daemon has given up this session and its leases");
    if (!life_alive(p->life))
        return error_set(cookie, KVD_E_GONE, "the daemon that the prefix is leased from is gone");
    return 0;
}

int kvd_attend_submit(kvd_prefix *prefix, const struct kvd_attention *attention, uint64_t timeout_usec, uint64_t *ret_ticket)
{
    struct shm_request h = {0};
    struct attend_ring *ring;
    struct attend_call call;
    struct slot *s = NULL, shape = {0};
    uint64_t bytes;
    int r = attend_check(prefix, attention, &call);

    if (r == 0 && !ret_ticket)
        r = error_set(prefix->space->session->cookie, KVD_E_ARG, "ret_ticket is NULL");
    if (r == 0)
        r = live(prefix);
    if (r == 0)
        r = ring_of(prefix->life, &ring);
    if (r != 0)
        return r;
    needed_run(&call, &shape.ref_block, &shape.n_refs);
    lay_out(&call, &shape, &h, &bytes);
    if (bytes > ring->request_max_bytes)
        return error_set(prefix->space->session->cookie, KVD_E_LIMIT,
                         "the request takes %llu bytes; allowed: %llu, option attend_request_bytes", (unsigned long long)bytes,
                         (unsigned long long)ring->request_max_bytes);
    r = take_slot(prefix->life, ring, bytes, &s);
    if (r != 0)
        return r;
    s->call = call;
    s->ref_block = shape.ref_block;
    s->n_refs = shape.n_refs;
    s->o_off = h.o_off;
    s->lse_off = h.lse_off;
    s->mass_off = h.mass_off;
    fill_header(&call, s, timeout_usec ? timeout_usec : (uint64_t)prefix->space->session->timeout_msec * 1000, &h);
    r = fill(&call, ring, s, &h);
    if (r != 0) {
        pthread_mutex_lock(&ring->lock);
        free_slot(ring, s);
        pthread_mutex_unlock(&ring->lock);
        return r;
    }
    *ret_ticket = ticket_of(prefix->life, ring, s);
    send(prefix->life, ring, s);
    return KVD_OK;
}

/* ---- collect ---- */

static void deliver(const struct attend_ring *ring, const struct slot *s)
{
    const struct attend_call *c = &s->call;
    const uint8_t *at = ring->chunks[s->chunk].map + s->off;
    const float *o = (const float *)(const void *)(at + s->o_off), *lse = (const float *)(const void *)(at + s->lse_off);

    for (uint32_t kv = 0; kv < c->n_kv_heads; kv++)
        attend_scatter(c, kv, 0, c->n_rows, o + (size_t)kv * c->n_rows * c->a.dim_o, lse + (size_t)kv * c->n_rows);
    if (!c->a.mass)
        return;
    memset(c->a.mass, 0, c->a.n_blocks * sizeof(*c->a.mass));
    memcpy(c->a.mass + (s->ref_block - c->a.first_block), at + s->mass_off, s->n_refs * sizeof(*c->a.mass));
}

static int reason_error(uint64_t cookie, const struct slot *s)
{
    const struct shm_completion *d = &s->done;
    uint64_t given = d->given;
    char text[160];

    if (d->reason == RING_STALE || d->reason == RING_FOREIGN)
        given += s->ref_block; /* as the caller counts them */
    return error_set(cookie, ring_reason_error(d->reason), "%s", ring_reason_text(d->reason, given, d->allowed, text, sizeof(text)));
}

/* Ends (but for KVD_E_TIMEOUT) a ticket whose completion has come. By lock, which is given up while results are copied. */
static int finish(const struct life *life, struct attend_ring *ring, struct slot *s)
{
    int r = 0;

    if (s->done.reason == RING_DONE) {
        pthread_mutex_unlock(&ring->lock); /* the ticket is the caller's alone */
        deliver(ring, s);
        pthread_mutex_lock(&ring->lock);
    } else {
        r = reason_error(life->cookie, s);
    }
    if (r != KVD_E_TIMEOUT) /* then the ticket stays, as with a wait that was too short, until it is cancelled */
        free_slot(ring, s);
    return r;
}

/* How long to look before sleeping: not at all where it did not help lately (the daemon on the same processor, or much to compute), but
 * from time to time. */
static uint64_t spin_usec(struct attend_ring *ring)
{
    uint32_t n = atomic_load_explicit(&ring->n_vain, memory_order_relaxed);

    if (n < 5)
        return SPIN_USEC >> n;
    return atomic_fetch_add_explicit(&ring->n_vain, 1, memory_order_relaxed) % 64 == 0 ? SPIN_USEC : 0;
}

/* Waits until completions come that were not there when `seen` was read, or for usec. */
static void await(struct attend_ring *ring, uint32_t seen, uint64_t usec, bool may_spin)
{
    struct shm_rings *w = ring->view.words;
    uint64_t spin = may_spin ? spin_usec(ring) : 0, until = spin ? now_usec() + (usec < spin ? usec : spin) : 0;
    struct timespec left = {.tv_sec = (time_t)(usec / 1000000), .tv_nsec = (long)(usec % 1000000) * 1000};

    while (until && now_usec() < until)
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&w->done_tail, memory_order_acquire) != seen) {
                atomic_store_explicit(&ring->n_vain, 0, memory_order_relaxed);
                return;
            }
            __builtin_ia32_pause();
        }
    if (spin && atomic_load_explicit(&ring->n_vain, memory_order_relaxed) < 5)
        atomic_fetch_add_explicit(&ring->n_vain, 1, memory_order_relaxed);
    /* seq_cst, then the look that the kernel takes: partner of the daemon's store of done_tail and its look at sleepers. */
    atomic_fetch_add_explicit(&w->sleepers, 1, memory_order_seq_cst);
    syscall(SYS_futex, &w->done_tail, FUTEX_WAIT, seen, &left, NULL, 0);
    atomic_fetch_sub_explicit(&w->sleepers, 1, memory_order_relaxed);
}

/* With the lock, which is held again at return. */
static int collect(struct life *life, struct attend_ring *ring, uint64_t ticket, int timeout_msec)
{
    uint64_t deadline = timeout_msec < 0 ? UINT64_MAX : now_usec() + (uint64_t)timeout_msec * 1000;
    bool first = true;

    for (;; first = false) {
        uint32_t seen;
        struct slot *s;
        uint64_t now;
        bool alive = life_alive(life);

        reap(ring);
        s = find_slot(life, ring, ticket);
        if (!s)
            return error_set(life->cookie, KVD_E_ARG, "ticket %llu is none that waits to be collected", (unsigned long long)ticket);
        if (atomic_load_explicit(&s->state, memory_order_relaxed) == SLOT_DONE)
            return finish(life, ring, s);
        if (!alive) { /* looked at before the completions were: none can come any more */
            free_slot(ring, s);
            return life_leases_hold(life)
                       ? error_set(life->cookie, KVD_E_GONE, "the daemon went away before it had answered")
                       : error_set(life->cookie, KVD_E_STALE, "the daemon has given up this session and its leases");
        }
        now = now_usec();
        if (now >= deadline)
            return error_set(life->cookie, KVD_E_TIMEOUT, "the daemon has not computed it within %d ms", timeout_msec);
        seen = ring->head;
        pthread_mutex_unlock(&ring->lock);
        await(ring, seen, deadline - now < LOOK_USEC ? deadline - now : LOOK_USEC, first);
        pthread_mutex_lock(&ring->lock);
    }
}

/* The ring that a ticket is of, with the life (which the prefix keeps). */
static int ticket_ring(kvd_prefix *prefix, uint64_t ticket, struct attend_ring **ret)
{
    uint64_t cookie = prefix ? prefix->space->session->cookie : 0;

    if (!prefix)
        return error_set(cookie, KVD_E_ARG, "prefix is NULL");
    if (session_forked(prefix->space->session))
        return session_error_forked(prefix->space->session);
    if (!prefix->life || (ticket >> 48) != (prefix->life->serial & 0xffff))
        return error_set(cookie, KVD_E_STALE, "the prefix was released or matched anew since ticket %llu was given",
                         (unsigned long long)ticket);
    *ret = atomic_load_explicit(&prefix->life->ring, memory_order_acquire);
    return *ret ? 0 : error_set(cookie, KVD_E_ARG, "ticket %llu was never given", (unsigned long long)ticket);
}

int kvd_attend_collect(kvd_prefix *prefix, uint64_t ticket, int timeout_msec)
{
    struct attend_ring *ring;
    int r = ticket_ring(prefix, ticket, &ring);

    if (r != 0)
        return r;
    pthread_mutex_lock(&ring->lock);
    r = collect(prefix->life, ring, ticket, timeout_msec);
    pthread_mutex_unlock(&ring->lock);
    return r;
}

void kvd_attend_cancel(kvd_prefix *prefix, uint64_t ticket)
{
    struct attend_ring *ring;
    struct slot *s;

    if (ticket_ring(prefix, ticket, &ring) != 0)
        return;
    pthread_mutex_lock(&ring->lock);
    reap(ring);
    s = find_slot(prefix->life, ring, ticket);
    if (s && atomic_load_explicit(&s->state, memory_order_relaxed) == SLOT_DONE) {
        free_slot(ring, s);
    } else if (s) {
        struct shm_request *h = (struct shm_request *)(void *)(ring->chunks[s->chunk].map + s->off);

        atomic_store_explicit(&h->cancelled, 1, memory_order_relaxed);
        atomic_store_explicit(&s->state, SLOT_DROPPED, memory_order_relaxed);
    }
    pthread_mutex_unlock(&ring->lock);
}
