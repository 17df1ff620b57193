/* Codecs: specifications as text, shapes, formats byte by byte (known answers, golden files), tiles, slots, refusals. */
#include <check.h>
#include <errno.h>

#include "kernels/codec/codec_tab.h"
#include "kernels/codec/tile.h"
#include "tests/check_codec_data.h"

static struct codec_spec spec_of(const char *text, enum codec_role role)
{
    struct codec_spec spec;
    const char *reason = "";

    ck_assert_msg(codec_spec_parse(text, role, &spec, &reason) == 0, "%s: %s", text, reason);
    return spec;
}

/* ---- specifications ---- */

START_TEST(text_round_trips)
{
    for (size_t i = 0; codec_spec_example(i); i++)
        for (int role = 0; role < 2; role++) {
            struct codec_spec spec = spec_of(codec_spec_example(i), (enum codec_role)role), k, v;
            char text[CODEC_TEXT_MAX];

            codec_spec_format(&spec, text);
            k = spec_of(text, CODEC_K);
            v = spec_of(text, CODEC_V);
            ck_assert_msg(codec_spec_equal(&spec, &k) && codec_spec_equal(&spec, &v), "%s", text);
            ck_assert_int_eq(codec_check(&spec, NULL, (enum codec_role)role, 64, 128, NULL), 0);
        }
}
END_TEST

START_TEST(text_means_these_bytes)
{
    static const struct {
        const char *text;
        enum codec_role role;
        uint8_t bytes[8];
        const char *canonical;
    } cases[] = {
        {"raw", CODEC_K, {1, 1}, "raw"},
        {"f16", CODEC_V, {1, 1}, "raw"},
        {"bf16", CODEC_K, {1, 2}, "bf16"},
        {"f32", CODEC_K, {1, 3}, "f32"},
        {"fp8", CODEC_K, {2}, "fp8"},
        {"int8", CODEC_K, {3}, "int8"},
        {"uq4", CODEC_K, {4, 0, 0, 0, 1}, "uq4:rotate=on"},
        {"uq4", CODEC_V, {4}, "uq4:rotate=off"},
        {"uq4:rotate=on,rule=even", CODEC_V, {4, 0, 0, 1, 1}, "uq4:rule=even,rotate=on"},
        {"tq4", CODEC_V, {5}, "tq4"},
        {"tq3", CODEC_V, {6}, "tq3"},
        {"kc4", CODEC_K, {7}, "kc4"},
        {"kc4:grid=int", CODEC_K, {7}, "kc4"},
        {"kc4:grid=e2m1", CODEC_K, {7, 0, 1}, "kc4:grid=e2m1"},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct codec_spec spec = spec_of(cases[i].text, cases[i].role);
        char text[CODEC_TEXT_MAX];

        ck_assert_mem_eq(&spec, cases[i].bytes, 8);
        ck_assert_str_eq(codec_spec_format(&spec, text), cases[i].canonical);
    }
}
END_TEST

START_TEST(wrong_text_is_refused)
{
    static const char *const wrong[] = {
        "", ":", "kc5", "kc", "kc44", "KC4", "kc4:", "kc4:grid", "kc4:grid=", "kc4:grid=fp4", "kc4:rule=even", "kc4:grid=int,",
        "kc4:grid=int,grid=e2m1", "kc4,grid=int", "uq4:rule=even;rotate=on", "uq4:rotate=1", "raw:dtype=f16", "tq4:bits=4", " kc4",
        "uq4:rotate=on,rotate=on", "uq4:=on",
    };

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct codec_spec spec = {.id = 99};
        const char *reason = NULL;

        ck_assert_msg(codec_spec_parse(wrong[i], CODEC_K, &spec, &reason) == -EINVAL, "'%s'", wrong[i]);
        ck_assert_ptr_nonnull(reason);
        ck_assert_int_eq(spec.id, 99);
    }
}
END_TEST

