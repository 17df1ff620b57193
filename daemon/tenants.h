/* Tenants: who may share with whom, and each one's cache.
 *
 * The sections [tenant NAME] of the configuration claim peers by user or group, the first that does has the peer; default_tenant
 * has the rest. A tenant's cache is made with it, in the main thread, which owns the index's robust mutex for as long as it lives.
 * A tenant that a reload has left out takes no new sessions and ends with its last one.
 *
 * Loop thread only. */
#ifndef KVD_DAEMON_TENANTS_H
#define KVD_DAEMON_TENANTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "store/cache.h"

struct attend_tenant;
struct daemon;
struct tenant_options;

struct tenant {
    struct tenant *next;       /* in the order of the rules */
    uint32_t id;               /* from 1, never reused in a daemon's life */
    char *name, *domain;
    uint64_t index_entries, space_quota; /* as they were when the cache was made */
    struct cache *cache;
    struct attend_tenant *attend; /* NULL: none of its workers has asked for attention */
    uint64_t weight;
    uint32_t *uids, *gids;     /* who is claimed; copied from the options */
    size_t n_uids, n_gids;
    uint32_t n_refs;           /* sessions, publishes, walks */
    uint32_t n_sessions;
    bool gone;                 /* not in the configuration any more */
    bool spare_coming;         /* a job makes a slab ahead of need */
    int index_fd;              /* a read-only description, to be handed out; -1: not yet made */
};

struct tenants {
    struct tenant *first;
    struct tenant *rest;       /* has the peers that no rule claims; NULL: they are turned away */
    uint32_t last_id;
    uint32_t n;
};

/* Brings the tenants in step with d->options: makes, changes, retires. Logs what cannot be had; -ENOMEM or -errno only if a new tenant
 * could not be made (the others are in force). */
int tenants_apply(struct daemon *d);
void tenants_destroy(struct daemon *d);

struct tenant *tenant_ref(struct tenant *t);
/* May free it, if it is gone. */
void tenant_unref(struct daemon *d, struct tenant *t);

/* Whose peer this is; NULL: nobody's. */
struct tenant *tenants_match(const struct tenants *tenants, uint32_t uid, const gid_t *gids, size_t n_gids);
/* The tenant with this id, or the first with a greater one. NULL past the last. */
struct tenant *tenants_from(const struct tenants *tenants, uint32_t id);

/* The shared budget is used up: takes bytes back from the tenant that is most over its share, needy excepted. Returns what was
 * given back; 0: nobody is over his share. */
uint64_t tenants_make_room(struct daemon *d, const struct tenant *needy, uint64_t bytes);
/* Has a helper thread make the next slab, if one would be of use. */
void tenant_spare(struct daemon *d, struct tenant *t);

/* A read-only open file description of the memory behind fd, for a worker. Close-on-exec, the caller's. -errno. */
int reopen_read_only(int fd);

#endif
