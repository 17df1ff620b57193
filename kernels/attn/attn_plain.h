/* Attention from codes that one conversion turns into numbers: raw, fp8, int8, and uq4 without rotation. No decoded
 * number is written to memory. A part of attn_part.h, which includes it; conversions are those of the codec's vector
 * variant. */

enum plain_kind { PLAIN_NONE, PLAIN_F16, PLAIN_BF16, PLAIN_F32, PLAIN_FP8, PLAIN_INT8, PLAIN_UQ4 };

/* Tokens (keys) or registers of 16 channels (values) that are under way together, so that as many sums are as hide
 * the latency of a multiplication. */
#if WIDTH == 16
#define PLAIN_ABREAST 2u
VEC wf plain_fold(vf v) { return v; }
VEC vf plain_load_e4m3(const uint8_t *p) { return wf_load_e4m3(p); }
#else
#define PLAIN_ABREAST 1u
VEC wf plain_fold(vf v) { return wf_add(v.a, v.b); }
VEC vf plain_load_e4m3(const uint8_t *p) { return (vf){wf_load_e4m3(p), wf_load_e4m3(p + 8)}; }
#endif
VEC vf plain_fma(vf a, vf b, vf c) { return vf_madd_exact(a, b, c); }

/* K or V of a chunk. */
struct plain {
    enum plain_kind kind;
    const uint8_t *codes, *side;
    size_t stride, side_stride; /* of a token; side: uq4's scales */
    uint32_t dim, n;
};

static enum plain_kind plain_kind(const struct codec_spec *spec)
{
    switch (spec->id) {
    case CODEC_RAW:
        return spec->dtype == CODEC_F16 ? PLAIN_F16 : spec->dtype == CODEC_BF16 ? PLAIN_BF16 : PLAIN_F32;
    case CODEC_FP8:
        return PLAIN_FP8;
    case CODEC_INT8:
        return PLAIN_INT8;
    case CODEC_UQ4:
        return spec->rotate ? PLAIN_NONE : PLAIN_UQ4;
    default:
        return PLAIN_NONE;
    }
}

/* Without V the values are channels of the keys. false: not of this kind. */
static bool plain_of(const struct chunk *c, bool values, struct plain *ret_plain)
{
    const struct tile_layout *l = c->layout;
    bool v = values && l->dim_v;
    const struct codec_spec *spec = v ? &l->v : &l->k;
    struct plain p = {.kind = plain_kind(spec), .dim = v ? l->dim_v : l->dim_k, .n = c->n};

    p.stride = codec_row_bytes(spec, p.dim);
    p.side_stride = p.kind == PLAIN_UQ4 ? p.dim / 32 : 0;
    p.codes = c->tile + (v ? l->v_codes_off : l->k_codes_off) + c->t0 * p.stride;
    p.side = c->tile + (v ? l->v_side_off : l->k_side_off) + (p.kind == PLAIN_INT8 ? 2 * c->t0 : c->t0 * p.side_stride);
    *ret_plain = p;
    return p.kind != PLAIN_NONE;
}

/* Channels i .. i + 15 of token t, without the factor that plain_scales() gives. */
VEC vf plain_load(enum plain_kind kind, const struct plain *p, uint32_t t, uint32_t i)
{
    const uint8_t *codes = p->codes + t * p->stride;

    switch (kind) {
    case PLAIN_F16:
        return vf_load_f16(codes + 2 * i);
    case PLAIN_BF16:
        return vf_load_bf16(codes + 2 * i);
    case PLAIN_F32:
        return vf_load((const float *)(const void *)(codes + 4 * i));
    case PLAIN_FP8:
        return plain_load_e4m3(codes + i);
    case PLAIN_INT8:
        return vf_load_int8(codes + i);
    case PLAIN_UQ4:
    case PLAIN_NONE:
        break;
    }
    return vf_mul(vlut_get(vlut_load(codec_e2m1), vi_nibbles(codes + i / 2)),
                  vf_set1(ue8m0_value(p->side[t * p->side_stride + i / 32])));
}

/* What the numbers of the chunk's tokens are to be multiplied by: int8's scales, 256 for fp8, or 1; 0 after them. */
static void plain_scales(const struct plain *p, float scale[ATTN_CHUNK])
{
    uint16_t halves[ATTN_CHUNK] = {0};

    if (p->kind == PLAIN_INT8)
        memcpy(halves, p->side, 2 * p->n);
    else
        for (uint32_t t = 0; t < p->n; t++)
            halves[t] = p->kind == PLAIN_FP8 ? 0x5c00 : 0x3c00;
    for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH)
        wf_store(scale + t, wf_load_f16(halves + t));
}

/* ---- scores ---- */

/* n rows and PLAIN_ABREAST tokens from t on, past the last one the last again. */
VEC void plain_dots(enum plain_kind kind, const struct plain *p, const float *q, uint32_t t, float unit, float *s, uint32_t n)
{
    vf acc[PLAIN_ABREAST][4];
    uint32_t at[PLAIN_ABREAST];

    UNROLL
    for (uint32_t j = 0; j < PLAIN_ABREAST; j++) {
        at[j] = min_u32(t + j, p->n - 1);
        UNROLL
        for (uint32_t r = 0; r < 4; r++)
            acc[j][r] = vf_set1(0);
    }
    for (uint32_t i = 0; i < p->dim; i += 16) {
        vf x[PLAIN_ABREAST];

        UNROLL
        for (uint32_t j = 0; j < PLAIN_ABREAST; j++)
            x[j] = plain_load(kind, p, at[j], i);
        UNROLL
        for (uint32_t r = 0; r < n; r++) {
            vf y = vf_load(q + (size_t)r * p->dim + i);

            UNROLL
            for (uint32_t j = 0; j < PLAIN_ABREAST; j++)
                acc[j][r] = plain_fma(x[j], y, acc[j][r]);
        }
    }
    UNROLL
    for (uint32_t j = 0; j < PLAIN_ABREAST; j++) {
        wf v[4] = {plain_fold(acc[j][0]), plain_fold(acc[j][1]), plain_fold(acc[j][2]), plain_fold(acc[j][3])};
        float sum[4];

        _mm_storeu_ps(sum, _mm_mul_ps(wf_sums(v), _mm_set1_ps(unit)));
        UNROLL
        for (uint32_t r = 0; r < n; r++)
            s[(size_t)r * ATTN_CHUNK + t + j] = sum[r];
    }
}

