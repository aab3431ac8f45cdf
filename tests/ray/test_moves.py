"""Experts move, replicate and die while rows arrive: no caller sees an error, and every answer is the monolith's."""

import os
import signal
import threading
import time
import uuid

import pytest
import torch

from tests import waiting
from trinity.config import PlacementConfig, preset
from trinity.errors import ConfigError
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load

MODEL = preset("tiny").model_copy(update=dict(hidden_size=32, moe_intermediate_size=16, num_experts=6))
SOURCE = Load(seed=3, training=False)
WAIT_S = 90.0
CALL_TIMEOUT_S = 30.0
PACE_S = 0.003  # between two calls: what is waited for, a shard that starts, needs the cores more than they do


@pytest.fixture(scope="module")
def settings():
    return settings_of()


def settings_of():
    return PlacementConfig(
        pool=f"m-{uuid.uuid4().hex[:8]}",
        num_shards=2,
        call_timeout_s=CALL_TIMEOUT_S,
        watch_every_s=0.2,
        drain_s=0.1,
        balance_every_s=0,
        attempt_timeout_s=2,
    )


@pytest.fixture(scope="module")
def pool(ray_session, settings, tmp_path_factory):
    """Two shards until they come and go, then one and up; with whatever replicas the tests before left."""
    from actors import pool as pools

    made = pools.create(settings, "trinity", MODEL, None, str(tmp_path_factory.mktemp("pool") / "placement"))
    made.load(SOURCE)
    yield made
    pools.destroy(settings.pool, "trinity")


@pytest.fixture
def operator(pool, settings):
    from actors.control.admin import operator

    made = operator(settings, "trinity")
    until(lambda: {shard.state for shard in made.snapshot().shards} == {"ready"})
    return made


@pytest.fixture
def load(pool):
    """A caller that is always there; it must never see an error or another answer than the oracle's."""
    caller = Caller(pool)
    caller.thread.start()
    yield caller
    caller.stop.set()
    caller.thread.join(30)
    assert not caller.thread.is_alive()
    assert caller.errors == []
    assert caller.num_calls > 20


class Caller:
    def __init__(self, pool):
        self.dispatcher = pool.dispatcher()
        self.oracle = local_pool(MODEL, SOURCE).dispatcher()
        self.errors, self.num_calls, self.longest_s = [], 0, 0.0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    @torch.inference_mode()
    def run(self):
        rng = torch.Generator().manual_seed(0)
        while not self.stop.is_set():
            x = torch.randn(20, MODEL.hidden_size, generator=rng)
            ids = torch.rand(20, MODEL.num_experts, generator=rng).topk(2).indices
            weights = torch.rand(20, 2, generator=rng)
            layer = MODEL.moe_layers[self.num_calls % len(MODEL.moe_layers)]
            started = time.monotonic()
            try:
                torch.testing.assert_close(self.dispatcher(layer, x, ids, weights), self.oracle(layer, x, ids, weights))
            except Exception as error:
                self.errors.append(error)
                return
            self.longest_s = max(self.longest_s, time.monotonic() - started)
            self.num_calls += 1
            time.sleep(PACE_S)


def until(what, *, within_s=WAIT_S):
    waiting.until(what, within_s, every_s=0.05)


