/* Walks: admin requests that look at every block of one or of all tenants, a slice a turn of the loop, so that nobody waits for
 * them.
 *
 *   walk_start ---> [tenant: begin, then n_passes times: visit each entry; slice_end after each slice] ---> finish, reply
 *                      a turn: at most WALK_SLICE entries or WALK_TURN_USEC; none while the walk is blocked
 *
 * A session that goes ends its walks; one that has jobs out waits for them first. Loop thread only. */
#ifndef KVD_DAEMON_WALK_H
#define KVD_DAEMON_WALK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/key.h"
#include "proto/kvd.pb-c.h"
#include "store/cache.h"

struct daemon;
struct request;
struct session;
struct tenant;
struct walk;

enum { WALK_SLICE = 2048, WALK_TURN_USEC = 1000 };

/* Which blocks; a copy of the message. */
struct selector {
    char tenant[64], model[SPACE_STRING_MAX + 1];
    uint32_t space;
    uint8_t key[KEY_BYTES];
    size_t n_key;
    uint64_t idle_usec, age_usec;
};

/* Takes over a message (NULL: everything). Answers and returns false if it is wrong. */
bool selector_take(struct session *s, const struct request *rq, const Kvd__V1__Selector *m, struct selector *ret);
bool selector_has_tenant(const struct selector *sel, const struct tenant *t);
bool selector_has(const struct selector *sel, const struct tenant *t, const struct cache_entry_info *info);

struct walk_ops {
    unsigned n_passes;
    /* Before a tenant's first pass. May be NULL. -ENOMEM ends the walk with an error. */
    int (*begin)(struct walk *w);
    /* A VALID entry (brief information), selected or not. */
    void (*visit)(struct walk *w, unsigned pass, const struct cache_entry_info *info, bool selected);
    void (*slice_end)(struct walk *w, unsigned pass);  /* may be NULL */
    /* Has enough; the rest is not looked at. May be NULL. */
    bool (*satisfied)(const struct walk *w, unsigned pass);
    void (*finish)(struct walk *w);                    /* answers w->session, which is there */
    void (*deinit)(struct walk *w);                    /* may be NULL */
};

/* Embedded first in what a request keeps. */
struct walk {
    struct walk *next, **at;
    struct daemon *daemon;
    struct session *session;   /* NULL: gone */
    uint16_t type;
    uint32_t request_id;
    const struct walk_ops *ops;
    struct selector selector;
    struct tenant *tenant;     /* where it is; referenced; NULL: before the first */
    uint32_t next_tenant;      /* id to go on from */
    uint32_t entry;
    unsigned pass;
    uint32_t n_jobs;           /* out; the tenant is not left before they are back */
    uint32_t n_jobs_max;       /* no more entries while so many are out; 0: makes no jobs */
    struct sd_event_source *turn;
};

/* Starts a walk (allocated by the caller with malloc, owned from here on also on failure). selector is filled in. */
void walk_start(struct session *s, const struct request *rq, struct walk *w, const struct walk_ops *ops);
/* A job is back. */
void walk_job_done(struct walk *w);
void walks_session_gone(struct session *s);
/* After all jobs have ended. */
void walks_destroy(struct daemon *d);

#endif
