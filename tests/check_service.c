/* The daemon as a service manager meets it: readiness, status, watchdog, reload, stop, and a socket that is passed in.
 *
 * The manager is this process: it binds $NOTIFY_SOCKET and passes the listening socket by the LISTEN_FDS protocol, once by
 * itself and once through systemd-socket-activate (where the machine has it). The daemon is $KVD_BIN, else kvd in
 * $KVD_BUILDDIR. Waits have no length of their own: they end with the event, with the daemon, or with libcheck's guard. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/libkvd/kvd.h"

enum { LISTEN_FD = 3, WATCHDOG_USEC = 400000 };

struct manager {
    char dir[64];
    char socket[96];
    char config[96];
    char notify[96];
    char log[96];
    int notify_fd;
    pid_t pid;
    char said[4096]; /* the last notification, fields separated by newlines, with one in front and one behind */
};

static struct manager m;

static struct sockaddr_un address(const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};

    ck_assert_uint_lt(strlen(path), sizeof(a.sun_path));
    strcpy(a.sun_path, path);
    return a;
}

static void write_config(const char *text)
{
    FILE *f = fopen(m.config, "w");

    ck_assert_ptr_nonnull(f);
    ck_assert_int_ge(fputs(text, f), 0);
    ck_assert_int_eq(fclose(f), 0);
}

