#include "kvd_life.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "kvd_attend_ring.h"
#include "kvd_error.h"
#include "proto/kvd.pb-c.h"

#define MESSAGES_VERSION 1u

static int connect_socket(const struct life_options *o, int *ret_fd)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval timeout = {.tv_sec = o->hello_msec / 1000, .tv_usec = (long)(o->hello_msec % 1000) * 1000};
    int fd, r;

    if (strlen(o->socket_path) >= sizeof(address.sun_path))
        return error_set(o->cookie, KVD_E_ARG, "the socket's path is longer than %zu bytes: %s",
                         sizeof(address.sun_path) - 1, o->socket_path);
    strcpy(address.sun_path, o->socket_path);
    fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return error_set(o->cookie, KVD_E_CONNECT, "socket: %s", strerror(errno));
    /* Bounds connect() when the backlog is full. */
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    do
        r = connect(fd, (const struct sockaddr *)&address, sizeof(address));
    while (r < 0 && errno == EINTR);
    if (r < 0) {
        int code = errno;
        const char *hint = code == ENOENT || code == ECONNREFUSED ? " (is the daemon running?)"
                           : code == EACCES                       ? " (join the socket's group)"
                                                                  : "";

        close(fd);
        return error_set(o->cookie, KVD_E_CONNECT, "%s: %s%s", o->socket_path, strerror(code), hint);
    }
    *ret_fd = fd;
    return 0;
}

/* Maps a sealed memfd of exactly bytes. A file that could shrink would be a SIGBUS in waiting. */
static int map_sealed(const struct life *life, const char *what, int fd, uint64_t bytes, int protection, void **ret)
{
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);
    void *map;

    if (seals < 0 || !(seals & F_SEAL_SHRINK))
        return error_set(life->cookie, KVD_E_PROTOCOL, "the %s is not a memfd sealed against shrinking", what);
    if (fstat(fd, &st) < 0 || bytes == 0 || (uint64_t)st.st_size < bytes)
        return error_set(life->cookie, KVD_E_PROTOCOL, "the %s has %lld bytes where %llu were announced", what,
                         (long long)st.st_size, (unsigned long long)bytes);
    map = mmap(NULL, bytes, protection, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        return error_set(life->cookie, errno == ENOMEM ? KVD_E_NOMEM : KVD_E_INTERNAL,
                         "mapping the %s (%llu bytes): %s", what, (unsigned long long)bytes, strerror(errno));
    *ret = map;
    return 0;
}

static int check_page(struct life *life)
{
    const struct shm_page_header *p = life->page;
    uint64_t bytes = life->page_bytes;

    if (p->magic != SHM_PAGE_MAGIC || p->version != SHM_VERSION || p->flags_incompat != 0)
        return error_set(life->cookie, KVD_E_PROTOCOL, "the worker's page is of another version");
    if (p->header_bytes < sizeof(*p) || p->leases_off % 64 != 0 || p->log_off % 64 != 0 ||
        p->leases_off < p->header_bytes || p->leases_off > bytes || (uint64_t)p->n_leases * 8 > bytes - p->leases_off ||
        p->log_off < p->header_bytes || p->log_off > bytes || (uint64_t)p->n_log * 8 > bytes - p->log_off ||
        p->n_log == 0 || (p->n_log & (p->n_log - 1)) != 0)
        return error_set(life->cookie, KVD_E_PROTOCOL, "the worker's page does not fit its own sizes");
    life->rings = NULL;
    if (p->rings_off != 0) { /* daemons before it had zeros there */
        if (p->rings_off % 64 != 0 || p->rings_off < p->header_bytes || p->rings_off > bytes || p->n_ring < SHM_RING_MIN ||
            p->n_ring > SHM_RING_MAX || (p->n_ring & (p->n_ring - 1)) != 0 || ring_bytes(p->n_ring) > bytes - p->rings_off)
            return error_set(life->cookie, KVD_E_PROTOCOL, "the worker's page does not fit its own rings");
        life->rings = (char *)life->page + p->rings_off;
        life->n_ring = p->n_ring;
    }
    life->leases = (_Atomic uint64_t *)(void *)((char *)life->page + p->leases_off);
    life->log = (_Atomic uint64_t *)(void *)((char *)life->page + p->log_off);
    life->log_mask = p->n_log - 1;
    atomic_store(&life->log_taken, atomic_load(&p->log_head));
    if (lease_stack_init(&life->free_leases, p->n_leases) != 0)
        return error_set(life->cookie, KVD_E_NOMEM, "no memory for %u leases", p->n_leases);
    return 0;
}

