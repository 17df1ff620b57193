# What the scripts that show engines share; sourced by them, with $build set. After begin_showing: $work, a folder that goes away,
# and start_daemon, whose daemon goes away.
# shellcheck shell=bash

die()
{
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

show()
{
    printf '%s\n' "$*"
}

work=
daemon_pid=
end_showing()
{
    [[ -z $daemon_pid ]] || kill "$daemon_pid" 2>/dev/null || true
    [[ -z $daemon_pid ]] || wait "$daemon_pid" 2>/dev/null || true
    rm -rf "$work"
}

begin_showing()
{
    : "${build:?}"
    [[ -x $build/kvd ]] || die "$build has no kvd yet: make it first"
    # Unix sockets have short names, so not in a deep build folder.
    work=$(mktemp -d "${TMPDIR:-/tmp}/kvd-show.XXXXXX")
    trap end_showing EXIT
}

# start_daemon: at $work/kvd.sock.
start_daemon()
{
    local i
    "$build/kvd" --socket="$work/kvd.sock" --host-bytes=512M >"$work/kvd.log" 2>&1 &
    daemon_pid=$!
    for ((i = 0; i < 200; i++)); do
        [[ ! -S $work/kvd.sock ]] || return 0
        kill -0 "$daemon_pid" 2>/dev/null || break
        sleep 0.05
    done
    cat "$work/kvd.log" >&2
    die "the daemon did not start"
}

# of NAME FIELD: a figure in NAME.json, lists without spaces.
of()
{
    python3 -c 'import json, sys
value = json.load(open(sys.argv[1]))[sys.argv[2]]
print(json.dumps(value, separators=(",", ":")) if isinstance(value, (list, bool)) else value)' "$work/$1.json" "$2"
}

# calc EXPRESSION FORMAT
calc()
{
    python3 -c "print(f'{$1:$2}')"
}

# expect WHAT GOT WANTED: counts in n_wrong what is not as it should be.
n_wrong=0
expect()
{
    if [[ $2 == "$3" ]]; then
        show "    $1: $2"
    else
        show "    $1: $2, and should be $3"
        n_wrong=$((n_wrong + 1))
    fi
}
