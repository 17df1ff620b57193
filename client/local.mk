# libkvd, kvctl and the engines.

# ---- libkvd: stands on proto and kernels, links libcrypto and protobuf-c, exports what kvd.h declares ----
# libkvdclient: its objects, so that tests can reach what is not exported.
noinst_LTLIBRARIES += libkvdclient.la
libkvdclient_la_SOURCES = \
	client/libkvd/kvd.h \
	client/libkvd/kvd_admin.c \
	client/libkvd/kvd_attend.c \
	client/libkvd/kvd_attend_check.c client/libkvd/kvd_attend_impl.h \
	client/libkvd/kvd_attend_cost.c client/libkvd/kvd_attend_cost.h \
	client/libkvd/kvd_attend_job.c client/libkvd/kvd_attend_job.h \
	client/libkvd/kvd_attend_ring.c client/libkvd/kvd_attend_ring.h \
	client/libkvd/kvd_attending.c \
	client/libkvd/kvd_codec.c \
	client/libkvd/kvd_error.c client/libkvd/kvd_error.h \
	client/libkvd/kvd_flight.c \
	client/libkvd/kvd_impl.h \
	client/libkvd/kvd_lease.c client/libkvd/kvd_lease.h \
	client/libkvd/kvd_life.c client/libkvd/kvd_life.h \
	client/libkvd/kvd_load.c \
	client/libkvd/kvd_match.c \
	client/libkvd/kvd_mux.c client/libkvd/kvd_mux.h \
	client/libkvd/kvd_prefix.c \
	client/libkvd/kvd_publish.c \
	client/libkvd/kvd_session.c \
	client/libkvd/kvd_space.c \
	client/libkvd/kvd_staging.c client/libkvd/kvd_staging.h
KVD_CLIENT_LIBS = libkvdclient.la $(KVD_KERNELS_LIBS) $(KVD_PROTO_LIBS) $(CRYPTO_LIBS) -lpthread -lm

lib_LTLIBRARIES += libkvd.la
libkvd_la_SOURCES =
libkvd_la_LIBADD = libkvdclient.la libkvdproto.la libkvdkernels.la $(PROTOBUF_C_LIBS) $(CRYPTO_LIBS) -lpthread -lm
# current:revision:age; see libtool's manual before touching it. Symbols are never taken away, so age grows with current, and
# current - age stays what KVD_VERSION_MAJOR, the symbols' version KVD_1 and the package's first number are.
libkvd_la_LDFLAGS = $(AM_LDFLAGS) -version-info 1:0:0 -Wl,--version-script=$(srcdir)/client/libkvd/libkvd.map
EXTRA_libkvd_la_DEPENDENCIES = client/libkvd/libkvd.map

include_HEADERS += client/libkvd/kvd.h
pkgconfig_DATA += client/libkvd/libkvd.pc
EXTRA_DIST += client/libkvd/libkvd.map client/libkvd/libkvd.pc.in
CLEANFILES += client/libkvd/libkvd.pc

client/libkvd/libkvd.pc: client/libkvd/libkvd.pc.in Makefile
	@$(MKDIR_P) client/libkvd
	$(AM_V_GEN)$(SED) -e 's|@prefix[@]|$(prefix)|g' -e 's|@exec_prefix[@]|$(exec_prefix)|g' \
		-e 's|@libdir[@]|$(libdir)|g' -e 's|@includedir[@]|$(includedir)|g' \
		-e 's|@PACKAGE_VERSION[@]|$(PACKAGE_VERSION)|g' $(srcdir)/client/libkvd/libkvd.pc.in > $@.tmp && mv $@.tmp $@

# ---- kvctl: sees libkvd's public header only ----
bin_PROGRAMS += kvctl
kvctl_SOURCES = \
	client/kvctl/ctl_codec.c \
	client/kvctl/ctl_doctor.c \
	client/kvctl/ctl_list.c \
	client/kvctl/ctl_manage.c client/kvctl/ctl_select.h \
	client/kvctl/ctl_stats.c \
	client/kvctl/ctl_text.c client/kvctl/ctl_text.h \
	client/kvctl/kvctl.c client/kvctl/kvctl.h \
	client/kvctl/npy.c client/kvctl/npy.h
kvctl_LDADD = libkvd.la -lm
dist_man_MANS += docs/man/kvctl.1 docs/man/libkvd.3
bashcompletion_DATA = client/kvctl/kvctl.bash
EXTRA_DIST += client/kvctl/kvctl.bash

# ---- engines/llama: built by its own script, against a libllama that no Debian package has ----
EXTRA_DIST += \
	client/engines/llama/README.md client/engines/llama/fetch.sh client/engines/llama/build.sh client/engines/llama/demo.sh \
	client/engines/llama/check_kvstate.c client/engines/llama/gguf-f32.c client/engines/llama/kvd-llama.c \
	client/engines/llama/common.c client/engines/llama/common.h client/engines/llama/divergence.c client/engines/llama/divergence.h client/engines/llama/engine.c client/engines/llama/engine.h \
	client/engines/llama/fidelity.c client/engines/llama/fidelity.h client/engines/llama/generate.c client/engines/llama/generate.h \
	client/engines/llama/kvstate.c client/engines/llama/kvstate.h client/engines/llama/kvstate_impl.h client/engines/llama/kvstate_probe.c \
	client/engines/llama/report.c client/engines/llama/report.h client/engines/llama/sharing.c client/engines/llama/sharing.h

# ---- engines/ggml: likewise ----
EXTRA_DIST += client/engines/showing.sh \
	client/engines/ggml/README.md client/engines/ggml/build-ggml.sh client/engines/ggml/show-attention.sh client/engines/ggml/check_gemma.c \
	client/engines/ggml/check_refusals.c \
	client/engines/ggml/attention.c client/engines/ggml/attention.h client/engines/ggml/gemma.c client/engines/ggml/gemma.h \
	client/engines/ggml/kvd-ggml.c client/engines/ggml/reuse.c client/engines/ggml/reuse.h client/engines/ggml/run.c \
	client/engines/ggml/run.h client/engines/ggml/tiles.c client/engines/ggml/tiles.h client/engines/ggml/words.c \
	client/engines/ggml/words.h client/engines/ggml/worker.c client/engines/ggml/worker.h
