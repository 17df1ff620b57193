/* A worker as a user of the installed library writes it: C99 or C++, no other header of kvd's, no other library.
 *
 * Publishes a prefix that nobody has, matches it, loads it back, attends to it without loading, and compares. Exit code 0 if all is
 * well. */
#include <kvd.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, HEADS = 2, DIM = 64, BLOCK = 16, BLOCKS = 4, TOKENS = BLOCK * BLOCKS, NUMBERS = TOKENS * HEADS * DIM };

#define LOG_TOKENS 4.158883 /* natural */

static int differ(double a, double b)
{
    double d = a < b ? b - a : a - b;

    return !(d <= 1e-3 + 1e-3 * (b < 0 ? -b : b));
}

static int failed(const char *what, int error, const kvd *session)
{
    fprintf(stderr, "%s: %s (%s)\n", what, kvd_strerror(error), kvd_message(session));
    return 1;
}

static void describe(struct kvd_space_desc *desc, struct kvd_layer *layers, struct kvd_group *group)
{
    const struct kvd_space_desc init = KVD_SPACE_INIT;
    int i;

    memset(group, 0, sizeof(*group)); /* full attention */
    memset(layers, 0, LAYERS * sizeof(*layers));
    for (i = 0; i < LAYERS; i++) {
        layers[i].n_kv_heads = HEADS;
        layers[i].dim_k = DIM;
        layers[i].dim_v = DIM;
        layers[i].codec_k = "raw"; /* so that what comes back can be compared exactly */
        layers[i].codec_v = "raw";
    }
    *desc = init;
    desc->model = "consumer";
    desc->revision = "1";
    desc->dtype = KVD_F32;
    desc->block_tokens = BLOCK;
    desc->groups = group;
    desc->n_groups = 1;
    desc->layers = layers;
    desc->n_layers = LAYERS;
}

static void point_at(struct kvd_kv *kv, float (*memory)[2][NUMBERS])
{
    int i;

    for (i = 0; i < LAYERS; i++) {
        kv[i].k = memory[i][0];
        kv[i].v = memory[i][1];
        kv[i].k_token_stride = kv[i].v_token_stride = HEADS * DIM * sizeof(float);
        kv[i].k_head_stride = kv[i].v_head_stride = DIM * sizeof(float);
    }
}

/* One query over the whole prefix: all keys weigh the same for a query of zeros, so the output is the mean of the values. Half of it on this thread, half by parts. */
static int attend(kvd *session, kvd_space *space, kvd_prefix *prefix, float (*v)[HEADS][DIM])
{
    static float q[HEADS][DIM];
    static float o[HEADS][DIM], more[HEADS][DIM];
    float lse[HEADS], more_lse[HEADS], mass[BLOCKS / 2];
    const struct kvd_attention init = KVD_ATTENTION_INIT;
    struct kvd_attention a = init;
    struct kvd_attend_costs costs;
    kvd_attending *attending = NULL;
    int h, i, t, r;

    a.layer = 1;
    a.n_heads = HEADS;
    a.q = q;
    a.first_position = TOKENS;
    a.scale = 0.125f;
    a.n_blocks = BLOCKS / 2;
    a.o = o[0];
    a.lse = lse;
    a.mass = mass;
    costs.size = sizeof(costs);
    r = kvd_attend_choose(prefix, &a, 100, &costs);
    if (r != KVD_OK)
        return failed("kvd_attend_choose", r, session);
    r = kvd_attend(prefix, &a, KVD_ATTEND_LOCAL);
    if (r != KVD_OK)
        return failed("kvd_attend", r, session);
    a.first_block = BLOCKS / 2;
    a.o = more[0];
    a.lse = more_lse;
    r = kvd_attending_create(space, &attending);
    if (r == KVD_OK)
        r = kvd_attend_begin(attending, prefix, &a, 2);
    while (r == KVD_OK)
        r = kvd_attend_work(attending);
    if (r == KVD_E_NOT_FOUND)
        r = kvd_attend_wait(attending, -1);
    kvd_attending_destroy(attending);
    if (r != KVD_OK)
        return failed("kvd_attend_begin", r, session);
    for (h = 0; h < HEADS; h++) {
        kvd_attend_merge(o[h], &lse[h], more[h], more_lse[h], DIM);
        if (differ(lse[h], LOG_TOKENS))
            return failed("the sum of the weights", 0, session);
        for (i = 0; i < DIM; i++) {
            double mean = 0;

            for (t = 0; t < TOKENS; t++)
                mean += (double)v[t][h][i] / TOKENS;
            if (differ(o[h][i], mean))
                return failed("the mean of the values", 0, session);
        }
    }
    return 0;
}

