/* A worker process for tests, driven by another.
 *
 *   worker script SOCKET                           does what each line of its input says, answers each with one line
 *   worker stress SOCKET BOARD SLOT SEED KINDS     random load until killed, counting on the board
 *
 * Script lines (N: one of 8 places, each a space with a prefix; KIND, PROMPT: tests/content.h); answers begin with "ok" or are
 * "error NUMBER message":
 *   open N KIND MAX_BLOCKS            ok BYTES FIRST_BYTES FINGERPRINT    of group 0
 *   match N PROMPT N_TOKENS [B TEXT]  ok MATCHED_TOKENS                   TEXT: extra of block B
 *   load N [verify]                   ok BLOCKS WRONG SKIPPED             blocks compared, wrong elements, (block, group) not held
 *   layers N                          ok BLOCKS WRONG SKIPPED             the same by kvd_load_begin, two threads
 *   attend N                          ok BLOCKS WRONG                     attention by the daemon, compared with that by the library
 *   publish N FIRST COUNT GROUPS      ok PUBLISHED PRESENT FAILED         a failed one: error NUMBER message
 *   spoil N FIRST COUNT               as publish, with a NaN in it
 *   trim N BLOCKS, release N          ok BLOCKS
 *   key N BLOCK                       ok HEX
 *   flight N FIRST COUNT              ok gbl...                           granted, busy, landed
 *   wait N BLOCK MSEC                 ok landed | ok given-up | ok timeout
 *   end N FIRST COUNT                 ok
 *   ping, info, fork, close N, quit   ok ... */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/libkvd/kvd.h"
#include "tests/content.h"
#include "tests/harness.h"

enum { PLACES = 8, TOKENS_MAX = 1 << 16 };

struct place {
    struct world world;
    kvd_space *space;
    kvd_prefix *prefix;
    uint32_t tokens[TOKENS_MAX];
    size_t n_tokens;
};

struct checked {
    size_t n_blocks, n_wrong, n_skipped;
};

/* ---- what both forms do ---- */

static int place_open(kvd *k, struct place *p, const char *kind, size_t max_blocks)
{
    int r;

    if (world_init(&p->world, kind) < 0)
        return KVD_E_ARG;
    r = kvd_space_open(k, &p->world.desc, &p->space);
    if (r)
        return r;
    r = kvd_prefix_create(p->space, max_blocks, &p->prefix);
    if (r)
        p->space = kvd_space_close(p->space);
    return r;
}

static void place_close(struct place *p)
{
    p->prefix = kvd_prefix_destroy(p->prefix);
    p->space = kvd_space_close(p->space);
}

static int place_match(struct place *p, uint64_t prompt, size_t n_tokens, const struct kvd_extra *extra,
                       size_t *ret_tokens)
{
    if (n_tokens > TOKENS_MAX)
        return KVD_E_ARG;
    p->n_tokens = n_tokens;
    if (p->world.desc.digest_bytes) {
        size_t n = n_tokens / p->world.desc.block_tokens, n_blocks;
        uint8_t *digests = malloc(n * p->world.desc.digest_bytes + 1);
        int r;

        if (!digests)
            return KVD_E_NOMEM;
        world_digests(&p->world, prompt, n, digests);
        r = kvd_match_digests(p->prefix, digests, n, &n_blocks);
        free(digests);
        if (!r)
            *ret_tokens = n_blocks * p->world.desc.block_tokens;
        return r;
    }
    world_tokens(&p->world, prompt, n_tokens, p->tokens);
    return kvd_match(p->prefix, p->tokens, n_tokens, extra, extra ? 1 : 0, ret_tokens);
}

static void check_blocks(struct place *p, const struct tensors *t, struct checked *c)
{
    for (size_t i = 0; i < kvd_prefix_blocks(p->prefix); i++) {
        const uint8_t *key = kvd_prefix_key(p->prefix, i);
        struct kvd_block block;

        if (!key) {
            c->n_wrong++;
            continue;
        }
        c->n_blocks++;
        for (uint32_t g = 0; g < p->world.desc.n_groups; g++) {
            if (kvd_prefix_block(p->prefix, i, g, &block)) {
                c->n_skipped++;
                continue;
            }
            c->n_wrong += content_check(&p->world, key, g, block.first, t, i * p->world.desc.block_tokens);
        }
    }
}

