/* What every bench needs: a clock, a generator, medians, the machine's own limits, and the line that it prints.
 *
 * A bench prints one JSON object a line:
 *
 *   bench     its name                       value     what was measured, in unit
 *   case      what was done                  limit     what it is compared with, in the same unit, measured in the same run
 *   unit      ns, GB/s, ...                  ratio     value / limit
 *   limit_is  what the limit is, and which way the ratio should go
 *
 * Machines are shared and differ: a figure without its limit of the same run says nothing, so there is none.
 * One thread. Includes: the C library only. */
#ifndef KVD_BENCH_BENCH_H
#define KVD_BENCH_BENCH_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static inline uint64_t bench_nsec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

/* splitmix64: any seed will do. */
static inline uint64_t bench_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static inline int bench_compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

/* Sorts samples. */
static inline double bench_median(double *samples, size_t n)
{
    qsort(samples, n, sizeof(*samples), bench_compare);
    return n % 2 ? samples[n / 2] : (samples[n / 2 - 1] + samples[n / 2]) / 2;
}

static inline double bench_minimum(const double *samples, size_t n)
{
    double v = samples[0];

    for (size_t i = 1; i < n; i++)
        v = samples[i] < v ? samples[i] : v;
    return v;
}

static inline double bench_maximum(const double *samples, size_t n)
{
    double v = samples[0];

    for (size_t i = 1; i < n; i++)
        v = samples[i] > v ? samples[i] : v;
    return v;
}

static inline void bench_line(const char *bench, const char *name, double value, const char *unit, double limit,
                              const char *limit_is)
{
    printf("{\"bench\":\"%s\",\"case\":\"%s\",\"value\":%.6g,\"unit\":\"%s\",\"limit\":%.6g,\"ratio\":%.4g,"
           "\"limit_is\":\"%s\"}\n",
           bench, name, value, unit, limit, limit != 0 ? value / limit : 0.0, limit_is);
    fflush(stdout);
}

static inline void *bench_alloc(size_t bytes)
{
    void *p = NULL;

    if (posix_memalign(&p, 4096, bytes ? bytes : 1)) {
        fprintf(stderr, "bench: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

/* Keeps the compiler from dropping what computed v. */
static inline void bench_use(uint64_t v)
{
    __asm__ volatile("" : : "r"(v) : "memory");
}

/* Nanoseconds of one read of a random cache line of the mapping. dependent: each address comes from the line before (latency);
 * else the addresses are known beforehand and as many misses overlap as the core can (what a batch of look-ups may hope for).
 * The lines' contents are not changed and enter the address only through a term that the compiler cannot see is zero. */
static inline double bench_random_lines(const void *map, size_t bytes, size_t n_reads, int dependent, uint64_t seed)
{
    const uint64_t *words = map;
    size_t n_lines = bytes / 64;
    uint64_t state = seed, sum = 0, never = 0, begun;
    uint32_t *at = bench_alloc(n_reads * sizeof(*at));

    for (size_t i = 0; i < n_reads; i++)
        at[i] = (uint32_t)(bench_random(&state) % n_lines);
    __asm__ volatile("" : "+r"(never));
    begun = bench_nsec();
    if (dependent)
        for (size_t i = 0; i < n_reads; i++)
            sum += words[((size_t)at[i] * 8) + (sum & never)];
    else
        for (size_t i = 0; i < n_reads; i++)
            sum += words[(size_t)at[i] * 8];
    bench_use(sum);
    begun = bench_nsec() - begun;
    free(at);
    return (double)begun / (double)n_reads;
}

#endif
