/* Frames, keys and look-up: known answers, every way a packet can be wrong, and an index image full of garbage. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "proto/frame.h"
#include "proto/key.h"
#include "proto/lookup.h"

static void hex(const uint8_t *p, char *ret)
{
    for (int i = 0; i < 32; i++)
        sprintf(ret + 2 * i, "%02x", p[i]);
}

START_TEST(keys_have_known_answers)
{
    struct key_hasher *h;
    uint8_t parent[32] = {0}, key[32];
    uint32_t tokens[64], one = 1;
    char text[65];

    ck_assert_int_eq(key_hasher_create(&h), 0);
    for (uint32_t i = 0; i < 64; i++)
        tokens[i] = i;
    ck_assert_int_eq(key_block(h, parent, tokens, 64, NULL, 0, key), 0);
    hex(key, text);
    ck_assert_str_eq(text, "a0bee648f58e5b04441f8e754692b65bdae8c364157afb7f8cb576c8310c7ca4");
    for (int i = 0; i < 32; i++)
        parent[i] = (uint8_t)i;
    ck_assert_int_eq(key_block(h, parent, &one, 1, "lora", 4, parent), 0); /* in place */
    hex(parent, text);
    ck_assert_str_eq(text, "438d0e85e2a4741d01b1e408406d1aee56bd4537940a105e4379fbf352afaa66");
    ck_assert_int_eq(key_block(h, parent, tokens, 0, NULL, 0, key), -EINVAL);
    ck_assert_int_eq(key_block(h, parent, tokens, 1, tokens, KEY_EXTRA_MAX + 1, key), -EINVAL);
    key_hasher_destroy(h);
}
END_TEST

static const char *parse_error(const void *packet, size_t n, size_t n_fds, int want)
{
    struct frame_header h;
    const uint8_t *body;
    const char *reason = NULL;

    ck_assert_int_eq(frame_parse(packet, n, n_fds, &h, &body, &reason), want);
    return reason ? reason : "";
}

START_TEST(malformed_packets_are_named)
{
    uint8_t p[64];
    struct frame_header h;
    const uint8_t *body;
    const char *reason;

    frame_header_pack(p, FRAME_PING, 7, 3, 0);
    ck_assert_int_eq(frame_parse(p, 27, 0, &h, &body, &reason), 0);
    ck_assert(h.type == FRAME_PING && h.request_id == 7 && h.length == 3 && body == p + 24);
    ck_assert_ptr_nonnull(strstr(parse_error(p, 23, 0, -EBADMSG), "24 bytes"));
    ck_assert_ptr_nonnull(strstr(parse_error(p, 26, 0, -EBADMSG), "length"));
    ck_assert_ptr_nonnull(strstr(parse_error(p, 28, 0, -EBADMSG), "length"));
    ck_assert_ptr_nonnull(strstr(parse_error(p, 27, 1, -EBADMSG), "n_fds"));
    frame_header_pack(p, FRAME_PING, 0, 3, 0);
    ck_assert_ptr_nonnull(strstr(parse_error(p, 27, 0, -EBADMSG), "request id"));
    frame_header_pack(p, FRAME_PING, 7, FRAME_BODY_MAX + 1, 0);
    ck_assert_ptr_nonnull(strstr(parse_error(p, 27, 0, -EBADMSG), "98304"));
    frame_header_pack(p, FRAME_PING, 7, 3, 0);
    p[18] = 1;
    ck_assert_ptr_nonnull(strstr(parse_error(p, 27, 0, -EBADMSG), "reserved"));
    frame_header_pack(p, FRAME_PING, 7, 3, 0);
    p[4] = 9;
    ck_assert_ptr_nonnull(strstr(parse_error(p, 27, 0, -EPROTONOSUPPORT), "version"));
    ck_assert_int_eq(frame_parse(p, 27, 0, &h, &body, &reason), -EPROTONOSUPPORT);
    ck_assert_uint_eq(h.request_id, 7); /* so that the asker can be told */
    p[0] = 'X';
    ck_assert_ptr_nonnull(strstr(parse_error(p, 27, 0, -EBADMSG), "magic"));
}
END_TEST

/* A packet without a byte, with a descriptor. */
static void send_empty(int fd, int passed)
{
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(sizeof(int))];
    } control = {.buf = {0}};
    struct msghdr msg = {.msg_control = control.buf, .msg_controllen = sizeof(control.buf)};
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &passed, sizeof(int));
    ck_assert_int_eq((int)sendmsg(fd, &msg, 0), 0);
}

