# libkvdkernels: numbers. Everything is built for the x86-64 baseline except the variants, one library an instruction set.
noinst_LTLIBRARIES += libkvdkernels.la libkvdkernels_avx2.la libkvdkernels_avx512.la
libkvdkernels_la_SOURCES =
libkvdkernels_la_LIBADD = libkvdkernels_avx2.la libkvdkernels_avx512.la

libkvdkernels_avx2_la_SOURCES =
libkvdkernels_avx2_la_CFLAGS = $(AM_CFLAGS) -mavx2 -mfma -mf16c -mbmi -mbmi2

libkvdkernels_avx512_la_SOURCES =
libkvdkernels_avx512_la_CFLAGS = $(AM_CFLAGS) -mavx2 -mfma -mf16c -mbmi -mbmi2 \
	-mavx512f -mavx512bw -mavx512vl -mavx512dq