def settled(operator, epoch, **wanted):
    """The first snapshot after `epoch` whose last change is done."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        found = operator.wait(epoch, 1.0)
        if found.table.epoch > epoch and found.changes[0].phase == "done":
            return found
    pytest.fail(f"no change after epoch {epoch}: {found.changes[:1]}")


def replicate_all(operator):
    """Every expert on both shards, and the change that brought the last one done."""
    for layer in MODEL.moe_layers:
        for expert in range(MODEL.num_experts):
            operator.replicate(layer, expert, 2)
    until(lambda: operator.snapshot().table.num_replicas_LE.min() == 2)
    until(lambda: operator.snapshot().changes[0].phase == "done")


def held(pool):
    """layer -> expert -> shards, by what the shards themselves say."""
    found = {}
    for status in pool.status():
        for layer, rows in status.rows.items():
            for expert in rows:
                found.setdefault((layer, expert), set()).add(status.shard)
    return found


def by_table(table):
    return {
        (layer, expert): {table.shards[at] for at in positions}
        for layer, row in zip(table.layers, table.replicas, strict=True)
        for expert, positions in enumerate(row)
    }


def pid_of(ray, pool, shard):
    return ray.get(pool.shards[shard].where.remote())[1]


def test_moves_follow_the_load(pool, operator, settings, ray_session):
    """All rows go to two experts of one shard: asked to rebalance, the service parts them."""
    dispatcher = pool.dispatcher()
    first = [
        expert for expert in range(MODEL.num_experts) if pool.table.holders((MODEL.moe_layers[0], expert)) == (0,)
    ][:2]
    rows = torch.randn(200, MODEL.hidden_size), torch.tensor([first] * 200), torch.ones(200, 2)
    with torch.inference_mode():
        for _ in range(3):
            for layer in MODEL.moe_layers:
                dispatcher(layer, *rows)
            time.sleep(0.3)
    until(lambda: operator.snapshot().imbalance > 1.5 or operator.snapshot().load_LE[0][first[0]] > 0)
    found = settled(operator, operator.rebalance())
    for layer in MODEL.moe_layers:
        holders = {found.table.holders((layer, expert)) for expert in first}
        assert len(holders) == 2, "they share a shard no more"


def test_without_a_replica_callers_wait_for_the_shard(pool, operator, load, ray_session):
    num_recoveries = operator.snapshot().num_recoveries
    assert operator.snapshot().table.num_replicas_LE.max() == 1
    os.kill(pid_of(ray_session, pool, "shard-1"), signal.SIGKILL)
    until(lambda: load.dispatcher.num_retries > 0)
    until(lambda: operator.snapshot().num_recoveries == num_recoveries + 1)
    num_calls = load.num_calls
    until(lambda: load.num_calls > num_calls + 20)
    print(f"longest call {load.longest_s:.3f} s")


def test_a_replica_takes_over_at_once(pool, operator, load, ray_session):
    layer, num_recoveries = MODEL.moe_layers[0], operator.snapshot().num_recoveries
    replicate_all(operator)
    load.longest_s = 0.0
    os.kill(pid_of(ray_session, pool, "shard-0"), signal.SIGKILL)
    until(lambda: load.dispatcher.num_retries > 0)
    until(lambda: operator.snapshot().num_recoveries == num_recoveries + 1)
    until(lambda: held(pool) == by_table(operator.snapshot().table))
    assert not load.errors
    until(lambda: not pool.view.unreachable)
    print(f"longest call {load.longest_s:.3f} s")
    shrunk = settled(operator, operator.replicate(layer, 0, 1))
    assert len(shrunk.table.holders((layer, 0))) == 1


def test_a_hung_shard_is_left_alone_and_harmless_when_it_wakes(pool, operator, load, ray_session):
    num_recoveries = operator.snapshot().num_recoveries
    replicate_all(operator)
    pid, load.longest_s = pid_of(ray_session, pool, "shard-0"), 0.0
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: load.dispatcher.num_retries > 0)
        num_calls = load.num_calls
        until(lambda: load.num_calls > num_calls + 20)
        until(lambda: {s.name: s.state for s in operator.snapshot().shards}["shard-0"] == "away")
        assert load.longest_s < CALL_TIMEOUT_S / 2, "nobody waited for it until that"
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not pool.view.unreachable)
    until(lambda: operator.snapshot().num_recoveries == num_recoveries + 1)
    assert held(pool) == by_table(operator.snapshot().table)


def test_shards_come_and_go_under_load(pool, operator, load, ray_session):
    epoch = operator.scale(4, "more")
    grown = settled(operator, epoch)
    assert grown.table.shards == ("shard-0", "shard-1", "shard-2", "shard-3")
    assert {shard.state for shard in grown.shards} == {"ready"}, "a change is done when its shards have been seen"
    assert grown.changes[0].num_copies > 0
    assert grown.changes[0].copied_bytes > 0
    until(lambda: held(pool) == by_table(grown.table))
    shrunk = settled(operator, operator.drain("shard-0"))
    assert shrunk.table.shards == ("shard-1", "shard-2", "shard-3")
    shrunk = settled(operator, operator.scale(1, "less"))
    assert len(shrunk.table.shards) == 1
    until(lambda: held(pool) == by_table(shrunk.table))
    with pytest.raises(ConfigError, match="is the last shard"):
        operator.drain(shrunk.table.shards[0])
    with pytest.raises(ConfigError, match="0 shards for 6 experts"):
        operator.scale(0, "none")
    names = {entry["name"] for entry in ray_session.util.list_named_actors(all_namespaces=True)}
    assert {name.rsplit("/", 1)[1] for name in names if pool.name in name} == {"placement", *shrunk.table.shards}


def test_a_shard_that_does_not_come_back_is_replaced(ray_session, tmp_path):
    from actors import pool as pools
    from actors.control.admin import operator

    settings = PlacementConfig(**settings_of().model_dump() | {"num_shards": 3, "redundancy": 1, "lost_after_s": 4})
    pool = pools.create(settings, "trinity", MODEL, None, str(tmp_path / "placement"))
    try:
        pool.load(SOURCE)
        seen, caller = operator(settings, "trinity"), Caller(pool)
        until(lambda: seen.snapshot().table.num_replicas_LE.min() == 2)
        caller.thread.start()
        os.kill(pid_of(ray_session, pool, "shard-1"), signal.SIGSTOP)
        until(lambda: "shard-1" not in seen.snapshot().table.shards)
        until(lambda: len(seen.snapshot().table.shards) == 3)
        until(lambda: held(pool) == by_table(seen.snapshot().table))
        table = seen.snapshot().table
        assert table.shards == ("shard-0", "shard-2", "shard-3")
        assert table.num_replicas_LE.min() == 2, "redundancy is restored"
        most = max(len(table.experts_of(shard)[layer]) for shard in table.shards for layer in table.layers)
        assert most <= 5, "a shard's room is a quarter more than its even share"
        caller.stop.set()
        caller.thread.join(30)
        assert caller.errors == []
    finally:
        pools.destroy(settings.pool, "trinity")


@pytest.mark.parametrize("phase", ["prepare", pytest.param("drain", marks=pytest.mark.chaos)])
def test_a_service_killed_in_a_change_completes_it_or_takes_it_back(pool, operator, load, ray_session, phase):
    from actors.names import find

    service = find(pool.name, "placement", "trinity")
    epoch = operator.scale(3, "more")
    until(lambda: any(change.phase == phase for change in operator.snapshot().changes))
    ray_session.kill(service, no_restart=False)
    until(lambda: len(pool.table.shards) == 3)
    assert pool.table.epoch > epoch
    until(lambda: held(pool) == by_table(pool.table))
    names = {entry["name"] for entry in ray_session.util.list_named_actors(all_namespaces=True)}
    assert {name.rsplit("/", 1)[1] for name in names if pool.name in name} == {"placement", *pool.table.shards}
    shrunk = settled(operator, operator.scale(2, "less"))
    assert len(shrunk.table.shards) == 2, "the next change still works"


@pytest.mark.chaos
def test_shards_follow_the_load(ray_session, tmp_path):
    """Load up: shards and replicas come. Load down: they go."""
    from actors import pool as pools
    from actors.control.admin import operator

    scale = dict(
        enabled=True, min_shards=1, max_shards=3, rows_per_s=200, every_s=0.5, cooldown_s=1, settle_s=2, max_spare=2
    )
    settings = PlacementConfig(**settings_of().model_dump() | {"num_shards": 1, "window_s": 2, "autoscale": scale})
    pool = pools.create(settings, "trinity", MODEL, None, str(tmp_path / "placement"))
    try:
        pool.load(SOURCE)
        caller, seen = Caller(pool), operator(settings, "trinity")
        caller.thread.start()
        until(lambda: len(seen.snapshot().table.shards) == 3)
        until(lambda: seen.snapshot().table.num_replicas_LE.max() > 1)
        caller.stop.set()
        caller.thread.join(30)
        assert caller.errors == []
        until(lambda: len(seen.snapshot().table.shards) == 1, within_s=150)
        assert seen.snapshot().table.num_replicas_LE.max() == 1
    finally:
        pools.destroy(settings.pool, "trinity")
