"""A gRPC client against a real daemon: every method, with the stubs that protoc generates. Run by test_grpc.sh.

usage: grpc_client.py SOCKET [hold]

"hold" publishes and matches a prefix, says so, and waits to be killed. Prints its seed; exit code 0 if all is well."""
import array
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time

import grpc

grpc.__path__.append(os.path.join(os.environ["KVD_STUBS"], "grpc"))  # the stubs' folders lie in the package of the same name
sys.path.insert(0, os.environ["KVD_STUBS"])
import kvd_pb2 as kvd  # noqa: E402
import kvd_pb2_grpc as kvd_grpc  # noqa: E402
from grpc.health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from grpc.reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # noqa: E402
from google.protobuf import descriptor_pb2  # noqa: E402

CODE = grpc.StatusCode
SOCKET = sys.argv[1]
SEED = int(os.environ.get("KVD_SEED", random.SystemRandom().randrange(1 << 32)))
rng = random.Random(SEED)
called = set()


class Client:
    """One connection of its own."""

    def __init__(self):
        self.channel = grpc.insecure_channel("unix:" + SOCKET, options=[("grpc.use_local_subchannel_pool", 1)])
        noted = grpc.intercept_channel(self.channel, Noter())
        self.cache = kvd_grpc.CacheStub(noted)
        self.admin = kvd_grpc.AdminStub(noted)
        self.health = health_pb2_grpc.HealthStub(noted)
        self.reflection = reflection_pb2_grpc.ServerReflectionStub(noted)

    def close(self):
        self.channel.close()


class Noter(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor,
            grpc.StreamStreamClientInterceptor):
    """Notes which methods were called."""

    def note(self, go_on, details, request):
        called.add(details.method)
        return go_on(details, request)

    intercept_unary_unary = intercept_unary_stream = note
    intercept_stream_unary = intercept_stream_stream = note


def check(holds, what):
    if not holds:
        raise AssertionError(f"{what} (seed {SEED})")


def fails(code, call, text=""):
    """The error of a call that has to fail in this way."""
    try:
        call()
    except grpc.RpcError as e:
        check(e.code() == code, f"{e.code()}: {e.details()}; wanted {code}")
        check(text in e.details(), f"{e.details()!r} does not say {text!r}")
        for key, value in e.trailing_metadata() or ():
            if key == "kvd-error-bin":
                return kvd.Error.FromString(value)
        return None
    raise AssertionError(f"a call went well that should fail with {code} (seed {SEED})")


def until(holds, what):
    """Waits; how long is not judged, but not for ever."""
    begin = time.monotonic()
    while not holds():
        check(time.monotonic() - begin < 60, f"waited in vain: {what}")
        time.sleep(0.005)
    return time.monotonic() - begin


def gauge(client, name):
    return next(m.value for m in client.admin.Stats(kvd.Stats()).metric if m.name == "kvd_" + name)


def metric(client, name):
    return gauge(client, name + "_total")


# ---- a model's K and V ----

class Model:
    """A space of two layers: the first attends to all, the second to a window."""

    heads, dim_k, dim_v, block = 2, 64, 32, 16

    def __init__(self, client, name, codec="raw", window=0, layers=2, block=16):
        self.client, self.block = client, block
        groups = [kvd.Group()] + ([kvd.Group(window_tokens=window)] if window else [])
        self.space = kvd.Space(model=name, revision="1", dtype="f32", block_tokens=block, vocab_tokens=1000, group=groups)
        for i in range(layers):
            self.space.layer.add(n_kv_heads=self.heads, dim_k=self.dim_k, dim_v=self.dim_v, group=i % len(groups),
                                 codec_k="" if codec == "default" else codec, codec_v="" if codec == "default" else codec)
        self.opened = client.cache.OpenSpace(self.space)
        self.layers_of = [sum(1 for layer in self.space.layer if layer.group == g) for g in range(len(groups))]

    def numbers(self, group):
        """In one block of a group."""
        return self.layers_of[group] * self.block * self.heads * (self.dim_k + self.dim_v)

    def match(self, tokens, **more):
        return self.client.cache.Match(kvd.MatchRequest(space=self.opened.space, token=tokens, keys=True, **more))

    def data(self, n_blocks):
        """[block][group]: the raw block's bytes."""
        return [[array.array("f", (rng.gauss(0, 1) for _ in range(self.numbers(g)))).tobytes() for g in range(len(self.layers_of))]
                for _ in range(n_blocks)]

    def publish_message(self, tokens, keys, n_blocks):
        publish = kvd.Publish(space=self.opened.space, dtype="f32")
        offset = 0
        for i in range(n_blocks):
            for g in range(len(self.layers_of)):
                publish.block.add(parent=keys[i - 1] if i else self.opened.fingerprint, group=g, offset=offset,
                                  token=tokens[i * self.block:(i + 1) * self.block])
                offset += 4 * self.numbers(g)
        return publish