START_TEST(shapes)
{
    static const struct {
        const char *text;
        uint32_t n_tokens, dim;
        int result;
    } cases[] = {
        {"kc4", 64, 128, 0},      {"kc4", 1, 16, 0},        {"kc4", 4096, 1024, 0},  {"kc4", 0, 128, -EINVAL}, {"kc4", 4097, 128, -EINVAL},
        {"kc4", 64, 0, -EINVAL},  {"kc4", 64, 8, -EINVAL},  {"kc4", 64, 72, -EINVAL}, {"kc4", 64, 1040, -EINVAL}, {"tq4", 64, 576, 0},
        {"tq3", 64, 80, 0},       {"uq4", 64, 80, -ENOTSUP}, {"uq4", 64, 96, -ENOTSUP}, {"uq4:rotate=off", 64, 96, 0},
        {"uq4:rotate=off", 64, 80, -ENOTSUP}, {"uq4:rotate=on", 64, 576, -ENOTSUP}, {"uq4", 64, 512, 0}, {"fp8", 64, 576, 0},
    };
    struct codec_params params = {"x", 1};
    struct codec_spec spec = spec_of("kc4", CODEC_K);

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct codec_spec s = spec_of(cases[i].text, CODEC_K);
        const char *reason = NULL;

        ck_assert_msg(codec_check(&s, NULL, CODEC_K, cases[i].n_tokens, cases[i].dim, &reason) == cases[i].result, "%s [%u][%u]",
                      cases[i].text, cases[i].n_tokens, cases[i].dim);
        ck_assert((reason != NULL) == (cases[i].result != 0));
    }
    ck_assert_int_eq(codec_check(&spec, &params, CODEC_K, 64, 128, NULL), -EINVAL);
    spec.zero[1] = 1;
    ck_assert_int_eq(codec_check(&spec, NULL, CODEC_K, 64, 128, NULL), -EINVAL);
    spec = (struct codec_spec){.id = CODEC_TQ4, .grid = 1};
    ck_assert_int_eq(codec_check(&spec, NULL, CODEC_K, 64, 128, NULL), -EINVAL);
    spec = (struct codec_spec){.id = CODEC_KC4, .grid = 2};
    ck_assert_int_eq(codec_check(&spec, NULL, CODEC_K, 64, 128, NULL), -EINVAL);
    spec = (struct codec_spec){.id = CODEC_RAW};
    ck_assert_int_eq(codec_check(&spec, NULL, CODEC_K, 64, 128, NULL), -EINVAL);
    spec = (struct codec_spec){.id = 8};
    ck_assert_int_eq(codec_check(&spec, NULL, CODEC_K, 64, 128, NULL), -EINVAL);
}
END_TEST

START_TEST(sizes)
{
    static const struct {
        const char *text;
        size_t side, codes; /* 64 tokens of 128 */
    } cases[] = {
        {"raw", 0, 16384}, {"bf16", 0, 16384}, {"f32", 0, 32768}, {"fp8", 0, 8192}, {"int8", 128, 8192},
        {"uq4", 256, 4096}, {"tq4", 128, 4096}, {"tq3", 128, 3072}, {"kc4", 512, 4096},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct codec_spec s = spec_of(cases[i].text, CODEC_K);

        ck_assert_uint_eq(codec_side_bytes(&s, 64, 128), cases[i].side);
        ck_assert_uint_eq(codec_code_bytes(&s, 64, 128), cases[i].codes);
        ck_assert_uint_eq(codec_row_bytes(&s, 128) * 64, cases[i].codes);
    }
}
END_TEST

START_TEST(dtypes)
{
    enum codec_dtype dtype;

    for (int i = 0; i < 3; i++) {
        struct codec_spec raw = codec_spec_raw(data_dtypes[i]);

        ck_assert_int_eq(codec_dtype_parse(codec_dtype_name(data_dtypes[i]), &dtype), 0);
        ck_assert_int_eq(dtype, data_dtypes[i]);
        ck_assert_uint_eq(codec_dtype_bytes(dtype), dtype == CODEC_F32 ? 4 : 2);
        ck_assert_int_eq(codec_check(&raw, NULL, CODEC_V, 64, 128, NULL), 0);
    }
    ck_assert_int_eq(codec_dtype_parse("float16", &dtype), 0);
    ck_assert_int_eq(codec_dtype_parse("int8", &dtype), -EINVAL);
    ck_assert_uint_eq(codec_dtype_bytes((enum codec_dtype)9), 0);
}
END_TEST

START_TEST(variant_is_chosen_by_features)
{
    struct cpu_features cpu = {0};

    ck_assert_ptr_eq(codec_ops_choose(NULL), &codec_ops_scalar);
    ck_assert_ptr_eq(codec_ops_choose(&cpu), &codec_ops_scalar);
    cpu.avx2 = true;
    ck_assert_ptr_eq(codec_ops_choose(&cpu), &codec_ops_avx2);
    cpu.avx512 = true;
    ck_assert_ptr_eq(codec_ops_choose(&cpu), &codec_ops_avx512);
    ck_assert_int_eq(cpu_limit(&cpu, "avx2"), 0);
    ck_assert_ptr_eq(codec_ops_choose(&cpu), &codec_ops_avx2);
    ck_assert_int_eq(cpu_limit(&cpu, "scalar"), 0);
    ck_assert_ptr_eq(codec_ops_choose(&cpu), &codec_ops_scalar);
}
END_TEST

