/* gRPC: unary calls of a C client (the C core on both sides) against a bare ping-pong over the same kind of socket, in turns, with both
 * ends on one processor and on two. Placement moves either figure several times as much as anything that a program can do, so only
 * rounds of the same placement are compared; each placement is a process of its own, so that all threads of both sides are where they
 * should be.
 *
 *   health   answered by the thread that reads it: what gRPC itself costs
 *   release  of nothing: goes to the loop thread and back
 *   match    of 4 blocks that are there, and their release: two calls */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>

#include "bench/bench.h"
#include "proto/grpc/health/v1/health.pb-c.h"
#include "proto/kvd.pb-c.h"
#include "tests/harness.h"

enum { ROUNDS = 31, TRIPS = 500, BLOCK = 16, BLOCKS = 4, MESSAGE_MAX = 1 << 16 };

static void die(const char *what)
{
    fprintf(stderr, "bench_grpc: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof(set), &set) < 0)
        die("sched_setaffinity");
}

/* The first two processors that this process may use; the same one twice if there is no other. */
static void two_cpus(int ret[2])
{
    cpu_set_t set;
    int n = 0;

    if (sched_getaffinity(0, sizeof(set), &set) < 0)
        die("sched_getaffinity");
    ret[0] = ret[1] = -1;
    for (int i = 0; i < CPU_SETSIZE && n < 2; i++)
        if (CPU_ISSET(i, &set))
            ret[n++] = i;
    if (n < 2)
        ret[1] = ret[0];
}

/* ---- the limit ---- */

enum { PING_BYTES = 64 };

static pid_t start_echo(int *ret_fd)
{
    char packet[PING_BYTES];
    int fds[2];
    pid_t pid;
    ssize_t n;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
        die("socketpair");
    pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(fds[0]);
        while ((n = recv(fds[1], packet, sizeof(packet), 0)) > 0)
            if (send(fds[1], packet, (size_t)n, MSG_NOSIGNAL) != n)
                break;
        _exit(0);
    }
    close(fds[1]);
    *ret_fd = fds[0];
    return pid;
}

static double bare_trips(int fd)
{
    char packet[PING_BYTES] = {0};
    uint64_t begun = bench_nsec();

    for (int i = 0; i < TRIPS; i++)
        if (send(fd, packet, sizeof(packet), MSG_NOSIGNAL) != (ssize_t)sizeof(packet) ||
            recv(fd, packet, sizeof(packet), MSG_WAITALL) != (ssize_t)sizeof(packet))
            die("trip");
    return (double)(bench_nsec() - begun) / TRIPS;
}

/* ---- a client ---- */

struct client {
    grpc_channel *channel;
    grpc_completion_queue *cq;
    uint8_t reply[MESSAGE_MAX];
    size_t n_reply;
};

static void client_open(struct client *c, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        die(path);
    c->channel = grpc_channel_create_from_fd("kvd", fd, credentials, NULL);
    c->cq = grpc_completion_queue_create_for_pluck(NULL);
    grpc_channel_credentials_release(credentials);
}

static void client_close(struct client *c)
{
    grpc_channel_destroy(c->channel);
    grpc_completion_queue_shutdown(c->cq);
    grpc_completion_queue_destroy(c->cq);
}

static void take_reply(struct client *c, grpc_byte_buffer *from)
{
    grpc_byte_buffer_reader reader;
    grpc_slice slice;

    c->n_reply = 0;
    if (!grpc_byte_buffer_reader_init(&reader, from))
        die("reply");
    while (grpc_byte_buffer_reader_next(&reader, &slice)) {
        if (GRPC_SLICE_LENGTH(slice) > sizeof(c->reply) - c->n_reply)
            die("reply");
        memcpy(c->reply + c->n_reply, GRPC_SLICE_START_PTR(slice), GRPC_SLICE_LENGTH(slice));
        c->n_reply += GRPC_SLICE_LENGTH(slice);
        grpc_slice_unref(slice);
    }
    grpc_byte_buffer_reader_destroy(&reader);
}

