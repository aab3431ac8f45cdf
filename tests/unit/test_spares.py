"""New shards start beside all else: no step and no look waits for Ray to have room for one."""

from types import SimpleNamespace

import pytest

from actors.control import reconciler, shards, spares
from actors.control.reconciler import Reconciler
from actors.control.state import PoolSpec, PoolState
from trinity.config import OptimConfig, PlacementConfig, preset
from trinity.errors import Unavailable
from trinity.placement.table import PlacementTable

MODEL = preset("tiny")
TABLE = PlacementTable.spread(MODEL.moe_layers, MODEL.num_experts, ("shard-0", "shard-1"))


class Ray:
    """Ray that starts a shard when it is told that there is room. It is its own clock."""

    def __init__(self):
        self.started, self.there, self.ended, self.now_s = [], set(), [], 100.0

    def start_shard(self, spec, *others):
        self.started.append(spec.name)
        return SimpleNamespace(name=spec.name, where=SimpleNamespace(remote=lambda: spec.name))

    def wait(self, refs, timeout):
        return [ref for ref in refs if ref in self.there], None

    def kill(self, handle):
        self.ended.append(handle.name)

    def monotonic(self):
        return self.now_s


@pytest.fixture
def ray(monkeypatch):
    ray = Ray()
    for module in (spares, reconciler):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=ray.monotonic, time=ray.monotonic))
    for module in (spares, shards):
        monkeypatch.setattr(module, "ray", ray)
    monkeypatch.setattr(spares, "ask", lambda ref, timeout_s, who: ref)
    monkeypatch.setattr(shards, "start_shard", ray.start_shard)
    for name in ("draining_nodes", "roomy_nodes"):
        monkeypatch.setattr(reconciler, name, lambda *of: frozenset())
    for name in ("ask", "tidy", "drop_leftovers"):
        monkeypatch.setattr(shards.Shards, name, lambda self, *what: 0)
    monkeypatch.setattr(reconciler.Watch, "look", lambda *what: None)
    return ray


@pytest.fixture
def pool(ray, tmp_path):
    settings = PlacementConfig(num_shards=2, ready_timeout_s=60)
    spec = PoolSpec(MODEL, OptimConfig(), 2, "cpu", (1 << 20,))
    state = PoolState(tmp_path, spec, settings, "any", is_again=False)
    state.publish(TABLE)
    return Reconciler(state, None)


def more(desired, table):
    return desired.with_shards(3, table)


def phases(pool):
    return [view.phase for view in pool.history.views]


def test_steps_go_on_until_the_new_shard_is_there(ray, pool):
    pool.request("more", more)
    for step in range(3):
        assert pool.begin_attempt(step, step) == TABLE.epoch
        ray.now_s += 1
    assert ray.started == ["shard-2"], "once"
    assert phases(pool) == ["start"]
    ray.there.add("shard-2")
    assert pool.begin_attempt(3, 3) == TABLE.epoch + 1
    assert pool.state.table.shards == ("shard-0", "shard-1", "shard-2")
    assert phases(pool) == ["done"]
    assert pool.shards.spares.names == ()


def test_what_finds_no_room_is_given_up_and_tried_again_under_another_name(ray, pool):
    pool.request("more", more)
    pool.begin_attempt(0, 0)
    ray.now_s += 61
    assert pool.begin_attempt(1, 1) == TABLE.epoch
    assert phases(pool) == ["rolled back"]
    assert ray.ended == ["shard-2"]
    ray.now_s += reconciler.AGAIN_S
    ray.there.add("shard-3")
    assert pool.begin_attempt(2, 2) == TABLE.epoch + 1
    assert pool.state.table.shards == ("shard-0", "shard-1", "shard-3")


def test_what_is_wanted_no_more_is_ended(ray, pool):
    pool.request("more", more)
    pool.begin_attempt(0, 0)
    pool.request("less", lambda desired, table: desired.with_shards(2, table))
    ray.now_s += 1
    assert pool.begin_attempt(1, 1) == TABLE.epoch
    assert ray.ended == ["shard-2"]
    assert phases(pool) == ["rolled back"]


def test_a_change_that_fails_is_tried_again_later_with_another_shard(ray, pool, monkeypatch):
    pool.request("more", more)
    ray.there |= {"shard-2", "shard-3"}

    def away(*what):
        raise Unavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(shards.Shards, "drop_leftovers", away)
        pool.begin_attempt(0, 0)
    epoch = pool.state.epoch
    assert phases(pool) == ["rolled back"]
    assert pool.begin_attempt(1, 1) == epoch, "not at once"
    ray.now_s += reconciler.AGAIN_S + 1
    assert pool.begin_attempt(2, 2) == epoch + 1
    assert pool.state.table.shards == ("shard-0", "shard-1", "shard-3")


def test_one_that_can_never_start_is_said(ray, monkeypatch):
    def never(ref, timeout_s, who):
        raise Unavailable(f"{who} is away")

    monkeypatch.setattr(spares, "ask", never)
    starting = spares.Spares(SimpleNamespace(start=lambda name, node: ray.start_shard(SimpleNamespace(name=name))), 60)
    starting.start(["shard-7"], "a node")
    assert (starting.names, starting.nodes) == (("shard-7",), {"a node"})
    assert not starting.are_there(["shard-7"])
    ray.there.add("shard-7")
    with pytest.raises(Unavailable, match="the new shard shard-7 is away"):
        starting.are_there(["shard-7"])