VEC void plain_scores_as(enum plain_kind kind, struct part *p, const struct chunk *c, const struct plain *x)
{
    for (uint32_t t = 0; t < x->n; t += PLAIN_ABREAST) {
        for (uint32_t row = 0; row < p->n; row += 4)
            BY_ROWS(p->n - row, plain_dots, kind, x, p->rows->q + (size_t)row * x->dim, t, p->unit,
                    c->s + (size_t)row * ATTN_CHUNK);
        part_ahead(p, 0, PLAIN_ABREAST * (uint32_t)x->stride);
    }
}

/* ---- values ---- */

/* o = keep * o + weights * values of n rows, PLAIN_ABREAST registers of channels from i on, past the last one the
 * last again. */
VEC void plain_sums(enum plain_kind kind, const struct plain *x, struct part *p, const float *w, uint32_t i, uint32_t row,
                    uint32_t n)
{
    float *o = p->out->o + (size_t)row * p->dim_o;
    vf acc[4][PLAIN_ABREAST];
    uint32_t at[PLAIN_ABREAST];

    w += (size_t)row * ATTN_CHUNK;
    UNROLL
    for (uint32_t j = 0; j < PLAIN_ABREAST; j++) {
        at[j] = min_u32(i + 16 * j, p->dim_o - 16);
        UNROLL
        for (uint32_t r = 0; r < n; r++)
            acc[r][j] = vf_mul(vf_load(o + (size_t)r * p->dim_o + at[j]), vf_set1(p->keep[row + r]));
    }
    for (uint32_t t = 0; t < x->n; t++) {
        vf v[PLAIN_ABREAST];

        UNROLL
        for (uint32_t j = 0; j < PLAIN_ABREAST; j++)
            v[j] = plain_load(kind, x, t, at[j]);
        UNROLL
        for (uint32_t r = 0; r < n; r++) {
            vf by = vf_set1(w[(size_t)r * ATTN_CHUNK + t]);

            UNROLL
            for (uint32_t j = 0; j < PLAIN_ABREAST; j++)
                acc[r][j] = plain_fma(by, v[j], acc[r][j]);
        }
    }
    UNROLL
    for (uint32_t r = 0; r < n; r++)
        UNROLL
        for (uint32_t j = 0; j < PLAIN_ABREAST; j++)
            vf_store(o + (size_t)r * p->dim_o + at[j], acc[r][j]);
}

VEC void plain_values_as(enum plain_kind kind, struct part *p, const struct chunk *c, const struct plain *x)
{
    for (uint32_t i = 0; i < p->dim_o; i += 16 * PLAIN_ABREAST) {
        for (uint32_t row = 0; row < p->n; row += 4)
            BY_ROWS(p->n - row, plain_sums, kind, x, p, c->s, i, row);
        part_ahead(p, 1, PLAIN_ABREAST * 16 * (uint32_t)(x->stride * x->n / x->dim));
    }
}

/* ---- by kind ---- */

#define BY_KIND(kind, f, ...) \
    switch (kind) { \
    case PLAIN_F16: \
        f(PLAIN_F16, __VA_ARGS__); \
        break; \
    case PLAIN_BF16: \
        f(PLAIN_BF16, __VA_ARGS__); \
        break; \
    case PLAIN_F32: \
        f(PLAIN_F32, __VA_ARGS__); \
        break; \
    case PLAIN_FP8: \
        f(PLAIN_FP8, __VA_ARGS__); \
        break; \
    case PLAIN_INT8: \
        f(PLAIN_INT8, __VA_ARGS__); \
        break; \
    case PLAIN_UQ4: \
    case PLAIN_NONE: \
        f(PLAIN_UQ4, __VA_ARGS__); \
    }

/* Weights (or scores) of all rows times factors of the tokens and one of the row (or 1). */
static void plain_scale(struct part *p, const struct chunk *c, const float *by_token, const float *by_row)
{
    for (uint32_t row = 0; row < p->n; row++) {
        float *s = c->s + (size_t)row * ATTN_CHUNK;
        wf by = wf_set1(by_row ? by_row[row] : 1);

        for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH)
            wf_store(s + t, wf_mul(wf_mul(wf_load(s + t), by), wf_load(by_token + t)));
    }
}

static void plain_scores(struct part *p, const struct chunk *c, const struct plain *x)
{
    float scale[ATTN_CHUNK];

    BY_KIND(x->kind, plain_scores_as, p, c, x)
    if (x->kind != PLAIN_INT8 && x->kind != PLAIN_FP8)
        return;
    plain_scales(x, scale);
    plain_scale(p, c, scale, NULL);
}

static void plain_values(struct part *p, const struct chunk *c, const struct plain *x)
{
    float scale[ATTN_CHUNK];

    plain_scales(x, scale);
    plain_scale(p, c, scale, p->gain);
    BY_KIND(x->kind, plain_values_as, p, c, x)
}
