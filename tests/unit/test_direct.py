"""The direct transport against the transport in process: same bits, whatever is lost, slow, hostile or waiting."""

import os
import random
import socket
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.dataplane import connection
from actors.dataplane.client import Connection, DirectTransport
from actors.dataplane.connection import Wire
from actors.dataplane.frames import HEADER, MAGIC, BadFrame, FrameLimits
from actors.dataplane.server import Combiner, DirectServer, merged
from tests.unit.adapter_folders import write_adapter
from tests.waiting import sooner_than
from trinity.checkpoint import examined
from trinity.config import OptimConfig, preset
from trinity.dispatch.transport import LocalTransport
from trinity.dispatch.view import StaticView
from trinity.errors import DeadlineExceeded, InputGone, StepConflict, TrinityError, Unavailable, VersionGone
from trinity.pool.local import local_pool
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Backward, Fetch, Forward, Load, Rows
from trinity.utils.niceness import IDLE, LowPriorityExecutor, of_this_thread

MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=16, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=3)
)
LAYER = MODEL.moe_layers[0]
LIMITS = FrameLimits(16, 8, torch.float32)
SECRET = b"s" * 32


def rows_of(num=5, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    ids_RK = torch.arange(3).expand(num, 3).contiguous()
    return Rows(torch.randn(num, 16, generator=rng).to(dtype), ids_RK, torch.rand(num, 3, generator=rng))


def forward(op="a:1", deadline_s=4e9, **options):
    return Forward(op, LAYER, 1, 0, deadline_s, rows_of(), **options)


class Served:
    """Shards of a local pool behind sockets; `pool` reaches them through a DirectTransport."""

    def __init__(self, num_shards=2):
        self.local = local_pool(MODEL, Load(seed=5), num_shards=num_shards, optim=OptimConfig(), backend="torch")
        self.shards = self.local.transport.shards
        self.servers = {}
        for name in self.shards:
            self.start(name)
        self.transport = DirectTransport(LocalTransport(self.shards), lambda s, _: self.servers[s].address, SECRET)
        self.pool = ExpertPool(StaticView(self.local.table), self.transport, timeout_s=20)

    def start(self, name):
        self.servers[name] = DirectServer(Combiner(self.shards[name]), LIMITS, SECRET, "127.0.0.1")

    def close(self):
        self.transport.close()
        for server in self.servers.values():
            server.close()


@pytest.fixture
def served():
    made = Served()
    yield made
    made.close()


def batch(num_tokens=13):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 16, generator=rng, requires_grad=True)
    ids = torch.rand(num_tokens, 8, generator=rng).topk(3).indices
    return x, ids, torch.rand(num_tokens, 3, generator=rng, requires_grad=True)


def layer_of(pool):
    x, ids, weights = batch()
    dispatcher = pool.dispatcher()
    y = sum(dispatcher(layer, x, ids, weights) for layer in MODEL.moe_layers)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, weights])]


def test_forward_and_backward_equal_the_transport_in_process(served):
    alone = local_pool(MODEL, Load(seed=5), num_shards=2, optim=OptimConfig(), backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(layer_of(served.pool), layer_of(alone), strict=True))
    for name, shard in served.shards.items():
        mine = shard.gathered.sums()
        for key, grad in alone.transport.shards[name].gathered.sums().items():
            assert torch.equal(mine[key], grad)


def test_rows_of_adapters_and_of_none_travel_together(served, tmp_path):
    """The shards are told of an adapter by who asks for it; calls that wait are one, whichever adapters they are for."""
    source = str(write_adapter(tmp_path / "adapter", MODEL, seed=0))
    content = examined(source, MODEL, None).adapter.content
    x, ids, weights = (tensor.detach() for tensor in batch())
    content_T = torch.tensor([0, content, 0, *[content] * 5, *[0] * 5])

    def layer(pool, own_T=slice(None), adapters=True):
        told = (content_T[own_T], {content: source}) if adapters else None
        with torch.no_grad():
            return pool.dispatcher().begin(LAYER, x[own_T], ids[own_T], weights[own_T], told).result()

    alone = local_pool(MODEL, Load(seed=5), num_shards=2, optim=OptimConfig(), backend="torch")
    want = layer(alone)
    assert torch.equal(layer(served.pool), want)
    for has_one in (True, False):
        own_T = (content_T != 0) == has_one
        assert torch.equal(layer(served.pool, own_T), want[own_T])
        assert torch.equal(layer(served.pool, own_T, adapters=False), want[own_T]) is not has_one
    calls = [
        replace(forward(), rows=replace(rows_of(), adapter_R=own)) for own in (None, content_T[:5], content_T[5:10])
    ]
    shard = served.shards["shard-0"]
    assert torch.equal(shard.infer(merged(calls)), torch.cat([shard.infer(call) for call in calls]))


