# Benches: BENCHES += bench/x, bench_x_SOURCES, bench_x_LDADD.

BENCHES += bench/bench_replay
bench_bench_replay_SOURCES = bench/bench_replay.c bench/replay_trace.c bench/replay_trace.h bench/svg_plot.c bench/svg_plot.h \
	bench/bench.h
bench_bench_replay_LDADD = $(KVD_STORE_LIBS)
