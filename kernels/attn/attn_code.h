/* Attention from packed codes: scores from kc4 (integer grid), values from tq4. A part of attn_part.h, which includes it.
 *
 * Scores. kc4 decodes to low + step * code, so a block's scores are dot(q * step, codes - m) + dot(q, low + m * step) for any m, here
 * the middle of the codes. q * step becomes whole
 * numbers of 16 bits, relative to its largest magnitude, and these a high and a low byte, so that products of bytes do: codes are
 * unsigned, bytes of the query signed. A register holds 16 bytes of codes (32 channels) of one token in each lane; low and high nibbles,
 * even and odd channels, are two registers, and the query's bytes are in that order. (kc4's codes from 8 on count from high;
 * that differs by less than 2^-18 of high - low, because its step has 20 bits.) What
 * rounding the query does to the middle code is known exactly and taken out again, which halves the error.
 *
 * Values. tq4 decodes to level(code) * norm, then rotates. Weights times norm become whole numbers of 14 bits relative to the largest
 * of the chunk, levels whole numbers of 11 bits; sums of 64 products fit into 32 bits. A register holds two tokens side by side, for
 * products of pairs. Norms of tokens enter with the weights, the rotation is undone once a call. */

#define QUERY_MAX 32639.0f  /* 127 * 256 + 127 */
#define CODE_MIDDLE 7.5f
#ifdef ATTN_VNNI
#define CODE_DIRECT true
#else
#define CODE_DIRECT false
#endif
#define WEIGHT_MAX 16383.0f

/* round(level * LEVEL_UNIT). This unit rounds the eight levels best of all that fit: relative norm of the errors 1.2e-4. */
#define LEVEL_UNIT 685.392f
static const int16_t code_levels[16] = {-1873, -1418, -1109, -861, -646, -450, -266, -88, 88, 266, 450, 646, 861, 1109, 1418, 1873};

/* ---- scores ---- */

/* Once a call: the queries' channels in the order of nibbles. */
static void code_queries(struct part *p)
{
    for (uint32_t row = 0; row < p->n; row++) {
        const float *q = p->rows->q + (size_t)row * p->dim_k;
        float *to = p->q_pairs + (size_t)row * p->n_pieces * 32, end[32] = {0};

        for (uint32_t i = 0; i < p->n_pieces * 32; i += 2 * WIDTH) {
            const float *from = q + i;
            wf even, odd;

            if (i + 2 * WIDTH > p->dim_k) /* the last piece is in part there */
                from = memcpy(end, q + i, sizeof(float) * (i < p->dim_k ? p->dim_k - i : 0));
            wf_load_pairs(from, &even, &odd);
            wf_store(to + i / 32 * 32 + i % 32 / 2, even);
            wf_store(to + i / 32 * 32 + i % 32 / 2 + 16, odd);
        }
    }
}

/* Once a block: steps and middles in the same order. */
static __attribute__((noinline)) void code_steps(struct part *p, const uint8_t *side)
{
    for (uint32_t i = 0; i < p->dim_k; i += 2 * WIDTH) {
        uint32_t at = i / 32 * 32 + i % 32 / 2;
        wf low[2], high[2];

        if (i + 2 * WIDTH > p->dim_k) { /* the last half piece: not beyond the side data */
            uint16_t halves[2][2 * WIDTH] = {{0}};

            memcpy(halves[0], side + 2 * i, 2 * (p->dim_k - i));
            memcpy(halves[1], side + 2 * (p->dim_k + i), 2 * (p->dim_k - i));
            wf_load_f16_pairs(halves[0], low, low + 1);
            wf_load_f16_pairs(halves[1], high, high + 1);
        } else {
            wf_load_f16_pairs(side + 2 * i, low, low + 1);
            wf_load_f16_pairs(side + 2 * (p->dim_k + i), high, high + 1);
        }
        UNROLL
        for (uint32_t odd = 0; odd < 2; odd++) {
            wf step = wf_mul(wf_sub(high[odd], low[odd]), wf_set1(1.0f / 15));

            wf_store(p->step + at + 16 * odd, step);
            wf_store(p->middle + at + 16 * odd, wf_fma(step, wf_set1(CODE_MIDDLE), low[odd]));
        }
    }
    if (WIDTH == 8 && p->dim_k % 32) /* half a piece: nothing has written its other half */
        UNROLL
        for (uint32_t odd = 0; odd < 2; odd++) {
            wf_store(p->middle + p->n_pieces * 32 - 24 + 16 * odd, wf_set1(0));
            wf_store(p->step + p->n_pieces * 32 - 24 + 16 * odd, wf_set1(0));
        }
}

