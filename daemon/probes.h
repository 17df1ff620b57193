/* Places where a tracer can look (USDT, provider "kvd"): bpftrace -l 'usdt:/usr/sbin/kvd:*'. Without <sys/sdt.h> at build time they
 * are nothing; with it, an instruction that does nothing each. docs/attention.md lists names and arguments. */
#ifndef KVD_DAEMON_PROBES_H
#define KVD_DAEMON_PROBES_H

#ifdef HAVE_SYS_SDT_H
#include <sys/sdt.h>
#define PROBE3(name, a, b, c) DTRACE_PROBE3(kvd, name, a, b, c)
#else
#define PROBE3(name, a, b, c) ((void)sizeof(a), (void)sizeof(b), (void)sizeof(c))
#endif

#endif
