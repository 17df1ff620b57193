#!/bin/sh
# The units are accepted by systemd without a word, and the service exposes little: `systemd-analyze security` rates a
# service from 0 (sealed) to 10 (open). Run by make check; needs systemd-analyze, no running systemd.
set -eu

limit=15 # tenths: 1.5

if ! command -v systemd-analyze >/dev/null || ! command -v systemd-tmpfiles >/dev/null; then
    echo "systemd-analyze or systemd-tmpfiles is missing: install the Debian package systemd"
    exit 77
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail()
{
    echo "FAIL: $1"
    exit 1
}

# The program is not installed yet; verify wants to see one at ExecStart's path.
units="kvd.service kvd.socket"
if [ -e "$KVD_BUILDDIR/systemd/kvd-grpc.socket" ]; then # not of a build without gRPC
    units="$units kvd-grpc.socket"
fi
for unit in $units; do
    sed 's|^ExecStart=[^ ]*/kvd |ExecStart=/bin/true |' "$KVD_BUILDDIR/systemd/$unit" >"$work/$unit"
    if grep -n '@[a-z]*@' "$work/$unit"; then
        fail "$unit: a placeholder was not replaced"
    fi
done
grep -q '^ExecStart=/bin/true --config /' "$work/kvd.service" || fail "kvd.service does not start kvd --config /..."

# shellcheck disable=SC2086
said=$(cd "$work" && LC_ALL=C systemd-analyze verify --man=no $(printf './%s ' $units) 2>&1) ||
    fail "systemd-analyze verify: $said"
# What it complains of but tolerates (unknown settings, say) goes to stderr with exit code 0. Units of the host's own
# are none of our business.
if printf '%s\n' "$said" | grep kvd; then
    fail "systemd-analyze verify is not silent"
fi

LC_ALL=C systemd-analyze security --offline=yes --no-pager --threshold=$limit "$work/kvd.service" >"$work/security" || {
    cat "$work/security"
    fail "exposure above $limit tenths"
}
sed -n 's/.*Overall exposure level for //p' "$work/security" | grep . || fail "systemd-analyze security gave no level"

# The socket's folder, and the user that the units name.
grep -q '^u *kvd ' "$KVD_SRCDIR/systemd/kvd.sysusers" || fail "kvd.sysusers makes no user kvd"
mkdir -p "$work/root/etc" "$work/root/usr/lib/sysusers.d"
cp "$KVD_SRCDIR/systemd/kvd.sysusers" "$work/root/usr/lib/sysusers.d/kvd.conf"
if command -v systemd-sysusers >/dev/null && [ "$(id -u)" = 0 ]; then
    systemd-sysusers --root="$work/root" || fail "systemd-sysusers refuses kvd.sysusers"
    grep -q '^kvd:' "$work/root/etc/passwd" || fail "systemd-sysusers made no user kvd"
    mkdir -p "$work/root/usr/lib/tmpfiles.d"
    cp "$KVD_SRCDIR/systemd/kvd.tmpfiles" "$work/root/usr/lib/tmpfiles.d/kvd.conf"
    systemd-tmpfiles --root="$work/root" --create kvd.conf || fail "systemd-tmpfiles refuses kvd.tmpfiles"
    [ "$(stat -c %a "$work/root/run/kvd")" = 755 ] || fail "/run/kvd has the wrong mode"
fi
echo "units: verified"