/* ROWS rows of whole slabs: they go a way of their own, on which the queries' bytes are kept four times each, one for each lane: to
 * load a register costs less than to fill its lanes from one. */
VEC bool code_is_wide(const struct part *p)
{
    return CODE_DIRECT && p->n == ROWS && p->n_pieces % LANES == 0;
}

/* The largest magnitudes of n rows' queries times steps, and their products with the middles. */
VEC void code_tops_of(struct part *p, uint32_t row, uint32_t n)
{
    uint32_t dim = p->n_pieces * 32;
    wf top[4], base[4];

    UNROLL
    for (uint32_t r = 0; r < 4; r++)
        top[r] = base[r] = wf_set1(0);
    for (uint32_t i = 0; i < dim; i += WIDTH) {
        wf step = wf_load(p->step + i), middle = wf_load(p->middle + i);

        UNROLL
        for (uint32_t r = 0; r < n; r++) {
            wf q = wf_load(p->q_pairs + (size_t)(row + r) * dim + i);

            top[r] = wf_max_abs(top[r], wf_mul(q, step));
            base[r] = wf_fma(q, middle, base[r]);
        }
    }
    wf_max4(top, top);
    wf_sum4(base, base);
    UNROLL
    for (uint32_t r = 0; r < n; r++) {
        p->q_top[row + r] = wf_first(top[r]);
        p->beta[row + r] = wf_first(base[r]) * p->unit;
    }
}

static void code_tops(struct part *p, const struct chunk *c)
{
    uint32_t row = 0;

    code_steps(p, c->tile + c->layout->k_side_off);
    for (; row + 4 <= p->n; row += 4)
        code_tops_of(p, row, 4);
    for (; row < p->n; row++)
        code_tops_of(p, row, 1);
}

/* Bytes of the queries of n rows for this block. */
VEC void code_bytes_of(struct part *p, uint32_t row, uint32_t n, bool wide)
{
    uint32_t dim = p->n_pieces * 32;
    wf total[4];

    UNROLL
    for (uint32_t r = 0; r < 4; r++)
        total[r] = wf_set1(0);
    UNROLL
    for (uint32_t r = 0; r < n; r++) {
        wf by = wf_div(wf_set1(QUERY_MAX), wf_max(wf_set1(p->q_top[row + r]), wf_set1(1e-30f)));
        wi whole = wi_zero();

        for (uint32_t i = 0; i < dim; i += 32) {
            wf q[32 / WIDTH];

            UNROLL
            for (uint32_t j = 0; j < 32 / WIDTH; j++) {
                uint32_t at = i + j * WIDTH;

                q[j] = wf_mul(wf_mul(wf_load(p->q_pairs + (size_t)(row + r) * dim + at), wf_load(p->step + at)), by);
            }
            if (wide)
                wf_split32_wide(q, p->q_wide + ((size_t)(row + r) * dim + i) * 8, &whole);
            else
                wf_split32(q, p->q_bytes + ((size_t)(row + r) * dim + i) * 2, &whole);
        }
        total[r] = wi_float(whole);
    }
    wf_sum4(total, total);
    UNROLL
    for (uint32_t r = 0; r < n; r++) {
        float alpha = p->q_top[row + r] * (p->unit / QUERY_MAX);

        p->alpha[row + r] = alpha;
        p->beta[row + r] -= CODE_MIDDLE * alpha * wf_first(total[r]);
    }
}

static void code_bytes(struct part *p)
{
    uint32_t row = 0;

    if (code_is_wide(p)) {
        code_bytes_of(p, 0, 4, true);
        return;
    }
    for (; row + 4 <= p->n; row += 4)
        code_bytes_of(p, row, 4, false);
    for (; row < p->n; row++)
        code_bytes_of(p, row, 1, false);
}

/* 4 LANES tokens' codes, all of them there, and where their nibbles go: [piece][low, high][4] registers; lane i of the g-th is
 * token 4 i + g. */
struct code_unit {
    const uint8_t *codes;
    size_t stride;
    uint32_t dim, n_pieces;
    wi *to;
};

