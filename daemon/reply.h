/* The queue of a session's replies. For session.c and reply.c; who answers uses reply() of session.h. */
#ifndef KVD_DAEMON_REPLY_H
#define KVD_DAEMON_REPLY_H

struct session;

/* Sends what waits, as far as the socket takes it. */
void replies_flush(struct session *s);
void replies_drop(struct session *s);

#endif
