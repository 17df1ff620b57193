/* How far two next-token distributions are apart. */
#ifndef KVD_LLAMA_DIVERGENCE_H
#define KVD_LLAMA_DIVERGENCE_H

#include <stddef.h>
#include <stdint.h>

struct divergence {
    double kl;           /* sum p log(p / q), nats; p is the first */
    double nll_p, nll_q; /* -log of what each gives to the token that really follows */
    int same_top;        /* both hold the same token for the most likely */
};

/* p, q: logits [n][n_vocab], row-major; next[n]: the token that follows; ret[n]. Uses n_threads threads. */
void divergence_rows(const float *p, const float *q, const uint32_t *next, size_t n, size_t n_vocab, int n_threads,
                     struct divergence *ret);

#endif
