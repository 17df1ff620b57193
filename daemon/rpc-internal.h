/* What the files of daemon/rpc*.c share. Nobody else includes this.
 *
 * A call is with one thread at a time, and goes from one to the other through a list under a lock:
 *
 *                        to_loop (hand over)
 *      rpc thread  -------------------------->  loop thread  ---> a job, and back
 *                  <--------------------------
 *                        to_rpc (answer)
 *
 *   R1  what is marked "rpc" below is touched by the rpc thread only, "loop" by the loop thread only; what is marked "with" by the
 *       thread that has the call
 *   R2  a call that was handed over comes back exactly once: by an answer, a failure, or a wish for the next message
 *   R3  a call with work (what the loop keeps for it between its messages) is freed by the loop, after the rpc thread has given it up
 *       (STEP_GONE); any other by the rpc thread
 *   R4  a connection is freed by the loop, when its session is gone and the rpc thread has ended its server and all its calls
 *   R5  cancelled goes from false to true once, seen by whoever has the call: before work is started, never in the middle of it */
#ifndef KVD_DAEMON_RPC_INTERNAL_H
#define KVD_DAEMON_RPC_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include <grpc/grpc.h>
#include <protobuf-c/protobuf-c.h>
#include <systemd/sd-event.h>

#include "daemon/daemon.h"
#include "daemon/errors.h"
#include "daemon/rpc.h"
#include "daemon/rpc_arena.h"
#include "daemon/session.h"

/* A place in one of the two lists. Embedded in what is sent; on one list at a time. */
struct rpc_post {
    struct rpc_post *next;
    void (*arrive)(struct rpc_post *post); /* in the thread that it is sent to */
};

/* The completion queue's tags. */
struct rpc_tag {
    void (*done)(struct rpc_tag *tag, bool ok);
};

enum rpc_kind { RPC_UNARY, RPC_IN_STREAM, RPC_OUT_STREAM, RPC_BIDI };
enum rpc_right { RPC_ANYBODY, RPC_TENANT, RPC_ADMIN };

struct rpc_call;
struct rpc_method {
    const char *path;          /* "/package.Service/Method" */
    const ProtobufCMessageDescriptor *input;
    enum rpc_kind kind;
    enum rpc_right right;
    uint16_t frame;            /* the request of the attach socket that it is; 0: none */
    void (*local)(struct rpc_call *call);  /* answered by the rpc thread, NULL: */
    void (*handle)(struct rpc_call *call); /* by the loop */
};

/* What the loop keeps for a call that has more than one message, or a job. Embedded first. */
struct rpc_work {
    void (*next)(struct rpc_call *call); /* a message came, or went out, or the client has said all (call->step) */
    void (*end)(struct rpc_work *wall);  /* frees it; no job is out */
    bool busy;                           /* a job is out, or the attention threads have it */
};

enum rpc_step { STEP_MESSAGE, STEP_SENT, STEP_END, STEP_GONE };

struct rpc_conn {
    struct rpc *rpc;
    uint64_t worker;
    struct rpc_post open_post, close_post, gone_post;
    int fd;                    /* until the library has it */
    /* rpc */
    struct rpc_conn *next, **at;
    grpc_server *server;
    struct rpc_tag shutdown_tag;
    unsigned n_calls, n_posted;
    bool closing, shut;
    /* loop */
    struct session *session;   /* NULL: gone */
    struct rpc_conn *next_conn, **at_conn;
    struct rpc_call **asked;   /* calls whose request waits for a reply, by request id - 1 */
    uint32_t *free_ids;
    uint32_t n_ids, n_free_ids;
    struct rpc_call *working;  /* calls with work */
    struct rpc_prefixes *prefixes;
    struct rpc_batch *batch;   /* NULL: nothing has been attended to yet */
};

struct rpc_call {
    struct rpc_post post;
    struct rpc_conn *conn;
    const struct rpc_method *method;
    uint64_t deadline_usec;    /* CLOCK_MONOTONIC; UINT64_MAX: none */
    uint64_t begin_usec;
    _Atomic bool cancelled;
    _Atomic uint32_t *cancel_word; /* by lock: set when the call is cancelled; NULL: none */
    /* rpc */
    grpc_call *call;
    grpc_call_details details;
    grpc_metadata_array metadata;
    struct rpc_tag new_tag, close_tag, recv_tag, send_tag;
    int was_cancelled;
    unsigned n_pending;        /* batches out */
    bool counted, metadata_sent, finished, away;
    bool closed;               /* the client's side is over */
    grpc_byte_buffer *received;
    struct rpc_call *next_slow, **at_slow; /* waits for the client, since: */
    uint64_t slow_usec;
    struct rpc_call *next_watch, **at_watch;
    int watch_status, watch_what;
    bool watch_busy;           /* a message is going out */
    /* with */
    enum rpc_step step;
    bool has_work;
    void *message;             /* of STEP_MESSAGE */
    struct arena arena;
    uint8_t *body;             /* of a message that is yet to be unpacked, by a job */
    size_t n_body;
    uint64_t n_charged;        /* for body and reply */
    uint8_t *reply;            /* bytes to send; NULL with n_reply 0: an empty message */
    size_t n_reply;
    bool send, want, end;      /* a message to send; another one is wanted; the call ends */
    grpc_status_code status;
    enum error_code error;
    char reason[400], allowed[200];
    /* loop */
    struct rpc_call *next_working, **at_working;
    struct rpc_work *work;
    struct job job;
    void (*job_done)(struct rpc_call *call);
    uint32_t asked_id;         /* 0: none */
};

