/* Attention from packed codes: scores from kc4 (integer grid), values from tq4. A part of attn_part.h, which
 * includes it.
 *
 * Scores. kc4 decodes to low + step * code, so a block's scores are dot(q * step, codes - m) + dot(q, low + m *
 * step) for any m, here the middle of the codes. q * step becomes whole numbers of 16 bits, relative to its largest
 * magnitude, and these a high and a low byte, so that products of bytes do: codes are unsigned, bytes of the query
 * signed. An element of a register is a token, with four bytes of its codes (eight channels); low and high nibbles,
 * even and odd channels, are two registers, and the query's bytes are in that order. (kc4's codes from 8 on count
 * from high; that differs by less than 2^-18 of high - low, because its step has 20 bits.) What rounding the query
 * does to the middle code is known exactly and taken out again, which halves the error.
 *
 * Values. tq4 decodes to level(code) * norm, then rotates. Weights times norm become whole numbers of 14 bits
 * relative to the largest of the chunk, levels whole numbers of 11 bits; sums of 64 products fit into 32 bits. A
 * register holds two tokens side by side, for products of pairs. Norms of tokens enter with the weights, the
 * rotation is undone once a call. */

#define QUERY_MAX 32639.0f  /* 127 * 256 + 127 */
#define CODE_MIDDLE 7.5f
#define SLABS (LANES == 4) /* pieces of a token are loaded together; with two lanes there are too few registers */

/* A call for up to four rows: their number, the last argument, is a constant in each. */
#define BY_ROWS(n_left, f, ...) \
    do { \
        if ((n_left) >= 4) \
            f(__VA_ARGS__, 4); \
        else if ((n_left) == 3) \
            f(__VA_ARGS__, 3); \
        else if ((n_left) == 2) \
            f(__VA_ARGS__, 2); \
        else \
            f(__VA_ARGS__, 1); \
    } while (0)
#define WEIGHT_MAX 16383.0f

/* round(level * LEVEL_UNIT). This unit rounds the eight levels best of all that fit: relative norm of the errors
 * 1.2e-4. */
#define LEVEL_UNIT 685.392f
static const int16_t code_levels[16] = {-1873, -1418, -1109, -861, -646, -450, -266, -88,
                                        88,    266,   450,   646,  861,  1109, 1418, 1873};

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

/* Sums of products by element, of the queries' high and low bytes. */
struct code_sums {
    wi high[4], low[4];
};

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
    code_steps(p, c->tile + c->layout->k_side_off);
    for (uint32_t row = 0; row < p->n; row += 4)
        BY_ROWS(p->n - row, code_tops_of, p, row);
}

/* Bytes of the queries of n rows for this block. */
VEC void code_bytes_of(struct part *p, uint32_t row, uint32_t n)
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
            wf_split32(q, p->q_bytes + ((size_t)row * dim + 4 * i) * 2 + 16 * r, &whole);
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
    for (uint32_t row = 0; row < p->n; row += 4)
        BY_ROWS(p->n - row, code_bytes_of, p, row);
}

/* A piece of 4 LANES tokens: x[g] has in lane i that of token 4 i + g. Their dwords (eight channels) are brought
 * side by side, so that an element is a token; then they are multiplied with the dwords of the queries, which are
 * the same for all elements. */
