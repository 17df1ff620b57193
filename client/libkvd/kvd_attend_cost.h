/* What attention costs, as this library has measured it: nanoseconds a byte, for each kind of layer of a space (its heads, sizes
 * and codecs), by the number of query rows and by how much is read. docs/attention.md, "Which form", has the model.
 *
 * Rates are written by any thread that has measured something and read by any other: relaxed, a lost update is no matter.
 *
 * Includes: kvd_attend_impl.h. */
#ifndef KVD_ATTEND_COST_H
#define KVD_ATTEND_COST_H

#include <x86intrin.h>

#include "kvd_attend_impl.h"

enum { ATTEND_ROW_CLASSES = 8, ATTEND_SIZE_CLASSES = 4 };

#define ATTEND_TRIAL_MSEC 100 /* a daemon that takes longer for a few blocks is not to be reckoned with */
#define ATTEND_RETRY_SEC 0.25 /* nor one that has just failed */

typedef _Atomic uint32_t attend_rate; /* a float's bits: nanoseconds a byte; 0: not measured */

struct attend_rates {
    /* Local form: of a packed byte; of a unit (one KV head's rows), whatever it reads; of a call. */
    attend_rate local[ATTEND_ROW_CLASSES][ATTEND_SIZE_CLASSES];
    attend_rate local_unit[ATTEND_ROW_CLASSES];
    attend_rate local_call;
    /* Daemon form: of a packed byte, waiting included; of a call. */
    attend_rate daemon[ATTEND_ROW_CLASSES][ATTEND_SIZE_CLASSES];
    attend_rate daemon_call[ATTEND_ROW_CLASSES];
    /* Loading: of a packed byte by kvd_load(); of a decoded byte by attention over the worker's own pages. */
    attend_rate load;
    attend_rate own[ATTEND_ROW_CLASSES];

    /* Ticks of the last call of each form, and of the last one that the daemon did not answer; 0: none. */
    _Atomic uint64_t local_at, daemon_at, daemon_failed_at;
};

/* Rows of one KV head that are attended to at once: 1, 2, 3 to 4, 5 to 8, … 65 and more. */
static inline uint32_t attend_rows_class(uint32_t n_rows)
{
    uint32_t class = n_rows > 1 ? 32 - (uint32_t)__builtin_clz(n_rows - 1) : 0;

    return class < ATTEND_ROW_CLASSES ? class : ATTEND_ROW_CLASSES - 1;
}

/* Bytes of a layer: what fits an L2 cache, some L3 caches, most, none. */
static inline uint32_t attend_size_class(uint64_t bytes)
{
    return bytes < (UINT64_C(1) << 19) ? 0 : bytes < (UINT64_C(1) << 22) ? 1 : bytes < (UINT64_C(1) << 25) ? 2 : 3;
}

static inline struct attend_rates *attend_rates_of(const struct attend_call *call)
{
    const struct kvd_space *space = call->prefix->space;

    return &space->rates[space->layer_rates[call->a.layer]];
}

/* A clock that is no system call on any machine; in units of session.nsec_per_tick. */
static inline uint64_t attend_ticks(void)
{
    return __rdtsc();
}

/* Notes that n bytes (or calls) took so many ticks, less what the call costs whatever it reads (nanoseconds). */
void attend_cost_note(attend_rate *rate, uint64_t n, uint64_t ticks, const attend_rate *less, double nsec_per_tick);
/* Notes a call of the daemon form; bytes: that it reads. failed: it was not answered. */
void attend_cost_note_daemon(const struct attend_call *call, uint64_t ticks, bool failed);

/* Makes the tables of a space whose layers are filled in. KVD_OK, or KVD_E_NOMEM without a message. */
int attend_rates_create(struct kvd_space *space);

/* The form for one call: local or daemon. Mostly the cheaper one; now and then the other, so that its cost stays known. With how long
 * to wait for the daemon before it is done here after all. */
int attend_cost_choose(const struct attend_call *call, enum kvd_attend_form *ret, uint32_t *ret_timeout_msec);

#endif
