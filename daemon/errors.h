/* Error numbers of kvd.v1.Error, the same as enum kvd_error of libkvd/kvd.h (a test compares them; the daemon includes nothing
 * of the client's). Fixed for ever. */
#ifndef KVD_DAEMON_ERRORS_H
#define KVD_DAEMON_ERRORS_H

enum error_code {
    ERROR_PROTOCOL = 5,
    ERROR_DENIED = 6,
    ERROR_LIMIT = 7,
    ERROR_QUOTA = 8,
    ERROR_FULL = 9,
    ERROR_LAYOUT = 10,
    ERROR_SPACE = 11,
    ERROR_PARENT = 12,
    ERROR_TOKEN = 13,
    ERROR_VALUE = 14,
    ERROR_STAGING = 15,
    ERROR_CORRUPT = 16,
    ERROR_TIMEOUT = 17,
    ERROR_DRAINING = 19,
    ERROR_NOT_FOUND = 20,
    ERROR_AMBIGUOUS = 21,
    ERROR_INTERNAL = 23,
    ERROR_OPTION = 24,
};

#endif
