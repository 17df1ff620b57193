/* A match, a lease, an attention over what is leased and a release make no system call: in a child that the kernel kills at the
 * first one (seccomp), chains are matched, leased, confirmed, attended to and released thousands of times. A ping under the same
 * filter is killed, so that we know that it bites. */
#include <check.h>
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/content.h"
#include "tests/harness.h"

/* From here on only exit_group is allowed; 0, or -errno where the kernel has no seccomp. */
static int forbid_system_calls(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    };
    struct sock_fprog program = {sizeof(code) / sizeof(code[0]), code};

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
        return -errno;
    return 0;
}

enum what { MATCH_TOKENS, MATCH_DIGESTS, MATCH_MISS, ATTEND, ATTEND_PARTS, CHOOSE, PING };
enum { ROUNDS = 3000, BLOCKS = 32, HEADS_MAX = 8, DIM_MAX = 512, NO_SECCOMP = 77, FAILED = 1 };

struct child {
    kvd *k;
    struct world world;
    kvd_space *space;
    kvd_prefix *prefix;
    uint32_t tokens[2][BLOCKS * 64];
    uint8_t digests[2][BLOCKS * 32];
    kvd_attending *attending;
    float q[HEADS_MAX * DIM_MAX], o[HEADS_MAX * DIM_MAX], lse[HEADS_MAX], mass[BLOCKS];
};

static int setup_child(struct child *c, const char *socket_path, const char *kind)
{
    struct kvd_options options = KVD_OPTIONS_INIT;
    size_t n;

    options.socket_path = socket_path;
    world_init(&c->world, kind);
    if (kvd_attach(&options, &c->k) || kvd_space_open(c->k, &c->world.desc, &c->space) ||
        kvd_prefix_create(c->space, BLOCKS, &c->prefix) || kvd_attending_create(c->space, &c->attending))
        return FAILED;
    for (size_t i = 0; i < HEADS_MAX * DIM_MAX; i++)
        c->q[i] = (float)(i % 7) - 3;
    for (int p = 0; p < 2; p++) {
        n = BLOCKS * c->world.desc.block_tokens;
        world_tokens(&c->world, (uint64_t)p << WORLD_TREE_DEPTH, n, c->tokens[p]);
        world_digests(&c->world, (uint64_t)p << WORLD_TREE_DEPTH, BLOCKS, c->digests[p]);
    }
    return 0;
}

static int publish(struct child *c)
{
    struct tensors t;
    size_t n_tokens = BLOCKS * c->world.desc.block_tokens, n;
    int r = c->world.desc.digest_bytes ? kvd_match_digests(c->prefix, c->digests[0], BLOCKS, &n)
                                       : kvd_match(c->prefix, c->tokens[0], n_tokens, NULL, 0, &n);

    if (r || tensors_init(&t, &c->world, n_tokens))
        return FAILED;
    for (size_t i = 0; i < BLOCKS; i++)
        content_fill(&c->world, kvd_prefix_key(c->prefix, i), &t, i * c->world.desc.block_tokens);
    r = kvd_publish(c->prefix, c->tokens[0], n_tokens, 0, BLOCKS, 0, c->world.desc.dtype, t.kv, NULL);
    tensors_deinit(&t);
    return r ? FAILED : 0;
}

static int attend(struct child *c, enum what what)
{
    static const struct kvd_attention init = KVD_ATTENTION_INIT;
    size_t n_tokens = BLOCKS * c->world.desc.block_tokens, n;
    struct kvd_attend_costs costs = {.size = sizeof(costs)};
    struct kvd_attention a = init;

    if (kvd_match(c->prefix, c->tokens[0], n_tokens, NULL, 0, &n) || n != n_tokens)
        return FAILED;
    a.n_heads = c->world.layers[0].n_kv_heads * 2;
    a.q = c->q;
    a.first_position = (uint32_t)n_tokens;
    a.scale = 0.1f;
    a.n_blocks = BLOCKS;
    a.o = c->o;
    a.lse = c->lse;
    a.mass = c->mass;
    if (what == CHOOSE)
        return kvd_attend_choose(c->prefix, &a, 1, &costs);
    if (what == ATTEND)
        return kvd_attend(c->prefix, &a, KVD_ATTEND_LOCAL);
    if (kvd_attend_begin(c->attending, c->prefix, &a, 2))
        return FAILED;
    while (kvd_attend_work(c->attending) == KVD_OK) {
    }
    return kvd_attend_wait(c->attending, -1);
}

