/* Decoding bytes that no encoder wrote: numbers come out, nothing else happens; every variant agrees with the scalar one.
 * | codec | role | dim | tokens | dtype | t0 | t1 | code bytes ... | */
#include <stdlib.h>
#include <string.h>

#include "kernels/codec/codec.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const uint32_t dims[] = {16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 512, 576};

static void take(uint8_t *to, size_t n, const uint8_t **data, size_t *size)
{
    size_t here = n < *size ? n : *size;

    memset(to, 0x5a, n);
    if (here)
        memcpy(to, *data, here);
    *data += here;
    *size -= here;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct codec_spec spec;
    struct cpu_features cpu;
    const struct codec_ops *ops;
    size_t n_examples = 0, side_bytes, code_bytes, row;
    uint32_t dim, n_tokens, t0, t1;
    enum codec_role role;
    enum codec_dtype dtype;
    uint8_t *side, *codes, *scalar, *best;

    if (size < 7)
        return 0;
    while (codec_spec_example(n_examples))
        n_examples++;
    role = data[1] % 2;
    if (codec_spec_parse(codec_spec_example(data[0] % n_examples), role, &spec, NULL) < 0)
        abort();
    dim = dims[data[2] % (sizeof(dims) / sizeof(dims[0]))];
    n_tokens = 1 + data[3] % 20;
    dtype = 1 + data[4] % 3;
    t0 = data[5] % n_tokens;
    t1 = t0 + 1 + data[6] % (n_tokens - t0);
    data += 7;
    size -= 7;
    if (codec_check(&spec, NULL, role, n_tokens, dim, NULL) < 0)
        return 0;
    side_bytes = codec_side_bytes(&spec, n_tokens, dim);
    code_bytes = codec_code_bytes(&spec, n_tokens, dim);
    row = dim * codec_dtype_bytes(dtype);
    side = malloc(side_bytes + 1);
    codes = malloc(code_bytes + 1);
    scalar = malloc(row * (t1 - t0));
    best = malloc(row * (t1 - t0));
    if (!side || !codes || !scalar || !best)
        abort();
    take(side, side_bytes, &data, &size);
    take(codes, code_bytes, &data, &size);
    cpu_detect(&cpu);
    ops = codec_ops_choose(&cpu);
    memset(scalar, 0, row * (t1 - t0));
    memset(best, 0xff, row * (t1 - t0));
    if (codec_decode(&codec_ops_scalar, &spec, NULL, side, codes, n_tokens, dim, t0, t1, dtype, scalar, row) < 0 ||
        codec_decode(ops, &spec, NULL, side, codes, n_tokens, dim, t0, t1, dtype, best, row) < 0)
        abort();
    free(side);
    free(codes);
    free(scalar);
    free(best);
    return 0;
}
