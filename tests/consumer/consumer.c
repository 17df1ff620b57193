/* A worker as a user of the installed library writes it: C99 or C++, no other header of kvd's, no other library.
 *
 * Publishes a prefix that nobody has, matches it, loads it back, and compares. Exit code 0 if all is well. */
#include <kvd.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, HEADS = 2, DIM = 64, BLOCK = 16, BLOCKS = 4, TOKENS = BLOCK * BLOCKS, NUMBERS = TOKENS * HEADS * DIM };

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

/* Publishes what a model would have computed, and reads it back. */
static int share(kvd *session, kvd_prefix *prefix, const uint32_t *tokens)
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
    kvd_release(prefix);
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
    r = share(session, prefix, tokens);
    kvd_prefix_destroy(prefix);
    kvd_space_close(space);
    kvd_detach(session);
    if (r == 0)
        puts("shared a prefix with itself");
    return r;
}