def tokens_of(n):
    return [rng.randrange(1000) for _ in range(n)]


def pieces(replies):
    """{(block, group): bytes} of all messages, with what is said of each piece checked."""
    whole = {}
    for reply in replies:
        for p in reply.piece:
            so_far = whole.setdefault((p.block, p.group), bytearray())
            check(p.offset == len(so_far), f"a piece of block {p.block} begins at {p.offset}, not {len(so_far)}")
            so_far += p.data
            check(len(so_far) <= p.bytes, f"block {p.block} has more than its {p.bytes} bytes")
    return {at: bytes(b) for at, b in whole.items()}


# ---- the tests ----

def test_worker_of_the_attach_socket():
    """What tests/publish_once has published through shared memory is here, bit by bit."""
    c = Client()
    layers, heads, dim, block, blocks = 2, 2, 64, 16, 4
    space = kvd.Space(model="consumer", revision="1", dtype="f32", block_tokens=block, group=[kvd.Group()],
                      layer=[kvd.Layer(n_kv_heads=heads, dim_k=dim, dim_v=dim, codec_k="raw", codec_v="raw")] * layers)
    opened = c.cache.OpenSpace(space)
    m = c.cache.Match(kvd.MatchRequest(space=opened.space, token=[i * 17 % 1000 for i in range(block * blocks)], keys=True))
    check(m.blocks == blocks and m.tokens == block * blocks and len(m.key) == blocks, f"{m.blocks} blocks")
    got = pieces([c.cache.Load(kvd.LoadRequest(prefix=m.prefix, dtype="f32"))])
    row = heads * dim
    for b in range(blocks):
        wanted = array.array("f")
        for i in range(layers):
            at = range(b * block * row, (b + 1) * block * row)
            wanted.extend((i * 1000 + j) / 7 for j in at)
            wanted.extend((j - i) / 3 for j in at)
        ours = array.array("f", got[b, 0])
        # C computes with floats what is computed with doubles here: the last bit may differ.
        check(len(ours) == len(wanted) and all(abs(x - y) <= 1e-6 * max(1, abs(y)) for x, y in zip(ours, wanted)), f"block {b}")
    shown = c.admin.Show(kvd.Show(selector=kvd.Selector(key=m.key[1])))
    encoded = c.cache.Load(kvd.LoadRequest(prefix=m.prefix, first_block=1, n_blocks=1))
    check(shown.block[0].crc32c == encoded.piece[0].crc32c and shown.block[0].leases == 1, "what Show tells of a block")
    c.close()


