#include "kernels/codec/codec.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "kernels/codec/codec_num.h"

static int refuse(const char **ret_reason, int error, const char *reason)
{
    if (ret_reason)
        *ret_reason = reason;
    return error;
}

/* ---- specifications as text ---- */

static const struct {
    const char *name;
    struct codec_spec spec;
} names[] = {
    {"raw", {.id = CODEC_RAW, .dtype = CODEC_F16}},   {"bf16", {.id = CODEC_RAW, .dtype = CODEC_BF16}},
    {"f32", {.id = CODEC_RAW, .dtype = CODEC_F32}},   {"fp8", {.id = CODEC_FP8}},
    {"int8", {.id = CODEC_INT8}},                     {"uq4", {.id = CODEC_UQ4}},
    {"tq4", {.id = CODEC_TQ4}},                       {"tq3", {.id = CODEC_TQ3}},
    {"kc4", {.id = CODEC_KC4}},                       {"f16", {.id = CODEC_RAW, .dtype = CODEC_F16}},
};
#define N_NAMES (sizeof(names) / sizeof(names[0]))

/* field: where in struct codec_spec. */
static const struct {
    uint8_t id, field;
    const char *option, *value;
    uint8_t number;
} options[] = {
    {CODEC_KC4, offsetof(struct codec_spec, grid), "grid", "int", CODEC_GRID_INT},
    {CODEC_KC4, offsetof(struct codec_spec, grid), "grid", "e2m1", CODEC_GRID_E2M1},
    {CODEC_UQ4, offsetof(struct codec_spec, rule), "rule", "ultraquant", CODEC_RULE_ULTRAQUANT},
    {CODEC_UQ4, offsetof(struct codec_spec, rule), "rule", "even", CODEC_RULE_EVEN},
    {CODEC_UQ4, offsetof(struct codec_spec, rotate), "rotate", "off", 0},
    {CODEC_UQ4, offsetof(struct codec_spec, rotate), "rotate", "on", 1},
};
#define N_OPTIONS (sizeof(options) / sizeof(options[0]))

static bool word_is(const char *word, size_t n, const char *text)
{
    return strlen(text) == n && !memcmp(word, text, n);
}

/* One "option=value" of n bytes. */
static int option_parse(struct codec_spec *spec, const char *word, size_t n, uint32_t *seen, const char **ret_reason)
{
    const char *equals = memchr(word, '=', n);
    bool known = false;

    if (!equals)
        return refuse(ret_reason, -EINVAL, "a codec option is written name=value");
    for (size_t i = 0; i < N_OPTIONS; i++) {
        if (options[i].id != spec->id || !word_is(word, (size_t)(equals - word), options[i].option))
            continue;
        known = true;
        if (!word_is(equals + 1, n - 1 - (size_t)(equals - word), options[i].value))
            continue;
        if (*seen & 1u << options[i].field)
            return refuse(ret_reason, -EINVAL, "a codec option is given twice");
        *seen |= 1u << options[i].field;
        ((uint8_t *)spec)[options[i].field] = options[i].number;
        return 0;
    }
    return refuse(ret_reason, -EINVAL,
                  known ? "no such value of this codec option (kc4: grid=int|e2m1; uq4: rule=ultraquant|even, rotate=on|off)"
                        : "this codec has no such option (kc4: grid; uq4: rule, rotate; the others none)");
}

int codec_spec_parse(const char *text, enum codec_role role, struct codec_spec *ret_spec, const char **ret_reason)
{
    struct codec_spec spec = {0};
    size_t n = strcspn(text, ":");
    uint32_t seen = 0;

    for (size_t i = 0; i < N_NAMES; i++)
        if (word_is(text, n, names[i].name))
            spec = names[i].spec;
    if (!spec.id)
        return refuse(ret_reason, -EINVAL, "no such codec (raw, f16, bf16, f32, fp8, int8, uq4, tq4, tq3, kc4)");
    if (spec.id == CODEC_UQ4)
        spec.rotate = role == CODEC_K;
    text += n;
    while (*text) {
        int r;

        text++; /* the ':' or ',' */
        n = strcspn(text, ",");
        r = option_parse(&spec, text, n, &seen, ret_reason);
        if (r < 0)
            return r;
        text += n;
    }
    *ret_spec = spec;
    return 0;
}

static char *append(char *at, const char *word)
{
    return stpcpy(at, word);
}

char *codec_spec_format(const struct codec_spec *spec, char *buf)
{
    const uint8_t *bytes = (const uint8_t *)spec;
    char *at = buf;

    *buf = 0;
    for (size_t i = 0; i < N_NAMES; i++)
        if (names[i].spec.id == spec->id && names[i].spec.dtype == spec->dtype) {
            at = append(at, names[i].name);
            break;
        }
    for (size_t i = 0; i < N_OPTIONS; i++) {
        /* what is the default for either role need not be said */
        bool implied = options[i].number == 0 && options[i].field != offsetof(struct codec_spec, rotate);

        if (options[i].id != spec->id || bytes[options[i].field] != options[i].number || implied)
            continue;
        at = append(at, strchr(buf, ':') ? "," : ":");
        at = append(append(append(at, options[i].option), "="), options[i].value);
    }
    return buf;
}

