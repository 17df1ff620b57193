# libkvdproto: what is said. The protobuf-c code is generated into the build folder.
noinst_LTLIBRARIES += libkvdproto.la
libkvdproto_la_SOURCES = \
	proto/frame.c proto/frame.h \
	proto/key.c proto/key.h \
	proto/lookup.c proto/lookup.h \
	proto/ring.c proto/ring.h \
	proto/shm.h
nodist_libkvdproto_la_SOURCES = proto/kvd.pb-c.c proto/kvd.pb-c.h

BUILT_SOURCES += proto/kvd.pb-c.h
CLEANFILES += proto/kvd.pb-c.c proto/kvd.pb-c.h
EXTRA_DIST += proto/kvd.proto

proto/kvd.pb-c.h: proto/kvd.proto
	@$(MKDIR_P) proto
	$(AM_V_GEN)$(PROTOC_C) --proto_path=$(srcdir)/proto --c_out=proto $(srcdir)/proto/kvd.proto
proto/kvd.pb-c.c: proto/kvd.pb-c.h
