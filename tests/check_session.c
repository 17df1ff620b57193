/* A whole daemon in this process, its workers at the other end of socket pairs, its one helper thread behind a gate: so that what may
 * happen in any order in life happens here in the order that a test wants. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client/libkvd/kvd.h"
#include "daemon/daemon.h"
#include "daemon/errors.h"
#include "daemon/publish.h"
#include "daemon/session.h"
#include "daemon/tenants.h"
#include "proto/kvd.pb-c.h"

/* The daemon's numbers are the client's. */
static_assert(ERROR_PROTOCOL == (int)KVD_E_PROTOCOL && ERROR_DENIED == (int)KVD_E_DENIED && ERROR_LIMIT == (int)KVD_E_LIMIT, "");
static_assert(ERROR_QUOTA == (int)KVD_E_QUOTA && ERROR_FULL == (int)KVD_E_FULL && ERROR_LAYOUT == (int)KVD_E_LAYOUT, "");
static_assert(ERROR_SPACE == (int)KVD_E_SPACE && ERROR_PARENT == (int)KVD_E_PARENT && ERROR_TOKEN == (int)KVD_E_TOKEN, "");
static_assert(ERROR_VALUE == (int)KVD_E_VALUE && ERROR_STAGING == (int)KVD_E_STAGING && ERROR_CORRUPT == (int)KVD_E_CORRUPT, "");
static_assert(ERROR_TIMEOUT == (int)KVD_E_TIMEOUT && ERROR_DRAINING == (int)KVD_E_DRAINING, "");
static_assert(ERROR_NOT_FOUND == (int)KVD_E_NOT_FOUND && ERROR_AMBIGUOUS == (int)KVD_E_AMBIGUOUS, "");
static_assert(ERROR_INTERNAL == (int)KVD_E_INTERNAL && ERROR_OPTION == (int)KVD_E_OPTION, "");

enum { TOKENS = 16, DIM = 64, BLOCK_BYTES = 2 * TOKENS * DIM * 4, STAGING_BYTES = 32 * BLOCK_BYTES, BAD_BLOCK = 31 };

/* ---- a daemon ---- */

struct gate {
    struct job job;
    sem_t open, reached;
    bool passed;
};

struct bed {
    struct daemon *d;
    struct gate gate;
};

static void gate_run(struct job *job)
{
    struct gate *g = (struct gate *)job;

    sem_post(&g->reached);
    while (sem_wait(&g->open) < 0)
        ;
}

static void gate_done(struct job *job)
{
    ((struct gate *)job)->passed = true;
}

/* The helper thread stands still from here on until gate_open(). */
static void gate_shut(struct bed *b)
{
    sem_init(&b->gate.open, 0, 0);
    sem_init(&b->gate.reached, 0, 0);
    b->gate.job = (struct job){.run = gate_run, .done = gate_done};
    b->gate.passed = false;
    jobs_submit(b->d->jobs, &b->gate.job);
    while (sem_wait(&b->gate.reached) < 0)
        ;
}

static void gate_open(struct bed *b)
{
    sem_post(&b->gate.open);
    while (!b->gate.passed) /* its memory will be used for the next one */
        ck_assert_int_ge(sd_event_run(b->d->event, UINT64_MAX), 0);
    sem_destroy(&b->gate.open);
    sem_destroy(&b->gate.reached);
}

static void bed_init(struct bed *b, const char *config)
{
    struct options o;
    struct option_error e;
    char text[1024];
    int n = snprintf(text, sizeof(text), "host_bytes = 32M\nslab_bytes = 2M\nindex_entries = 512\njob_threads = 1\nlog_level = error\n%s",
                     config);

    ck_assert_int_eq(options_init(&o), 0);
    ck_assert_msg(options_read_text(&o, "test", text, (size_t)n, &id_resolver_system, &e) == 0, "%s", e.text);
    ck_assert_int_eq(daemon_create(&o, &b->d), 0);
}

/* Everything that can happen without waiting has happened. */
static void settle(struct bed *b)
{
    while (sd_event_run(b->d->event, 0) > 0)
        ;
}

/* … and every job has ended. */
static void settle_jobs(struct bed *b)
{
    do
        settle(b);
    while (publishing_blocks(b->d->publishing) > 0 && (sd_event_run(b->d->event, 1000) >= 0));
    settle(b);
}

static struct cache *cache_of(struct bed *b)
{
    return b->d->tenants->first->cache;
}

