#include "common.h"

#include <errno.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#define TEXT_BYTES_MAX (64u << 20)

char *common_read_file(const char *path, size_t *ret_n)
{
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    char *text = NULL, *grown;
    size_t n = 0, room = 0, got;

    if (!file)
        return NULL;
    do {
        if (n + 65536 > room) {
            room = 2 * room + 65536 + 1;
            grown = room > TEXT_BYTES_MAX ? NULL : realloc(text, room);
            if (!grown) {
                errno = room > TEXT_BYTES_MAX ? EFBIG : ENOMEM;
                goto failed;
            }
            text = grown;
        }
        got = fread(text + n, 1, 65536, file);
        n += got;
    } while (got > 0);
    if (ferror(file))
        goto failed;
    if (file != stdin)
        fclose(file);
    text[n] = '\0';
    *ret_n = n;
    return text;

failed:
    free(text);
    if (file != stdin)
        fclose(file);
    return NULL;
}

int common_digest_file(const char *path, char *ret)
{
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned char *buffer = malloc(1 << 20);
    FILE *file = fopen(path, "rb");
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    unsigned int n_digest = 0;
    int r = -1;
    size_t n;

    if (buffer && file && md && EVP_DigestInit_ex(md, EVP_sha256(), NULL) == 1) {
        while ((n = fread(buffer, 1, 1 << 20, file)) > 0 && EVP_DigestUpdate(md, buffer, n) == 1)
            ;
        if (!ferror(file) && feof(file) && EVP_DigestFinal_ex(md, digest, &n_digest) == 1 && n_digest == 32)
            r = 0;
    }
    for (unsigned int i = 0; r == 0 && i < n_digest; i++)
        sprintf(ret + 2 * i, "%02x", digest[i]);
    EVP_MD_CTX_free(md);
    if (file)
        fclose(file);
    free(buffer);
    return r;
}

/* Bytes of the UTF-8 character at p, or 0 if there is none. */
static size_t utf8_bytes(const unsigned char *p)
{
    size_t n = *p < 0x80                 ? 1
               : *p >= 0xc2 && *p < 0xe0 ? 2
               : *p >= 0xe0 && *p < 0xf0 ? 3
               : *p >= 0xf0 && *p < 0xf5 ? 4
                                         : 0;

    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    return n;
}

void common_print_json(FILE *file, const char *text)
{
    const unsigned char *p = (const unsigned char *)text;

    fputc('"', file);
    while (*p) {
        size_t n = utf8_bytes(p);

        if (*p == '"' || *p == '\\')
            fprintf(file, "\\%c", *p);
        else if (*p < 0x20)
            fprintf(file, "\\u%04x", *p);
        else if (n == 0)
            fputs("\\ufffd", file);
        else
            fwrite(p, 1, n, file);
        p += n ? n : 1;
    }
    fputc('"', file);
}
