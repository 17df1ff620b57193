/* Block keys: SHA-256 over what a block continues and what it holds.
 *
 *   key = SHA-256( parent key [32] | n_tokens u32 | tokens u32 x n | n_extra u32 | extra bytes )        all little-endian
 *
 * The first block's parent is the space's fingerprint, so that layout, codec, model and tenant domain are in every key.
 * extra is what else the content depends on (LoRA name, image digests, a salt); it is opaque and at most KEY_EXTRA_MAX.
 * docs/protocol.md has known answers.
 *
 * A hasher may be used by one thread at a time. Includes: the C library, OpenSSL in the .c. */
#ifndef KVD_PROTO_KEY_H
#define KVD_PROTO_KEY_H

#include <stddef.h>
#include <stdint.h>

#define KEY_BYTES 32u
#define KEY_EXTRA_MAX 4096u

struct key_hasher;

/* Errors: -ENOMEM, -ENOTSUP (libcrypto offers no SHA-256). Free with key_hasher_destroy(), which returns NULL. */
int key_hasher_create(struct key_hasher **ret);
struct key_hasher *key_hasher_destroy(struct key_hasher *hasher);

/* The key of one block. extra may be NULL with n_extra 0. Errors: -EINVAL (n_tokens 0, extra too long), -EIO (libcrypto). */
int key_block(struct key_hasher *hasher, const uint8_t parent[KEY_BYTES], const uint32_t *tokens, size_t n_tokens,
              const void *extra, size_t n_extra, uint8_t ret_key[KEY_BYTES]);

/* SHA-256 of plain bytes (fingerprints). */
int key_digest(struct key_hasher *hasher, const void *data, size_t n, uint8_t ret_key[KEY_BYTES]);

#endif
