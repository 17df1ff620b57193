/* The front as a whole: its life, and the two lists between its threads. */
#include "daemon/rpc-internal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <grpc/grpc_security.h>
#include <grpc/support/log.h>

enum { POSTS_A_TURN = 64 };

#ifdef __SANITIZE_THREAD__
/* The library and what it stands on are not built for ThreadSanitizer, which cannot see how they order their own memory. What is ours goes
 * from thread to thread under our own lock, which it sees. */
const char *__tsan_default_suppressions(void);
__attribute__((visibility("default"))) const char *__tsan_default_suppressions(void)
{
    return "race:libgrpc.so\nrace:libgpr.so\nrace:libabsl_\nrace:libupb.so\nrace:libaddress_sorting.so\n";
}
#endif

/* ---- the lists ---- */

bool rpc_send_to_loop(struct rpc *rpc, struct rpc_post *post)
{
    bool tell;

    post->next = NULL;
    pthread_mutex_lock(&rpc->lock);
    if (rpc->stopping) {
        pthread_mutex_unlock(&rpc->lock);
        return false;
    }
    tell = rpc->to_loop == NULL;
    *rpc->to_loop_last = post;
    rpc->to_loop_last = &post->next;
    pthread_mutex_unlock(&rpc->lock);
    if (tell)
        eventfd_write(rpc->event_fd, 1);
    return true;
}

/* Wakes the thread in its completion queue. The C core has no call for that (its alarms are C++'s). What it promises is that a call that
 * is requested of a server which has been shut down comes back at once, as failed: so such a server is the bell. Not rung again before
 * on_kick() has heard it. */
static void ring(struct rpc *rpc)
{
    if (grpc_server_request_call(rpc->bell, &rpc->bell_call, &rpc->bell_details, &rpc->bell_metadata, rpc->cq, rpc->cq,
                                 &rpc->kick_tag) != GRPC_CALL_OK)
        abort(); /* the queue is shut down only after the last post */
}

void rpc_send_to_rpc(struct rpc *rpc, struct rpc_post *post)
{
    bool kick;

    post->next = NULL;
    pthread_mutex_lock(&rpc->lock);
    *rpc->to_rpc_last = post;
    rpc->to_rpc_last = &post->next;
    kick = !rpc->kicked;
    rpc->kicked = true;
    pthread_mutex_unlock(&rpc->lock);
    if (kick)
        ring(rpc);
}

static void on_kick(struct rpc_tag *tag, bool ok)
{
    struct rpc *rpc = (struct rpc *)((char *)tag - offsetof(struct rpc, kick_tag));
    struct rpc_post *list, *next;

    (void)ok;
    pthread_mutex_lock(&rpc->lock);
    list = rpc->to_rpc;
    rpc->to_rpc = NULL;
    rpc->to_rpc_last = &rpc->to_rpc;
    rpc->kicked = false;
    pthread_mutex_unlock(&rpc->lock);
    for (; list; list = next) {
        next = list->next;
        list->arrive(list);
    }
}

/* A turn's share of what came for the loop. True: there is more. */
static bool take_turn(struct rpc *rpc)
{
    struct rpc_post *list, **end, *next;
    bool more;

    pthread_mutex_lock(&rpc->lock);
    list = rpc->to_loop;
    end = &list;
    for (int n = 0; *end && n < POSTS_A_TURN; n++)
        end = &(*end)->next;
    rpc->to_loop = *end;
    *end = NULL;
    more = rpc->to_loop != NULL;
    if (!more)
        rpc->to_loop_last = &rpc->to_loop;
    pthread_mutex_unlock(&rpc->lock);
    for (; list; list = next) {
        next = list->next; /* the post is another's when it has arrived */
        list->arrive(list);
    }
    return more;
}

/* Edge-triggered: each write wakes the loop once, and nobody has to read. */
static int on_posts(sd_event_source *source, int fd, uint32_t events, void *ctx)
{
    (void)source;
    (void)events;
    if (take_turn(ctx))
        eventfd_write(fd, 1);
    return 0;
}

/* ---- changes ---- */

static void on_apply(struct rpc_post *post)
{
    struct rpc *rpc = (struct rpc *)((char *)post - offsetof(struct rpc, apply_post));

    pthread_mutex_lock(&rpc->lock);
    rpc->apply_posted = false; /* what changes from here on posts again */
    pthread_mutex_unlock(&rpc->lock);
    rpc_health_changed(rpc);
}

void rpc_apply(struct rpc *rpc)
{
    bool post;

    if (!rpc)
        return;
    atomic_store(&rpc->slow_limit_usec, rpc->daemon->options.stuck_timeout);
    if (atomic_exchange(&rpc->draining, rpc->daemon->draining) == rpc->daemon->draining)
        return;
    pthread_mutex_lock(&rpc->lock);
    post = !rpc->apply_posted;
    rpc->apply_posted = true;
    pthread_mutex_unlock(&rpc->lock);
    if (post)
        rpc_send_to_rpc(rpc, &rpc->apply_post);
}

