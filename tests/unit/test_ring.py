"""Inference in C++, through rings and over TCP, against the same in Python: same bits, same errors, whoever dies, stops or
writes nonsense."""

import itertools
import mmap
import os
import random
import signal
import socket
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from actors.dataplane import ring
from actors.dataplane.client import DirectTransport
from actors.dataplane.frames import BadFrame, FrameLimits
from actors.dataplane.server import Combiner, DirectServer
from tests.waiting import sooner_than
from trinity import native
from trinity.bench import dispatch as bench
from trinity.bench import echo, process
from trinity.config import OptimConfig, preset
from trinity.dispatch.dispatcher import Dispatcher
from trinity.dispatch.near import NearExchange
from trinity.dispatch.transport import LocalTransport
from trinity.errors import DeadlineExceeded, StepConflict, TrinityError, Unavailable, VersionGone
from trinity.experts import native_experts
from trinity.placement.table import PlacementTable
from trinity.pool.local import local_pool
from trinity.rpc.messages import Commit, Fetch, Forward, Install, Load, Prepare, PruneTo, Rows, Stage, Status

pytestmark = pytest.mark.skipif(not ring.is_possible(), reason="the extension is not built, or switched off")

MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=3)
)
LAYER, OTHER = MODEL.moe_layers[:2]
SECRET = b"s" * 32
ALL = tuple(range(8))


@pytest.fixture
def far(monkeypatch):
    """Callers take each shard's host for another: they go over TCP."""
    monkeypatch.setattr("actors.dataplane.client.machine_id", lambda: "elsewhere")


@pytest.fixture(params=["ring", "tcp"])
def either(request):
    """Both ways, one after the other."""
    if request.param == "tcp":
        request.getfixturevalue("far")


class Served:
    """Shards of a pool in this process, behind sockets and rings; `alone` reaches the same shards without either."""

    def __init__(self, num_shards=2, table=None, dtype=torch.float32, form=None):
        model = MODEL.model_copy(update=dict(dtype=str(dtype)[6:]))
        self.limits, self.local_model = FrameLimits(16, 8, dtype), model
        self.local = local_pool(
            model, Load(seed=5), num_shards=num_shards, optim=OptimConfig(), backend="torch", expert_dtype=form
        )
        self.shards = self.local.transport.shards
        self.table = self.local.table if table is None else table
        self.servers = {name: self._server(shard) for name, shard in self.shards.items()}
        self.transport = DirectTransport(LocalTransport(self.shards), lambda s, _: self.servers[s].address, SECRET)
        self.alone = Dispatcher(self.table, LocalTransport(self.shards), timeout_s=20)

    def _server(self, shard):
        service = shard.compute_natively().service
        return DirectServer(Combiner(shard), self.limits, SECRET, "127.0.0.1", service=service)

    def dispatcher(self, table=None, **options):
        return Dispatcher(table or self.table, self.transport, timeout_s=20, **options)

    def close(self):
        self.transport.close()
        for server in self.servers.values():
            server.close()


@contextmanager
def served(*arguments):
    made = Served(*arguments)
    yield made
    made.close()


def batch(num_tokens=13, seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, 8, generator=rng).topk(3).indices
    return torch.randn(num_tokens, 16, generator=rng), ids, torch.rand(num_tokens, 3, generator=rng)


def near(dispatcher, *call):
    """Its answer, which must have come through rings; the first call makes them."""
    for _ in range(4):
        sent = dispatcher.begin(*call)
        y_TD = sent.result()
        if isinstance(sent, NearExchange):
            return y_TD
    raise AssertionError("no ring")


def replicated_table():
    """Every expert of both layers on both shards, but for one that is on the second alone."""
    replicas = tuple(tuple((1,) if e == 5 else (0, 1) for e in ALL) for _ in MODEL.moe_layers)
    return PlacementTable(1, ("shard-0", "shard-1"), tuple(MODEL.moe_layers), replicas)


