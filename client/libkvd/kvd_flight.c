#include <stdlib.h>

#include "kvd_impl.h"
#include "proto/kvd.pb-c.h"

/* Keys in one frame: 34 bytes each, far below a frame's body. */
#define KEYS_MAX 1024u

static int check_range(struct kvd_prefix *p, size_t first, size_t n)
{
    if (!p)
        return error_set(0, KVD_E_ARG, "prefix is NULL");
    if (session_forked(p->space->session))
        return session_error_forked(p->space->session);
    if (n > p->n_seq || first > p->n_seq - n)
        return error_set(p->space->session->cookie, KVD_E_ARG, "blocks %zu to %zu of a sequence of %zu", first,
                         first + n, p->n_seq);
    return prefix_key_to(p, first + n);
}

/* A life in which the space is open. */
static int bound_life(struct kvd_prefix *p, struct life **ret_life, uint16_t *ret_id)
{
    struct kvd_space *space = p->space;
    struct life *life;
    int r = session_life(space->session, true, &life);

    if (r != 0)
        return r;
    r = space_bind(space, life, life->timeout_msec);
    if (r == 0 && !space_id(space, life, ret_id))
        r = error_set(space->session->cookie, KVD_E_GONE, "the daemon was restarted just now");
    if (r != 0)
        life_unref(life);
    else
        *ret_life = life;
    return r;
}

static void fill_keys(const struct kvd_prefix *p, size_t first, size_t n, ProtobufCBinaryData *keys)
{
    for (size_t i = 0; i < n; i++) {
        keys[i].data = p->keys + (first + i) * KVD_KEY_BYTES;
        keys[i].len = KVD_KEY_BYTES;
    }
}

/* At most KEYS_MAX keys. begin: asks for them and fills ret_state; else gives them up. */
static int some_flights(struct kvd_prefix *p, struct life *life, uint16_t id, size_t first, size_t n, bool begin,
                        enum kvd_flight *ret_state)
{
    Kvd__V1__FlightBegin m = KVD__V1__FLIGHT_BEGIN__INIT; /* FlightEnd has the same fields */
    Kvd__V1__FlightBeginReply *a;
    ProtobufCBinaryData keys[KEYS_MAX];
    struct mux_reply reply = {0};
    size_t n_body;
    uint8_t *body;
    int r;

    fill_keys(p, first, n, keys);
    m.space = id;
    m.n_key = n;
    m.key = keys;
    n_body = kvd__v1__flight_begin__get_packed_size(&m);
    body = malloc(n_body);
    if (!body)
        return error_set(life->cookie, KVD_E_NOMEM, "no memory for %zu keys", n);
    kvd__v1__flight_begin__pack(&m, body);
    r = mux_request(&life->mux, begin ? FRAME_FLIGHT_BEGIN : FRAME_FLIGHT_END, body, n_body, NULL, 0,
                    life->timeout_msec, &reply);
    free(body);
    if (r != 0 || !begin) {
        mux_reply_clear(&reply);
        return r;
    }
    a = kvd__v1__flight_begin_reply__unpack(NULL, reply.n, reply.body);
    if (!a || a->n_state != n)
        r = error_set(life->cookie, KVD_E_PROTOCOL, "the answer about flights cannot be read");
    for (size_t i = 0; r == 0 && i < n; i++)
        ret_state[i] = a->state[i] == KVD__V1__FLIGHT_STATE__GRANTED     ? KVD_FLIGHT_GRANTED
                       : a->state[i] == KVD__V1__FLIGHT_STATE__IN_FLIGHT ? KVD_FLIGHT_BUSY
                                                                         : KVD_FLIGHT_LANDED;
    if (a)
        kvd__v1__flight_begin_reply__free_unpacked(a, NULL);
    mux_reply_clear(&reply);
    return r;
}

static int all_flights(struct kvd_prefix *p, size_t first, size_t n, bool begin, enum kvd_flight *ret_state)
{
    struct life *life;
    uint16_t id;
    int r = check_range(p, first, n);

    if (r != 0 || n == 0)
        return r;
    if (begin && !ret_state)
        return error_set(p->space->session->cookie, KVD_E_ARG, "ret_state is NULL");
    r = bound_life(p, &life, &id);
    if (r != 0)
        return r;
    for (size_t at = 0; at < n && r == 0; at += KEYS_MAX)
        r = some_flights(p, life, id, first + at, n - at < KEYS_MAX ? n - at : KEYS_MAX, begin,
                         ret_state ? ret_state + at : NULL);
    life_unref(life);
    return r;
}

int kvd_flight_begin(kvd_prefix *prefix, size_t first_block, size_t n, enum kvd_flight *ret_state)
{
    return all_flights(prefix, first_block, n, true, ret_state);
}

int kvd_flight_end(kvd_prefix *prefix, size_t first_block, size_t n)
{
    return all_flights(prefix, first_block, n, false, NULL);
}

int kvd_flight_wait(kvd_prefix *p, size_t block, uint32_t timeout_msec)
{
    Kvd__V1__FlightWait m = KVD__V1__FLIGHT_WAIT__INIT;
    Kvd__V1__FlightWaitReply *a;
    struct mux_reply reply = {0};
    uint8_t body[128];
    struct life *life;
    uint32_t patience;
    uint16_t id;
    int r = check_range(p, block, 1);

    if (r == 0)
        r = bound_life(p, &life, &id);
    if (r != 0)
        return r;
    m.space = id;
    m.timeout_usec = (uint64_t)timeout_msec * 1000;
    fill_keys(p, block, 1, &m.key);
    /* The daemon keeps the time; ours is for a daemon that does not. */
    patience = timeout_msec > UINT32_MAX - life->timeout_msec ? UINT32_MAX : timeout_msec + life->timeout_msec;
    r = mux_request(&life->mux, FRAME_FLIGHT_WAIT, body, kvd__v1__flight_wait__pack(&m, body), NULL, 0, patience,
                    &reply);
    if (r == 0) {
        a = kvd__v1__flight_wait_reply__unpack(NULL, reply.n, reply.body);
        if (!a)
            r = error_set(life->cookie, KVD_E_PROTOCOL, "the answer about a flight cannot be read");
        else if (!a->landed && a->timed_out)
            r = error_set(life->cookie, KVD_E_TIMEOUT, "block %zu did not land within %u ms", block, timeout_msec);
        else if (!a->landed)
            r = error_set(life->cookie, KVD_E_NOT_FOUND, "block %zu was given up", block);
        if (a)
            kvd__v1__flight_wait_reply__free_unpacked(a, NULL);
    }
    mux_reply_clear(&reply);
    life_unref(life);
    return r;
}
