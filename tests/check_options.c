/* Options: the table against itself, the forms of values, the file, the flags, and what is said about what is wrong. */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/options.h"
#include "daemon/options_value.h"

static int known_user(void *ctx, const char *name, uint32_t *ret_uid)
{
    (void)ctx;
    if (strcmp(name, "alice") != 0)
        return -ENOENT;
    *ret_uid = 1000;
    return 0;
}

static int known_group(void *ctx, const char *name, uint32_t *ret_gid)
{
    (void)ctx;
    if (strcmp(name, "research") != 0)
        return -ENOENT;
    *ret_gid = 2000;
    return 0;
}

static const struct id_resolver resolver = {known_user, known_group, NULL};

static int read_text(struct options *o, const char *text, struct option_error *e)
{
    ck_assert_int_eq(options_init(o), 0);
    return options_read_text(o, "kvd.conf", text, strlen(text), &resolver, e);
}

/* text is refused with a message that holds every one of the words. */
static void refused(const char *text, const char *const words[])
{
    struct options o;
    struct option_error e = {""};

    ck_assert_int_eq(read_text(&o, text, &e), -EINVAL);
    for (size_t i = 0; words[i]; i++)
        ck_assert_msg(strstr(e.text, words[i]), "no \"%s\" in: %s", words[i], e.text);
    options_deinit(&o);
}
#define REFUSED(text, ...) refused(text, (const char *const[]){__VA_ARGS__, NULL})

/* ---- the table ---- */

static void check_row(const struct option *o)
{
    char text[OPTION_TEXT_MAX];
    uint64_t v = 0;

    ck_assert_msg(o->minimum <= o->maximum, "%s", o->name);
    ck_assert_msg(strlen(o->help) > 10 && (o->help[strlen(o->help) - 1] == '.'), "%s: help is a sentence", o->name);
    ck_assert_msg(strlen(option_allowed(o, text)) > 2, "%s", o->name);
    if (o->kind == OPTION_STRING) {
        ck_assert_msg(strlen(o->default_text) >= o->minimum && strlen(o->default_text) <= o->maximum, "%s", o->name);
        return;
    }
    if (o->kind == OPTION_IDS)
        return;
    ck_assert_msg(option_value_parse(o, o->default_text, &v) == 0, "%s: default", o->name);
    ck_assert_msg(option_value_parse(o, option_format_value(o, o->minimum, text), &v) == 0 && v == o->minimum, "%s", o->name);
    ck_assert_msg(option_value_parse(o, option_format_value(o, o->maximum, text), &v) == 0 && v == o->maximum, "%s", o->name);
}

START_TEST(rows_hold_together)
{
    const struct option *o;

    for (size_t i = 0; (o = option_at(i)); i++) {
        check_row(o);
        ck_assert_ptr_eq(option_find(o->name), o);
    }
    for (size_t i = 0; (o = tenant_option_at(i)); i++)
        check_row(o);
}
END_TEST

START_TEST(defaults_are_allowed)
{
    struct options o;
    struct option_error e;

    ck_assert_int_eq(options_init(&o), 0);
    ck_assert_int_eq(options_check(&o, &e), 0);
    ck_assert_uint_eq(o.host_bytes, 1 << 30);
    ck_assert_uint_eq(o.hello_timeout, 5000000);
    ck_assert_uint_eq(o.socket_mode, 0660);
    ck_assert_str_eq(o.socket, "/run/kvd/kvd.sock");
    options_deinit(&o);
}
END_TEST

/* ---- values ---- */

START_TEST(forms_of_values)
{
    struct options o;
    struct option_error e;

    ck_assert_int_eq(read_text(&o,
                               "[kvd]\nhost_bytes = 3G ; a remark\nslab-bytes=4 MiB\nstuck_timeout = 90s\nhello_timeout = 250ms\n"
                               "flight_wait_max=2\npolicy = lru\nsocket_mode=0600\nadmin_uids = alice, 7\nadmin_uids = 8\n",
                               &e),
                     0);
    ck_assert_uint_eq(o.host_bytes, UINT64_C(3) << 30);
    ck_assert_uint_eq(o.slab_bytes, 4 << 20);
    ck_assert_uint_eq(o.stuck_timeout, 90000000);
    ck_assert_uint_eq(o.hello_timeout, 250000);
    ck_assert_uint_eq(o.flight_wait_max, 2000000);
    ck_assert_uint_eq(o.policy, 1);
    ck_assert_uint_eq(o.socket_mode, 0600);
    ck_assert_uint_eq(o.admin_uids.n, 3);
    ck_assert_uint_eq(o.admin_uids.ids[0], 1000);
    ck_assert_uint_eq(o.admin_uids.ids[2], 8);
    options_deinit(&o);
}
END_TEST