/* One of n_pieces steps. Whole slabs of LANES pieces are read as registers of a token and transposed. */
VEC void code_unpack_step(const struct code_unit *u, uint32_t step)
{
    uint32_t slab = step / LANES * LANES;
    const uint8_t *codes = u->codes + 16 * slab;
    wi *to = u->to + 8 * slab;

    if (32 * (slab + LANES) <= u->dim) {
        UNROLL
        for (uint32_t j = 0; j < 4 / LANES; j++) {
            uint32_t g = step % LANES * (4 / LANES) + j;
            wi x[LANES];

            UNROLL
            for (uint32_t i = 0; i < LANES; i++)
                x[i] = wi_load(codes + (4 * i + g) * u->stride);
            wi_transpose_lanes(x);
            UNROLL
            for (uint32_t i = 0; i < LANES; i++) {
                wi_store(to + 8 * i + g, wi_nib_low(x[i]));
                wi_store(to + 8 * i + 4 + g, wi_nib_high(x[i]));
            }
        }
        return;
    }
    codes = u->codes + 16 * step;
    to = u->to + 8 * step;
    for (uint32_t g = 0; g < 4; g++, codes += u->stride) {
        bool half = 32 * step + 32 > u->dim;
        wi x = half ? wi_gather_lanes(codes, 4 * u->stride, 1) : wi_gather_lanes(codes, 4 * u->stride, 0);

        wi_store(to + g, wi_nib_low(x));
        wi_store(to + 4 + g, wi_nib_high(x));
    }
}

/* acc[row][g] += products of a unit's codes and the high (0) or low (1) bytes of n rows. next, if not NULL, is unpacked on the way:
 * its instructions are not those that the products wait for. */
#ifdef ATTN_VNNI
VEC void code_products(const wi *codes, const uint8_t *q, size_t q_stride, uint32_t n_pieces, uint32_t n, uint32_t part,
                       const struct code_unit *next, wi acc[ROWS][4])
{
    q += part * 32;
    for (uint32_t i = 0; i < n_pieces; i++, q += 64, codes += 8) {
        if (next)
            code_unpack_step(next, i);
        UNROLL
        for (uint32_t odd = 0; odd < 2; odd++)
            UNROLL
            for (uint32_t r = 0; r < n; r++) {
                wi x = wi_set1_lane(q + r * q_stride + odd * 16);

                UNROLL
                for (uint32_t g = 0; g < 4; g++)
                    acc[r][g] = wi_dot_bytes(acc[r][g], codes[4 * odd + g], x);
            }
    }
}
#else
/* Eight products of pairs, 8 * 2 * 15 * 128 at most, are summed in 16 bits. */
VEC void code_products(const wi *codes, const uint8_t *q, size_t q_stride, uint32_t n_pieces, uint32_t n, uint32_t part,
                       const struct code_unit *next, wi acc[ROWS][4])
{
    q += part * 32;
    for (uint32_t first = 0; first < n_pieces; first += 4) {
        uint32_t end = min_u32(first + 4, n_pieces);
        wi sum[ROWS][4];

        UNROLL
        for (uint32_t r = 0; r < n; r++)
            UNROLL
            for (uint32_t g = 0; g < 4; g++)
                sum[r][g] = wi_zero();
        for (uint32_t i = first; i < end; i++, q += 64, codes += 8) {
            if (next)
                code_unpack_step(next, i);
            UNROLL
            for (uint32_t odd = 0; odd < 2; odd++)
                UNROLL
                for (uint32_t r = 0; r < n; r++) {
                    wi x = wi_set1_lane(q + r * q_stride + odd * 16);

                    UNROLL
                    for (uint32_t g = 0; g < 4; g++)
                        sum[r][g] = wi_add16(sum[r][g], wi_maddubs(codes[4 * odd + g], x));
                }
        }
        UNROLL
        for (uint32_t r = 0; r < n; r++)
            UNROLL
            for (uint32_t g = 0; g < 4; g++)
                acc[r][g] = wi_add32(acc[r][g], wi_madd(sum[r][g], wi_set1_16(1)));
    }
}
#endif

VEC void code_scores_of(struct part *p, float *s, const wi *codes, uint32_t row, uint32_t n, uint32_t t, const struct code_unit *next)
{
    size_t stride = (size_t)p->n_pieces * 64;
    const uint8_t *q = p->q_bytes + row * stride;
    wi acc[ROWS][4];

    UNROLL
    for (uint32_t r = 0; r < n; r++)
        UNROLL
        for (uint32_t g = 0; g < 4; g++)
            acc[r][g] = wi_zero();
    code_products(codes, q, stride, p->n_pieces, n, 0, next, acc);
    UNROLL
    for (uint32_t r = 0; r < n; r++)
        UNROLL
        for (uint32_t g = 0; g < 4; g++)
            acc[r][g] = wi_shl8(acc[r][g]);
    code_products(codes, q, stride, p->n_pieces, n, 1, NULL, acc);
    UNROLL
    for (uint32_t r = 0; r < n; r++)
        wf_store(s + (size_t)(row + r) * ATTN_CHUNK + t,
                 wf_fma(wi_float(wi_fold_lanes(acc[r])), wf_set1(p->alpha[row + r]), wf_set1(p->beta[row + r])));
}

