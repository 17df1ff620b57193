# libkvddaemon: the daemon without its main(), so that tests can link it.
noinst_LTLIBRARIES += libkvddaemon.la
libkvddaemon_la_SOURCES =
libkvddaemon_la_SOURCES += \
	daemon/admin.c daemon/admin.h daemon/admin_list.c daemon/admin_walks.c \
	daemon/attend.c daemon/attend.h daemon/attend-internal.h daemon/attend_job.c daemon/attend_queue.c \
	daemon/attend_request.c daemon/attend_take.c daemon/attend_work.c \
	daemon/daemon.c daemon/daemon.h daemon/errors.h \
	daemon/fault.c daemon/fault.h \
	daemon/flight_requests.c daemon/flight_requests.h \
	daemon/jobs.c daemon/jobs.h \
	daemon/listener.c daemon/listener.h \
	daemon/log.c daemon/log.h \
	daemon/metrics.c daemon/metrics.def daemon/metrics.h \
	daemon/options.c daemon/options.def daemon/options.h \
	daemon/options_print.c daemon/options_print.h daemon/options_value.c daemon/options_value.h \
	daemon/probes.h \
	daemon/peer.c daemon/peer.h \
	daemon/prefix.c daemon/prefix.h \
	daemon/publish.c daemon/publish.h daemon/publish-internal.h daemon/publish_request.c \
	daemon/reply.c daemon/reply.h daemon/request.c daemon/request.h \
	daemon/rpc.h \
	daemon/session.c daemon/session.h \
	daemon/staging.c daemon/staging.h \
	daemon/tenants.c daemon/tenants.h \
	daemon/walk.c daemon/walk.h \
	daemon/wire.c daemon/wire.h \
	daemon/worker_requests.c

if GRPC
libkvddaemon_la_SOURCES += \
	daemon/rpc.c daemon/rpc-internal.h daemon/rpc_arena.c daemon/rpc_arena.h daemon/rpc_attend.c daemon/rpc_batch.c daemon/rpc_batch.h daemon/rpc_cache.c daemon/rpc_call.c \
	daemon/rpc_health.c daemon/rpc_load.c daemon/rpc_loop.c daemon/rpc_methods.c daemon/rpc_publish.c daemon/rpc_reflect.c
endif

bin_PROGRAMS += kvd
kvd_SOURCES = daemon/main.c
kvd_CPPFLAGS = $(AM_CPPFLAGS) -DKVD_DEFAULT_CONFIG='"$(sysconfdir)/kvd/kvd.conf"'
kvd_LDADD = $(KVD_DAEMON_LIBS)
kvd_LDFLAGS = $(AM_LDFLAGS)
if FAULT_POINTS
kvd_SOURCES += daemon/fault_wrap.c
kvd_LDFLAGS += -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc \
	-Wl,--wrap=memfd_create,--wrap=fallocate,--wrap=mmap,--wrap=sendmsg
endif

# Manual pages, made from the table of options.
noinst_PROGRAMS += daemon/options_man
daemon_options_man_SOURCES = daemon/options_man.c
daemon_options_man_LDADD = $(KVD_DAEMON_LIBS)

man_MANS += docs/man/kvd.8 docs/man/kvd.conf.5
EXTRA_DIST += docs/man/kvd.8.in docs/man/kvd.conf.5.in
CLEANFILES += docs/man/kvd.8 docs/man/kvd.conf.5

MAN_EDIT = $(SED) -e 's|@VERSION[@]|$(PACKAGE_VERSION)|g' -e 's|@sysconfdir[@]|$(sysconfdir)|g'

docs/man/kvd.8: $(srcdir)/docs/man/kvd.8.in daemon/options_man$(EXEEXT) Makefile
	$(AM_V_GEN)$(MKDIR_P) docs/man && $(MAN_EDIT) $(srcdir)/docs/man/kvd.8.in | daemon/options_man > $@.tmp && mv $@.tmp $@
docs/man/kvd.conf.5: $(srcdir)/docs/man/kvd.conf.5.in daemon/options_man$(EXEEXT) Makefile
	$(AM_V_GEN)$(MKDIR_P) docs/man && $(MAN_EDIT) $(srcdir)/docs/man/kvd.conf.5.in | daemon/options_man > $@.tmp && mv $@.tmp $@