def test_publish_and_load():
    c = Client()
    model = Model(c, "publish", window=20)  # the second group needs the last 2 blocks only
    n = 6
    tokens, data = tokens_of(n * model.block + 5), model.data(n)
    keys = model.match(tokens).key
    check(len(keys) == n, "keys of all whole blocks")
    flat = b"".join(b"".join(groups) for groups in data)
    # The first half at once, the rest as a stream in uneven messages, the first half again in it.
    half = model.publish_message(tokens, keys, n // 2)
    reply = c.cache.Publish(kvd.PublishRequest(publish=half, data=flat[:len(flat) // 2]))
    check(list(reply.status) == [kvd.PUBLISHED] * n, f"publish: {reply}")
    check(model.match(tokens).blocks == n // 2, "half of it is there")

    def messages():
        yield kvd.PublishRequest(publish=model.publish_message(tokens, keys, n), bytes=len(flat))
        at = 0
        while at < len(flat):
            step = rng.choice((1, 63, 5000, 100000))
            yield kvd.PublishRequest(data=flat[at:at + step])
            at += step

    reply = c.cache.PublishStream(messages())
    check(list(reply.status) == [kvd.PRESENT] * n + [kvd.PUBLISHED] * n, f"stream: {reply}")
    m = model.match(tokens)
    check(m.blocks == n, f"{m.blocks} of {n} blocks")
    wanted = {(b, 0): data[b][0] for b in range(n)}
    wanted.update({(b, 1): data[b][1] for b in range(n - 2, n)})
    check(pieces([c.cache.Load(kvd.LoadRequest(prefix=m.prefix, dtype="f32"))]) == wanted, "Load gives what was published")
    check(pieces(c.cache.LoadStream(kvd.LoadRequest(prefix=m.prefix, dtype="f32"))) == wanted, "LoadStream too")
    part = kvd.LoadRequest(prefix=m.prefix, dtype="f32", first_block=3, n_blocks=2, group=[0])
    check(pieces([c.cache.Load(part)]) == {(b, 0): data[b][0] for b in (3, 4)}, "a part of it")
    f16 = pieces([c.cache.Load(kvd.LoadRequest(prefix=m.prefix, dtype="f16", n_blocks=1))])[0, 0]
    check(len(f16) == len(data[0][0]) // 2, "in another type")
    encoded = pieces([c.cache.Load(kvd.LoadRequest(prefix=m.prefix))])
    check(len(encoded[0, 0]) == model.opened.first_payload_bytes[0] and len(encoded[5, 1]) == model.opened.payload_bytes[1], "payloads")
    c.cache.Release(kvd.ReleaseRequest(prefix=m.prefix, space=model.opened.space))
    fails(CODE.NOT_FOUND, lambda: c.cache.Load(part), "no prefix")
    fails(CODE.NOT_FOUND, lambda: model.match(tokens), "not open")
    c.close()


def test_large_stream():
    """Blocks that are larger than a message, in and out; the same bytes come back."""
    c = Client()
    model = Model(c, "large", layers=24, block=256)
    n = 2
    tokens = tokens_of(n * model.block)
    one = array.array("f", (rng.gauss(0, 1) for _ in range(4099))).tobytes()
    size = 4 * model.numbers(0)
    check(size > 4 << 20, "a block is larger than a message")
    flat = (one * (n * size // len(one) + 1))[:n * size]
    keys = model.match(tokens).key

    def messages():
        yield kvd.PublishRequest(publish=model.publish_message(tokens, keys, n), bytes=len(flat), data=flat[:1 << 20])
        for at in range(1 << 20, len(flat), 1 << 20):
            yield kvd.PublishRequest(data=flat[at:at + (1 << 20)])

    check(list(c.cache.PublishStream(messages()).status) == [kvd.PUBLISHED] * n, "published")
    m = model.match(tokens)
    load = kvd.LoadRequest(prefix=m.prefix, dtype="f32")
    e = fails(CODE.RESOURCE_EXHAUSTED, lambda: c.cache.Load(load), "LoadStream")
    check(e.code == 7 and "LoadStream" in e.allowed, f"{e}")
    got = pieces(c.cache.LoadStream(load))
    check(got == {(i, 0): flat[i * size:(i + 1) * size] for i in range(n)}, "the same bytes")
    # A stream that says more than it brings, and one that brings more than it says.
    publish = model.publish_message(tokens, keys, n)
    fails(CODE.INVALID_ARGUMENT, lambda: c.cache.PublishStream(iter([kvd.PublishRequest(publish=publish, bytes=9, data=b"12345678")])), "8 of 9")
    fails(CODE.INVALID_ARGUMENT, lambda: c.cache.PublishStream(iter([kvd.PublishRequest(publish=publish, bytes=9),
                                                                     kvd.PublishRequest(data=b"1234567890")])), "were said")
    c.close()


def reference(model, raw, layer, q, n_heads, q_pos, scale, window):
    """Attention of one query token over all blocks, in doubles: o [n_heads][dim_v], lse [n_heads], share by block."""
    o, lse, mass = [], [], [0.0] * len(raw)
    ratio, floats = n_heads // model.heads, [array.array("f", b) for b in raw]
    k_size = model.block * model.heads * model.dim_k
    layer_size = k_size + model.block * model.heads * model.dim_v
    for h in range(n_heads):
        kv, scores = h // ratio, []
        for b, x in enumerate(floats):
            for t in range(model.block):
                pos = b * model.block + t
                if pos > q_pos or (window and q_pos - pos >= window):
                    continue
                k = layer * layer_size + (t * model.heads + kv) * model.dim_k
                v = layer * layer_size + k_size + (t * model.heads + kv) * model.dim_v
                s = scale * sum(q[h * model.dim_k + i] * x[k + i] for i in range(model.dim_k))
                scores.append((s, b, x[v:v + model.dim_v]))
        top = max(s for s, _, _ in scores)
        total = sum(math.exp(s - top) for s, _, _ in scores)
        lse.append(top + math.log(total))
        o.append([sum(math.exp(s - lse[-1]) * v[i] for s, _, v in scores) for i in range(model.dim_v)])
        for s, b, _ in scores:
            mass[b] += math.exp(s - lse[-1]) / n_heads
    return o, lse, mass


def test_attend():
    c = Client()
    for codec in ("raw", "default"):
        model = Model(c, "attend-" + codec, codec=codec, layers=2)
        n, heads = 4, 4
        tokens, data = tokens_of(n * model.block), model.data(n)
        keys = model.match(tokens).key
        c.cache.Publish(kvd.PublishRequest(publish=model.publish_message(tokens, keys, n), data=b"".join(b[0] for b in data)))
        m = model.match(tokens)
        raw = pieces([c.cache.Load(kvd.LoadRequest(prefix=m.prefix, dtype="f32"))])
        q = array.array("f", (rng.gauss(0, 1) for _ in range(2 * heads * model.dim_k)))
        positions, window = [n * model.block + 3, 40], 30
        for layer in (0, 1):
            a = c.cache.Attend(kvd.AttentionRequest(prefix=m.prefix, layer=layer, n_heads=heads, n_tokens=2, dtype="f32", q=q.tobytes(),
                                                 position=positions, scale=0.125, window_tokens=window, mass=True))
            o, lse, mass = array.array("f", a.o), array.array("f", a.lse), array.array("f", a.mass)
            share = [0.0] * n
            for t, pos in enumerate(positions):
                wanted = reference(model, [raw[b, 0] for b in range(n)], layer, q[t * heads * model.dim_k:], heads, pos, 0.125, window)
                for h in range(heads):
                    at = t * heads + h
                    check(abs(lse[at] - wanted[1][h]) < 1e-2, f"{codec}: lse {lse[at]} {wanted[1][h]}")
                    check(all(abs(o[at * model.dim_v + i] - wanted[0][h][i]) < 2e-2 for i in range(model.dim_v)), f"{codec}: o")
                share = [s + w / len(positions) for s, w in zip(share, wanted[2])]
            check(abs(sum(mass) - 1) < 1e-4 and all(abs(x - y) < 1e-2 for x, y in zip(mass, share)), f"{codec}: mass {mass} {share}")
    good = dict(prefix=m.prefix, layer=0, n_heads=heads, n_tokens=2, dtype="f32", q=q.tobytes(), first_position=100, scale=0.125)

    def wrong(code, text, **change):
        fails(code, lambda: c.cache.Attend(kvd.AttentionRequest(**{**good, **change})), text)

    wrong(CODE.INVALID_ARGUMENT, "layer 2 of 2", layer=2)
    wrong(CODE.INVALID_ARGUMENT, "n_heads", n_heads=3)
    wrong(CODE.INVALID_ARGUMENT, "q has", n_tokens=3)
    wrong(CODE.INVALID_ARGUMENT, "dtype", dtype="f8")
    wrong(CODE.INVALID_ARGUMENT, "scale", scale=math.inf)
    wrong(CODE.INVALID_ARGUMENT, "softcap", softcap=-1)
    wrong(CODE.INVALID_ARGUMENT, "dim_o", dim_o=16)
    wrong(CODE.INVALID_ARGUMENT, "positions", position=[1])
    wrong(CODE.INVALID_ARGUMENT, "not finite", q=array.array("f", [math.nan] * len(q)).tobytes())
    wrong(CODE.NOT_FOUND, "blocks", first_block=2, n_blocks=3)
    wrong(CODE.NOT_FOUND, "no prefix", prefix=999)
    # Nothing is seen: an empty partial.
    a = c.cache.Attend(kvd.AttentionRequest(**{**good, "first_position": 0, "first_block": 1}))
    check(all(x == -math.inf for x in array.array("f", a.lse)) and not any(array.array("f", a.o)), "an empty partial")
    c.close()


def test_attend_together():
    """Many at once, of several connections over one prefix: computed by the attention threads, each as if it were alone; some are given
    up."""
    clients = [Client() for _ in range(3)]
    models = [Model(c, "together", codec="default") for c in clients]
    n, heads, tokens = 8, 8, tokens_of(8 * Model.block)
    keys, data = models[0].match(tokens).key, models[0].data(n)
    clients[0].cache.Publish(kvd.PublishRequest(publish=models[0].publish_message(tokens, keys, n), data=b"".join(b[0] for b in data)))
    prefixes = [m.match(tokens).prefix for m in models]

    def request(prefix, q, n_tokens=1):
        return kvd.AttentionRequest(prefix=prefix, layer=1, n_heads=heads, n_tokens=n_tokens, dtype="f32", q=q, first_position=n * 16,
                                    scale=0.125)

    queries = [array.array("f", (rng.gauss(0, 1) for _ in range(heads * 64))).tobytes() for _ in range(10)]
    alone = [clients[0].cache.Attend(request(prefixes[0], q)) for q in queries]
    before = metric(clients[0], "attend_requests")
    futures = [clients[i % 3].cache.Attend.future(request(prefixes[i % 3], queries[i % 10])) for i in range(300)]
    for i, f in enumerate(futures):
        o, wanted = array.array("f", f.result(timeout=60).o), array.array("f", alone[i % 10].o)
        check(all(abs(x - y) < 1e-4 for x, y in zip(o, wanted)), f"attention {i}")
    check(metric(clients[0], "attend_requests") >= before + 300, "they went to the attention threads")
    # Large ones (their queries are copied by helpers), half of them given up at some point.
    big = b"".join(rng.choice(queries) for _ in range(200))
    futures = [clients[i % 3].cache.Attend.future(request(prefixes[i % 3], big, 200)) for i in range(60)]
    for f in futures[::2]:
        time.sleep(rng.random() / 500)
        f.cancel()
    for f in futures[1::2]:
        try:
            check(len(f.result(timeout=60).o) == 200 * heads * Model.dim_v * 4, "a large one")
        except grpc.RpcError as e:
            check(e.code() == CODE.RESOURCE_EXHAUSTED, f"{e.code()}: {e.details()}")
    for c in clients[1:]:  # while some of theirs may still be computed
        c.close()
    until(lambda: gauge(clients[0], "grpc_calls_now") == 1 and gauge(clients[0], "grpc_memory_bytes") < 1 << 16, "nothing is kept")
    clients[0].close()


def test_errors():
    c = Client()
    e = fails(CODE.NOT_FOUND, lambda: c.cache.Match(kvd.MatchRequest(space=77)), "space 77 is not open")
    check(e.code == 11 and e.allowed, "kvd.v1.Error comes along")
    fails(CODE.INVALID_ARGUMENT, lambda: c.cache.OpenSpace(kvd.Space(model="x", dtype="f99")), "allowed: f16")
    fails(CODE.NOT_FOUND, lambda: c.admin.Show(kvd.Show(selector=kvd.Selector(key=b"nothing"))))
    fails(CODE.NOT_FOUND, lambda: c.admin.List(kvd.List(what="dreams")), "blocks, spaces, workers, tenants")
    fails(CODE.INVALID_ARGUMENT, lambda: c.admin.Config(kvd.Config(name="no_such")), "no_such")
    fails(CODE.NOT_FOUND, lambda: c.health.Check(health_pb2.HealthCheckRequest(service="no.such")))
    model = Model(c, "errors")
    fails(CODE.INVALID_ARGUMENT, lambda: model.match([1] * 15 + [1000]), "token 15")
    fails(CODE.INVALID_ARGUMENT, lambda: c.cache.Match(kvd.MatchRequest(space=model.opened.space, digest=[b"12345678"])), "tokens")
    fails(CODE.INVALID_ARGUMENT, lambda: model.match([1] * 32, extra=[kvd.Extra(block=1), kvd.Extra(block=1)]), "extra 1")
    tokens = tokens_of(64)
    keys = model.match(tokens).key
    orphan = model.publish_message(tokens, keys, 4)
    del orphan.block[0]
    reply = c.cache.Publish(kvd.PublishRequest(publish=orphan, data=bytes(16 * 4 * model.numbers(0))))
    check(list(reply.status) == [kvd.FAILED] * 3 and reply.error[0].code == 12, f"no parent: {reply}")
    fails(CODE.INVALID_ARGUMENT, lambda: c.cache.Publish(kvd.PublishRequest(data=b"1")), "what is to be published")
    fails(CODE.INVALID_ARGUMENT, lambda: c.cache.PublishStream(iter([])), "without a message")
    unknown = c.channel.unary_unary("/kvd.v1.Cache/Nothing")
    fails(CODE.UNIMPLEMENTED, lambda: unknown(b""), "no such method")
    broken = c.channel.unary_unary("/kvd.v1.Cache/Match")
    fails(CODE.INVALID_ARGUMENT, lambda: broken(b"\xff\xff\xff"), "not one of this method's")
    fails(CODE.UNIMPLEMENTED, lambda: c.health.Check(health_pb2.HealthCheckRequest(service="x" * 5000), compression=grpc.Compression.Gzip))
    # The connection still works.
    check(c.health.Check(health_pb2.HealthCheckRequest()).status == 1, "serving")
    c.close()


def test_admin():
    c = Client()
    model = Model(c, "admin")
    tokens, data = tokens_of(64), model.data(4)
    keys = model.match(tokens).key
    c.cache.Publish(kvd.PublishRequest(publish=model.publish_message(tokens, keys, 4), data=b"".join(b[0] for b in data)))
    mine = kvd.Selector(model="admin")
    listed, cursor = set(), 0
    while True:  # a page may come short, or empty, with more to follow
        page = c.admin.List(kvd.List(what="blocks", selector=mine, cursor=cursor))
        listed |= {b.key for b in page.block}
        cursor = page.next
        if not cursor:
            break
    check(listed == set(keys), "the blocks are listed")
    check(any(w.name == "grpc" and w.pid == os.getpid() for w in c.admin.List(kvd.List(what="workers")).worker), "this connection is a worker")
    check(c.admin.List(kvd.List(what="spaces", selector=mine)).space[0].space.model == "admin", "the space is listed")
    check(c.admin.List(kvd.List(what="tenants")).tenant[0].name == "default", "the tenant is listed")
    check(c.admin.Verify(kvd.Verify(selector=mine)).blocks == 4, "verified")
    m = model.match(tokens)
    e = c.admin.Evict(kvd.Evict(selector=mine))
    check(e.blocks == 0 and e.kept_leased >= 1, f"what is held stays: {e}")
    check(c.admin.Pin(kvd.Pin(selector=kvd.Selector(key=keys[0]))).blocks == 1, "pinned")
    c.cache.Release(kvd.ReleaseRequest(prefix=m.prefix))
    e = c.admin.Evict(kvd.Evict(selector=mine))
    check(e.blocks == 3 and e.kept_pinned == 1, f"what is pinned stays: {e}")
    check(c.admin.Pin(kvd.Pin(selector=kvd.Selector(key=keys[0]), unpin=True)).blocks == 1, "unpinned")
    before = c.admin.Config(kvd.Config(name="stuck_timeout")).option[0].value
    check(c.admin.Config(kvd.Config(name="stuck_timeout", value="7s", set=True)).option[0].value == "7s", "set")
    c.admin.Config(kvd.Config(name="stuck_timeout", value=before, set=True))
    check(len(c.admin.Config(kvd.Config()).option) > 40, "all options")
    c.close()


def test_health_and_drain():
    c, watcher = Client(), Client()
    statuses = watcher.health.Watch(health_pb2.HealthCheckRequest(service="kvd.v1.Cache"))
    check(next(statuses).status == 1, "SERVING at once")
    check(next(watcher.health.Watch(health_pb2.HealthCheckRequest(service="no.such"))).status == 3, "SERVICE_UNKNOWN")
    c.admin.Drain(kvd.Drain())
    check(next(statuses).status == 2, "NOT_SERVING when it drains")
    check(c.health.Check(health_pb2.HealthCheckRequest()).status == 2, "Check says so too")
    check(c.health.Check(health_pb2.HealthCheckRequest(service="kvd.v1.Admin")).status == 1, "admins are served")
    fails(CODE.UNAVAILABLE, lambda: Model(c, "drained"), "no new workers")
    c.admin.Drain(kvd.Drain(undo=True))
    check(next(statuses).status == 1, "SERVING again")
    c.close()
    watcher.close()


def test_deadline_and_cancel():
    c = Client()

    def given_up():  # the client's clock runs ahead of the daemon's: it may cancel before the deadline has passed there
        return metric(c, "grpc_cancelled") + metric(c, "grpc_deadline")

    before = given_up()
    fails(CODE.DEADLINE_EXCEEDED, lambda: list(c.health.Watch(health_pb2.HealthCheckRequest(), timeout=0.2)))
    until(lambda: given_up() == before + 1, "the deadline is counted")
    watch = c.health.Watch(health_pb2.HealthCheckRequest())
    next(watch)
    watch.cancel()
    until(lambda: given_up() == before + 2, "the cancellation is counted")
    until(lambda: gauge(c, "grpc_calls_now") == 1, "nothing is held but this call")
    c.close()


def test_message_size():
    c = Client()
    limit = 4 << 20
    raw = c.channel.unary_unary("/kvd.v1.Cache/Publish")
    fit = kvd.PublishRequest(publish=kvd.Publish(space=1))
    fit.data = bytes(limit - fit.ByteSize() - 5)
    check(fit.ByteSize() == limit, f"{fit.ByteSize()} bytes")
    fails(CODE.NOT_FOUND, lambda: raw(fit.SerializeToString()), "space 1 is not open")  # it was read
    fails(CODE.RESOURCE_EXHAUSTED, lambda: raw(fit.SerializeToString() + b"\0"), "4194304")
    # A few bytes that are a great many messages: refused by the memory that they would need, not by what they say.
    bomb = kvd.PublishRequest(publish=kvd.Publish(space=1)).SerializeToString()
    bomb = b"\x0a\x83\x80\x40" + b"\x22\x00" * (1 << 19) + b"\x08\x01\x00"
    fails(CODE.INVALID_ARGUMENT, lambda: raw(bomb))
    check(gauge(c, "grpc_memory_bytes") < 1 << 16, "nothing of it is kept")
    c.close()


def test_many_calls():
    """1,000 calls at once: on one connection, and on several."""
    clients = [Client() for _ in range(5)]
    model = Model(clients[0], "many")
    tokens = tokens_of(32)
    futures = [clients[0].cache.Match.future(kvd.MatchRequest(space=model.opened.space, token=tokens)) for _ in range(1000)]
    check(all(f.result(timeout=60).blocks == 0 for f in futures), "1,000 matches on one connection")
    futures = [clients[i % 5].admin.List.future(kvd.List(what="tenants")) for i in range(1000)]
    check(all(f.result(timeout=60).tenant for f in futures), "1,000 lists on five connections")
    for c in clients:
        c.close()


def test_reader_that_never_drains():
    """It holds one message of its own; everybody else is served; after stuck_timeout it is ended."""
    c, stuck = Client(), Client()
    model = Model(stuck, "large", layers=24, block=256)
    tokens = tokens_of(2 * model.block)
    flat = bytes(2 * 4 * model.numbers(0))
    keys = model.match(tokens).key
    stream = [kvd.PublishRequest(publish=model.publish_message(tokens, keys, 2), bytes=len(flat))]
    stream += [kvd.PublishRequest(data=flat[at:at + (1 << 20)]) for at in range(0, len(flat), 1 << 20)]
    check(list(stuck.cache.PublishStream(iter(stream)).status) == [kvd.PUBLISHED] * 2, "published")
    m = model.match(tokens)
    reply = stuck.cache.LoadStream(kvd.LoadRequest(prefix=m.prefix, dtype="f32"))  # and nobody reads it
    until(lambda: gauge(c, "grpc_memory_bytes") > 1 << 19, "its message is under way")
    for _ in range(200):
        c.health.Check(health_pb2.HealthCheckRequest())
        check(gauge(c, "grpc_memory_bytes") < 2 << 20, "one message")
    before = c.admin.Config(kvd.Config(name="stuck_timeout")).option[0].value
    c.admin.Config(kvd.Config(name="stuck_timeout", value="50ms", set=True))
    until(lambda: gauge(c, "grpc_memory_bytes") < 1 << 16, "it is ended")
    c.admin.Config(kvd.Config(name="stuck_timeout", value=before, set=True))
    try:
        list(reply)
        check(False, "the stream went to its end")
    except grpc.RpcError:
        pass
    check(model.match(tokens).blocks == 2, "its connection goes on")
    stuck.close()
    c.close()


def test_reflection():
    """The services describe themselves; their files are the very ones that the stubs were made from; and every method was called above."""
    c = Client()
    Request = reflection_pb2.ServerReflectionRequest

    def ask(*requests):
        return list(c.reflection.ServerReflectionInfo(iter(requests)))

    services = [s.name for s in ask(Request(list_services=""))[0].list_services_response.service]
    check(set(services) >= {"kvd.v1.Cache", "kvd.v1.Admin", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}, services)
    methods = set()
    for service, answer in zip(services, ask(*(Request(file_containing_symbol=s) for s in services))):
        for serialized in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(serialized)
            check(any(file.package + "." + s.name == service for s in file.service), f"{file.name} has no {service}")
            methods |= {f"/{service}/{m.name}" for s in file.service if file.package + "." + s.name == service for m in s.method}
    ours = descriptor_pb2.FileDescriptorProto()
    kvd.DESCRIPTOR.CopyToProto(ours)
    answers = ask(Request(file_by_filename="kvd.proto"), Request(file_containing_symbol="kvd.v1.Space.block_tokens"),
                  Request(file_containing_symbol="kvd.v1.PUBLISHED"), Request(file_containing_symbol="kvd.v1.Space.nothing"),
                  Request(file_by_filename="nothing.proto"), Request(all_extension_numbers_of_type="kvd.v1.Space"),
                  Request(file_containing_extension=reflection_pb2.ExtensionRequest(containing_type="kvd.v1.Space")), Request())
    served = descriptor_pb2.FileDescriptorProto.FromString(answers[0].file_descriptor_response.file_descriptor_proto[0])
    check([m.name for m in served.message_type] == [m.name for m in ours.message_type], "kvd.proto")
    check(answers[1].file_descriptor_response == answers[0].file_descriptor_response, "by a field's name")
    check(answers[3].error_response.error_code == 5 and answers[4].error_response.error_code == 5, "NOT_FOUND")
    check(answers[5].all_extension_numbers_response.base_type_name == "kvd.v1.Space", "no extensions")
    check(answers[6].error_response.error_code == 5 and answers[7].error_response.error_code == 3, "wrong questions")
    v1 = c.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                 request_serializer=Request.SerializeToString,
                                 response_deserializer=reflection_pb2.ServerReflectionResponse.FromString)
    called.add("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    check(len(next(v1(iter([Request(list_services="")]))).list_services_response.service) == len(services), "v1 is the same")
    check(methods == called & methods and len(methods) >= 20, f"never called: {methods - called}")
    c.close()


def hold():
    """The other half of the next test."""
    c = Client()
    model = Model(c, "killed")
    rng.seed(5)
    tokens, data = tokens_of(64), model.data(4)
    keys = model.match(tokens).key
    c.cache.Publish(kvd.PublishRequest(publish=model.publish_message(tokens, keys, 4), data=b"".join(b[0] for b in data)))
    check(model.match(tokens).blocks == 4, "held")
    watch = c.health.Watch(health_pb2.HealthCheckRequest())
    next(watch)
    print(keys[3].hex(), flush=True)
    threading.Event().wait()


def test_killed_client():
    c = Client()
    child = subprocess.Popen([sys.executable, __file__, SOCKET, "hold"], stdout=subprocess.PIPE, text=True)
    try:
        selector = kvd.Selector(key=bytes.fromhex(child.stdout.readline().strip()))
        check(c.admin.Show(kvd.Show(selector=selector)).block[0].leases == 1, "the block is held")
        workers = len(c.admin.List(kvd.List(what="workers")).worker)
        child.send_signal(signal.SIGKILL)
        took = until(lambda: c.admin.Show(kvd.Show(selector=selector)).block[0].leases == 0, "its leases go")
        print(f"leases of a killed client were gone after {took * 1000:.0f} ms")
        until(lambda: len(c.admin.List(kvd.List(what="workers")).worker) == workers - 1, "its session goes")
        until(lambda: gauge(c, "grpc_calls_now") == 1, "its calls end")
        check(c.admin.Evict(kvd.Evict(selector=kvd.Selector(model="killed"))).blocks == 4, "its blocks can be evicted")
    finally:
        child.kill()
        child.wait()
    c.close()


def test_closed_while_uploading():
    """Connections that end while helpers copy and hash for them."""
    c = Client()
    for i in range(30):
        d = Client()
        m = Model(d, "closed")
        message = kvd.PublishRequest(publish=m.publish_message(tokens_of(m.block), [], 1), bytes=32 << 20, data=bytes(2 << 20))
        call = d.cache.PublishStream.future(iter([message] + [kvd.PublishRequest(data=bytes(2 << 20))] * 15))
        match = d.cache.Match.future(kvd.MatchRequest(space=m.opened.space, token=[i] * 100000))
        time.sleep(rng.random() * 0.04)
        d.close()
        del call, match
    until(lambda: gauge(c, "staging_bytes") == 0, "their memory goes")
    until(lambda: gauge(c, "grpc_calls_now") == 1, "their calls end")
    c.close()


def main():
    if len(sys.argv) > 2:
        hold()
    print(f"seed {SEED}")
    for name, test in list(globals().items()):
        if name.startswith("test_") and name != "test_reflection":
            test()
            print(f"{name}: good", flush=True)
    test_reflection()  # which wants all methods to have been called
    print("test_reflection: good")


main()