/* Publishes what a model would have computed, and reads it back. */
static int share(kvd *session, kvd_space *space, kvd_prefix *prefix, const uint32_t *tokens)
{
    static float mine[LAYERS][2][NUMBERS], theirs[LAYERS][2][NUMBERS];
    enum kvd_publish_status status[BLOCKS];
    struct kvd_kv kv[LAYERS];
    struct kvd_block block;
    size_t n = 0;
    int i, j, r;

    for (i = 0; i < LAYERS; i++)
        for (j = 0; j < NUMBERS; j++) {
            mine[i][0][j] = (float)(i * 1000 + j) / 7.0f;
            mine[i][1][j] = (float)(j - i) / 3.0f;
        }
    point_at(kv, mine);
    r = kvd_publish(prefix, tokens, TOKENS, 0, BLOCKS, 0, KVD_F32, kv, status);
    if (r != KVD_OK)
        return failed("kvd_publish", r, session);
    r = kvd_match(prefix, tokens, TOKENS, NULL, 0, &n);
    if (r != KVD_OK || n != TOKENS) {
        fprintf(stderr, "%lu tokens were found of %d\n", (unsigned long)n, TOKENS);
        return failed("kvd_match", r, session);
    }
    r = kvd_prefix_block(prefix, 1, 0, &block);
    if (r != KVD_OK || block.bytes == 0)
        return failed("kvd_prefix_block", r, session);
    point_at(kv, theirs);
    r = kvd_load(prefix, 0, BLOCKS, KVD_F32, kv, KVD_LOAD_VERIFY);
    if (r != KVD_OK)
        return failed("kvd_load", r, session);
    r = attend(session, space, prefix, (float(*)[HEADS][DIM])mine[1][1]);
    kvd_release(prefix);
    if (r != 0)
        return r;
    if (memcmp(mine, theirs, sizeof(mine)) != 0) {
        fprintf(stderr, "what was loaded is not what was published\n");
        return 1;
    }
    return 0;
}

int main(void)
{
    struct kvd_options options = KVD_OPTIONS_INIT;
    struct kvd_space_desc desc;
    struct kvd_layer layers[LAYERS];
    struct kvd_group group;
    uint32_t tokens[TOKENS];
    kvd *session = NULL;
    kvd_space *space = NULL;
    kvd_prefix *prefix = NULL;
    int i, r;

    options.name = "consumer";
    r = kvd_attach(&options, &session);
    if (r != KVD_OK)
        return failed("kvd_attach", r, NULL);
    describe(&desc, layers, &group);
    r = kvd_space_open(session, &desc, &space);
    if (r == KVD_OK)
        r = kvd_prefix_create(space, BLOCKS, &prefix);
    if (r != KVD_OK)
        return failed("kvd_space_open", r, session);
    for (i = 0; i < TOKENS; i++)
        tokens[i] = (uint32_t)(i * 17 % 1000);
    r = kvd_match(prefix, tokens, TOKENS, NULL, 0, NULL);
    if (r != KVD_OK)
        return failed("kvd_match", r, session);
    r = share(session, space, prefix, tokens);
    kvd_prefix_destroy(prefix);
    kvd_space_close(space);
    kvd_detach(session);
    if (r == 0)
        puts("shared a prefix with itself");
    return r;
}
