# Suites are built by `make check` and need no device, no root and no network. A suite is three lines:
#
#   SUITES += tests/check_idx
#   tests_check_idx_SOURCES = tests/check_idx.c
#   tests_check_idx_LDADD = $(KVD_STORE_LIBS) $(TEST_LIBS)
#
# Programs that a suite starts itself go to TEST_HELPERS in the same way.
# A script is one: SCRIPT_TESTS += tests/test_x.sh (executable; it goes into the tarball by itself), or PLAIN_SCRIPT_TESTS if
# sanitizers have nothing to find in what it does.
# Each runs with KVD_SRCDIR and KVD_BUILDDIR in its environment, both absolute.
TEST_LIBS = $(CHECK_LIBS)
SUITES =
SCRIPT_TESTS =
PLAIN_SCRIPT_TESTS =
TEST_HELPERS =

# ---- fuzz targets: see tests/fuzz/README.md ----
#
#   FUZZ_TARGETS += tests/fuzz/fuzz_frames
#   tests_fuzz_fuzz_frames_SOURCES = tests/fuzz/fuzz_frames.c
#   tests_fuzz_fuzz_frames_LDADD = $(KVD_PROTO_LIBS) $(FUZZ_LIBS)
#   tests_fuzz_fuzz_frames_LDFLAGS = $(FUZZ_LINK)
#   EXTRA_DIST += tests/fuzz/corpus/frames
#
# In a fuzz build libFuzzer drives them, in every other build tests/fuzz/driver.c replays the corpus.
FUZZ_TARGETS =
if FUZZERS
FUZZ_LIBS =
FUZZ_LINK = $(AM_LDFLAGS) $(KVD_FUZZ_LDFLAGS)
else
check_LTLIBRARIES += tests/fuzz/libfuzzdriver.la
tests_fuzz_libfuzzdriver_la_SOURCES = tests/fuzz/driver.c
FUZZ_LIBS = tests/fuzz/libfuzzdriver.la
FUZZ_LINK = $(AM_LDFLAGS)
endif

# ---- suites (one group of lines a suite, in the order of the layers) ----

SUITES += tests/check_proto
tests_check_proto_SOURCES = tests/check_proto.c
tests_check_proto_LDADD = $(KVD_PROTO_LIBS) $(CRYPTO_LIBS) $(TEST_LIBS)

SUITES += tests/check_store
tests_check_store_SOURCES = tests/check_store.c
tests_check_store_LDADD = $(KVD_STORE_LIBS) $(TEST_LIBS)

SUITES += tests/check_cache
tests_check_cache_SOURCES = tests/check_cache.c
tests_check_cache_LDADD = $(KVD_STORE_LIBS) $(TEST_LIBS)

SUITES += tests/check_crc32c
tests_check_crc32c_SOURCES = tests/check_crc32c.c
tests_check_crc32c_LDADD = $(KVD_KERNELS_LIBS) $(TEST_LIBS)

# A worker's own attention: of client/engines, but needs no engine.
SUITES += tests/check_tiles
tests_check_tiles_SOURCES = tests/check_tiles.c client/engines/ggml/tiles.c client/engines/ggml/tiles.h
tests_check_tiles_LDADD = -lm $(TEST_LIBS)

SUITES += tests/check_codec tests/check_codec_error tests/check_codec_variants
tests_check_codec_SOURCES = tests/check_codec.c tests/check_codec_data.h
tests_check_codec_LDADD = $(KVD_KERNELS_LIBS) $(TEST_LIBS)
tests_check_codec_error_SOURCES = tests/check_codec_error.c tests/check_codec_data.h
tests_check_codec_error_LDADD = $(KVD_KERNELS_LIBS) $(TEST_LIBS)
tests_check_codec_variants_SOURCES = tests/check_codec_variants.c tests/check_codec_data.h
tests_check_codec_variants_LDADD = $(KVD_KERNELS_LIBS) $(TEST_LIBS) -lpthread

# Writes tests/golden/codec: `make tests/make_codec_golden`, when a codec is added.
EXTRA_PROGRAMS += tests/make_codec_golden
CLEANFILES += tests/make_codec_golden
tests_make_codec_golden_SOURCES = tests/make_codec_golden.c tests/check_codec_data.h
tests_make_codec_golden_LDADD = $(KVD_KERNELS_LIBS)
EXTRA_DIST += tests/golden/codec