/* The last n bytes of a block's codes and zeros, to be read beyond their end: the scores of what follows are hidden. */
static const uint8_t *code_padded(struct part *p, const uint8_t *codes, size_t n, size_t n_padded)
{
    memset(p->pad + n, 0, n_padded - n);
    return memcpy(p->pad, codes, n);
}

/* The unit from token t of the chunk on; which: of the two places in p->sub. */
static struct code_unit code_unit(struct part *p, const struct chunk *c, uint32_t t, uint32_t which)
{
    struct code_unit u = {.stride = p->dim_k / 2, .dim = p->dim_k, .n_pieces = p->n_pieces};
    uint32_t left = c->layout->n_tokens - c->t0 - t;

    u.codes = c->tile + c->layout->k_codes_off + (c->t0 + t) * u.stride;
    u.to = (wi *)p->sub + which * 8 * p->n_pieces;
    if (left < 4 * LANES)
        u.codes = code_padded(p, u.codes, left * u.stride, 4 * LANES * u.stride);
    return u;
}

#ifdef ATTN_VNNI
/* Eight tokens and ROWS rows without a stop in memory, where slabs are whole: 16 sums, two registers of codes at a time. Lane i of
 * the g-th register is token 2 i + g. */
VEC void code_scores_eight(const uint8_t *codes, size_t stride, const uint8_t *q, size_t q_stride, uint32_t n_slabs,
                           wi high[ROWS][2], wi low[ROWS][2])
{
    UNROLL
    for (uint32_t r = 0; r < ROWS; r++)
        UNROLL
        for (uint32_t g = 0; g < 2; g++)
            high[r][g] = low[r][g] = wi_zero();
    for (uint32_t slab = 0; slab < n_slabs; slab++, codes += 16 * LANES) {
        wi x[2][LANES];

        UNROLL
        for (uint32_t g = 0; g < 2; g++) {
            UNROLL
            for (uint32_t i = 0; i < LANES; i++)
                x[g][i] = wi_load(codes + (2 * i + g) * stride);
            wi_transpose_lanes(x[g]);
        }
        UNROLL
        for (uint32_t i = 0; i < 2 * LANES; i++) {
            wi a = i % 2 ? wi_nib_high(x[0][i / 2]) : wi_nib_low(x[0][i / 2]);
            wi b = i % 2 ? wi_nib_high(x[1][i / 2]) : wi_nib_low(x[1][i / 2]);

            UNROLL
            for (uint32_t r = 0; r < ROWS; r++) {
                const uint8_t *at = q + r * q_stride + i / 2 * 256 + i % 2 * 64;
                wi h = wi_load(at), l = wi_load(at + 128);

                high[r][0] = wi_dot_bytes(high[r][0], a, h);
                high[r][1] = wi_dot_bytes(high[r][1], b, h);
                low[r][0] = wi_dot_bytes(low[r][0], a, l);
                low[r][1] = wi_dot_bytes(low[r][1], b, l);
            }
        }
        q += 256 * LANES;
    }
}

static __attribute__((noinline)) void code_scores_direct(struct part *p, const struct chunk *c)
{
    size_t stride = p->dim_k / 2;
    const uint8_t *codes = c->tile + c->layout->k_codes_off + c->t0 * stride;

    for (uint32_t t = 0; t < c->n; t += 8, codes += 8 * stride) {
        wi high[ROWS][2], low[ROWS][2];

        if (c->t0 + t + 8 > c->layout->n_tokens)
            codes = code_padded(p, codes, (c->layout->n_tokens - c->t0 - t) * stride, 8 * stride);
        code_scores_eight(codes, stride, p->q_wide, (size_t)p->n_pieces * 256,
                          p->n_pieces / LANES, high, low);
        part_ahead(p, c->layout->bytes / ATTN_CHUNK * 4);
        UNROLL
        for (uint32_t r = 0; r < ROWS; r += 2) {
            wi sum[4];
            wf s;

            UNROLL
            for (uint32_t i = 0; i < 4; i++)
                sum[i] = wi_add32(wi_shl8(high[r + i / 2][i % 2]), low[r + i / 2][i % 2]);
            s = wf_fma(wi_float(wi_fold_pairs(sum)), wf_halves(p->alpha + r), wf_halves(p->beta + r));
            wf_store_halves(c->s + (size_t)r * ATTN_CHUNK + t, c->s + (size_t)(r + 1) * ATTN_CHUNK + t, s);
        }
    }
}
#endif

