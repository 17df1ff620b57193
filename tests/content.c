#include "tests/content.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEAD_BLOCK_MAX = 64 * 576 }; /* elements of one head of one block, in any world */

uint64_t test_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* ---- worlds ---- */

struct kind {
    const char *name;
    const char *k, *v, *first_k, *first_v;
    uint32_t n_layers, n_heads, dim_k, dim_v, block, window; /* window: of the odd layers, which are then a group of their own */
    enum kvd_dtype dtype;
    uint32_t digest_bytes;
};

static const struct kind kinds[] = {
    {"raw", "raw", "raw", "raw", "raw", 2, 2, 64, 64, 16, 0, KVD_F16, 0},
    {"bf16", "raw", "raw", "raw", "raw", 2, 2, 64, 64, 16, 0, KVD_BF16, 0},
    {"default", NULL, NULL, NULL, NULL, 2, 2, 64, 64, 64, 0, KVD_F16, 0},
    {"quant", "kc4", "tq4", "", "", 2, 2, 64, 64, 16, 0, KVD_F16, 0},
    {"slide", "raw", "raw", "raw", "raw", 4, 1, 64, 64, 16, 40, KVD_F16, 0},
    {"latent", "raw", NULL, "raw", NULL, 2, 1, 576, 0, 16, 0, KVD_F16, 0},
    {"digest", "raw", "raw", "raw", "raw", 2, 2, 64, 64, 16, 0, KVD_F16, 16},
    {"wide", "raw", "raw", "raw", "raw", 8, 8, 128, 128, 64, 0, KVD_F16, 0},
    {"small-block", "raw", "raw", "raw", "raw", 2, 2, 64, 64, 8, 0, KVD_F16, 0},
};

static const struct kind *find_kind(const char *name, size_t n)
{
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
        if (strlen(kinds[i].name) == n && memcmp(kinds[i].name, name, n) == 0)
            return &kinds[i];
    return NULL;
}

int world_init(struct world *w, const char *name)
{
    const char *at = strchr(name, '@');
    const struct kind *k = find_kind(name, at ? (size_t)(at - name) : strlen(name));

    if (!k)
        return -1;
    *w = (struct world){.desc = KVD_SPACE_INIT};
    snprintf(w->model, sizeof(w->model), "test-%.40s", at ? at + 1 : k->name);
    w->desc.model = w->model;
    w->desc.revision = "1";
    w->desc.rope = "base=10000";
    w->desc.dtype = k->dtype;
    w->desc.block_tokens = k->block;
    w->desc.vocab_tokens = 50000;
    w->desc.digest_bytes = k->digest_bytes;
    w->groups[1].window_tokens = k->window;
    w->desc.groups = w->groups;
    w->desc.n_groups = k->window ? 2 : 1;
    for (uint32_t i = 0; i < k->n_layers; i++)
        w->layers[i] = (struct kvd_layer){.n_kv_heads = k->n_heads,
                                          .dim_k = k->dim_k,
                                          .dim_v = k->dim_v,
                                          .group = k->window ? i % 2 : 0,
                                          .codec_k = k->k,
                                          .codec_v = k->v,
                                          .codec_first_k = k->first_k,
                                          .codec_first_v = k->first_v};
    w->desc.layers = w->layers;
    w->desc.n_layers = k->n_layers;
    return 0;
}

static uint64_t branch(uint64_t prompt, size_t block)
{
    uint64_t state = block < WORLD_TREE_DEPTH ? prompt >> (WORLD_TREE_DEPTH - block) : prompt;

    state ^= (uint64_t)(block + 1) << 32;
    return test_random(&state);
}

void world_tokens(const struct world *w, uint64_t prompt, size_t n_tokens, uint32_t *ret)
{
    uint64_t state = 0;

    for (size_t i = 0; i < n_tokens; i++) {
        if (i % w->desc.block_tokens == 0)
            state = branch(prompt, i / w->desc.block_tokens);
        ret[i] = (uint32_t)(test_random(&state) % w->desc.vocab_tokens);
    }
}

