#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "kvd_attend_cost.h"
#include "kvd_impl.h"

#define TIMEOUT_MSEC  10000u
#define REATTACH_MSEC 200u
/* Between two tries in a row that failed the time doubles, up to this many times reattach_msec. */
#define BACKOFF_MAX 8u

int session_error_forked(const struct kvd *session)
{
    return error_set(session->cookie, KVD_E_FORKED, "the session was made by the parent process; attach anew");
}

static void fill_life_options(const struct kvd *s, uint32_t hello_msec, struct life_options *ret)
{
    *ret = (struct life_options){
        .socket_path = s->socket_path,
        .name = s->name,
        .admin_only = s->admin_only,
        .hello_msec = hello_msec,
        .timeout_msec = s->timeout_msec,
        .cookie = s->cookie,
    };
}

/* A struct for a new life: one whose life is over, or a fresh one. By attach_lock. */
static struct life *spare_life(struct kvd *s)
{
    struct life *life;

    for (life = s->lives; life; life = life->next)
        if (atomic_load_explicit(&life->torn, memory_order_acquire))
            return life;
    life = calloc(1, sizeof(*life));
    if (life) {
        atomic_store(&life->torn, true);
        life->next = s->lives;
        s->lives = life;
    }
    return life;
}

/* Opens the spaces, as many as can be until then. One that cannot be opened now is tried again when it is used. */
static void bind_spaces(struct kvd *s, struct life *life, uint64_t until_msec)
{
    uint64_t now;

    pthread_mutex_lock(&s->list_lock);
    for (struct kvd_space *space = s->spaces; space && (now = mux_now_msec()) < until_msec; space = space->next)
        space_bind(space, life, (uint32_t)(until_msec - now));
    pthread_mutex_unlock(&s->list_lock);
}

/* Starts a life, opens the spaces in it, and makes it the current one. By attach_lock. */
static int attach_again(struct kvd *s, uint32_t wait_msec)
{
    struct life *old = atomic_load(&s->life), *fresh = spare_life(s);
    uint64_t until_msec = mux_now_msec() + wait_msec;
    struct life_options options;
    int r;

    if (!fresh)
        return error_set(s->cookie, KVD_E_NOMEM, "no memory to attach");
    fill_life_options(s, wait_msec, &options);
    r = life_start(fresh, &options, s->last_serial + 1);
    if (r != 0)
        return r;
    s->last_serial++;
    bind_spaces(s, fresh, until_msec);
    atomic_store_explicit(&s->life, fresh, memory_order_release);
    if (old) {
        atomic_fetch_add(&s->n_reattached, 1);
        mux_kill(&old->mux, KVD_E_GONE); /* whoever waits in it learns that it is over */
        life_unref(old);
    }
    return 0;
}

/* The current life, or NULL if it ended under us. */
static struct life *take_current(struct kvd *s)
{
    for (;;) {
        struct life *life = atomic_load_explicit(&s->life, memory_order_acquire);

        if (life_try_ref(life)) {
            /* It may have been torn and started again between the load and the reference; then it is the current one
             * as well. */
            return life;
        }
        if (life == atomic_load_explicit(&s->life, memory_order_acquire))
            return NULL;
    }
}

static bool time_to_try(const struct kvd *s)
{
    return mux_now_msec() >= atomic_load_explicit(&s->retry_at_msec, memory_order_relaxed);
}

bool session_may_try(struct kvd *s)
{
    uint64_t at = atomic_load(&s->retry_at_msec), now = mux_now_msec();

    return now >= at && atomic_compare_exchange_strong(&s->retry_at_msec, &at, now + s->reattach_msec);
}

static int try_again(struct kvd *s, bool wait)
{
    uint32_t backoff;
    struct life *life;
    int r = 0;

    if (!time_to_try(s))
        return KVD_E_GONE;
    if (wait)
        pthread_mutex_lock(&s->attach_lock);
    else if (pthread_mutex_trylock(&s->attach_lock) != 0)
        return KVD_E_GONE;
    life = atomic_load(&s->life);
    if (!life_alive(life)) { /* else another thread was first */
        r = time_to_try(s) ? attach_again(s, wait ? s->timeout_msec : MATCH_WAIT_MSEC) : KVD_E_GONE;
        s->n_failed = r == 0 ? 0 : s->n_failed + 1;
        backoff = s->n_failed < 2 ? 1 : s->n_failed < 4 ? 1u << (s->n_failed - 1) : BACKOFF_MAX;
        atomic_store(&s->retry_at_msec, mux_now_msec() + (uint64_t)s->reattach_msec * backoff);
    }
    pthread_mutex_unlock(&s->attach_lock);
    return r;
}

