/* Encoding any bit patterns as numbers: either refused with a reason that can be found, or bytes that every variant writes alike
 * and that decode to finite numbers.
 * | codec | role | dim | tokens | dtype | numbers ... | */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/codec/codec.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const uint32_t dims[] = {16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 512, 576};

static void check_decode(const struct codec_spec *spec, const uint8_t *side, const uint8_t *codes, uint32_t n_tokens,
                         uint32_t dim)
{
    float *out = malloc(sizeof(float) * n_tokens * dim);

    if (!out)
        abort();
    if (codec_decode(&codec_ops_scalar, spec, NULL, side, codes, n_tokens, dim, 0, n_tokens, CODEC_F32, out,
                     sizeof(float) * dim) < 0)
        abort();
    if (spec->id != CODEC_RAW) /* raw keeps what it is given, infinities and all, if that is its rule */
        for (size_t i = 0; i < (size_t)n_tokens * dim; i++)
            if (!isfinite(out[i]))
                abort();
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct codec_spec spec;
    struct codec_fault fault;
    struct cpu_features cpu;
    size_t n_examples = 0, side_bytes, code_bytes, src_bytes;
    uint32_t dim, n_tokens;
    enum codec_role role;
    enum codec_dtype dtype;
    uint8_t *src, *a, *b;
    int r, r2;

    if (size < 5)
        return 0;
    while (codec_spec_example(n_examples))
        n_examples++;
    role = data[1] % 2;
    if (codec_spec_parse(codec_spec_example(data[0] % n_examples), role, &spec, NULL) < 0)
        abort();
    dim = dims[data[2] % (sizeof(dims) / sizeof(dims[0]))];
    n_tokens = 1 + data[3] % 20;
    dtype = 1 + data[4] % 3;
    if (codec_check(&spec, NULL, role, n_tokens, dim, NULL) < 0)
        return 0;
    side_bytes = codec_side_bytes(&spec, n_tokens, dim);
    code_bytes = codec_code_bytes(&spec, n_tokens, dim);
    src_bytes = (size_t)n_tokens * dim * codec_dtype_bytes(dtype);
    src = malloc(src_bytes);
    a = malloc(side_bytes + code_bytes + 1);
    b = malloc(side_bytes + code_bytes + 1);
    if (!src || !a || !b)
        abort();
    for (size_t i = 0; i < src_bytes; i++) /* the input over and over: few bytes make a whole block */
        src[i] = size > 5 ? data[5 + i % (size - 5)] : 0;
    memset(a, 0x11, side_bytes + code_bytes + 1);
    memset(b, 0xee, side_bytes + code_bytes + 1);
    cpu_detect(&cpu);
    r = codec_encode(&codec_ops_scalar, &spec, NULL, dtype, src, src_bytes / n_tokens, n_tokens, dim, a, a + side_bytes);
    r2 = codec_encode(codec_ops_choose(&cpu), &spec, NULL, dtype, src, src_bytes / n_tokens, n_tokens, dim, b,
                      b + side_bytes);
    if ((r < 0) != (r2 < 0))
        abort();
    if (r < 0 || data[3] >= 224) { /* slow: not for all that is accepted */
        if (codec_find_refused(&spec, dtype, src, src_bytes / n_tokens, n_tokens, dim, &fault) < 0)
            abort();
        if ((r < 0) != (fault.kind != CODEC_FAULT_NONE))
            abort();
    }
    if (r == 0) {
        if (memcmp(a, b, side_bytes + code_bytes) != 0)
            abort();
        check_decode(&spec, a, a + side_bytes, n_tokens, dim);
    }
    free(src);
    free(a);
    free(b);
    return 0;
}
