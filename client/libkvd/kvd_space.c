#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kvd_attend_cost.h"
#include "kvd_impl.h"
#include "proto/kvd.pb-c.h"

#define DEFAULT_K     "kc4"
#define DEFAULT_V     "tq4"
#define DEFAULT_FIRST "raw"

enum codec_dtype dtype_of(enum kvd_dtype dtype)
{
    switch (dtype) {
    case KVD_F16:
        return CODEC_F16;
    case KVD_BF16:
        return CODEC_BF16;
    case KVD_F32:
        return CODEC_F32;
    }
    return (enum codec_dtype)0;
}

static int bad_layout(const struct kvd *s, const char *what)
{
    return error_set(s->cookie, KVD_E_LAYOUT, "%s", what);
}

static int check_desc(const struct kvd *s, const struct kvd_space_desc *d)
{
    if (d->size < sizeof(*d))
        return error_set(s->cookie, KVD_E_ARG, "desc.size is %zu; allowed: at least %zu (use KVD_SPACE_INIT)", d->size,
                         sizeof(*d));
    if (!d->model || !d->model[0] || strlen(d->model) > TEXT_MAX)
        return bad_layout(s, "model is required, 1 to 255 bytes");
    if ((d->revision && strlen(d->revision) > TEXT_MAX) || (d->rope && strlen(d->rope) > TEXT_MAX) ||
        (d->shard && strlen(d->shard) > TEXT_MAX))
        return bad_layout(s, "revision, rope or shard is longer than 255 bytes");
    if (!codec_dtype_bytes(dtype_of(d->dtype)))
        return bad_layout(s, "dtype is none of KVD_F16, KVD_BF16, KVD_F32");
    if (d->block_tokens < 1 || d->block_tokens > BLOCK_TOKENS_MAX)
        return error_set(s->cookie, KVD_E_LAYOUT, "block_tokens is %u; allowed: 1 to %d", d->block_tokens,
                         BLOCK_TOKENS_MAX);
    if (d->digest_bytes != 0 && (d->digest_bytes < 8 || d->digest_bytes > KVD_KEY_BYTES))
        return error_set(s->cookie, KVD_E_LAYOUT, "digest_bytes is %u; allowed: 0, or 8 to 32", d->digest_bytes);
    if (!d->groups || d->n_groups < 1 || d->n_groups > GROUPS_MAX)
        return error_set(s->cookie, KVD_E_LAYOUT, "n_groups is %u; allowed: 1 to %d", d->n_groups, GROUPS_MAX);
    if (!d->layers || d->n_layers < 1 || d->n_layers > LAYERS_MAX)
        return error_set(s->cookie, KVD_E_LAYOUT, "n_layers is %u; allowed: 1 to %d", d->n_layers, LAYERS_MAX);
    for (uint32_t i = 0; i < d->n_layers; i++)
        if (d->layers[i].group >= d->n_groups)
            return error_set(s->cookie, KVD_E_LAYOUT, "layer %u is in group %u of %u", i, d->layers[i].group,
                             d->n_groups);
    return 0;
}

/* The four codec texts of a layer, defaults filled in. */
struct codec_texts {
    const char *k, *v, *first_k, *first_v;
};

static struct codec_texts texts_of(const struct kvd_layer *l)
{
    struct codec_texts t;

    t.k = l->codec_k && l->codec_k[0] ? l->codec_k : DEFAULT_K;
    t.v = l->codec_v && l->codec_v[0] ? l->codec_v : DEFAULT_V;
    t.first_k = !l->codec_first_k ? DEFAULT_FIRST : l->codec_first_k[0] ? l->codec_first_k : t.k;
    t.first_v = !l->codec_first_v ? DEFAULT_FIRST : l->codec_first_v[0] ? l->codec_first_v : t.v;
    if (l->dim_v == 0)
        t.v = t.first_v = "";
    return t;
}