int session_life(struct kvd *s, bool wait, struct life **ret_life)
{
    struct life *life = take_current(s);
    int r;

    if (life && life_alive(life)) {
        *ret_life = life;
        return 0;
    }
    if (life)
        life_unref(life);
    r = try_again(s, wait);
    life = r == 0 ? take_current(s) : NULL;
    if (life && life_alive(life)) {
        *ret_life = life;
        return 0;
    }
    if (life)
        life_unref(life);
    return error_set(s->cookie, r == 0 || r == KVD_E_CONNECT || r == KVD_E_TIMEOUT ? KVD_E_GONE : r,
                     "the daemon at %s is gone; the next try to attach is at most %u ms away", s->socket_path,
                     s->reattach_msec * BACKOFF_MAX);
}

int session_request(struct kvd *s, uint16_t type, const void *body, size_t n, uint32_t timeout_msec,
                    struct mux_reply *ret_reply)
{
    struct life *life;
    int r = session_life(s, true, &life);

    if (r != 0)
        return r;
    r = mux_request(&life->mux, type, body, n, NULL, 0, timeout_msec, ret_reply);
    life_unref(life);
    return r;
}

/* ---- Attach, detach ---- */

static uint64_t new_cookie(const void *p)
{
    struct timespec t;
    uint64_t random = 0;

    if (getrandom(&random, sizeof(random), GRND_NONBLOCK) != sizeof(random)) {
        clock_gettime(CLOCK_MONOTONIC, &t);
        random = (uint64_t)t.tv_nsec << 32 ^ (uint64_t)t.tv_sec ^ (uintptr_t)p;
    }
    return random | 1; /* 0 is kvd_attach() itself */
}

static int check_options(const struct kvd_options *o)
{
    if (o->size < sizeof(*o))
        return error_set(0, KVD_E_ARG, "options.size is %zu; allowed: at least %zu (use KVD_OPTIONS_INIT)", o->size,
                         sizeof(*o));
    return 0;
}

static const char *default_socket(void)
{
    const char *path = secure_getenv("KVD_SOCKET");

    return path && path[0] ? path : "/run/kvd/kvd.sock";
}

static int read_form(struct kvd *s)
{
    const char *form = secure_getenv("KVD_ATTEND_FORM");

    s->attend_form = KVD_ATTEND_AUTO;
    if (!form || !form[0] || strcmp(form, "auto") == 0)
        return 0;
    if (strcmp(form, "local") == 0)
        s->attend_form = KVD_ATTEND_LOCAL;
    else if (strcmp(form, "daemon") == 0)
        s->attend_form = KVD_ATTEND_DAEMON;
    else
        return error_set(s->cookie, KVD_E_OPTION, "KVD_ATTEND_FORM is \"%s\"; allowed: auto, local, daemon", form);
    return 0;
}