START_TEST(wrong_values_say_what_is_allowed)
{
    REFUSED("[kvd]\n\nhost_bytes = lots\n", "kvd.conf:3", "host_bytes", "lots", "4M to 1024T");
    REFUSED("host_bytes = 1\n", "kvd.conf:1", "out of range");
    REFUSED("host_bytes = -1G\n", "cannot be understood");
    REFUSED("host_bytes = 99999999999999999999G\n", "out of range");
    REFUSED("host_bytes = 18014398509481985K\n", "out of range"); /* times 1024 is past 2^64 */
    REFUSED("host_bytes = 1X\n", "cannot be understood");
    REFUSED("policy = fifo\n", "policy", "fifo", "s3fifo lru");
    REFUSED("socket_mode = 0999\n", "octal");
    REFUSED("stuck_timeout = 3 weeks\n", "stuck_timeout", "min, h");
    REFUSED("admin_uids = alice, mallory\n", "mallory", "users");
    REFUSED("admin_gids = 4294967295\n", "4294967295");
}
END_TEST

/* ---- the file ---- */

START_TEST(wrong_lines_are_named)
{
    char longest[300];

    REFUSED("[kvd]\n# fine\nhost_byte = 1G\n", "kvd.conf:3", "host_byte", "--help");
    REFUSED("[kvd]\nhost_bytes = 1G\nhost_bytes = 2G\n", "kvd.conf:3", "second time");
    REFUSED("[kvd]\njust words\n", "kvd.conf:2", "key = value");
    REFUSED("[kvd\nhost_bytes = 1G\n", "kvd.conf:1");
    REFUSED("[server]\nhost_bytes = 1G\n", "kvd.conf:1", "[server]", "[tenant NAME]");
    REFUSED("[kvd]\n[server]\n", "kvd.conf:2", "[server]", "[tenant NAME]"); /* also one without keys */
    REFUSED("[tenant a]\nhost_bytes = 1G\n", "kvd.conf:2", "tenant a", "host_bytes");
    REFUSED("[tenant none]\nuid = 1\n", "kvd.conf:1", "none");
    REFUSED("[tenant a b]\nuid = 1\n", "kvd.conf:1", "a b");
    REFUSED("[tenant abcdefghijklmnopqrstuvwxyz0123456789]\nuid = 1\n", "kvd.conf:1", "1 to 32");
    REFUSED("[tenant a]\nweight = 0\n", "kvd.conf:2", "weight", "1 to 10000");
    memset(longest, 'x', sizeof(longest));
    memcpy(longest, "[kvd]\nsocket=/", 14);
    longest[sizeof(longest) - 1] = 0;
    REFUSED(longest, "kvd.conf:2", "longer than");
}
END_TEST

START_TEST(a_zero_byte_is_refused)
{
    static const char text[] = "[kvd]\nhost_bytes = 1G\0\n";
    struct options o;
    struct option_error e;

    ck_assert_int_eq(options_init(&o), 0);
    ck_assert_int_eq(options_read_text(&o, "kvd.conf", text, sizeof(text) - 1, &resolver, &e), -EINVAL);
    ck_assert_ptr_nonnull(strstr(e.text, "kvd.conf:2"));
    options_deinit(&o);
}
END_TEST

START_TEST(tenants_keep_their_order)
{
    struct options o;
    struct option_error e;

    ck_assert_int_eq(read_text(&o, "[tenant b]\nuid = 5\n[tenant a]\ngid = research\nquota = 2G\nweight=300\n[tenant b]\nuid = alice\n", &e), 0);
    ck_assert_uint_eq(o.n_tenants, 2);
    ck_assert_str_eq(o.tenants[0].name, "b");
    ck_assert_uint_eq(o.tenants[0].uid.n, 2);
    ck_assert_uint_eq(o.tenants[0].weight, 100);
    ck_assert_uint_eq(o.tenants[1].gid.ids[0], 2000);
    ck_assert_uint_eq(o.tenants[1].quota, UINT64_C(2) << 30);
    ck_assert_uint_eq(o.tenants[1].weight, 300);
    options_deinit(&o);
}
END_TEST

