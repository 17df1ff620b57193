/* Places where a test can make the daemon fail or die. Only in builds configured with --enable-fault-points; else nothing at all.
 *
 *   KVD_FAULT=NAME:N[+][,NAME:N[+] ...]     at the N-th time that NAME is met (with +: from then on) it happens
 *
 *     malloc, calloc, realloc       returns NULL
 *     memfd_create, fallocate, mmap fails with ENOMEM or ENOSPC
 *     sendmsg                       fails with ENOBUFS
 *     job-submit                    the jobs are refused
 *     any other name                a FAULT_POINT("name"): abort()
 *
 * The C library's calls are caught by the linker (--wrap, fault_wrap.c), so the code that uses them does not know. Any thread. */
#ifndef KVD_DAEMON_FAULT_H
#define KVD_DAEMON_FAULT_H

#include <stdbool.h>

#ifdef KVD_FAULT_POINTS

/* Reads $KVD_FAULT; before the first thread starts. Ends the program on a form that it does not understand. */
void fault_setup(void);
/* True if this is the time. */
bool fault_due(const char *name);
void fault_point(const char *name);
#define FAULT_POINT(name) fault_point(name)
#define FAULT_DUE(name) fault_due(name)

#else

static inline void fault_setup(void)
{
}
#define FAULT_POINT(name) ((void)0)
#define FAULT_DUE(name) false

#endif
#endif