def held_by_all(world, model=MODEL):
    """Have each shard hold every expert, with the same weights."""
    source = local_pool(model, Load(seed=5), optim=OptimConfig(), backend="torch").transport.shards["shard-0"]
    for shard in world.shards.values():
        for layer in MODEL.moe_layers:
            kinds = shard.weights.kinds(0)
            rows = {kind: tuple(source.fetch(Fetch(layer, e, 0, 4e9, kind)) for e in ALL) for kind in kinds}
            shard.install(Install(layer, ALL, 0, rows, epoch=1))


@pytest.mark.parametrize(
    ("num_shards", "dtype", "form"),
    [
        *itertools.product((1, 2, 3), (torch.float32, torch.bfloat16), (None,)),
        *((2, torch.float32, "int8"), (1, torch.bfloat16, "int8"), (2, torch.float32, "bfloat16")),
        *(
            (2, torch.float32, "fp8"),
            (1, torch.bfloat16, "fp8"),
            (1, torch.float32, "nvfp4"),
            (2, torch.bfloat16, "nvfp4"),
        ),
    ],
)
def test_the_bits_are_those_of_python(num_shards, dtype, form, monkeypatch):
    check_bits(num_shards, dtype, form, monkeypatch)


@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")])
def test_the_bits_over_tcp_are_those_of_python(far, dtype, form, monkeypatch):
    check_bits(2, dtype, form, monkeypatch)


def check_bits(num_shards, dtype, form, monkeypatch):
    with served(num_shards, None, dtype, form) as world, torch.inference_mode():
        monkeypatch.setattr(native_experts, "infer", lambda *_: None)  # the others' only
        dispatcher = world.dispatcher()
        for seed, num_tokens in enumerate((13, 1, 2, 70, 200)):
            x, ids, weights = batch(num_tokens, seed)
            x = x.to(dtype)
            if num_tokens > 2:
                ids[1, 2] = ids[2] = -1  # slots of nobody; a token of nobody
            for layer in (LAYER, OTHER):
                want = world.alone(layer, x, ids, weights)
                assert torch.equal(near(dispatcher, layer, x, ids, weights), want)
        for shard in world.shards.values():
            shard.status(Status(reset_counts=True))
        near(dispatcher, LAYER, batch()[0].to(dtype), *batch()[1:])
        counted = {}
        for shard in world.shards.values():
            counted |= shard.status(Status(reset_counts=True)).rows[LAYER]
        assert [counted[e] for e in ALL] == batch()[1].flatten().bincount(minlength=8).tolist()
        assert dispatcher.num_retries == 0


def test_calls_may_be_begun_ahead_and_what_is_not_wanted_is_let_go(either):
    with served() as world, torch.inference_mode():
        dispatcher = world.dispatcher()
        near(dispatcher, LAYER, *batch())
        for _ in range(3):
            sent = [dispatcher.begin(LAYER, *batch(5, seed)) for seed in range(6)]  # more than there are slots
            assert [type(each) is NearExchange for each in sent] == [True] * 4 + [False] * 2
            del sent[1]
            for seed, each in zip((0, 2, 3, 4, 5), sent, strict=True):
                assert torch.equal(each.result(), world.alone(LAYER, *batch(5, seed)))


def test_a_gradient_or_another_type_goes_the_usual_way():
    with served() as world:
        dispatcher, (x, ids, weights) = world.dispatcher(), batch()
        with torch.no_grad():
            near(dispatcher, LAYER, x, ids, weights)
            assert not isinstance(dispatcher.begin(LAYER, x, ids, weights.double()), NearExchange)
            assert isinstance(dispatcher.begin(LAYER, x, ids, weights), NearExchange)
        assert not isinstance(dispatcher.begin(LAYER, x.requires_grad_(), ids, weights), NearExchange)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_take_the_turns_that_they_take_in_python(dtype):
    with served(2, replicated_table(), dtype) as world, torch.inference_mode():
        held_by_all(world, world.local_model)
        dispatcher = world.dispatcher(attempt_s=1e6)
        for seed in range(3):
            x, ids, weights = batch(40, seed)
            call = LAYER, x.to(dtype), ids, weights
            assert torch.equal(near(dispatcher, *call), world.alone(*call))
        assert dispatcher.patience.of("shard-1", 40) < 1e6, "what is usual is learnt"
        for shard in world.shards.values():
            assert sum(shard.status(Status(True)).rows[LAYER].values()) > 40