static int map_all(struct life *life, struct mux_reply *reply, const Kvd__V1__HelloReply *hello)
{
    void *page;
    int r;

    r = map_sealed(life, "worker's page", reply->fds[0], hello->page_bytes, PROT_READ | PROT_WRITE, &page);
    if (r != 0)
        return r;
    life->page = page;
    life->page_bytes = hello->page_bytes;
    r = map_sealed(life, "index", reply->fds[1], hello->index_bytes, PROT_READ, &life->index_map);
    if (r != 0)
        return r;
    life->index_bytes = hello->index_bytes;
    r = lookup_view_init(life->index_map, life->index_bytes, &life->view);
    if (r != 0)
        return error_set(life->cookie, KVD_E_PROTOCOL,
                         r == -EINVAL ? "the index does not fit its own sizes" : "the index is of another version");
    madvise(life->index_map, life->index_bytes, MADV_HUGEPAGE); /* a wish: fewer TLB misses in a match */
    return check_page(life);
}

static int take_hello(struct life *life, struct mux_reply *reply, bool admin_only)
{
    Kvd__V1__HelloReply *hello = kvd__v1__hello_reply__unpack(NULL, reply->n, reply->body);
    int r = 0;

    if (!hello)
        return error_set(life->cookie, KVD_E_PROTOCOL, "the answer to hello cannot be read");
    if (hello->version != MESSAGES_VERSION)
        r = error_set(life->cookie, KVD_E_PROTOCOL, "the daemon speaks version %u; allowed: %u", hello->version,
                      MESSAGES_VERSION);
    else if (reply->n_fds != (admin_only ? 0 : 2))
        r = error_set(life->cookie, KVD_E_PROTOCOL, "hello was answered with %zu descriptors; allowed: %d",
                      reply->n_fds, admin_only ? 0 : 2);
    life->worker = hello->worker;
    life->epoch = hello->epoch;
    life->admin = hello->admin;
    life->staging_max_bytes = hello->staging_max_bytes;
    life->publish_max_blocks = hello->publish_max_blocks ? hello->publish_max_blocks : 1;
    strncpy(life->tenant, hello->tenant, sizeof(life->tenant) - 1);
    strncpy(life->server, hello->server, sizeof(life->server) - 1);
    if (r == 0 && !admin_only)
        r = map_all(life, reply, hello);
    kvd__v1__hello_reply__free_unpacked(hello, NULL);
    return r;
}

static void unmap_slabs(struct life *life)
{
    for (uint32_t d = 0; d < LIFE_SLAB_DIRS; d++) {
        struct life_slab *dir = atomic_load(&life->slab_dirs[d]);

        for (uint32_t i = 0; dir && i < LIFE_SLABS_PER_DIR; i++)
            if (atomic_load(&dir[i].base))
                munmap((void *)atomic_load(&dir[i].base), atomic_load(&dir[i].bytes));
        free(dir);
        atomic_store(&life->slab_dirs[d], NULL);
    }
}

static void unmap_all(struct life *life)
{
    attend_ring_free(atomic_load(&life->ring));
    atomic_store(&life->ring, NULL);
    unmap_slabs(life);
    lease_stack_deinit(&life->free_leases);
    if (life->index_map)
        munmap(life->index_map, life->index_bytes);
    if (life->page)
        munmap(life->page, life->page_bytes);
    life->index_map = NULL;
    life->page = NULL;
    life->leases = life->log = NULL;
}

int life_start(struct life *life, const struct life_options *o, uint32_t serial)
{
    Kvd__V1__Hello hello = KVD__V1__HELLO__INIT;
    struct mux_reply reply = {0};
    uint8_t body[256];
    int fd = -1, r;

    life->serial = serial;
    life->cookie = o->cookie;
    life->timeout_msec = o->timeout_msec;
    memset(life->tenant, 0, sizeof(life->tenant));
    memset(life->server, 0, sizeof(life->server));
    atomic_store(&life->torn, false);
    atomic_store(&life->retired_reaped, 0);
    r = connect_socket(o, &fd);
    if (r != 0)
        goto fail;
    r = mux_init(&life->mux, fd, o->cookie);
    if (r != 0)
        goto fail_fd;
    hello.version_min = hello.version_max = MESSAGES_VERSION;
    hello.name = (char *)o->name;
    hello.admin_only = o->admin_only;
    r = mux_request(&life->mux, FRAME_HELLO, body, kvd__v1__hello__pack(&hello, body), NULL, 0, o->hello_msec, &reply);
    if (r == 0)
        r = take_hello(life, &reply, o->admin_only);
    mux_reply_clear(&reply);
    if (r != 0)
        goto fail_map;
    pthread_mutex_init(&life->slab_lock, NULL);
    pthread_mutex_init(&life->ring_lock, NULL);
    atomic_store_explicit(&life->refs, 1, memory_order_release); /* from here other threads may take it */
    return 0;
fail_map:
    unmap_all(life);
    mux_deinit(&life->mux);
    atomic_store(&life->torn, true);
    return r;
fail_fd:
    close(fd);
fail:
    atomic_store(&life->torn, true);
    return r;
}