SUITES += tests/check_attn tests/check_attn_error
tests_check_attn_SOURCES = tests/check_attn.c tests/check_attn_scene.h tests/check_codec_data.h
tests_check_attn_LDADD = $(KVD_KERNELS_LIBS) $(TEST_LIBS)
tests_check_attn_error_SOURCES = tests/check_attn_error.c tests/check_attn_scene.h tests/check_codec_data.h
tests_check_attn_error_LDADD = $(KVD_KERNELS_LIBS) $(TEST_LIBS)

SUITES += tests/check_policy
tests_check_policy_SOURCES = tests/check_policy.c tests/policy_model.c tests/policy_model.h
tests_check_policy_LDADD = $(KVD_STORE_LIBS) $(TEST_LIBS)

SUITES += tests/check_libkvd_parts
tests_check_libkvd_parts_SOURCES = tests/check_libkvd_parts.c
tests_check_libkvd_parts_LDADD = $(KVD_CLIENT_LIBS) $(TEST_LIBS)

SUITES += tests/check_libkvd
tests_check_libkvd_SOURCES = tests/check_libkvd.c tests/fake_daemon.c tests/fake_daemon.h
tests_check_libkvd_LDADD = libkvdstore.la $(KVD_CLIENT_LIBS) $(TEST_LIBS)

SUITES += tests/check_replay
tests_check_replay_SOURCES = tests/check_replay.c bench/replay_sim.c bench/replay_sim.h bench/replay_trace.c bench/replay_trace.h \
	bench/bench.h
tests_check_replay_LDADD = $(KVD_STORE_LIBS) $(TEST_LIBS)

SUITES += tests/check_options
tests_check_options_SOURCES = tests/check_options.c
tests_check_options_LDADD = $(KVD_DAEMON_LIBS) $(TEST_LIBS)

SUITES += tests/check_jobs
tests_check_jobs_SOURCES = tests/check_jobs.c
tests_check_jobs_LDADD = $(KVD_DAEMON_LIBS) $(TEST_LIBS)

SUITES += tests/check_session
tests_check_session_SOURCES = tests/check_session.c
tests_check_session_LDADD = $(KVD_DAEMON_LIBS) $(TEST_LIBS)

# ---- the real daemon and real workers ----
# libkvdtest (bench/local.mk) starts them, speaks to them, and knows what every block must hold.

BENCH_HELPERS += tests/worker$(EXEEXT)
TEST_HELPERS += tests/worker
tests_worker_SOURCES = tests/worker.c
tests_worker_LDADD = $(KVD_TEST_LIBS)

SUITES += tests/test_share
tests_test_share_SOURCES = tests/test_share.c
tests_test_share_LDADD = $(KVD_TEST_LIBS) $(TEST_LIBS)

SUITES += tests/check_ring
tests_check_ring_SOURCES = tests/check_ring.c tests/ring_fixture.h
tests_check_ring_LDADD = $(KVD_DAEMON_LIBS) $(TEST_LIBS)

SUITES += tests/check_ring_bounds
tests_check_ring_bounds_SOURCES = tests/check_ring_bounds.c tests/ring_fixture.h
tests_check_ring_bounds_LDADD = $(KVD_DAEMON_LIBS) $(TEST_LIBS)

SUITES += tests/test_attend_daemon
tests_test_attend_daemon_SOURCES = tests/test_attend_daemon.c tests/attend_fixture.h
tests_test_attend_daemon_LDADD = $(KVD_TEST_LIBS) $(TEST_LIBS)

SUITES += tests/check_attend
tests_check_attend_SOURCES = tests/check_attend.c tests/attend_fixture.h
tests_check_attend_LDADD = $(KVD_TEST_LIBS) $(TEST_LIBS)

SUITES += tests/test_alloc
tests_test_alloc_SOURCES = tests/test_alloc.c
tests_test_alloc_LDADD = tests/libkvdtest.la libkvdstore.la $(KVD_CLIENT_LIBS) $(TEST_LIBS)
tests_test_alloc_LDFLAGS = $(AM_LDFLAGS) -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=posix_memalign,--wrap=free \
	-Wl,--wrap=strdup,--wrap=memfd_create,--wrap=mmap,--wrap=fallocate

