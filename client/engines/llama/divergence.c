/* Built with -O3 -ffast-math: the exponentials of 2 x 262,144 logits a token are what it costs. */
#include "divergence.h"

#include <math.h>
#include <pthread.h>

#define THREADS_MAX 64

struct share {
    const float *p, *q;
    const uint32_t *next;
    size_t first, end, n_vocab;
    struct divergence *ret;
};

struct peak {
    float max;
    size_t at;
    double log_sum; /* of exp(x - max) */
};

static struct peak find_peak(const float *x, size_t n)
{
    struct peak peak = {.max = x[0]};
    double sum = 0;

    for (size_t i = 1; i < n; i++)
        peak.max = x[i] > peak.max ? x[i] : peak.max;
    while (x[peak.at] < peak.max)
        peak.at++;
    /* In pieces: a float sum over the whole vocabulary would lose the small terms. */
    for (size_t i = 0; i < n;) {
        size_t end = n - i < 1024 ? n : i + 1024;
        float part = 0;

        for (; i < end; i++)
            part += expf(x[i] - peak.max);
        sum += part;
    }
    peak.log_sum = log(sum);
    return peak;
}

static struct divergence one_row(const float *p, const float *q, uint32_t next, size_t n)
{
    struct peak a = find_peak(p, n), b = find_peak(q, n);
    double shift = (b.max + b.log_sum) - (a.max + a.log_sum), kl = 0;
    float scale = (float)(a.max + a.log_sum);

    for (size_t i = 0; i < n;) {
        size_t end = n - i < 1024 ? n : i + 1024;
        float part = 0;

        for (; i < end; i++)
            part += expf(p[i] - scale) * (p[i] - q[i] + (float)shift);
        kl += part;
    }
    return (struct divergence){
        .kl = kl,
        .nll_p = a.max + a.log_sum - p[next],
        .nll_q = b.max + b.log_sum - q[next],
        .same_top = a.at == b.at,
    };
}

static void *run(void *arg)
{
    const struct share *s = arg;

    for (size_t i = s->first; i < s->end; i++)
        s->ret[i] = one_row(s->p + i * s->n_vocab, s->q + i * s->n_vocab, s->next[i], s->n_vocab);
    return NULL;
}

void divergence_rows(const float *p, const float *q, const uint32_t *next, size_t n, size_t n_vocab, int n_threads,
                     struct divergence *ret)
{
    struct share shares[THREADS_MAX];
    pthread_t threads[THREADS_MAX];
    int n_shares = n_threads < 1 ? 1 : n_threads > THREADS_MAX ? THREADS_MAX : n_threads, n_started = 0;

    for (int i = 0; i < n_shares; i++)
        shares[i] = (struct share){
            p, q, next, n * (size_t)i / (size_t)n_shares, n * (size_t)(i + 1) / (size_t)n_shares, n_vocab, ret};
    while (n_started < n_shares - 1 && pthread_create(&threads[n_started], NULL, run, &shares[n_started]) == 0)
        n_started++;
    /* What has no thread of its own is done here. */
    for (int i = n_started; i < n_shares; i++)
        run(&shares[i]);
    for (int i = 0; i < n_started; i++)
        pthread_join(threads[i], NULL);
}
