#include "bench/kv_bed.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/bench.h"
#include "kernels/cpu.h"

static const struct kvd_group group = {0};

static void check(const struct kv_bed *b, int r, const char *what)
{
    if (r) {
        fprintf(stderr, "bench_%s: %s: %d %s\n", b->bench, what, r, b->k ? kvd_message(b->k) : "");
        exit(1);
    }
}

void bed_start(struct kv_bed *b, const char *bench)
{
    struct kvd_options options = KVD_OPTIONS_INIT;

    memset(b, 0, sizeof(*b));
    b->bench = bench;
    b->seed = 1;
    harness_init(&b->h);
    harness_option(&b->h, "host_bytes = 192M");
    harness_option(&b->h, "slab_bytes = 32M");
    harness_start(&b->h);
    options.socket_path = b->h.socket;
    options.name = bench;
    check(b, kvd_attach(&options, &b->k), "kvd_attach");
}

void bed_stop(struct kv_bed *b)
{
    b->k = kvd_detach(b->k);
    harness_stop(&b->h);
    harness_deinit(&b->h);
}

/* Numbers that look like K and V: a sum of uniform ones, about normal, of size 1. */
static uint16_t some_fp16(uint64_t *seed)
{
    uint64_t w = bench_random(seed);
    int sum = (int)(w & 0xff) + (int)(w >> 8 & 0xff) + (int)(w >> 16 & 0xff) + (int)(w >> 24 & 0xff) - 510;
    _Float16 x = (_Float16)((float)sum / 148.0f);
    uint16_t bits;

    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static void open_codec(struct kv_bed *b)
{
    struct cpu_features cpu;
    const char *why = "";

    cpu_detect(&cpu);
    b->ops = codec_ops_choose(&cpu);
    for (uint32_t l = 0; l < b->n_layers; l++) {
        b->payload_layers[l] = (struct payload_layer){.n_kv_heads = BED_HEADS, .dim_k = BED_DIM, .dim_v = BED_DIM};
        check(b, payload_layer_codecs(&b->payload_layers[l], CODEC_F16, NULL, NULL, NULL, NULL, &why), "codecs");
    }
    check(b, payload_layout_create(b->payload_layers, b->n_layers, 0, false, BED_TOKENS, &b->layout, &why), "layout");
    if (b->layout->raw_bytes[CODEC_F16] != b->block_bytes)
        check(b, -EINVAL, "raw block's size");
    b->raw = bench_alloc(b->block_bytes * b->n_blocks);
    b->payload = bench_alloc(b->layout->bytes * b->n_blocks);
    memset(b->payload, 0, b->layout->bytes * b->n_blocks);
    for (size_t i = 0; i < b->block_bytes * b->n_blocks / 2; i++)
        ((uint16_t *)b->raw)[i] = some_fp16(&b->seed);
}

void bed_open(struct kv_bed *b, uint32_t n_layers, uint32_t n_blocks)
{
    struct kvd_space_desc desc = KVD_SPACE_INIT;
    char model[64];

    b->n_layers = n_layers;
    b->n_blocks = n_blocks;
    b->block_bytes = BED_LAYER_BYTES * n_layers;
    snprintf(model, sizeof(model), "bench-%u", n_layers);
    desc.model = model;
    desc.block_tokens = BED_TOKENS;
    desc.groups = &group;
    desc.n_groups = 1;
    desc.layers = b->layers;
    desc.n_layers = n_layers;
    for (uint32_t l = 0; l < n_layers; l++) {
        size_t row = BED_HEADS * BED_DIM * 2, bytes = row * BED_TOKENS * n_blocks;

        b->layers[l] = (struct kvd_layer){.n_kv_heads = BED_HEADS, .dim_k = BED_DIM, .dim_v = BED_DIM};
        b->kv[l] = (struct kvd_kv){bench_alloc(bytes), bench_alloc(bytes), row, BED_DIM * 2, row, BED_DIM * 2};
        for (size_t i = 0; i < bytes / 2; i++) {
            ((uint16_t *)b->kv[l].k)[i] = some_fp16(&b->seed);
            ((uint16_t *)b->kv[l].v)[i] = some_fp16(&b->seed);
        }
    }
    check(b, kvd_space_open(b->k, &desc, &b->space), "kvd_space_open");
    check(b, kvd_prefix_create(b->space, n_blocks + 1, &b->prefix), "kvd_prefix_create");
    b->tokens = bench_alloc((n_blocks + 1) * BED_TOKENS * sizeof(*b->tokens));
    open_codec(b);
}

void bed_close(struct kv_bed *b)
{
    b->prefix = kvd_prefix_destroy(b->prefix);
    b->space = kvd_space_close(b->space);
    for (uint32_t l = 0; l < b->n_layers; l++) {
        free(b->kv[l].k);
        free(b->kv[l].v);
    }
    free(b->tokens);
    free(b->raw);
    free(b->payload);
    b->layout = payload_layout_destroy(b->layout);
}

void bed_fresh_sequence(struct kv_bed *b)
{
    size_t n = (b->n_blocks + 1) * BED_TOKENS, got;

    for (size_t i = 0; i < n; i++)
        b->tokens[i] = i < BED_TOKENS ? (uint32_t)i : (uint32_t)(bench_random(&b->seed) % 100000);
    check(b, kvd_match(b->prefix, b->tokens, n, NULL, 0, &got), "kvd_match");
    if (got == 0) {
        check(b, kvd_publish(b->prefix, b->tokens, n, 0, 1, 0, KVD_F16, b->kv, NULL), "kvd_publish");
        check(b, kvd_match(b->prefix, b->tokens, n, NULL, 0, &got), "kvd_match");
    }
    if (got != BED_TOKENS)
        check(b, KVD_E_INTERNAL, "a fresh sequence is there already");
}

void bed_match_whole(struct kv_bed *b)
{
    size_t n = (b->n_blocks + 1) * BED_TOKENS, got;

    check(b, kvd_match(b->prefix, b->tokens, n, NULL, 0, &got), "kvd_match");
    if (got != n)
        check(b, KVD_E_INTERNAL, "what was published is not there");
}

static double seconds_since(uint64_t begun)
{
    return (double)(bench_nsec() - begun) / 1e9;
}

double bed_codec_encode(struct kv_bed *b)
{
    uint64_t begun = bench_nsec();

    for (uint32_t i = 0; i < b->n_blocks; i++)
        check(b, payload_encode(b->layout, b->ops, CODEC_F16, b->raw + i * b->block_bytes, 0, b->layout->n_parts,
                                b->payload + i * b->layout->bytes, NULL), "payload_encode");
    return seconds_since(begun);
}

double bed_codec_decode(struct kv_bed *b)
{
    uint64_t begun = bench_nsec();

    for (uint32_t i = 0; i < b->n_blocks; i++)
        for (uint32_t l = 0; l < b->n_layers; l++) {
            const struct kvd_kv *kv = &b->kv[l];
            struct payload_dst dst = {(char *)kv->k + i * BED_TOKENS * kv->k_token_stride,
                                      (char *)kv->v + i * BED_TOKENS * kv->v_token_stride,
                                      kv->k_token_stride, kv->k_head_stride, kv->v_token_stride, kv->v_head_stride};

            check(b, payload_decode(b->layout, b->ops, l, b->payload + i * b->layout->bytes, 0, BED_TOKENS, CODEC_F16, &dst),
                  "payload_decode");
        }
    return seconds_since(begun);
}

double bed_publish(struct kv_bed *b)
{
    uint64_t begun = bench_nsec();

    check(b, kvd_publish(b->prefix, b->tokens, (b->n_blocks + 1) * BED_TOKENS, 1, b->n_blocks, 0, KVD_F16, b->kv, NULL),
          "kvd_publish");
    return seconds_since(begun);
}

double bed_load(struct kv_bed *b)
{
    uint64_t begun = bench_nsec();

    check(b, kvd_load(b->prefix, 1, b->n_blocks, KVD_F16, b->kv, 0), "kvd_load");
    return seconds_since(begun);
}

/* ---- Redis ---- */

static int redis_connect(const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof(a)) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

bool redis_start(struct redis *r, const char *dir)
{
    memset(r, 0, sizeof(*r));
    if (system("command -v redis-server >/dev/null 2>&1") != 0)
        return false;
    snprintf(r->socket, sizeof(r->socket), "%s/redis.sock", dir);
    r->pid = test_fork();
    if (r->pid == 0) {
        if (!freopen("/dev/null", "w", stdout))
            _exit(126);
        execlp("redis-server", "redis-server", "--port", "0", "--unixsocket", r->socket, "--save", "", "--appendonly", "no",
               "--dir", dir, (char *)NULL);
        _exit(127);
    }
    for (int i = 0; i < 500; i++) {
        r->fd = redis_connect(r->socket);
        if (r->fd >= 0)
            return true;
        test_sleep_usec(10000);
    }
    fprintf(stderr, "redis-server does not answer\n");
    exit(1);
}

void redis_stop(struct redis *r)
{
    close(r->fd);
    kill(r->pid, SIGKILL);
    waitpid(r->pid, NULL, 0);
}

static void failed(const char *what)
{
    fprintf(stderr, "redis: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void send_all(int fd, const char *head, size_t n_head, const void *value, size_t n_value)
{
    struct iovec iov[3] = {{(void *)head, n_head}, {(void *)value, n_value}, {(void *)"\r\n", value ? 2 : 0}};

    for (size_t at = 0; at < 3;) {
        ssize_t n = writev(fd, iov + at, (int)(3 - at));

        if (n < 0)
            failed("writev");
        for (; at < 3 && (size_t)n >= iov[at].iov_len; at++)
            n -= (ssize_t)iov[at].iov_len;
        if (at < 3) {
            iov[at].iov_base = (char *)iov[at].iov_base + n;
            iov[at].iov_len -= (size_t)n;
        }
    }
}

static void receive_all(int fd, void *to, size_t n)
{
    for (size_t got = 0; got < n;) {
        ssize_t r = read(fd, (char *)to + got, n - got);

        if (r <= 0)
            failed("read");
        got += (size_t)r;
    }
}

double redis_set(struct redis *r, const void *values, size_t bytes, size_t n)
{
    uint64_t begun = bench_nsec();
    char head[128], reply[5];

    for (size_t i = 0; i < n; i++) {
        int m = snprintf(head, sizeof(head), "*3\r\n$3\r\nSET\r\n$16\r\n%016zx\r\n$%zu\r\n", i, bytes);

        send_all(r->fd, head, (size_t)m, (const char *)values + i * bytes, bytes);
    }
    for (size_t i = 0; i < n; i++) {
        receive_all(r->fd, reply, 5);
        if (memcmp(reply, "+OK\r\n", 5) != 0)
            failed("SET");
    }
    return seconds_since(begun);
}

double redis_get(struct redis *r, void *values, size_t bytes, size_t n)
{
    uint64_t begun = bench_nsec();
    char head[128];

    for (size_t i = 0; i < n; i++) {
        int m = snprintf(head, sizeof(head), "*2\r\n$3\r\nGET\r\n$16\r\n%016zx\r\n", i);

        send_all(r->fd, head, (size_t)m, NULL, 0);
    }
    for (size_t i = 0; i < n; i++) {
        int m = snprintf(head, sizeof(head), "$%zu\r\n", bytes);
        char got[32];

        receive_all(r->fd, got, (size_t)m);
        if (memcmp(got, head, (size_t)m) != 0)
            failed("GET");
        receive_all(r->fd, (char *)values + i * bytes, bytes);
        receive_all(r->fd, got, 2);
    }
    return seconds_since(begun);
}
