#!/bin/sh
# kvctl against a real daemon: each command, what it prints, and its exit code; and its codec command, which needs none.
# KVD_BIN, KVCTL_BIN and KVD_WORKER name the programs; else they are in KVD_BUILDDIR.
set -eu

kvd=${KVD_BIN:-$KVD_BUILDDIR/kvd}
kvctl=${KVCTL_BIN:-$KVD_BUILDDIR/kvctl}
publisher=$KVD_BUILDDIR/tests/publish_once
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
cd "$work"

fail()
{
    echo "FAIL: $1"
    cat out err 2>/dev/null || true
    exit 1
}

# expect CODE PATTERN ARGUMENT...: kvctl's exit code, and an extended regular expression that its output or errors match.
expect()
{
    code=$1
    pattern=$2
    shift 2
    got=0
    "$kvctl" "$@" >out 2>err || got=$?
    [ "$got" = "$code" ] || fail "kvctl $*: exit code $got, not $code"
    [ -z "$pattern" ] || cat out err | grep -Eq -- "$pattern" || fail "kvctl $*: nothing like $pattern"
}

# ---- without a daemon ----

KVD_SOCKET=$work/kvd.sock
export KVD_SOCKET
expect 2 'a command is needed'
expect 0 'Exit codes: 0 done' --help
expect 0 '^kvctl [0-9]' --version
expect 2 'no command "nothing"' nothing
expect 2 'no-such' ls --no-such
expect 2 'cannot be listed' ls nothing
expect 3 'is the daemon running' ping
expect 3 'start the daemon' doctor
for command in $("$kvctl" __complete); do
    expect 0 '^Usage: kvctl' "$command" --help
    "$kvctl" __complete "$command" | grep -q '^--help$' || fail "completion of $command"
done

# 200 tokens, 2 heads of 64, fp16: mantissas of all kinds, magnitudes around 1, both signs.
LC_ALL=C awk 'BEGIN { srand(7); for (i = 0; i < 25600; i++) {
    printf "%c", 1 + int(rand() * 127); h = 56 + int(rand() * 6); printf "%c", rand() < 0.5 ? h : h + 128 } }' >k.raw
[ "$(wc -c <k.raw)" = 51200 ] || fail "awk does not write bytes"
shape="--shape=200,2,64 --dtype=f16"
expect 0 '^kc4 +4\.' codec list
expect 0 '"codec": "tq4", "bits_per_value": 4\.' codec list --json
# shellcheck disable=SC2086
{
    expect 0 '^raw +16\.000 +0\.0' codec error $shape k.raw
    expect 0 '^uq4:rule=even,rotate=on +4\.250' codec error --codec=fp8,uq4:rule=even,rotate=on $shape k.raw
    expect 2 'zip' codec error --codec=zip $shape k.raw
    expect 1 'not as long' codec error --codec=kc4 --shape=200,2,128 --dtype=f16 k.raw
    expect 0 '' codec encode --codec=raw $shape k.raw k.code
    expect 0 '' codec decode --codec=raw $shape k.code back.raw
    cmp k.raw back.raw || fail "raw is not exact"
    expect 0 '' codec encode --codec=kc4 --block=32 $shape k.raw k.code
    expect 0 '' codec decode --codec=kc4 --block=32 $shape k.code back.npy
    expect 1 'longer' codec decode --codec=kc4 --block=64 $shape k.code back.raw
    expect 1 'shorter' codec decode --codec=kc4 --block=32 --shape=300,2,64 k.code back.raw
    # What was decoded is a .npy file that error can read, and coding it again loses next to nothing.
    expect 0 '' codec error --json --codec=kc4 --block=32 back.npy
    awk -F'"rel_mse": ' 'NF > 1 { split($2, x, ","); exit !(x[1] < 1e-4) }' out || fail "kc4 of kc4"
    expect 0 '' codec encode --format=uq-page $shape k.raw k.raw page.raw
    [ "$(wc -c <page.raw)" = $((200 * 2 * 2 * (32 + 2))) ] || fail "size of a page"
    expect 1 'uq4' codec encode --format=uq-page --codec=kc4 $shape k.raw k.raw page.raw
    expect 0 '' codec encode --format=uq-page $shape k.raw k.raw page.npy
}
printf '\223NUMPY\1\0\4\0xxxx' >bad.npy
expect 1 'dtype' codec error bad.npy
expect 1 'No such file' codec error none.npy
expect 1 'No such file' codec error --json none.npy
[ ! -s out ] || fail "half of a JSON array"
# fp16 NaN
# shellcheck disable=SC2046
printf '\0\176%.0s' $(seq 16) >nan.raw
expect 1 'NaN' codec error --shape=1,1,16 --dtype=f16 nan.raw

