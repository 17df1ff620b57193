# libkvdstore: what is kept where.
noinst_LTLIBRARIES += libkvdstore.la
libkvdstore_la_SOURCES =
