/* What bench_publish and bench_load share: a model's K and V of random numbers, the codec's own rate over them, a live daemon, and
 * a Redis server on a Unix socket with a client that allocates nothing.
 *
 * All functions end the program with a message when something fails. One thread. */
#ifndef KVD_BENCH_KV_BED_H
#define KVD_BENCH_KV_BED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "client/libkvd/kvd.h"
#include "kernels/codec/payload.h"
#include "tests/harness.h"

enum { BED_HEADS = 8, BED_DIM = 128, BED_TOKENS = 64, BED_LAYERS_MAX = 16 };
/* fp16 bytes of one block of one layer: 256 KiB. */
#define BED_LAYER_BYTES ((size_t)BED_TOKENS * BED_HEADS * BED_DIM * 2 * 2)

struct kv_bed {
    struct harness h;
    kvd *k;
    uint32_t n_layers, n_blocks; /* blocks that one call publishes or loads */
    size_t block_bytes;          /* fp16 */
    const char *bench;
    kvd_space *space;
    kvd_prefix *prefix;
    struct kvd_layer layers[BED_LAYERS_MAX];
    struct kvd_kv kv[BED_LAYERS_MAX]; /* fp16 [token][head][channel] of n_blocks */
    uint32_t *tokens;
    uint64_t seed;
    /* the codec by itself */
    const struct codec_ops *ops;
    struct payload_layer payload_layers[BED_LAYERS_MAX];
    struct payload_layout *layout;
    uint8_t *raw;     /* n_blocks raw blocks */
    uint8_t *payload; /* n_blocks payloads */
};

/* Starts a daemon and attaches. */
void bed_start(struct kv_bed *b, const char *bench);
void bed_stop(struct kv_bed *b);
/* A space of so many layers, numbers for n_blocks blocks, memory touched. codec NULL: the default ones for all blocks but the first. */
void bed_open(struct kv_bed *b, uint32_t n_layers, uint32_t n_blocks);
void bed_close(struct kv_bed *b);
/* A sequence that nobody has: n_blocks whole blocks after one that is published already (the first of a chain is coded
 * otherwise, and would be compared with another codec). */
void bed_fresh_sequence(struct kv_bed *b);
void bed_match_whole(struct kv_bed *b);
/* Seconds for all n_blocks. */
double bed_codec_encode(struct kv_bed *b);
double bed_codec_decode(struct kv_bed *b);
double bed_publish(struct kv_bed *b);
double bed_load(struct kv_bed *b);

struct redis {
    pid_t pid;
    int fd;
    char socket[100];
};
/* False: there is no redis-server on this machine. */
bool redis_start(struct redis *r, const char *dir);
void redis_stop(struct redis *r);
/* SETs n values of bytes under keys 0 to n - 1 (a key's old value goes, as a full cache's would), all requests before the replies
 * are awaited. Seconds. */
double redis_set(struct redis *r, const void *values, size_t bytes, size_t n);
/* GETs them into values, all requests before the replies. Seconds. */
double redis_get(struct redis *r, void *values, size_t bytes, size_t n);

#endif