/* ---- the small formats, against definitions written another way ---- */

/* fp16 by its definition: sign, five bits of exponent with bias 15, ten of mantissa. */
static double fp16_value(uint32_t h)
{
    uint32_t e = h >> 10 & 31, m = h & 1023;
    double a = e == 31 ? INFINITY : e ? ldexp(1 + m / 1024.0, (int)e - 15) : ldexp(m, -24);

    return h & 0x8000 ? -a : a;
}

/* x to the nearest fp16 number, ties to the even one, by rounding to a multiple of its last bit. */
static double fp16_nearest(double x)
{
    int e;
    double unit, y;

    frexp(x, &e);
    unit = ldexp(1, e - 11 > -24 ? e - 11 : -24);
    y = nearbyint(x / unit) * unit;
    return fabs(y) >= 65536 ? copysign(INFINITY, x) : y;
}

START_TEST(fp16_conversions)
{
    uint64_t state = data_seed(1);

    for (uint32_t h = 0; h < 65536; h++) {
        uint16_t bits = (uint16_t)h;

        if ((h & 0x7fff) > 0x7c00)
            ck_assert(isnan(f16_to_f32(bits)));
        else
            ck_assert((double)f16_to_f32(bits) == fp16_value(h) && f32_to_f16(f16_to_f32(bits)) == bits);
    }
    for (int i = 0; i < 2000000; i++) {
        float x = f32_from_bits((uint32_t)data_random(&state) & (i & 1 ? 0xbfffffffu : 0xc7ffffffu)), low, high;
        double nearest = fp16_nearest((double)x);

        ck_assert_msg(fp16_value(f32_to_f16(x)) == nearest, "%a", (double)x);
        ck_assert_msg(!!signbit(x) == (f32_to_f16(x) >> 15), "%a", (double)x);
        if (fabsf(x) > F16_MAX)
            continue;
        low = f16_to_f32(f32_to_f16_down(x));
        high = f16_to_f32(f32_to_f16_up(x));
        ck_assert_msg(low <= x && x <= high, "%a", (double)x);
        ck_assert_msg((low == high) == (low == x), "%a", (double)x);
        ck_assert_msg((double)low == nearest || (double)high == nearest, "%a", (double)x);
    }
}
END_TEST

/* E4M3 by its definition: sign, four bits of exponent with bias 7, three of mantissa. */
static double e4m3_value(uint32_t code)
{
    uint32_t e = code >> 3 & 15, m = code & 7;
    double a = e ? ldexp(1 + m / 8.0, (int)e - 7) : ldexp(m / 8.0, -6);

    return code & 0x80 ? -a : a;
}

START_TEST(fp8_is_e4m3_to_nearest_even)
{
    struct codec_spec spec = spec_of("fp8", CODEC_K);
    uint16_t src[1024];
    uint8_t codes[1024];
    float back[1024];

    for (uint32_t h = 0; h < 65536; h += 1024) {
        for (uint32_t i = 0; i < 1024; i++)
            src[i] = (uint16_t)(((h + i) & 0x7c00) == 0x7c00 ? 0x1234 : h + i);
        ck_assert_int_eq(codec_encode(&codec_ops_scalar, &spec, NULL, CODEC_F16, src, 2048, 1, 1024, NULL, codes), 0);
        ck_assert_int_eq(codec_decode(&codec_ops_scalar, &spec, NULL, NULL, codes, 1, 1024, 0, 1, CODEC_F32, back, 4096), 0);
        for (uint32_t i = 0; i < 1024; i++) {
            double x = (double)f16_to_f32(src[i]), best = INFINITY;
            uint32_t want = 0;

            for (uint32_t c = 0; c < 0x7f; c++) {
                double d = fabs(fabs(x) - e4m3_value(c));

                if (d < best || (d == best && !(c & 1))) {
                    best = d;
                    want = c;
                }
            }
            want |= src[i] >> 8 & 0x80;
            ck_assert_msg(codes[i] == want, "%g: %02x, not %02x", x, codes[i], want);
            ck_assert((double)back[i] == e4m3_value(want));
        }
    }
}
END_TEST