const char *codec_spec_example(size_t i)
{
    static const char *const examples[] = {
        "raw", "bf16", "f32", "fp8", "int8", "kc4", "kc4:grid=e2m1", "tq4", "tq3", "uq4", "uq4:rule=even",
        "uq4:rotate=off", "uq4:rotate=on", "uq4:rule=even,rotate=off", "uq4:rule=even,rotate=on", NULL,
    };

    return i < sizeof(examples) / sizeof(examples[0]) ? examples[i] : NULL;
}

struct codec_spec codec_spec_raw(enum codec_dtype dtype)
{
    return (struct codec_spec){.id = CODEC_RAW, .dtype = (uint8_t)dtype};
}

bool codec_spec_equal(const struct codec_spec *a, const struct codec_spec *b)
{
    return !memcmp(a, b, sizeof(*a));
}

/* ---- source types ---- */

int codec_dtype_parse(const char *text, enum codec_dtype *ret_dtype)
{
    static const struct {
        const char *name;
        enum codec_dtype dtype;
    } types[] = {
        {"f16", CODEC_F16},   {"fp16", CODEC_F16},      {"float16", CODEC_F16}, {"bf16", CODEC_BF16},
        {"f32", CODEC_F32},   {"bfloat16", CODEC_BF16}, {"fp32", CODEC_F32},    {"float32", CODEC_F32},
    };

    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
        if (!strcmp(text, types[i].name)) {
            *ret_dtype = types[i].dtype;
            return 0;
        }
    return -EINVAL;
}

const char *codec_dtype_name(enum codec_dtype dtype)
{
    switch (dtype) {
    case CODEC_F16:
        return "f16";
    case CODEC_BF16:
        return "bf16";
    case CODEC_F32:
        return "f32";
    }
    return "none";
}

size_t codec_dtype_bytes(enum codec_dtype dtype)
{
    return dtype == CODEC_F32 ? 4 : dtype == CODEC_F16 || dtype == CODEC_BF16 ? 2 : 0;
}

/* ---- shapes ---- */

static bool spec_is_canonical(const struct codec_spec *spec)
{
    struct codec_spec clean = {.id = spec->id};

    switch ((enum codec_id)spec->id) {
    case CODEC_RAW:
        clean.dtype = spec->dtype;
        if (!codec_dtype_bytes(spec->dtype))
            return false;
        break;
    case CODEC_UQ4:
        clean.rule = spec->rule & 1;
        clean.rotate = spec->rotate & 1;
        break;
    case CODEC_KC4:
        clean.grid = spec->grid & 1;
        break;
    case CODEC_FP8:
    case CODEC_INT8:
    case CODEC_TQ4:
    case CODEC_TQ3:
        break;
    default:
        return false;
    }
    return codec_spec_equal(spec, &clean);
}

int codec_check(const struct codec_spec *spec, const struct codec_params *params, enum codec_role role, uint32_t n_tokens,
                uint32_t dim, const char **ret_reason)
{
    if (!spec_is_canonical(spec))
        return refuse(ret_reason, -EINVAL, "not a codec specification");
    if (role != CODEC_K && role != CODEC_V)
        return refuse(ret_reason, -EINVAL, "neither keys nor values");
    if (params && params->bytes)
        return refuse(ret_reason, -EINVAL, "this codec takes no parameters by layer and head");
    if (n_tokens < 1 || n_tokens > CODEC_TOKENS_MAX)
        return refuse(ret_reason, -EINVAL, "a block has 1 to 4096 tokens");
    if (dim < 16 || dim > CODEC_DIM_MAX || dim % 16)
        return refuse(ret_reason, -EINVAL, "a head size is a multiple of 16 from 16 to 1024");
    if (spec->id == CODEC_UQ4 && dim % 32)
        return refuse(ret_reason, -ENOTSUP, "uq4 scales groups of 32 channels: the head size must be a multiple of 32");
    if (spec->id == CODEC_UQ4 && spec->rotate && (dim & (dim - 1)))
        return refuse(ret_reason, -ENOTSUP,
                      "uq4 rotates the whole head: the head size must be a power of two, or say rotate=off");
    return 0;
}

size_t codec_side_bytes(const struct codec_spec *spec, uint32_t n_tokens, uint32_t dim)
{
    switch ((enum codec_id)spec->id) {
    case CODEC_INT8:
    case CODEC_TQ4:
    case CODEC_TQ3:
        return 2 * (size_t)n_tokens;
    case CODEC_UQ4:
        return (size_t)n_tokens * (dim / 32);
    case CODEC_KC4:
        return 4 * (size_t)dim;
    case CODEC_RAW:
    case CODEC_FP8:
        break;
    }
    return 0;
}

size_t codec_row_bytes(const struct codec_spec *spec, uint32_t dim)
{
    switch ((enum codec_id)spec->id) {
    case CODEC_RAW:
        return dim * codec_dtype_bytes(spec->dtype);
    case CODEC_FP8:
    case CODEC_INT8:
        return dim;
    case CODEC_UQ4:
    case CODEC_TQ4:
    case CODEC_KC4:
        return dim / 2;
    case CODEC_TQ3:
        return dim / 8 * 3;
    }
    return 0;
}

