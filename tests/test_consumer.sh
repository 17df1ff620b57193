#!/bin/sh
# What a user of the installed library sees: `make install` into an empty folder, then a program that knows nothing but
# pkg-config's answers, compiled as C99 and as C++, against a daemon that was started from the installed tree. Run by
# make check; needs a compiler and pkg-config.
set -eu

# The make that runs this hands down its own flags and job slots; the one below is none of its business.
unset MAKEFLAGS MFLAGS MAKELEVEL DESTDIR
CC=${CC:-cc}
CXX=${CXX:-c++}
for tool in "$CC" "$CXX" pkg-config make; do
    if ! command -v "$tool" >/dev/null; then
        echo "$tool is missing: install the Debian packages gcc, g++, pkg-config, make"
        exit 77
    fi
done

work=$(mktemp -d)
daemon=
finish()
{
    if [ -n "$daemon" ]; then
        kill "$daemon" 2>/dev/null || true
        wait "$daemon" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap finish EXIT

fail()
{
    echo "FAIL: $1"
    exit 1
}

root=$work/root
make -s -C "$KVD_BUILDDIR" install DESTDIR="$root" >"$work/install.log" 2>&1 || {
    tail -n 20 "$work/install.log"
    fail "make install DESTDIR="
}
module=$(find "$root" -name libkvd.pc)
[ -n "$module" ] || fail "libkvd.pc was not installed"
PKG_CONFIG_PATH=$(dirname "$module")
PKG_CONFIG_SYSROOT_DIR=$root
export PKG_CONFIG_PATH PKG_CONFIG_SYSROOT_DIR
libdir=$(pkg-config --variable=libdir libkvd)
case $libdir in
"$root"*) ;;
*) libdir=$root$libdir ;;
esac

# One number says which interface it is: in the package's version, in the header, in the library's name.
major=$(pkg-config --modversion libkvd | cut -d. -f1)
grep -q "^#define KVD_VERSION_MAJOR $major\>" "$(find "$root" -name kvd.h)" || fail "KVD_VERSION_MAJOR is not $major"
[ -e "$libdir/libkvd.so.$major" ] || fail "the library is not libkvd.so.$major"

# Other libraries' folders must not be needed by those who use ours: no -I but our own, no -l but -lkvd.
said=$(pkg-config --libs libkvd)
for word in $said; do
    case $word in
    -L* | -lkvd | -Wl,*) ;;
    *) fail "pkg-config --libs libkvd asks users to link $word" ;;
    esac
done

warnings="-Wall -Wextra -Werror -pedantic"
source=$KVD_SRCDIR/tests/consumer/consumer.c
# Word splitting of pkg-config's answer is how it is meant to be used.
# shellcheck disable=SC2046,SC2086
$CC -std=c99 $warnings -o "$work/consumer-c99" "$source" $(pkg-config --cflags --libs libkvd) || fail "as C99"
# shellcheck disable=SC2046,SC2086
$CXX -x c++ -std=c++11 $warnings -o "$work/consumer-c++" "$source" -x none $(pkg-config --cflags --libs libkvd) ||
    fail "as C++"

LD_LIBRARY_PATH=$libdir
KVD_SOCKET=$work/kvd.sock
export LD_LIBRARY_PATH KVD_SOCKET
kvd=$(find "$root" -type f -name kvd -perm -100)
[ -n "$kvd" ] || fail "the daemon was not installed"
conf=$(find "$root" -path '*/kvd/kvd.conf')
[ -n "$conf" ] || fail "no configuration was installed, and the unit names one"
"$kvd" --config "$conf" --check || fail "the daemon refuses the configuration that comes with it"
# Sections name groups that this machine need not have.
sed -e '/^#\[/,$d' -e 's/^#\([a-z_]* = .\)/\1/' "$conf" >"$work/examples.conf"
"$kvd" --config "$work/examples.conf" --check || fail "the configuration's examples are not options of the daemon"
"$kvd" --config "$conf" --socket "$KVD_SOCKET" >"$work/kvd.log" 2>&1 &
daemon=$!
tries=0
until [ -S "$KVD_SOCKET" ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ] || ! kill -0 "$daemon" 2>/dev/null; then
        cat "$work/kvd.log"
        fail "the installed daemon did not come up"
    fi
    sleep 0.1
done

for program in consumer-c99 consumer-c++; do
    "$work/$program" || {
        cat "$work/kvd.log"
        fail "$program: exit code $?"
    }
done
echo "consumer: built and run as C99 and as C++"
