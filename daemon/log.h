/* The daemon's log: one line a message to stderr.
 *
 * Under the service manager's journal a line begins with its priority (<4>); elsewhere with its level in words. Messages of one
 * format are one class: of a class that floods, LOG_BURST are written in LOG_WINDOW_USEC, the others counted, and the number is
 * told with the next one after that time, or at the end.
 *
 * Loop thread only. */
#ifndef KVD_DAEMON_LOG_H
#define KVD_DAEMON_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum log_level { LOG_ERROR, LOG_WARNING, LOG_INFO, LOG_DEBUG };
enum { LOG_CLASSES = 32, LOG_BURST = 5 };
#define LOG_WINDOW_USEC UINT64_C(10000000)

struct log {
    int fd; /* borrowed */
    enum log_level level;
    bool journal;
    uint64_t (*now_usec)(void);
    struct log_class {
        const char *format; /* which class: formats are string constants */
        uint64_t since_usec;
        unsigned n_written;
        uint64_t n_left_out;
    } classes[LOG_CLASSES];
};

/* Decides by $JOURNAL_STREAM whether fd is the journal. */
void log_init(struct log *log, int fd, enum log_level level, uint64_t (*now_usec)(void));
/* Tells what is left untold. */
void log_deinit(struct log *log);

/* format must be a string constant. Control characters of the message are replaced. */
__attribute__((format(printf, 3, 4))) void log_write(struct log *log, enum log_level level, const char *format, ...);

#endif