struct layer_helper {
    kvd_loading *loading;
    int error;
};

static void *decode_layers(void *arg)
{
    struct layer_helper *h = arg;
    int r;

    while ((r = kvd_load_work(h->loading)) == KVD_OK) {
    }
    h->error = r == KVD_E_NOT_FOUND ? KVD_OK : r;
    return NULL;
}

static int load_by_layers(struct place *p, struct tensors *t)
{
    struct layer_helper helper[2];
    pthread_t thread[2];
    kvd_loading *loading;
    int r = kvd_load_begin(p->prefix, 0, kvd_prefix_blocks(p->prefix), p->world.desc.dtype, t->kv, KVD_LOAD_VERIFY,
                           &loading);

    if (r)
        return r;
    for (int i = 0; i < 2; i++) {
        helper[i] = (struct layer_helper){loading, 0};
        if (pthread_create(&thread[i], NULL, decode_layers, &helper[i]))
            abort();
    }
    for (uint32_t l = 0; l < p->world.desc.n_layers && !r; l++) {
        r = kvd_load_wait(loading, l, 10000);
        if (!r && !kvd_load_done(loading, l))
            r = KVD_E_INTERNAL;
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(thread[i], NULL);
        r = r ? r : helper[i].error;
    }
    kvd_load_end(loading);
    return r;
}

/* Decodes what is matched and compares all of it. */
static int place_load(struct place *p, bool layers, uint32_t flags, struct checked *ret)
{
    size_t n = kvd_prefix_blocks(p->prefix);
    struct tensors t;
    int r;

    *ret = (struct checked){0};
    if (n == 0)
        return KVD_OK;
    if (tensors_init(&t, &p->world, n * p->world.desc.block_tokens))
        return KVD_E_NOMEM;
    r = layers ? load_by_layers(p, &t) : kvd_load(p->prefix, 0, n, p->world.desc.dtype, t.kv, flags);
    if (!r)
        check_blocks(p, &t, ret);
    tensors_deinit(&t);
    return r;
}

static int place_publish(struct place *p, size_t first, size_t n, uint32_t groups, bool spoil, size_t ret_counts[3])
{
    enum kvd_publish_status *status = calloc(n ? n : 1, sizeof(*status));
    struct tensors t;
    int r;

    if (!status || tensors_init(&t, &p->world, n * p->world.desc.block_tokens))
        abort();
    for (size_t i = 0; i < n; i++) {
        const uint8_t *key = kvd_prefix_key(p->prefix, first + i);

        if (!key) {
            r = KVD_E_ARG;
            goto out;
        }
        content_fill(&p->world, key, &t, i * p->world.desc.block_tokens);
    }
    if (spoil)
        memset(t.kv[0].k, 0xff, 64);
    r = kvd_publish(p->prefix, p->tokens, p->n_tokens, first, n, groups, p->world.desc.dtype, t.kv, status);
    memset(ret_counts, 0, 3 * sizeof(*ret_counts));
    for (size_t i = 0; i < n; i++)
        ret_counts[status[i] > KVD_FAILED ? KVD_FAILED : status[i]]++;
out:
    tensors_deinit(&t);
    free(status);
    return r;
}

/* ---- script ---- */

struct script {
    kvd *k;
    struct place *places;
};

static void say_error(const struct script *s, int r)
{
    printf("error %d %s: %s\n", r, kvd_strerror(r), kvd_message(s->k));
}

static void do_open(struct script *s, struct place *p, const char *args)
{
    char kind[64];
    size_t max_blocks;
    int r = sscanf(args, "%63s %zu", kind, &max_blocks) == 2 ? place_open(s->k, p, kind, max_blocks) : KVD_E_ARG;

    if (r) {
        say_error(s, r);
        return;
    }
    printf("ok %llu %llu ", (unsigned long long)kvd_space_block_bytes(p->space, 0, 0),
           (unsigned long long)kvd_space_block_bytes(p->space, 0, 1));
    for (int i = 0; i < KVD_KEY_BYTES; i++)
        printf("%02x", kvd_space_fingerprint(p->space)[i]);
    putchar('\n');
}

