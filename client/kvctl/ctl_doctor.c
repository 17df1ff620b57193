/* kvctl doctor: what a worker needs of this machine, one line each: ok, warn or FAIL, what was found, and what to
 * do. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <inttypes.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "ctl_text.h"
#include "kvctl.h"

const struct ctl_opt doctor_opts[] = {
    {"json", 'j', NULL, "one JSON array of {check, level, found, advice}"},
    {NULL, 0, NULL, NULL},
};

enum level { OK, WARN, FAIL };

struct doctor {
    bool json;
    int n, n_fail;
    bool no_daemon;
    char found[512];
};

/* advice may be "" when the level is OK. found is printf-style. */
static void say(struct doctor *d, enum level level, const char *check, const char *advice, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

static void say(struct doctor *d, enum level level, const char *check, const char *advice, const char *format, ...)
{
    static const char *const names[] = {"ok", "warn", "FAIL"};
    va_list ap;

    va_start(ap, format);
    vsnprintf(d->found, sizeof(d->found), format, ap);
    va_end(ap);
    d->n_fail += level == FAIL;
    if (d->json) {
        fputs(d->n++ ? ",\n  {" : "\n  {", stdout);
        json_text(stdout, true, "check", check);
        json_text(stdout, false, "level", names[level]);
        json_text(stdout, false, "found", d->found);
        json_text(stdout, false, "advice", level == OK ? "" : advice);
        putchar('}');
        return;
    }
    printf("%-4s  %-12s %s\n", names[level], check, d->found);
    if (level != OK)
        printf("                   -> %s\n", advice);
}

/* First line of a small file, without its end; "" if it cannot be read. */
static char *read_line(const char *path, char *buf, size_t n)
{
    FILE *f = fopen(path, "re");

    buf[0] = '\0';
    if (f) {
        if (!fgets(buf, (int)n, f))
            buf[0] = '\0';
        fclose(f);
    }
    buf[strcspn(buf, "\n")] = '\0';
    return buf;
}

/* "Name:   123 kB" of a /proc file; -1 if it is not there. */
static long long read_field(const char *path, const char *name)
{
    FILE *f = fopen(path, "re");
    char line[4096];
    long long value = -1;

    while (f && fgets(line, sizeof(line), f))
        if (strncmp(line, name, strlen(name)) == 0 && line[strlen(name)] == ':') {
            value = strtoll(line + strlen(name) + 1, NULL, 10);
            break;
        }
    if (f)
        fclose(f);
    return value;
}

/* ---- The socket and the daemon ---- */

static const char *socket_path(const struct ctl *ctl)
{
    const char *path = ctl->socket ? ctl->socket : getenv("KVD_SOCKET");

    return path && path[0] ? path : "/run/kvd/kvd.sock";
}

/* False: there is none to connect to. */
static bool check_socket(struct doctor *d, const char *path)
{
    struct stat st;
    const struct passwd *owner;
    const struct group *group;
    char advice[256];

    if (stat(path, &st) < 0) {
        say(d, FAIL, "socket",
            errno == EACCES ? "a folder on the way is closed for this user: see the rights of its parents"
                            : "start the daemon: systemctl start kvd (or kvd --config FILE); or say where it is: "
                              "--socket, $KVD_SOCKET",
            "%s: %s", path, strerror(errno));
        return false;
    }
    if (!S_ISSOCK(st.st_mode)) {
        say(d, FAIL, "socket", "something else lies where the socket belongs; move it away", "%s is no socket", path);
        return false;
    }
    owner = getpwuid(st.st_uid);
    group = getgrgid(st.st_gid);
    snprintf(advice, sizeof(advice), "let this user into the group: usermod -aG %s USER, and log in again",
             group ? group->gr_name : "GROUP");
    say(d, access(path, R_OK | W_OK) == 0 ? OK : FAIL, "socket", advice, "%s, mode %04o, owner %s:%s", path,
        (unsigned)(st.st_mode & 07777), owner ? owner->pw_name : "?", group ? group->gr_name : "?");
    return true;
}

static const char *attach_advice(int r)
{
    switch (r) {
    case KVD_E_CONNECT:
        return "the socket is there and nobody listens: systemctl status kvd; a stale socket of a dead daemon goes at "
               "its next start";
    case KVD_E_DENIED:
        return "no tenant takes this user: see default_tenant and the [tenant] sections of kvd.conf";
    case KVD_E_PROTOCOL:
        return "install libkvd and kvd of the same release";
    case KVD_E_DRAINING:
        return "it drains: kvctl drain --undo, or wait for the restart";
    case KVD_E_LIMIT:
        return "too many workers: kvctl ls workers, and sessions_max, sessions_per_uid in kvd.conf";
    case KVD_E_TIMEOUT:
        return "the daemon hangs or is stopped: systemctl status kvd, journalctl -u kvd";
    default:
        return "journalctl -u kvd says more";
    }
}

static int on_host_bytes(void *ctx, const struct kvd_option_info *o)
{
    text_parse_bytes(o->value, ctx);
    return 0;
}

/* As an admin, then as a worker does. */
static void check_attach(struct doctor *d, const char *path, uint64_t *ret_host_bytes)
{
    struct kvd_options o = KVD_OPTIONS_INIT;
    struct kvd_info info = {.size = sizeof(info)};
    kvd *session = NULL;
    int r;

    o.socket_path = path;
    o.name = "kvctl doctor";
    o.timeout_msec = 3000;
    o.admin_only = 1;
    r = kvd_attach(&o, &session);
    if (r != KVD_OK) {
        d->no_daemon = r == KVD_E_CONNECT || r == KVD_E_TIMEOUT || r == KVD_E_GONE || r == KVD_E_PROTOCOL;
        say(d, FAIL, "daemon", attach_advice(r), "%s: %s", kvd_strerror(r), kvd_message(NULL));
        return;
    }
    kvd_get_info(session, &info);
    say(d, OK, "daemon", "", "%s answers", info.server);
    say(d, info.admin ? OK : WARN, "admin",
        "only root, the daemon's user, and admin_uids and admin_gids of kvd.conf may use kvctl's other commands",
        "this user %s use kvctl's other commands", info.admin ? "may" : "may not");
    if (info.admin)
        kvd_admin_config(session, "host_bytes", NULL, on_host_bytes, ret_host_bytes);
    kvd_detach(session);
    o.admin_only = 0;
    r = kvd_attach(&o, &session);
    if (r != KVD_OK) {
        say(d, FAIL, "worker", attach_advice(r), "%s: %s", kvd_strerror(r), kvd_message(NULL));
        return;
    }
    kvd_get_info(session, &info);
    say(d, info.alive ? OK : FAIL, "worker", "the index says that its daemon is dead: restart it",
        "attached as a worker of tenant %s; index and page are mapped", info.tenant);
    kvd_detach(session);
}

/* ---- The machine ---- */

static void check_kernel(struct doctor *d)
{
    struct utsname u;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *map = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool wipe = map != MAP_FAILED && madvise(map, page, MADV_WIPEONFORK) == 0;
    int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);

    if (map != MAP_FAILED)
        munmap(map, page);
    uname(&u);
    say(d, wipe && pidfd >= 0 ? OK : FAIL, "kernel",
        "Linux 5.4 or later is needed (a container may also filter these calls)",
        "%s %s; MADV_WIPEONFORK %s, pidfd_open %s", u.sysname, u.release, wipe ? "yes" : "no",
        pidfd >= 0 ? "yes" : "no");
    if (pidfd >= 0)
        close(pidfd);
}