def test_tcp_carries_the_same(served, monkeypatch):
    want = layer_of(local_pool(MODEL, Load(seed=5), num_shards=2, optim=OptimConfig(), backend="torch"))
    monkeypatch.setattr("actors.dataplane.client.machine_id", lambda: "elsewhere")
    assert all(torch.equal(a, b) for a, b in zip(layer_of(served.pool), want, strict=True))
    families = {c.wire.sock.family for c in served.transport._connections.values()}
    assert families == {socket.AF_INET}


def test_a_shard_that_moves_is_found_again_and_ops_are_applied_once(served):
    want = layer_of(served.pool)
    served.servers["shard-1"].close()
    served.start("shard-1")
    served.transport._connections["shard-1"].wire.close()
    assert all(torch.equal(a, b) for a, b in zip(layer_of(served.pool), want, strict=True))
    assert served.pool.prepare(1, served_count(served)) is not None


def test_a_newer_epoch_leads_away_from_an_old_process_that_answers(served):
    """It is cut off from who knows that the shard has started again elsewhere, and not from its caller."""

    def connection(epoch):
        served.transport.send("shard-0", "infer", replace(forward("a:1"), epoch=epoch)).result()
        return served.transport._connections["shard-0"]

    old, first = served.servers["shard-0"], connection(epoch=1)
    assert connection(epoch=2) is first, "it is where it was"
    served.start("shard-0")
    assert connection(epoch=2) is first, "nobody has said so"
    assert connection(epoch=3) is not first
    old.close()


def test_who_knows_may_be_late_to_say_so(served):
    """The old process answers meanwhile, and is left as soon as it is said."""

    def late(shard, deadline_s):
        raise DeadlineExceeded("not yet")

    def connection(epoch):
        served.transport.send("shard-0", "infer", replace(forward("a:1"), epoch=epoch)).result()
        return served.transport._connections["shard-0"]

    old, first, locate = served.servers["shard-0"], connection(epoch=1), served.transport.locate
    served.start("shard-0")
    served.transport.locate = late
    assert [connection(epoch=2) for _ in range(3)] == [first] * 3
    served.transport.locate = locate
    assert connection(epoch=2) is not first
    old.close()


def served_count(served):
    from collections import Counter

    return Counter({name: shard.gathered.num_ops for name, shard in served.shards.items()})


def test_requests_may_be_sent_ahead_and_answers_taken_in_any_order(served):
    connection = Connection(served.servers["shard-0"].address, SECRET, time.monotonic() + 60)
    calls = [replace(forward(f"a:{i}"), rows=rows_of(i + 1, seed=i)) for i in range(6)]
    numbers = [connection.send(call) for call in calls]
    order = random.Random(0).sample(range(6), 6)
    for i in order:
        got = connection.take(numbers[i], time.monotonic() + 60)
        assert torch.equal(got, served.shards["shard-0"].infer(calls[i]))


def test_large_rows_both_ways_do_not_block_each_other(served):
    connection = Connection(served.servers["shard-0"].address, SECRET, time.monotonic() + 60)
    big = replace(forward(), rows=rows_of(40_000))
    numbers = [connection.send(replace(big, op_id=f"big:{i}")) for i in range(4)]
    shapes = {connection.take(n, time.monotonic() + 60).shape for n in numbers}
    assert shapes == {(40_000, 16)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (replace(forward(), version=3), StepConflict, "the caller wants 3"),
        (forward(deadline_s=time.monotonic() - 5), DeadlineExceeded, "did not answer in time|deadline passed"),
        (Backward("x:1", LAYER, 1, 0, 4e9, torch.zeros(1, 16)), InputGone, "send the rows again"),
        (replace(forward(), rows=replace(rows_of(), x_RD=torch.zeros(5, 8))), BadFrame, "rows have 8 columns"),
        (replace(forward(), rows=rows_of(dtype=torch.bfloat16)), BadFrame, "rows are torch.bfloat16"),
        (replace(forward(), rows=replace(rows_of(), ids_RK=torch.full((5, 3), 8))), BadFrame, "expert 8 is outside"),
        (replace(forward(), rows=replace(rows_of(), ids_RK=torch.full((5, 3), -2))), BadFrame, "expert -2 is outside"),
    ],
)
def test_refusals_are_typed_and_the_next_call_is_fine(served, call, error, message):
    verb = "infer" if isinstance(call, Forward) else "backward"
    with pytest.raises(error, match=message):
        served.transport.send("shard-0", verb, call).result()
    got = served.transport.send("shard-0", "infer", forward()).result()
    assert torch.equal(got, served.shards["shard-0"].infer(forward()))


