#include "daemon/rpc_batch.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "daemon/attend.h"
#include "daemon/rpc-internal.h"
#include "daemon/tenants.h"
#include "proto/ring.h"

struct rpc_batch {
    uint32_t n_refs;
    struct attend_ring *ring;  /* NULL: closed */
    struct ring_view view;
    void *rings;
    uint32_t tail, head;       /* submissions written, completions read */
    uint64_t last_ticket;
    uint32_t memory;           /* its number */
    uint8_t *map;
    uint64_t bytes;
    struct rpc_region *regions; /* taken, by off */
    int tell_fd;
    sd_event_source *source;
};

static struct rpc_batch *unref(struct rpc_batch *b)
{
    if (--b->n_refs > 0)
        return NULL;
    if (b->map)
        munmap(b->map, b->bytes);
    free(b->rings);
    free(b);
    return NULL;
}

/* ---- completions ---- */

static struct rpc_region *find(const struct rpc_batch *b, uint64_t ticket)
{
    struct rpc_region *r = b->regions;

    while (r && !(r->submitted && r->ticket == ticket))
        r = r->next;
    return r;
}

static int on_told(sd_event_source *source, int fd, uint32_t events, void *ctx)
{
    struct rpc_batch *b = ctx;
    uint64_t n;

    (void)source;
    (void)events;
    if (read(fd, &n, sizeof(n)) < 0 && errno != EAGAIN)
        return -errno;
    while (ring_unread(&b->view, atomic_load_explicit(&b->view.words->done_tail, memory_order_acquire))) {
        struct shm_completion c = b->view.completions[b->head % b->view.n];
        struct rpc_region *region = find(b, c.ticket);

        atomic_store_explicit(&b->view.words->done_head, ++b->head, memory_order_release);
        region->submitted = false;
        region->done(region, &c);
    }
    return 0;
}

/* ---- life ---- */

static int make_memory(struct rpc_batch *b)
{
    int fd = memfd_create("kvd-grpc-attend", MFD_CLOEXEC | MFD_ALLOW_SEALING), r = fd < 0 ? -errno : 0;
    const char *reason;
    void *map;

    if (r == 0 && (ftruncate(fd, (off_t)b->bytes) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0))
        r = -errno;
    if (r == 0) {
        map = mmap(NULL, b->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED)
            r = -errno;
        else
            b->map = map;
    }
    if (r == 0)
        r = attend_ring_add(b->ring, fd, b->bytes, &b->memory, &reason);
    if (fd >= 0)
        close(fd);
    return r;
}

static int make_ring(struct rpc_batch *b, struct session *s)
{
    struct tenant *t = s->tenant;
    uint32_t n = SHM_RING_MIN;
    int r = 0;

    while (n < 2 * s->daemon->options.grpc_connection_calls && n < SHM_RING_MAX)
        n *= 2;
    if (posix_memalign(&b->rings, 64, ring_bytes(n)) != 0) {
        b->rings = NULL;
        return -ENOMEM;
    }
    memset(b->rings, 0, ring_bytes(n));
    ring_view_init(&b->view, b->rings, n);
    if (!t->attend)
        r = attend_tenant_create(s->daemon->attend, t->cache, &t->attend);
    if (r == 0)
        r = attend_ring_open(s->daemon->attend, t->attend, b->rings, n, &b->ring);
    return r;
}

int rpc_batch_create(struct rpc_conn *conn, struct rpc_batch **ret)
{
    struct session *s = conn->session;
    struct daemon *d = s->daemon;
    struct rpc_batch *b = calloc(1, sizeof(*b));
    int r;

    if (!b)
        return -ENOMEM;
    *b = (struct rpc_batch){.n_refs = 1, .bytes = (UINT64_C(8) * conn->rpc->message_bytes + 4095) / 4096 * 4096, .tell_fd = -1};
    if (b->bytes > d->options.attend_bytes / 4096 * 4096)
        b->bytes = d->options.attend_bytes / 4096 * 4096;
    r = make_ring(b, s);
    if (r == 0)
        r = make_memory(b);
    if (r == 0) {
        b->tell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        r = b->tell_fd < 0 ? -errno : sd_event_add_io(d->event, &b->source, b->tell_fd, EPOLLIN, on_told, b);
    }
    if (r < 0) {
        rpc_batch_close(b);
        return r;
    }
    attend_ring_tell(b->ring, b->tell_fd);
    *ret = b;
    return 0;
}

struct rpc_batch *rpc_batch_close(struct rpc_batch *b)
{
    struct rpc_region *next;

    if (!b)
        return NULL;
    b->ring = attend_ring_close(b->ring);
    sd_event_source_disable_unref(b->source);
    if (b->tell_fd >= 0)
        close(b->tell_fd);
    for (struct rpc_region *r = b->regions; r; r = next) {
        next = r->next; /* done() may give it back */
        if (r->submitted) {
            r->submitted = false;
            r->done(r, NULL);
        }
    }
    return unref(b);
}

/* ---- regions ---- */

bool rpc_region_take(struct rpc_batch *b, uint64_t bytes, struct rpc_region *region)
{
    struct rpc_region **at = &b->regions;
    uint64_t off = 0;

    for (; *at && (*at)->off - off < bytes; at = &(*at)->next) /* first fit */
        off = (*at)->off + (*at)->bytes;
    if (!*at && (off > b->bytes || bytes > b->bytes - off))
        return false;
    *region = (struct rpc_region){.next = *at, .batch = b, .off = off, .bytes = bytes, .done = region->done};
    *at = region;
    b->n_refs++;
    return true;
}

void *rpc_region_at(const struct rpc_region *region)
{
    return region->batch->map + region->off;
}

void rpc_region_give(struct rpc_region *region)
{
    struct rpc_batch *b = region->batch;
    struct rpc_region **at = b ? &b->regions : NULL;

    if (!b)
        return;
    while (*at != region)
        at = &(*at)->next;
    *at = region->next;
    region->batch = NULL;
    unref(b);
}

bool rpc_region_submit(struct rpc_region *region)
{
    struct rpc_batch *b = region->batch;
    uint64_t one = 1;

    if (!b->ring || !ring_room(&b->view, b->tail))
        return false;
    region->ticket = ++b->last_ticket;
    region->submitted = true;
    b->view.submissions[b->tail % b->view.n] =
        (struct shm_submission){.ticket = region->ticket, .off = region->off, .bytes = region->bytes, .memory = b->memory};
    atomic_store_explicit(&b->view.words->submit_tail, ++b->tail, memory_order_release);
    if (write(attend_ring_bell(b->ring), &one, sizeof(one)) < 0 && errno != EAGAIN)
        abort(); /* an eventfd of ours cannot refuse */
    return true;
}
