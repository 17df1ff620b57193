/* From a packet to its handler: framing, table of frame types, rights, message.
 *
 * Loop thread only. */
#ifndef KVD_DAEMON_REQUEST_H
#define KVD_DAEMON_REQUEST_H

#include <stddef.h>
#include <stdint.h>

struct request;
struct session;

/* Handles one packet of n bytes; the descriptors are closed unless a handler keeps them. */
void request_take(struct session *s, const uint8_t *packet, size_t n, int *fds, size_t n_fds);
/* The same from where messages come without frames: type is a known one that carries no descriptors, message its unpacked message. */
void request_handle(struct session *s, uint16_t type, uint32_t id, const void *message);
/* Answers a frame that cannot be understood, counts it, and ends the session after too many. id 0: the frame's is not known. */
void request_malformed(struct session *s, uint32_t id, const char *reason);

/* Handlers; the table in request.c says which frame each is for. */
void request_hello(struct session *s, const struct request *rq);
void request_space_open(struct session *s, const struct request *rq);
void request_space_close(struct session *s, const struct request *rq);
void request_slab_get(struct session *s, const struct request *rq);
void request_staging_add(struct session *s, const struct request *rq);
void request_staging_drop(struct session *s, const struct request *rq);
void request_attend_add(struct session *s, const struct request *rq);
void request_publish(struct session *s, const struct request *rq);
void request_flight_begin(struct session *s, const struct request *rq);
void request_flight_wait(struct session *s, const struct request *rq);
void request_flight_end(struct session *s, const struct request *rq);
void request_stats(struct session *s, const struct request *rq);
void request_list(struct session *s, const struct request *rq);
void request_show(struct session *s, const struct request *rq);
void request_evict(struct session *s, const struct request *rq);
void request_pin(struct session *s, const struct request *rq);
void request_verify(struct session *s, const struct request *rq);
void request_drain(struct session *s, const struct request *rq);
void request_config(struct session *s, const struct request *rq);

#endif