static int fill_session(struct kvd *s, const struct kvd_options *o)
{
    struct cpu_features cpu;
    long page = sysconf(_SC_PAGESIZE);
    void *wiped;

    s->magic = SESSION_MAGIC;
    s->cookie = new_cookie(s);
    s->timeout_msec = o->timeout_msec ? o->timeout_msec : TIMEOUT_MSEC;
    s->reattach_msec = o->reattach_msec ? o->reattach_msec : REATTACH_MSEC;
    s->admin_only = o->admin_only != 0;
    snprintf(s->name, sizeof(s->name), "%s", o->name ? o->name : program_invocation_short_name);
    s->socket_path = strdup(o->socket_path ? o->socket_path : default_socket());
    pthread_mutex_init(&s->attach_lock, NULL);
    pthread_mutex_init(&s->list_lock, NULL);
    staging_init(&s->staging, o->staging_bytes);
    cpu_detect(&cpu);
    s->codecs = codec_ops_choose(&cpu);
    s->attn = attn_ops_choose(&cpu);
    s->crc32c = crc32c_choose(&cpu);
    wiped = mmap(NULL, (size_t)page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (wiped == MAP_FAILED || !s->socket_path) {
        if (wiped != MAP_FAILED)
            munmap(wiped, (size_t)page);
        return error_set(s->cookie, KVD_E_NOMEM, "no memory for a session");
    }
    s->wiped = wiped;
    *(uint32_t *)wiped = 1;
    if (madvise(wiped, (size_t)page, MADV_WIPEONFORK) < 0)
        return error_set(s->cookie, KVD_E_INTERNAL, "MADV_WIPEONFORK: %s (Linux 4.14 or later is needed)",
                         strerror(errno));
    return read_form(s);
}

static uint64_t now_nsec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* Attaches, and learns by the way how long a tick is: what is done meanwhile takes some 100 us. */
static int attach_first(struct kvd *s)
{
    uint64_t nsec = now_nsec(), ticks = attend_ticks(), spent;
    int r = attach_again(s, s->timeout_msec);

    while ((spent = now_nsec() - nsec) < 50000) {
    }
    ticks = attend_ticks() - ticks;
    s->nsec_per_tick = ticks ? (double)spent / (double)ticks : 1;
    return r;
}

static void free_session(struct kvd *s)
{
    bool forked = s->wiped && session_forked(s);
    struct life *life, *next;

    while (s->prefixes)
        prefix_free(s->prefixes);
    while (s->spaces)
        space_free(s->spaces);
    staging_deinit(&s->staging, forked);
    life = atomic_load(&s->life);
    if (life && !forked)
        life_unref(life);
    for (life = s->lives; life; life = next) {
        next = life->next;
        if (forked)
            life_abandon(life);
        free(life);
    }
    pthread_mutex_destroy(&s->attach_lock);
    pthread_mutex_destroy(&s->list_lock);
    if (s->wiped)
        munmap((void *)s->wiped, (size_t)sysconf(_SC_PAGESIZE));
    free(s->socket_path);
    s->magic = 0;
    free(s);
}

int kvd_attach(const struct kvd_options *options, kvd **ret)
{
    static const struct kvd_options defaults = KVD_OPTIONS_INIT;
    const struct kvd_options *o = options ? options : &defaults;
    struct kvd *s;
    int r;

    if (!ret)
        return error_set(0, KVD_E_ARG, "ret is NULL");
    r = check_options(o);
    if (r != 0)
        return r;
    s = calloc(1, sizeof(*s));
    if (!s)
        return error_set(0, KVD_E_NOMEM, "no memory for a session");
    r = fill_session(s, o);
    if (r == 0)
        r = attach_first(s);
    if (r != 0) {
        error_move(s->cookie, 0);
        free_session(s);
        return r;
    }
    atomic_store(&s->retry_at_msec, mux_now_msec());
    *ret = s;
    return KVD_OK;
}

kvd *kvd_detach(kvd *session)
{
    if (session)
        free_session(session);
    return NULL;
}

const char *kvd_message(const kvd *session)
{
    return error_get(session ? session->cookie : 0);
}

int kvd_get_info(kvd *session, struct kvd_info *info)
{
    struct kvd_info full = {0};
    struct life *life;
    size_t size;

    if (!session || !info || info->size < sizeof(info->size))
        return error_set(session ? session->cookie : 0, KVD_E_ARG, "session or info is NULL, or info.size is not set");
    if (session_forked(session))
        return session_error_forked(session);
    size = info->size < sizeof(full) ? info->size : sizeof(full);
    life = take_current(session);
    if (life) {
        full.worker = life->worker;
        full.epoch = life->epoch;
        full.admin = life->admin;
        full.alive = life_alive(life);
        memcpy(full.tenant, life->tenant, sizeof(full.tenant));
        memcpy(full.server, life->server, sizeof(full.server));
        life_unref(life);
    }
    full.n_reattached = atomic_load(&session->n_reattached);
    full.size = size;
    memcpy(info, &full, size);
    return KVD_OK;
}

int kvd_ping(kvd *session)
{
    struct life *life;
    int r;

    if (!session)
        return error_set(0, KVD_E_ARG, "session is NULL");
    if (session_forked(session))
        return session_error_forked(session);
    r = session_life(session, true, &life);
    if (r != 0)
        return r;
    r = mux_request(&life->mux, FRAME_PING, NULL, 0, NULL, 0, session->timeout_msec, NULL);
    if (r == 0)
        life_reap_slabs(life);
    life_unref(life);
    return r;
}
