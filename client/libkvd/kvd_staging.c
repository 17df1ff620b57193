#include "kvd_staging.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvd_impl.h"
#include "proto/kvd.pb-c.h"

/* At least this: a publish cuts a chunk into four segments, and 4 MiB are enough to make a round trip small against
 * copying and few enough to stay in a processor's cache. */
#define CHUNK_BYTES (UINT64_C(16) << 20)
#define ROUND_BYTES (UINT64_C(64) << 10)
#define DROP_MSEC   1000u /* for the daemon to say that it heard of a chunk's end */

void staging_init(struct staging *g, uint64_t limit_bytes)
{
    *g = (struct staging){.limit_bytes = limit_bytes};
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->freed, NULL);
}

static void free_chunk(struct staging_chunk *c)
{
    if (c->map)
        munmap(c->map, c->bytes);
    if (c->fd >= 0)
        close(c->fd);
    free(c);
}

void staging_deinit(struct staging *g, bool forked)
{
    struct staging_chunk *next;

    for (struct staging_chunk *c = g->chunks; c; c = next) {
        next = c->next;
        free_chunk(c);
    }
    g->chunks = NULL;
    if (!forked) {
        pthread_cond_destroy(&g->freed);
        pthread_mutex_destroy(&g->lock);
    }
}