/* uq4 by its definition: 15 sorted levels, the number of midpoints strictly below, exponents by exact comparison. */
START_TEST(uq4_is_what_it_says)
{
    static const double mid[14] = {-5, -3.5, -2.5, -1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5};
    uint64_t state = data_seed(2);

    for (int round = 0; round < 20000; round++) {
        struct codec_spec spec = spec_of(round & 1 ? "uq4:rule=even" : "uq4", CODEC_V);
        float x[32], amax = 0;
        uint8_t scale, codes[16];
        double s;
        int e;

        for (int i = 0; i < 32; i++) {
            x[i] = data_bell(&state) * ldexpf(1, (int)(data_random(&state) % 3) + round % 200 - 100);
            amax = fmaxf(amax, fabsf(x[i]));
        }
        ck_assert_int_eq(codec_encode(&codec_ops_scalar, &spec, NULL, CODEC_F32, x, 128, 1, 32, &scale, codes), 0);
        if (spec.rule == CODEC_RULE_EVEN)
            e = (int)floor(log2((double)amax / 3.5));
        else
            e = (int)floor(log2((double)(0.156f * amax)) + 0.5);
        ck_assert_int_eq(scale, e + 127);
        s = ldexp(1, e);
        for (int i = 0; i < 32; i++) {
            int below = 0, code = codes[i / 2] >> (i & 1) * 4 & 15;

            for (int j = 0; j < 14; j++)
                below += (double)x[i] / s > mid[j];
            ck_assert_int_eq(code, below < 7 ? 15 - below : below - 7);
        }
    }
}
END_TEST

/* The sign diagonal, midpoints and derived tables. */
START_TEST(tables)
{
    uint64_t state = 0x6b7664;

    for (int i = 0; i < 16; i++)
        ck_assert(codec_sign[i] == data_random(&state));
    for (int i = 0; i < 1024; i++)
        ck_assert_uint_eq(codec_sign_mask[i], (uint32_t)(codec_sign[i / 64] >> i % 64 & 1) << 31);
    for (int i = 0; i < 7; i++)
        ck_assert(codec_tq4_mid[i] == (codec_tq4_level[i] + codec_tq4_level[i + 1]) * 0.5f);
    for (int i = 0; i < 3; i++)
        ck_assert(codec_tq3_mid[i] == (codec_tq3_level[i] + codec_tq3_level[i + 1]) * 0.5f);
    for (int i = 0; i <= 10; i++)
        ck_assert(codec_rsqrt[i] == (float)(1 / sqrt(ldexp(1, i))));
}
END_TEST

/* ---- known answers ---- */

static uint32_t crc32_ieee(uint32_t crc, const uint8_t *p, size_t n)
{
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int b = 0; b < 8; b++)
            crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
    }
    return ~crc;
}

static float uq_value(uint32_t i, uint32_t t)
{
    return (float)((int)((i * 73 + t * 29 + 11) % 129) - 64) / 16.0f;
}

/* Slots of four tokens with heads of 256, keys rotated and values not; and values of 128. _i is the rule. */
START_TEST(ultraquant_slots)
{
    static const uint32_t slots_crc[2] = {0xc6c568ae, 0x8c917306}, values_crc[2] = {0xb86794c5, 0x93444fff};
    static const uint8_t k_scales[2][8] = {{0x7e, 0x7e, 0x80, 0x7f, 0x81, 0x7f, 0x80, 0x7f}, {0x7f, 0x7e, 0x80, 0x7f, 0x81, 0x7f, 0x80, 0x7f}};
    struct codec_spec k = spec_of(_i ? "uq4:rule=even" : "uq4", CODEC_K), v = spec_of(_i ? "uq4:rule=even" : "uq4", CODEC_V);
    const struct codec_ops *ops[3];
    size_t n_ops = data_variants(ops);

    for (size_t variant = 0; variant < n_ops; variant++)
        for (int d = 0; d < 3; d++) {
            size_t stride = 256 * codec_dtype_bytes(data_dtypes[d]);
            uint8_t src_k[4 * 1024], src_v[4 * 1024], slots[4 * 272], slot[68];
            struct tile_layout layout;
            uint8_t *tile;

            for (uint32_t t = 0; t < 4; t++)
                for (uint32_t i = 0; i < 256; i++) {
                    data_put(data_dtypes[d], src_k, t * 256 + i, uq_value(i, t));
                    data_put(data_dtypes[d], src_v, t * 256 + i, uq_value(i, t + 100));
                }
            ck_assert_int_eq(tile_layout_init(&layout, &k, &v, 4, 256, 256, NULL), 0);
            ck_assert_uint_eq(tile_slot_bytes(&layout), 272);
            tile = malloc(layout.bytes);
            ck_assert_int_eq(
                tile_encode(ops[variant], &layout, NULL, NULL, data_dtypes[d], src_k, stride, src_v, stride, tile, NULL), 0);
            ck_assert_int_eq(tile_to_slots(&layout, tile, slots, 272), 0);
            ck_assert_mem_eq(slots + 128, k_scales[_i], 8);
            ck_assert_uint_eq(crc32_ieee(0, slots, sizeof(slots)), slots_crc[_i]);
            free(tile);
            for (uint32_t i = 0; i < 128; i++)
                data_put(data_dtypes[d], src_v, i, uq_value(i, 7));
            ck_assert_int_eq(codec_encode(ops[variant], &v, NULL, data_dtypes[d], src_v, stride, 1, 128, slot + 64, slot), 0);
            ck_assert_uint_eq(crc32_ieee(0, slot, 68), values_crc[_i]);
        }
}
END_TEST

