/* The daemon, and what its parts share. Everything here belongs to the loop thread, which is the one that made it. */
#ifndef KVD_DAEMON_DAEMON_H
#define KVD_DAEMON_DAEMON_H

#include <stdbool.h>
#include <stdint.h>

#include <systemd/sd-event.h>

#include "daemon/jobs.h"
#include "daemon/log.h"
#include "daemon/metrics.h"
#include "daemon/options.h"
#include "daemon/wire.h"
#include "kernels/codec/codec.h"
#include "kernels/cpu.h"
#include "kernels/crc32c.h"
#include "proto/frame.h"
#include "proto/key.h"
#include "store/flight.h"
#include "store/slab.h"

struct attend;
struct listener;
struct publishing;
struct rpc;
struct session;
struct tenants;
struct walk;

struct daemon {
    sd_event *event;
    struct log log;
    struct metrics metrics;
    struct options options;        /* in force */
    struct cpu_features cpu;
    const struct codec_ops *codec;
    crc32c_fn crc32c;
    struct key_hasher *hasher;
    struct wire wire;
    struct budget budget;
    struct tenants *tenants;
    struct flights *flights;
    struct jobs *jobs;
    struct attend *attend;
    struct publishing *publishing;
    struct listener *listener;
    struct rpc *rpc;               /* NULL: no gRPC socket */

    struct session *sessions;      /* all, newest first */
    struct session *closing;       /* those that the reaper will free */
    uint32_t n_sessions;           /* connections, also those that have not said hello */
    uint32_t n_attached;           /* those that have */
    uint64_t last_worker;
    sd_event_source *reaper;
    sd_event_source *timer;        /* for what has a deadline; off while nothing has */
    uint64_t timer_usec;           /* when it goes off; UINT64_MAX: off */
    uint64_t staging_bytes;

    struct walk *walks;            /* admin requests in progress */
    uint32_t n_walks;

    bool draining;
    bool ending;                   /* no block is made or moved any more: what workers hold stays as it is */
    bool notifies;                 /* a service manager listens */
    uint64_t status_usec;          /* when STATUS was last told */

    uint8_t rx[FRAME_MAX];
    uint8_t tx[FRAME_BODY_MAX];
};

/* Makes all parts but the listener, on the thread's default event loop. Takes *options, also on failure, which is told in the log.
 * -errno. */
int daemon_create(struct options *options, struct daemon **ret);
/* Ends everything: what is being published is concluded, sessions are closed, indexes are marked closed. NULL allowed; returns NULL. */
struct daemon *daemon_destroy(struct daemon *d);

/* CLOCK_MONOTONIC. */
uint64_t daemon_now_usec(void);
/* Sees to it that daemon_expire() runs at usec or before. */
void daemon_wake_at(struct daemon *d, uint64_t usec);
/* Ends what is late, and sets the timer for what is next, or off. */
void daemon_expire(struct daemon *d);
/* Tells the service manager, in words, how things are. Cheap without one. */
void daemon_status(struct daemon *d);
/* Takes over options that may change in a running daemon (limits, quotas, tenants, log level). */
void daemon_apply_options(struct daemon *d);
/* Fills in the gauges. */
void daemon_measure(struct daemon *d);

#endif