static void check_memfd(struct doctor *d)
{
    int fd = memfd_create("kvctl-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    bool future = false, refused = false;
    void *map;

    if (fd < 0) {
        say(d, FAIL, "memfd", "memfd_create must be allowed: look at the container's seccomp filter",
            "memfd_create: %s", strerror(errno));
        return;
    }
    if (ftruncate(fd, 4096) == 0)
        future = fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE) == 0;
    map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    refused = map == MAP_FAILED;
    if (!refused)
        munmap(map, 4096);
    close(fd);
    say(d, future && refused ? OK : FAIL, "memfd",
        "Linux 5.1 or later is needed: without F_SEAL_FUTURE_WRITE workers could write the cache",
        "seals %s; a writable mapping after them %s", future ? "work" : "are refused",
        refused ? "is refused" : "is NOT refused");
}

static void check_memory(struct doctor *d, uint64_t host_bytes)
{
    uint64_t total = (uint64_t)read_field("/proc/meminfo", "MemTotal") << 10;
    uint64_t available = (uint64_t)read_field("/proc/meminfo", "MemAvailable") << 10;
    char a[24], t[24], h[24];

    say(d,
        host_bytes > total            ? FAIL
        : host_bytes > total / 10 * 9 ? WARN
                                      : OK,
        "memory", "lower host_bytes in kvd.conf: it is more than the machine can give", "%s available of %s%s%s",
        text_bytes(available, a), text_bytes(total, t), host_bytes ? "; host_bytes is " : "",
        host_bytes ? text_bytes(host_bytes, h) : "");
}

