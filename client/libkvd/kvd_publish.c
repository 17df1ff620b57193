/* Publish: K and V go from the caller's arrays into staging, and frames name them. One chunk of staging is cut into
 * segments, each filled for a frame of its own, so that the daemon encodes some while another is filled:
 *
 *   segment 0: fill, send ............ wait, fill, send ...
 *   segment 1:            fill, send ............ wait, ...
 *   segment 2:                       fill, send ...
 *
 * Segments of a few MiB stay in the processor's cache between our copy and the daemon's encoder. */
#include <stdlib.h>
#include <string.h>

#include "kvd_impl.h"
#include "proto/kvd.pb-c.h"

#define ALIGN_BYTES 64u
#define FRAME_ROOM  256u /* of a frame's body for what is not a block */
#define BLOCK_ROOM  16u  /* tag and length of a block in the body */
/* Blocks in one frame: enough to make the round trip small, few enough that several publishing threads of one worker
 * stay within what the daemon lets a worker have in progress (1024 by default; SEGMENTS frames a thread). */
#define FRAME_BLOCKS 64u
#define SEGMENTS     4u

struct batch {
    uint64_t off;        /* of its segment in the chunk */
    uint64_t used_bytes; /* of the segment */
    size_t body_bytes;
    size_t n;
    Kvd__V1__PublishBlock *blocks; /* room for max_items */
    Kvd__V1__PublishBlock **at;
    size_t *block_of; /* number of the block in the call's range */
    bool sent;
    struct mux_call call;
};

struct publish {
    struct kvd_prefix *prefix;
    struct kvd *session;
    struct life *life;
    uint16_t space_id;
    const uint32_t *tokens;
    size_t first_block, n_blocks;
    uint32_t groups;
    enum codec_dtype dtype;
    const struct kvd_kv *layers;
    enum kvd_publish_status *status; /* n_blocks */
    size_t max_items;
    uint8_t *body;
    struct staging_chunk *chunk; /* NULL: none taken yet */
    bool chunk_lost;             /* the daemon may still read it after we are done */
    uint64_t segment_bytes;
    unsigned n_batches, turn; /* the batch that is being filled */
    struct batch batch[SEGMENTS];
    int error; /* the first */
};

static void worsen(struct publish *u, size_t block, enum kvd_publish_status status)
{
    if (status > u->status[block])
        u->status[block] = status;
}

static void fail_batch(struct publish *u, struct batch *b, int error)
{
    for (size_t i = 0; i < b->n; i++)
        worsen(u, b->block_of[i], KVD_FAILED);
    if (u->error == 0)
        u->error = error;
}

static int take_answer(struct publish *u, struct batch *b, const struct mux_reply *reply)
{
    Kvd__V1__PublishReply *a = kvd__v1__publish_reply__unpack(NULL, reply->n, reply->body);
    size_t n_errors = 0;

    if (!a || a->n_status != b->n) {
        if (a)
            kvd__v1__publish_reply__free_unpacked(a, NULL);
        return error_set(u->session->cookie, KVD_E_PROTOCOL, "the answer to a publish cannot be read");
    }
    for (size_t i = 0; i < b->n; i++) {
        switch (a->status[i]) {
        case KVD__V1__PUBLISH_STATUS__PUBLISHED:
            break;
        case KVD__V1__PUBLISH_STATUS__PRESENT:
            worsen(u, b->block_of[i], KVD_PRESENT);
            break;
        default:
            worsen(u, b->block_of[i], KVD_FAILED);
            if (u->error == 0 && n_errors < a->n_error) {
                const Kvd__V1__Error *e = a->error[n_errors];

                u->error = e->code ? (int)e->code : KVD_E_INTERNAL;
                error_set(u->session->cookie, u->error, "block %zu: %s%s%s", u->first_block + b->block_of[i], e->reason,
                          e->allowed[0] ? "; allowed: " : "", e->allowed);
            } else if (u->error == 0) {
                u->error =
                    error_set(u->session->cookie, KVD_E_INTERNAL, "block %zu failed for a reason that the daemon kept",
                              u->first_block + b->block_of[i]);
            }
            n_errors++;
        }
    }
    kvd__v1__publish_reply__free_unpacked(a, NULL);
    return 0;
}

