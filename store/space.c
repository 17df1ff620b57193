#include "store/space.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int fail(const char *reason, const char **ret_reason)
{
    *ret_reason = reason;
    return -EINVAL;
}

static int check_layer(const struct space_layer_desc *d, const struct space_desc *desc, struct payload_layer *ret,
                       const char **ret_reason)
{
    if (d->group >= desc->n_groups)
        return fail("a layer's group is not below the number of groups", ret_reason);
    *ret = (struct payload_layer){
        .n_kv_heads = d->n_kv_heads, .dim_k = d->dim_k, .dim_v = d->dim_v, .group = d->group};
    return payload_layer_codecs(ret, (enum codec_dtype)desc->dtype, d->codec_k, d->codec_v, d->codec_first_k,
                                d->codec_first_v, ret_reason);
}

static int check_string(const char *s, bool required, const char *reason, const char **ret_reason)
{
    size_t n = s ? strlen(s) : 0;

    return (required && n == 0) || n > SPACE_STRING_MAX ? fail(reason, ret_reason) : 0;
}

static int check_desc(const struct space_desc *d, const char **ret_reason)
{
    if (check_string(d->model, true, "model name: 1 to 255 bytes", ret_reason) < 0 ||
        check_string(d->revision, false, "revision: at most 255 bytes", ret_reason) < 0 ||
        check_string(d->rope, false, "rope: at most 255 bytes", ret_reason) < 0 ||
        check_string(d->shard, false, "shard: at most 255 bytes", ret_reason) < 0)
        return -EINVAL;
    if (codec_dtype_bytes((enum codec_dtype)d->dtype) == 0)
        return fail("dtype: f16, bf16 or f32", ret_reason);
    if (d->block_tokens == 0 || d->block_tokens > SPACE_BLOCK_TOKENS_MAX)
        return fail("tokens a block: 1 to 4096", ret_reason);
    if (d->digest_bytes != 0 && (d->digest_bytes < 8 || d->digest_bytes > KEY_BYTES))
        return fail("digest bytes: 0, or 8 to 32", ret_reason);
    if (d->n_groups == 0 || d->n_groups > SPACE_GROUPS_MAX)
        return fail("layer groups: 1 to 16", ret_reason);
    if (d->n_layers == 0 || d->n_layers > SPACE_LAYERS_MAX)
        return fail("layers: 1 to 1024", ret_reason);
    return 0;
}

/* ---- canonical encoding ---- */

struct out {
    uint8_t *p;
    size_t n, cap;
};

static void put(struct out *o, const void *data, size_t n)
{
    if (o->p && o->n + n <= o->cap)
        memcpy(o->p + o->n, data, n);
    o->n += n;
}
static void put_u32(struct out *o, uint32_t value)
{
    uint32_t le = htole32(value);

    put(o, &le, sizeof(le));
}
static void put_string(struct out *o, const char *s)
{
    uint16_t le = htole16((uint16_t)strlen(s));

    put(o, &le, sizeof(le));
    put(o, s, strlen(s));
}

static void encode(struct out *o, const struct space *s, const char *domain)
{
    static const uint8_t version = 1;

    put(o, "kvd-space", 9);
    put(o, &version, 1);
    put_string(o, domain);
    put_string(o, s->model);
    put_string(o, s->revision);
    put(o, &s->dtype, 1);
    put_string(o, s->rope);
    put_string(o, s->shard);
    put_u32(o, s->block_tokens);
    put_u32(o, s->vocab_tokens);
    put_u32(o, s->digest_bytes);
    put_u32(o, s->n_groups);
    for (uint32_t g = 0; g < s->n_groups; g++)
        put_u32(o, s->window_tokens[g]);
    put_u32(o, s->n_layers);
    for (uint32_t i = 0; i < s->n_layers; i++) {
        const struct payload_layer *l = &s->layers[i];

        put_u32(o, l->n_kv_heads);
        put_u32(o, l->dim_k);
        put_u32(o, l->dim_v);
        put_u32(o, l->group);
        put(o, &l->k, sizeof(l->k));
        put(o, &l->v, sizeof(l->v));
        put(o, &l->first_k, sizeof(l->first_k));
        put(o, &l->first_v, sizeof(l->first_v));
    }
}

static int fingerprint(struct space *s, const char *domain, struct key_hasher *hasher)
{
    struct out o = {0};
    int r;

    encode(&o, s, domain);
    o = (struct out){.p = malloc(o.n), .cap = o.n};
    if (!o.p)
        return -ENOMEM;
    encode(&o, s, domain);
    r = key_digest(hasher, o.p, o.n, s->fingerprint);
    free(o.p);
    return r;
}

static char *copy(const char *s)
{
    return strdup(s ? s : "");
}

static int fill(struct space *s, const struct space_desc *d, const char *domain, struct key_hasher *hasher,
                const char **ret_reason)
{
    int r = 0;

    s->model = copy(d->model);
    s->revision = copy(d->revision);
    s->rope = copy(d->rope);
    s->shard = copy(d->shard);
    s->layers = calloc(d->n_layers, sizeof(*s->layers));
    if (!s->model || !s->revision || !s->rope || !s->shard || !s->layers)
        return -ENOMEM;
    s->dtype = d->dtype;
    s->block_tokens = d->block_tokens;
    s->vocab_tokens = d->vocab_tokens;
    s->digest_bytes = d->digest_bytes;
    s->n_groups = d->n_groups;
    s->n_layers = d->n_layers;
    memcpy(s->window_tokens, d->window_tokens, d->n_groups * sizeof(*d->window_tokens));
    for (uint32_t i = 0; i < d->n_layers && r == 0; i++)
        r = check_layer(&d->layers[i], d, &s->layers[i], ret_reason);
    for (uint32_t g = 0; g < d->n_groups && r == 0; g++) {
        r = payload_layout_create(s->layers, s->n_layers, g, false, s->block_tokens, &s->plain[g], ret_reason);
        if (r == 0)
            r = payload_layout_create(s->layers, s->n_layers, g, true, s->block_tokens, &s->first[g], ret_reason);
    }
    return r == 0 ? fingerprint(s, domain, hasher) : r;
}

int space_create(const struct space_desc *desc, const char *domain, struct key_hasher *hasher, struct space **ret_space,
                 const char **ret_reason)
{
    struct space *s;
    int r;

    *ret_reason = "";
    r = check_desc(desc, ret_reason);
    if (r < 0)
        return r;
    s = calloc(1, sizeof(*s));
    if (!s)
        return -ENOMEM;
    r = fill(s, desc, domain, hasher, ret_reason);
    if (r < 0) {
        space_destroy(s);
        return r == -ENOTSUP ? -EINVAL : r;
    }
    *ret_space = s;
    return 0;
}

struct space *space_destroy(struct space *s)
{
    if (!s)
        return NULL;
    for (uint32_t g = 0; g < SPACE_GROUPS_MAX; g++) {
        payload_layout_destroy(s->plain[g]);
        payload_layout_destroy(s->first[g]);
    }
    free(s->layers);
    free(s->model);
    free(s->revision);
    free(s->rope);
    free(s->shard);
    free(s);
    return NULL;
}