static void check_hugepages(struct doctor *d)
{
    char shmem[128];
    long long n = read_field("/proc/meminfo", "HugePages_Total"),
              n_free = read_field("/proc/meminfo", "HugePages_Free");
    bool granted;

    read_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled", shmem, sizeof(shmem));
    granted = n > 0 || strstr(shmem, "[always]") || strstr(shmem, "[advise]") || strstr(shmem, "[within_size]") ||
              strstr(shmem, "[force]");
    say(d, granted ? OK : WARN, "hugepages",
        "it works without, with more TLB misses: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or "
        "reserve "
        "some with vm.nr_hugepages",
        "%lld reserved, %lld free; transparent for shared memory: %s", n < 0 ? 0 : n, n_free < 0 ? 0 : n_free,
        shmem[0] ? shmem : "not supported");
}

static void check_limits(struct doctor *d)
{
    struct rlimit files, space;
    char maps[64], text[24];

    getrlimit(RLIMIT_NOFILE, &files);
    say(d, files.rlim_cur >= 256 ? OK : WARN, "open files", "raise it: ulimit -n 1024, or LimitNOFILE= of the service",
        "%llu at once (a slab of the cache takes one for a moment)", (unsigned long long)files.rlim_cur);
    getrlimit(RLIMIT_AS, &space);
    if (space.rlim_cur == RLIM_INFINITY)
        say(d, OK, "addresses", "", "no limit of address space");
    else
        say(d, space.rlim_cur >= UINT64_C(64) << 30 ? OK : WARN, "addresses",
            "the whole cache is mapped into each worker: lift it with ulimit -v unlimited", "%s of address space",
            text_bytes(space.rlim_cur, text));
    read_line("/proc/sys/vm/max_map_count", maps, sizeof(maps));
    say(d, strtoull(maps, NULL, 10) >= 4096 ? OK : WARN, "mappings", "raise vm.max_map_count: each slab is one mapping",
        "%s at once", maps[0] ? maps : "unknown");
}

static bool has_word(const char *line, const char *word)
{
    size_t n = strlen(word);

    for (const char *p = line; (p = strstr(p, word)) != NULL; p += n)
        if ((p == line || p[-1] == ' ' || p[-1] == '\t') && (p[n] == ' ' || p[n] == '\0' || p[n] == '\n'))
            return true;
    return false;
}

static void check_processor(struct doctor *d)
{
    FILE *f = fopen("/proc/cpuinfo", "re");
    char line[8192];
    bool sha = false, avx2 = false, avx512 = false;

    while (f && fgets(line, sizeof(line), f))
        if (strncmp(line, "flags", 5) == 0) {
            sha = has_word(line, "sha_ni");
            avx2 = has_word(line, "avx2") && has_word(line, "f16c") && has_word(line, "fma");
            avx512 = has_word(line, "avx512f") && has_word(line, "avx512bw") && has_word(line, "avx512vl") &&
                     has_word(line, "avx512dq");
            break;
        }
    if (f)
        fclose(f);
    say(d, avx2 ? OK : WARN, "processor",
        "codecs fall back to scalar code, ten times slower; a virtual machine may hide AVX2 (cpu=host)",
        "codecs use %s; SHA instructions: %s",
        avx512 ? "AVX-512"
        : avx2 ? "AVX2"
               : "no vector unit",
        sha ? "yes" : "no");
}

int run_doctor(struct ctl *ctl, const struct ctl_args *args)
{
    struct doctor d = {.json = args->set[0]};
    const char *path = socket_path(ctl);
    uint64_t host_bytes = 0;

    if (d.json)
        putchar('[');
    if (check_socket(&d, path))
        check_attach(&d, path, &host_bytes);
    else
        d.no_daemon = true;
    check_kernel(&d);
    check_memfd(&d);
    check_memory(&d, host_bytes);
    check_hugepages(&d);
    check_limits(&d);
    check_processor(&d);
    if (d.json)
        puts("\n]");
    return d.no_daemon ? EXIT_NO_DAEMON : d.n_fail ? EXIT_REFUSED : EXIT_OK;
}
