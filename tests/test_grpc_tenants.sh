#!/bin/sh
# Peers of two tenants, and one of none, on the gRPC socket: told apart by uid alone. Needs root, to be several users.
set -eu

. "$KVD_SRCDIR/tests/grpc_bed.sh"
if [ "$(id -u)" != 0 ] || ! command -v setpriv >/dev/null; then
    echo "only root can be several users (and setpriv of util-linux is needed)"
    exit 77
fi
find_python setpriv --reuid=65534 --regid=65534 --clear-groups

chmod 755 "$work"
make_stubs kvd.proto
cat >"$work/client.py" <<'END'
import sys
import grpc
sys.path.insert(0, sys.argv[1] + "/stubs")
import kvd_pb2 as kvd
import kvd_pb2_grpc as rpc

channel = grpc.insecure_channel("unix:" + sys.argv[1] + "/grpc.sock")
cache, admin = rpc.CacheStub(channel), rpc.AdminStub(channel)
said = []
try:
    space = cache.OpenSpace(kvd.Space(model="m", dtype="f16", block_tokens=2, group=[{}], layer=[dict(n_kv_heads=1, dim_k=16, dim_v=16)]))
    tokens = [1, 2, 3, 4]
    keys = [space.fingerprint, *cache.Match(kvd.MatchRequest(space=space.space, token=tokens, keys=True)).key]
    found = cache.Match(kvd.MatchRequest(space=space.space, token=tokens))
    said.append(f"found {found.blocks}")
    blocks = [dict(parent=keys[i], token=tokens[2 * i:2 * i + 2], offset=128 * i) for i in range(2)]
    cache.Publish(kvd.PublishRequest(publish=dict(space=space.space, dtype="f16", block=blocks), data=bytes(256)))
    said.append(f"then {cache.Match(kvd.MatchRequest(space=space.space, token=tokens)).blocks}")
except grpc.RpcError as e:
    said.append("cache " + e.code().name)
try:
    said.append("workers " + ",".join(sorted(w.tenant for w in admin.List(kvd.List(what="workers")).worker)))
except grpc.RpcError as e:
    said.append("admin " + e.code().name)
print("; ".join(said))
END

cat >"$work/conf" <<'END'
default_tenant = none
socket_mode = 0666
[tenant one]
uid = 0
[tenant two]
uid = 65534
END
start_daemon --config "$work/conf" --host-bytes 16M --slab-bytes 2M --index-entries 256

# as UID WHAT: what the client says as this user.
as()
{
    said=$(setpriv --reuid="$1" --regid="$1" --clear-groups "$python" "$work/client.py" "$work") || fail "the client as $1"
    [ "$said" = "$2" ] || fail "uid $1 said: $said"
}
as 0 "found 0; then 2; workers one"
as 65534 "found 0; then 2; admin PERMISSION_DENIED"
as 65534 "found 2; then 2; admin PERMISSION_DENIED"
as 0 "found 2; then 2; workers one"
as 65533 "cache PERMISSION_DENIED; admin PERMISSION_DENIED"
echo "grpc: tenants are told apart"