static char *golden_path(const char *name, char *buf, size_t n)
{
    const char *dir = getenv("KVD_SRCDIR");

    snprintf(buf, n, "%s/tests/golden/codec/%s", dir ? dir : ".", name);
    return buf;
}

START_TEST(golden_files)
{
    const struct codec_ops *ops[3];
    size_t n_ops = data_variants(ops), n_files = 0;
    struct data_case c = {0};
    char path[4096], want[160], line[160], name[128];
    FILE *list = fopen(golden_path("LIST", path, sizeof(path)), "r");

    ck_assert_msg(list, "%s", path);
    while (data_case_next(&c)) {
        ck_assert_ptr_nonnull(fgets(want, sizeof(want), list));
        want[strcspn(want, "\n")] = 0;
        for (size_t v = 0; v < n_ops; v++) {
            size_t n;
            uint8_t *packed = data_case_run(&c, ops[v], &n, line), *file = malloc(n + 1);

            ck_assert_str_eq(line, want);
            if (data_case_has_file(&c)) {
                FILE *f;

                data_case_file(&c, name, sizeof(name));
                f = fopen(golden_path(name, path, sizeof(path)), "rb");
                ck_assert_msg(f, "%s", path);
                ck_assert_uint_eq(fread(file, 1, n + 1, f), n);
                ck_assert_mem_eq(file, packed, n);
                fclose(f);
                n_files++;
            }
            free(file);
            free(packed);
        }
    }
    ck_assert_ptr_null(fgets(want, sizeof(want), list));
    ck_assert_uint_gt(n_files, 0);
    fclose(list);
}
END_TEST

/* ---- tiles ---- */

START_TEST(default_tile_has_no_gaps)
{
    struct codec_spec k = spec_of("kc4", CODEC_K), v = spec_of("tq4", CODEC_V);
    struct tile_layout l;

    ck_assert_int_eq(tile_layout_init(&l, &k, &v, 64, 128, 128, NULL), 0);
    ck_assert_uint_eq(l.k_side_off, 0);
    ck_assert_uint_eq(l.v_side_off, 512);
    ck_assert_uint_eq(l.k_codes_off, 640);
    ck_assert_uint_eq(l.v_codes_off, 640 + 4096);
    ck_assert_uint_eq(l.bytes, 640 + 8192);
}
END_TEST

/* All pairs of codecs, odd token counts, heads that differ or have no V: parts in order, aligned, zero between, and each part is what
 * the codec alone writes. */