SUITES += tests/test_nosyscall
tests_test_nosyscall_SOURCES = tests/test_nosyscall.c
tests_test_nosyscall_LDADD = $(KVD_TEST_LIBS) $(TEST_LIBS)

SUITES += tests/test_limits
tests_test_limits_SOURCES = tests/test_limits.c tests/limits_fixture.h
tests_test_limits_LDADD = $(KVD_TEST_LIBS) $(TEST_LIBS)

SUITES += tests/test_hostile
tests_test_hostile_SOURCES = tests/test_hostile.c tests/hostile_fixture.h
tests_test_hostile_LDADD = $(KVD_TEST_LIBS) $(TEST_LIBS)

SUITES += tests/test_room
tests_test_room_SOURCES = tests/test_room.c tests/limits_fixture.h
tests_test_room_LDADD = $(KVD_TEST_LIBS) $(TEST_LIBS)

SUITES += tests/test_isolation
tests_test_isolation_SOURCES = tests/test_isolation.c tests/hostile_fixture.h
tests_test_isolation_LDADD = $(KVD_TEST_LIBS) $(TEST_LIBS)

SUITES += tests/test_kill
tests_test_kill_SOURCES = tests/test_kill.c
tests_test_kill_LDADD = $(KVD_TEST_LIBS) $(TEST_LIBS)

if GRPC
SUITES += tests/test_grpc_wire
tests_test_grpc_wire_SOURCES = tests/test_grpc_wire.c
tests_test_grpc_wire_LDADD = $(KVD_TEST_LIBS) $(TEST_LIBS)
endif