static void do_match(struct script *s, struct place *p, const char *args)
{
    unsigned long long prompt;
    size_t n_tokens, matched = 0;
    char text[64];
    struct kvd_extra extra = {0};
    int n = sscanf(args, "%llu %zu %zu %63s", &prompt, &n_tokens, &extra.block, text), r;

    if (n == 4) {
        extra.data = text;
        extra.n = strlen(text);
    }
    r = n >= 2 ? place_match(p, prompt, n_tokens, n == 4 ? &extra : NULL, &matched) : KVD_E_ARG;
    if (r)
        say_error(s, r);
    else
        printf("ok %zu\n", matched);
}

static void do_load(struct script *s, struct place *p, bool layers, const char *args)
{
    struct checked c;
    int r = place_load(p, layers, strstr(args, "verify") ? KVD_LOAD_VERIFY : 0, &c);

    if (r)
        say_error(s, r);
    else
        printf("ok %zu %zu %zu\n", c.n_blocks, c.n_wrong, c.n_skipped);
}

/* Attention of one query over all that is matched, in layer 0, by the daemon and here. */
static int place_attend(struct place *p, size_t *ret_wrong)
{
    enum { HEADS_MAX = 16, DIM_MAX = 1024 };
    static float q[HEADS_MAX * DIM_MAX], o[2][HEADS_MAX * DIM_MAX], lse[2][HEADS_MAX];
    const struct kvd_layer *layer = &p->world.layers[0];
    struct kvd_attention a = KVD_ATTENTION_INIT;
    uint64_t ticket;
    int r;

    a.n_heads = layer->n_kv_heads;
    a.n_tokens = 1;
    a.q = q;
    a.first_position = (uint32_t)(kvd_prefix_blocks(p->prefix) * p->world.desc.block_tokens);
    a.scale = 0.125f;
    a.n_blocks = kvd_prefix_blocks(p->prefix);
    a.dim_o = layer->dim_v ? 0 : layer->dim_k;
    if (a.n_heads > HEADS_MAX)
        return KVD_E_ARG;
    for (size_t i = 0; i < HEADS_MAX * DIM_MAX; i++)
        q[i] = (float)(i % 17) / 17 - 0.5f;
    a.o = o[0];
    a.lse = lse[0];
    r = kvd_attend_submit(p->prefix, &a, 0, &ticket);
    if (r == KVD_OK)
        r = kvd_attend_collect(p->prefix, ticket, 5000);
    a.o = o[1];
    a.lse = lse[1];
    if (r == KVD_OK)
        r = kvd_attend(p->prefix, &a, KVD_ATTEND_LOCAL);
    *ret_wrong = 0;
    for (size_t i = 0; r == KVD_OK && i < (size_t)a.n_heads * (layer->dim_v ? layer->dim_v : layer->dim_k); i++)
        *ret_wrong += !(o[0][i] - o[1][i] < 0.01f && o[1][i] - o[0][i] < 0.01f);
    return r;
}

static void do_attend(struct script *s, struct place *p)
{
    size_t n_wrong;
    int r = place_attend(p, &n_wrong);

    if (r)
        say_error(s, r);
    else
        printf("ok %zu %zu\n", kvd_prefix_blocks(p->prefix), n_wrong);
}

static void do_publish(struct script *s, struct place *p, bool spoil, const char *args)
{
    size_t first = 0, n = 0, counts[3];
    unsigned groups = 0;
    int r = sscanf(args, "%zu %zu %u", &first, &n, &groups) >= 2 ? place_publish(p, first, n, groups, spoil, counts)
                                                                 : KVD_E_ARG;

    if (r)
        say_error(s, r);
    else
        printf("ok %zu %zu %zu\n", counts[0], counts[1], counts[2]);
}

static void do_key(struct script *s, struct place *p, const char *args)
{
    size_t i = strtoull(args, NULL, 10);
    const uint8_t *key = kvd_prefix_key(p->prefix, i);

    if (!key) {
        say_error(s, KVD_E_NOT_FOUND);
        return;
    }
    printf("ok ");
    for (int b = 0; b < KVD_KEY_BYTES; b++)
        printf("%02x", key[b]);
    putchar('\n');
}

static void do_flight(struct script *s, struct place *p, const char *args)
{
    enum kvd_flight state[256];
    size_t first, n;
    int r = sscanf(args, "%zu %zu", &first, &n) == 2 && n <= 256 ? kvd_flight_begin(p->prefix, first, n, state)
                                                                 : KVD_E_ARG;

    if (r) {
        say_error(s, r);
        return;
    }
    printf("ok ");
    for (size_t i = 0; i < n; i++)
        putchar(state[i] <= KVD_FLIGHT_LANDED ? "gbl"[state[i]] : '?');
    putchar('\n');
}

