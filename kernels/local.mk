# libkvdkernels: numbers. Everything is built for the x86-64 baseline except the variants, one library an instruction set.
noinst_LTLIBRARIES += libkvdkernels.la libkvdkernels_sse42.la libkvdkernels_avx2.la libkvdkernels_avx512.la
libkvdkernels_la_SOURCES = \
	kernels/cpu.c kernels/cpu.h \
	kernels/crc32c.c kernels/crc32c.h \
	kernels/codec/codec.c kernels/codec/codec.h \
	kernels/codec/codec_num.h \
	kernels/codec/codec_scalar.c \
	kernels/codec/codec_tab.c kernels/codec/codec_tab.h \
	kernels/codec/tile.c kernels/codec/tile.h
libkvdkernels_la_LIBADD = libkvdkernels_sse42.la libkvdkernels_avx2.la libkvdkernels_avx512.la

libkvdkernels_sse42_la_SOURCES = kernels/crc32c_sse42.c
libkvdkernels_sse42_la_CFLAGS = $(AM_CFLAGS) -msse4.2 -mpclmul

codec_rows = kernels/codec/codec_rows.h kernels/codec/codec_rows_kc4.h kernels/codec/codec_rows_tq.h
libkvdkernels_avx2_la_SOURCES = kernels/codec/codec_avx2.c kernels/codec/codec_vec_avx2.h $(codec_rows)
libkvdkernels_avx2_la_CFLAGS = $(AM_CFLAGS) -mavx2 -mfma -mf16c -mbmi -mbmi2

libkvdkernels_avx512_la_SOURCES = kernels/codec/codec_avx512.c kernels/codec/codec_vec_avx512.h $(codec_rows)
libkvdkernels_avx512_la_CFLAGS = $(AM_CFLAGS) -mavx2 -mfma -mf16c -mbmi -mbmi2 \
	-mavx512f -mavx512bw -mavx512vl -mavx512dq
libkvdkernels_la_SOURCES += kernels/codec/payload.c kernels/codec/payload.h

# ---- attention over encoded blocks ----
noinst_LTLIBRARIES += libkvdkernels_avx512_vnni.la
libkvdkernels_la_SOURCES += kernels/attn/attn.c kernels/attn/attn.h kernels/attn/attn_int.h kernels/attn/attn_scalar.c
libkvdkernels_la_LIBADD += libkvdkernels_avx512_vnni.la
attn_part = kernels/attn/attn_part.h kernels/attn/attn_any.h kernels/attn/attn_code.h kernels/attn/attn_plain.h
libkvdkernels_avx2_la_SOURCES += kernels/attn/attn_avx2.c kernels/attn/attn_vec_avx2.h $(attn_part)
libkvdkernels_avx512_la_SOURCES += kernels/attn/attn_avx512.c kernels/attn/attn_vec_avx512.h $(attn_part)
libkvdkernels_avx512_vnni_la_SOURCES = kernels/attn/attn_avx512_vnni.c kernels/attn/attn_vec_avx512.h $(attn_part)
libkvdkernels_avx512_vnni_la_CFLAGS = $(libkvdkernels_avx512_la_CFLAGS) -mavx512vnni