static int fill_layer(struct kvd_space *space, const struct kvd_space_desc *d, uint32_t i)
{
    const struct kvd_layer *l = &d->layers[i];
    struct payload_layer *p = &space->layers[i];
    struct codec_texts t = texts_of(l);
    const char *reason = "";

    *p = (struct payload_layer){.n_kv_heads = l->n_kv_heads, .dim_k = l->dim_k, .dim_v = l->dim_v, .group = l->group};
    space->layer_group[i] = l->group;
    space->layer_index[i] = space->group[l->group].n_layers++;
    space->group[l->group].raw_elements += (uint64_t)d->block_tokens * l->n_kv_heads * ((uint64_t)l->dim_k + l->dim_v);
    if (payload_layer_codecs(p, dtype_of(d->dtype), t.k, t.v, t.first_k, t.first_v, &reason) < 0)
        return error_set(space->session->cookie, KVD_E_LAYOUT,
                         "layer %u, codecs \"%s\", \"%s\", first \"%s\", \"%s\": %s", i, t.k, t.v, t.first_k, t.first_v,
                         reason);
    return 0;
}

static int fill_layouts(struct kvd_space *space)
{
    const struct kvd *s = space->session;

    for (uint32_t g = 0; g < space->n_groups; g++) {
        for (int first = 0; first < 2; first++) {
            const char *reason = "";
            int r = payload_layout_create(space->layers, space->n_layers, g, first != 0, space->block_tokens,
                                          first ? &space->group[g].first : &space->group[g].plain, &reason);

            if (r == -ENOMEM)
                return error_set(s->cookie, KVD_E_NOMEM, "no memory for a layout");
            if (r < 0)
                return error_set(s->cookie, KVD_E_LAYOUT, "group %u: %s", g, reason);
        }
    }
    return 0;
}

/* The message that opens it, kept for the next life of the daemon. */
static int pack_space(struct kvd_space *space, const struct kvd_space_desc *d)
{
    Kvd__V1__Space m = KVD__V1__SPACE__INIT;
    Kvd__V1__Group *groups = calloc(d->n_groups, sizeof(*groups));
    Kvd__V1__Group **group_at = calloc(d->n_groups, sizeof(*group_at));
    Kvd__V1__Layer *layers = calloc(d->n_layers, sizeof(*layers));
    Kvd__V1__Layer **layer_at = calloc(d->n_layers, sizeof(*layer_at));
    int r = KVD_E_NOMEM;

    if (!groups || !group_at || !layers || !layer_at)
        goto done;
    for (uint32_t i = 0; i < d->n_groups; i++) {
        group_at[i] = &groups[i];
        kvd__v1__group__init(&groups[i]);
        groups[i].window_tokens = d->groups[i].window_tokens;
    }
    for (uint32_t i = 0; i < d->n_layers; i++) {
        const struct kvd_layer *l = &d->layers[i];
        struct codec_texts t = texts_of(l);

        layer_at[i] = &layers[i];
        kvd__v1__layer__init(&layers[i]);
        layers[i].n_kv_heads = l->n_kv_heads;
        layers[i].dim_k = l->dim_k;
        layers[i].dim_v = l->dim_v;
        layers[i].group = l->group;
        layers[i].codec_k = (char *)t.k;
        layers[i].codec_v = (char *)t.v;
        layers[i].codec_first_k = (char *)t.first_k;
        layers[i].codec_first_v = (char *)t.first_v;
    }
    m.model = (char *)d->model;
    m.revision = (char *)(d->revision ? d->revision : "");
    m.rope = (char *)(d->rope ? d->rope : "");
    m.shard = (char *)(d->shard ? d->shard : "");
    m.dtype = (char *)codec_dtype_name(dtype_of(d->dtype));
    m.block_tokens = d->block_tokens;
    m.vocab_tokens = d->vocab_tokens;
    m.digest_bytes = d->digest_bytes;
    m.n_group = d->n_groups;
    m.group = group_at;
    m.n_layer = d->n_layers;
    m.layer = layer_at;
    space->n_packed = kvd__v1__space__get_packed_size(&m);
    if (space->n_packed > FRAME_BODY_MAX) {
        r = error_set(space->session->cookie, KVD_E_LAYOUT, "the description takes %zu bytes; allowed: %u",
                      space->n_packed, FRAME_BODY_MAX);
        goto done;
    }
    space->packed = malloc(space->n_packed ? space->n_packed : 1);
    if (space->packed) {
        kvd__v1__space__pack(&m, space->packed);
        r = 0;
    }
done:
    if (r == KVD_E_NOMEM)
        error_set(space->session->cookie, r, "no memory to describe a space");
    free(groups);
    free(group_at);
    free(layers);
    free(layer_at);
    return r;
}

