/* What a worker may say after its hello, in any order, to the daemon's own request handlers: a session over a socket pair, frames of
 * any type with any body, now and then a descriptor. The daemon must stay whole: nothing reserved, staged, waited for or listed once the
 * session is gone, and every invariant of its cache holds.
 *
 * The input is a list of | type | n_fds | length u16 | body |; type 255 adds a sound staging and opens a sound space first.
 *
 * Loop and helper thread outlive a run (a thread and an epoll set take longer to make than all that a run does); tenants, their
 * caches, and options live for RUNS_A_LIFE runs, since making their memory takes ten times as long as what a run does with it. So a
 * finding may need the runs before it: libFuzzer's -seed= and -runs= repeat those. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/attend.h"
#include "daemon/daemon.h"
#include "daemon/flight_requests.h"
#include "daemon/publish.h"
#include "daemon/request.h"
#include "daemon/session.h"
#include "daemon/tenants.h"
#include "daemon/walk.h"
#include "proto/kvd.pb-c.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { FRAMES_MAX = 64, STAGING_BYTES = 8192, RUNS_A_LIFE = 64 };

static void must(int r)
{
    if (r < 0)
        abort();
}

static int on_timer(sd_event_source *source, uint64_t usec, void *ctx)
{
    struct daemon *d = ctx;

    (void)source;
    (void)usec;
    d->timer_usec = UINT64_MAX;
    flights_expire(d->flights, daemon_now_usec());
    sessions_expire(d, daemon_now_usec());
    return 0;
}

static void make_attend(struct daemon *d)
{
    const struct attend_config config = {
        .n_threads = 1,
        .n_cpus = 1,
        .n_words = 64,
        .ops = attn_ops_choose(&d->cpu),
        .codec = d->codec,
        .limits = {.request_bytes = 4096, .worker_bytes = 8192, .queue_bytes = 8192, .memory_bytes = 65536, .slice_usec = 100,
                   .n_blocks = 16},
    };

    must(attend_create(&config, &d->attend));
}

static struct daemon *make_daemon(void)
{
    struct daemon *d = calloc(1, sizeof(*d));

    if (!d)
        abort();
    d->timer_usec = UINT64_MAX;
    log_init(&d->log, open("/dev/null", O_WRONLY | O_CLOEXEC), LOG_ERROR, daemon_now_usec);
    cpu_detect(&d->cpu);
    d->codec = codec_ops_choose(&d->cpu);
    d->crc32c = crc32c_choose(&d->cpu);
    must(sd_event_default(&d->event));
    must(sd_event_add_time(d->event, &d->timer, CLOCK_MONOTONIC, 0, 1000, on_timer, d));
    must(sd_event_source_set_enabled(d->timer, SD_EVENT_OFF));
    must(sd_event_add_defer(d->event, &d->reaper, sessions_reap, d));
    must(sd_event_source_set_enabled(d->reaper, SD_EVENT_OFF));
    must(wire_init(&d->wire));
    must(key_hasher_create(&d->hasher));
    must(publishing_create(&d->publishing));
    must(flights_create(64, 32, 16, flight_request_told, d, &d->flights));
    must(jobs_create(d->event, 1, &d->jobs));
    make_attend(d);
    return d;
}

static const char *const settings[][2] = {
    {"host_bytes", "8M"}, {"slab_bytes", "2M"}, {"hugepages", "off"}, {"index_entries", "32"}, {"spaces_max", "4"},
    {"leases", "16"}, {"hit_log", "16"}, {"staging_bytes", "64K"}, {"stagings", "3"}, {"publish_blocks", "8"},
    {"publish_worker_blocks", "16"}, {"log_level", "error"}, {"malformed_max", "64"},
};

static void begin(struct daemon *d)
{
    struct option_error error;

    must(options_init(&d->options));
    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++)
        must(option_set(&d->options, option_find(settings[i][0]), settings[i][1], &id_resolver_system, &error));
    d->budget = (struct budget){.limit_bytes = d->options.host_bytes, .hugepages = SLAB_HUGE_OFF};
    must(tenants_apply(d));
}

/* A slab is being made ahead of need: its job may have left the queue and not be back. */
static bool spare_coming(const struct daemon *d)
{
    for (const struct tenant *t = d->tenants->first; t; t = t->next)
        if (t->spare_coming)
            return true;
    return false;
}

/* Until nothing is under way. */
static void settle(struct daemon *d)
{
    for (int i = 0; i < 10000; i++) {
        bool busy = publishing_blocks(d->publishing) || d->n_walks || jobs_waiting(d->jobs) || spare_coming(d);

        if (sd_event_run(d->event, busy ? 1000 : 0) == 0 && !busy)
            return;
    }
    abort(); /* something goes on for ever */
}

/* After a run: nothing is left of the session. */
static void end_session(struct daemon *d, int peer)
{
    uint64_t n_flights, n_waiters;

    close(peer);
    for (struct session *s = d->sessions; s; s = s->next)
        session_close(s, NULL);
    settle(d);
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

static void end_life(struct daemon *d)
{
    tenants_destroy(d);
    if (d->budget.used_bytes)
        abort();
    options_deinit(&d->options);
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
        d = make_daemon();
    if (n_runs % RUNS_A_LIFE == 0)
        begin(d);
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
            settle(d);
        if (data[1] & 4) { /* reads what was said to it */
            uint8_t sink[4096];

            while (recv(pair[1], sink, sizeof(sink), 0) > 0) {
            }
        }
        data += 4 + n;
        size -= 4 + n;
    }
    settle(d);
    end_session(d, pair[1]);
    if (++n_runs % RUNS_A_LIFE == 0)
        end_life(d);
    return 0;
}