size_t codec_code_bytes(const struct codec_spec *spec, uint32_t n_tokens, uint32_t dim)
{
    return n_tokens * codec_row_bytes(spec, dim);
}

/* ---- variants ---- */

const struct codec_ops *codec_ops_choose(const struct cpu_features *cpu)
{
    if (cpu && cpu->avx512)
        return &codec_ops_avx512;
    if (cpu && cpu->avx2)
        return &codec_ops_avx2;
    return &codec_ops_scalar;
}

static int stride_check(enum codec_dtype dtype, size_t stride_bytes, uint32_t n_tokens, uint32_t dim)
{
    size_t row_bytes = dim * codec_dtype_bytes(dtype);

    return !row_bytes || (n_tokens > 1 && stride_bytes < row_bytes) || stride_bytes > PTRDIFF_MAX / CODEC_TOKENS_MAX ? -EINVAL
                                                                                                                 : 0;
}

int codec_encode(const struct codec_ops *ops, const struct codec_spec *spec, const struct codec_params *params,
                 enum codec_dtype dtype, const void *src, size_t stride_bytes, uint32_t n_tokens, uint32_t dim, void *side,
                 void *codes)
{
    int r = codec_check(spec, params, CODEC_K, n_tokens, dim, NULL);

    if (r < 0)
        return r;
    r = stride_check(dtype, stride_bytes, n_tokens, dim);
    if (r < 0)
        return r;
    return ops->encode(spec, dtype, src, stride_bytes, n_tokens, dim, side, codes);
}

int codec_decode(const struct codec_ops *ops, const struct codec_spec *spec, const struct codec_params *params,
                 const void *side, const void *codes, uint32_t n_tokens, uint32_t dim, uint32_t t0, uint32_t t1,
                 enum codec_dtype dtype, void *dst, size_t stride_bytes)
{
    int r = codec_check(spec, params, CODEC_K, n_tokens, dim, NULL);

    if (r < 0)
        return r;
    if (t0 > t1 || t1 > n_tokens)
        return -EINVAL;
    r = stride_check(dtype, stride_bytes, t1 - t0, dim);
    if (r < 0)
        return r;
    ops->decode(spec, side, codes, n_tokens, dim, t0, t1, dtype, dst, stride_bytes);
    return 0;
}

/* ---- which value was it ---- */

static float value_at(enum codec_dtype dtype, const void *row, uint32_t i)
{
    const uint8_t *p = row;

    switch (dtype) {
    case CODEC_F16:
        return f16_to_f32(load_u16(p + 2 * i));
    case CODEC_BF16:
        return bf16_to_f32(load_u16(p + 2 * i));
    case CODEC_F32:
        break;
    }
    return f32_from_bits(load_u32(p + 4 * i));
}

/* One token alone: does the codec refuse it? A token that is fine alone is fine in its block, for every codec. */
static bool token_is_refused(const struct codec_spec *spec, enum codec_dtype dtype, const void *row, uint32_t dim)
{
    uint8_t side[4 * CODEC_DIM_MAX], codes[4 * CODEC_DIM_MAX];

    return codec_ops_scalar.encode(spec, dtype, row, 0, 1, dim, side, codes) == -EDOM;
}

static bool is_worse(float value, const struct codec_fault *than)
{
    enum codec_fault_kind kind = isnan(value) ? CODEC_FAULT_NAN : isinf(value) ? CODEC_FAULT_INF : CODEC_FAULT_RANGE;

    if (than->kind == CODEC_FAULT_NONE)
        return true;
    if (than->kind != CODEC_FAULT_RANGE)
        return false; /* the first NaN or infinity stays */
    return kind != CODEC_FAULT_RANGE || fabsf(value) > fabsf(than->value);
}

int codec_find_refused(const struct codec_spec *spec, enum codec_dtype dtype, const void *src, size_t stride_bytes,
                       uint32_t n_tokens, uint32_t dim, struct codec_fault *ret_fault)
{
    struct codec_fault fault = {0};
    int r = codec_check(spec, NULL, CODEC_K, n_tokens, dim, NULL);

    if (r < 0 || stride_check(dtype, stride_bytes, n_tokens, dim) < 0)
        return r < 0 ? r : -EINVAL;
    for (uint32_t t = 0; t < n_tokens && fault.kind == CODEC_FAULT_NONE; t++) {
        const uint8_t *row = (const uint8_t *)src + t * stride_bytes;

        if (!token_is_refused(spec, dtype, row, dim))
            continue;
        for (uint32_t i = 0; i < dim; i++) {
            float value = value_at(dtype, row, i);

            if (is_worse(value, &fault))
                fault = (struct codec_fault){isnan(value)   ? CODEC_FAULT_NAN
                                             : isinf(value) ? CODEC_FAULT_INF
                                                            : CODEC_FAULT_RANGE,
                                             t, i, value};
        }
    }
    *ret_fault = fault;
    return 0;
}
