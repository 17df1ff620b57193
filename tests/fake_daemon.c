#include "tests/fake_daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "client/libkvd/kvd.h"
#include "kernels/codec/payload.h"
#include "kernels/crc32c.h"
#include "proto/key.h"
#include "proto/kvd.pb-c.h"

enum { CONNS_MAX = 16, SLABS_MAX = 64, STAGINGS_MAX = 32, TYPES = 64, LOG_WORDS = 256 };

struct conn {
    int fd;
    struct slab_memory page;
    uint32_t n_leases;
    struct {
        void *map;
        uint64_t bytes;
    } staging[STAGINGS_MAX];
};

struct fake {
    struct fake_options o;
    pthread_t thread;
    pthread_barrier_t ready;
    int wake[2], listen_fd;
    _Atomic int stop; /* 1: as if killed, 2: gracefully */
    _Atomic int lie[TYPES];
    _Atomic unsigned delay_msec[TYPES];
    _Atomic uint64_t count[TYPES];
    pthread_mutex_t lock; /* index, slabs, connections */
    struct index index;
    uint32_t next_entry;
    struct slab_memory slab[SLABS_MAX];
    uint32_t n_slabs;
    uint64_t slab_used;
    struct conn conn[CONNS_MAX];
    uint64_t last_worker;
    struct payload_layout *layout[16][2];
    uint8_t fingerprint[32];
    struct key_hasher *hasher;
    uint32_t digest_bytes;
};

static void must(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "fake daemon: %s: %s\n", what, strerror(errno));
        abort();
    }
}

/* ---- Replies ---- */

static void reply(struct fake *f, struct conn *c, uint16_t type, uint32_t id, const void *body, size_t n,
                  const int *fds, size_t n_fds)
{
    enum fake_lie lie = type < TYPES ? (enum fake_lie)atomic_load(&f->lie[type]) : FAKE_HONEST;
    static const uint8_t junk[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f};
    int more[FRAME_FDS_MAX];

    switch (lie) {
    case FAKE_SILENT:
        return;
    case FAKE_HANGUP:
        shutdown(c->fd, SHUT_RDWR);
        return;
    case FAKE_GARBAGE: {
        uint8_t bytes[100];

        for (size_t i = 0; i < sizeof(bytes); i++)
            bytes[i] = (uint8_t)(i * 37 + id);
        must(send(c->fd, bytes, sizeof(bytes), MSG_NOSIGNAL) > 0, "send");
        return;
    }
    case FAKE_SHORT_FRAME:
        must(send(c->fd, "KVD1", 4, MSG_NOSIGNAL) > 0, "send");
        return;
    case FAKE_WRONG_TYPE:
        frame_send(c->fd, (uint16_t)((type == FRAME_PING ? FRAME_STATS : FRAME_PING) | FRAME_REPLY), id, body, n, NULL,
                   0, 0);
        return;
    case FAKE_WRONG_ID:
        frame_send(c->fd, (uint16_t)(type | FRAME_REPLY), id + 1000000, body, n, fds, n_fds, 0);
        return;
    case FAKE_BROKEN_BODY:
        frame_send(c->fd, (uint16_t)(type | FRAME_REPLY), id, junk, sizeof(junk), fds, n_fds, 0);
        return;
    case FAKE_EXTRA_FD:
        if (n_fds)
            memcpy(more, fds, n_fds * sizeof(int));
        more[n_fds] = f->listen_fd;
        frame_send(c->fd, (uint16_t)(type | FRAME_REPLY), id, body, n, more, n_fds + 1, 0);
        return;
    case FAKE_NO_FDS:
        frame_send(c->fd, (uint16_t)(type | FRAME_REPLY), id, body, n, NULL, 0, 0);
        return;
    case FAKE_ERROR:
    case FAKE_ERROR_EMPTY: {
        Kvd__V1__Error e = KVD__V1__ERROR__INIT;
        uint8_t wire[128];

        if (lie == FAKE_ERROR) {
            e.code = KVD_E_DRAINING;
            e.reason = (char *)"not now";
            e.allowed = (char *)"later";
        }
        frame_send(c->fd, FRAME_ERROR | FRAME_REPLY, id, wire, kvd__v1__error__pack(&e, wire), NULL, 0, 0);
        return;
    }
    default:
        frame_send(c->fd, (uint16_t)(type | FRAME_REPLY), id, body, n, fds, n_fds, 0);
    }
}

