# libkvddaemon: the daemon without its main(), so that tests can link it.
noinst_LTLIBRARIES += libkvddaemon.la
libkvddaemon_la_SOURCES =