static void do_wait(struct script *s, struct place *p, const char *args)
{
    size_t block;
    uint32_t msec;
    int r = sscanf(args, "%zu %u", &block, &msec) == 2 ? kvd_flight_wait(p->prefix, block, msec) : KVD_E_ARG;

    if (r == KVD_OK || r == KVD_E_NOT_FOUND || r == KVD_E_TIMEOUT)
        printf("ok %s\n", r == KVD_OK ? "landed" : r == KVD_E_TIMEOUT ? "timeout" : "given-up");
    else
        say_error(s, r);
}

/* What a forked child may and may not do. */
static void do_fork(struct script *s)
{
    pid_t pid;
    int status = 0;

    fflush(stdout);
    pid = fork();
    if (pid == 0)
        _exit(kvd_ping(s->k));
    waitpid(pid, &status, 0);
    printf("ok %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : -1);
}

static void do_info(struct script *s)
{
    struct kvd_info info = {.size = sizeof(info)};
    int r = kvd_get_info(s->k, &info);

    if (r)
        say_error(s, r);
    else
        printf("ok worker=%llu epoch=%llu reattached=%llu tenant=%s alive=%d admin=%d\n",
               (unsigned long long)info.worker, (unsigned long long)info.epoch, (unsigned long long)info.n_reattached,
               info.tenant, info.alive, info.admin);
}

static void do_place(struct script *s, const char *verb, struct place *p, const char *args)
{
    size_t first = 0, n = 0;

    if (strcmp(verb, "open") == 0)
        do_open(s, p, args);
    else if (!p->prefix)
        say_error(s, KVD_E_ARG);
    else if (strcmp(verb, "match") == 0)
        do_match(s, p, args);
    else if (strcmp(verb, "load") == 0 || strcmp(verb, "layers") == 0)
        do_load(s, p, verb[1] == 'a', args);
    else if (strcmp(verb, "attend") == 0)
        do_attend(s, p);
    else if (strcmp(verb, "publish") == 0 || strcmp(verb, "spoil") == 0)
        do_publish(s, p, verb[0] == 's', args);
    else if (strcmp(verb, "trim") == 0)
        printf("ok %zu\n", kvd_prefix_trim(p->prefix, strtoull(args, NULL, 10)));
    else if (strcmp(verb, "release") == 0)
        kvd_release(p->prefix), printf("ok %zu\n", kvd_prefix_blocks(p->prefix));
    else if (strcmp(verb, "key") == 0)
        do_key(s, p, args);
    else if (strcmp(verb, "flight") == 0)
        do_flight(s, p, args);
    else if (strcmp(verb, "wait") == 0)
        do_wait(s, p, args);
    else if (strcmp(verb, "end") == 0 && sscanf(args, "%zu %zu", &first, &n) == 2)
        n = (size_t)kvd_flight_end(p->prefix, first, n), n ? say_error(s, (int)n) : (void)puts("ok");
    else if (strcmp(verb, "close") == 0)
        place_close(p), puts("ok");
    else
        say_error(s, KVD_E_ARG);
}

static int run_script(const char *socket_path)
{
    struct kvd_options options = KVD_OPTIONS_INIT;
    struct script s = {NULL, calloc(PLACES, sizeof(struct place))};
    char line[512], verb[16], args[256];
    unsigned place;
    int r, at;

    options.socket_path = socket_path;
    options.name = "script";
    if (!s.places)
        return 1;
    r = kvd_attach(&options, &s.k);
    while (fgets(line, sizeof(line), stdin)) {
        if (sscanf(line, "%15s", verb) != 1)
            continue;
        if (strcmp(verb, "quit") == 0)
            break;
        if (r)
            say_error(&s, r);
        else if (strcmp(verb, "ping") == 0)
            (at = kvd_ping(s.k)) ? say_error(&s, at) : (void)puts("ok");
        else if (strcmp(verb, "info") == 0)
            do_info(&s);
        else if (strcmp(verb, "fork") == 0)
            do_fork(&s);
        else if (sscanf(line, "%15s %u%n", verb, &place, &at) == 2 && place < PLACES) {
            snprintf(args, sizeof(args), "%.255s", line + at);
            do_place(&s, verb, &s.places[place], args);
        } else
            say_error(&s, KVD_E_ARG);
        fflush(stdout);
    }
    for (unsigned i = 0; i < PLACES; i++)
        place_close(&s.places[i]);
    s.k = kvd_detach(s.k);
    free(s.places);
    return 0;
}

/* ---- stress ---- */

static void count_error(struct board_slot *b, int r)
{
    if (r == KVD_E_GONE || r == KVD_E_CONNECT || r == KVD_E_STALE)
        b->n_gone++;
    b->n_errors[r >= 0 && r < 32 ? r : 31]++;
}

static void use_blocks(struct place *p, struct board_slot *b, uint64_t *seed)
{
    struct checked c;
    int r = place_load(p, false, test_random(seed) % 2 ? KVD_LOAD_VERIFY : 0, &c);

    if (r) {
        count_error(b, r);
        if (r == KVD_E_CORRUPT)
            b->n_wrong++;
        return;
    }
    b->n_uses += c.n_blocks;
    b->n_wrong += c.n_wrong;
}

/* Match, check, publish the rest, match again, check, keep for a while, perhaps check again. */
static void stress_round(struct place *p, struct board_slot *b, uint64_t *seed)
{
    size_t block = p->world.desc.block_tokens;
    size_t n_blocks = 1 + test_random(seed) % 12, matched = 0, counts[3], have;
    int r = place_match(p, test_random(seed) % 512, n_blocks * block + test_random(seed) % block, NULL, &matched);

    if (r) {
        count_error(b, r);
        return;
    }
    have = matched / block;
    b->n_matched += have;
    if (have)
        use_blocks(p, b, seed);
    if (have < n_blocks && test_random(seed) % 4) {
        enum kvd_flight states[16];

        if (test_random(seed) % 4 == 0 && (r = kvd_flight_begin(p->prefix, have, n_blocks - have, states)))
            count_error(b, r);
        r = place_publish(p, have, n_blocks - have, 0, false, counts);
        if (r) {
            count_error(b, r);
        } else {
            b->n_published += counts[0];
            b->n_present += counts[1];
        }
        b->n_failed += counts[2];
        r = place_match(p, test_random(seed) % 512, n_blocks * block, NULL, &matched);
        if (r)
            count_error(b, r);
        else
            use_blocks(p, b, seed);
    }
    if (test_random(seed) % 8 == 0) { /* what is leased stays right, however long */
        test_sleep_usec(test_random(seed) % 3000);
        use_blocks(p, b, seed);
    }
    if (test_random(seed) % 2)
        kvd_release(p->prefix);
}

static int run_stress(char **argv)
{
    struct kvd_options options = KVD_OPTIONS_INIT;
    struct place *places = calloc(PLACES, sizeof(*places));
    uint64_t seed = strtoull(argv[3], NULL, 10);
    unsigned slot = (unsigned)strtoul(argv[2], NULL, 10), n = 0;
    int fd = open(argv[1], O_RDWR | O_CLOEXEC), r;
    struct board *board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    struct board_slot *b;
    kvd *k = NULL;

    if (!places || board == MAP_FAILED || slot >= HARNESS_WORKERS_MAX)
        return 1;
    b = &board->slot[slot];
    options.socket_path = argv[0];
    options.name = "stress";
    options.reattach_msec = 20;
    while ((r = kvd_attach(&options, &k)))
        count_error(b, r), test_sleep_usec(1000);
    for (char *kind = strtok(argv[4], ","); kind && n < PLACES; kind = strtok(NULL, ",")) {
        while ((r = place_open(k, &places[n], kind, 32)))
            count_error(b, r), test_sleep_usec(1000);
        n++;
    }
    for (;;) {
        struct kvd_info info = {.size = sizeof(info)};

        stress_round(&places[test_random(&seed) % n], b, &seed);
        b->n_rounds++;
        if (kvd_get_info(k, &info) == KVD_OK && info.alive) {
            b->epoch = info.epoch;
            b->alive_usec = test_usec();
        }
    }
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "script") == 0)
        return run_script(argv[2]);
    if (argc == 7 && strcmp(argv[1], "stress") == 0)
        return run_stress(argv + 2);
    fprintf(stderr, "usage: worker script SOCKET | worker stress SOCKET BOARD SLOT SEED KINDS\n");
    return 2;
}