/* ---- flags ---- */

static int load(struct options *o, const char *config_text, char **argv, struct option_flags *flags, struct option_error *e)
{
    char path[] = "/tmp/check-options-XXXXXX";
    int fd = mkstemp(path), argc = 0, r;

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq((int)write(fd, config_text, strlen(config_text)), (int)strlen(config_text));
    close(fd);
    while (argv[argc])
        argc++;
    r = options_load(o, argc, argv, path, &resolver, flags, e);
    unlink(path);
    return r;
}
#define ARGV(...) (char *[]){(char *)"kvd", __VA_ARGS__, NULL}
#define F(text) ((char *)(text))

START_TEST(flags_come_after_the_file)
{
    struct options o;
    struct option_flags flags;
    struct option_error e;

    ck_assert_int_eq(load(&o, "host_bytes = 2G\nleases = 99\n", ARGV(F("--host-bytes=3G"), F("--socket"), F("/x")), &flags, &e), 0);
    ck_assert_uint_eq(o.host_bytes, UINT64_C(3) << 30);
    ck_assert_uint_eq(o.leases, 99);
    ck_assert_str_eq(o.socket, "/x");
    ck_assert(!flags.help && !flags.check && !flags.version);
    options_deinit(&o);
}
END_TEST

START_TEST(wrong_flags_are_named)
{
    struct options o;
    struct option_flags flags;
    struct option_error e;

    ck_assert_int_eq(load(&o, "", ARGV(F("--hostbytes=3G")), &flags, &e), -EINVAL);
    ck_assert_ptr_nonnull(strstr(e.text, "--hostbytes"));
    ck_assert_int_eq(load(&o, "", ARGV(F("--host-bytes=x")), &flags, &e), -EINVAL);
    ck_assert_ptr_nonnull(strstr(e.text, "host_bytes"));
    ck_assert_int_eq(load(&o, "", ARGV(F("--host-bytes")), &flags, &e), -EINVAL);
    ck_assert_ptr_nonnull(strstr(e.text, "value"));
    ck_assert_int_eq(load(&o, "", ARGV(F("host")), &flags, &e), -EINVAL);
    ck_assert_int_eq(load(&o, "hit_log = 100\n", ARGV(F("--check")), &flags, &e), -EINVAL);
    ck_assert_ptr_nonnull(strstr(e.text, "power of two"));
    ck_assert_int_eq(load(&o, "default_tenant = a b\n", ARGV(F("--check")), &flags, &e), -EINVAL);
    ck_assert_ptr_nonnull(strstr(e.text, "a b"));
    ck_assert_int_eq(load(&o, "socket_group = nobodies\n", ARGV(F("--check")), &flags, &e), -EINVAL);
    ck_assert_ptr_nonnull(strstr(e.text, "nobodies"));
    ck_assert_int_eq(load(&o, "", ARGV(F("--config"), F("/nonexistent/kvd.conf")), &flags, &e), -ENOENT);
    ck_assert_ptr_nonnull(strstr(e.text, "/nonexistent/kvd.conf"));
}
END_TEST

START_TEST(help_does_not_need_a_right_file)
{
    struct options o;
    struct option_flags flags;
    struct option_error e;

    ck_assert_int_eq(load(&o, "nonsense\n", ARGV(F("--help")), &flags, &e), 0);
    ck_assert(flags.help);
    options_deinit(&o);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("options");
    TCase *tc = tcase_create("options");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    tcase_add_test(tc, rows_hold_together);
    tcase_add_test(tc, defaults_are_allowed);
    tcase_add_test(tc, forms_of_values);
    tcase_add_test(tc, wrong_values_say_what_is_allowed);
    tcase_add_test(tc, wrong_lines_are_named);
    tcase_add_test(tc, a_zero_byte_is_refused);
    tcase_add_test(tc, tenants_keep_their_order);
    tcase_add_test(tc, flags_come_after_the_file);
    tcase_add_test(tc, wrong_flags_are_named);
    tcase_add_test(tc, help_does_not_need_a_right_file);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
