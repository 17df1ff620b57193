/* A worker as a stranger writes it: kvd.h, libkvd, nothing else of kvd's tree. C99 that is C++ as well, without extensions.
 *
 * Attaches ($KVD_SOCKET), publishes the K and V of two blocks of a made-up model, matches them again by their tokens, and compares
 * what is loaded with what was published, bit for bit: the space keeps them raw. */
#include <kvd.h>

#include <stdio.h>
#include <string.h>

#define BLOCK_TOKENS 16
#define N_BLOCKS 2
#define N_TOKENS (BLOCK_TOKENS * N_BLOCKS)
#define HEADS 2
#define DIM 64
#define LAYERS 2
#define NUMBERS (N_TOKENS * HEADS * DIM)

struct memory {
    uint16_t k[LAYERS][NUMBERS];
    uint16_t v[LAYERS][NUMBERS];
};

static struct memory ours, theirs;

static int failed(const char *what, int error, const kvd *session)
{
    fprintf(stderr, "%s: %s (%s)\n", what, kvd_strerror(error), kvd_message(session));
    return 1;
}

/* Token after token, in each token head after head. */
static void describe(struct memory *memory, struct kvd_kv *layers)
{
    int i;

    for (i = 0; i < LAYERS; i++) {
        layers[i].k = memory->k[i];
        layers[i].v = memory->v[i];
        layers[i].k_token_stride = layers[i].v_token_stride = HEADS * DIM * sizeof(uint16_t);
        layers[i].k_head_stride = layers[i].v_head_stride = DIM * sizeof(uint16_t);
    }
}

static int share(kvd *session, kvd_space *space, kvd_prefix *prefix)
{
    uint32_t tokens[N_TOKENS];
    struct kvd_kv layers[LAYERS];
    enum kvd_publish_status status[N_BLOCKS];
    size_t n_tokens = 99;
    int i, r;

    for (i = 0; i < N_TOKENS; i++)
        tokens[i] = (uint32_t)(1000 + i);
    for (i = 0; i < LAYERS * NUMBERS; i++) {
        ours.k[i / NUMBERS][i % NUMBERS] = (uint16_t)(0x3000 + i % 2048); /* fp16 between 1/8 and 1/2 */
        ours.v[i / NUMBERS][i % NUMBERS] = (uint16_t)(0xb000 + i % 1999);
    }

    r = kvd_match(prefix, tokens, N_TOKENS, NULL, 0, &n_tokens);
    if (r != KVD_OK)
        return failed("match", r, session);
    describe(&ours, layers);
    r = kvd_publish(prefix, tokens, N_TOKENS, 0, N_BLOCKS, 0, KVD_F16, layers, status);
    if (r != KVD_OK)
        return failed("publish", r, session);

    r = kvd_match(prefix, tokens, N_TOKENS, NULL, 0, &n_tokens);
    if (r != KVD_OK)
        return failed("match again", r, session);
    if (n_tokens != N_TOKENS || kvd_prefix_blocks(prefix) != N_BLOCKS) {
        fprintf(stderr, "%u tokens were published, %u matched\n", (unsigned)N_TOKENS, (unsigned)n_tokens);
        return 1;
    }
    describe(&theirs, layers);
    r = kvd_load(prefix, 0, N_BLOCKS, KVD_F16, layers, KVD_LOAD_VERIFY);
    if (r != KVD_OK)
        return failed("load", r, session);
    if (memcmp(&ours, &theirs, sizeof(ours)) != 0) {
        fprintf(stderr, "what was loaded is not what was published\n");
        return 1;
    }
    kvd_release(prefix);
    printf("%u tokens shared in blocks of %lu bytes\n", (unsigned)n_tokens, (unsigned long)kvd_space_block_bytes(space, 0, 0));
    return 0;
}

int main(void)
{
    struct kvd_options options = KVD_OPTIONS_INIT;
    struct kvd_space_desc desc = KVD_SPACE_INIT;
    struct kvd_group group = {0};
    struct kvd_layer layers[LAYERS];
    kvd *session = NULL;
    kvd_space *space = NULL;
    kvd_prefix *prefix = NULL;
    int i, r, rc = 1;

    r = kvd_attach(&options, &session);
    if (r != KVD_OK)
        return failed("attach", r, NULL);

    memset(layers, 0, sizeof(layers));
    for (i = 0; i < LAYERS; i++) {
        layers[i].n_kv_heads = HEADS;
        layers[i].dim_k = layers[i].dim_v = DIM;
        layers[i].codec_k = layers[i].codec_v = layers[i].codec_first_k = layers[i].codec_first_v = "raw";
    }
    desc.model = "consumer";
    desc.revision = "1";
    desc.block_tokens = BLOCK_TOKENS;
    desc.groups = &group;
    desc.n_groups = 1;
    desc.layers = layers;
    desc.n_layers = LAYERS;
    r = kvd_space_open(session, &desc, &space);
    if (r != KVD_OK) {
        failed("space", r, session);
    } else {
        r = kvd_prefix_create(space, N_BLOCKS, &prefix);
        if (r != KVD_OK)
            failed("prefix", r, session);
        else
            rc = share(session, space, prefix);
    }
    kvd_prefix_destroy(prefix);
    kvd_space_close(space);
    kvd_detach(session);
    return rc;
}