/* One unary call as a client library makes it: one batch. The reply's bytes are in c afterwards. */
static void call(struct client *c, const char *method, const ProtobufCMessage *message)
{
    size_t n = protobuf_c_message_get_packed_size(message);
    grpc_slice body = grpc_slice_malloc(n), details = grpc_empty_slice();
    grpc_call *call = grpc_channel_create_call(c->channel, NULL, GRPC_PROPAGATE_DEFAULTS, c->cq,
                                               grpc_slice_from_static_string(method), NULL, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    grpc_byte_buffer *request, *reply = NULL;
    grpc_metadata_array initial, trailing;
    grpc_status_code status;
    grpc_event event;
    grpc_op ops[] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA},
        {.op = GRPC_OP_SEND_MESSAGE},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA, .data.recv_initial_metadata.recv_initial_metadata = &initial},
        {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &reply},
        {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
         .data.recv_status_on_client = {.trailing_metadata = &trailing, .status = &status, .status_details = &details}},
    };

    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(body));
    request = grpc_raw_byte_buffer_create(&body, 1);
    ops[1].data.send_message.send_message = request;
    grpc_metadata_array_init(&initial);
    grpc_metadata_array_init(&trailing);
    if (grpc_call_start_batch(call, ops, sizeof(ops) / sizeof(ops[0]), call, NULL) != GRPC_CALL_OK)
        die("batch");
    event = grpc_completion_queue_pluck(c->cq, call, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    if (event.type != GRPC_OP_COMPLETE || status != GRPC_STATUS_OK || !reply) {
        char *text = grpc_slice_to_c_string(details);

        fprintf(stderr, "bench_grpc: %s: %s (%d)\n", method, text, status);
        exit(1);
    }
    take_reply(c, reply);
    grpc_byte_buffer_destroy(reply);
    grpc_byte_buffer_destroy(request);
    grpc_slice_unref(body);
    grpc_slice_unref(details);
    grpc_metadata_array_destroy(&initial);
    grpc_metadata_array_destroy(&trailing);
    grpc_call_unref(call);
}

/* ---- what is called ---- */

struct bed {
    struct client client;
    uint32_t space;
    uint32_t tokens[BLOCK * BLOCKS];
};

static void health_call(struct bed *b)
{
    Grpc__Health__V1__HealthCheckRequest m = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;

    call(&b->client, "/grpc.health.v1.Health/Check", &m.base);
}

static void release_call(struct bed *b)
{
    Kvd__V1__ReleaseRequest m = KVD__V1__RELEASE_REQUEST__INIT;

    call(&b->client, "/kvd.v1.Cache/Release", &m.base);
}

static Kvd__V1__MatchReply *match(struct bed *b, bool keys)
{
    Kvd__V1__MatchRequest m = KVD__V1__MATCH_REQUEST__INIT;
    Kvd__V1__MatchReply *reply;

    m.space = b->space;
    m.n_token = BLOCK * BLOCKS;
    m.token = b->tokens;
    m.keys = keys;
    call(&b->client, "/kvd.v1.Cache/Match", &m.base);
    reply = kvd__v1__match_reply__unpack(NULL, b->client.n_reply, b->client.reply);
    if (!reply)
        die("match");
    return reply;
}

static void match_call(struct bed *b)
{
    Kvd__V1__MatchReply *reply = match(b, false);
    Kvd__V1__ReleaseRequest m = KVD__V1__RELEASE_REQUEST__INIT;

    if (reply->blocks != BLOCKS)
        die("match: not all of it");
    m.prefix = reply->prefix;
    kvd__v1__match_reply__free_unpacked(reply, NULL);
    call(&b->client, "/kvd.v1.Cache/Release", &m.base);
}

