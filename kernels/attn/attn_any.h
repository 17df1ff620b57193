/* Attention from decoded tokens: a few at a time are decoded into a buffer of the first-level cache, by the vector
 * decoder of their codec. A part of attn_part.h, which includes it. */

#define ANY_FLOATS 4096u /* 16 KiB */

/* Tokens decoded together: 4 to 16. */
VEC uint32_t any_tokens(uint32_t dim)
{
    uint32_t n = ANY_FLOATS / dim & ~3u;

    return n > 16 ? 16 : n;
}

/* ---- scores ---- */

/* Scores of n_rows rows and four tokens. */
VEC void any_dots(const float *q, const float *const k[4], uint32_t dim, uint32_t n_rows, float unit, float *s)
{
    wf acc[ROWS][4];

    UNROLL
    for (uint32_t r = 0; r < n_rows; r++)
        UNROLL
        for (uint32_t t = 0; t < 4; t++)
            acc[r][t] = wf_set1(0);
    for (uint32_t i = 0; i < dim; i += WIDTH) {
        wf x[ROWS];

        UNROLL
        for (uint32_t r = 0; r < n_rows; r++)
            x[r] = wf_load(q + (size_t)r * dim + i);
        UNROLL
        for (uint32_t t = 0; t < 4; t++) {
            wf y = wf_load(k[t] + i);

            UNROLL
            for (uint32_t r = 0; r < n_rows; r++)
                acc[r][t] = wf_fma(x[r], y, acc[r][t]);
        }
    }
    UNROLL
    for (uint32_t r = 0; r < n_rows; r++)
        _mm_storeu_ps(s + (size_t)r * ATTN_CHUNK, _mm_mul_ps(wf_sums(acc[r]), _mm_set1_ps(unit)));
}

/* Scores of all rows and n tokens at k; s: of the first row and token. */
static void any_scores_of(struct part *p, const float *k, uint32_t n, float *s)
{
    uint32_t dim = p->dim_k;

    for (uint32_t t = 0; t < n; t += 4) {
        const float *at[4]; /* past the last token the last one again: its scores are hidden later */
        uint32_t row = 0;

        UNROLL
        for (uint32_t i = 0; i < 4; i++)
            at[i] = k + (size_t)min_u32(t + i, n - 1) * dim;
        for (; row + ROWS <= p->n; row += ROWS)
            any_dots(p->rows->q + (size_t)row * dim, at, dim, ROWS, p->unit, s + (size_t)row * ATTN_CHUNK + t);
        for (; row < p->n; row++)
            any_dots(p->rows->q + (size_t)row * dim, at, dim, 1, p->unit, s + (size_t)row * ATTN_CHUNK + t);
    }
}

static void any_scores(struct part *p, const struct chunk *c)
{
    const struct tile_layout *l = c->layout;
    uint32_t step = any_tokens(l->dim_k);
    float *k = (float *)p->sub;

    for (uint32_t t = 0; t < c->n; t += step) {
        uint32_t n = min_u32(step, c->n - t);

        p->codec->decode(&l->k, c->tile + l->k_side_off, c->tile + l->k_codes_off, l->n_tokens, l->dim_k, c->t0 + t,
                         c->t0 + t + n, CODEC_F32, k, sizeof(float) * l->dim_k);
        any_scores_of(p, k, n, c->s + t);
        part_ahead(p, 0, n * l->k_codes_bytes / l->n_tokens);
    }
}

/* ---- values ---- */

/* o[row][n_vectors registers] = keep * o + weights * values, n tokens. */
VEC void any_sum(const float *w, const float *v, size_t v_stride, uint32_t n, float *o, size_t o_stride, const float *keep,
                 uint32_t n_rows, uint32_t n_vectors)
{
    wf acc[ROWS][4];

    UNROLL
    for (uint32_t r = 0; r < n_rows; r++)
        UNROLL
        for (uint32_t i = 0; i < n_vectors; i++)
            acc[r][i] = wf_mul(wf_load(o + r * o_stride + i * WIDTH), wf_set1(keep[r]));
    for (uint32_t t = 0; t < n; t++) {
        wf x[4];

        UNROLL
        for (uint32_t i = 0; i < n_vectors; i++)
            x[i] = wf_load(v + t * v_stride + i * WIDTH);
        UNROLL
        for (uint32_t r = 0; r < n_rows; r++) {
            wf by = wf_set1(w[r * ATTN_CHUNK + t]);

            UNROLL
            for (uint32_t i = 0; i < n_vectors; i++)
                acc[r][i] = wf_fma(by, x[i], acc[r][i]);
        }
    }
    UNROLL
    for (uint32_t r = 0; r < n_rows; r++)
        UNROLL
        for (uint32_t i = 0; i < n_vectors; i++)
            wf_store(o + r * o_stride + i * WIDTH, acc[r][i]);
}

/* n_rows rows, all channels. */
VEC void any_sums(struct part *p, uint32_t row, uint32_t n_rows, const float *w, const float *v, size_t v_stride, uint32_t n)
{
    float *o = p->out->o + (size_t)row * p->dim_o;
    uint32_t i = 0;

    for (; i + 4 * WIDTH <= p->dim_o; i += 4 * WIDTH)
        any_sum(w, v + i, v_stride, n, o + i, p->dim_o, p->keep + row, n_rows, 4);
    for (; i < p->dim_o; i += WIDTH)
        any_sum(w, v + i, v_stride, n, o + i, p->dim_o, p->keep + row, n_rows, 1);
}

/* The factors go into the weights; outputs are multiplied by keep once, with the first tokens. */
static void any_scale(struct part *p, const struct chunk *c)
{
    for (uint32_t row = 0; row < p->n; row++) {
        float *s = c->s + (size_t)row * ATTN_CHUNK;
        wf by = wf_set1(p->gain[row]);

        for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH)
            wf_store(s + t, wf_mul(wf_load(s + t), by));
    }
}

static void any_values(struct part *p, const struct chunk *c)
{
    const struct tile_layout *l = c->layout;
    bool own = l->dim_v != 0; /* else the values are channels of the keys */
    const struct codec_spec *spec = own ? &l->v : &l->k;
    uint32_t dim = own ? l->dim_v : l->dim_k, step = any_tokens(dim);
    const uint8_t *side = c->tile + (own ? l->v_side_off : l->k_side_off);
    const uint8_t *codes = c->tile + (own ? l->v_codes_off : l->k_codes_off);
    float *v = (float *)p->sub;

    any_scale(p, c);
    for (uint32_t t = 0; t < c->n; t += step) {
        uint32_t n = min_u32(step, c->n - t), row = 0;

        p->codec->decode(spec, side, codes, l->n_tokens, dim, c->t0 + t, c->t0 + t + n, CODEC_F32, v, sizeof(float) * dim);
        for (; row + ROWS <= p->n; row += ROWS)
            any_sums(p, row, ROWS, c->s + (size_t)row * ATTN_CHUNK + t, v, dim, n);
        for (; row < p->n; row++)
            any_sums(p, row, 1, c->s + (size_t)row * ATTN_CHUNK + t, v, dim, n);
        for (row = 0; t == 0 && row < p->n; row++)
            p->keep[row] = 1;
        part_ahead(p, 1, n * l->v_codes_bytes / l->n_tokens);
    }
}
