#include "store/flight.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "proto/lookup.h"

enum { BUCKETS = 16384 };

struct flight_waiter {
    struct flight_waiter *next; /* of the flight */
    struct flight_waiter *after, *before; /* of all, by the order of their begin */
    uint64_t worker, token, deadline_usec;
    struct flight *flight;
};

struct flight {
    struct flight *next; /* in its bucket */
    uint32_t tenant, space;
    uint8_t key[KEY_BYTES];
    uint64_t worker;
    struct flight_waiter *waiters;
};

struct flights {
    struct flight *buckets[BUCKETS];
    struct flight_waiter *first, *last;
    uint64_t seed; /* workers choose the keys: none shall be able to put all into one bucket */
    uint32_t flights_max, per_worker_max, waiters_max, n_flights, n_waiters;
    uint64_t counted; /* the worker whose flights were counted last, */
    uint32_t n_counted; /* kept up to date since: its next keys need no count */
    flight_told told;
    void *ctx;
};

int flights_create(uint32_t flights_max, uint32_t per_worker_max, uint32_t waiters_max, flight_told told, void *ctx,
                   struct flights **ret)
{
    struct flights *f = calloc(1, sizeof(*f));

    if (!f)
        return -ENOMEM;
    if (getrandom(&f->seed, sizeof(f->seed), 0) != sizeof(f->seed)) {
        free(f);
        return -EIO;
    }
    f->flights_max = flights_max;
    f->per_worker_max = per_worker_max;
    f->waiters_max = waiters_max;
    f->told = told;
    f->ctx = ctx;
    *ret = f;
    return 0;
}

static struct flight **bucket_of(struct flights *f, uint32_t tenant, uint32_t space, const uint8_t *key)
{
    return &f->buckets[lookup_hash(f->seed + tenant, key, (uint16_t)space, 0) % BUCKETS];
}

/* The link that points to the flight, or to where it would be. */
static struct flight **find(struct flights *f, uint32_t tenant, uint32_t space, const uint8_t *key)
{
    struct flight **at = bucket_of(f, tenant, space, key);

    while (*at && !((*at)->tenant == tenant && (*at)->space == space && memcmp((*at)->key, key, KEY_BYTES) == 0))
        at = &(*at)->next;
    return at;
}

static void unlink_waiter(struct flights *f, struct flight_waiter *w)
{
    struct flight_waiter **at = &w->flight->waiters;

    while (*at != w)
        at = &(*at)->next;
    *at = w->next;
    if (w->before)
        w->before->after = w->after;
    else
        f->first = w->after;
    if (w->after)
        w->after->before = w->before;
    else
        f->last = w->before;
    f->n_waiters--;
}

/* Ends the flight at *at. Waiters are told when everything is in order again, since they may call back. */
static void end_flight(struct flights *f, struct flight **at, enum flight_outcome outcome)
{
    struct flight *flight = *at;
    struct flight_waiter *told = NULL;

    *at = flight->next;
    f->n_flights--;
    if (flight->worker == f->counted)
        f->n_counted--;
    while (flight->waiters) {
        struct flight_waiter *w = flight->waiters;

        unlink_waiter(f, w);
        w->next = told;
        told = w;
    }
    free(flight);
    while (told) {
        struct flight_waiter *w = told;

        told = w->next;
        f->told(f->ctx, w->token, outcome);
        free(w);
    }
}

struct flights *flights_destroy(struct flights *f)
{
    if (!f)
        return NULL;
    for (int i = 0; i < BUCKETS; i++)
        while (f->buckets[i]) {
            struct flight *flight = f->buckets[i];

            f->buckets[i] = flight->next;
            while (flight->waiters) {
                struct flight_waiter *w = flight->waiters;

                unlink_waiter(f, w);
                free(w);
            }
            free(flight);
        }
    free(f);
    return NULL;
}

static uint32_t count_of(struct flights *f, uint64_t worker)
{
    if (worker == f->counted)
        return f->n_counted;
    f->counted = worker;
    f->n_counted = 0;
    for (int i = 0; i < BUCKETS; i++)
        for (const struct flight *flight = f->buckets[i]; flight; flight = flight->next)
            f->n_counted += flight->worker == worker;
    return f->n_counted;
}