static __attribute__((noinline)) void code_scores(struct part *p, const struct chunk *c)
{
    struct code_unit unit, next;

#ifdef ATTN_VNNI
    if (code_is_wide(p)) {
        code_scores_direct(p, c);
        return;
    }
#endif
    unit = code_unit(p, c, 0, 0);
    for (uint32_t i = 0; i < p->n_pieces; i++)
        code_unpack_step(&unit, i);
    for (uint32_t t = 0, which = 1; t < c->n; t += 4 * LANES, unit = next, which ^= 1) {
        bool more = t + 4 * LANES < c->n;
        uint32_t row = 0;

        if (more)
            next = code_unit(p, c, t + 4 * LANES, which);
        part_ahead(p, c->layout->bytes / ATTN_CHUNK * 2 * LANES);
        for (; row + ROWS < p->n; row += ROWS)
            code_scores_of(p, c->s, unit.to, row, ROWS, t, NULL);
        if (row + ROWS == p->n) {
            code_scores_of(p, c->s, unit.to, row, ROWS, t, more ? &next : NULL);
            continue;
        }
        for (; row < p->n; row++)
            code_scores_of(p, c->s, unit.to, row, 1, t, more && row + 1 == p->n ? &next : NULL);
    }
}

/* ---- values ---- */

/* What weights need of the chunk's norms. Weights and norms are multiplied by adding logarithms, so that the largest product is known
 * before the first is made. A norm of zero (or what no encoder writes) counts as 2^-25, half the least other one, and its product is
 * made zero afterwards. */
static __attribute__((noinline)) void code_norms(struct part *p, const struct chunk *c)
{
    const uint8_t *side = c->tile + c->layout->v_side_off + 2 * c->t0;
    uint16_t halves[ATTN_CHUNK];

    if (c->n < ATTN_CHUNK) {
        memset(halves, 0, sizeof(halves));
        side = memcpy(halves, side, 2 * c->n);
    }
    UNROLL
    for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH) {
        wf norm = wf_load_f16(side + 2 * t), up = wf_max(norm, wf_set1(0x1p-25f));

        wf_store(p->norm_log + t, wf_log2(up));
        wf_store(p->norm_inverse + t, wf_div(wf_set1(1), up));
        wf_store(p->norm_whole + t, wf_where_more(norm, wf_set1(0), wf_set1(WEIGHT_MAX)));
    }
}

enum code_source { CODE_UNPACK, CODE_UNPACK_KEEP, CODE_KEPT };

/* Half a slab (4 registers of channels) of n rows: all tokens of the chunk. With CODE_UNPACK_KEEP levels stay in p->sub for the
 * rows that follow. */
VEC void code_values_of(struct part *p, const struct chunk *c, uint32_t slab, int half, uint32_t row, uint32_t n,
                        enum code_source source)
{
    uint32_t row_bytes = p->dim_o / 2, at = slab * 4 * WIDTH, n_bytes = min_u32(4 * WIDTH, row_bytes - at);
    const uint8_t *codes = c->tile + c->layout->v_codes_off + (size_t)c->t0 * row_bytes + at;
    const wtab table = wtab_load(code_levels);
    wi acc[ROWS][4], *kept = (wi *)p->sub;