static void empty_batch(struct batch *b)
{
    b->n = 0;
    b->used_bytes = 0;
    b->body_bytes = FRAME_ROOM;
}

/* Waits for a batch that was sent. */
static void finish_batch(struct publish *u, struct batch *b)
{
    struct mux_reply reply = {0};
    int r;

    if (!b->sent)
        return;
    b->sent = false;
    r = mux_wait(&u->life->mux, &b->call, u->session->timeout_msec, &reply);
    if (r == 0)
        r = take_answer(u, b, &reply);
    mux_reply_clear(&reply);
    if (r != 0) {
        fail_batch(u, b, r);
        u->chunk_lost = true;
    }
    empty_batch(b);
}

static void send_batch(struct publish *u, struct batch *b)
{
    Kvd__V1__Publish m = KVD__V1__PUBLISH__INIT;
    int r;

    if (b->n == 0 || b->sent)
        return;
    m.space = u->space_id;
    m.staging = u->chunk->id;
    m.dtype = (char *)codec_dtype_name(u->dtype);
    m.n_block = b->n;
    m.block = b->at;
    r = mux_send(&u->life->mux, &b->call, FRAME_PUBLISH, u->body, kvd__v1__publish__pack(&m, u->body), NULL, 0,
                 u->session->timeout_msec);
    if (r == 0) {
        b->sent = true;
        return;
    }
    fail_batch(u, b, r);
    empty_batch(b);
}

/* ---- Filling ---- */

/* [n_tokens][n_heads][row_bytes], contiguous, from strided memory. */
static void gather(uint8_t *dst, const uint8_t *src, size_t token_stride, size_t head_stride, size_t n_tokens,
                   size_t n_heads, size_t row_bytes)
{
    if (head_stride == row_bytes && token_stride == n_heads * row_bytes) {
        memcpy(dst, src, n_tokens * token_stride);
        return;
    }
    for (size_t t = 0; t < n_tokens; t++, src += token_stride) {
        if (head_stride == row_bytes) {
            memcpy(dst, src, n_heads * row_bytes);
            dst += n_heads * row_bytes;
            continue;
        }
        for (size_t h = 0; h < n_heads; h++, dst += row_bytes)
            memcpy(dst, src + h * head_stride, row_bytes);
    }
}

static void copy_block(const struct publish *u, uint32_t group, size_t block, uint8_t *dst)
{
    const struct payload_layout *layout = u->prefix->space->group[group].plain;
    size_t n_tokens = u->prefix->space->block_tokens, bytes = codec_dtype_bytes(u->dtype);

    for (uint32_t i = 0; i < layout->n_parts; i++) {
        const struct payload_part *part = &layout->parts[i];
        const struct kvd_kv *kv = &u->layers[part->layer];
        size_t row_k = part->tile.dim_k * bytes, row_v = part->tile.dim_v * bytes;
        uint8_t *at = dst + part->raw_off[u->dtype];

        gather(at, (const uint8_t *)kv->k + block * n_tokens * kv->k_token_stride, kv->k_token_stride,
               kv->k_head_stride, n_tokens, part->n_kv_heads, row_k);
        if (row_v)
            gather(at + n_tokens * part->n_kv_heads * row_k,
                   (const uint8_t *)kv->v + block * n_tokens * kv->v_token_stride, kv->v_token_stride,
                   kv->v_head_stride, n_tokens, part->n_kv_heads, row_v);
    }
}

static void describe(const struct publish *u, size_t block, uint32_t group, Kvd__V1__PublishBlock *m)
{
    struct kvd_prefix *p = u->prefix;
    const struct kvd_space *space = p->space;
    size_t i = u->first_block + block, n_extra;
    const uint8_t *extra = prefix_extra_of(p, i, &n_extra);

    kvd__v1__publish_block__init(m);
    m->parent.data = i ? p->keys + (i - 1) * KVD_KEY_BYTES : p->space->fingerprint;
    m->parent.len = KVD_KEY_BYTES;
    if (space->digest_bytes) {
        m->digest.data = p->keys + i * KVD_KEY_BYTES;
        m->digest.len = space->digest_bytes;
    } else {
        m->token = (uint32_t *)u->tokens + i * space->block_tokens;
        m->n_token = space->block_tokens;
    }
    m->extra.data = (uint8_t *)extra;
    m->extra.len = n_extra;
    m->group = group;
    m->first = i == 0;
}

