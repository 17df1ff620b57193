#include "daemon/log.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool is_journal(int fd)
{
    const char *stream = getenv("JOURNAL_STREAM");
    uintmax_t dev, ino;
    struct stat st;

    return stream && sscanf(stream, "%ju:%ju", &dev, &ino) == 2 && fstat(fd, &st) == 0 && st.st_dev == dev &&
           st.st_ino == ino;
}

void log_init(struct log *log, int fd, enum log_level level, uint64_t (*now_usec)(void))
{
    *log = (struct log){.fd = fd, .level = level, .journal = is_journal(fd), .now_usec = now_usec};
}

static void emit(struct log *log, enum log_level level, const char *text, uint64_t n_left_out)
{
    static const char *const words[] = {"error: ", "warning: ", "", "debug: "};
    static const char *const priorities[] = {"<3>", "<4>", "<6>", "<7>"};
    char line[2048];
    int n = log->journal ? snprintf(line, sizeof(line) - 1, "%s%.1800s", priorities[level], text)
                         : snprintf(line, sizeof(line) - 1, "kvd: %s%.1800s", words[level], text);
    ssize_t written;

    if (n_left_out)
        n += snprintf(line + n, sizeof(line) - 1 - (size_t)n, " (and %" PRIu64 " more of this kind)", n_left_out);
    for (int i = 0; i < n; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = '?'; /* names come from workers */
    line[n++] = '\n';
    written = write(log->fd, line, (size_t)n);
    (void)written; /* there is nowhere to tell */
}

/* The class's place, or the place of the one that was silent longest. */
static struct log_class *find_class(struct log *log, const char *format)
{
    struct log_class *oldest = &log->classes[0];

    for (size_t i = 0; i < LOG_CLASSES; i++) {
        if (log->classes[i].format == format)
            return &log->classes[i];
        if (log->classes[i].since_usec < oldest->since_usec)
            oldest = &log->classes[i];
    }
    if (oldest->n_left_out)
        emit(log, LOG_WARNING, oldest->format, oldest->n_left_out);
    *oldest = (struct log_class){.format = format};
    return oldest;
}

void log_write(struct log *log, enum log_level level, const char *format, ...)
{
    uint64_t now = log->now_usec(), left_out = 0;
    struct log_class *class;
    char text[1800];
    va_list ap;

    if (level > log->level)
        return;
    class = find_class(log, format);
    if (class->since_usec == 0 || now - class->since_usec > LOG_WINDOW_USEC) {
        left_out = class->n_left_out;
        class->since_usec = now;
        class->n_written = 0;
        class->n_left_out = 0;
    }
    if (class->n_written >= LOG_BURST) {
        class->n_left_out++;
        return;
    }
    class->n_written++;
    va_start(ap, format);
    vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    emit(log, level, text, left_out);
}

void log_deinit(struct log *log)
{
    for (size_t i = 0; i < LOG_CLASSES; i++)
        if (log->classes[i].n_left_out)
            emit(log, LOG_WARNING, log->classes[i].format, log->classes[i].n_left_out);
    memset(log->classes, 0, sizeof(log->classes));
}