#ifdef ATTN_VNNI
VEC void code_piece(wi x[4], const uint8_t *q, uint32_t n, struct code_sums *sums)
{
    wi_transpose_dwords(x);
    UNROLL
    for (uint32_t k = 0; k < 4; k++) {
        wi low = wi_nib_low(x[k]), high = wi_nib_high(x[k]);

        UNROLL
        for (uint32_t r = 0; r < n; r++) {
            const uint8_t *at = q + 64 * k + 16 * r;

            sums->high[r] = wi_dot_bytes(sums->high[r], low, at);
            sums->low[r] = wi_dot_bytes(sums->low[r], low, at + 8);
        }
        UNROLL
        for (uint32_t r = 0; r < n; r++) {
            const uint8_t *at = q + 64 * k + 16 * r;

            sums->high[r] = wi_dot_bytes(sums->high[r], high, at + 4);
            sums->low[r] = wi_dot_bytes(sums->low[r], high, at + 12);
        }
    }
}
#else
/* Eight sums of products of pairs, 8 * 2 * 15 * 128 at most, fit into 16 bits. */
VEC void code_piece(wi x[4], const uint8_t *q, uint32_t n, struct code_sums *sums)
{
    wi high[4], low[4];

    wi_transpose_dwords(x);
    UNROLL
    for (uint32_t k = 0; k < 4; k++) {
        wi even = wi_nib_low(x[k]), odd = wi_nib_high(x[k]);

        UNROLL
        for (uint32_t r = 0; r < n; r++) {
            const uint8_t *at = q + 64 * k + 16 * r;
            wi h = wi_maddubs(even, wi_set1_32(at)), l = wi_maddubs(even, wi_set1_32(at + 8));

            high[r] = k ? wi_sum16(high[r], h) : h;
            low[r] = k ? wi_sum16(low[r], l) : l;
            high[r] = wi_sum16(high[r], wi_maddubs(odd, wi_set1_32(at + 4)));
            low[r] = wi_sum16(low[r], wi_maddubs(odd, wi_set1_32(at + 12)));
        }
    }
    UNROLL
    for (uint32_t r = 0; r < n; r++)
        sums->low[r] = wi_add32(sums->low[r], wi_add32(wi_madd(high[r], wi_set1_16(256)), wi_madd(low[r], wi_set1_16(1))));
}
#endif

/* Scores of n rows and 4 LANES tokens, whose codes are all there. ahead: what to ask for meanwhile, as much as is
 * read, or NULL. */
VEC void code_scores_of(struct part *p, float *s, const uint8_t *codes, const uint8_t *ahead, uint32_t row, uint32_t n)
{
    const uint8_t *q = p->q_bytes + (size_t)row * p->n_pieces * 64;
    size_t stride = p->dim_k / 2;
    uint32_t piece = 0;
    struct code_sums sums;

    UNROLL
    for (uint32_t r = 0; r < n; r++)
        sums.high[r] = sums.low[r] = wi_zero();
    for (; SLABS && 32 * (piece + LANES) <= p->dim_k; piece += LANES) {
        wi x[4][LANES], y[4];

        UNROLL
        for (uint32_t g = 0; g < 4; g++) {
            UNROLL
            for (uint32_t i = 0; i < LANES; i++)
                x[g][i] = wi_load(codes + (4 * i + g) * stride + 16 * piece);
            wi_transpose_lanes(x[g]);
        }
        UNROLL
        for (uint32_t i = 0; i < LANES; i++, q += 256) {
            UNROLL
            for (uint32_t g = 0; g < 4; g++)
                y[g] = x[g][i];
            ahead = ahead_lines(ahead, LANES);
            code_piece(y, q, n, &sums);
        }
    }
    for (; piece < p->n_pieces; piece++, q += 256) {
        bool half = 32 * piece + 32 > p->dim_k;
        wi x[4];

        UNROLL
        for (uint32_t g = 0; g < 4; g++) {
            const uint8_t *at = codes + g * stride + 16 * piece;

            x[g] = half ? wi_gather_lanes(at, 4 * stride, 1) : wi_gather_lanes(at, 4 * stride, 0);
        }
        ahead = ahead_lines(ahead, LANES);
        code_piece(x, q, n, &sums);
    }
    UNROLL
    for (uint32_t r = 0; r < n; r++) {
        wi sum = wi_add32(wi_shl8(sums.high[r]), sums.low[r]);

        wf_store(s + (size_t)r * ATTN_CHUNK, wf_fma(wi_float(sum), wf_set1(p->alpha[row + r]), wf_set1(p->beta[row + r])));
    }
}

