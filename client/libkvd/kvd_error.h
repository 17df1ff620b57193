/* Errors of libkvd: the code goes back as the call's result, the details wait for kvd_message().
 *
 * Details are the only state outside of a session: a few lines of thread-local text, tagged with the session's
 * cookie, so that a thread that uses several sessions can still ask each. Includes: kvd.h. */
#ifndef KVD_ERROR_H
#define KVD_ERROR_H

#include <stdint.h>

#include "kvd.h"

/* Notes the details of an error of the session with this cookie (0: of kvd_attach()) and returns error. */
int error_set(uint64_t cookie, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* What the calling thread noted last for this cookie; "" if nothing. */
const char *error_get(uint64_t cookie);

/* Copies it, for a step whose own errors are of no interest. */
#define ERROR_BYTES 320
void error_keep(uint64_t cookie, char ret_text[ERROR_BYTES]);

/* Copies the calling thread's note from one cookie to another (a session that could not be attached has no owner to
 * ask). */
void error_move(uint64_t from, uint64_t to);

#endif
