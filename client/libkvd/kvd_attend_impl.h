/* What both forms of attention share: the checks, and the queries as rows of fp32.
 *
 * Rows: those of one KV head are stacked, row t * ratio + g is query head kv * ratio + g of query token t. The rows of KV head
 * kv begin at row kv * n_rows. The same order for queries, outputs and log-sum-exps, here and in the daemon's rings.
 *
 * Includes: kvd_impl.h. */
#ifndef KVD_ATTEND_IMPL_H
#define KVD_ATTEND_IMPL_H

#include "kvd_impl.h"

/* Bounds of one call: what a worker could mean, and what the sizes below fit into. */
enum { ATTEND_HEADS_MAX = 4096 };
#define ATTEND_NUMBERS_MAX (UINT32_C(1) << 26) /* of the queries, and of the output: 256 MiB of fp32 each */

/* An attention that has passed the checks. */
struct attend_call {
    struct kvd_prefix *prefix;
    struct kvd_attention a; /* as given; strides, window and dim_o are filled in */
    uint32_t group, part;   /* of the layer; its part of a payload of that group */
    uint32_t n_kv_heads, ratio, dim_k;
    uint32_t n_rows;         /* of one KV head: a.n_tokens * ratio */
    uint32_t pos_lo, pos_hi; /* of the queries */
};

/* Everything but whether queries are finite (attend_gather()). Makes no system call. Errors: those of kvd_attend(). */
int attend_check(struct kvd_prefix *prefix, const struct kvd_attention *attention, struct attend_call *ret);

static inline uint32_t attend_position(const struct attend_call *call, uint32_t token)
{
    return call->a.positions ? call->a.positions[token] : call->a.first_position + token;
}

/* A query sees a token of this block of the sequence. Exact. */
bool attend_needs(const struct attend_call *call, size_t block);

/* Queries to rows [n_kv_heads][n_rows][dim_k], and the positions of one KV head's rows to pos [n_rows] (may be NULL).
 * KVD_E_ARG: a query that is not finite. */
int attend_gather(const struct attend_call *call, float *rows, uint32_t *pos);

/* n rows of KV head kv from row0 on, o [n][dim_o] and lse [n], to where the caller wants them. */
void attend_scatter(const struct attend_call *call, uint32_t kv, uint32_t row0, uint32_t n, const float *o, const float *lse);

/* Submits and collects, with no notes taken. grace_msec: for the daemon to say itself that the timeout is over. Errors: those of
 * kvd_attend(). */
int attend_daemon(struct kvd_prefix *prefix, const struct kvd_attention *attention, uint32_t timeout_msec,
                  uint32_t grace_msec);

#endif
