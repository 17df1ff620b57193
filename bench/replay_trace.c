#include "bench/replay_trace.h"

#include "bench/bench.h"

#include <ctype.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct trace_key {
    uint64_t number;
    uint32_t parent, block_plus_1; /* 0 = free */
};

static int grow(void *array, size_t *room, size_t need, size_t item_bytes)
{
    void **a = array;
    size_t n = *room ? *room * 2 : 4096;
    void *p;

    if (need <= *room)
        return 0;
    p = realloc(*a, n * item_bytes);
    if (!p)
        return -ENOMEM;
    *a = p;
    *room = n;
    return 0;
}

static size_t slot_of(const struct trace *t, uint32_t parent, uint64_t number)
{
    uint64_t state = number ^ (uint64_t)parent << 32;
    size_t i = bench_random(&state) & (t->table_size - 1);

    while (t->table[i].block_plus_1 != 0 && (t->table[i].parent != parent || t->table[i].number != number))
        i = (i + 1) & (t->table_size - 1);
    return i;
}

static int table_double(struct trace *t)
{
    struct trace_key *old = t->table;
    size_t n = t->table_size;
    struct trace_key *table = calloc(n ? n * 2 : 8192, sizeof(*table));

    if (!table)
        return -ENOMEM;
    t->table = table;
    t->table_size = n ? n * 2 : 8192;
    for (size_t i = 0; i < n; i++)
        if (old[i].block_plus_1 != 0)
            t->table[slot_of(t, old[i].parent, old[i].number)] = old[i];
    free(old);
    return 0;
}

static int begin_request(struct trace *t)
{
    int r = grow(&t->first, &t->first_room, t->n_requests + 2, sizeof(*t->first));

    if (r < 0)
        return r;
    t->first[t->n_requests++] = t->n_uses;
    t->first[t->n_requests] = t->n_uses;
    return 0;
}

/* The next block of the request begun last: number under its parent, the block before. */
static int add_use(struct trace *t, uint64_t number)
{
    uint32_t parent = t->n_uses > t->first[t->n_requests - 1] ? t->uses[t->n_uses - 1] : TRACE_NO_PARENT;
    size_t i;
    int r;

    if (2 * (t->n_blocks + 1) > t->table_size && (r = table_double(t)) < 0)
        return r;
    if ((r = grow(&t->uses, &t->uses_room, t->n_uses + 1, sizeof(*t->uses))) < 0 ||
        (r = grow(&t->parent, &t->parent_room, t->n_blocks + 1, sizeof(*t->parent))) < 0)
        return r;
    i = slot_of(t, parent, number);
    if (t->table[i].block_plus_1 == 0) {
        t->parent[t->n_blocks++] = parent;
        t->table[i] = (struct trace_key){.number = number, .parent = parent, .block_plus_1 = (uint32_t)t->n_blocks};
    }
    t->uses[t->n_uses++] = t->table[i].block_plus_1 - 1;
    t->first[t->n_requests] = t->n_uses;
    return 0;
}

static const char *skip_space(const char *s)
{
    while (isspace((unsigned char)*s))
        s++;
    return s;
}

static int read_line(struct trace *t, const char *line)
{
    const char *s = strstr(line, "\"hash_ids\"");
    char *end;
    int r = begin_request(t);

    if (r < 0)
        return r;
    if (!s || *(s = skip_space(s + strlen("\"hash_ids\""))) != ':' || *(s = skip_space(s + 1)) != '[')
        return -EINVAL;
    s = skip_space(s + 1);
    if (*s == ']')
        return 0;
    for (;; s++) {
        s = skip_space(s);
        if (!isdigit((unsigned char)*s))
            return -EINVAL;
        errno = 0;
        r = add_use(t, strtoull(s, &end, 10));
        if (errno == ERANGE)
            return -EINVAL;
        if (r < 0)
            return r;
        s = skip_space(end);
        if (*s == ']')
            return 0;
        if (*s != ',')
            return -EINVAL;
    }
}

int trace_read(struct trace *t, const char *path, size_t *ret_line)
{
    FILE *f;
    char *line = NULL;
    size_t room = 0, n = 0;
    int r = 0;

    *t = (struct trace){0};
    f = fopen(path, "re");
    if (!f)
        return -errno;
    while (r == 0 && getline(&line, &room, f) > 0) {
        n++;
        if (*skip_space(line) != 0)
            r = read_line(t, line);
    }
    if (r == 0 && ferror(f))
        r = -EIO;
    if (r == 0 && t->n_uses == 0)
        r = -EINVAL;
    if (r < 0)
        *ret_line = n;
    free(line);
    fclose(f);
    return r;
}

#define MAKE_SYSTEMS  12u
#define MAKE_SESSIONS 64u
#define MAKE_REQUESTS 6000u

struct session {
    uint32_t system, n_blocks, turns_left;
    uint64_t name;
};

static int make_request(struct trace *t, const struct session *s)
{
    uint32_t n_system = 4 + s->system * 3;
    int r = begin_request(t);

    for (uint32_t i = 0; r == 0 && i < n_system; i++)
        r = add_use(t, (uint64_t)s->system << 32 | i);
    for (uint32_t i = 0; r == 0 && i < s->n_blocks; i++)
        r = add_use(t, (s->name + 1) << 40 | i);
    return r;
}

static uint32_t below(uint64_t *rng, uint32_t n)
{
    return (uint32_t)(bench_random(rng) % n);
}

static void session_begin(struct session *s, uint64_t *rng, uint64_t name)
{
    uint32_t a = below(rng, MAKE_SYSTEMS), b = below(rng, MAKE_SYSTEMS);

    *s = (struct session){
        .system = a < b ? a : b,
        .n_blocks = 1 + below(rng, 8),
        .turns_left = below(rng, 3) == 0 ? 1 : 2 + below(rng, 30),
        .name = name,
    };
}

int trace_make(struct trace *t, uint64_t seed)
{
    struct session sessions[MAKE_SESSIONS];
    uint64_t rng = seed, name = 0;
    int r = 0;

    *t = (struct trace){0};
    for (uint32_t i = 0; i < MAKE_SESSIONS; i++)
        session_begin(&sessions[i], &rng, name++);
    for (uint32_t n = 0; r == 0 && n < MAKE_REQUESTS; n++) {
        /* The smaller of two draws: some sessions are busy, others sleep long between two turns. */
        uint32_t a = below(&rng, MAKE_SESSIONS), b = below(&rng, MAKE_SESSIONS);
        struct session once, *s = &sessions[a < b ? a : b];

        if (below(&rng, 5) == 0) { /* a document that nobody asks for again */
            session_begin(&once, &rng, name++);
            once.n_blocks = 10 + below(&rng, 60);
            s = &once;
        }
        r = make_request(t, s);
        if (s != &once && --s->turns_left == 0)
            session_begin(s, &rng, name++);
        else
            s->n_blocks += 1 + below(&rng, 4);
    }
    return r;
}

void trace_deinit(struct trace *t)
{
    free(t->uses);
    free(t->first);
    free(t->parent);
    free(t->table);
    *t = (struct trace){0};
}