START_TEST(descriptors_travel_and_never_leak)
{
    static uint8_t buf[FRAME_MAX];
    int pair[2], fds[FRAME_FDS_MAX], sent[FRAME_FDS_MAX + 1], before, after;
    size_t n, n_fds;

    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    for (size_t i = 0; i < FRAME_FDS_MAX + 1; i++)
        sent[i] = pair[0];
    ck_assert_int_eq(frame_send(pair[0], FRAME_PING, 1, "abc", 3, sent, FRAME_FDS_MAX + 1, 0), -EINVAL);
    ck_assert_int_eq(frame_send(pair[0], FRAME_PING, 1, buf, FRAME_BODY_MAX + 1, NULL, 0, 0), -EMSGSIZE);
    ck_assert_int_eq(frame_send(pair[0], FRAME_PING, 1, "abc", 3, sent, 2, 0), 0);
    ck_assert_int_eq(frame_recv(pair[1], buf, sizeof(buf), 0, &n, fds, &n_fds), 0);
    ck_assert(n == 27 && n_fds == 2);
    ck_assert_int_eq(fcntl(fds[0], F_GETFD), FD_CLOEXEC);
    close(fds[0]);
    close(fds[1]);
    /* a packet too long for the buffer is refused and its descriptors are closed */
    before = dup(0);
    close(before);
    ck_assert_int_eq(frame_send(pair[0], FRAME_PING, 1, buf, 1000, sent, 3, 0), 0);
    ck_assert_int_eq(frame_recv(pair[1], buf, 100, 0, &n, fds, &n_fds), -EMSGSIZE);
    after = dup(0);
    close(after);
    ck_assert_int_eq(before, after);
    /* so are those of an empty packet, which looks like the end of the stream */
    send_empty(pair[0], pair[0]);
    ck_assert_int_eq(frame_recv(pair[1], buf, sizeof(buf), 0, &n, fds, &n_fds), 0);
    ck_assert(n == 0 && n_fds == 0);
    after = dup(0);
    close(after);
    ck_assert_int_eq(before, after);
    close(pair[0]);
    ck_assert_int_eq(frame_recv(pair[1], buf, sizeof(buf), 0, &n, fds, &n_fds), 0);
    ck_assert_uint_eq(n, 0);
    ck_assert_int_eq(frame_send(pair[1], FRAME_PING, 1, NULL, 0, NULL, 0, 0), -EPIPE); /* and no SIGPIPE */
    close(pair[1]);
}
END_TEST

/* A reader over an image that a broken writer left: any answer, no fault, no endless loop. ASan watches the bounds. */
START_TEST(garbage_index_is_harmless)
{
    const char *seed = getenv("KVD_SEED");
    uint64_t rng = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL) | 1;
    size_t bytes = 4096 + 64 * 64 + 256 * 64;
    uint8_t *image = aligned_alloc(64, bytes);
    struct lookup_view view;

    printf("garbage_index: KVD_SEED=%llu\n", (unsigned long long)rng);
    for (int round = 0; round < 200; round++) {
        struct shm_index_header *h = (void *)image;
        static struct lookup_hit hits[300];
        static uint8_t keys[300 * 32];

        for (size_t i = 0; i < bytes; i += 8) {
            rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
            memcpy(image + i, &rng, 8);
        }
        h->magic = SHM_INDEX_MAGIC;
        h->version = SHM_VERSION;
        h->header_bytes = 4096;
        h->flags_incompat = 0;
        h->n_buckets = 64;
        h->n_entries = 256;
        h->buckets_off = 4096;
        h->entries_off = 4096 + 64 * 64;
        ck_assert_int_eq(lookup_view_init(image, bytes, &view), 0);
        for (int i = 0; i < 256; i++) { /* half of the entries look sane, so that keys match now and then */
            memcpy(keys + i * 32, view.entries[i].key, 32);
            ((struct shm_bucket *)(void *)(image + 4096))[i % 64].entry[i % 8] = (uint32_t)i;
        }
        for (int i = 0; i < 64; i++)
            (void)lookup_find(&view, keys + i * 32, (uint16_t)rng, (uint8_t)round, &hits[0]);
        (void)lookup_find_many(&view, keys, 300, 1, 0, round & 1, hits);
    }
    ck_assert_int_eq(lookup_view_init(image, bytes - 1, &view), -EINVAL);
    ck_assert_int_eq(lookup_view_init(image, 100, &view), -EINVAL);
    ((struct shm_index_header *)(void *)image)->n_buckets = 63;
    ck_assert_int_eq(lookup_view_init(image, bytes, &view), -EINVAL);
    ((struct shm_index_header *)(void *)image)->flags_incompat = 1;
    ck_assert_int_eq(lookup_view_init(image, bytes, &view), -EPROTONOSUPPORT);
    free(image);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("proto");
    TCase *t = tcase_create("proto");
    SRunner *runner;
    int failed;

    tcase_add_test(t, keys_have_known_answers);
    tcase_add_test(t, malformed_packets_are_named);
    tcase_add_test(t, descriptors_travel_and_never_leak);
    tcase_add_test(t, garbage_index_is_harmless);
    suite_add_tcase(s, t);
    runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
