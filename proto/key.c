#include "key.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>

#include <openssl/evp.h>

struct key_hasher {
    EVP_MD *md;
    EVP_MD_CTX *ctx;
};

int key_hasher_create(struct key_hasher **ret)
{
    struct key_hasher *h = calloc(1, sizeof(*h));

    if (!h)
        return -ENOMEM;
    h->md = EVP_MD_fetch(NULL, "SHA256", NULL);
    h->ctx = EVP_MD_CTX_new();
    if (!h->md || !h->ctx) {
        int r = h->md ? -ENOMEM : -ENOTSUP;

        key_hasher_destroy(h);
        return r;
    }
    *ret = h;
    return 0;
}

struct key_hasher *key_hasher_destroy(struct key_hasher *h)
{
    if (h) {
        EVP_MD_CTX_free(h->ctx);
        EVP_MD_free(h->md);
        free(h);
    }
    return NULL;
}

static int update_u32(EVP_MD_CTX *ctx, size_t value)
{
    uint32_t le = htole32((uint32_t)value);

    return EVP_DigestUpdate(ctx, &le, sizeof(le));
}

static int update_tokens(EVP_MD_CTX *ctx, const uint32_t *tokens, size_t n)
{
#if __BYTE_ORDER == __LITTLE_ENDIAN
    return EVP_DigestUpdate(ctx, tokens, n * sizeof(*tokens));
#else
    for (size_t i = 0; i < n; i++)
        if (!update_u32(ctx, tokens[i]))
            return 0;
    return 1;
#endif
}

int key_block(struct key_hasher *h, const uint8_t parent[KEY_BYTES], const uint32_t *tokens, size_t n_tokens,
              const void *extra, size_t n_extra, uint8_t ret_key[KEY_BYTES])
{
    uint8_t out[KEY_BYTES]; /* parent and ret_key may be the same memory */

    if (n_tokens == 0 || n_tokens > UINT32_MAX || n_extra > KEY_EXTRA_MAX)
        return -EINVAL;
    if (!EVP_DigestInit_ex2(h->ctx, h->md, NULL) || !EVP_DigestUpdate(h->ctx, parent, KEY_BYTES) ||
        !update_u32(h->ctx, n_tokens) || !update_tokens(h->ctx, tokens, n_tokens) || !update_u32(h->ctx, n_extra) ||
        (n_extra && !EVP_DigestUpdate(h->ctx, extra, n_extra)) || !EVP_DigestFinal_ex(h->ctx, out, NULL))
        return -EIO;
    for (size_t i = 0; i < KEY_BYTES; i++)
        ret_key[i] = out[i];
    return 0;
}

int key_digest(struct key_hasher *h, const void *data, size_t n, uint8_t ret_key[KEY_BYTES])
{
    if (!EVP_DigestInit_ex2(h->ctx, h->md, NULL) || !EVP_DigestUpdate(h->ctx, data, n) ||
        !EVP_DigestFinal_ex(h->ctx, ret_key, NULL))
        return -EIO;
    return 0;
}