static int take_reply(struct kvd_space *space, const struct life *life, const struct mux_reply *reply)
{
    Kvd__V1__SpaceReply *a = kvd__v1__space_reply__unpack(NULL, reply->n, reply->body);
    uint64_t cookie = space->session->cookie;
    bool known = atomic_load(&space->bound) != 0;
    int r = 0;

    if (!a || a->fingerprint.len != KVD_KEY_BYTES || a->space == 0 || a->space > UINT16_MAX ||
        a->n_payload_bytes != space->n_groups || a->n_first_payload_bytes != space->n_groups)
        r = error_set(cookie, KVD_E_PROTOCOL, "the answer about a space cannot be read");
    for (uint32_t g = 0; r == 0 && g < space->n_groups; g++)
        if (a->payload_bytes[g] != space->group[g].plain->bytes ||
            a->first_payload_bytes[g] != space->group[g].first->bytes)
            r = error_set(
                cookie, KVD_E_PROTOCOL,
                "the daemon lays out a block of group %u in %llu bytes, this library in %llu: their codecs differ", g,
                (unsigned long long)a->payload_bytes[g], (unsigned long long)space->group[g].plain->bytes);
    if (r == 0 && known && memcmp(space->fingerprint, a->fingerprint.data, KVD_KEY_BYTES) != 0)
        r = error_set(cookie, KVD_E_SPACE,
                      "the space has another fingerprint since the daemon was restarted (its tenants were changed); "
                      "open it anew");
    if (r == 0) {
        if (!known)
            memcpy(space->fingerprint, a->fingerprint.data, KVD_KEY_BYTES);
        atomic_store_explicit(&space->bound, (uint64_t)life->serial << 32 | a->space, memory_order_release);
    }
    if (a)
        kvd__v1__space_reply__free_unpacked(a, NULL);
    return r;
}

int space_bind(struct kvd_space *space, struct life *life, uint32_t timeout_msec)
{
    struct mux_reply reply = {0};
    uint16_t id;
    int r;

    if (space_id(space, life, &id))
        return 0;
    r = mux_request(&life->mux, FRAME_SPACE_OPEN, space->packed, space->n_packed, NULL, 0, timeout_msec, &reply);
    if (r == 0)
        r = take_reply(space, life, &reply);
    mux_reply_clear(&reply);
    return r;
}

static int fill_space(struct kvd_space *space, const struct kvd_space_desc *d)
{
    int r = 0;

    space->block_tokens = d->block_tokens;
    space->vocab_tokens = d->vocab_tokens;
    space->digest_bytes = d->digest_bytes;
    space->dtype = dtype_of(d->dtype);
    space->n_groups = d->n_groups;
    space->n_layers = d->n_layers;
    for (uint32_t g = 0; g < d->n_groups; g++) {
        uint64_t w = d->groups[g].window_tokens;

        space->group[g].window_tokens = (uint32_t)w;
        space->group[g].window_blocks = (uint32_t)((w + d->block_tokens - 1) / d->block_tokens);
        space->n_full_groups += w == 0;
    }
    space->layers = calloc(d->n_layers, sizeof(*space->layers));
    space->layer_group = calloc(d->n_layers, sizeof(*space->layer_group));
    space->layer_index = calloc(d->n_layers, sizeof(*space->layer_index));
    if (!space->layers || !space->layer_group || !space->layer_index)
        return error_set(space->session->cookie, KVD_E_NOMEM, "no memory for %u layers", d->n_layers);
    for (uint32_t i = 0; r == 0 && i < d->n_layers; i++)
        r = fill_layer(space, d, i);
    if (r == 0)
        r = fill_layouts(space);
    if (r == 0)
        r = pack_space(space, d);
    if (r == 0 && attend_rates_create(space) != 0)
        r = error_set(space->session->cookie, KVD_E_NOMEM, "no memory for %u layers", d->n_layers);
    return r;
}

