/* What a worker may say after its hello, in any order, to the daemon's own request handlers: a session over a socket pair, frames of
 * any type with any body, now and then a descriptor. The daemon must stay whole: nothing reserved, staged, waited for or listed once the
 * session is gone, and every invariant of its cache holds.
 *
 * The input is a list of | type | n_fds | length u16 | body |; type 255 adds a sound staging and opens a sound space first.
 *
 * Tenants live for RUNS_A_LIFE runs (fuzz_daemon.h), so a finding may need the runs before it: libFuzzer's -seed= and -runs= repeat
 * those. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/request.h"
#include "daemon/walk.h"
#include "proto/kvd.pb-c.h"
#include "tests/fuzz/fuzz_daemon.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { FRAMES_MAX = 64, STAGING_BYTES = 8192, RUNS_A_LIFE = 64 };

static const struct attend_limits limits = {.request_bytes = 4096, .worker_bytes = 8192, .queue_bytes = 8192, .memory_bytes = 65536,
                                            .slice_usec = 100, .n_blocks = 16};

static const char *const settings[][2] = {
    {"host_bytes", "8M"}, {"slab_bytes", "2M"}, {"hugepages", "off"}, {"index_entries", "32"}, {"spaces_max", "4"},
    {"leases", "16"}, {"hit_log", "16"}, {"staging_bytes", "64K"}, {"stagings", "3"}, {"publish_blocks", "8"},
    {"publish_worker_blocks", "16"}, {"log_level", "error"}, {"malformed_max", "64"},
};

/* After a run: nothing is left of the session. */
static void end_session(struct daemon *d, int peer)
{
    uint64_t n_flights, n_waiters;

    close(peer);
    for (struct session *s = d->sessions; s; s = s->next)
        session_close(s, NULL);
    fuzz_daemon_settle(d);
    flights_count(d->flights, &n_flights, &n_waiters);
    if (d->sessions || d->closing || n_flights || n_waiters || d->staging_bytes || d->walks || publishing_blocks(d->publishing))
        abort();
    for (struct tenant *t = d->tenants->first; t; t = t->next) {
        struct cache_stats stats;

        cache_stats(t->cache, &stats);
        if (stats.n_reserved || t->n_sessions || t->spare_coming)
            abort();
        cache_assert_valid(t->cache);
    }
}

/* One frame to the session, if it is still there. */
static void say(struct daemon *d, uint8_t type, const uint8_t *body, size_t n, int fd)
{
    static uint8_t packet[FRAME_MAX]; /* scratch */
    int fds[1] = {fd};

    if (!d->sessions || d->sessions->state == SESSION_CLOSING) {
        if (fd >= 0)
            close(fd);
        return;
    }
    frame_header_pack(packet, type, 1, (uint32_t)n, fd >= 0);
    if (n)
        memcpy(packet + FRAME_HEADER_BYTES, body, n);
    request_take(d->sessions, packet, FRAME_HEADER_BYTES + n, fds, fd >= 0);
}

static void say_message(struct daemon *d, uint8_t type, const ProtobufCMessage *m, int fd)
{
    uint8_t body[512];

    say(d, type, body, protobuf_c_message_pack(m, body), fd);
}

static int staging_fd(void)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    must(fd);
    must(ftruncate(fd, STAGING_BYTES));
    must(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
    return fd;
}

static void prepare(struct daemon *d)
{
    Kvd__V1__StagingAdd add = KVD__V1__STAGING_ADD__INIT;
    Kvd__V1__Space space = KVD__V1__SPACE__INIT;
    Kvd__V1__Group group = KVD__V1__GROUP__INIT, *groups[] = {&group};
    Kvd__V1__Layer layer = KVD__V1__LAYER__INIT, *layers[] = {&layer};

    add.bytes = STAGING_BYTES;
    say_message(d, FRAME_STAGING_ADD, &add.base, staging_fd());
    space.model = (char *)"m";
    space.dtype = (char *)"f16";
    space.block_tokens = 2;
    space.n_group = space.n_layer = 1;
    space.group = groups;
    space.layer = layers;
    layer.n_kv_heads = 1;
    layer.dim_k = layer.dim_v = 16;
    layer.codec_k = layer.codec_v = (char *)"raw";
    say_message(d, FRAME_SPACE_OPEN, &space.base, -1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct daemon *d; /* see above */
    static unsigned n_runs;
    Kvd__V1__Hello hello = KVD__V1__HELLO__INIT;
    int pair[2];

    if (!d)
        d = fuzz_daemon_create(&limits);
    if (n_runs % RUNS_A_LIFE == 0)
        fuzz_daemon_begin_life(d, settings, sizeof(settings) / sizeof(settings[0]));
    d->draining = false;
    must(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair));
    session_accept(d, pair[0]);
    hello.version_min = hello.version_max = 1;
    hello.name = (char *)"fuzz";
    hello.admin_only = size && data[0] == 254;
    if (!size || data[0] != 253) /* 253: no hello */
        say_message(d, FRAME_HELLO, &hello.base, -1);
    for (int i = 0; i < FRAMES_MAX && size >= 4; i++) {
        size_t n = data[2] | (size_t)data[3] << 8;

        if (n > size - 4)
            n = size - 4;
        if (data[0] == 255)
            prepare(d);
        else
            say(d, data[0], data + 4, n, data[1] & 1 ? staging_fd() : -1);
        if (data[1] & 2)
            fuzz_daemon_settle(d);
        if (data[1] & 4) { /* reads what was said to it */
            uint8_t sink[4096];

            while (recv(pair[1], sink, sizeof(sink), 0) > 0) {
            }
        }
        data += 4 + n;
        size -= 4 + n;
    }
    fuzz_daemon_settle(d);
    end_session(d, pair[1]);
    if (++n_runs % RUNS_A_LIFE == 0)
        fuzz_daemon_end_life(d);
    return 0;
}
