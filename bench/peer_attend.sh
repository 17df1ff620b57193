#!/usr/bin/env bash
# The times of llama.cpp's attention on this machine, as lines of JSON: what bench_attend --peer reads.
#
#   peer_attend.sh [HEAD-SIZE]      all head sizes that bench_attend has, or that one
#
# Fetches and builds the engine if it is not there (client/engines/llama/fetch.sh), and bench/peer_attend.c against it.
set -euo pipefail

case ${1-} in
-*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac

src=${KVD_SRCDIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
build=${KVD_BUILDDIR:-$src/build/release}
program=$build/bench/peer_attend

engine=$("$src/client/engines/llama/fetch.sh" engine)
mkdir -p "$build/bench"
# -O3 and AVX2 (which the engine needs too): the loop that reads the bytes is the limit, and has to be as fast as it can be.
"${CC:-cc}" -std=gnu17 -O3 -mavx2 -Wall -Wextra -Wshadow -Wmissing-prototypes -isystem "$engine/include" -o "$program.$$" \
    "$src/bench/peer_attend.c" -L"$engine/lib" -Wl,-rpath,"$engine/lib" -lggml -lggml-cpu -lggml-base -lm
mv "$program.$$" "$program"
"$program" "$@"