static void setup(void)
{
    memset(&m, 0, sizeof(m));
    strcpy(m.dir, "/tmp/kvd-service-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(m.dir));
    snprintf(m.socket, sizeof(m.socket), "%s/kvd.sock", m.dir);
    snprintf(m.config, sizeof(m.config), "%s/kvd.conf", m.dir);
    snprintf(m.notify, sizeof(m.notify), "%s/notify", m.dir);
    snprintf(m.log, sizeof(m.log), "%s/log", m.dir);
    write_config("host_bytes = 16M\nslab_bytes = 2M\nindex_entries = 1024\nlog_level = debug\n");

    struct sockaddr_un a = address(m.notify);
    m.notify_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    ck_assert_int_ge(m.notify_fd, 0);
    ck_assert_int_eq(bind(m.notify_fd, (struct sockaddr *)&a, sizeof(a)), 0);
}

static void print_log(void)
{
    char line[512];
    FILE *f = fopen(m.log, "r");

    while (f && fgets(line, sizeof(line), f))
        printf("    kvd: %s", line);
    if (f)
        fclose(f);
}

static bool logged(const char *text)
{
    char line[512];
    bool found = false;
    FILE *f = fopen(m.log, "r");

    while (f && !found && fgets(line, sizeof(line), f))
        found = strstr(line, text) != NULL;
    if (f)
        fclose(f);
    return found;
}

static void teardown(void)
{
    if (m.pid > 0) {
        kill(m.pid, SIGKILL);
        waitpid(m.pid, NULL, 0);
    }
    print_log();
    close(m.notify_fd);
    unlink(m.notify);
    unlink(m.socket);
    unlink(m.config);
    unlink(m.log);
    rmdir(m.dir);
}

static const char *daemon_path(void)
{
    static char path[4096];
    const char *named = getenv("KVD_BIN"), *build = getenv("KVD_BUILDDIR");

    if (named)
        return named;
    snprintf(path, sizeof(path), "%s/kvd", build ? build : ".");
    return path;
}

/* In the child: become argv[0], with the log as its output and a listening socket as descriptor 3 if listen_fd >= 0. */
static void become(char *const *argv, int listen_fd, bool watchdog)
{
    char number[32];
    FILE *log = freopen(m.log, "a", stderr);

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (!log || dup2(STDERR_FILENO, STDOUT_FILENO) < 0)
        _exit(125);
    setenv("NOTIFY_SOCKET", m.notify, 1);
    snprintf(number, sizeof(number), "%d", (int)getpid());
    if (watchdog) {
        setenv("WATCHDOG_PID", number, 1);
        snprintf(number, sizeof(number), "%d", (int)WATCHDOG_USEC);
        setenv("WATCHDOG_USEC", number, 1);
    }
    if (listen_fd >= 0) {
        snprintf(number, sizeof(number), "%d", (int)getpid());
        setenv("LISTEN_PID", number, 1);
        setenv("LISTEN_FDS", "1", 1);
        setenv("LISTEN_FDNAMES", "attach", 1);
        /* dup2() onto itself would leave it close-on-exec. */
        int r = listen_fd == LISTEN_FD ? fcntl(LISTEN_FD, F_SETFD, 0) : dup2(listen_fd, LISTEN_FD);
        if (r < 0)
            _exit(125);
    }
    execvp(argv[0], argv);
    fprintf(stderr, "%s: %s\n", argv[0], strerror(errno));
    _exit(126);
}

static void start(int listen_fd, bool watchdog)
{
    char *argv[] = {(char *)daemon_path(), "--config", m.config, "--socket", m.socket, NULL};

    fflush(NULL);
    m.pid = fork();
    ck_assert_int_ge(m.pid, 0);
    if (m.pid == 0)
        become(argv, listen_fd, watchdog);
}

/* Receives the next notification. Fails if the daemon ends first. */
static void receive(void)
{
    struct pollfd p = {.fd = m.notify_fd, .events = POLLIN};

    for (;;) {
        int n = poll(&p, 1, 100);
        if (n > 0)
            break;
        int status;
        if (waitpid(m.pid, &status, WNOHANG) == m.pid) {
            m.pid = 0;
            ck_abort_msg("the daemon ended (status %#x) while something was expected of it", (unsigned)status);
        }
    }
    ssize_t n = recv(m.notify_fd, m.said + 1, sizeof(m.said) - 3, 0);
    ck_assert_int_gt(n, 0);
    m.said[0] = '\n';
    m.said[1 + n] = '\n';
    m.said[2 + n] = '\0';
    printf("  notified:%s", m.said);
}

static bool said(const char *field)
{
    char line[128];

    snprintf(line, sizeof(line), "\n%s", field);
    return strstr(m.said, line) != NULL;
}

/* Receives until a notification has field ("READY=1\n" whole, "STATUS=" the beginning of one). */
static void receive_until(const char *field)
{
    do {
        receive();
    } while (!said(field));
}

static int wait_for_end(void)
{
    int status;

    ck_assert_int_eq(waitpid(m.pid, &status, 0), m.pid);
    m.pid = 0;
    return status;
}

/* Attaches as a worker would, and makes a round trip. */
static void ping(void)
{
    struct kvd_options options = KVD_OPTIONS_INIT;
    kvd *session = NULL;

    options.socket_path = m.socket;
    int r = kvd_attach(&options, &session);
    ck_assert_msg(r == KVD_OK, "attach: %s (%s)", kvd_strerror(r), kvd_message(NULL));
    ck_assert_int_eq(kvd_ping(session), KVD_OK);
    ck_assert_ptr_null(kvd_detach(session));
}

/* Ready means that it serves; the status is for people. */
START_TEST(ready_when_it_serves)
{
    start(-1, false);
    receive_until("READY=1\n");
    ping();
    if (!said("STATUS="))
        receive_until("STATUS=");
}
END_TEST

START_TEST(stop_is_announced)
{
    start(-1, false);
    receive_until("READY=1\n");
    ck_assert_int_eq(kill(m.pid, SIGTERM), 0);
    receive_until("STOPPING=1\n");
    int status = wait_for_end();
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %#x", (unsigned)status);
    ck_assert_msg(access(m.socket, F_OK) < 0, "it left its socket behind");
}
END_TEST

/* An idle daemon feeds the watchdog all the same. */
START_TEST(watchdog_is_fed)
{
    start(-1, true);
    receive_until("READY=1\n");
    for (int i = 0; i < 4; i++)
        receive_until("WATCHDOG=1\n");
}
END_TEST

START_TEST(no_watchdog_unless_asked)
{
    start(-1, false);
    receive_until("READY=1\n");
    ck_assert_int_eq(kill(m.pid, SIGTERM), 0);
    do {
        receive();
        ck_assert(!said("WATCHDOG="));
    } while (!said("STOPPING=1\n"));
}
END_TEST

START_TEST(reload_is_announced)
{
    start(-1, false);
    receive_until("READY=1\n");
    write_config("host_bytes = 32M\nslab_bytes = 2M\nindex_entries = 1024\n");
    ck_assert_int_eq(kill(m.pid, SIGHUP), 0);
    receive_until("RELOADING=1\n");
    if (!said("READY=1\n"))
        receive_until("READY=1\n");
    ping();
}
END_TEST

/* A reload with a wrong file changes nothing and ends nothing, but it is over: the manager must not wait for ever. */
START_TEST(reload_of_a_wrong_file)
{
    start(-1, false);
    receive_until("READY=1\n");
    write_config("host_bytes = plenty\n");
    ck_assert_int_eq(kill(m.pid, SIGHUP), 0);
    receive_until("RELOADING=1\n");
    if (!said("READY=1\n"))
        receive_until("READY=1\n");
    ping();
}
END_TEST

/* What a reload cannot change of a tenant is said, and goes on as it was. */
START_TEST(reload_that_needs_a_restart_says_so)
{
    start(-1, false);
    receive_until("READY=1\n");
    write_config("host_bytes = 16M\nslab_bytes = 2M\nindex_entries = 1024\n[tenant default]\ndomain = other\n");
    ck_assert_int_eq(kill(m.pid, SIGHUP), 0);
    receive_until("RELOADING=1\n");
    if (!said("READY=1\n"))
        receive_until("READY=1\n");
    ping();
    ck_assert_msg(logged("tenant default: its domain stays as it was"), "nothing in the log");
}
END_TEST

static int listening_socket(int type)
{
    struct sockaddr_un a = address(m.socket);
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    ck_assert_int_eq(listen(fd, 16), 0);
    return fd;
}

/* A socket of the manager is used as it is, and stays when the daemon goes: workers that connect meanwhile wait in it. */
START_TEST(passed_socket_outlives_the_daemon)
{
    int fd = listening_socket(SOCK_SEQPACKET);

    for (int life = 0; life < 2; life++) {
        start(fd, false);
        receive_until("READY=1\n");
        ping();
        ck_assert_int_eq(kill(m.pid, SIGTERM), 0);
        receive_until("STOPPING=1\n");
        int status = wait_for_end();
        ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %#x", (unsigned)status);
        ck_assert_msg(access(m.socket, F_OK) == 0, "it removed a socket that is not its own");
    }
    close(fd);
}
END_TEST

/* A passed socket of the wrong kind is refused with a message, not served wrongly. */
START_TEST(passed_socket_of_the_wrong_type)
{
    int fd = listening_socket(SOCK_STREAM);

    start(fd, false);
    int status = wait_for_end();
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) != 0 && WEXITSTATUS(status) < 124, "status %#x",
                  (unsigned)status);
    close(fd);

    struct stat st;
    ck_assert_int_eq(stat(m.log, &st), 0);
    ck_assert_int_gt(st.st_size, 0);
}
END_TEST