void rpc_measure(struct rpc *rpc)
{
    struct metrics *m;

    if (!rpc)
        return;
    m = &rpc->daemon->metrics;
#define TAKE(field, what) m->field = atomic_load_explicit(&rpc->counts[what], memory_order_relaxed)
    TAKE(grpc_calls, RPC_CALLS);
    TAKE(grpc_ok, RPC_OK);
    TAKE(grpc_cancelled, RPC_CANCELLED);
    TAKE(grpc_invalid, RPC_INVALID);
    TAKE(grpc_deadline, RPC_DEADLINE);
    TAKE(grpc_not_found, RPC_NOT_FOUND);
    TAKE(grpc_denied, RPC_DENIED);
    TAKE(grpc_exhausted, RPC_EXHAUSTED);
    TAKE(grpc_precondition, RPC_PRECONDITION);
    TAKE(grpc_unimplemented, RPC_UNIMPLEMENTED);
    TAKE(grpc_unavailable, RPC_UNAVAILABLE);
    TAKE(grpc_other, RPC_OTHER);
    TAKE(grpc_in_bytes, RPC_BYTES_IN);
    TAKE(grpc_out_bytes, RPC_BYTES_OUT);
#undef TAKE
    m->grpc_connections = rpc->n_conns;
    m->grpc_calls_now = atomic_load_explicit(&rpc->n_calls, memory_order_relaxed);
    m->grpc_memory_bytes = atomic_load_explicit(&rpc->total.bytes, memory_order_relaxed);
}

/* ---- life ---- */

/* The library's own complaints: peers can provoke them at will, and what matters of them is counted by status. */
static void no_log(gpr_log_func_args *args)
{
    (void)args;
}

static void make_bell(struct rpc *rpc)
{
    grpc_event event;

    grpc_call_details_init(&rpc->bell_details);
    grpc_metadata_array_init(&rpc->bell_metadata);
    rpc->bell = grpc_server_create(NULL, NULL);
    grpc_server_register_completion_queue(rpc->bell, rpc->cq, NULL);
    grpc_server_start(rpc->bell);
    grpc_server_shutdown_and_notify(rpc->bell, rpc->cq, NULL);
    event = grpc_completion_queue_next(rpc->cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL); /* nothing else is in it yet */
    assert(event.type == GRPC_OP_COMPLETE && event.tag == NULL);
    (void)event;
}

static int start_library(struct rpc *rpc)
{
    gpr_set_log_function(no_log);
    grpc_init();
    rpc->started = true;
    rpc->cq = grpc_completion_queue_create_for_next(NULL);
    rpc->quota = grpc_resource_quota_create("kvd");
    grpc_resource_quota_resize(rpc->quota, rpc->total.limit_bytes);
    make_bell(rpc);
    rpc->credentials = grpc_insecure_server_credentials_create(); /* whoever may open the socket; who it is, the kernel says */
    return 0;
}

static int start_thread(struct rpc *rpc)
{
    sigset_t all, before;
    int r;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the loop's; the library's own threads inherit it too */
    r = start_library(rpc);
    if (r == 0)
        r = -pthread_create(&rpc->thread, NULL, rpc_thread, rpc);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return r;
}

int rpc_create(struct daemon *d, struct rpc **ret)
{
    const struct options *o = &d->options;
    struct rpc *rpc = calloc(1, sizeof(*rpc));
    int r;

    if (!rpc)
        return -ENOMEM;
    rpc->daemon = d;
    rpc->total.limit_bytes = o->grpc_memory;
    rpc->message_bytes = (uint32_t)o->grpc_message_bytes;
    rpc->conn_calls = (uint32_t)o->grpc_connection_calls;
    rpc->calls_max = (uint32_t)o->grpc_calls;
    rpc->slow_limit_usec = o->stuck_timeout;
    rpc->draining = d->draining;
    rpc->to_loop_last = &rpc->to_loop;
    rpc->to_rpc_last = &rpc->to_rpc;
    rpc->slow_last = &rpc->slow;
    rpc->kick_tag.done = on_kick;
    rpc->apply_post.arrive = on_apply;
    rpc->stop_post.arrive = rpc_stop;
    pthread_mutex_init(&rpc->lock, NULL);
    rpc->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r = rpc->event_fd < 0 ? -errno : sd_event_add_io(d->event, &rpc->source, rpc->event_fd, EPOLLIN | EPOLLET, on_posts, rpc);
    if (r >= 0) {
        sd_event_source_set_description(rpc->source, "grpc");
        r = start_thread(rpc);
    }
    if (r < 0) {
        rpc->stopping = true; /* there is no thread to join */
        rpc_destroy(rpc);
        return r;
    }
    *ret = rpc;
    return 0;
}

void rpc_no_jobs(struct rpc *rpc)
{
    if (rpc)
        rpc->no_jobs = true;
}

/* Takes nothing more from the thread; what came before is answered (its session is gone). */
static void stop_taking(struct rpc *rpc)
{
    while (take_turn(rpc))
        ;
    pthread_mutex_lock(&rpc->lock);
    rpc->stopping = true;
    pthread_mutex_unlock(&rpc->lock);
    while (take_turn(rpc))
        ;
}

struct rpc *rpc_destroy(struct rpc *rpc)
{
    if (!rpc)
        return NULL;
    if (!rpc->stopping) {
        stop_taking(rpc);
        rpc_send_to_rpc(rpc, &rpc->stop_post);
        pthread_join(rpc->thread, NULL);
    }
    while (rpc->all) /* their posts were refused */
        rpc_conn_gone(&rpc->all->gone_post);
    if (rpc->started) {
        grpc_server_credentials_release(rpc->credentials);
        grpc_resource_quota_unref(rpc->quota);
        grpc_server_destroy(rpc->bell);
        grpc_call_details_destroy(&rpc->bell_details);
        grpc_metadata_array_destroy(&rpc->bell_metadata);
        grpc_completion_queue_destroy(rpc->cq);
        grpc_shutdown_blocking();
    }
    sd_event_source_disable_unref(rpc->source);
    if (rpc->event_fd >= 0)
        close(rpc->event_fd);
    pthread_mutex_destroy(&rpc->lock);
    free(rpc);
    return NULL;
}
