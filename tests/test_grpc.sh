#!/bin/sh
# A Python client with generated stubs (grpc_client.py) against a real daemon's gRPC socket.
set -eu

. "$KVD_SRCDIR/tests/grpc_bed.sh"

# gRPC's C core is not built for ThreadSanitizer, which slows it down and sees none of its locks: one run in fourteen stood still
# there, and why is not known. test_grpc_wire has the daemon's side under it.
if grep -q -e '-fsanitize=thread' "$KVD_BUILDDIR/Makefile"; then
    echo "gRPC's C core stands still at times under ThreadSanitizer"
    exit 77
fi

find_python
make_stubs kvd.proto grpc/health/v1/health.proto grpc/reflection/v1alpha/reflection.proto
KVD_STUBS=$work/stubs
export KVD_STUBS
unset http_proxy https_proxy

start_daemon --config /dev/null --host-bytes 256M --slab-bytes 16M --index-entries 4096
KVD_SOCKET=$work/kvd.sock "$KVD_BUILDDIR/tests/publish_once" || fail "publish_once"
"$python" "$KVD_SRCDIR/tests/grpc_client.py" "$work/grpc.sock" || fail "the client"

# The example of the documentation, as it stands there but for the socket's path.
sed -n '/^```python$/,/^```$/p' "$KVD_SRCDIR/docs/grpc.md" | sed -e '/^```/d' -e "s|/run/kvd/kvd-grpc.sock|$work/grpc.sock|" >"$work/example.py"
[ "$(wc -l <"$work/example.py")" = 10 ] || fail "the example does not have ten lines"
said=$(PYTHONPATH=$work/stubs "$python" "$work/example.py") || fail "the example"
[ "$said" = "8 tokens, 2048 bytes" ] || fail "the example said: $said"

kill "$daemon"
status=0
wait "$daemon" || status=$?
daemon=
[ "$status" = 0 ] || fail "the daemon ended with $status"
[ ! -e "$work/grpc.sock" ] || fail "the socket is still there"
# A helper thread that cannot be had fails its call alone, and the connection goes on.
if grep -q 'define KVD_FAULT_POINTS 1' "$KVD_BUILDDIR/config.h"; then
    export KVD_FAULT=grpc-job:2
    start_daemon --config /dev/null --host-bytes 16M --slab-bytes 2M --index-entries 256
    said=$(PYTHONPATH=$work/stubs "$python" "$work/example.py") || fail "the example"
    status=0
    PYTHONPATH=$work/stubs "$python" "$work/example.py" >"$work/said" 2>&1 || status=$?
    [ "$status" != 0 ] && grep -q 'StatusCode.UNAVAILABLE' "$work/said" || fail "a job that is refused: $(cat "$work/said")"
    said=$(PYTHONPATH=$work/stubs "$python" "$work/example.py") || fail "the example, after a failure"
    [ "$said" = "8 tokens, 2048 bytes" ] || fail "the example said: $said"
    kill "$daemon"
    wait "$daemon" || fail "the daemon ended with $?"
    daemon=
fi
echo "grpc: every method"
