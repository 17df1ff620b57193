# libkvdstore: what is kept where.
noinst_LTLIBRARIES += libkvdstore.la
libkvdstore_la_SOURCES =
libkvdstore_la_SOURCES += store/policy.c store/policy.h store/policy-t.h store/policy_ghost.c store/policy_ghost.h \
	store/policy_lru.c store/policy_s3fifo.c
libkvdstore_la_SOURCES += store/cache.c store/cache.h store/cache-evict.c store/cache-internal.h store/cache-query.c \
	store/flight.c store/flight.h store/index.c store/index.h store/slab.c store/slab.h store/space.c store/space.h \
	store/tier/host.c store/tier/host.h store/tier/tier.h
