/* Publishing through the daemon: bytes of fp16 a second, from the worker's own arrays to blocks that others can find.
 *
 * Limits, taken in turns with it: the default codec by itself on one core over the same numbers, and Redis on a Unix socket storing
 * the same fp16 bytes (one value a block, requests not awaited one by one). 64 MiB a call. The best of each counts: two processes
 * that work hand in hand on a shared machine are disturbed more than one. */
#include <stdio.h>

#include "bench/bench.h"
#include "bench/kv_bed.h"

enum { REPEATS = 15, CALL_BLOCKS = 256, WARM_UP = 14 };

int main(void)
{
    static const uint32_t n_layers[] = {1, 4, 16};
    struct kv_bed bed;
    struct redis redis;
    bool have_redis;

    bed_start(&bed, "publish");
    have_redis = redis_start(&redis, bed.h.dir);
    for (int s = 0; s < 3; s++) {
        uint32_t n_blocks = CALL_BLOCKS / n_layers[s];
        double own[REPEATS], publish[REPEATS], set[REPEATS], filling[WARM_UP], gb;
        char name[96];

        bed_open(&bed, n_layers[s], n_blocks);
        gb = (double)bed.block_bytes * n_blocks / 1e9;
        for (int i = 0; i < WARM_UP; i++) { /* staging and slabs are made, the tier is full: from here on blocks leave */
            bed_fresh_sequence(&bed);
            filling[i] = gb / bed_publish(&bed);
        }
        for (int i = 0; i < REPEATS; i++) {
            bed_fresh_sequence(&bed);
            own[i] = gb / bed_codec_encode(&bed);
            publish[i] = gb / bed_publish(&bed);
            if (have_redis)
                set[i] = gb / redis_set(&redis, bed.raw, bed.block_bytes, n_blocks);
        }
        snprintf(name, sizeof(name), "blocks of %zu KiB, %u a call", bed.block_bytes / 1024, n_blocks);
        bench_line("publish", name, bench_maximum(publish, REPEATS), "GB/s", bench_maximum(own, REPEATS),
                   "the codec alone, one core; at least 0.8");
        if (s == 0)
            bench_line("publish", "the same into slabs that were never used", bench_maximum(filling + 1, 4), "GB/s",
                       bench_maximum(own, REPEATS), "the codec alone, one core, memory in use");
        if (have_redis) {
            snprintf(name, sizeof(name), "against Redis, blocks of %zu KiB", bed.block_bytes / 1024);
            bench_line("publish", name, bench_maximum(publish, REPEATS), "GB/s", bench_maximum(set, REPEATS),
                       "Redis SET of the fp16 bytes over a Unix socket; above 1");
        }
        bed_close(&bed);
    }
    if (have_redis)
        redis_stop(&redis);
    else
        fprintf(stderr, "bench_publish: no redis-server here (Debian package redis-server): not compared\n");
    bed_stop(&bed);
    return 0;
}
