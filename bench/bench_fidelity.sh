#!/usr/bin/env bash
# What every codec costs a real model: next-token KL on prose, manuals and code, next to fp8's in the same run.
#
#   bench_fidelity.sh [TEXT...]     TEXT: files to use instead of the ones below
#
# gemma-3-270m stored as F32, K and V in fp32; of each text the first 1,536 tokens are a prefix that goes through the codec, and the
# 512 after them are computed over it. No text is shipped, and none was chosen by its result: they are what a Debian machine with a
# compiler, perl and python has (their versions differ a little from machine to machine), and this project's own pages. A
# line for each text and codec, then one for each codec over all texts.
# KVD_FIDELITY_CODECS: what to measure, as for kvd-llama --codecs.
set -euo pipefail

case ${1-} in
-*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac

src=${KVD_SRCDIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
build=${KVD_BUILDDIR:-$src/build/release}
llama=$src/client/engines/llama

work=$(mktemp -d "${TMPDIR:-/tmp}/kvd-fidelity.XXXXXX")
trap 'rm -rf "$work"' EXIT

# pod MODULE: the manual in a perl module.
pod()
{
    local file
    file=$(perl -e 'for (@INC) { if (-f "$_/$ARGV[0]") { print "$_/$ARGV[0]"; last } }' "$1" 2>/dev/null) || return 0
    [[ -z $file ]] || sed -n '/^=head1/,/^=cut/p' "$file"
}

python_source()
{
    python3 -c 'import sys, importlib.util as u; print(open(u.find_spec(sys.argv[1]).origin).read())' "$1"
}

gather_texts()
{
    local name builtin
    for name in GPL-3 GFDL-1.3 MPL-1.1; do
        cat "/usr/share/common-licenses/$name" >"$work/prose-$name" || true
    done
    cat "$src"/docs/{overview,design,operations,protocol,shared-memory,eviction}.md >"$work/manual-kvd" || true
    for builtin in $(compgen -b); do
        help -m "$builtin"
    done >"$work/manual-bash" || true
    pod Test/More.pm >"$work/manual-perl-test" || true
    pod Math/BigInt.pm >"$work/manual-perl-bigint" || true
    cat /usr/include/pthread.h >"$work/code-c-header" || true
    cat "$src/store/cache.c" "$src/store/cache-evict.c" >"$work/code-c" || true
    python_source argparse >"$work/code-python-argparse" || true
    python_source tarfile >"$work/code-python-tarfile" || true
}

if (($# == 0)); then
    gather_texts 2>"$work/.log"
    set -- "$work"/*
fi

export GOMP_SPINCOUNT=${GOMP_SPINCOUNT-20000}
engine=$("$llama/fetch.sh" engine)
model=$("$llama/fetch.sh" model-f32)
"$llama/build.sh" "$engine" "$build" "$build/llama"
codecs=()
[[ -z ${KVD_FIDELITY_CODECS-} ]] || codecs=(--codecs "$KVD_FIDELITY_CODECS")
"$build/llama/kvd-llama" --model "$model" --cache-f32 --fidelity "${codecs[@]}" "$@" | sed -u "s|$work/||"