START_TEST(tile_is_its_parts)
{
    static const uint32_t dims[][2] = {{128, 128}, {192, 128}, {576, 0}, {80, 80}, {64, 512}};
    uint64_t state = data_seed(3);
    uint16_t *src = malloc(2 * 67 * 576), *got = malloc(2 * 67 * 576), *want = malloc(2 * 67 * 576);
    uint8_t *tile = malloc(1 << 20), *part = malloc(1 << 20);

    for (size_t i = 0; i < 67 * 576; i++)
        src[i] = f32_to_f16(data_bell(&state));
    for (size_t a = 0; codec_spec_example(a); a++)
        for (size_t b = 0; codec_spec_example(b); b++)
            for (size_t d = 0; d < 5; d++) {
                struct codec_spec k = spec_of(codec_spec_example(a), CODEC_K), v = spec_of(codec_spec_example(b), CODEC_V);
                uint32_t n_tokens = 1 + (uint32_t)(data_random(&state) % 67), dk = dims[d][0], dv = dims[d][1];
                struct tile_layout l;
                size_t ends[4];

                if (tile_layout_init(&l, &k, &v, n_tokens, dk, dv, NULL) < 0)
                    continue;
                memset(tile, 0xee, l.bytes + 1);
                ck_assert_int_eq(
                    tile_encode(&codec_ops_scalar, &l, NULL, NULL, CODEC_F16, src, 2 * dk, src, 2 * dv, tile, NULL), 0);
                ck_assert_uint_eq(tile[l.bytes], 0xee);
                ck_assert_uint_eq(l.bytes % TILE_ALIGN, 0);
                ck_assert_uint_eq((l.v_side_off | l.k_codes_off | l.v_codes_off) % TILE_PART_ALIGN, 0);
                ends[0] = l.k_side_off + l.k_side_bytes;
                ends[1] = l.v_side_off + l.v_side_bytes;
                ends[2] = l.k_codes_off + l.k_codes_bytes;
                ends[3] = l.v_codes_off + l.v_codes_bytes;
                ck_assert(ends[0] <= l.v_side_off && ends[1] <= l.k_codes_off && ends[2] <= l.v_codes_off && ends[3] <= l.bytes);
                for (size_t i = 0, next[4] = {l.v_side_off, l.k_codes_off, l.v_codes_off, l.bytes}; i < 4; i++)
                    for (size_t at = ends[i]; at < next[i]; at++)
                        ck_assert_uint_eq(tile[at], 0);
                ck_assert_int_eq(codec_encode(&codec_ops_scalar, &k, NULL, CODEC_F16, src, 2 * dk, n_tokens, dk, part,
                                              part + l.k_side_bytes),
                                 0);
                ck_assert_mem_eq(tile, part, l.k_side_bytes);
                ck_assert_mem_eq(tile + l.k_codes_off, part + l.k_side_bytes, l.k_codes_bytes);
                if (!dv)
                    continue;
                ck_assert_int_eq(tile_decode(&codec_ops_scalar, &l, NULL, NULL, tile, 0, n_tokens, CODEC_F16, NULL, 0, got, 2 * dv), 0);
                ck_assert_int_eq(codec_encode(&codec_ops_scalar, &v, NULL, CODEC_F16, src, 2 * dv, n_tokens, dv, part,
                                              part + l.v_side_bytes),
                                 0);
                ck_assert_int_eq(codec_decode(&codec_ops_scalar, &v, NULL, part, part + l.v_side_bytes, n_tokens, dv, 0, n_tokens,
                                              CODEC_F16, want, 2 * dv),
                                 0);
                ck_assert_mem_eq(got, want, 2 * n_tokens * dv);
            }
    free(part);
    free(tile);
    free(want);
    free(got);
    free(src);
}
END_TEST

START_TEST(tile_says_who_was_refused)
{
    struct codec_spec k = spec_of("kc4", CODEC_K), v = spec_of("tq4", CODEC_V), bad = {0};
    uint16_t src_k[4 * 64] = {0}, src_v[4 * 64] = {0};
    enum codec_role role = CODEC_K;
    const char *reason = NULL;
    struct tile_layout l;
    uint8_t tile[4096];

    ck_assert_int_eq(tile_layout_init(&l, &k, &bad, 4, 64, 64, &reason), -EINVAL);
    ck_assert_ptr_nonnull(reason);
    ck_assert_int_eq(tile_layout_init(&l, &k, NULL, 4, 64, 0, NULL), 0);
    ck_assert_int_eq(tile_layout_init(&l, &k, &v, 4, 64, 64, NULL), 0);
    ck_assert_uint_le(l.bytes, sizeof(tile));
    src_v[70] = 0x7e00;
    ck_assert_int_eq(tile_encode(&codec_ops_scalar, &l, NULL, NULL, CODEC_F16, src_k, 128, src_v, 128, tile, &role), -EDOM);
    ck_assert_int_eq(role, CODEC_V);
    src_k[1] = 0xfc00;
    ck_assert_int_eq(tile_encode(&codec_ops_scalar, &l, NULL, NULL, CODEC_F16, src_k, 128, src_v, 128, tile, &role), -EDOM);
    ck_assert_int_eq(role, CODEC_K);
}
END_TEST

