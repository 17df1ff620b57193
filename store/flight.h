/* Flights: keys that a worker has said it is computing, so that no prefix is computed twice at once.
 *
 *   begin by W1 ------> IN FLIGHT (owner W1, waiters …) --landed (published by anyone)--> gone, waiters told "landed"
 *                            |---- end by W1, or W1 ends ----------------------------> gone, waiters told "given up"
 *                            |---- a waiter's deadline -------------------------------> that waiter told "timed out"
 *
 * Loop thread only. Bounded: flights_max in all, per worker, and waiters in all. Includes: proto/key.h. */
#ifndef KVD_STORE_FLIGHT_H
#define KVD_STORE_FLIGHT_H

#include <stdint.h>

#include "proto/key.h"

struct flights;
struct flight_waiter; /* made by flight_wait(), gone when told */

enum flight_outcome { FLIGHT_LANDED, FLIGHT_GIVEN_UP, FLIGHT_TIMED_OUT };
/* Called once a waiter, from the call that ended the flight. It may begin, wait or end other flights. */
typedef void (*flight_told)(void *ctx, uint64_t token, enum flight_outcome outcome);

/* A flight is named by tenant (any number that the daemon gives each), space and key. -ENOMEM. */
int flights_create(uint32_t flights_max, uint32_t per_worker_max, uint32_t waiters_max, flight_told told, void *ctx,
                   struct flights **ret);
struct flights *flights_destroy(struct flights *flights);

enum flight_begin_result { FLIGHT_GRANTED = 0, FLIGHT_BUSY = 1 };
/* enum flight_begin_result (granted again to its owner), or -ENOSPC (a bound). */
int flight_begin(struct flights *flights, uint32_t tenant, uint32_t space, const uint8_t key[KEY_BYTES], uint64_t worker);
/* Waits in worker's name with a token to be told by. -ENOENT: not in flight. -ENOSPC: too many waiters. deadline_usec: absolute. */
int flight_wait(struct flights *flights, uint32_t tenant, uint32_t space, const uint8_t key[KEY_BYTES], uint64_t worker,
                uint64_t token, uint64_t deadline_usec);
void flight_landed(struct flights *flights, uint32_t tenant, uint32_t space, const uint8_t key[KEY_BYTES]);
/* Only by its owner; else nothing. */
void flight_end(struct flights *flights, uint32_t tenant, uint32_t space, const uint8_t key[KEY_BYTES], uint64_t worker);
/* A worker ends: its flights are given up, its waits are forgotten (not told). */
void flights_worker_gone(struct flights *flights, uint64_t worker);
/* Tells those whose deadline has passed. Returns the earliest deadline left, UINT64_MAX if none: when to call again. */
uint64_t flights_expire(struct flights *flights, uint64_t now_usec);
void flights_count(const struct flights *flights, uint64_t *ret_flights, uint64_t *ret_waiters);

#endif