void world_digests(const struct world *w, uint64_t prompt, size_t n, uint8_t *ret)
{
    uint64_t chain = 7;

    for (size_t i = 0; i < n; i++) {
        uint64_t state = chain ^= branch(prompt, i) * 3 + i;

        for (uint32_t b = 0; b < w->desc.digest_bytes; b++)
            ret[i * w->desc.digest_bytes + b] = (uint8_t)test_random(&state);
    }
}

/* ---- numbers ---- */

/* An integer of -128 to 127 over 64, written in the dtype. All are exact. */
static void put_element(enum kvd_dtype dtype, void *at, int8_t v)
{
    float f = (float)v / 64.0f;
    uint32_t bits;

    memcpy(&bits, &f, sizeof(bits));
    if (dtype == KVD_F32) {
        memcpy(at, &f, sizeof(f));
    } else if (dtype == KVD_BF16) {
        uint16_t h = (uint16_t)(bits >> 16);

        memcpy(at, &h, sizeof(h));
    } else {
        uint16_t h = (uint16_t)(bits >> 16 & 0x8000);

        if (v != 0)
            h |= (uint16_t)((((bits >> 23 & 0xff) - 127 + 15) << 10) | (bits >> 13 & 0x3ff));
        memcpy(at, &h, sizeof(h));
    }
}

static size_t element_bytes(const struct world *w)
{
    return w->desc.dtype == KVD_F32 ? 4 : 2;
}

/* K or V of one head of one block: [token][channel], contiguous. */
static void head_content(const struct world *w, const uint8_t *key, uint32_t layer, int is_v, uint32_t head, void *ret)
{
    uint32_t dim = is_v ? w->layers[layer].dim_v : w->layers[layer].dim_k;
    size_t n = (size_t)w->desc.block_tokens * dim, e = element_bytes(w);
    uint64_t state, word = 0;

    memcpy(&state, key, sizeof(state));
    state ^= ((uint64_t)layer << 40) ^ ((uint64_t)head << 8) ^ (uint64_t)is_v;
    for (size_t i = 0; i < n; i++) {
        if (i % 8 == 0)
            word = test_random(&state);
        put_element(w->desc.dtype, (char *)ret + i * e, (int8_t)(word >> (i % 8 * 8)));
    }
}

/* ---- tensors ---- */

int tensors_init(struct tensors *t, const struct world *w, size_t n_tokens)
{
    size_t e = element_bytes(w), off = 0;

    memset(t, 0, sizeof(*t));
    for (uint32_t l = 0; l < w->desc.n_layers; l++)
        t->bytes += n_tokens * w->layers[l].n_kv_heads * (w->layers[l].dim_k + w->layers[l].dim_v) * e;
    t->memory = malloc(t->bytes ? t->bytes : 1);
    if (!t->memory)
        return -1;
    for (uint32_t l = 0; l < w->desc.n_layers; l++) {
        const struct kvd_layer *y = &w->layers[l];
        struct kvd_kv *kv = &t->kv[l];

        kv->k = (char *)t->memory + off;
        kv->k_head_stride = y->dim_k * e;
        kv->k_token_stride = kv->k_head_stride * y->n_kv_heads;
        off += n_tokens * kv->k_token_stride;
        kv->v_head_stride = y->dim_v * e;
        kv->v_token_stride = kv->v_head_stride * y->n_kv_heads;
        kv->v = y->dim_v ? (char *)t->memory + off : NULL;
        off += n_tokens * kv->v_token_stride;
    }
    tensors_poison(t);
    return 0;
}

void tensors_deinit(struct tensors *t)
{
    free(t->memory);
    memset(t, 0, sizeof(*t));
}

void tensors_poison(struct tensors *t)
{
    memset(t->memory, 0xfd, t->bytes); /* a NaN in fp16, an absurd number in the others */
}

