# libkvdstore: what is kept where.
noinst_LTLIBRARIES += libkvdstore.la
libkvdstore_la_SOURCES =
libkvdstore_la_SOURCES += store/policy.c store/policy.h store/policy-t.h store/policy_ghost.c store/policy_ghost.h \
	store/policy_lru.c store/policy_s3fifo.c