static void code_scores(struct part *p, const struct chunk *c)
{
    size_t stride = p->dim_k / 2;
    const uint8_t *codes = c->tile + c->layout->k_codes_off + c->t0 * stride, *ahead = p->ahead[0];

    for (uint32_t t = 0; t < c->n; t += 4 * LANES, codes += 4 * LANES * stride) {
        uint32_t left = c->layout->n_tokens - c->t0 - t;

        if (left < 4 * LANES) { /* not beyond the end of the block's codes: the scores of what follows are hidden */
            memset(p->pad, 0, 4 * LANES * stride);
            codes = memcpy(p->pad, codes, left * stride);
        }
        for (uint32_t row = 0; row < p->n; row += 4)
            BY_ROWS(p->n - row, code_scores_of, p, c->s + (size_t)row * ATTN_CHUNK + t, codes, row ? NULL : ahead, row);
        if (ahead)
            ahead += 4 * LANES * stride;
    }
}

/* ---- values ---- */

/* What weights need of the chunk's norms. Weights and norms are multiplied by adding logarithms, so that the largest
 * product is known before the first is made. A norm of zero (or what no encoder writes) counts as 2^-25, half the
 * least other one, and its product is made zero afterwards. */
static void code_norms(struct part *p, const struct chunk *c)
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

#define KEEPS (LANES == 2) /* with four lanes unpacking again is free beside the products, and stores are not */
enum code_source { CODE_UNPACK, CODE_UNPACK_KEEP, CODE_KEPT };

/* Half a slab (4 registers of channels) of n rows: all tokens of the chunk. With CODE_UNPACK_KEEP levels stay in
 * p->sub for the rows that follow. */
VEC void code_values_of(struct part *p, const struct chunk *c, uint32_t slab, int half, uint32_t row, uint32_t n,
                        enum code_source source)
{
    uint32_t row_bytes = p->dim_o / 2, at = slab * 4 * WIDTH, n_bytes = min_u32(4 * WIDTH, row_bytes - at);
    const uint8_t *codes = c->tile + c->layout->v_codes_off + (size_t)c->t0 * row_bytes + at;
    const size_t ahead_at = (size_t)(2 * slab + (uint32_t)half) * 16 * LANES * ATTN_CHUNK / 2;
    const uint8_t *ahead = row == 0 && p->ahead[1] ? p->ahead[1] + ahead_at : NULL;
    const wtab table = wtab_load(code_levels);
    wi acc[ROWS][4], *kept = (wi *)p->sub;

    UNROLL
    for (uint32_t r = 0; r < n; r++)
        UNROLL
        for (uint32_t i = 0; i < 4; i++)
            acc[r][i] = wi_zero();
    for (uint32_t t = 0; t < c->n; t += 2, kept += 4) {
        wi x[4];

        ahead = LANES == 4 || t % 4 == 0 ? ahead_lines(ahead, 1) : ahead;
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

VEC void code_values_rows(struct part *p, const struct chunk *c, uint32_t slab, int half, uint32_t row, enum code_source source)
{
    if (p->n - row >= 4 && ROWS == 4)
        code_values_of(p, c, slab, half, row, 4, source);
    else if (p->n - row >= 3 && ROWS == 4)
        code_values_of(p, c, slab, half, row, 3, source);
    else if (p->n - row >= 2)
        code_values_of(p, c, slab, half, row, 2, source);
    else
        code_values_of(p, c, slab, half, row, 1, source);
}

VEC void code_values_half(struct part *p, const struct chunk *c, uint32_t slab, int half)
{
    if (!KEEPS || p->n <= ROWS) {
        for (uint32_t row = 0; row < p->n; row += ROWS)
            code_values_rows(p, c, slab, half, row, CODE_UNPACK);
        return;
    }
    code_values_rows(p, c, slab, half, 0, CODE_UNPACK_KEEP);
    for (uint32_t row = ROWS; row < p->n; row += ROWS)
        code_values_rows(p, c, slab, half, row, CODE_KEPT);
}

static void code_values(struct part *p, const struct chunk *c)
{
    for (uint32_t slab = 0; slab < p->n_slabs; slab++) {
        code_values_half(p, c, slab, 0);
        code_values_half(p, c, slab, 1);
    }
}

/* One level of the rotation, of channels that differ in one bit, in the order of registers: bits 0, 3 and 4 choose
 * the register of a slab, 1, 2 and from 5 on the element, those beyond the slab. */
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