bool life_try_ref(struct life *life)
{
    uint32_t refs = atomic_load_explicit(&life->refs, memory_order_relaxed);

    do {
        if (refs == 0)
            return false;
    } while (!atomic_compare_exchange_weak_explicit(&life->refs, &refs, refs + 1, memory_order_acquire,
                                                    memory_order_relaxed));
    return true;
}

void life_unref(struct life *life)
{
    if (atomic_fetch_sub_explicit(&life->refs, 1, memory_order_acq_rel) != 1)
        return;
    life_abandon(life);
}

void life_abandon(struct life *life)
{
    if (atomic_load(&life->torn))
        return;
    unmap_all(life);
    mux_deinit(&life->mux);
    pthread_mutex_destroy(&life->slab_lock);
    pthread_mutex_destroy(&life->ring_lock);
    atomic_store_explicit(&life->torn, true, memory_order_release);
}

/* ---- Slabs ---- */

static uint32_t retired_slabs(const struct life *life)
{
    /* acquire: pairs with the daemon's increment after a slab has gone and before its number is used again. */
    return atomic_load_explicit(&life->view.header->retired_slabs, memory_order_acquire);
}

/* A consistent, valid copy of a slot, or false. No lock. */
static bool read_slab(const struct life *life, uint32_t number, uintptr_t *ret_base, uint64_t *ret_bytes)
{
    const struct life_slab *dir =
        atomic_load_explicit(&life->slab_dirs[number / LIFE_SLABS_PER_DIR], memory_order_acquire);
    const struct life_slab *s;
    uint32_t seq, seen;

    if (!dir)
        return false;
    s = &dir[number % LIFE_SLABS_PER_DIR];
    seq = atomic_load_explicit(&s->seq, memory_order_acquire);
    *ret_base = atomic_load_explicit(&s->base, memory_order_acquire);
    *ret_bytes = atomic_load_explicit(&s->bytes, memory_order_acquire);
    seen = atomic_load_explicit(&s->retired_seen, memory_order_acquire);
    return (seq & 1) == 0 && atomic_load_explicit(&s->seq, memory_order_relaxed) == seq && *ret_base != 0 &&
           seen == retired_slabs(life);
}

static void write_slab(struct life_slab *s, uintptr_t base, uint64_t bytes, uint32_t retired_seen)
{
    atomic_fetch_add(&s->seq, 1);
    atomic_store(&s->base, base);
    atomic_store(&s->bytes, bytes);
    atomic_store(&s->retired_seen, retired_seen);
    atomic_fetch_add(&s->seq, 1);
}

static void drop_slab(struct life_slab *s)
{
    void *base = (void *)atomic_load(&s->base);
    uint64_t bytes = atomic_load(&s->bytes);

    write_slab(s, 0, 0, 0);
    if (base)
        munmap(base, bytes);
}

/* Asks for a slab and maps it, or finds that the mapping is still the one. By slab_lock. */
static int fetch_slab(struct life *life, uint32_t number, struct life_slab *s)
{
    Kvd__V1__SlabGet get = KVD__V1__SLAB_GET__INIT;
    Kvd__V1__SlabReply *answer = NULL;
    struct mux_reply reply = {0};
    uint32_t retired = retired_slabs(life); /* before the question: what goes later is seen as a change */
    uint8_t body[16];
    struct stat st;
    void *map;
    int r;

    get.slab = number;
    r = mux_request(&life->mux, FRAME_SLAB_GET, body, kvd__v1__slab_get__pack(&get, body), NULL, 0, life->timeout_msec,
                    &reply);
    if (r == KVD_E_NOT_FOUND)
        drop_slab(s);
    if (r != 0)
        return r;
    answer = kvd__v1__slab_reply__unpack(NULL, reply.n, reply.body);
    if (!answer || reply.n_fds != 1 || answer->slab != number || fstat(reply.fds[0], &st) < 0) {
        r = error_set(life->cookie, KVD_E_PROTOCOL, "the answer about slab %u cannot be read", number);
    } else if (atomic_load(&s->base) != 0 && s->inode == (uint64_t)st.st_ino &&
               atomic_load(&s->bytes) == answer->bytes) {
        atomic_store_explicit(&s->retired_seen, retired, memory_order_release);
    } else {
        r = map_sealed(life, "slab", reply.fds[0], answer->bytes, PROT_READ, &map);
        if (r == 0) {
            drop_slab(s);
            s->inode = (uint64_t)st.st_ino;
            write_slab(s, (uintptr_t)map, answer->bytes, retired);
        }
    }
    if (answer)
        kvd__v1__slab_reply__free_unpacked(answer, NULL);
    mux_reply_clear(&reply);
    return r;
}

