# What the gRPC suites share; sourced. Ends the suite with 77 where gRPC or a client for it is missing.
#
#   find_python COMMAND...   sets python to one that has gRPC, tried by way of the command (nothing: as ourselves)
#   make_stubs PROTO...      the protocols' Python modules, in $work/stubs
#   start_daemon OPTION...   a daemon with its sockets in $work, and waits until it is ready; its log is $work/log
#   fail TEXT                shows the log, and fails

if ! grep -q 'define KVD_GRPC 1' "$KVD_BUILDDIR/config.h"; then
    echo "this build has no gRPC (--without-grpc)"
    exit 77
fi

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
    cat "$work/log"
    exit 1
}

find_python()
{
    python=
    for p in ${KVD_PYTHON:-} python3 /usr/bin/python3; do
        p=$(command -v "$p") || continue
        if "$@" "$p" -c 'import grpc, google.protobuf' 2>/dev/null; then
            python=$p
            break
        fi
    done
    if [ -z "$python" ] || ! command -v protoc >/dev/null || ! command -v grpc_python_plugin >/dev/null; then
        echo "no generated client: install the Debian packages python3-grpcio, python3-protobuf, protobuf-compiler, protobuf-compiler-grpc"
        exit 77
    fi
}

make_stubs()
{
    mkdir "$work/stubs"
    protoc --proto_path="$KVD_SRCDIR/proto" --python_out="$work/stubs" --grpc_python_out="$work/stubs" \
        --plugin=protoc-gen-grpc_python="$(command -v grpc_python_plugin)" "$@"
}

start_daemon()
{
    "$KVD_BUILDDIR/kvd" --socket "$work/kvd.sock" --grpc-socket "$work/grpc.sock" "$@" >"$work/log" 2>&1 &
    daemon=$!
    until grep -q 'kvd: ready' "$work/log"; do
        kill -0 "$daemon" || fail "the daemon did not start"
        sleep 0.02
    done
}
