#!/bin/sh
# Checks the model of lease, eviction and death (tests/spin/lease.pml) in full, then that breaking the protocol at any one place is
# found out. With KVD_DEEP set, larger instances too (half a minute and half a GiB more).
set -eu

srcdir=${KVD_SRCDIR:-$(cd "$(dirname "$0")/.." && pwd)}
model=$srcdir/tests/spin/lease.pml
cc=${CC:-cc}

command -v spin >/dev/null || { echo "SKIP: spin is not installed (Debian package: spin)"; exit 77; }
command -v "${cc%% *}" >/dev/null || { echo "SKIP: no C compiler"; exit 77; }

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM
cd "$dir"

# run FLAGS...: explores all states of that instance; pan's report is in ./report.
run() {
    rm -f pan pan.* ./*.trail
    spin "$@" -a "$model" >spin.log 2>&1 || { cat spin.log; echo "FAIL: spin refuses the model with: $*"; exit 1; }
    $cc -O2 -w -DSAFETY -DCOLLAPSE -o pan pan.c || { echo "FAIL: the verifier does not compile"; exit 1; }
    ./pan -m100000 >report 2>&1 || { cat report; echo "FAIL: the verifier stopped with: $*"; exit 1; }
    if grep -q 'max search depth too small\|aborted\|out of memory' report; then
        cat report
        echo "FAIL: the search is incomplete with: $*"
        exit 1
    fi
    states=$(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' report)
    errors=$(sed -n 's/.*errors: \([0-9]*\)$/\1/p' report)
    [ -n "$states" ] && [ -n "$errors" ] || { cat report; echo "FAIL: no verdict with: $*"; exit 1; }
}

holds() {
    run "$@"
    if [ "$errors" != 0 ]; then
        grep '^pan:' report
        spin "$@" -t -p "$model" 2>/dev/null | tail -n 60 || true
        echo "FAIL: $* breaks the model"
        exit 1
    fi
    echo "holds: $* ($states states)"
}

breaks() {
    run "$@"
    if [ "$errors" = 0 ]; then
        echo "FAIL: $* goes unnoticed ($states states)"
        exit 1
    fi
    grep -q 'assertion violated' report || { cat report; echo "FAIL: $* is stopped by something else"; exit 1; }
    echo "found: $*"
}

holds -DTRIES=3 -DEVICTIONS=3
holds -DTRIES=2 -DEVICTIONS=2 -DSTORE_BUFFER=4
holds -DTRIES=2 -DEVICTIONS=1 -DRESTART
holds -DWORKERS=2 -DTRIES=1 -DEVICTIONS=1
if [ -n "${KVD_DEEP:-}" ]; then
    holds -DTRIES=2 -DEVICTIONS=2 -DRESTART
    holds -DWORKERS=2 -DTRIES=1 -DEVICTIONS=2
fi

for switch in NO_FENCE_WORKER NO_FENCE_DAEMON NO_RECHECK NO_KEY_CHECK EARLY_RELEASE NO_SCAN NO_HANGUP KEY_AFTER_GEN; do
    breaks -D$switch
done
breaks -DREACH_KEPT
breaks -DREACH_LEASE -DRESTART