FUZZ_TARGETS += tests/fuzz/fuzz_message
tests_fuzz_fuzz_message_SOURCES = tests/fuzz/fuzz_message.c
tests_fuzz_fuzz_message_LDADD = $(KVD_PROTO_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_message_LDFLAGS = $(FUZZ_LINK)
EXTRA_DIST += tests/fuzz/corpus/message

FUZZ_TARGETS += tests/fuzz/fuzz_lookup
tests_fuzz_fuzz_lookup_SOURCES = tests/fuzz/fuzz_lookup.c
tests_fuzz_fuzz_lookup_LDADD = $(KVD_PROTO_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_lookup_LDFLAGS = $(FUZZ_LINK)
EXTRA_DIST += tests/fuzz/corpus/lookup

FUZZ_TARGETS += tests/fuzz/fuzz_decode
tests_fuzz_fuzz_decode_SOURCES = tests/fuzz/fuzz_decode.c
tests_fuzz_fuzz_decode_LDADD = $(KVD_KERNELS_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_decode_LDFLAGS = $(FUZZ_LINK)
EXTRA_DIST += tests/fuzz/corpus/decode

FUZZ_TARGETS += tests/fuzz/fuzz_encode
tests_fuzz_fuzz_encode_SOURCES = tests/fuzz/fuzz_encode.c
tests_fuzz_fuzz_encode_LDADD = $(KVD_KERNELS_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_encode_LDFLAGS = $(FUZZ_LINK)
EXTRA_DIST += tests/fuzz/corpus/encode

FUZZ_TARGETS += tests/fuzz/fuzz_space
tests_fuzz_fuzz_space_SOURCES = tests/fuzz/fuzz_space.c
tests_fuzz_fuzz_space_LDADD = $(KVD_STORE_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_space_LDFLAGS = $(FUZZ_LINK)
EXTRA_DIST += tests/fuzz/corpus/space

FUZZ_TARGETS += tests/fuzz/fuzz_request
tests_fuzz_fuzz_request_SOURCES = tests/fuzz/fuzz_request.c tests/fuzz/fuzz_daemon.h
tests_fuzz_fuzz_request_LDADD = $(KVD_DAEMON_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_request_LDFLAGS = $(FUZZ_LINK) $(KVD_FAULT_WRAP)
EXTRA_DIST += tests/fuzz/corpus/request

if GRPC
FUZZ_TARGETS += tests/fuzz/fuzz_grpc
tests_fuzz_fuzz_grpc_SOURCES = tests/fuzz/fuzz_grpc.c tests/fuzz/fuzz_daemon.h
tests_fuzz_fuzz_grpc_LDADD = $(KVD_DAEMON_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_grpc_LDFLAGS = $(FUZZ_LINK) $(KVD_FAULT_WRAP)
endif
EXTRA_DIST += tests/fuzz/corpus/grpc

FUZZ_TARGETS += tests/fuzz/fuzz_page
tests_fuzz_fuzz_page_SOURCES = tests/fuzz/fuzz_page.c
tests_fuzz_fuzz_page_LDADD = $(KVD_STORE_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_page_LDFLAGS = $(FUZZ_LINK)
EXTRA_DIST += tests/fuzz/corpus/page

FUZZ_TARGETS += tests/fuzz/fuzz_ring
tests_fuzz_fuzz_ring_SOURCES = tests/fuzz/fuzz_ring.c tests/ring_fixture.h
tests_fuzz_fuzz_ring_LDADD = $(KVD_DAEMON_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_ring_LDFLAGS = $(FUZZ_LINK)
EXTRA_DIST += tests/fuzz/corpus/ring

FUZZ_TARGETS += tests/fuzz/fuzz_frames
tests_fuzz_fuzz_frames_SOURCES = tests/fuzz/fuzz_frames.c
tests_fuzz_fuzz_frames_LDADD = $(KVD_DAEMON_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_frames_LDFLAGS = $(FUZZ_LINK)
EXTRA_DIST += tests/fuzz/corpus/frames

FUZZ_TARGETS += tests/fuzz/fuzz_options
tests_fuzz_fuzz_options_SOURCES = tests/fuzz/fuzz_options.c
tests_fuzz_fuzz_options_LDADD = $(KVD_DAEMON_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_options_LDFLAGS = $(FUZZ_LINK)
EXTRA_DIST += tests/fuzz/corpus/options tests/fuzz/options.dict

FUZZ_TARGETS += tests/fuzz/fuzz_attend_call
tests_fuzz_fuzz_attend_call_SOURCES = tests/fuzz/fuzz_attend_call.c
tests_fuzz_fuzz_attend_call_LDADD = $(KVD_CLIENT_LIBS) $(FUZZ_LIBS)
tests_fuzz_fuzz_attend_call_LDFLAGS = $(FUZZ_LINK)
EXTRA_DIST += tests/fuzz/corpus/attend_call

SUITES += tests/check_service
tests_check_service_SOURCES = tests/check_service.c
tests_check_service_LDADD = $(KVD_CLIENT_LIBS) $(TEST_LIBS)

# ---- scripts ----
PLAIN_SCRIPT_TESTS += tests/test_units.sh
SCRIPT_TESTS += tests/test_faults.sh
PLAIN_SCRIPT_TESTS += tests/test_consumer.sh
SCRIPT_TESTS += tests/test_kvctl.sh
SCRIPT_TESTS += tests/test_grpc.sh tests/test_grpc_tenants.sh
EXTRA_DIST += tests/grpc_client.py tests/grpc_bed.sh
TEST_HELPERS += tests/publish_once
tests_publish_once_SOURCES = tests/consumer/consumer.c
tests_publish_once_CPPFLAGS = $(AM_CPPFLAGS) -I$(top_srcdir)/client/libkvd
tests_publish_once_LDADD = libkvd.la
EXTRA_DIST += tests/consumer/consumer.c
PLAIN_SCRIPT_TESTS += tests/test_spin.sh
EXTRA_DIST += tests/spin/lease.pml

# ---- the end: what make check builds and runs ----
check_PROGRAMS += $(SUITES) $(FUZZ_TARGETS) $(TEST_HELPERS)
TESTS += $(SUITES) $(FUZZ_TARGETS) $(SCRIPT_TESTS)
if !SANITIZED
TESTS += $(PLAIN_SCRIPT_TESTS)
endif
EXTRA_DIST += $(SCRIPT_TESTS) $(PLAIN_SCRIPT_TESTS) tests/fuzz/README.md

# A guard against a test that hangs, far above what any takes; it ends the test's whole process group.
LOG_COMPILER = timeout
AM_LOG_FLAGS = --kill-after=10 1800

AM_TESTS_ENVIRONMENT = \
	KVD_SRCDIR='$(abs_top_srcdir)'; export KVD_SRCDIR; \
	KVD_BUILDDIR='$(abs_top_builddir)'; export KVD_BUILDDIR;