@pytest.mark.parametrize("form", [None, "int8"])
def test_versions_are_those_that_python_computes(either, form):
    """A step is committed: callers of either version get its bits, and of one that is gone the error that names it."""
    with served(1, None, torch.float32, form) as world:
        shard, (x, ids, weights) = world.shards["shard-0"], batch()
        with torch.inference_mode():
            found = [near(world.dispatcher(), LAYER, x, ids, weights)]
        lrs = dict.fromkeys(("matrices", "others", "muon", "adamw", "expert"), 0.1)
        for step in (1, 2):
            shard.prepare(Prepare(step))
            shard.stage(Stage(step, lrs, 1.0))
            shard.commit(Commit(step))
        with torch.inference_mode():
            for version in (1, 2):
                found.append(near(world.dispatcher(version=version), LAYER, x, ids, weights))
                world.alone.use(version)
                assert torch.equal(found[-1], world.alone(LAYER, x, ids, weights))
                assert not torch.equal(found[-1], found[-2]), "weights decay"
            for version, error in ((0, VersionGone), (3, StepConflict)):
                with pytest.raises(error):
                    world.dispatcher(version=version)(LAYER, x, ids, weights)


@pytest.mark.parametrize("form", [None, "int8"])
def test_experts_that_leave_are_not_computed_any_more(either, form):
    with served(1, None, torch.float32, form) as world, torch.inference_mode():
        shard, call = world.shards["shard-0"], (LAYER, *batch(5))
        dispatcher = world.dispatcher()
        want = near(dispatcher, *call)
        shard.prune_to(PruneTo(dict.fromkeys(MODEL.moe_layers, ALL[:4]), 2))
        few = batch(5)[0], batch(5)[1] % 4, batch(5)[2]
        assert torch.equal(near(dispatcher, LAYER, *few), world.alone(LAYER, *few))
        again = local_pool(MODEL, Load(seed=5), optim=OptimConfig(), backend="torch", expert_dtype=form)
        source = again.transport.shards["shard-0"]
        kinds = {kind: (source.fetch(Fetch(LAYER, 6, 0, 4e9, kind)),) for kind in shard.weights.kinds(0)}
        shard.install(Install(LAYER, (6,), 0, kinds, epoch=3))  # one comes back
        few[1][few[1] == 1] = 6
        assert torch.equal(near(dispatcher, LAYER, *few), source.infer(Forward("", LAYER, 0, 0, 4e9, Rows(*few))))
        dispatcher.timeout_s = 0.2
        with pytest.raises(TrinityError, match="does not hold expert"):
            dispatcher(*call)
        assert want.shape == (5, 16)


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)  # until every thread of it stands


def test_a_shard_that_stops_or_dies_is_told_by_the_deadline(monkeypatch):
    """SIGSTOP inside a native wait, and before there is a ring, then SIGCONT, then SIGKILL: an error each time, and the right
    rows between; through a ring, and over TCP."""
    monkeypatch.setattr("actors.dataplane.client.HANDSHAKE_S", 1e6)  # not what ends a wait
    secret = "5e" * 32
    with ExitStack() as stack, torch.inference_mode():
        [child] = stack.enter_context(process.children([{"role": "echo", "dim": 16, "secret": secret}]))
        here, call = echo.Address(**child.hear()), (echo.LAYER, *echo.batch(16, 16))
        addresses = here, replace(here, machine="elsewhere")
        *ways, other = (echo.dispatcher_of(bench._direct([at], secret, stack), 1) for at in (*addresses, here))
        for each in ways:
            assert torch.equal(near(each, *call), call[1])
        assert torch.equal(other(*call), call[1])  # connected; the next call would ask for a ring
        stop(child.process.pid)
        for each in (*[ways[0]] * 5, *[ways[1]] * 2, other):  # more than there are slots
            each.timeout_s = 0.2
            with sooner_than(30), pytest.raises((DeadlineExceeded, Unavailable), match="shard-0"):
                each(*call)
        os.kill(child.process.pid, signal.SIGCONT)
        for each in ways:
            each.timeout_s = 30
            assert torch.equal(near(each, *call), call[1])
        sent = [each.begin(*call) for each in ways]
        stop(child.process.pid)
        sent = [*sent, *(each.begin(*call) for each in ways)]
        os.kill(child.process.pid, signal.SIGKILL)
        for each, away in zip(ways, sent[2:], strict=True):
            each.timeout_s = 0.2
            away._asked = (*away._asked[:-1], each.deadline())
            with sooner_than(30), pytest.raises((Unavailable, DeadlineExceeded), match="shard-0"):
                away.result()