# ---- with one ----

: >kvd.conf
"$kvd" --config "$work/kvd.conf" --socket "$KVD_SOCKET" >kvd.log 2>&1 &
daemon=$!
tries=0
until "$kvctl" ping >/dev/null 2>&1; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ] || ! kill -0 "$daemon" 2>/dev/null; then
        cat kvd.log
        fail "the daemon did not come up"
    fi
    sleep 0.1
done

expect 0 'median' ping --count=100
expect 0 '^ok +worker' doctor
expect 0 '"check": "daemon", "level": "ok"' doctor --json
expect 0 '^\[\]$' ls --json
"$publisher" >published || fail "publishing"
expect 0 '^kvd_blocks_published_total +4 blocks' stats
expect 0 '"name": "kvd_blocks_published_total", "label": "", "value": 4' stats --json
expect 0 '^# TYPE kvd_blocks_published_total counter' stats --prometheus
# Each metric's lines stand together.
[ -z "$(grep '^# TYPE' out | sort | uniq -d)" ] || fail "a metric twice"
expect 2 'exclude each other' stats --json --prometheus
expect 0 'default' ls
[ "$(wc -l <out)" = 5 ] || fail "4 blocks and a heading"
expect 0 '' ls --limit=2
[ "$(wc -l <out)" = 3 ] || fail "--limit"
expect 0 '"model": "consumer"' ls spaces --json
expect 0 'consumer' ls spaces
expect 0 'kvctl' ls workers
expect 0 'default' ls tenants
expect 2 'cannot be selected' ls tenants --model=x
expect 0 '' ls --model=other
[ ! -s out ] || fail "--model"
key=$("$kvctl" ls --long | awk 'END { print $1 }')
expect 0 "^key +$key" show "$key"
expect 0 "\"key\": \"$key\"" show --json "$(echo "$key" | cut -c 1-16)"
expect 1 'not found' show 0000000000000000
expect 2 'hex digits' show abc
expect 0 '^space +1' show --space=1 --tenant=default "$key"
expect 1 'not found' show --space=2 "$key"
expect 1 'no tenant' show --tenant=nobody "$key"
expect 0 '^pinned [1-4] blocks' pin "$key"
expect 0 '^verified 4 blocks.* 0 bad' verify
expect 0 '"bad": 0' verify --json
expect 2 'evict everything' evict
expect 2 'excludes' evict --all --model=x
expect 0 '^would evict' evict --all --dry-run
expect 2 'is no time' evict --age=old
expect 0 ' 0 pinned' evict --age=1h --dry-run
expect 0 ' 4 pinned' evict --age=0 --dry-run
expect 0 '' evict --model=other --json
grep -q '"blocks": 0' out || fail "evict of another model"
expect 0 'pinned' evict --all
expect 0 '^unpinned' unpin "$key"
expect 0 '^evicted [1-4] blocks' evict --bytes=1G
expect 0 '^\[\]$' ls --json
expect 0 '^host_bytes = 1G' config
expect 0 '^host_bytes = 2G' config host_bytes=2G
expect 0 '^host_bytes = 2G' config host_bytes
expect 0 'default 1G' config --all host_bytes
expect 0 '"name": "host_bytes", "value": "2G"' config --json
expect 1 'no option' config nothing
expect 1 'allowed' config host_bytes=much
expect 1 'restart' config slab_bytes=4M
expect 1 'no option' config =1
expect 0 '^admin_uids = 1' config admin_uids=1
expect 0 '^admin_uids = $' config admin_uids=
expect 0 '^admin_uids = $' config admin_uids
expect 0 'takes no new' drain
if "$publisher" >published 2>&1; then
    fail "a worker was let in while draining"
fi
expect 0 'again' drain --undo
"$publisher" >published || fail "publishing after the drain"

kill "$daemon"
wait "$daemon" || true
daemon=
expect 3 '' stats
echo "kvctl: all commands"