def test_a_bug_in_a_shard_is_an_error_for_its_caller_only(served):
    shard = served.shards["shard-0"]
    infer, shard.infer = shard.infer, lambda call: 1 / 0
    with pytest.raises(TrinityError, match="failed with ZeroDivisionError"):
        served.transport.send("shard-0", "infer", forward()).result()
    shard.infer = infer
    assert served.transport.send("shard-0", "infer", forward()).result().shape == (5, 16)


def test_a_wrong_secret_is_refused_by_name(served):
    served.transport.secret = b"x" * 32
    with pytest.raises(BadFrame, match="secret is wrong"):
        served.transport.send("shard-0", "infer", forward()).result()


def test_nobody_waits_past_the_deadline(served):
    late = pytest.raises(DeadlineExceeded, match="shard-0 did not answer in time")
    with served.servers["shard-0"].combiner.inference.lock, sooner_than(30), late:
        served.transport.send("shard-0", "infer", forward(deadline_s=time.monotonic() + 0.3)).result()
    assert served.transport.send("shard-0", "infer", forward()).result().shape == (5, 16)


def test_a_shard_that_is_gone_is_unavailable(served):
    served.servers["shard-0"].close()
    with pytest.raises(Unavailable, match="cannot be reached"):
        served.transport.send("shard-0", "infer", forward()).result()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_never_hurt_a_shard(served_once, noise, with_head):
    """Before the handshake and after it, with and without a header that looks right."""
    address = served_once.servers["shard-0"].address
    with socket.create_connection((address.host, address.port), timeout=60) as sock:
        sock.sendall(noise)
    connection = Connection(address, SECRET, time.monotonic() + 60)
    head = MAGIC + noise.ljust(HEADER.size, b"\0")[: HEADER.size - 4] if with_head else noise
    connection.wire.sock.setblocking(True)
    connection.wire.sock.sendall(head)
    connection.wire.close()
    assert served_once.transport.send("shard-0", "infer", forward()).result().shape == (5, 16)


@pytest.fixture(scope="module")
def served_once():
    made = Served()
    yield made
    made.close()


def test_waiting_inference_is_merged_and_does_not_wait_for_training(served):
    server, shard = served.servers["shard-0"], served.shards["shard-0"]
    queue, order, infer = server.combiner.inference, [], shard.infer

    def seen(call):
        order.append((call.op_id.split(":")[0], len(call.rows.x_RD)))
        return infer(call)

    shard.infer = seen
    answers = {}

    def ask(op):
        connection = Connection(server.address, SECRET, time.monotonic() + 60)
        call = forward(op, keep=op.startswith("train"))
        answers[op] = connection.take(connection.send(call), time.monotonic() + 60)

    threads = [threading.Thread(target=ask, args=(op,)) for op in ("train:1", "a:1", "b:1", "c:1")]
    with server.combiner.others.lock:
        with queue.lock:
            for thread in threads:
                thread.start()
            give_up_s = time.monotonic() + 60
            while len(queue._waiting) < 3 and time.monotonic() < give_up_s:
                time.sleep(0.005)
            assert len(queue._waiting) == 3
        for thread in threads[1:]:
            thread.join()
        assert [rows for _, rows in order] == [15]
    threads[0].join()
    assert order[1:] == [("train", 5)]
    assert queue.num_merged == 3
    want = infer(forward())
    assert all(torch.allclose(value, want, atol=1e-6) for value in answers.values())


