#include "tests/harness.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

uint64_t test_usec(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

void test_sleep_usec(uint64_t usec)
{
    struct timespec t = {(time_t)(usec / 1000000), (long)(usec % 1000000 * 1000)};

    while (nanosleep(&t, &t) < 0 && errno == EINTR) {
    }
}

uint64_t test_seed(const char *name)
{
    const char *given = getenv("KVD_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 0) : test_usec() ^ ((uint64_t)getpid() << 40);

    printf("%s: seed %llu (KVD_SEED)\n", name, (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

void test_die(const struct harness *h, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fputs("test: ", stderr);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    if (h) {
        char *log = harness_log_text(h);

        fprintf(stderr, "---- the daemon said ----\n%s", log);
        free(log);
    }
    exit(1);
}

pid_t test_fork(void)
{
    pid_t parent = getpid(), pid;

    fflush(NULL);
    pid = fork();
    if (pid < 0)
        test_die(NULL, "fork: %s", strerror(errno));
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
    }
    return pid;
}

/* ---- folder and configuration ---- */

static const char *program(const char *variable, const char *name, char buf[4096])
{
    const char *given = getenv(variable), *build = getenv("KVD_BUILDDIR");

    if (given)
        return given;
    snprintf(buf, 4096, "%s/%s", build ? build : ".", name);
    return buf;
}

void harness_init(struct harness *h)
{
    memset(h, 0, sizeof(*h));
    snprintf(h->dir, sizeof(h->dir), "/tmp/kvd-test-XXXXXX");
    if (!mkdtemp(h->dir))
        test_die(NULL, "mkdtemp: %s", strerror(errno));
    if (chmod(h->dir, 0755) < 0)
        test_die(NULL, "chmod: %s", strerror(errno));
    h->uid = getuid();
    snprintf(h->socket, sizeof(h->socket), "%s/kvd.sock", h->dir);
    snprintf(h->config, sizeof(h->config), "%s/kvd.conf", h->dir);
    snprintf(h->log, sizeof(h->log), "%s/log", h->dir);
    harness_option(h, "host_bytes = 64M");
    harness_option(h, "slab_bytes = 2M");
    harness_option(h, "index_entries = 8192");
}

void harness_deinit(struct harness *h)
{
    if (h->pid)
        harness_kill(h);
    h->admin = kvd_detach(h->admin);
    if (h->dir[0]) {
        char command[128];

        snprintf(command, sizeof(command), "rm -rf %s", h->dir);
        if (system(command) != 0)
            test_die(NULL, "%s failed", command);
    }
    h->dir[0] = '\0';
}

/* An option given twice replaces the first one, so that defaults of ours give way. */
void harness_option(struct harness *h, const char *line)
{
    const char *eq = strchr(line, '=');
    size_t n_name = eq && *line != '[' && !strchr(h->options, '[') ? (size_t)(eq - line) + 1 : 0;
    size_t used;

    for (char *at = h->options; n_name && *at; at = strchr(at, '\n') + 1)
        if (strncmp(at, line, n_name) == 0) {
            char *next = strchr(at, '\n') + 1;

            memmove(at, next, strlen(next) + 1);
            break;
        }
    used = strlen(h->options);
    if (used + strlen(line) + 2 > sizeof(h->options))
        test_die(NULL, "too many options");
    snprintf(h->options + used, sizeof(h->options) - used, "%s\n", line);
}

void harness_write_config(struct harness *h)
{
    FILE *f = fopen(h->config, "w");

    if (!f || fprintf(f, "[kvd]\nsocket = %s\n%s", h->socket, h->options) < 0 || fclose(f))
        test_die(NULL, "%s: %s", h->config, strerror(errno));
}

/* In a child: becomes argv[0] as uid. The file is opened before the user changes, because a tree in somebody's home folder is often
 * closed to other users. Returns only if it fails. */
static void exec_as(uid_t uid, char *const argv[])
{
    int fd = open(argv[0], O_PATH | O_CLOEXEC);

    if (uid != getuid() && (setgroups(0, NULL) < 0 || setgid(uid) < 0 || setuid(uid) < 0))
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a change of user clears it */
    execv(argv[0], argv);
    if (errno == EACCES && fd >= 0)
        fexecve(fd, argv, environ);
}

/* ---- the daemon's life ---- */

static void exec_daemon(const struct harness *h, const char *extra_flag)
{
    char buf[4096];
    const char *path = program("KVD_BIN", "kvd", buf);
    int log = open(h->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);

    if (log < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0)
        _exit(126);
    exec_as(h->uid, (char *[]){(char *)path, "--config", (char *)h->config, (char *)extra_flag, NULL});
    dprintf(2, "%s: %s\n", path, strerror(errno));
    _exit(127);
}

bool harness_alive(struct harness *h)
{
    int status;

    return h->pid && waitpid(h->pid, &status, WNOHANG) == 0;
}

static kvd *try_admin(const struct harness *h)
{
    struct kvd_options options = KVD_OPTIONS_INIT;
    kvd *k;

    options.socket_path = h->socket;
    options.name = "harness";
    options.admin_only = 1;
    options.timeout_msec = 60000;
    return kvd_attach(&options, &k) == KVD_OK ? k : NULL;
}

void harness_start(struct harness *h)
{
    uint64_t begun = test_usec();

    harness_write_config(h);
    if (h->uid != getuid() && chown(h->dir, h->uid, h->uid) < 0)
        test_die(NULL, "chown: %s", strerror(errno));
    h->admin = kvd_detach(h->admin);
    h->pid = test_fork();
    if (h->pid == 0)
        exec_daemon(h, NULL);
    while (!(h->admin = try_admin(h))) {
        if (!harness_alive(h))
            test_die(h, "the daemon ended at once");
        if (test_usec() - begun > 30000000)
            test_die(h, "the daemon does not answer: %s", kvd_message(NULL));
        test_sleep_usec(1000);
    }
}

int harness_start_refused(struct harness *h, const char *extra_flag)
{
    pid_t pid;
    int status;

    pid = test_fork();
    if (pid == 0)
        exec_daemon(h, extra_flag);
    for (int i = 0; i < 3000; i++) {
        if (waitpid(pid, &status, WNOHANG) == pid)
            return status;
        test_sleep_usec(10000);
    }
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    test_die(h, "a daemon that should have refused to start did not");
}

static int collect(struct harness *h, int sig)
{
    int status = 0;

    h->admin = kvd_detach(h->admin);
    if (kill(h->pid, sig) < 0)
        test_die(h, "kill: %s", strerror(errno));
    for (uint64_t begun = test_usec(); waitpid(h->pid, &status, WNOHANG) == 0; test_sleep_usec(500))
        if (test_usec() - begun > 60000000)
            test_die(h, "the daemon does not end by signal %d", sig);
    h->pid = 0;
    return status;
}

void harness_kill(struct harness *h)
{
    collect(h, SIGKILL);
}

int harness_stop(struct harness *h)
{
    return collect(h, SIGTERM);
}

char *harness_log_text(const struct harness *h)
{
    FILE *f = fopen(h->log, "r");
    size_t n = 0, cap = 1 << 20;
    char *text = malloc(cap + 1);

    if (!text)
        abort();
    if (f) {
        n = fread(text, 1, cap, f);
        fclose(f);
    }
    text[n] = '\0';
    return text;
}

bool harness_logged(const struct harness *h, const char *what)
{
    for (int i = 0; i < 500; i++) {
        char *text = harness_log_text(h);
        bool found = strstr(text, what) != NULL;

        free(text);
        if (found)
            return true;
        test_sleep_usec(10000);
    }
    return false;
}

/* ---- what the daemon says of itself ---- */

kvd *harness_admin(struct harness *h)
{
    if (!h->admin && !(h->admin = try_admin(h)))
        test_die(h, "attach as admin: %s", kvd_message(NULL));
    return h->admin;
}

struct stat_query {
    const char *name, *label;
    uint64_t sum;
    size_t n;
};

static int add_stat(void *ctx, const struct kvd_metric *m)
{
    struct stat_query *q = ctx;

    if (strcmp(m->name, q->name) == 0 && (!q->label || strcmp(m->label, q->label) == 0)) {
        q->sum += m->value;
        q->n++;
    }
    return 0;
}

uint64_t harness_stat(struct harness *h, const char *name, const char *label)
{
    struct stat_query q = {name, label, 0, 0};
    kvd *k = harness_admin(h);
    int r = kvd_admin_stats(k, add_stat, &q);

    if (r)
        test_die(h, "stats: %s: %s", kvd_strerror(r), kvd_message(k));
    if (q.n == 0)
        test_die(h, "there is no metric %s%s%s", name, label ? " with label " : "", label ? label : "");
    return q.sum;
}

static int add_worker(void *ctx, const struct kvd_worker_info *info)
{
    struct harness_workers *sum = ctx;

    if (strcmp(info->name, "harness") == 0)
        return 0;
    sum->n++;
    sum->leases += info->leases;
    sum->staging_bytes += info->staging_bytes;
    sum->jobs += info->jobs;
    return 0;
}

struct harness_workers harness_list_workers(struct harness *h)
{
    struct harness_workers sum = {0};
    kvd *k = harness_admin(h);
    int r = kvd_admin_workers(k, add_worker, &sum);

    if (r)
        test_die(h, "list workers: %s: %s", kvd_strerror(r), kvd_message(k));
    return sum;
}

bool harness_quiet(struct harness *h, size_t n_left, unsigned timeout_msec)
{
    uint64_t begun = test_usec();

    for (;;) {
        struct harness_workers w = harness_list_workers(h);

        if (w.n <= n_left && (n_left || (!w.leases && !w.staging_bytes && !w.jobs)))
            return true;
        if (test_usec() - begun > (uint64_t)timeout_msec * 1000)
            return false;
        test_sleep_usec(2000);
    }
}

uint64_t harness_verify(struct harness *h)
{
    struct kvd_selector all = {0};
    struct kvd_verify_result result;
    kvd *k = harness_admin(h);
    int r = kvd_admin_verify(k, &all, &result);

    if (r)
        test_die(h, "verify: %s: %s", kvd_strerror(r), kvd_message(k));
    return result.n_bad;
}

/* ---- workers ---- */

void worker_start(struct worker *w, const struct harness *h, uid_t uid)
{
    int in[2], out[2];

    memset(w, 0, sizeof(*w));
    if (pipe2(in, O_CLOEXEC) < 0 || pipe2(out, O_CLOEXEC) < 0)
        test_die(NULL, "pipe: %s", strerror(errno));
    w->pid = test_fork();
    if (w->pid == 0) {
        char buf[4096];
        const char *path = program("KVD_WORKER", "tests/worker", buf);

        if (dup2(in[0], 0) < 0 || dup2(out[1], 1) < 0)
            _exit(126);
        exec_as(uid == (uid_t)-1 ? getuid() : uid, (char *[]){(char *)path, "script", (char *)h->socket, NULL});
        _exit(127);
    }
    close(in[0]);
    close(out[1]);
    w->to = fdopen(in[1], "w");
    w->from = fdopen(out[0], "r");
    if (!w->to || !w->from)
        test_die(NULL, "fdopen: %s", strerror(errno));
    worker_ask(w, "info"); /* it has attached, or tried to */
}

__attribute__((format(printf, 2, 0))) static void tell(struct worker *w, const char *format, va_list args)
{
    vfprintf(w->to, format, args);
    fputc('\n', w->to);
    fflush(w->to);
}

void worker_tell(struct worker *w, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    tell(w, format, args);
    va_end(args);
}

const char *worker_answer(struct worker *w)
{
    if (!fgets(w->reply, sizeof(w->reply), w->from))
        test_die(NULL, "a worker ended in the middle of its work");
    w->reply[strcspn(w->reply, "\n")] = '\0';
    return w->reply;
}

const char *worker_ask(struct worker *w, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    tell(w, format, args);
    va_end(args);
    return worker_answer(w);
}

static int worker_collect(struct worker *w)
{
    int status = 0;

    fclose(w->to);
    fclose(w->from);
    waitpid(w->pid, &status, 0);
    w->pid = 0;
    return status;
}

void worker_kill(struct worker *w)
{
    kill(w->pid, SIGKILL);
    worker_collect(w);
}

int worker_stop(struct worker *w)
{
    worker_tell(w, "quit");
    return worker_collect(w);
}

/* ---- load ---- */

struct board *board_create(const struct harness *h, char ret_path[128])
{
    struct board *b;
    int fd;

    snprintf(ret_path, 128, "%s/board", h->dir);
    fd = open(ret_path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0 || ftruncate(fd, sizeof(*b)) < 0)
        test_die(NULL, "%s: %s", ret_path, strerror(errno));
    b = mmap(NULL, sizeof(*b), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (b == MAP_FAILED)
        test_die(NULL, "mmap: %s", strerror(errno));
    close(fd);
    return b;
}

void board_destroy(struct board *b)
{
    munmap(b, sizeof(*b));
}

pid_t stress_start(const struct harness *h, const char *board_path, unsigned slot, uint64_t seed, const char *kinds)
{
    char slot_text[16], seed_text[32];
    pid_t pid;

    snprintf(slot_text, sizeof(slot_text), "%u", slot);
    snprintf(seed_text, sizeof(seed_text), "%llu", (unsigned long long)seed);
    pid = test_fork();
    if (pid == 0) {
        char buf[4096];
        const char *path = program("KVD_WORKER", "tests/worker", buf);

        execl(path, path, "stress", h->socket, board_path, slot_text, seed_text, kinds, (char *)NULL);
        _exit(127);
    }
    return pid;
}