def made_ring(num_bytes=None, seals=True):
    fd = os.memfd_create("t", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, native.lib.ring_bytes() if num_bytes is None else num_bytes)
    if seals:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def test_random_bytes_in_a_ring_never_hurt_a_shard():
    """The long one is native/tests/ring_fuzz_test.cpp; this writes over all of a served ring's words."""
    with served(1) as world, torch.inference_mode():
        ours, theirs = socket.socketpair()
        fd, rng = made_ring(), random.Random(0)
        assert native.lib.ring_open(fd, ours.fileno()) is not None
        attachment = native.lib.ring_attach(world.shards["shard-0"].native.service, fd)
        with mmap.mmap(fd, native.lib.ring_bytes()) as memory:
            for i in range(3000):
                at = rng.randrange(64, 2048)
                memory[at : at + 8] = rng.choice((rng.randbytes(8), bytes(8), rng.randrange(64).to_bytes(8, "little")))
                if i % 3 == 0:
                    memory[4096:4608] = rng.randbytes(512)
        native.lib.ring_detach(attachment)
        assert torch.equal(near(world.dispatcher(), LAYER, *batch()), world.alone(LAYER, *batch()))
        for each in (ours, theirs):
            each.close()
        os.close(fd)


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(num_bytes=4096), "a ring is"), (dict(seals=False), "could shrink"), ({}, "laid out as")],
)
def test_memory_that_is_no_ring_is_refused(options, message):
    with served(1) as world:
        fd = made_ring(**options)
        with pytest.raises(BadFrame, match=message):
            ring._attached(world.shards["shard-0"].native.service, fd)
        os.close(fd)


def test_a_shard_that_has_no_extension_is_asked_over_the_socket():
    with served(1) as world, torch.inference_mode():
        world.servers["shard-0"].service = None
        dispatcher = world.dispatcher()
        for _ in range(3):
            sent = dispatcher.begin(LAYER, *batch())
            assert not isinstance(sent, NearExchange)
            assert torch.equal(sent.result(), world.alone(LAYER, *batch()))


def test_a_shard_far_away_that_has_no_extension_answers_the_same_frames(far):
    """And a caller without it gets the answers of a shard that has it."""
    with served(1) as world, torch.inference_mode():
        want, server = world.alone(LAYER, *batch()), world.servers["shard-0"]
        for service in (None, server.service):
            server.service = service
            dispatcher = world.dispatcher()
            assert torch.equal(near(dispatcher, LAYER, *batch()), want)
            dispatcher._near_layers = None
            assert torch.equal(dispatcher(LAYER, *batch()), want)
            world.transport.close()


def test_a_connection_that_broke_is_made_anew(far):
    with served(1) as world, torch.inference_mode():
        dispatcher, want = world.dispatcher(), world.alone(LAYER, *batch())
        near(dispatcher, LAYER, *batch())
        native.lib.ring_close(world.transport._connections["shard-0"].wire.ring)
        sent = dispatcher.begin(LAYER, *batch())
        assert not isinstance(sent, NearExchange)
        assert torch.equal(sent.result(), want)
        assert torch.equal(near(dispatcher, LAYER, *batch()), want)


def test_training_through_the_same_connections_leaves_the_same_gradients():
    alone = local_pool(MODEL, Load(seed=5), num_shards=2, optim=OptimConfig(), backend="torch")
    with served() as world:
        for dispatcher in (world.dispatcher(), alone.dispatcher()):
            x, ids, weights = batch()
            y = dispatcher(LAYER, x.requires_grad_(), ids, weights)
            with torch.no_grad():
                dispatcher(LAYER, x, ids, weights)
            y.square().sum().backward()
        for name, shard in world.shards.items():
            mine, theirs = shard.gathered.sums(), alone.transport.shards[name].gathered.sums()
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