static void free_parts(struct kvd_space *space)
{
    for (uint32_t g = 0; g < space->n_groups; g++) {
        payload_layout_destroy(space->group[g].plain);
        payload_layout_destroy(space->group[g].first);
    }
    free(space->layers);
    free(space->layer_group);
    free(space->layer_index);
    free(space->rates);
    free(space->layer_rates);
    free(space->packed);
    free(space);
}

int kvd_space_open(kvd *session, const struct kvd_space_desc *desc, kvd_space **ret)
{
    struct kvd_space *space;
    struct life *life;
    int r;

    if (!session || !desc || !ret)
        return error_set(session ? session->cookie : 0, KVD_E_ARG, "session, desc or ret is NULL");
    if (session_forked(session))
        return session_error_forked(session);
    if (session->admin_only)
        return error_set(session->cookie, KVD_E_ARG, "the session was attached with admin_only");
    r = check_desc(session, desc);
    if (r != 0)
        return r;
    space = calloc(1, sizeof(*space));
    if (!space)
        return error_set(session->cookie, KVD_E_NOMEM, "no memory for a space");
    space->session = session;
    r = fill_space(space, desc);
    if (r == 0)
        r = session_life(session, true, &life);
    if (r != 0)
        goto fail;
    r = space_bind(space, life, life->timeout_msec);
    life_unref(life);
    if (r != 0)
        goto fail;
    pthread_mutex_lock(&session->list_lock);
    space->next = session->spaces;
    if (space->next)
        space->next->prev = space;
    session->spaces = space;
    pthread_mutex_unlock(&session->list_lock);
    *ret = space;
    return KVD_OK;
fail:
    free_parts(space);
    return r;
}

static void unlink_space(struct kvd_space *space)
{
    struct kvd *s = space->session;
    bool forked = session_forked(s); /* the lock may have been held by a thread that the child does not have */

    if (!forked)
        pthread_mutex_lock(&s->list_lock);
    if (space->prev)
        space->prev->next = space->next;
    else
        s->spaces = space->next;
    if (space->next)
        space->next->prev = space->prev;
    if (!forked)
        pthread_mutex_unlock(&s->list_lock);
}

void space_free(struct kvd_space *space)
{
    unlink_space(space);
    free_parts(space);
}

/* Tells the daemon; it closes what is open by itself when the session ends, so a failure is no matter. */
static void tell_closed(struct kvd_space *space)
{
    Kvd__V1__SpaceClose close = KVD__V1__SPACE_CLOSE__INIT;
    struct kvd *s = space->session;
    struct life *life;
    uint8_t body[16];
    uint16_t id;

    life = atomic_load(&s->life);
    if (!life_try_ref(life))
        return;
    if (life_alive(life) && space_id(space, life, &id)) {
        close.space = id;
        mux_request(&life->mux, FRAME_SPACE_CLOSE, body, kvd__v1__space_close__pack(&close, body), NULL, 0,
                    s->timeout_msec, NULL);
    }
    life_unref(life);
}

static struct kvd_prefix *first_prefix_of(struct kvd_space *space)
{
    struct kvd_prefix *p;

    pthread_mutex_lock(&space->session->list_lock);
    for (p = space->session->prefixes; p && p->space != space;)
        p = p->next;
    pthread_mutex_unlock(&space->session->list_lock);
    return p;
}

kvd_space *kvd_space_close(kvd_space *space)
{
    if (!space)
        return NULL;
    if (!session_forked(space->session)) {
        struct kvd_prefix *p;

        while ((p = first_prefix_of(space)) != NULL) /* what was made from it goes with it */
            prefix_free(p);
        tell_closed(space);
    }
    space_free(space);
    return NULL;
}

const uint8_t *kvd_space_fingerprint(const kvd_space *space)
{
    return space->fingerprint;
}

uint64_t kvd_space_block_bytes(const kvd_space *space, uint32_t group, int first)
{
    return group < space->n_groups ? space_layout_of(space, group, first != 0)->bytes : 0;
}