/* Row `token` of a head, in the tensors. */
static char *row(const struct kvd_kv *kv, int is_v, uint32_t head, size_t token)
{
    return is_v ? (char *)kv->v + token * kv->v_token_stride + head * kv->v_head_stride
                : (char *)kv->k + token * kv->k_token_stride + head * kv->k_head_stride;
}

void content_fill(const struct world *w, const uint8_t *key, struct tensors *t, size_t at)
{
    size_t e = element_bytes(w);
    char *head_block = malloc(HEAD_BLOCK_MAX * e);

    if (!head_block)
        abort();
    for (uint32_t l = 0; l < w->desc.n_layers; l++)
        for (int is_v = 0; is_v < (w->layers[l].dim_v ? 2 : 1); is_v++)
            for (uint32_t h = 0; h < w->layers[l].n_kv_heads; h++) {
                size_t dim = is_v ? w->layers[l].dim_v : w->layers[l].dim_k;

                head_content(w, key, l, is_v, h, head_block);
                for (uint32_t i = 0; i < w->desc.block_tokens; i++)
                    memcpy(row(&t->kv[l], is_v, h, at + i), head_block + i * dim * e, dim * e);
            }
    free(head_block);
}

/* Which codec holds K or V of this layer, by the rules of kvd.h. */
static const char *codec_of(const struct kvd_layer *y, int is_v, int first)
{
    const char *plain = is_v ? (y->codec_v ? y->codec_v : "tq4") : (y->codec_k ? y->codec_k : "kc4");
    const char *wide = is_v ? y->codec_first_v : y->codec_first_k;

    if (!first)
        return plain;
    if (!wide)
        return "raw";
    return *wide ? wide : plain;
}

/* Turns a head's content into what comes back from the cache. */
static int through_codec(const struct world *w, uint32_t layer, int is_v, int first, char *head_block)
{
    const char *spec = codec_of(&w->layers[layer], is_v, first);
    size_t dim = is_v ? w->layers[layer].dim_v : w->layers[layer].dim_k, bytes;
    void *code;
    int r;

    if (strcmp(spec, "raw") == 0)
        return 0;
    r = kvd_codec_bytes(spec, is_v, w->desc.block_tokens, dim, &bytes, NULL);
    if (r)
        return r;
    code = malloc(bytes);
    if (!code)
        abort();
    r = kvd_codec_encode(spec, is_v, w->desc.dtype, head_block, w->desc.block_tokens, dim, code);
    if (!r)
        r = kvd_codec_decode(spec, is_v, code, w->desc.block_tokens, dim, w->desc.dtype, head_block);
    free(code);
    return r;
}

size_t content_check(const struct world *w, const uint8_t *key, uint32_t group, int first, const struct tensors *t,
                     size_t at)
{
    size_t e = element_bytes(w), n_wrong = 0;
    char *head_block = malloc(HEAD_BLOCK_MAX * e);

    if (!head_block)
        abort();
    for (uint32_t l = 0; l < w->desc.n_layers; l++) {
        if (w->layers[l].group != group)
            continue;
        for (int is_v = 0; is_v < (w->layers[l].dim_v ? 2 : 1); is_v++)
            for (uint32_t h = 0; h < w->layers[l].n_kv_heads; h++) {
                size_t dim = is_v ? w->layers[l].dim_v : w->layers[l].dim_k;

                head_content(w, key, l, is_v, h, head_block);
                if (through_codec(w, l, is_v, first, head_block)) {
                    n_wrong += dim;
                    continue;
                }
                for (uint32_t i = 0; i < w->desc.block_tokens; i++) {
                    const char *have = row(&t->kv[l], is_v, h, at + i), *want = head_block + i * dim * e;

                    if (memcmp(have, want, dim * e) != 0)
                        for (size_t c = 0; c < dim; c++)
                            n_wrong += memcmp(have + c * e, want + c * e, e) != 0;
                }
            }
    }
    free(head_block);
    return n_wrong;
}
