# Benches: BENCHES += bench/bench_x, bench_bench_x_SOURCES, bench_bench_x_LDADD; a script: SCRIPT_BENCHES += bench/bench_x.sh.
# `./dev bench x` builds and runs it, with KVD_SRCDIR, KVD_BUILDDIR and KVD_CACHE in the environment.

BENCHES += bench/bench_replay
bench_bench_replay_SOURCES = bench/bench_replay.c bench/replay_sim.c bench/replay_sim.h bench/replay_trace.c bench/replay_trace.h \
	bench/svg_plot.c bench/svg_plot.h bench/bench.h
bench_bench_replay_LDADD = $(KVD_STORE_LIBS)

BENCHES += bench/bench_evict_policy
bench_bench_evict_policy_SOURCES = bench/bench_evict_policy.c bench/bench.h
bench_bench_evict_policy_LDADD = $(KVD_STORE_LIBS)

BENCHES += bench/bench_codec
bench_bench_codec_SOURCES = bench/bench_codec.c bench/bench.h
bench_bench_codec_LDADD = $(KVD_KERNELS_LIBS)

# libkvdtest: real daemons and real workers, for benches and for suites; built where something links it.
EXTRA_LTLIBRARIES = tests/libkvdtest.la
CLEANFILES += $(EXTRA_LTLIBRARIES)
tests_libkvdtest_la_SOURCES = tests/content.c tests/content.h tests/harness.c tests/harness.h tests/rawclient.c tests/rawclient.h
KVD_TEST_LIBS = tests/libkvdtest.la $(KVD_CLIENT_LIBS)

BENCHES += bench/bench_match
bench_bench_match_SOURCES = bench/bench_match.c bench/bench.h
bench_bench_match_LDADD = libkvdstore.la $(KVD_TEST_LIBS)

BENCHES += bench/bench_evict
bench_bench_evict_SOURCES = bench/bench_evict.c bench/bench.h
bench_bench_evict_LDADD = libkvdstore.la $(KVD_TEST_LIBS)

BENCHES += bench/bench_publish
bench_bench_publish_SOURCES = bench/bench_publish.c bench/kv_bed.c bench/kv_bed.h bench/bench.h
bench_bench_publish_LDADD = $(KVD_TEST_LIBS)

BENCHES += bench/bench_load
bench_bench_load_SOURCES = bench/bench_load.c bench/kv_bed.c bench/kv_bed.h bench/bench.h
bench_bench_load_LDADD = $(KVD_TEST_LIBS)

BENCHES += bench/bench_attend_form
bench_bench_attend_form_SOURCES = bench/bench_attend_form.c bench/kv_bed.c bench/kv_bed.h bench/bench.h
bench_bench_attend_form_LDADD = $(KVD_TEST_LIBS)

BENCHES += bench/bench_attach
bench_bench_attach_SOURCES = bench/bench_attach.c bench/bench.h
bench_bench_attach_LDADD = $(KVD_TEST_LIBS)

BENCHES += bench/bench_ring
bench_bench_ring_SOURCES = bench/bench_ring.c bench/bench.h
bench_bench_ring_LDADD = $(KVD_TEST_LIBS)

BENCHES += bench/bench_batch
bench_bench_batch_SOURCES = bench/bench_batch.c bench/bench.h
bench_bench_batch_LDADD = $(KVD_TEST_LIBS)

if GRPC
BENCHES += bench/bench_grpc
bench_bench_grpc_SOURCES = bench/bench_grpc.c bench/bench.h
bench_bench_grpc_LDADD = $(KVD_TEST_LIBS) $(KVD_RPC_LIBS)
endif

SCRIPT_BENCHES += bench/bench_fidelity.sh

BENCHES += bench/bench_attend
bench_bench_attend_SOURCES = bench/bench_attend.c bench/bench.h
bench_bench_attend_LDADD = $(KVD_KERNELS_LIBS) -lpthread

# What bench_attend is compared with: built by its script, against a libggml that no Debian package has.
EXTRA_DIST += bench/peer_attend.c bench/peer_attend.sh
