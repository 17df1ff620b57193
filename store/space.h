/* A space: one model's cache layout, checked, with its fingerprint and the layout of its payloads.
 *
 * Canonical encoding, hashed with SHA-256 to the fingerprint (all numbers little-endian, strings as u16 length and bytes):
 *
 *   "kvd-space" u8 version=1 | domain | model | revision | dtype u8 | rope | shard | block_tokens u32 | vocab_tokens u32 |
 *   digest_bytes u32 | n_groups u32 | { window_tokens u32 } | n_layers u32 | { n_kv_heads u32, dim_k u32, dim_v u32, group u32,
 *   codec specs K, V, first K, first V: 8 bytes each }
 *
 * So whatever differs in layout, codec, dtype, shard, model, revision or tenant domain never meets (rule I1).
 *
 * Immutable once made; any thread may read it while its owner keeps it. Includes: proto/key.h, kernels. */
#ifndef KVD_STORE_SPACE_H
#define KVD_STORE_SPACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/codec/payload.h"
#include "proto/key.h"

enum { SPACE_GROUPS_MAX = 16, SPACE_LAYERS_MAX = 1024, SPACE_BLOCK_TOKENS_MAX = 4096, SPACE_STRING_MAX = 255 };

struct space_layer_desc {
    uint32_t n_kv_heads, dim_k, dim_v, group;
    const char *codec_k, *codec_v, *codec_first_k, *codec_first_v; /* as payload_layer_codecs() takes them */
};
/* What a client says; borrowed for the call. */
struct space_desc {
    const char *model, *revision, *rope, *shard;
    uint8_t dtype; /* enum codec_dtype */
    uint32_t block_tokens, vocab_tokens, digest_bytes;
    const uint32_t *window_tokens; /* a group each */
    uint32_t n_groups;
    const struct space_layer_desc *layers;
    uint32_t n_layers;
};

struct space {
    uint32_t id; /* given by the cache */
    uint8_t fingerprint[KEY_BYTES];
    char *model, *revision, *rope, *shard;
    uint8_t dtype;
    uint32_t block_tokens, vocab_tokens, digest_bytes;
    uint32_t n_groups, n_layers;
    uint32_t window_tokens[SPACE_GROUPS_MAX];
    struct payload_layer *layers;       /* n_layers: heads, dims, group, codecs */
    struct payload_layout *plain[SPACE_GROUPS_MAX]; /* a group's blocks */
    struct payload_layout *first[SPACE_GROUPS_MAX]; /* a group's first block of a chain */
};

/* Checks desc and makes a space. Errors: -EINVAL with ret_reason (a constant sentence that says what is allowed), -ENOMEM, -EIO. */
int space_create(const struct space_desc *desc, const char *domain, struct key_hasher *hasher, struct space **ret_space,
                 const char **ret_reason);
struct space *space_destroy(struct space *space);

static inline const struct payload_layout *space_layout(const struct space *space, uint32_t group, bool first)
{
    return first ? space->first[group] : space->plain[group];
}
/* Sliding groups keep no chain: a block is of use without those before it. */
static inline bool space_group_chained(const struct space *space, uint32_t group)
{
    return space->window_tokens[group] == 0;
}

#endif