    UNROLL
    for (uint32_t r = 0; r < n; r++)
        UNROLL
        for (uint32_t i = 0; i < 4; i++)
            acc[r][i] = wi_zero();
    for (uint32_t t = 0; t < c->n; t += 2, kept += 4) {
        wi x[4];

        if (source == CODE_KEPT) {
            UNROLL
            for (uint32_t i = 0; i < 4; i++)
                x[i] = wi_load(kept + i);
        } else {
            const uint8_t *a = codes + (size_t)t * row_bytes, *b = t + 1 < c->n ? a + row_bytes : a;

            wtab_pairs(table, wi_load_n(a, n_bytes), wi_load_n(b, n_bytes), half, x);
        }
        UNROLL
        for (uint32_t i = 0; source == CODE_UNPACK_KEEP && i < 4; i++)
            wi_store(kept + i, x[i]);
        UNROLL
        for (uint32_t r = 0; r < n; r++) {
            wi w = wi_set1_32(p->w + (size_t)(row + r) * ATTN_CHUNK + t);

            UNROLL
            for (uint32_t i = 0; i < 4; i++)
                acc[r][i] = wi_dot_pairs(acc[r][i], x[i], w);
        }
    }
    UNROLL
    for (uint32_t r = 0; r < n; r++) {
        float *o = p->o_code + ((size_t)(row + r) * p->n_slabs + slab) * 8 * WIDTH + half * 4 * WIDTH;
        wf keep = wf_set1(p->keep[row + r]), gain = wf_set1(p->gain[row + r] * (1 / (WEIGHT_MAX * LEVEL_UNIT)));

        UNROLL
        for (uint32_t i = 0; i < 4; i++)
            wf_store(o + i * WIDTH, wf_fma(wi_float(acc[r][i]), gain, wf_mul(wf_load(o + i * WIDTH), keep)));
    }
}

VEC void code_values_half(struct part *p, const struct chunk *c, uint32_t slab, int half)
{
    uint32_t row = 0;

    if (p->n == ROWS) {
        code_values_of(p, c, slab, half, 0, ROWS, CODE_UNPACK);
        return;
    }
    if (p->n > ROWS)
        for (; row + ROWS <= p->n; row += ROWS) {
            if (row == 0)
                code_values_of(p, c, slab, half, row, ROWS, CODE_UNPACK_KEEP);
            else
                code_values_of(p, c, slab, half, row, ROWS, CODE_KEPT);
        }
    for (; row < p->n; row++) {
        if (row == 0)
            code_values_of(p, c, slab, half, row, 1, CODE_UNPACK_KEEP);
        else
            code_values_of(p, c, slab, half, row, 1, CODE_KEPT);
    }
}

static __attribute__((noinline)) void code_values(struct part *p, const struct chunk *c)
{
    for (uint32_t slab = 0; slab < p->n_slabs; slab++) {
        code_values_half(p, c, slab, 0);
        part_ahead(p, c->layout->bytes / (4 * p->n_slabs));
        code_values_half(p, c, slab, 1);
        part_ahead(p, c->layout->bytes);
    }
}

/* One level of the rotation, of channels that differ in one bit, in the order of registers: bits 0, 3 and 4 choose the register of a
 * slab, 1, 2 and from 5 on the element, those beyond the slab. */
VEC void code_rotate_level(float *x, uint32_t n_slabs, uint32_t bit)
{
    const uint32_t slab = 8 * WIDTH, n = n_slabs * slab;
    uint32_t step = bit == 0 ? WIDTH : bit == 3 ? 2 * WIDTH : bit == 4 ? 4 * WIDTH : 0;

    if (1u << bit >= slab)
        step = 1u << bit;
    for (uint32_t i = 0; step && i < n; i += WIDTH) {
        wf a = wf_load(x + i), b;

        if (i & step)
            continue;
        b = wf_load(x + i + step);
        wf_store(x + i, wf_add(a, b));
        wf_store(x + i + step, wf_sub(a, b));
    }
    for (uint32_t i = 0; !step && i < n; i += WIDTH)
        wf_store(x + i, wf_butterfly(wf_load(x + i), bit < 3 ? bit - 1 : bit - 3));
}

/* A row's values rotated back, in the order of channels, times by. ret_o has room for whole slabs. */
static void code_rotate_back(const struct part *p, uint32_t row, float by, float *ret_o)
{
    const uint32_t slab = 8 * WIDTH, log2_block = (uint32_t)__builtin_ctz(p->dim_o);
    float *x = p->o_code + (size_t)row * p->n_slabs * slab;
    const wf factor = wf_set1(by * codec_rsqrt[log2_block]);

    for (uint32_t bit = 0; bit < log2_block; bit++)
        code_rotate_level(x, p->n_slabs, bit);
    for (uint32_t s = 0; s < p->n_slabs * slab; s += slab)
        for (uint32_t q = 0; q < 4; q++) /* bits 3 and 4 */
            wf_store_pairs(ret_o + s + 8 * q, wf_load(x + s + 2 * q * WIDTH), wf_load(x + s + (2 * q + 1) * WIDTH));
    for (uint32_t i = 0; i < p->dim_o; i += WIDTH)
        wf_store(ret_o + i, wf_mul(factor, wf_flip(wf_load(ret_o + i), codec_sign_mask + i)));
}
