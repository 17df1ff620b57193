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
        float *to = p->q_pairs + (size_t)row * p->n_pieces * 32;

        memset(to, 0, sizeof(float) * p->n_pieces * 32);
        for (uint32_t i = 0; i < p->dim_k; i++)
            to[i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = q[i];
    }
}

/* Once a block: steps and middles in the same order. */
static void code_steps(struct part *p, const uint8_t *side)
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

/* Bytes of the queries of n rows for this block. */
VEC void code_bytes_of(struct part *p, uint32_t row, uint32_t n)
{
    uint32_t dim = p->n_pieces * 32;
    wf top[4], base[4], total[4];

    UNROLL
    for (uint32_t r = 0; r < 4; r++)
        top[r] = base[r] = wf_set1(0);
    for (uint32_t i = 0; i < dim; i += WIDTH) {
        wf step = wf_load(p->step + i), middle = wf_load(p->middle + i);

        UNROLL
        for (uint32_t r = 0; r < n; r++) {
            wf q = wf_load(p->q_pairs + (size_t)(row + r) * dim + i);

            top[r] = wf_max(top[r], wf_abs(wf_mul(q, step)));
            base[r] = wf_fma(q, middle, base[r]);
        }
    }
    wf_max4(top, top);
    wf_sum4(base, base);
    UNROLL
    for (uint32_t r = 0; r < 4; r++)
        total[r] = wf_set1(0);
    UNROLL
    for (uint32_t r = 0; r < n; r++) {
        wf by = wf_div(wf_set1(QUERY_MAX), wf_max(top[r], wf_set1(1e-30f)));

        for (uint32_t i = 0; i < dim; i += WIDTH) {
            wf q = wf_mul(wf_load(p->q_pairs + (size_t)(row + r) * dim + i), wf_load(p->step + i));
            uint8_t *to = p->q_bytes + ((size_t)(row + r) * dim + i / 32 * 32) * 2 + i % 32;

            q = wf_round(wf_mul(q, by));
            total[r] = wf_add(total[r], q);
            wf_split(q, to, to + 32);
        }
    }
    wf_sum4(total, total);
    UNROLL
    for (uint32_t r = 0; r < n; r++) {
        float alpha = wf_first(top[r]) * (p->unit / QUERY_MAX);

        p->alpha[row + r] = alpha;
        p->beta[row + r] = wf_first(base[r]) * p->unit - CODE_MIDDLE * alpha * wf_first(total[r]);
    }
}

static void code_bytes(struct part *p)
{
    uint32_t row = 0;

    for (; row + 4 <= p->n; row += 4)
        code_bytes_of(p, row, 4);
    for (; row < p->n; row++)
        code_bytes_of(p, row, 1);
}

/* Nibbles of 4 LANES tokens from t on: [piece][low, high][4] registers; lane i of the g-th is token t + 4 i + g. */
VEC void code_unpack_keys(const struct part *p, const struct chunk *c, uint32_t t, wi *to)
{
    const uint8_t *codes = c->tile + c->layout->k_codes_off, *row[4][LANES];

    UNROLL
    for (uint32_t g = 0; g < 4; g++)
        UNROLL
        for (uint32_t i = 0; i < LANES; i++)
            row[g][i] = codes + (size_t)min_u32(c->t0 + t + 4 * i + g, c->layout->n_tokens - 1) * (p->dim_k / 2);
    for (uint32_t piece = 0; piece < p->n_pieces; piece++, to += 8) {
        bool half = 32 * piece + 32 > p->dim_k;

        UNROLL
        for (uint32_t g = 0; g < 4; g++) {
            wi x = half ? wi_gather_lanes(row[g], 16 * piece, 1) : wi_gather_lanes(row[g], 16 * piece, 0);

            wi_store(to + g, wi_nib_low(x));
            wi_store(to + 4 + g, wi_nib_high(x));
        }
    }
}

/* acc[row][g] += products of the pieces' codes and the high (0) or low (1) bytes of n rows. */
#ifdef ATTN_VNNI
VEC void code_products(const wi *codes, const uint8_t *q, size_t q_stride, uint32_t n_pieces, uint32_t n, uint32_t part,
                       wi acc[ROWS][4])
{
    for (uint32_t i = 0; i < 2 * n_pieces; i++)
        UNROLL
        for (uint32_t r = 0; r < n; r++) {
            wi x = wi_set1_lane(q + r * q_stride + i / 2 * 64 + part * 32 + i % 2 * 16);

            UNROLL
            for (uint32_t g = 0; g < 4; g++)
                acc[r][g] = wi_dot_bytes(acc[r][g], codes[4 * i + g], x);
        }
}
#else
/* Eight products of pairs, 8 * 2 * 15 * 128 at most, are summed in 16 bits. */
VEC void code_products(const wi *codes, const uint8_t *q, size_t q_stride, uint32_t n_pieces, uint32_t n, uint32_t part,
                       wi acc[ROWS][4])
{
    for (uint32_t first = 0; first < 2 * n_pieces; first += 8) {
        uint32_t end = min_u32(first + 8, 2 * n_pieces);
        wi sum[ROWS][4];

        UNROLL
        for (uint32_t r = 0; r < n; r++)
            UNROLL
            for (uint32_t g = 0; g < 4; g++)
                sum[r][g] = wi_zero();
        for (uint32_t i = first; i < end; i++)
            UNROLL
            for (uint32_t r = 0; r < n; r++) {
                wi x = wi_set1_lane(q + r * q_stride + i / 2 * 64 + part * 32 + i % 2 * 16);

                UNROLL
                for (uint32_t g = 0; g < 4; g++)
                    sum[r][g] = wi_add16(sum[r][g], wi_maddubs(codes[4 * i + g], x));
            }
        UNROLL
        for (uint32_t r = 0; r < n; r++)
            UNROLL
            for (uint32_t g = 0; g < 4; g++)
                acc[r][g] = wi_add32(acc[r][g], wi_madd(sum[r][g], wi_set1_16(1)));
    }
}
#endif