def test_inference_goes_on_while_the_shard_computes_for_training(served):
    """And memory is not written to again while somebody reads it."""
    shard = served.shards["shard-0"]
    want = shard.infer(forward())
    inside, go_on = threading.Event(), threading.Event()
    backend = shard.backend

    def slow(*given):
        inside.set()
        go_on.wait(10)
        return backend(*given)

    with shard.lock:  # as training has it
        got = []
        thread = threading.Thread(target=lambda: got.append(shard.infer(forward())))
        thread.start()
        thread.join(10)
        assert torch.equal(got[0], want)
    shard.backend = slow
    reader = threading.Thread(target=lambda: got.append(shard.infer(forward())))
    reader.start()
    assert inside.wait(10)
    leaving = threading.Thread(target=shard.versions.withdraw, args=([0],))
    leaving.start()
    leaving.join(0.1)
    assert leaving.is_alive(), "it waits for the reader"
    go_on.set()
    leaving.join(10)
    reader.join(10)
    assert torch.equal(got[1], want)
    with pytest.raises(VersionGone):
        shard.infer(forward())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness belongs to processes")
def test_training_gives_way_and_inference_does_not():
    class Shard:
        infer = backward = fetch = lambda self, call: of_this_thread()

    combiner, usual = Combiner(Shard(), LowPriorityExecutor(IDLE)), of_this_thread()
    backward, fetch = Backward("a:1", LAYER, 1, 0, 4e9, torch.zeros(5, 16)), Fetch(LAYER, 0, 1, 4e9)
    assert combiner.run(forward()) == usual
    assert [combiner.run(call) for call in (forward(keep=True), backward, fetch)] == [(os.SCHED_IDLE, 19)] * 3
    assert Combiner(Shard()).run(backward) == usual


def test_merged_rows_are_those_of_each():
    calls = [replace(forward(), rows=rows_of(n, seed=n)) for n in (2, 4, 1)]
    both = merged(calls).rows
    assert both.x_RD.shape == (7, 16)
    assert torch.equal(both.ids_RK, torch.cat([c.rows.ids_RK for c in calls]))
    assert torch.equal(both.weights_RK, torch.cat([c.rows.weights_RK for c in calls]))


def test_connections_to_shards_that_have_gone_are_closed_when_others_come(served):
    """Names of shards are never used twice: nobody would ask the old ones again."""
    layer_of(served.pool)
    transport = served.transport
    gone, other = (transport._connections[name] for name in ("shard-0", "shard-1"))
    assert not gone.is_dead
    gone.wire.sock.shutdown(socket.SHUT_RDWR)  # as if its process had ended
    transport.drop("shard-1", other)
    transport._connection("shard-1", forward())
    assert list(transport._connections) == ["shard-1"]
    assert gone.wire.sock.fileno() == -1


def test_a_send_ends_with_its_deadline_though_the_peer_takes_a_little_now_and_then():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        peer, _ = listener.accept()
        stop = threading.Event()

        def sip():
            while not stop.wait(0.01):
                peer.recv(1 << 16)

        thread = threading.Thread(target=sip)
        thread.start()
        with peer, pytest.raises(DeadlineExceeded), sooner_than(10):
            Wire(sock).send(bytes(64), [torch.zeros(64 << 20)], time.monotonic() + 0.5)  # all of it would take 40 s
        stop.set()
        thread.join()


def test_a_peer_that_takes_nothing_is_not_silent(monkeypatch):
    """Its kernel answers, though it is asked ever less often whether there is room."""
    monkeypatch.setattr(connection, "SILENCE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        peer, _ = listener.accept()
        with peer, pytest.raises(DeadlineExceeded):
            Wire(sock).send(bytes(64), [torch.zeros(16 << 20)], time.monotonic() + 3.4)


@pytest.mark.parametrize(("early_s", "kind"), [(0.001, DeadlineExceeded), (0.0, DeadlineExceeded), (0.6, Unavailable)])
def test_a_little_before_the_deadline_is_at_it(early_s, kind):
    """Who says where a shard is may give up a millisecond early, which is no reason to try again."""

    def locate(shard, deadline_s):
        time.sleep(max(0.0, deadline_s - early_s - time.monotonic()))
        raise DeadlineExceeded("it does not say")

    with pytest.raises(kind):
        DirectTransport(None, locate, SECRET).send("a", "infer", forward(deadline_s=time.monotonic() + 0.7)).result()
