#!/usr/bin/env bash
# Builds kvd-ggml against libggml (and libllama, for the vocabulary), which are no Debian packages and therefore no part of the main
# build.
#
#   build-ggml.sh ENGINE BUILD OUT     ENGINE: the prefix that ../llama/fetch.sh engine printed, or any other of the same version
#                                 BUILD: a build folder of kvd, for libkvd
#                                 OUT: a folder for the programs kvd-ggml, check_gemma and check_refusals
#
# Rebuilds only what is older than its sources. CC and CFLAGS as usual.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../../.." && pwd)
llama=$here/../llama
(($# == 3)) || { sed -n '5,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
engine=$1
build=$(cd "$2" 2>/dev/null && pwd) || { echo "build-ggml.sh: $2 is no build folder: ./dev build makes build/release" >&2; exit 1; }
out=$3
[[ -f $engine/include/ggml-cpu.h ]] || { echo "build-ggml.sh: $engine has no ggml-cpu.h: ../llama/fetch.sh engine makes one that has" >&2; exit 1; }
[[ -f $build/.libs/libkvd.so ]] || { echo "build-ggml.sh: $build has no libkvd yet: make it first" >&2; exit 1; }

mkdir -p "$out/o"
# One build at a time in a folder; the lock goes with the process.
exec 9>"$out/o/.lock"
flock 9

newest=$(find "$here" "$llama"/{common,divergence}.[ch] "$top/client/libkvd/kvd.h" -name '*.[ch]' -newer "$out/kvd-ggml" -print -quit \
    2>/dev/null || echo all)
if [[ -x $out/kvd-ggml && -z $newest && $(cat "$out/o/with" 2>/dev/null) == "$engine $build" ]]; then
    exit 0
fi

flags=(-std=gnu17 -Wall -Wextra -Wshadow -Wmissing-prototypes -isystem "$engine/include" -I"$top/client/libkvd" -I"$llama")
read -ra user_flags <<<"${CFLAGS--O2 -g}"
compile()
{
    local source=$1 name
    shift
    name=${source##*/}
    "${CC:-cc}" "${flags[@]}" "${user_flags[@]}" "$@" -c "$source.c" -o "$out/o/$name.o"
}
for name in attention check_gemma check_refusals gemma kvd-ggml reuse run words worker; do
    compile "$here/$name"
done
compile "$here/tiles" -O3
compile "$llama/common"
compile "$llama/divergence" -O3 -ffast-math

# shellcheck disable=SC2054 # the comma is the linker's
libraries=(-L"$engine/lib" -Wl,-rpath,"$engine/lib" -lllama -lggml -lggml-cpu -lggml-base -L"$build/.libs" -Wl,-rpath,"$build/.libs"
    -lkvd -lcrypto -lm -lpthread)
link()
{
    local program=$1
    shift
    "${CC:-cc}" "${user_flags[@]}" -o "$out/$program.new" "${@/#/$out/o/}" "${libraries[@]}"
    mv "$out/$program.new" "$out/$program"
}
objects=({attention,common,divergence,gemma,reuse,tiles,words,worker}.o)
link check_gemma check_gemma.o "${objects[@]}"
link check_refusals check_refusals.o gemma.o
link kvd-ggml kvd-ggml.o run.o "${objects[@]}"
printf '%s\n' "$engine $build" >"$out/o/with"