static void bed_deinit(struct bed *b)
{
    struct cache_stats s;

    settle_jobs(b);
    cache_assert_valid(cache_of(b));
    cache_stats(cache_of(b), &s);
    ck_assert_uint_eq(s.n_reserved, 0);
    ck_assert_uint_eq(publishing_blocks(b->d->publishing), 0);
    b->d = daemon_destroy(b->d);
}

/* ---- a worker ---- */

struct peer {
    int fd;
    uint32_t id;            /* of the last request */
    uint32_t space, staging;
    uint8_t fingerprint[KEY_BYTES];
    float *memory;          /* the staging */
    struct frame_header h;  /* of the last reply */
    uint8_t packet[FRAME_MAX];
    const uint8_t *body;
};

static void tell(struct peer *p, uint16_t type, const ProtobufCMessage *m, const int *fds, size_t n_fds)
{
    uint8_t body[FRAME_BODY_MAX];
    size_t n = protobuf_c_message_get_packed_size(m);

    ck_assert_uint_le(n, sizeof(body));
    protobuf_c_message_pack(m, body);
    ck_assert_int_eq(frame_send(p->fd, type, ++p->id, body, n, fds, n_fds, 0), 0);
}

/* A reply that is there; false if none is. */
static bool answered(struct peer *p)
{
    int fds[FRAME_FDS_MAX], r;
    size_t n, n_fds;
    const char *reason = "";

    r = frame_recv(p->fd, p->packet, sizeof(p->packet), MSG_DONTWAIT, &n, fds, &n_fds);
    if (r == -EAGAIN)
        return false;
    ck_assert_int_eq(r, 0);
    ck_assert_uint_gt(n, 0);
    ck_assert_msg(frame_parse(p->packet, n, n_fds, &p->h, &p->body, &reason) == 0, "%s", reason);
    while (n_fds > 0)
        close(fds[--n_fds]);
    return true;
}

static void *ask(struct bed *b, struct peer *p, uint16_t type, const ProtobufCMessage *m, const int *fds, size_t n_fds,
                 const ProtobufCMessageDescriptor *reply)
{
    void *out;

    tell(p, type, m, fds, n_fds);
    settle(b);
    ck_assert(answered(p));
    ck_assert_uint_eq(p->h.type, type | FRAME_REPLY);
    ck_assert_uint_eq(p->h.request_id, p->id);
    out = protobuf_c_message_unpack(reply, NULL, p->h.length, p->body);
    ck_assert_ptr_nonnull(out);
    return out;
}

static void open_space(struct bed *b, struct peer *p)
{
    Kvd__V1__Space m = KVD__V1__SPACE__INIT;
    Kvd__V1__Layer layer = KVD__V1__LAYER__INIT, *layers[] = {&layer};
    Kvd__V1__Group group = KVD__V1__GROUP__INIT, *groups[] = {&group};
    Kvd__V1__SpaceReply *r;

    m.model = (char *)"model";
    m.dtype = (char *)"f32";
    m.block_tokens = TOKENS;
    m.n_group = m.n_layer = 1;
    m.group = groups;
    m.layer = layers;
    layer.n_kv_heads = 1;
    layer.dim_k = layer.dim_v = DIM;
    layer.codec_k = (char *)"kc4";
    layer.codec_v = (char *)"tq4";
    r = ask(b, p, FRAME_SPACE_OPEN, &m.base, NULL, 0, &kvd__v1__space_reply__descriptor);
    p->space = r->space;
    memcpy(p->fingerprint, r->fingerprint.data, KEY_BYTES);
    kvd__v1__space_reply__free_unpacked(r, NULL);
}

