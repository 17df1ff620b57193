/* Loading: bytes of fp16 a second, from leased blocks to the worker's own arrays.
 *
 * Limits, taken in turns with it: the default codec by itself on one core over the same numbers, and Redis on a Unix socket returning
 * the same fp16 bytes (one value a block, requests not awaited one by one). 64 MiB a call. The best of each counts: two processes
 * that work hand in hand on a shared machine are disturbed more than one. */
#include <stdio.h>

#include "bench/bench.h"
#include "bench/kv_bed.h"

enum { REPEATS = 15, CALL_BLOCKS = 256 };

int main(void)
{
    static const uint32_t n_layers[] = {1, 4, 16};
    struct kv_bed bed;
    struct redis redis;
    bool have_redis;

    bed_start(&bed, "load");
    have_redis = redis_start(&redis, bed.h.dir);
    for (int s = 0; s < 3; s++) {
        uint32_t n_blocks = CALL_BLOCKS / n_layers[s];
        double own[REPEATS], load[REPEATS], get[REPEATS], gb;
        char name[96];

        bed_open(&bed, n_layers[s], n_blocks);
        gb = (double)bed.block_bytes * n_blocks / 1e9;
        bed_fresh_sequence(&bed);
        bed_publish(&bed);
        bed_match_whole(&bed);
        bed_codec_encode(&bed); /* what the codec alone will decode */
        for (int i = 0; i < REPEATS; i++) {
            own[i] = gb / bed_codec_decode(&bed);
            load[i] = gb / bed_load(&bed);
            if (have_redis) {
                redis_set(&redis, bed.raw, bed.block_bytes, n_blocks);
                get[i] = gb / redis_get(&redis, bed.raw, bed.block_bytes, n_blocks);
            }
        }
        snprintf(name, sizeof(name), "blocks of %zu KiB, %u a call", bed.block_bytes / 1024, n_blocks);
        bench_line("load", name, bench_maximum(load, REPEATS), "GB/s", bench_maximum(own, REPEATS),
                   "the codec alone, one core; at least 0.8");
        if (have_redis) {
            snprintf(name, sizeof(name), "against Redis, blocks of %zu KiB", bed.block_bytes / 1024);
            bench_line("load", name, bench_maximum(load, REPEATS), "GB/s", bench_maximum(get, REPEATS),
                       "Redis GET of the fp16 bytes over a Unix socket; above 1");
        }
        bed_close(&bed);
    }
    if (have_redis)
        redis_stop(&redis);
    else
        fprintf(stderr, "bench_load: no redis-server here (Debian package redis-server): not compared\n");
    bed_stop(&bed);
    return 0;
}