/* Any bytes go to slots and back unchanged. */
START_TEST(slots_are_lossless)
{
    struct codec_spec k = spec_of("uq4", CODEC_K), v = spec_of("uq4", CODEC_V), other = spec_of("tq4", CODEC_V);
    uint64_t state = data_seed(4);
    struct tile_layout l;
    uint8_t *tile, *back, *slots;

    ck_assert_int_eq(tile_layout_init(&l, &k, &v, 17, 128, 64, NULL), 0);
    ck_assert_uint_eq(tile_slot_bytes(&l), 68 + 34);
    tile = malloc(l.bytes);
    back = malloc(l.bytes);
    slots = malloc(17 * 128);
    for (size_t i = 0; i < 17 * 128; i++)
        slots[i] = (uint8_t)data_random(&state);
    ck_assert_int_eq(tile_from_slots(&l, slots, 128, tile), 0);
    for (int t = 0; t < 17; t++) {
        ck_assert_mem_eq(tile + l.k_codes_off + t * 64, slots + t * 128, 64);
        ck_assert_mem_eq(tile + l.k_side_off + t * 4, slots + t * 128 + 64, 4);
        ck_assert_mem_eq(tile + l.v_codes_off + t * 32, slots + t * 128 + 68, 32);
        ck_assert_mem_eq(tile + l.v_side_off + t * 2, slots + t * 128 + 100, 2);
    }
    ck_assert_int_eq(tile_to_slots(&l, tile, slots, 102), 0);
    ck_assert_int_eq(tile_from_slots(&l, slots, 102, back), 0);
    ck_assert_mem_eq(tile, back, l.bytes);
    ck_assert_int_eq(tile_to_slots(&l, tile, slots, 101), -EINVAL);
    ck_assert_int_eq(tile_layout_init(&l, &k, &other, 17, 128, 64, NULL), 0);
    ck_assert_uint_eq(tile_slot_bytes(&l), 0);
    ck_assert_int_eq(tile_from_slots(&l, slots, 4096, tile), -EINVAL);
    free(slots);
    free(back);
    free(tile);
}
END_TEST

/* ---- refusals ---- */

START_TEST(raw_keeps_every_bit)
{
    const struct codec_ops *ops[3];
    size_t n_ops = data_variants(ops);
    uint64_t state = data_seed(5);

    for (size_t v = 0; v < n_ops; v++)
        for (int d = 0; d < 3; d++) {
            struct codec_spec spec = codec_spec_raw(data_dtypes[d]);
            uint8_t src[3 * 320], codes[3 * 320], back[3 * 320];
            size_t row = 80 * codec_dtype_bytes(data_dtypes[d]);

            for (size_t i = 0; i < sizeof(src); i++)
                src[i] = i % 5 ? (uint8_t)data_random(&state) : 0xff;
            ck_assert_int_eq(codec_encode(ops[v], &spec, NULL, data_dtypes[d], src, row, 3, 80, NULL, codes), 0);
            ck_assert_int_eq(codec_decode(ops[v], &spec, NULL, NULL, codes, 3, 80, 0, 3, data_dtypes[d], back, row), 0);
            ck_assert_mem_eq(src, back, 3 * row);
        }
}
END_TEST

/* Each codec's own limit: the last value that it takes and the first that it refuses. */
START_TEST(ranges)
{
    static const struct {
        const char *text;
        float good, bad; /* alone in a token of zeros, 64 channels */
    } cases[] = {
        {"kc4", 65504.0f, 65505.0f},  {"kc4:grid=e2m1", -65504.0f, -65536.0f},
        {"int8", 127 * 65504.0f, 127 * 65520.0f}, {"fp8", 3e38f, INFINITY}, {"uq4:rotate=off", -0x1.fffp111f, 0x1p112f},
        {"raw", 65519.0f, 65520.0f},  {"bf16", 0x1.fe8p127f, 0x1.ffp127f}, {"tq4", 65504.0f, 1e7f}, {"uq4:rotate=on", 0x1.fffp114f, 0x1p115f},
        {"tq3", -65504.0f, 1e30f},
    };
    const struct codec_ops *ops[3];
    size_t n_ops = data_variants(ops);

    for (size_t v = 0; v < n_ops; v++)
        for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
            struct codec_spec spec = spec_of(cases[i].text, CODEC_K);
            float src[2][64] = {{0}, {0}};
            uint8_t side[512], codes[512];
            struct codec_fault fault;

            src[1][37] = cases[i].good;
            ck_assert_msg(codec_encode(ops[v], &spec, NULL, CODEC_F32, src, 256, 2, 64, side, codes) == 0, "%s", cases[i].text);
            ck_assert_int_eq(codec_find_refused(&spec, CODEC_F32, src, 256, 2, 64, &fault), 0);
            ck_assert_int_eq(fault.kind, CODEC_FAULT_NONE);
            src[1][37] = cases[i].bad;
            ck_assert_msg(codec_encode(ops[v], &spec, NULL, CODEC_F32, src, 256, 2, 64, side, codes) == -EDOM, "%s", cases[i].text);
            ck_assert_int_eq(codec_find_refused(&spec, CODEC_F32, src, 256, 2, 64, &fault), 0);
            ck_assert_int_eq(fault.kind, isnan(cases[i].bad)   ? CODEC_FAULT_NAN
                                         : isinf(cases[i].bad) ? CODEC_FAULT_INF
                                                               : CODEC_FAULT_RANGE);
            ck_assert_uint_eq(fault.token, 1);
            ck_assert_uint_eq(fault.channel, 37);
            ck_assert(isnan(cases[i].bad) || fault.value == cases[i].bad);
        }
}
END_TEST

