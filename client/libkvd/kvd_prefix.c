/* Prefix objects: the sequence, its keys, and what callers may ask about it. The match itself is in kvd_match.c. */
#include <stdlib.h>
#include <string.h>

#include "kvd_attend_job.h"
#include "kvd_impl.h"

static int no_memory(const struct kvd *s, size_t n)
{
    return error_set(s->cookie, KVD_E_NOMEM, "no memory for a prefix of %zu blocks", n);
}

static int allocate(struct kvd_prefix *p)
{
    struct kvd_space *space = p->space;
    size_t n = p->max_blocks;

    if (key_hasher_create(&p->hasher) < 0)
        return error_set(space->session->cookie, KVD_E_INTERNAL, "libcrypto offers no SHA-256");
    p->keys = malloc(n * KVD_KEY_BYTES);
    if (!space->digest_bytes)
        p->tokens = malloc(n * space->block_tokens * sizeof(*p->tokens));
    if (!p->keys || (!space->digest_bytes && !p->tokens))
        return no_memory(space->session, n);
    for (uint32_t g = 0; g < space->n_groups; g++) {
        p->held[g].hits = malloc(n * sizeof(*p->held[g].hits));
        p->held[g].words = malloc(n * sizeof(*p->held[g].words));
        if (!p->held[g].hits || !p->held[g].words)
            return no_memory(space->session, n);
    }
    return 0;
}

static void free_parts(struct kvd_prefix *p)
{
    for (uint32_t g = 0; g < p->space->n_groups; g++) {
        free(p->held[g].hits);
        free(p->held[g].words);
    }
    key_hasher_destroy(p->hasher);
    free(p->keys);
    free(p->tokens);
    free(p->extras);
    free(p->extra_data);
    if (p->attend)
        attend_job_deinit(p->attend);
    free(p->attend);
    free(p);
}

int kvd_prefix_create(kvd_space *space, size_t max_blocks, kvd_prefix **ret)
{
    struct kvd *s = space ? space->session : NULL;
    struct kvd_prefix *p;
    int r;

    if (!space || !ret || max_blocks == 0 || max_blocks > UINT32_MAX / BLOCK_TOKENS_MAX)
        return error_set(s ? s->cookie : 0, KVD_E_ARG, "space or ret is NULL, or max_blocks is %zu; allowed: 1 to %u",
                         max_blocks, UINT32_MAX / BLOCK_TOKENS_MAX);
    if (session_forked(s))
        return session_error_forked(s);
    p = calloc(1, sizeof(*p));
    if (!p)
        return no_memory(s, max_blocks);
    p->space = space;
    p->max_blocks = max_blocks;
    r = allocate(p);
    if (r != 0) {
        free_parts(p);
        return r;
    }
    pthread_mutex_lock(&s->list_lock);
    p->next = s->prefixes;
    if (p->next)
        p->next->prev = p;
    s->prefixes = p;
    pthread_mutex_unlock(&s->list_lock);
    *ret = p;
    return KVD_OK;
}

void prefix_free(struct kvd_prefix *p)
{
    struct kvd *s = p->space->session;
    bool forked = session_forked(s);

    if (!forked) { /* the parent's leases stay the parent's */
        prefix_drop_leases(p);
        pthread_mutex_lock(&s->list_lock);
    }
    if (p->prev)
        p->prev->next = p->next;
    else
        s->prefixes = p->next;
    if (p->next)
        p->next->prev = p->prev;
    if (!forked)
        pthread_mutex_unlock(&s->list_lock);
    free_parts(p);
}

kvd_prefix *kvd_prefix_destroy(kvd_prefix *prefix)
{
    if (prefix)
        prefix_free(prefix);
    return NULL;
}

/* ---- Keys ---- */

const uint8_t *prefix_extra_of(const struct kvd_prefix *p, size_t block, size_t *ret_n)
{
    size_t lo = 0, hi = p->n_extras;

    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;

        if (p->extras[mid].block < block)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo < p->n_extras && p->extras[lo].block == block) {
        *ret_n = p->extras[lo].n;
        return p->extra_data + p->extras[lo].off;
    }
    *ret_n = 0;
    return NULL;
}

int prefix_key_to(struct kvd_prefix *p, size_t n)
{
    const struct kvd_space *space = p->space;

    for (; p->n_keyed < n; p->n_keyed++) {
        size_t i = p->n_keyed, n_extra;
        const uint8_t *extra = prefix_extra_of(p, i, &n_extra);
        const uint8_t *parent = i ? p->keys + (i - 1) * KVD_KEY_BYTES : space->fingerprint;

        if (key_block(p->hasher, parent, p->tokens + i * space->block_tokens, space->block_tokens, extra, n_extra,
                      p->keys + i * KVD_KEY_BYTES) < 0)
            return error_set(space->session->cookie, KVD_E_INTERNAL, "libcrypto failed to hash a block");
    }
    return 0;
}

const uint8_t *kvd_prefix_key(kvd_prefix *prefix, size_t i)
{
    if (!prefix || i >= prefix->n_seq || prefix_key_to(prefix, i + 1) != 0)
        return NULL;
    return prefix->keys + i * KVD_KEY_BYTES;
}

/* ---- What was matched ---- */

size_t kvd_prefix_blocks(const kvd_prefix *prefix)
{
    return prefix ? prefix->n_matched : 0;
}

int prefix_payload(const struct kvd_prefix *p, size_t block, uint32_t group, const void **ret)
{
    const struct lookup_hit *hit = &p->held[group].hits[block];
    uint64_t want = space_layout_of(p->space, group, (hit->flags & SHM_ENTRY_FIRST) != 0)->bytes;

    if (!life_leases_hold(p->life))
        return error_set(p->space->session->cookie, KVD_E_STALE, "the daemon has given up this session and its leases");
    if (hit->bytes != want)
        return error_set(p->space->session->cookie, KVD_E_CORRUPT,
                         "block %zu of group %u has %u bytes in the index, not %llu", block, group, hit->bytes,
                         (unsigned long long)want);
    return life_at(p->life, hit->host, hit->bytes, ret);
}

int kvd_prefix_block(const kvd_prefix *prefix, size_t i, uint32_t group, struct kvd_block *ret)
{
    const struct lookup_hit *hit;
    const void *payload;
    int r;

    if (!prefix || !ret || group >= prefix->space->n_groups)
        return error_set(prefix ? prefix->space->session->cookie : 0, KVD_E_ARG,
                         "prefix or ret is NULL, or no such group");
    if (session_forked(prefix->space->session))
        return session_error_forked(prefix->space->session);
    if (!prefix->life || !prefix_holds(prefix, group, i))
        return error_set(prefix->space->session->cookie, KVD_E_NOT_FOUND, "block %zu of group %u is not leased", i,
                         group);
    r = prefix_payload(prefix, i, group, &payload);
    if (r != 0)
        return r;
    hit = &prefix->held[group].hits[i];
    ret->payload = payload;
    ret->bytes = hit->bytes;
    ret->crc32c = hit->crc32c;
    ret->first = (hit->flags & SHM_ENTRY_FIRST) != 0;
    return KVD_OK;
}
