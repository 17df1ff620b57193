/* Flights: FLIGHT_BEGIN, FLIGHT_WAIT, FLIGHT_END, and who is told when one ends. Loop thread only. */
#ifndef KVD_DAEMON_FLIGHT_REQUESTS_H
#define KVD_DAEMON_FLIGHT_REQUESTS_H

#include <stdbool.h>
#include <stdint.h>

#include "store/cache.h"
#include "store/flight.h"

struct session;

/* The flights' callback: token is a struct wait, which it answers and frees. */
void flight_request_told(void *ctx, uint64_t token, enum flight_outcome outcome);
/* Ends the session's flights and forgets its waits. */
void waits_session_gone(struct session *s);
/* Has every group of the space this key? */
bool key_landed(const struct cache *cache, const struct space *space, const uint8_t *key);

#endif
