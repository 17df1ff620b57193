#!/usr/bin/env bash
# Builds kvd-llama against libllama, which is no Debian package and therefore no part of the main build.
#
#   build.sh ENGINE BUILD OUT     ENGINE: the prefix that fetch.sh engine printed, or any other of the same version
#                                 BUILD: a build folder of kvd, for libkvd
#                                 OUT: a folder for the programs kvd-llama and check_kvstate
#
# Rebuilds only what is older than its sources. CC and CFLAGS as usual.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../../.." && pwd)
(($# == 3)) || { sed -n '4,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
engine=$1
build=$(cd "$2" 2>/dev/null && pwd) || { echo "build.sh: $2 is no build folder: ./dev build makes build/release" >&2; exit 1; }
out=$3
[[ -f $engine/include/llama.h ]] || { echo "build.sh: $engine has no llama.h: fetch.sh engine makes one that has" >&2; exit 1; }
[[ -f $build/.libs/libkvd.so ]] || { echo "build.sh: $build has no libkvd yet: make it first" >&2; exit 1; }

mkdir -p "$out/o"
# One build at a time in a folder; the lock goes with the process.
exec 9>"$out/o/.lock"
flock 9

newest=$(find "$here" "$top/client/libkvd/kvd.h" -name '*.[ch]' -newer "$out/kvd-llama" -print -quit 2>/dev/null || echo all)
if [[ -x $out/kvd-llama && -z $newest && $(cat "$out/o/with" 2>/dev/null) == "$engine $build" ]]; then
    exit 0
fi

flags=(-std=gnu17 -Wall -Wextra -Wshadow -Wmissing-prototypes -isystem "$engine/include" -I"$top/client/libkvd")
read -ra user_flags <<<"${CFLAGS--O2 -g}"
compile()
{
    local name=$1
    shift
    "${CC:-cc}" "${flags[@]}" "${user_flags[@]}" "$@" -c "$here/$name.c" -o "$out/o/$name.o"
}
for name in common engine fidelity generate kvd-llama kvstate kvstate_probe report sharing check_kvstate; do
    compile "$name"
done
compile divergence -O3 -ffast-math

# shellcheck disable=SC2054 # the comma is the linker's
libllama=(-L"$engine/lib" -Wl,-rpath,"$engine/lib" -lllama -lggml -lggml-base)
link()
{
    local program=$1
    shift
    "${CC:-cc}" "${user_flags[@]}" -o "$out/$program.new" "${@/#/$out/o/}" "${libllama[@]}" -L"$build/.libs" -Wl,-rpath,"$build/.libs" \
        -lkvd -lcrypto -lm -lpthread
    mv "$out/$program.new" "$out/$program"
}
link check_kvstate check_kvstate.o kvstate.o kvstate_probe.o
link kvd-llama {common,divergence,engine,fidelity,generate,kvd-llama,kvstate,kvstate_probe,report,sharing}.o
printf '%s\n' "$engine $build" >"$out/o/with"