/* What is counted by the rpc thread and read by the loop. */
enum rpc_count {
    RPC_CALLS,
    RPC_OK,
    RPC_CANCELLED,
    RPC_INVALID,
    RPC_DEADLINE,
    RPC_NOT_FOUND,
    RPC_DENIED,
    RPC_EXHAUSTED,
    RPC_PRECONDITION,
    RPC_UNIMPLEMENTED,
    RPC_UNAVAILABLE,
    RPC_OTHER,
    RPC_BYTES_IN,
    RPC_BYTES_OUT,
    RPC_COUNTS,
};

struct rpc {
    struct daemon *daemon;
    pthread_t thread;
    bool started;
    struct rpc_total total;
    uint32_t message_bytes, conn_calls, calls_max;
    _Atomic uint64_t slow_limit_usec;
    _Atomic uint64_t counts[RPC_COUNTS];
    _Atomic uint64_t n_calls;
    _Atomic bool draining;

    pthread_mutex_t lock;      /* of the lists and what belongs to them; held for a few instructions, no other lock inside */
    struct rpc_post *to_loop, **to_loop_last;
    struct rpc_post *to_rpc, **to_rpc_last;
    bool kicked;               /* the bell rings and has not been heard */
    bool stopping;             /* the loop takes nothing more */
    int event_fd;
    grpc_server *bell;         /* and what a request of it writes to */
    grpc_call *bell_call;
    grpc_call_details bell_details;
    grpc_metadata_array bell_metadata;

    /* rpc */
    grpc_completion_queue *cq;
    grpc_resource_quota *quota;
    grpc_server_credentials *credentials;
    struct rpc_tag kick_tag;
    struct rpc_conn *conns;
    struct rpc_call *slow, **slow_last;
    struct rpc_call *watches;
    bool ending;
    /* loop */
    struct rpc_post apply_post, stop_post;
    bool apply_posted;
    sd_event_source *source;
    bool no_jobs;              /* the helpers end: jobs are refused */
    struct rpc_conn *all;
    uint32_t n_conns;
};

/* ---- rpc.c: the lists. Any thread. ---- */

/* False: the loop takes nothing more; the caller keeps it. */
bool rpc_send_to_loop(struct rpc *rpc, struct rpc_post *post);
void rpc_send_to_rpc(struct rpc *rpc, struct rpc_post *post);

/* ---- rpc_call.c: rpc thread ---- */

void *rpc_thread(void *rpc);
/* Posts in the rpc thread. */
void rpc_conn_open(struct rpc_post *post);
void rpc_conn_close(struct rpc_post *post);
void rpc_stop(struct rpc_post *post);
void rpc_call_answered(struct rpc_post *post);
/* For local handlers. message may be NULL: empty. more: a stream goes on. */
void rpc_local_answer(struct rpc_call *call, const ProtobufCMessage *message, bool more);
void rpc_local_fail(struct rpc_call *call, grpc_status_code status, const char *reason);
void rpc_count(struct rpc *rpc, enum rpc_count what, uint64_t n);

/* ---- rpc_methods.c ---- */

/* NULL: there is none. */
const struct rpc_method *rpc_method_find(const void *path, size_t n);
/* NULL past the last. */
const struct rpc_method *rpc_method_at(size_t i);

/* ---- rpc_health.c, rpc_reflect.c: rpc thread ---- */

void rpc_health_check(struct rpc_call *call);
void rpc_health_watch(struct rpc_call *call);
void rpc_health_changed(struct rpc *rpc);
/* A watcher's message went out: the next one, if its health has changed meanwhile. */
void rpc_health_sent(struct rpc_call *call);
void rpc_watch_end(struct rpc_call *call);
void rpc_reflect(struct rpc_call *call);

/* ---- rpc_loop.c: loop thread ---- */

void rpc_call_arrived(struct rpc_post *post);
void rpc_conn_gone(struct rpc_post *post);
extern const struct session_link rpc_link;
/* Each of these gives the call back (R2). rpc_answer packs message (NULL: empty); more: a stream goes on, and STEP_SENT comes when it has
 * gone out. rpc_answer_bytes takes bytes (malloc), for which n_charged was charged to the total. */
void rpc_answer(struct rpc_call *call, const ProtobufCMessage *message, bool more);
void rpc_answer_bytes(struct rpc_call *call, uint8_t *bytes, size_t n, uint64_t n_charged, bool more);
void rpc_want(struct rpc_call *call);
__attribute__((format(printf, 4, 5))) void rpc_fail(struct rpc_call *call, enum error_code code, const char *allowed,
                                                    const char *format, ...);
/* An id under which the reply to this call's request will come (session.h); it is answered by itself then. */
uint32_t rpc_ask(struct rpc_call *call);
/* The call is the loop's to end from now on. */
void rpc_work_begin(struct rpc_call *call, struct rpc_work *work);
/* Runs run() on a helper thread, and then done() on the loop, unless the call or its connection has gone meanwhile: then the work is
 * ended. Calls without work may have a job too. */
void rpc_job(struct rpc_call *call, void (*run)(struct job *job), void (*done)(struct rpc_call *call));
static inline struct rpc_call *rpc_call_of_job(struct job *job)
{
    return (struct rpc_call *)((char *)job - offsetof(struct rpc_call, job));
}

/* ---- rpc_cache.c and what belongs to it: loop thread ---- */

void rpc_open_space(struct rpc_call *call);
void rpc_match(struct rpc_call *call);
void rpc_release(struct rpc_call *call);
void rpc_publish(struct rpc_call *call);
void rpc_load(struct rpc_call *call);
void rpc_attend(struct rpc_call *call);
struct prefix *rpc_prefix_find(struct rpc_conn *conn, uint64_t id);
void rpc_prefixes_drop(struct rpc_conn *conn);
/* Blocks that the connection holds. */
uint64_t rpc_prefixes_held(const struct rpc_conn *conn);

#endif