/* systemd-socket-activate listens, and becomes the daemon at the first connection. */
START_TEST(socket_activated)
{
    char *argv[] = {"systemd-socket-activate", "--seqpacket", "--fdname=attach", "-E", NULL, "-l", m.socket,
                    (char *)daemon_path(),     "--config",    m.config,          NULL};
    char notify[128];

    snprintf(notify, sizeof(notify), "NOTIFY_SOCKET=%s", m.notify);
    argv[4] = notify;
    fflush(NULL);
    m.pid = fork();
    ck_assert_int_ge(m.pid, 0);
    if (m.pid == 0)
        become(argv, -1, false);
    while (!logged("Listening on ")) { /* the socket's file is there before anybody listens */
        ck_assert_int_eq(waitpid(m.pid, NULL, WNOHANG), 0);
        usleep(10000);
    }
    ping(); /* waits in the socket until the daemon is there */
    receive_until("READY=1\n");
}
END_TEST

static bool have_program(const char *name)
{
    char command[128];

    snprintf(command, sizeof(command), "command -v %s >/dev/null", name);
    return system(command) == 0;
}

int main(void)
{
    Suite *s = suite_create("service");
    TCase *c = tcase_create("notify");

    tcase_add_checked_fixture(c, setup, teardown);
    tcase_set_timeout(c, 60);
    tcase_add_test(c, ready_when_it_serves);
    tcase_add_test(c, stop_is_announced);
    tcase_add_test(c, watchdog_is_fed);
    tcase_add_test(c, no_watchdog_unless_asked);
    tcase_add_test(c, reload_is_announced);
    tcase_add_test(c, reload_of_a_wrong_file);
    tcase_add_test(c, reload_that_needs_a_restart_says_so);
    suite_add_tcase(s, c);

    c = tcase_create("socket");
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_set_timeout(c, 60);
    tcase_add_test(c, passed_socket_outlives_the_daemon);
    tcase_add_test(c, passed_socket_of_the_wrong_type);
    if (have_program("systemd-socket-activate"))
        tcase_add_test(c, socket_activated);
    else
        printf("systemd-socket-activate is missing (Debian package systemd): one case is left out\n");
    suite_add_tcase(s, c);

    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    return n_failed > 0;
}