VEC void code_scores_of(struct part *p, const wi *codes, uint32_t row, uint32_t n, uint32_t t)
{
    size_t stride = (size_t)p->n_pieces * 64;
    const uint8_t *q = p->q_bytes + row * stride;
    wi acc[ROWS][4];

    UNROLL
    for (uint32_t r = 0; r < n; r++)
        UNROLL
        for (uint32_t g = 0; g < 4; g++)
            acc[r][g] = wi_zero();
    code_products(codes, q, stride, p->n_pieces, n, 0, acc);
    UNROLL
    for (uint32_t r = 0; r < n; r++)
        UNROLL
        for (uint32_t g = 0; g < 4; g++)
            acc[r][g] = wi_shl8(acc[r][g]);
    code_products(codes, q, stride, p->n_pieces, n, 1, acc);
    UNROLL
    for (uint32_t r = 0; r < n; r++)
        wf_store(p->s + (size_t)(row + r) * ATTN_CHUNK + t,
                 wf_fma(wi_float(wi_fold_lanes(acc[r])), wf_set1(p->alpha[row + r]), wf_set1(p->beta[row + r])));
}

static void code_scores(struct part *p, const struct chunk *c)
{
    if (c->t0 == 0 || p->bytes_of != c->tile) {
        code_steps(p, c->tile + c->layout->k_side_off);
        code_bytes(p);
        p->bytes_of = c->tile;
    }
    for (uint32_t t = 0; t < c->n; t += 4 * LANES) {
        uint32_t row = 0;

        code_unpack_keys(p, c, t, (wi *)p->sub);
        part_ahead(p, c->layout->bytes / ATTN_CHUNK * 2 * LANES);
        for (; row + ROWS <= p->n; row += ROWS)
            code_scores_of(p, (const wi *)p->sub, row, ROWS, t);
        for (; row < p->n; row++)
            code_scores_of(p, (const wi *)p->sub, row, 1, t);
    }
}

/* ---- values ---- */

/* Scales of the chunk's tokens to p->norm, zeros after them. */
static void code_norms(struct part *p, const struct chunk *c)
{
    uint16_t halves[ATTN_CHUNK] = {0};

    memcpy(halves, c->tile + c->layout->v_side_off + 2 * c->t0, 2 * c->n);
    for (uint32_t t = 0; t < ATTN_CHUNK; t += WIDTH)
        wf_store(p->norm + t, wf_load_f16(halves + t));
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
        wf keep = wf_set1(p->keep[row + r]), gain = wf_set1(p->gain[row + r] * p->top[row + r] * (1 / (WEIGHT_MAX * LEVEL_UNIT)));

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

static void code_values(struct part *p, const struct chunk *c)
{
    for (uint32_t slab = 0; slab < p->n_slabs; slab++) {
        code_values_half(p, c, slab, 0);
        part_ahead(p, c->layout->bytes / (4 * p->n_slabs));
        code_values_half(p, c, slab, 1);
        part_ahead(p, c->layout->bytes);
    }
}

/* A row's values in the order of channels, times by, rotated back. */
static void code_rotate_back(const struct part *p, uint32_t row, float by, float *ret_o)
{
    const float *o = p->o_code + (size_t)row * p->n_slabs * 8 * WIDTH;
    uint32_t block = p->dim_o & -p->dim_o;

    by *= codec_rsqrt[__builtin_ctz(block)];
    for (uint32_t c = 0; c < p->dim_o; c++) {
        /* slab, lane, byte of the lane, nibble; a register has four bytes of each lane */
        uint32_t slab = c / (8 * WIDTH), lane = c / 32 % LANES, byte = c / 2 % 16;

        ret_o[c] = by * o[slab * 8 * WIDTH + (byte / 4 * 2 + c % 2) * WIDTH + lane * 4 + byte % 4];
    }
    for (uint32_t h = 1; h < block; h *= 2)
        for (uint32_t i = 0; i < p->dim_o; i++)
            if (!(i & h)) {
                float a = ret_o[i], b = ret_o[i + h];

                ret_o[i] = a + b;
                ret_o[i + h] = a - b;
            }
    for (uint32_t i = 0; i < p->dim_o; i++)
        if (codec_sign_mask[i])
            ret_o[i] = -ret_o[i];
}