int flight_begin(struct flights *f, uint32_t tenant, uint32_t space, const uint8_t key[KEY_BYTES], uint64_t worker)
{
    struct flight **at = find(f, tenant, space, key);
    struct flight *flight = *at;

    if (flight)
        return flight->worker == worker ? FLIGHT_GRANTED : FLIGHT_BUSY;
    /* Only when many flights are up can one worker have too many: the count is not needed before. */
    if (f->n_flights >= f->flights_max || (f->n_flights >= f->per_worker_max && count_of(f, worker) >= f->per_worker_max))
        return -ENOSPC;
    flight = calloc(1, sizeof(*flight));
    if (!flight)
        return -ENOSPC;
    flight->tenant = tenant;
    flight->space = space;
    flight->worker = worker;
    memcpy(flight->key, key, KEY_BYTES);
    *at = flight;
    f->n_flights++;
    if (worker == f->counted)
        f->n_counted++;
    return FLIGHT_GRANTED;
}

int flight_wait(struct flights *f, uint32_t tenant, uint32_t space, const uint8_t key[KEY_BYTES], uint64_t worker,
                uint64_t token, uint64_t deadline_usec)
{
    struct flight *flight = *find(f, tenant, space, key);
    struct flight_waiter *w;

    if (!flight)
        return -ENOENT;
    if (f->n_waiters >= f->waiters_max)
        return -ENOSPC;
    w = calloc(1, sizeof(*w));
    if (!w)
        return -ENOSPC;
    *w = (struct flight_waiter){.next = flight->waiters, .before = f->last, .worker = worker, .token = token,
                                .deadline_usec = deadline_usec, .flight = flight};
    flight->waiters = w;
    if (f->last)
        f->last->after = w;
    else
        f->first = w;
    f->last = w;
    f->n_waiters++;
    return 0;
}

void flight_landed(struct flights *f, uint32_t tenant, uint32_t space, const uint8_t key[KEY_BYTES])
{
    struct flight **at = find(f, tenant, space, key);

    if (*at)
        end_flight(f, at, FLIGHT_LANDED);
}

void flight_end(struct flights *f, uint32_t tenant, uint32_t space, const uint8_t key[KEY_BYTES], uint64_t worker)
{
    struct flight **at = find(f, tenant, space, key);

    if (*at && (*at)->worker == worker)
        end_flight(f, at, FLIGHT_GIVEN_UP);
}

void flights_worker_gone(struct flights *f, uint64_t worker)
{
    for (struct flight_waiter *w = f->first, *after; w; w = after) {
        after = w->after;
        if (w->worker != worker)
            continue;
        unlink_waiter(f, w);
        free(w);
    }
    for (int i = 0; i < BUCKETS; i++) {
        struct flight **at = &f->buckets[i];

        while (*at)
            if ((*at)->worker == worker) {
                end_flight(f, at, FLIGHT_GIVEN_UP);
                at = &f->buckets[i]; /* who was told may have changed the bucket */
            } else {
                at = &(*at)->next;
            }
    }
}

uint64_t flights_expire(struct flights *f, uint64_t now_usec)
{
    uint64_t next = UINT64_MAX;

    for (struct flight_waiter *w = f->first; w;) {
        uint64_t token = w->token;
        struct flight_waiter *after = w->after;

        if (w->deadline_usec > now_usec) {
            next = w->deadline_usec < next ? w->deadline_usec : next;
            w = after;
            continue;
        }
        unlink_waiter(f, w);
        free(w);
        f->told(f->ctx, token, FLIGHT_TIMED_OUT);
        w = f->first; /* the one told may have ended others */
        next = UINT64_MAX;
    }
    return next;
}

void flights_count(const struct flights *f, uint64_t *ret_flights, uint64_t *ret_waiters)
{
    *ret_flights = f->n_flights;
    *ret_waiters = f->n_waiters;
}
