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

# gRPC's services: the public protocols' messages, and the descriptors of all services for reflection.
if GRPC
noinst_LTLIBRARIES += libkvdrpcproto.la
libkvdrpcproto_la_SOURCES =
libkvdrpcproto_la_CPPFLAGS = $(AM_CPPFLAGS) -Iproto
nodist_libkvdrpcproto_la_SOURCES = \
	proto/grpc/health/v1/health.pb-c.c proto/grpc/health/v1/health.pb-c.h \
	proto/grpc/reflection/v1/reflection.pb-c.c proto/grpc/reflection/v1/reflection.pb-c.h \
	proto/descriptors.h
BUILT_SOURCES += proto/grpc/health/v1/health.pb-c.h proto/grpc/reflection/v1/reflection.pb-c.h proto/descriptors.h
endif
CLEANFILES += proto/grpc/health/v1/health.pb-c.c proto/grpc/health/v1/health.pb-c.h \
	proto/grpc/reflection/v1/reflection.pb-c.c proto/grpc/reflection/v1/reflection.pb-c.h \
	proto/descriptors.bin proto/descriptors.h
GRPC_PROTOS = grpc/health/v1/health.proto grpc/reflection/v1/reflection.proto grpc/reflection/v1alpha/reflection.proto
EXTRA_DIST += proto/grpc/health/v1/health.proto proto/grpc/reflection/v1/reflection.proto \
	proto/grpc/reflection/v1alpha/reflection.proto

proto/grpc/health/v1/health.pb-c.h: proto/grpc/health/v1/health.proto
	@$(MKDIR_P) proto
	$(AM_V_GEN)$(PROTOC_C) --proto_path=$(srcdir)/proto --c_out=proto $(srcdir)/proto/grpc/health/v1/health.proto
proto/grpc/health/v1/health.pb-c.c: proto/grpc/health/v1/health.pb-c.h
proto/grpc/reflection/v1/reflection.pb-c.h: proto/grpc/reflection/v1/reflection.proto
	@$(MKDIR_P) proto
	$(AM_V_GEN)$(PROTOC_C) --proto_path=$(srcdir)/proto --c_out=proto $(srcdir)/proto/grpc/reflection/v1/reflection.proto
proto/grpc/reflection/v1/reflection.pb-c.c: proto/grpc/reflection/v1/reflection.pb-c.h

proto/descriptors.h: proto/kvd.proto proto/grpc/health/v1/health.proto proto/grpc/reflection/v1/reflection.proto \
		proto/grpc/reflection/v1alpha/reflection.proto
	@$(MKDIR_P) proto
	$(AM_V_GEN)$(PROTOC_C) --proto_path=$(srcdir)/proto --descriptor_set_out=proto/descriptors.bin kvd.proto $(GRPC_PROTOS) && \
	{ echo '/* A FileDescriptorSet of proto/, made by protoc-c. */'; echo 'static const unsigned char descriptor_set[] = {'; \
	  od -An -v -tu1 proto/descriptors.bin | $(SED) -e 's/[0-9][0-9]*/&,/g'; echo '};'; } > $@.tmp && mv $@.tmp $@