static int rounds(struct child *c, enum what what)
{
    size_t n_tokens = BLOCKS * c->world.desc.block_tokens, n = 0;

    for (int i = 0; i < ROUNDS; i++) {
        if (what == PING)
            return kvd_ping(c->k);
        if (what == ATTEND || what == ATTEND_PARTS || what == CHOOSE) {
            if (i % 30 == 0 && attend(c, what))
                return FAILED;
            continue;
        }
        if (what == MATCH_DIGESTS) {
            if (kvd_match_digests(c->prefix, c->digests[0], BLOCKS, &n) || n != BLOCKS)
                return FAILED;
        } else if (what == MATCH_TOKENS) {
            /* alternate with one that is not there, so that keys are computed anew */
            if (kvd_match(c->prefix, c->tokens[1], n_tokens, NULL, 0, &n) || n != 0 ||
                kvd_match(c->prefix, c->tokens[0], n_tokens, NULL, 0, &n) || n != n_tokens)
                return FAILED;
        } else if (kvd_match(c->prefix, c->tokens[1], n_tokens, NULL, 0, &n) || n != 0) {
            return FAILED;
        }
        kvd_release(c->prefix);
    }
    return 0;
}

static int run_child(const char *socket_path, const char *kind, enum what what)
{
    struct child *c = calloc(1, sizeof(*c));

    if (!c || setup_child(c, socket_path, kind) || publish(c))
        return FAILED;
    if (rounds(c, what == PING ? MATCH_MISS : what)) /* the first touches of memory */
        return FAILED;
    if (forbid_system_calls() < 0)
        return NO_SECCOMP;
    _exit(rounds(c, what)); /* exit_group alone */
}

static int child_status(struct harness *h, const char *kind, enum what what)
{
    pid_t pid = test_fork();
    int status;

    if (pid == 0)
        _exit(run_child(h->socket, kind, what));
    waitpid(pid, &status, 0);
    return status;
}

START_TEST(no_system_call)
{
    static const struct {
        const char *kind;
        enum what what;
    } cases[] = {{"raw", MATCH_TOKENS}, {"raw", MATCH_MISS}, {"slide", MATCH_TOKENS}, {"digest", MATCH_DIGESTS},
                 {"raw", ATTEND}, {"default", ATTEND}, {"slide", ATTEND}, {"default", ATTEND_PARTS}, {"default", CHOOSE}};
    struct harness h;
    int status;

    harness_init(&h);
    harness_start(&h);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        status = child_status(&h, cases[i].kind, cases[i].what);
        ck_assert_msg(!WIFSIGNALED(status), "%s: killed by signal %d: a system call", cases[i].kind, WTERMSIG(status));
        if (WEXITSTATUS(status) == NO_SECCOMP)
            printf("this kernel has no seccomp: not checked\n");
        else
            ck_assert_int_eq(WEXITSTATUS(status), 0);
    }
    status = child_status(&h, "raw", PING);
    ck_assert((WIFEXITED(status) && WEXITSTATUS(status) == NO_SECCOMP) || (WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS));
    ck_assert_int_eq(harness_stop(&h), 0);
    harness_deinit(&h);
}
END_TEST

int main(void)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    puts("sanitizers make system calls of their own");
    return NO_SECCOMP;
#endif
    Suite *suite = suite_create("nosyscall");
    TCase *tc = tcase_create("match");
    SRunner *runner = srunner_create(suite);
    int n_failed;

    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, no_system_call);
    suite_add_tcase(suite, tc);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
