# Benches: BENCHES += bench/x, bench_x_SOURCES, bench_x_LDADD.