static void add_staging(struct bed *b, struct peer *p)
{
    Kvd__V1__StagingAdd m = KVD__V1__STAGING_ADD__INIT;
    int fd = memfd_create("staging", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    Kvd__V1__StagingReply *r;

    ck_assert_int_eq(ftruncate(fd, STAGING_BYTES), 0);
    ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    p->memory = mmap(NULL, STAGING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(p->memory, MAP_FAILED);
    for (size_t i = 0; i < STAGING_BYTES / sizeof(float); i++)
        p->memory[i] = (float)(i % 17) / 16;
    p->memory[BAD_BLOCK * (BLOCK_BYTES / sizeof(float))] = NAN;
    m.bytes = STAGING_BYTES;
    r = ask(b, p, FRAME_STAGING_ADD, &m.base, &fd, 1, &kvd__v1__staging_reply__descriptor);
    p->staging = r->staging;
    kvd__v1__staging_reply__free_unpacked(r, NULL);
    close(fd);
}

static void peer_init(struct bed *b, struct peer *p)
{
    Kvd__V1__Hello m = KVD__V1__HELLO__INIT;
    int fds[2];

    memset(p, 0, sizeof(*p));
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
    session_accept(b->d, fds[1]);
    p->fd = fds[0];
    m.version_min = m.version_max = 1;
    m.name = (char *)"peer";
    kvd__v1__hello_reply__free_unpacked(ask(b, p, FRAME_HELLO, &m.base, NULL, 0, &kvd__v1__hello_reply__descriptor), NULL);
    open_space(b, p);
    add_staging(b, p);
}

static void peer_deinit(struct peer *p)
{
    if (p->fd >= 0)
        close(p->fd);
    munmap(p->memory, STAGING_BYTES);
    p->fd = -1;
}

/* ---- blocks ---- */

struct block {
    uint8_t parent[KEY_BYTES], key[KEY_BYTES];
    uint32_t token[TOKENS];
    unsigned at; /* in the staging; BAD_BLOCK holds a NaN */
};

/* The block that continues parent (NULL: begins a chain) with a token that says which. */
static struct block block_of(struct bed *b, const struct peer *p, const struct block *parent, uint32_t which, unsigned at)
{
    struct block k = {.at = at};

    memcpy(k.parent, parent ? parent->key : p->fingerprint, KEY_BYTES);
    for (int i = 0; i < TOKENS; i++)
        k.token[i] = which;
    ck_assert_int_eq(key_block(b->d->hasher, k.parent, k.token, TOKENS, NULL, 0, k.key), 0);
    return k;
}

static void publish(struct peer *p, const struct block *blocks, size_t n)
{
    Kvd__V1__Publish m = KVD__V1__PUBLISH__INIT;
    Kvd__V1__PublishBlock block[64], *list[64];

    for (size_t i = 0; i < n; i++) {
        kvd__v1__publish_block__init(&block[i]);
        block[i].parent = (ProtobufCBinaryData){KEY_BYTES, (uint8_t *)blocks[i].parent};
        block[i].n_token = TOKENS;
        block[i].token = (uint32_t *)blocks[i].token;
        block[i].offset = (uint64_t)blocks[i].at * BLOCK_BYTES;
        list[i] = &block[i];
    }
    m.space = p->space;
    m.staging = p->staging;
    m.dtype = (char *)"f32";
    m.n_block = n;
    m.block = list;
    tell(p, FRAME_PUBLISH, &m.base, NULL, 0);
}

/* The reply to a publish: statuses as letters (p, o = present, f), then the errors of the failed ones. */
static const char *outcome(struct peer *p, char buf[128])
{
    Kvd__V1__PublishReply *r;
    size_t n = 0;

    if (!answered(p))
        return "nothing";
    ck_assert_uint_eq(p->h.type, FRAME_PUBLISH | FRAME_REPLY);
    r = kvd__v1__publish_reply__unpack(NULL, p->h.length, p->body);
    ck_assert_ptr_nonnull(r);
    for (size_t i = 0; i < r->n_status; i++)
        buf[n++] = "pof"[r->status[i]];
    buf[n] = 0;
    for (size_t i = 0; i < r->n_error; i++)
        n += (size_t)sprintf(buf + n, " %u", r->error[i]->code);
    kvd__v1__publish_reply__free_unpacked(r, NULL);
    return buf;
}
#define OUTCOME(p, text)                                                                                               \
    do {                                                                                                               \
        char buf_[128];                                                                                                \
        ck_assert_str_eq(outcome(p, buf_), text);                                                                      \
    } while (0)

static bool cached(struct bed *b, const struct peer *p, const struct block *k)
{
    return cache_find(cache_of(b), p->space, 0, k->key) != CACHE_NONE;
}

/* ---- publishes that meet ---- */

START_TEST(nothing_is_seen_before_it_is_done)
{
    struct bed b;
    struct peer p;
    struct block k;

    bed_init(&b, "");
    peer_init(&b, &p);
    k = block_of(&b, &p, NULL, 1, 0);
    gate_shut(&b);
    publish(&p, &k, 1);
    settle(&b);
    OUTCOME(&p, "nothing");
    ck_assert(!cached(&b, &p, &k));
    gate_open(&b);
    settle_jobs(&b);
    OUTCOME(&p, "p");
    ck_assert(cached(&b, &p, &k));
    publish(&p, &k, 1);
    settle(&b);
    OUTCOME(&p, "o");
    peer_deinit(&p);
    bed_deinit(&b);
}
END_TEST

START_TEST(a_child_waits_for_another_workers_parent)
{
    struct bed b;
    struct peer p, q;
    struct block parent, child;

    bed_init(&b, "");
    peer_init(&b, &p);
    peer_init(&b, &q);
    parent = block_of(&b, &p, NULL, 1, _i ? BAD_BLOCK : 0);
    child = block_of(&b, &p, &parent, 2, 1);
    gate_shut(&b);
    publish(&p, &parent, 1);
    settle(&b);
    publish(&q, &child, 1);
    settle(&b);
    gate_open(&b);
    settle_jobs(&b);
    OUTCOME(&p, _i ? "f 14" : "p");
    OUTCOME(&q, _i ? "f 12" : "p");
    ck_assert(cached(&b, &p, &child) == !_i);
    peer_deinit(&p);
    peer_deinit(&q);
    bed_deinit(&b);
}
END_TEST

START_TEST(two_workers_publish_the_same)
{
    struct bed b;
    struct peer p, q;
    struct block k, bad;

    bed_init(&b, "");
    peer_init(&b, &p);
    peer_init(&b, &q);
    k = block_of(&b, &p, NULL, 1, _i ? BAD_BLOCK : 0);
    bad = k;
    bad.at = 3; /* the second one's data are right, but they were not looked at */
    gate_shut(&b);
    publish(&p, &k, 1);
    settle(&b);
    publish(&q, &bad, 1);
    settle(&b);
    OUTCOME(&q, "nothing"); /* not "there" before it is there */
    gate_open(&b);
    settle_jobs(&b);
    OUTCOME(&p, _i ? "f 14" : "p");
    OUTCOME(&q, _i ? "f 14" : "o");
    publish(&q, &bad, 1);
    settle_jobs(&b);
    OUTCOME(&q, _i ? "p" : "o");
    peer_deinit(&p);
    peer_deinit(&q);
    bed_deinit(&b);
}
END_TEST

START_TEST(a_failure_takes_what_hangs_on_it)
{
    struct bed b;
    struct peer p;
    struct block k[6];

    bed_init(&b, "");
    peer_init(&b, &p);
    k[0] = block_of(&b, &p, NULL, 1, 0);
    k[1] = block_of(&b, &p, &k[0], 2, BAD_BLOCK);
    k[2] = block_of(&b, &p, &k[1], 3, 2);
    k[3] = k[2];                         /* once more in the same request */
    k[4] = block_of(&b, &p, &k[0], 4, 3); /* another branch */
    k[5] = k[4];
    publish(&p, k, 6);
    settle_jobs(&b);
    OUTCOME(&p, "pfffpo 14 12 12");
    peer_deinit(&p);
    bed_deinit(&b);
}
END_TEST

START_TEST(a_worker_that_goes_leaves_nothing_half_done)
{
    struct bed b;
    struct peer p, q;
    struct block k[2], child;

    bed_init(&b, "");
    peer_init(&b, &p);
    peer_init(&b, &q);
    k[0] = block_of(&b, &p, NULL, 1, 0);
    k[1] = block_of(&b, &p, &k[0], 2, 1);
    child = block_of(&b, &p, &k[1], 3, 2);
    gate_shut(&b);
    publish(&p, k, 2);
    settle(&b);
    publish(&q, &child, 1);
    settle(&b);
    peer_deinit(&p);
    settle(&b);
    ck_assert_uint_eq(b.d->n_sessions, 1);
    ck_assert_uint_eq(b.d->staging_bytes, 2 * STAGING_BYTES); /* it is read still */
    gate_open(&b);
    settle_jobs(&b);
    OUTCOME(&q, "p");
    ck_assert(cached(&b, &q, &k[0]) && cached(&b, &q, &k[1]) && cached(&b, &q, &child));
    ck_assert_uint_eq(b.d->staging_bytes, STAGING_BYTES);
    peer_deinit(&q);
    settle(&b);
    ck_assert_uint_eq(b.d->n_sessions, 0);
    ck_assert_uint_eq(b.d->staging_bytes, 0);
    bed_deinit(&b);
}
END_TEST

START_TEST(staging_is_dropped_after_its_publishes)
{
    struct bed b;
    struct peer p;
    struct block k;
    Kvd__V1__StagingDrop m = KVD__V1__STAGING_DROP__INIT;

    bed_init(&b, "");
    peer_init(&b, &p);
    k = block_of(&b, &p, NULL, 1, 0);
    gate_shut(&b);
    publish(&p, &k, 1);
    m.staging = p.staging;
    tell(&p, FRAME_STAGING_DROP, &m.base, NULL, 0);
    settle(&b);
    ck_assert(!answered(&p));
    publish(&p, &k, 1); /* it takes nothing new */
    settle(&b);
    ck_assert(answered(&p));
    ck_assert_uint_eq(p.h.type, FRAME_ERROR | FRAME_REPLY);
    gate_open(&b);
    settle_jobs(&b);
    OUTCOME(&p, "p");
    ck_assert(answered(&p));
    ck_assert_uint_eq(p.h.type, FRAME_STAGING_DROP | FRAME_REPLY);
    ck_assert_uint_eq(b.d->staging_bytes, 0);
    peer_deinit(&p);
    bed_deinit(&b);
}
END_TEST

START_TEST(what_no_helper_takes_up_is_given_back)
{
    struct bed b;
    struct peer p;
    struct block k[2];
    uint64_t until;

    bed_init(&b, "publish_timeout = 1ms\n");
    peer_init(&b, &p);
    k[0] = block_of(&b, &p, NULL, 1, 0);
    k[1] = block_of(&b, &p, &k[0], 2, 1);
    gate_shut(&b);
    publish(&p, k, 2);
    settle(&b);
    for (until = daemon_now_usec() + 1001; daemon_now_usec() <= until;)
        ;
    gate_open(&b);
    settle_jobs(&b);
    OUTCOME(&p, "ff 17 12");
    ck_assert(!cached(&b, &p, &k[0]));
    peer_deinit(&p);
    bed_deinit(&b);
}
END_TEST

START_TEST(the_daemon_ends_in_the_middle)
{
    struct bed b;
    struct peer p;
    struct block k[2];

    bed_init(&b, "");
    peer_init(&b, &p);
    k[0] = block_of(&b, &p, NULL, 1, 0);
    k[1] = block_of(&b, &p, &k[0], 2, 1);
    gate_shut(&b);
    publish(&p, k, 2);
    settle(&b);
    sem_post(&b.gate.open);
    b.d = daemon_destroy(b.d); /* each block is published or given back, and the worker is told */
    ck_assert(answered(&p));
    ck_assert_uint_eq(p.h.type, FRAME_PUBLISH | FRAME_REPLY);
    peer_deinit(&p);
}
END_TEST

/* ---- anything in any order ---- */

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

enum { PEERS = 4, POOL = 24 };

/* Branching chains: block i continues an earlier one. */
static void make_pool(struct bed *b, const struct peer *p, struct block *pool, uint64_t *rng)
{
    for (uint32_t i = 0; i < POOL; i++) {
        const struct block *parent = i < 3 ? NULL : &pool[next_random(rng) % i];

        pool[i] = block_of(b, p, parent, i, next_random(rng) % 8 == 0 ? BAD_BLOCK : i);
    }
}

static void random_publish(struct peer *p, const struct block *pool, uint64_t *rng)
{
    struct block some[12];
    size_t n = 1 + next_random(rng) % 12, from = next_random(rng) % POOL;

    for (size_t i = 0; i < n; i++) {
        some[i] = pool[(from + i) % POOL];
        if (some[i].at == BAD_BLOCK && next_random(rng) % 2)
            some[i].at = 0; /* another worker has it right */
    }
    publish(p, some, n);
}

START_TEST(any_order)
{
    const char *given = getenv("KVD_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 0) : daemon_now_usec(), rng = seed;
    struct peer peers[PEERS];
    struct block pool[POOL];
    struct bed b;
    bool shut = false;

    printf("any_order: seed %llu (KVD_SEED)\n", (unsigned long long)seed);
    fflush(stdout);
    bed_init(&b, "");
    for (int i = 0; i < PEERS; i++)
        peer_init(&b, &peers[i]);
    make_pool(&b, &peers[0], pool, &rng);
    for (int step = 0; step < 1500; step++) {
        struct peer *p = &peers[next_random(&rng) % PEERS];

        switch (next_random(&rng) % 8) {
        case 0:
            if (!shut)
                gate_shut(&b);
            shut = true;
            break;
        case 1:
            if (shut)
                gate_open(&b);
            shut = false;
            settle_jobs(&b);
            cache_assert_valid(cache_of(&b));
            break;
        case 2:
            if (next_random(&rng) % 4 == 0) {
                peer_deinit(p);
                settle(&b);
                peer_init(&b, p);
            }
            break;
        case 3: {
            uint32_t all[512];
            struct cache_evicted done = {0};

            for (uint32_t e = 0; e < 512; e++)
                all[e] = e;
            cache_evict(cache_of(&b), all, next_random(&rng) % 2 ? 512 : 20, NULL, NULL, 0, &done);
            break;
        }
        default:
            random_publish(p, pool, &rng);
            settle(&b);
        }
        for (int i = 0; i < PEERS; i++)
            while (answered(&peers[i]))
                ;
    }
    if (shut)
        gate_open(&b);
    settle_jobs(&b);
    for (int i = 0; i < PEERS; i++)
        peer_deinit(&peers[i]);
    bed_deinit(&b);
}
END_TEST

/* ---- admin ---- */

static struct cache_evicted evict(struct bed *b, struct peer *p, bool dry_run, uint64_t max_bytes)
{
    Kvd__V1__Evict m = KVD__V1__EVICT__INIT;
    Kvd__V1__EvictReply *r;
    struct cache_evicted done;

    m.dry_run = dry_run;
    m.max_bytes = max_bytes;
    r = ask(b, p, FRAME_EVICT, &m.base, NULL, 0, &kvd__v1__evict_reply__descriptor);
    done = (struct cache_evicted){r->blocks, r->bytes, r->kept_leased, r->kept_pinned, r->kept_parents};
    kvd__v1__evict_reply__free_unpacked(r, NULL);
    return done;
}

/* A dry run says what the real one then does, with pins anywhere in the tree. */
START_TEST(a_dry_run_tells_the_truth)
{
    uint64_t seed = daemon_now_usec(), rng = seed;
    struct block pool[POOL];
    struct bed b;
    struct peer p;

    printf("a_dry_run_tells_the_truth: seed %llu\n", (unsigned long long)seed);
    fflush(stdout);
    bed_init(&b, "");
    peer_init(&b, &p);
    for (int round = 0; round < 20; round++) {
        struct cache_evicted said, done;
        uint32_t pinned[3];
        uint64_t blocks, bytes;

        make_pool(&b, &p, pool, &rng);
        for (int i = 0; i < POOL; i++)
            pool[i].at = 0;
        publish(&p, pool, POOL);
        settle_jobs(&b);
        ck_assert(answered(&p));
        for (int i = 0; i < 3; i++) {
            pinned[i] = cache_find(cache_of(&b), p.space, 0, pool[next_random(&rng) % POOL].key);
            ck_assert_uint_ne(pinned[i], CACHE_NONE);
            cache_pin(cache_of(&b), pinned[i], false, &blocks, &bytes);
        }
        said = evict(&b, &p, true, 0);
        done = evict(&b, &p, false, 0);
        ck_assert_int_eq(memcmp(&said, &done, sizeof(said)), 0);
        ck_assert_uint_eq(done.blocks + done.kept_pinned + done.kept_parents + done.kept_leased, POOL);
        for (int i = 0; i < 3; i++)
            cache_pin(cache_of(&b), pinned[i], true, &blocks, &bytes);
        evict(&b, &p, false, 0);
        cache_assert_valid(cache_of(&b));
    }
    peer_deinit(&p);
    bed_deinit(&b);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("session");
    TCase *tc = tcase_create("session");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    tcase_set_timeout(tc, 300);
    tcase_add_test(tc, nothing_is_seen_before_it_is_done);
    tcase_add_loop_test(tc, a_child_waits_for_another_workers_parent, 0, 2);
    tcase_add_loop_test(tc, two_workers_publish_the_same, 0, 2);
    tcase_add_test(tc, a_failure_takes_what_hangs_on_it);
    tcase_add_test(tc, a_worker_that_goes_leaves_nothing_half_done);
    tcase_add_test(tc, staging_is_dropped_after_its_publishes);
    tcase_add_test(tc, what_no_helper_takes_up_is_given_back);
    tcase_add_test(tc, the_daemon_ends_in_the_middle);
    tcase_add_test(tc, any_order);
    tcase_add_test(tc, a_dry_run_tells_the_truth);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