START_TEST(decode_saturates_in_fp16)
{
    struct codec_spec spec = spec_of("f32", CODEC_K);
    const struct codec_ops *ops[3];
    size_t n_ops = data_variants(ops);
    float src[16] = {1e6f, -1e6f, INFINITY, -INFINITY, 65519.9f, 65504.0f};
    uint8_t codes[64];
    uint16_t back[16];

    for (size_t v = 0; v < n_ops; v++) {
        ck_assert_int_eq(codec_encode(ops[v], &spec, NULL, CODEC_F32, src, 64, 1, 16, NULL, codes), 0);
        ck_assert_int_eq(codec_decode(ops[v], &spec, NULL, NULL, codes, 1, 16, 0, 1, CODEC_F16, back, 32), 0);
        for (int i = 0; i < 6; i++)
            ck_assert_uint_eq(back[i], i == 1 || i == 3 ? 0xfbff : 0x7bff);
    }
}
END_TEST

START_TEST(wrong_calls_are_refused)
{
    struct codec_spec spec = spec_of("tq4", CODEC_K);
    uint16_t src[4 * 64] = {0};
    uint8_t side[64], codes[512];
    const struct codec_ops *ops = &codec_ops_scalar;

    ck_assert_int_eq(codec_encode(ops, &spec, NULL, CODEC_F16, src, 127, 4, 64, side, codes), -EINVAL);
    ck_assert_int_eq(codec_encode(ops, &spec, NULL, CODEC_F16, src, 0, 1, 64, side, codes), 0);
    ck_assert_int_eq(codec_encode(ops, &spec, NULL, (enum codec_dtype)0, src, 128, 4, 64, side, codes), -EINVAL);
    ck_assert_int_eq(codec_encode(ops, &spec, NULL, CODEC_F16, src, SIZE_MAX / 2, 4, 64, side, codes), -EINVAL);
    ck_assert_int_eq(codec_encode(ops, &spec, NULL, CODEC_F16, src, 128, 4, 65, side, codes), -EINVAL);
    ck_assert_int_eq(codec_encode(ops, &spec, NULL, CODEC_F16, src, 128, 4, 64, side, codes), 0);
    ck_assert_int_eq(codec_decode(ops, &spec, NULL, side, codes, 4, 64, 2, 5, CODEC_F16, src, 128), -EINVAL);
    ck_assert_int_eq(codec_decode(ops, &spec, NULL, side, codes, 4, 64, 3, 2, CODEC_F16, src, 128), -EINVAL);
    ck_assert_int_eq(codec_decode(ops, &spec, NULL, side, codes, 4, 64, 4, 4, CODEC_F16, src, 128), 0);
    ck_assert_int_eq(codec_decode(ops, &spec, NULL, side, codes, 4, 64, 0, 4, CODEC_F16, src, 100), -EINVAL);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("codec");
    TCase *text = tcase_create("text"), *formats = tcase_create("formats"), *tiles = tcase_create("tiles"),
          *refusals = tcase_create("refusals");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    tcase_add_test(text, text_round_trips);
    tcase_add_test(text, text_means_these_bytes);
    tcase_add_test(text, wrong_text_is_refused);
    tcase_add_test(text, shapes);
    tcase_add_test(text, sizes);
    tcase_add_test(text, dtypes);
    tcase_add_test(text, variant_is_chosen_by_features);
    suite_add_tcase(suite, text);
    tcase_set_timeout(formats, 120);
    tcase_add_test(formats, fp16_conversions);
    tcase_add_test(formats, fp8_is_e4m3_to_nearest_even);
    tcase_add_test(formats, uq4_is_what_it_says);
    tcase_add_test(formats, tables);
    tcase_add_loop_test(formats, ultraquant_slots, 0, 2);
    tcase_add_test(formats, golden_files);
    suite_add_tcase(suite, formats);
    tcase_set_timeout(tiles, 120);
    tcase_add_test(tiles, default_tile_has_no_gaps);
    tcase_add_test(tiles, tile_is_its_parts);
    tcase_add_test(tiles, tile_says_who_was_refused);
    tcase_add_test(tiles, slots_are_lossless);
    suite_add_tcase(suite, tiles);
    tcase_add_test(refusals, raw_keeps_every_bit);
    tcase_add_test(refusals, ranges);
    tcase_add_test(refusals, decode_saturates_in_fp16);
    tcase_add_test(refusals, wrong_calls_are_refused);
    suite_add_tcase(suite, refusals);
    srunner_run_all(runner, CK_ENV);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