static int make_chunk(struct kvd *s, struct staging_chunk *c)
{
    int r;

    c->fd = memfd_create("kvd-staging", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (c->fd < 0)
        return error_set(s->cookie, KVD_E_NOMEM, "staging memory: memfd_create: %s", strerror(errno));
    do /* makes the file as long as it is to be, and its pages real */
        r = fallocate(c->fd, 0, 0, (off_t)c->bytes) < 0 ? errno : 0;
    while (r == EINTR);
    if (r != 0)
        return error_set(s->cookie, KVD_E_NOMEM, "staging memory: reserving %llu bytes: %s",
                         (unsigned long long)c->bytes, strerror(r));
    if (fcntl(c->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        return error_set(s->cookie, KVD_E_INTERNAL, "staging memory: F_ADD_SEALS: %s", strerror(errno));
    c->map = mmap(NULL, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
    if (c->map == MAP_FAILED) {
        c->map = NULL;
        return error_set(s->cookie, KVD_E_NOMEM, "staging memory: mmap of %llu bytes: %s", (unsigned long long)c->bytes,
                         strerror(errno));
    }
    return 0;
}

static int tell_daemon(struct kvd *s, struct life *life, struct staging_chunk *c)
{
    Kvd__V1__StagingAdd add = KVD__V1__STAGING_ADD__INIT;
    Kvd__V1__StagingReply *answer;
    struct mux_reply reply = {0};
    uint8_t body[16];
    int r;

    add.bytes = c->bytes;
    r = mux_request(&life->mux, FRAME_STAGING_ADD, body, kvd__v1__staging_add__pack(&add, body), &c->fd, 1,
                    s->timeout_msec, &reply);
    if (r != 0)
        return r;
    answer = kvd__v1__staging_reply__unpack(NULL, reply.n, reply.body);
    if (answer) {
        c->serial = life->serial;
        c->id = answer->staging;
        kvd__v1__staging_reply__free_unpacked(answer, NULL);
    } else {
        r = error_set(s->cookie, KVD_E_PROTOCOL, "the answer about staging cannot be read");
    }
    mux_reply_clear(&reply);
    return r;
}

static void drop_at_daemon(struct kvd *s, struct life *life, const struct staging_chunk *c)
{
    Kvd__V1__StagingDrop drop = KVD__V1__STAGING_DROP__INIT;
    uint8_t body[16];
    char kept[ERROR_BYTES];

    if (c->serial != life->serial)
        return;
    error_keep(s->cookie,
               kept); /* it is dropped because of an error that the caller wants to hear of, not of this one's */
    drop.staging = c->id;
    mux_request(&life->mux, FRAME_STAGING_DROP, body, kvd__v1__staging_drop__pack(&drop, body), NULL, 0, DROP_MSEC,
                NULL);
    error_set(s->cookie, 0, "%s", kept);
}

/* Takes a chunk out of the list. By lock. */
static void unlink_chunk(struct staging *g, struct staging_chunk *c)
{
    struct staging_chunk **p = &g->chunks;

    while (*p != c)
        p = &(*p)->next;
    *p = c->next;
    g->total_bytes -= c->bytes;
}

static struct staging_chunk *find_free(struct staging *g, uint64_t bytes)
{
    struct staging_chunk *c;

    for (c = g->chunks; c && (c->taken || c->bytes < bytes);)
        c = c->next;
    return c;
}

static uint64_t limit_of(const struct staging *g, const struct life *life)
{
    return g->limit_bytes && g->limit_bytes < life->staging_max_bytes ? g->limit_bytes : life->staging_max_bytes;
}

static uint64_t chunk_size(uint64_t least, uint64_t most, uint64_t limit)
{
    uint64_t size = most < CHUNK_BYTES ? CHUNK_BYTES : most;

    size = (size + ROUND_BYTES - 1) / ROUND_BYTES * ROUND_BYTES;
    if (size > limit)
        size = limit / 4096 * 4096;
    return size < least ? least : size;
}

/* A fresh chunk, taken and in the list. Called with the lock, which it gives up for the while. */
static int add_chunk(struct kvd *s, uint64_t size, struct staging_chunk **ret)
{
    struct staging *g = &s->staging;
    struct staging_chunk *c = calloc(1, sizeof(*c));
    int r;

    if (!c)
        return error_set(s->cookie, KVD_E_NOMEM, "no memory for staging");
    *c = (struct staging_chunk){.fd = -1, .bytes = size, .taken = true, .next = g->chunks};
    g->chunks = c;
    g->total_bytes += size;
    pthread_mutex_unlock(&g->lock);
    r = make_chunk(s, c);
    pthread_mutex_lock(&g->lock);
    if (r != 0) {
        unlink_chunk(g, c);
        pthread_cond_broadcast(&g->freed);
        free_chunk(c);
        return r;
    }
    *ret = c;
    return 0;
}

/* Finds, makes or waits for a chunk. By lock. */
static int take_locked(struct kvd *s, struct life *life, uint64_t least, uint64_t most, struct staging_chunk **ret)
{
    struct staging *g = &s->staging;
    uint64_t limit = limit_of(g, life), size = chunk_size(least, most, limit);

    if (size > limit)
        return error_set(s->cookie, KVD_E_LIMIT, "a block takes %llu bytes of staging; allowed: %llu",
                         (unsigned long long)least, (unsigned long long)limit);
    for (;;) {
        bool full = g->full_serial == life->serial && g->chunks;
        struct staging_chunk *c = find_free(g, most);

        if (!c && !full && g->total_bytes + size <= limit)
            return add_chunk(s, size, ret);
        if (!c)
            c = find_free(g, least);
        if (c) {
            c->taken = true;
            *ret = c;
            return 0;
        }
        c = find_free(g, 0);
        if (c) { /* too small for this one: make room */
            unlink_chunk(g, c);
            g->full_serial = 0;
            pthread_mutex_unlock(&g->lock);
            drop_at_daemon(s, life, c);
            free_chunk(c);
            pthread_mutex_lock(&g->lock);
        } else {
            pthread_cond_wait(&g->freed, &g->lock);
        }
    }
}

/* Takes out a chunk that the daemon would not have. Returns true if there are others, so that one of them may be
 * waited for. */
static bool give_up_chunk(struct kvd *s, struct life *life, struct staging_chunk *c, bool full)
{
    bool others;

    pthread_mutex_lock(&s->staging.lock);
    unlink_chunk(&s->staging, c);
    others = s->staging.chunks != NULL;
    if (full && others)
        s->staging.full_serial = life->serial;
    pthread_cond_broadcast(&s->staging.freed);
    pthread_mutex_unlock(&s->staging.lock);
    free_chunk(c);
    return others;
}

int staging_take(struct kvd *s, struct life *life, uint64_t least_bytes, uint64_t most_bytes,
                 struct staging_chunk **ret)
{
    struct staging_chunk *c = NULL;
    int r;

    do {
        pthread_mutex_lock(&s->staging.lock);
        r = take_locked(s, life, least_bytes, most_bytes, &c);
        pthread_mutex_unlock(&s->staging.lock);
        if (r != 0)
            return r;
        if (c->serial == life->serial)
            break;
        r = tell_daemon(s, life, c);
        /* Over the daemon's number of stagings: make do with those there are. */
    } while (r != 0 && give_up_chunk(s, life, c, r == KVD_E_LIMIT) && r == KVD_E_LIMIT);
    if (r == 0)
        *ret = c;
    return r;
}

void staging_give(struct kvd *s, struct staging_chunk *c)
{
    pthread_mutex_lock(&s->staging.lock);
    c->taken = false;
    pthread_cond_broadcast(&s->staging.freed);
    pthread_mutex_unlock(&s->staging.lock);
}

void staging_discard(struct kvd *s, struct life *life, struct staging_chunk *c)
{
    pthread_mutex_lock(&s->staging.lock);
    unlink_chunk(&s->staging, c);
    pthread_cond_broadcast(&s->staging.freed);
    pthread_mutex_unlock(&s->staging.lock);
    drop_at_daemon(s, life, c);
    free_chunk(c);
}
