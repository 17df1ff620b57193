/* CRC32C and the processor's features that choose it. */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/crc32c.h"

/* The machine's variants, the table first. */
static size_t variants(crc32c_fn ret_fn[2])
{
    struct cpu_features cpu;

    cpu_detect(&cpu);
    ret_fn[0] = crc32c_table;
    ret_fn[1] = crc32c_choose(&cpu);
    return ret_fn[1] == crc32c_table ? 1 : 2;
}

/* RFC 3720, B.4, and the usual nine digits. */
START_TEST(known_answers)
{
    uint8_t zeros[32] = {0}, ones[32], rising[32], falling[32];
    crc32c_fn fn[2];
    size_t n = variants(fn);

    memset(ones, 0xff, 32);
    for (int i = 0; i < 32; i++) {
        rising[i] = (uint8_t)i;
        falling[i] = (uint8_t)(31 - i);
    }
    for (size_t v = 0; v < n; v++) {
        ck_assert_uint_eq(fn[v](0, "123456789", 9), 0xe3069283);
        ck_assert_uint_eq(fn[v](0, zeros, 32), 0x8a9136aa);
        ck_assert_uint_eq(fn[v](0, ones, 32), 0x62a8ab43);
        ck_assert_uint_eq(fn[v](0, rising, 32), 0x46dd794e);
        ck_assert_uint_eq(fn[v](0, falling, 32), 0x113fdb5c);
        ck_assert_uint_eq(fn[v](0, NULL, 0), 0);
        ck_assert_uint_eq(fn[v](0x1234, zeros, 0), 0x1234);
    }
}
END_TEST

/* Bit by bit, the definition. */
static uint32_t definition(uint32_t crc, const uint8_t *p, size_t n)
{
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int b = 0; b < 8; b++)
            crc = crc & 1 ? crc >> 1 ^ 0x82f63b78u : crc >> 1;
    }
    return ~crc;
}

/* All lengths about the sizes at which the fast variant changes its way, at odd addresses, split anywhere, and joined. */
START_TEST(variants_agree)
{
    enum { N = 8000 };
    static uint8_t data[N + 16];
    crc32c_fn fn[2];
    size_t n = variants(fn);

    srand(1);
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(rand() >> 7);
    for (size_t len = 0; len < N; len += len < 800 || (len > 3000 && len < 3500) ? 1 : 61) {
        const uint8_t *p = data + len % 13;
        uint32_t want = definition(0, p, len);
        size_t cut = len ? (size_t)rand() % len : 0;

        for (size_t v = 0; v < n; v++) {
            uint32_t first = fn[v](0, p, cut);

            ck_assert_msg(fn[v](0, p, len) == want, "length %zu", len);
            ck_assert_msg(fn[v](first, p + cut, len - cut) == want, "length %zu cut at %zu", len, cut);
        }
    }
}
END_TEST

START_TEST(features_choose)
{
    struct cpu_features cpu = {0};

    ck_assert_ptr_eq((void *)crc32c_choose(NULL), (void *)crc32c_table);
    ck_assert_ptr_eq((void *)crc32c_choose(&cpu), (void *)crc32c_table);
    cpu.sse42 = true;
    ck_assert_ptr_eq((void *)crc32c_choose(&cpu), (void *)crc32c_table);
    cpu.pclmul = true;
    ck_assert_ptr_eq((void *)crc32c_choose(&cpu), (void *)crc32c_sse42);
    ck_assert_int_eq(cpu_limit(&cpu, "avx2"), 0);
    ck_assert_ptr_eq((void *)crc32c_choose(&cpu), (void *)crc32c_sse42);
    ck_assert_int_eq(cpu_limit(&cpu, "scalar"), 0);
    ck_assert_ptr_eq((void *)crc32c_choose(&cpu), (void *)crc32c_table);
}
END_TEST

/* What implies what, and that a level takes away all above it. */
START_TEST(features_are_consistent)
{
    struct cpu_features native, cpu;

    cpu_detect(&native);
    ck_assert(!native.avx512 || native.avx2);
    ck_assert(!(native.avx512_vbmi || native.avx512_vnni || native.avx512_bf16) || native.avx512);
    ck_assert(!native.avx2 || native.sse42);
#ifdef __GNUC__
    ck_assert(!native.avx2 || __builtin_cpu_supports("avx2"));
    ck_assert(!native.avx512 || __builtin_cpu_supports("avx512bw"));
#endif
    cpu = native;
    ck_assert_int_eq(cpu_limit(&cpu, "native"), 0);
    ck_assert_mem_eq(&cpu, &native, sizeof(cpu));
    ck_assert_int_eq(cpu_limit(&cpu, "avx512"), 0);
    ck_assert_mem_eq(&cpu, &native, sizeof(cpu));
    ck_assert_int_eq(cpu_limit(&cpu, "avx2"), 0);
    ck_assert(!cpu.avx512 && !cpu.avx512_vbmi && !cpu.avx512_vnni && !cpu.avx512_bf16 && cpu.avx2 == native.avx2);
    ck_assert_int_eq(cpu_limit(&cpu, "sse9"), -EINVAL);
    ck_assert(cpu.avx2 == native.avx2);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("crc32c");
    TCase *tcase = tcase_create("crc32c");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    tcase_add_test(tcase, known_answers);
    tcase_add_test(tcase, variants_agree);
    tcase_add_test(tcase, features_choose);
    tcase_add_test(tcase, features_are_consistent);
    tcase_set_timeout(tcase, 120);
    suite_add_tcase(suite, tcase);
    srunner_run_all(runner, CK_ENV);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