/* Takes a chunk and cuts it into as many segments as blocks fit, SEGMENTS at most. */
static int take_chunk(struct publish *u)
{
    const struct kvd_space *space = u->prefix->space;
    uint64_t largest = 0;
    int r;

    for (uint32_t g = 0; g < space->n_groups; g++)
        if ((u->groups >> g & 1) && space->group[g].plain->raw_bytes[u->dtype] > largest)
            largest = space->group[g].plain->raw_bytes[u->dtype];
    largest = (largest + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    r = staging_take(u->session, u->life, largest, SEGMENTS * largest, &u->chunk);
    if (r != 0)
        return r;
    u->n_batches = u->chunk->bytes / largest < SEGMENTS ? (unsigned)(u->chunk->bytes / largest) : SEGMENTS;
    u->segment_bytes = u->chunk->bytes / u->n_batches / ALIGN_BYTES * ALIGN_BYTES;
    for (unsigned i = 0; i < u->n_batches; i++)
        u->batch[i].off = i * u->segment_bytes;
    return 0;
}

static bool fits(const struct publish *u, const struct batch *b, uint64_t bytes, size_t body_bytes)
{
    return b->n < u->max_items && b->used_bytes + bytes <= u->segment_bytes &&
           b->body_bytes + body_bytes <= FRAME_BODY_MAX;
}

static int add_item(struct publish *u, size_t block, uint32_t group)
{
    uint64_t raw = u->prefix->space->group[group].plain->raw_bytes[u->dtype];
    uint64_t bytes = (raw + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    struct batch *b = &u->batch[u->turn];
    Kvd__V1__PublishBlock m;
    size_t body_bytes;
    int r = u->chunk ? 0 : take_chunk(u);

    if (r != 0)
        return r;
    describe(u, block, group, &m);
    m.offset = UINT64_MAX; /* the longest that it can become in the body */
    body_bytes = kvd__v1__publish_block__get_packed_size(&m) + BLOCK_ROOM;
    if (!fits(u, b, bytes, body_bytes) &&
        b->n) { /* full: it goes, and the one that has been away the longest is next */
        send_batch(u, b);
        u->turn = (u->turn + 1) % u->n_batches;
        b = &u->batch[u->turn];
        finish_batch(u, b);
        if (u->chunk_lost) /* the daemon may still read the segment: what is written there now it would take for what was */
            return u->error;
    }
    if (!fits(u, b, bytes, body_bytes))
        return error_set(u->session->cookie, KVD_E_LIMIT, "one block takes %zu bytes of a frame; allowed: %u",
                         body_bytes, FRAME_BODY_MAX - FRAME_ROOM);
    m.offset = b->off + b->used_bytes;
    copy_block(u, group, block, (uint8_t *)u->chunk->map + m.offset);
    b->blocks[b->n] = m;
    b->block_of[b->n] = block;
    b->n++;
    b->used_bytes += bytes;
    b->body_bytes += body_bytes;
    return 0;
}

static bool present(const struct publish *u, size_t block, uint32_t group)
{
    struct lookup_hit hit;

    return lookup_find(&u->life->view, u->prefix->keys + (u->first_block + block) * KVD_KEY_BYTES, u->space_id,
                       (uint8_t)group, &hit);
}

static void publish_all(struct publish *u)
{
    size_t block;
    int r = 0;

    for (block = 0; block < u->n_blocks && r == 0 && !u->chunk_lost; block++)
        for (uint32_t g = 0; g < u->prefix->space->n_groups && r == 0; g++) {
            if (!(u->groups >> g & 1))
                continue;
            if (present(u, block, g))
                worsen(u, block, KVD_PRESENT);
            else
                r = add_item(u, block, g);
            if (r != 0)
                worsen(u, block, KVD_FAILED);
        }
    if (r != 0 && u->error == 0)
        u->error = r;
    for (; block < u->n_blocks; block++)
        worsen(u, block, KVD_FAILED);
    if (u->chunk_lost)
        fail_batch(u, &u->batch[u->turn], u->error);
    else
        send_batch(u, &u->batch[u->turn]);
    for (unsigned i = 1; i <= u->n_batches; i++) /* the oldest first */
        finish_batch(u, &u->batch[(u->turn + i) % u->n_batches]);
}

/* So that the first load of what was published costs no round trip. */
static void map_new_slabs(struct publish *u)
{
    struct lookup_hit hit;
    const void *payload;

    for (size_t block = 0; block < u->n_blocks; block++)
        for (uint32_t g = 0; g < u->prefix->space->n_groups; g++)
            if (u->status[block] == KVD_PUBLISHED && (u->groups >> g & 1) &&
                lookup_find(&u->life->view, u->prefix->keys + (u->first_block + block) * KVD_KEY_BYTES, u->space_id,
                            (uint8_t)g, &hit) &&
                hit.host != SHM_LOC_NONE && life_at(u->life, hit.host, hit.bytes, &payload) != 0)
                return; /* it is only a hint */
    life_reap_slabs(u->life);
}

/* ---- Checks ---- */

static int bad_argument(const struct kvd *s, const char *what)
{
    return error_set(s->cookie, KVD_E_ARG, "%s", what);
}

static int check_layers(const struct publish *u)
{
    const struct kvd_space *space = u->prefix->space;

    for (uint32_t l = 0; l < space->n_layers; l++)
        if ((u->groups >> space->layer_group[l] & 1) &&
            (!u->layers[l].k || (space->layers[l].dim_v && !u->layers[l].v)))
            return error_set(u->session->cookie, KVD_E_ARG, "layer %u has no K or V", l);
    return 0;
}

/* Tokens that go on where the match ended make the sequence longer; those of the range must be the ones that were
 * matched. */
static int check_tokens(struct publish *u, size_t n_tokens)
{
    struct kvd_prefix *p = u->prefix;
    size_t block_tokens = p->space->block_tokens, n = n_tokens / block_tokens, end = u->first_block + u->n_blocks;
    uint8_t key[KVD_KEY_BYTES];
    int r;

    if (p->space->digest_bytes)
        return end <= p->n_seq ? 0 : bad_argument(u->session, "the range goes beyond the sequence that was matched");
    if (!u->tokens || end > n)
        return error_set(u->session->cookie, KVD_E_TOKEN, "blocks up to %zu need %zu tokens; given: %zu", end,
                         end * block_tokens, n_tokens);
    if (end > p->max_blocks)
        return error_set(u->session->cookie, KVD_E_LIMIT, "the sequence has %zu blocks; allowed by this prefix: %zu",
                         end, p->max_blocks);
    for (size_t i = u->first_block * block_tokens; p->space->vocab_tokens && i < end * block_tokens; i++)
        if (u->tokens[i] >= p->space->vocab_tokens)
            return error_set(u->session->cookie, KVD_E_TOKEN, "token %zu is %u; allowed: below %u", i, u->tokens[i],
                             p->space->vocab_tokens);
    if (end > p->n_seq) {
        memcpy(p->tokens + p->n_seq * block_tokens, u->tokens + p->n_seq * block_tokens,
               (end - p->n_seq) * block_tokens * sizeof(*p->tokens));
        p->n_seq = end;
    }
    r = prefix_key_to(p, end);
    for (size_t i = u->first_block; r == 0 && i < end; i++) {
        size_t n_extra;
        const uint8_t *extra = prefix_extra_of(p, i, &n_extra);

        if (key_block(p->hasher, i ? p->keys + (i - 1) * KVD_KEY_BYTES : p->space->fingerprint,
                      u->tokens + i * block_tokens, block_tokens, extra, n_extra, key) < 0 ||
            memcmp(key, p->keys + i * KVD_KEY_BYTES, KVD_KEY_BYTES) != 0)
            r = error_set(u->session->cookie, KVD_E_TOKEN, "the tokens of block %zu are not those that were matched",
                          i);
    }
    return r;
}

static int allocate(struct publish *u)
{
    size_t all = u->n_blocks * u->prefix->space->n_groups;

    u->max_items = u->life->publish_max_blocks < FRAME_BLOCKS ? u->life->publish_max_blocks : FRAME_BLOCKS;
    u->max_items = all < u->max_items ? all : u->max_items;
    u->body = malloc(FRAME_BODY_MAX);
    for (unsigned i = 0; i < SEGMENTS; i++) {
        struct batch *b = &u->batch[i];

        b->body_bytes = FRAME_ROOM;
        b->blocks = calloc(u->max_items, sizeof(*b->blocks));
        b->at = calloc(u->max_items, sizeof(*b->at));
        b->block_of = calloc(u->max_items, sizeof(*b->block_of));
        for (size_t k = 0; b->blocks && b->at && k < u->max_items; k++)
            b->at[k] = &b->blocks[k];
        if (!b->blocks || !b->at || !b->block_of)
            return error_set(u->session->cookie, KVD_E_NOMEM, "no memory for %zu blocks", u->max_items);
    }
    return u->body ? 0 : error_set(u->session->cookie, KVD_E_NOMEM, "no memory for a frame");
}

static void release(struct publish *u)
{
    if (u->chunk && u->chunk_lost)
        staging_discard(u->session, u->life, u->chunk);
    else if (u->chunk)
        staging_give(u->session, u->chunk);
    for (unsigned i = 0; i < SEGMENTS; i++) {
        struct batch *b = &u->batch[i];

        free(b->blocks);
        free(b->at);
        free(b->block_of);
    }
    free(u->body);
}

int kvd_publish(kvd_prefix *prefix, const uint32_t *tokens, size_t n_tokens, size_t first_block, size_t n_blocks,
                uint32_t groups, enum kvd_dtype dtype, const struct kvd_kv *layers, enum kvd_publish_status *ret_status)
{
    struct kvd_space *space = prefix ? prefix->space : NULL;
    uint32_t all_groups = space ? (uint32_t)((UINT64_C(1) << space->n_groups) - 1) : 0;
    struct publish u = {
        .prefix = prefix, .tokens = tokens, .first_block = first_block, .n_blocks = n_blocks, .layers = layers};
    int r;

    if (!prefix || !layers)
        return error_set(prefix ? space->session->cookie : 0, KVD_E_ARG, "prefix or layers is NULL");
    u.session = space->session;
    if (session_forked(u.session))
        return session_error_forked(u.session);
    u.groups = groups ? groups : all_groups;
    u.dtype = dtype_of(dtype);
    if ((u.groups & ~all_groups) != 0 || !codec_dtype_bytes(u.dtype))
        return bad_argument(u.session,
                            "groups names one that the space does not have, or dtype is none of enum kvd_dtype");
    if (n_blocks == 0)
        return KVD_OK;
    if (n_blocks > prefix->max_blocks || first_block > prefix->max_blocks)
        return bad_argument(u.session, "the range is longer than the prefix's max_blocks");
    r = check_layers(&u);
    if (r == 0)
        r = check_tokens(&u, n_tokens);
    if (r == 0)
        r = session_life(u.session, true, &u.life);
    if (r != 0)
        return r;
    u.status = calloc(n_blocks, sizeof(*u.status)); /* KVD_PUBLISHED, until it is worse */
    r = u.status ? allocate(&u) : error_set(u.session->cookie, KVD_E_NOMEM, "no memory for %zu blocks", n_blocks);
    if (r == 0)
        r = space_bind(space, u.life, u.life->timeout_msec);
    if (r == 0 && !space_id(space, u.life, &u.space_id))
        r = error_set(u.session->cookie, KVD_E_GONE, "the daemon was restarted just now");
    if (r == 0) {
        publish_all(&u);
        r = u.error;
        if (r == 0)
            map_new_slabs(&u);
        if (ret_status)
            memcpy(ret_status, u.status, n_blocks * sizeof(*ret_status));
    }
    release(&u);
    free(u.status);
    life_unref(u.life);
    return r;
}
