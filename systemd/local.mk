# Units and what they need. The paths in them come from configure; docs/operations.md says how to adapt them.
systemdsystemunit_DATA = systemd/kvd.service systemd/kvd.socket

if GRPC
systemdsystemunit_DATA += systemd/kvd-grpc.socket
endif

EXTRA_DIST += systemd/kvd.service.in systemd/kvd.socket.in systemd/kvd-grpc.socket.in systemd/kvd.sysusers systemd/kvd.tmpfiles \
	systemd/kvd.conf
CLEANFILES += systemd/kvd.service systemd/kvd.socket systemd/kvd-grpc.socket

UNIT_EDIT = $(MKDIR_P) systemd && \
	$(SED) -e 's|@bindir[@]|$(bindir)|g' -e 's|@sysconfdir[@]|$(sysconfdir)|g'

systemd/kvd.service: systemd/kvd.service.in Makefile
	$(AM_V_GEN)$(UNIT_EDIT) $(srcdir)/systemd/kvd.service.in > $@.tmp && mv $@.tmp $@
systemd/kvd.socket: systemd/kvd.socket.in Makefile
	$(AM_V_GEN)$(UNIT_EDIT) $(srcdir)/systemd/kvd.socket.in > $@.tmp && mv $@.tmp $@
systemd/kvd-grpc.socket: systemd/kvd-grpc.socket.in Makefile
	$(AM_V_GEN)$(UNIT_EDIT) $(srcdir)/systemd/kvd-grpc.socket.in > $@.tmp && mv $@.tmp $@

# All three are called kvd.conf where they go, so they are renamed on the way. An administrator's configuration is kept.
install-data-local: install-confs
install-confs:
	$(MKDIR_P) '$(DESTDIR)$(sysusersdir)' '$(DESTDIR)$(tmpfilesdir)' '$(DESTDIR)$(sysconfdir)/kvd'
	$(INSTALL_DATA) $(srcdir)/systemd/kvd.sysusers '$(DESTDIR)$(sysusersdir)/kvd.conf'
	$(INSTALL_DATA) $(srcdir)/systemd/kvd.tmpfiles '$(DESTDIR)$(tmpfilesdir)/kvd.conf'
	test -e '$(DESTDIR)$(sysconfdir)/kvd/kvd.conf' || \
		$(INSTALL_DATA) $(srcdir)/systemd/kvd.conf '$(DESTDIR)$(sysconfdir)/kvd/kvd.conf'
uninstall-local: uninstall-confs
uninstall-confs:
	rm -f '$(DESTDIR)$(sysusersdir)/kvd.conf' '$(DESTDIR)$(tmpfilesdir)/kvd.conf'
	! cmp -s $(srcdir)/systemd/kvd.conf '$(DESTDIR)$(sysconfdir)/kvd/kvd.conf' || \
		rm -f '$(DESTDIR)$(sysconfdir)/kvd/kvd.conf'
.PHONY: install-confs uninstall-confs