static void reply_message(struct fake *f, struct conn *c, uint16_t type, uint32_t id, const ProtobufCMessage *m,
                          const int *fds, size_t n_fds)
{
    size_t n = protobuf_c_message_get_packed_size(m);
    uint8_t *body = malloc(n ? n : 1);

    must(body != NULL, "malloc");
    protobuf_c_message_pack(m, body);
    reply(f, c, type, id, body, n, fds, n_fds);
    free(body);
}

static void reply_error(struct conn *c, uint32_t id, uint32_t code, const char *reason)
{
    Kvd__V1__Error e = KVD__V1__ERROR__INIT;
    uint8_t wire[256];

    e.code = code;
    e.reason = (char *)reason;
    frame_send(c->fd, FRAME_ERROR | FRAME_REPLY, id, wire, kvd__v1__error__pack(&e, wire), NULL, 0, 0);
}

/* ---- Memory ---- */

static void make_page(struct fake *f, struct conn *c)
{
    uint64_t leases = f->o.n_leases * 8ull, log_off = (4096 + leases + 63) / 64 * 64;
    struct shm_page_header *h;

    must(slab_memory_create("fake-page", log_off + LOG_WORDS * 8, SLAB_HUGE_OFF, false, &c->page) == 0, "page");
    h = c->page.map;
    h->magic = SHM_PAGE_MAGIC;
    h->version = SHM_VERSION;
    h->header_bytes = sizeof(*h);
    h->worker = ++f->last_worker;
    h->n_leases = f->o.n_leases;
    h->n_log = LOG_WORDS;
    h->leases_off = 4096;
    h->log_off = log_off;
    h->total_bytes = c->page.bytes;
    c->n_leases = f->o.n_leases;
    if (atomic_load(&f->lie[FRAME_HELLO]) == FAKE_BAD_PAGE)
        h->n_leases = UINT32_MAX;
    must(fcntl(c->page.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0, "seal");
}

/* A copy of the index with a lie in its header. */
static int bad_index(struct fake *f)
{
    int fd = memfd_create("fake-index", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    struct shm_index_header h = *f->index.header;

    h.n_entries = SHM_ENTRIES_MAX;
    must(fd >= 0 && ftruncate(fd, (off_t)f->index.memory.bytes) == 0 && write(fd, &h, sizeof(h)) == sizeof(h),
         "bad index");
    must(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0, "seal");
    return fd;
}

static void take_hello(struct fake *f, struct conn *c, uint32_t id, const uint8_t *body, size_t n)
{
    Kvd__V1__Hello *hello = kvd__v1__hello__unpack(NULL, n, body);
    Kvd__V1__HelloReply m = KVD__V1__HELLO_REPLY__INIT;
    int lie = atomic_load(&f->lie[FRAME_HELLO]), fds[2], extra = -1;

    must(hello != NULL, "hello");
    m.version = lie == FAKE_OLD_VERSION ? 77 : 1;
    m.tenant = (char *)"fake";
    m.server = (char *)"fake 1";
    m.admin = 1;
    m.staging_max_bytes = f->o.staging_max_bytes;
    m.publish_max_blocks = f->o.publish_max_blocks;
    m.epoch = f->index.header->epoch;
    m.index_bytes = f->index.memory.bytes;
    m.worker = f->last_worker + 1;
    if (hello->admin_only) {
        reply_message(f, c, FRAME_HELLO, id, &m.base, NULL, 0);
    } else {
        if (!c->page.map)
            make_page(f, c);
        m.page_bytes = c->page.bytes + (lie == FAKE_SHORT_MEMORY ? 1 << 20 : 0);
        fds[0] = c->page.fd;
        fds[1] = f->index.memory.fd;
        if (lie == FAKE_BAD_INDEX)
            fds[1] = extra = bad_index(f);
        if (lie == FAKE_UNSEALED) {
            fds[1] = extra = memfd_create("unsealed", MFD_CLOEXEC);
            must(ftruncate(extra, (off_t)m.index_bytes) == 0, "ftruncate");
        }
        reply_message(f, c, FRAME_HELLO, id, &m.base, fds, 2);
        if (extra >= 0)
            close(extra);
    }
    kvd__v1__hello__free_unpacked(hello, NULL);
}

static void take_space(struct fake *f, struct conn *c, uint32_t id, const uint8_t *body, size_t n)
{
    Kvd__V1__Space *s = kvd__v1__space__unpack(NULL, n, body);
    Kvd__V1__SpaceReply m = KVD__V1__SPACE_REPLY__INIT;
    struct payload_layer layers[64];
    uint64_t plain[16], first[16];
    enum codec_dtype dtype = CODEC_F16;
    const char *reason = "";

    must(s && s->n_layer <= 64 && s->n_group <= 16 && codec_dtype_parse(s->dtype, &dtype) == 0, "space");
    for (size_t i = 0; i < s->n_layer; i++) {
        const Kvd__V1__Layer *l = s->layer[i];

        layers[i] = (struct payload_layer){
            .n_kv_heads = l->n_kv_heads, .dim_k = l->dim_k, .dim_v = l->dim_v, .group = l->group};
        must(payload_layer_codecs(&layers[i], dtype, l->codec_k, l->codec_v, l->codec_first_k, l->codec_first_v,
                                  &reason) == 0,
             "codecs");
    }
    for (uint32_t g = 0; g < s->n_group; g++)
        for (int k = 0; k < 2; k++) {
            payload_layout_destroy(f->layout[g][k]);
            must(payload_layout_create(layers, (uint32_t)s->n_layer, g, k != 0, s->block_tokens, &f->layout[g][k],
                                       &reason) == 0,
                 "layout");
            (k ? first : plain)[g] = f->layout[g][k]->bytes;
        }
    f->digest_bytes = s->digest_bytes;
    m.space = FAKE_SPACE;
    m.fingerprint.data = f->fingerprint;
    m.fingerprint.len = sizeof(f->fingerprint);
    m.n_payload_bytes = m.n_first_payload_bytes = s->n_group;
    m.payload_bytes = plain;
    m.first_payload_bytes = first;
    reply_message(f, c, FRAME_SPACE_OPEN, id, &m.base, NULL, 0);
    kvd__v1__space__free_unpacked(s, NULL);
}

static void new_slab(struct fake *f)
{
    must(f->n_slabs < SLABS_MAX, "slabs");
    must(slab_memory_create("fake-slab", f->o.slab_bytes, SLAB_HUGE_OFF, false, &f->slab[f->n_slabs]) == 0, "slab");
    must(slab_memory_seal(&f->slab[f->n_slabs]) == 0, "slab seal");
    f->n_slabs++;
    f->slab_used = 0;
}

static void take_slab(struct fake *f, struct conn *c, uint32_t id, const uint8_t *body, size_t n)
{
    Kvd__V1__SlabGet *get = kvd__v1__slab_get__unpack(NULL, n, body);
    Kvd__V1__SlabReply m = KVD__V1__SLAB_REPLY__INIT;
    int lie = atomic_load(&f->lie[FRAME_SLAB_GET]), fd;

    must(get != NULL, "slab get");
    if (get->slab >= f->n_slabs || !f->slab[get->slab].map) {
        reply_error(c, id, KVD_E_NOT_FOUND, "no such slab");
    } else {
        m.slab = get->slab;
        m.bytes = f->slab[get->slab].bytes + (lie == FAKE_SHORT_MEMORY ? 4096 : 0);
        fd = f->slab[get->slab].fd;
        if (lie == FAKE_UNSEALED) {
            fd = memfd_create("unsealed", MFD_CLOEXEC);
            must(ftruncate(fd, (off_t)m.bytes) == 0, "ftruncate");
        }
        reply_message(f, c, FRAME_SLAB_GET, id, &m.base, &fd, 1);
        if (lie == FAKE_UNSEALED)
            close(fd);
    }
    kvd__v1__slab_get__free_unpacked(get, NULL);
}

static void take_staging(struct fake *f, struct conn *c, uint32_t id, const uint8_t *body, size_t n, int *fds)
{
    Kvd__V1__StagingAdd *add = kvd__v1__staging_add__unpack(NULL, n, body);
    Kvd__V1__StagingReply m = KVD__V1__STAGING_REPLY__INIT;

    must(add != NULL, "staging");
    for (m.staging = 1; m.staging < STAGINGS_MAX && c->staging[m.staging].map;)
        m.staging++;
    must(m.staging < STAGINGS_MAX && (fcntl(fds[0], F_GET_SEALS) & F_SEAL_SHRINK), "staging is sealed");
    c->staging[m.staging].bytes = add->bytes;
    c->staging[m.staging].map = mmap(NULL, add->bytes, PROT_READ, MAP_SHARED, fds[0], 0);
    must(c->staging[m.staging].map != MAP_FAILED, "mmap");
    reply_message(f, c, FRAME_STAGING_ADD, id, &m.base, NULL, 0);
    kvd__v1__staging_add__free_unpacked(add, NULL);
}

static uint32_t add_locked(struct fake *f, const uint8_t key[32], uint8_t group, uint8_t flags, const void *payload,
                           uint32_t n, uint32_t crc)
{
    uint32_t e = f->next_entry++;
    uint64_t loc;

    must(e < f->o.n_entries && n <= f->o.slab_bytes, "room");
    if (f->n_slabs == 0 || f->slab_used + n > f->o.slab_bytes)
        new_slab(f);
    memcpy((char *)f->slab[f->n_slabs - 1].map + f->slab_used, payload, n);
    loc = shm_loc(f->n_slabs - 1, f->slab_used);
    f->slab_used += (n + 63) / 64 * 64;
    index_fill(&f->index, e, key, FAKE_SPACE, group, flags, n, crc ? crc : crc32c_table(0, payload, n), loc);
    must(index_publish(&f->index, e) == 0, "index_publish");
    return e;
}

static uint32_t publish_block(struct fake *f, const struct conn *c, const Kvd__V1__Publish *m,
                              const Kvd__V1__PublishBlock *b)
{
    const struct payload_layout *layout = f->layout[b->group][b->first];
    enum codec_dtype dtype = CODEC_F16;
    struct lookup_hit hit;
    uint8_t key[32] = {0};
    void *payload;

    must(m->staging < STAGINGS_MAX && c->staging[m->staging].map && codec_dtype_parse(m->dtype, &dtype) == 0,
         "staging");
    must(b->offset % 64 == 0 && b->offset + layout->raw_bytes[dtype] <= c->staging[m->staging].bytes, "offset");
    if (f->digest_bytes)
        memcpy(key, b->digest.data, b->digest.len);
    else
        must(key_block(f->hasher, b->parent.data, b->token, b->n_token, b->extra.data, b->extra.len, key) == 0, "key");
    if (lookup_find(&f->index.view, key, FAKE_SPACE, (uint8_t)b->group, &hit))
        return KVD_PRESENT;
    payload = calloc(1, layout->bytes);
    must(payload != NULL, "payload");
    if (payload_encode(layout, &codec_ops_scalar, dtype, (const char *)c->staging[m->staging].map + b->offset, 0,
                       layout->n_parts, payload, NULL) != 0) {
        free(payload);
        return KVD_FAILED;
    }
    add_locked(f, key, (uint8_t)b->group, b->first ? SHM_ENTRY_FIRST : 0, payload, (uint32_t)layout->bytes, 0);
    free(payload);
    return KVD_PUBLISHED;
}

static void take_publish(struct fake *f, struct conn *c, uint32_t id, const uint8_t *body, size_t n)
{
    Kvd__V1__Publish *m = kvd__v1__publish__unpack(NULL, n, body);
    Kvd__V1__PublishReply r = KVD__V1__PUBLISH_REPLY__INIT;
    Kvd__V1__PublishStatus status[1024];
    Kvd__V1__Error error = KVD__V1__ERROR__INIT, *errors[1024];

    must(m && m->n_block <= f->o.publish_max_blocks && m->n_block <= 1024, "publish");
    error.code = KVD_E_VALUE;
    error.reason = (char *)"a number is not finite";
    r.error = errors;
    for (size_t i = 0; i < m->n_block; i++) {
        uint32_t s = publish_block(f, c, m, m->block[i]);

        status[i] = (Kvd__V1__PublishStatus)s;
        if (s == KVD_FAILED)
            errors[r.n_error++] = &error;
    }
    r.n_status = m->n_block;
    r.status = status;
    reply_message(f, c, FRAME_PUBLISH, id, &r.base, NULL, 0);
    kvd__v1__publish__free_unpacked(m, NULL);
}

static void take_flight(struct fake *f, struct conn *c, uint16_t type, uint32_t id, const uint8_t *body, size_t n)
{
    if (type == FRAME_FLIGHT_BEGIN) {
        Kvd__V1__FlightBegin *m = kvd__v1__flight_begin__unpack(NULL, n, body);
        Kvd__V1__FlightBeginReply r = KVD__V1__FLIGHT_BEGIN_REPLY__INIT;
        Kvd__V1__FlightState *state;

        must(m != NULL, "flight");
        state = calloc(m->n_key, sizeof(*state));
        for (size_t i = 0; i < m->n_key; i++)
            state[i] = (Kvd__V1__FlightState)(i % 3);
        r.n_state = m->n_key;
        r.state = state;
        reply_message(f, c, type, id, &r.base, NULL, 0);
        free(state);
        kvd__v1__flight_begin__free_unpacked(m, NULL);
    } else {
        Kvd__V1__FlightWait *m = kvd__v1__flight_wait__unpack(NULL, n, body);
        Kvd__V1__FlightWaitReply r = KVD__V1__FLIGHT_WAIT_REPLY__INIT;

        must(m != NULL, "flight");
        r.landed = m->timeout_usec == 1000;
        r.timed_out = m->timeout_usec == 2000;
        reply_message(f, c, type, id, &r.base, NULL, 0);
        kvd__v1__flight_wait__free_unpacked(m, NULL);
    }
}

/* ---- The thread ---- */

static void drop_conn(struct conn *c)
{
    for (int i = 0; i < STAGINGS_MAX; i++)
        if (c->staging[i].map)
            munmap(c->staging[i].map, c->staging[i].bytes);
    if (c->page.map)
        slab_memory_release(&c->page);
    close(c->fd);
    *c = (struct conn){.fd = -1};
}

static void handle(struct fake *f, struct conn *c, const struct frame_header *h, const uint8_t *body, int *fds)
{
    switch (h->type) {
    case FRAME_HELLO:
        take_hello(f, c, h->request_id, body, h->length);
        break;
    case FRAME_SPACE_OPEN:
        take_space(f, c, h->request_id, body, h->length);
        break;
    case FRAME_SLAB_GET:
        take_slab(f, c, h->request_id, body, h->length);
        break;
    case FRAME_STAGING_ADD:
        take_staging(f, c, h->request_id, body, h->length, fds);
        break;
    case FRAME_PUBLISH:
        take_publish(f, c, h->request_id, body, h->length);
        break;
    case FRAME_FLIGHT_BEGIN:
    case FRAME_FLIGHT_WAIT:
        take_flight(f, c, h->type, h->request_id, body, h->length);
        break;
    default: /* ping, drops and closes: an empty answer */
        reply(f, c, h->type, h->request_id, NULL, 0, NULL, 0);
    }
}

static void serve(struct fake *f, struct conn *c)
{
    static _Thread_local uint8_t buf[FRAME_MAX];
    struct frame_header h;
    const uint8_t *body;
    const char *reason;
    int fds[FRAME_FDS_MAX];
    size_t n = 0, n_fds = 0;

    if (frame_recv(c->fd, buf, sizeof(buf), MSG_DONTWAIT, &n, fds, &n_fds) < 0 || n == 0) {
        pthread_mutex_lock(&f->lock);
        drop_conn(c);
        pthread_mutex_unlock(&f->lock);
        return;
    }
    must(frame_parse(buf, n, n_fds, &h, &body, &reason) == 0 && h.type < TYPES, "a good frame");
    atomic_fetch_add(&f->count[h.type], 1);
    if (atomic_load(&f->delay_msec[h.type])) {
        struct timespec t = {.tv_nsec = atomic_load(&f->delay_msec[h.type]) * 1000000l};

        nanosleep(&t, NULL);
    }
    pthread_mutex_lock(&f->lock);
    handle(f, c, &h, body, fds);
    pthread_mutex_unlock(&f->lock);
    for (size_t i = 0; i < n_fds; i++)
        close(fds[i]);
}

static void accept_one(struct fake *f)
{
    int fd = accept4(f->listen_fd, NULL, NULL, SOCK_CLOEXEC);

    must(fd >= 0, "accept");
    pthread_mutex_lock(&f->lock);
    for (int i = 0; i < CONNS_MAX; i++)
        if (f->conn[i].fd < 0) {
            f->conn[i].fd = fd;
            fd = -1;
            break;
        }
    pthread_mutex_unlock(&f->lock);
    must(fd < 0, "fewer connections");
}

static void *run(void *ctx)
{
    struct fake *f = ctx;

    /* Here, because this thread's end is to be seen as the daemon's. */
    must(index_init(&f->index, "fake-index", f->o.n_entries) == 0, "index");
    pthread_barrier_wait(&f->ready);
    while (!atomic_load(&f->stop)) {
        struct pollfd p[CONNS_MAX + 2] = {{.fd = f->listen_fd, .events = POLLIN}, {.fd = f->wake[0], .events = POLLIN}};

        for (int i = 0; i < CONNS_MAX; i++)
            p[i + 2] = (struct pollfd){.fd = f->conn[i].fd, .events = POLLIN};
        must(poll(p, CONNS_MAX + 2, -1) >= 0, "poll");
        for (int i = 0; i < CONNS_MAX; i++)
            if (p[i + 2].fd >= 0 && p[i + 2].revents)
                serve(f, &f->conn[i]);
        if (p[0].revents)
            accept_one(f);
    }
    if (atomic_load(&f->stop) == 2)
        index_deinit(&f->index);
    return NULL;
}

struct fake *fake_start(const struct fake_options *options)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct fake *f = calloc(1, sizeof(*f));

    must(f != NULL, "calloc");
    f->o = *options;
    f->o.n_entries = f->o.n_entries ? f->o.n_entries : 4096;
    f->o.n_leases = f->o.n_leases ? f->o.n_leases : 1024;
    f->o.slab_bytes = f->o.slab_bytes ? f->o.slab_bytes : 4 << 20;
    f->o.publish_max_blocks = f->o.publish_max_blocks ? f->o.publish_max_blocks : 64;
    f->o.staging_max_bytes = f->o.staging_max_bytes ? f->o.staging_max_bytes : 64 << 20;
    for (int i = 0; i < CONNS_MAX; i++)
        f->conn[i].fd = -1;
    memset(f->fingerprint, 0xf1, sizeof(f->fingerprint));
    must(key_hasher_create(&f->hasher) == 0, "hasher");
    pthread_mutex_init(&f->lock, NULL);
    pthread_barrier_init(&f->ready, NULL, 2);
    must(pipe2(f->wake, O_CLOEXEC) == 0, "pipe");
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", f->o.socket_path);
    unlink(f->o.socket_path);
    f->listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    must(f->listen_fd >= 0 && bind(f->listen_fd, (struct sockaddr *)&address, sizeof(address)) == 0 &&
             listen(f->listen_fd, 16) == 0,
         "listen");
    must(pthread_create(&f->thread, NULL, run, f) == 0, "thread");
    pthread_barrier_wait(&f->ready);
    return f;
}

struct fake *fake_stop(struct fake *f, bool graceful)
{
    atomic_store(&f->stop, graceful ? 2 : 1);
    must(write(f->wake[1], "x", 1) == 1, "wake");
    pthread_join(f->thread, NULL);
    close(f->listen_fd);
    unlink(f->o.socket_path);
    for (int i = 0; i < CONNS_MAX; i++)
        if (f->conn[i].fd >= 0)
            drop_conn(&f->conn[i]);
    for (uint32_t i = 0; i < f->n_slabs; i++)
        if (f->slab[i].map)
            slab_memory_release(&f->slab[i]);
    if (!graceful)
        slab_memory_release(&f->index.memory);
    for (int g = 0; g < 16; g++)
        for (int k = 0; k < 2; k++)
            payload_layout_destroy(f->layout[g][k]);
    key_hasher_destroy(f->hasher);
    close(f->wake[0]);
    close(f->wake[1]);
    pthread_mutex_destroy(&f->lock);
    pthread_barrier_destroy(&f->ready);
    free(f);
    return NULL;
}

/* ---- What tests do ---- */

void fake_lie(struct fake *f, enum frame_type type, enum fake_lie lie)
{
    atomic_store(&f->lie[type], (int)lie);
}

uint64_t fake_count(const struct fake *f, enum frame_type type)
{
    return atomic_load(&f->count[type]);
}

void fake_delay(struct fake *f, enum frame_type type, unsigned msec)
{
    atomic_store(&f->delay_msec[type], msec);
}

uint32_t fake_add(struct fake *f, const uint8_t key[32], uint8_t group, uint8_t flags, const void *payload, uint32_t n,
                  uint32_t crc)
{
    uint32_t e;

    pthread_mutex_lock(&f->lock);
    e = add_locked(f, key, group, flags, payload, n, crc);
    pthread_mutex_unlock(&f->lock);
    return e;
}

static const _Atomic uint64_t *lease_table(const struct conn *c)
{
    const struct shm_page_header *h = c->page.map;

    return (const void *)((const char *)c->page.map + h->leases_off);
}

bool fake_retire(struct fake *f, uint32_t entry)
{
    bool held = false;
    uint32_t gen;

    pthread_mutex_lock(&f->lock);
    gen = index_gen(&f->index, entry);
    index_retire(&f->index, entry);
    atomic_thread_fence(memory_order_seq_cst);
    for (int i = 0; i < CONNS_MAX; i++)
        for (uint32_t w = 0; f->conn[i].page.map && w < f->conn[i].n_leases; w++)
            held |= atomic_load(&lease_table(&f->conn[i])[w]) == shm_ref(entry, gen);
    if (held)
        index_restore(&f->index, entry);
    else
        index_remove(&f->index, entry);
    pthread_mutex_unlock(&f->lock);
    return !held;
}

uint64_t fake_leases(struct fake *f)
{
    uint64_t n = 0;

    pthread_mutex_lock(&f->lock);
    for (int i = 0; i < CONNS_MAX; i++)
        for (uint32_t w = 0; f->conn[i].page.map && w < f->conn[i].n_leases; w++)
            n += atomic_load(&lease_table(&f->conn[i])[w]) != 0;
    pthread_mutex_unlock(&f->lock);
    return n;
}

uint64_t fake_logged(struct fake *f)
{
    uint64_t n = 0;

    pthread_mutex_lock(&f->lock);
    for (int i = 0; i < CONNS_MAX; i++)
        if (f->conn[i].page.map)
            n += atomic_load(&((const struct shm_page_header *)f->conn[i].page.map)->log_head);
    pthread_mutex_unlock(&f->lock);
    return n;
}

void fake_revoke(struct fake *f)
{
    pthread_mutex_lock(&f->lock);
    for (int i = 0; i < CONNS_MAX; i++)
        if (f->conn[i].page.map) {
            atomic_store(&((struct shm_page_header *)f->conn[i].page.map)->revoked, 1);
            shutdown(f->conn[i].fd, SHUT_RDWR);
        }
    pthread_mutex_unlock(&f->lock);
}

void fake_replace_slab(struct fake *f, uint32_t slab)
{
    pthread_mutex_lock(&f->lock);
    slab_memory_release(&f->slab[slab]);
    must(slab_memory_create("fake-slab", f->o.slab_bytes, SLAB_HUGE_OFF, false, &f->slab[slab]) == 0, "slab");
    must(slab_memory_seal(&f->slab[slab]) == 0, "seal");
    if (slab == f->n_slabs - 1)
        f->slab_used = 0;
    atomic_fetch_add(&f->index.header->retired_slabs, 1);
    pthread_mutex_unlock(&f->lock);
}

struct index *fake_index(struct fake *f)
{
    return &f->index;
}