/* A space, and blocks of zeros in it. */
static void publish(struct bed *b)
{
    Kvd__V1__Layer layer = KVD__V1__LAYER__INIT, *layers[] = {&layer};
    Kvd__V1__Group group = KVD__V1__GROUP__INIT, *groups[] = {&group};
    Kvd__V1__Space space = KVD__V1__SPACE__INIT;
    Kvd__V1__Publish what = KVD__V1__PUBLISH__INIT;
    Kvd__V1__PublishBlock blocks[BLOCKS], *list[BLOCKS];
    Kvd__V1__PublishRequest m = KVD__V1__PUBLISH_REQUEST__INIT;
    Kvd__V1__SpaceReply *opened;
    Kvd__V1__MatchReply *keys;
    size_t bytes = BLOCK * 64 * 2 * sizeof(uint16_t);

    layer.n_kv_heads = 1;
    layer.dim_k = layer.dim_v = 64;
    space.model = (char *)"bench";
    space.dtype = what.dtype = (char *)"f16";
    space.block_tokens = BLOCK;
    space.n_group = space.n_layer = 1;
    space.group = groups;
    space.layer = layers;
    call(&b->client, "/kvd.v1.Cache/OpenSpace", &space.base);
    opened = kvd__v1__space_reply__unpack(NULL, b->client.n_reply, b->client.reply);
    if (!opened)
        die("space");
    b->space = what.space = opened->space;
    keys = match(b, true);
    for (uint32_t i = 0; i < BLOCKS; i++) {
        kvd__v1__publish_block__init(&blocks[i]);
        blocks[i].parent = i ? keys->key[i - 1] : opened->fingerprint;
        blocks[i].n_token = BLOCK;
        blocks[i].token = b->tokens + (size_t)i * BLOCK;
        blocks[i].offset = i * bytes;
        list[i] = &blocks[i];
    }
    what.n_block = BLOCKS;
    what.block = list;
    m.publish = &what;
    m.data = (ProtobufCBinaryData){.len = BLOCKS * bytes, .data = calloc(BLOCKS, bytes)};
    call(&b->client, "/kvd.v1.Cache/Publish", &m.base);
    free(m.data.data);
    kvd__v1__match_reply__free_unpacked(keys, NULL);
    kvd__v1__space_reply__free_unpacked(opened, NULL);
}

static double grpc_trips(struct bed *b, void (*one)(struct bed *b))
{
    uint64_t begun = bench_nsec();

    for (int i = 0; i < TRIPS; i++)
        one(b);
    return (double)(bench_nsec() - begun) / TRIPS;
}

static void compare(struct bed *b, int echo_fd, const char *what, const char *placement, void (*one)(struct bed *b), int calls)
{
    double grpc[ROUNDS], bare[ROUNDS];
    char name[80], limit[120];

    grpc_trips(b, one);
    bare_trips(echo_fd);
    for (int i = 0; i < ROUNDS; i++) {
        bare[i] = bare_trips(echo_fd) * calls;
        grpc[i] = grpc_trips(b, one);
    }
    snprintf(name, sizeof(name), "%s, %s", what, placement);
    snprintf(limit, sizeof(limit), "%d bare STREAM ping-pong%s of 64 bytes at the same placement; ratio at most 4", calls,
             calls > 1 ? "s" : "");
    bench_line("grpc", name, bench_median(grpc, ROUNDS) / 1000, "us", bench_median(bare, ROUNDS) / 1000, limit);
}

/* All of it with the client here and the daemon there. */
static void place(const char *placement, int here, int there)
{
    static struct bed b;
    struct harness h;
    char option[160], path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    int echo_fd;
    pid_t echo;

    pin(there); /* what is started inherits it */
    harness_init(&h);
    snprintf(path, sizeof(path), "%.90s.grpc", h.socket);
    snprintf(option, sizeof(option), "grpc_socket = %s", path);
    harness_option(&h, option);
    harness_start(&h);
    echo = start_echo(&echo_fd);
    pin(here);
    grpc_init();
    client_open(&b.client, path);
    for (uint32_t i = 0; i < BLOCK * BLOCKS; i++)
        b.tokens[i] = i;
    publish(&b);
    compare(&b, echo_fd, "health", placement, health_call, 1);
    compare(&b, echo_fd, "release", placement, release_call, 1);
    compare(&b, echo_fd, "match and release", placement, match_call, 2);
    client_close(&b.client);
    grpc_shutdown();
    close(echo_fd);
    waitpid(echo, NULL, 0);
    if (harness_stop(&h) != 0)
        die("the daemon's end");
    harness_deinit(&h);
}

static void in_a_process(const char *placement, int here, int there)
{
    int status;
    pid_t pid;

    fflush(stdout);
    pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        place(placement, here, there);
        exit(0);
    }
    if (waitpid(pid, &status, 0) < 0 || status != 0)
        exit(1);
}

int main(void)
{
    int cpus[2];

    two_cpus(cpus);
    in_a_process("one processor", cpus[0], cpus[0]);
    if (cpus[1] != cpus[0])
        in_a_process("two processors", cpus[0], cpus[1]);
    return 0;
}
