#!/bin/bash
# The daemon with its legs pulled away: each allocation, memfd, mapping and send that it makes while it starts and serves fails once,
# and it is killed at each named instruction. It may refuse to start, and it may refuse a worker; it may not crash, and the next worker
# must be served. Needs a build with --enable-fault-points.
set -u

build=${KVD_BUILDDIR:-.}
if ! grep -q 'define KVD_FAULT_POINTS' "$build/config.h"; then
    echo "this build has no fault points: configure with --enable-fault-points"
    exit 77
fi
dir=$(mktemp -d)
socket=$dir/kvd.sock
pid=
failures=0
trap '[ -z "$pid" ] || kill -9 "$pid" 2>/dev/null; rm -rf "$dir"' EXIT
export ASAN_OPTIONS="${ASAN_OPTIONS:-}:allocator_may_return_null=1"

fail()
{
    echo "FAIL: KVD_FAULT=$fault: $*"
    sed 's/^/    /' "$dir/log" | tail -40
    failures=$((failures + 1))
}

# Starts a daemon under $fault; false if it ended before it was ready.
start()
{
    : > "$dir/log"
    KVD_FAULT=$fault "$build/kvd" --config /dev/null --socket "$socket" --host-bytes 16M --slab-bytes 2M --index-entries 256 \
        --job-threads 1 --stuck-timeout 2s >> "$dir/log" 2>&1 &
    pid=$!
    until grep -q 'kvd: ready' "$dir/log"; do
        kill -0 "$pid" 2>/dev/null || return 1
        sleep 0.01
    done
}

# Ends it; its exit status.
stop()
{
    kill -TERM "$pid" 2>/dev/null
    wait "$pid"
    local status=$?
    pid=
    return $status
}

# What a worker does in its life; errors are answers too.
work()
{
    printf '%s\n' 'open 0 raw 8' 'match 0 1 64' 'flight 0 0 4' 'publish 0 0 4 0' 'match 0 1 64' 'load 0 verify' 'attend 0' 'attend 0' \
        'open 1 quant 8' 'match 1 1 64' 'publish 1 0 4 0' 'release 0' |
        KVD_WORKER_TIMEOUT=2000 timeout 60 "$build/tests/worker" script "$socket" > "$dir/said" 2>&1
}

served()
{
    [ "$(grep -c '^ok 4 0 0' "$dir/said")" -ge 1 ] && grep -qx 'ok 4 0' "$dir/said" && ! grep -q '^error' "$dir/said"
}

# $fault happens once; whatever it does to the one who meets it, the next one is served.
survives()
{
    local status
    if ! start; then
        wait "$pid"
        status=$?
        pid=
        [ $status -eq 1 ] || [ $status -eq 2 ] || fail "ended with status $status at start"
        grep -q 'kvd: ' "$dir/log" || fail 'ended at start without a word'
        return
    fi
    work
    for _ in 1 2 3 4; do # the fault may meet any of them, but only one
        work
        ! served || break
    done
    served || { fail "a later worker is not served:"; sed 's/^/    /' "$dir/said"; }
    stop
    status=$?
    [ $status -eq 0 ] || fail "ended with status $status"
}

for fault in malloc calloc realloc memfd_create fallocate mmap sendmsg job-submit attend-thread attend-queue attend-lease; do
    name=$fault
    case $name in
    malloc) numbers="$(seq 1 25) $(seq 28 5 120)" ;;
    calloc) numbers="$(seq 1 40)" ;;
    realloc) numbers="$(seq 1 12)" ;;
    sendmsg) numbers="$(seq 1 20)" ;;
    *) numbers="$(seq 1 8)" ;;
    esac
    for n in $numbers; do
        fault=$name:$n
        survives
    done
done

# Killed at an instruction: the place is taken over at once, and the cache works again.
for point in publish-after-reserve publish-after-submit publish-before-commit publish-after-commit publish-before-reply \
    attend-piece attend-complete; do
    for n in 1 2; do
        fault=$point:$n
        start || fail 'did not start'
        work
        wait "$pid"
        status=$?
        pid=
        [ $status -eq 134 ] || fail "status $status, and not of abort()"
        fault=none:1
        start || fail "no daemon after one that died at $point"
        work
        served || fail "no service after a daemon that died at $point"
        stop || fail "status $? after $point"
    done
done

[ $failures -eq 0 ] && echo 'every fault was survived'
exit $((failures > 0))