static int map_slab(struct life *life, uint32_t number, uintptr_t *ret_base, uint64_t *ret_bytes)
{
    _Atomic(struct life_slab *) *dir = &life->slab_dirs[number / LIFE_SLABS_PER_DIR];
    int r = 0;

    pthread_mutex_lock(&life->slab_lock);
    if (!atomic_load(dir)) {
        struct life_slab *fresh = calloc(LIFE_SLABS_PER_DIR, sizeof(*fresh));

        if (!fresh) {
            pthread_mutex_unlock(&life->slab_lock);
            return error_set(life->cookie, KVD_E_NOMEM, "no memory for a table of slabs");
        }
        atomic_store_explicit(dir, fresh, memory_order_release);
    }
    if (!read_slab(life, number, ret_base, ret_bytes)) { /* another thread may have been first */
        r = fetch_slab(life, number, &atomic_load(dir)[number % LIFE_SLABS_PER_DIR]);
        if (r == 0 && !read_slab(life, number, ret_base, ret_bytes)) {
            /* Another slab was retired while we asked. Ours is under lease, so what we mapped is right. */
            struct life_slab *s = &atomic_load(dir)[number % LIFE_SLABS_PER_DIR];

            *ret_base = atomic_load(&s->base);
            *ret_bytes = atomic_load(&s->bytes);
        }
    }
    pthread_mutex_unlock(&life->slab_lock);
    return r;
}

int life_at(struct life *life, uint64_t loc, uint64_t n, const void **ret)
{
    uint32_t number = shm_loc_slab(loc);
    uint64_t off = shm_loc_off(loc), bytes;
    uintptr_t base;

    if (!read_slab(life, number, &base, &bytes)) {
        int r = map_slab(life, number, &base, &bytes);

        if (r == KVD_E_NOT_FOUND)
            return error_set(life->cookie, KVD_E_STALE, "slab %u is gone", number);
        if (r != 0)
            return r;
    }
    if (off > bytes || n > bytes - off)
        return error_set(life->cookie, KVD_E_CORRUPT, "the index names bytes %llu to %llu of slab %u, which has %llu",
                         (unsigned long long)off, (unsigned long long)(off + n), number, (unsigned long long)bytes);
    *ret = (const void *)(base + off);
    return 0;
}

void life_reap_slabs(struct life *life)
{
    uint32_t retired;

    if (!life->page || !life_alive(life))
        return;
    retired = retired_slabs(life);
    if (atomic_load_explicit(&life->retired_reaped, memory_order_relaxed) == retired)
        return;
    pthread_mutex_lock(&life->slab_lock);
    for (uint32_t d = 0; d < LIFE_SLAB_DIRS; d++) {
        struct life_slab *dir = atomic_load(&life->slab_dirs[d]);

        for (uint32_t i = 0; dir && i < LIFE_SLABS_PER_DIR; i++)
            if (atomic_load(&dir[i].base) && atomic_load(&dir[i].retired_seen) != retired)
                fetch_slab(life, d * LIFE_SLABS_PER_DIR + i, &dir[i]);
    }
    atomic_store(&life->retired_reaped, retired);
    pthread_mutex_unlock(&life->slab_lock);
}

/* ---- Hit log ---- */

void life_log_begin(struct life *life, size_t n, uint64_t *ret_at)
{
    *ret_at = atomic_fetch_add_explicit(&life->log_taken, n, memory_order_relaxed);
}

void life_log_end(struct life *life, uint64_t end)
{
    uint64_t head = atomic_load_explicit(&life->page->log_head, memory_order_relaxed);

    /* release: the daemon reads the head with acquire, then the words. Never backwards: a later writer may be done
     * already. */
    while (head < end && !atomic_compare_exchange_weak_explicit(&life->page->log_head, &head, end, memory_order_release,
                                                                memory_order_relaxed))
        ;
}
