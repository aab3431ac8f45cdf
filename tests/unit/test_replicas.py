"""Experts leave one shard and join another with all that is theirs; callers find them wherever they are."""

import math
import random
import time

import numpy as np
import pytest
import torch

from tests.waiting import sooner_than
from trinity.config import LoraConfig, OptimConfig, preset
from trinity.dispatch import patience
from trinity.dispatch.dispatcher import Dispatcher
from trinity.dispatch.exchange import replica_hash
from trinity.dispatch.patience import Patience
from trinity.dispatch.transport import Done, LocalTransport
from trinity.dispatch.view import StaticView
from trinity.errors import DeadlineExceeded, StepConflict, Unavailable, WrongEpoch
from trinity.experts.migration import migrate_in
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.placement.table import PlacementTable
from trinity.pool.local import local_pool
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import WEIGHT, Commit, Copy, Fetch, Install, Load, Prepare, PruneTo, Stage, Status

MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=16, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=3)
)
LAYER, SECOND = MODEL.moe_layers[:2]
SOURCE = Load(seed=5, training=False)
FOREVER = 4e9


def shard_of(name, experts, optim=None, load=SOURCE):
    held = {layer: tuple(experts) for layer in MODEL.moe_layers}
    shard = ExpertShard(ShardSpec(name, MODEL, held, optim, backend="torch"))
    shard.load(load)
    return shard


def rows_of(num_tokens=30, seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, MODEL.num_experts, generator=rng).topk(MODEL.num_experts_per_tok).indices
    return torch.randn(num_tokens, MODEL.hidden_size, generator=rng), ids, torch.rand(num_tokens, 3, generator=rng)


def copy_all(target, experts, peers, layer=LAYER, source=None):
    version = next(iter(peers.values())).version
    names = tuple(next(s for s, shard in peers.items() if e in shard.experts[layer]) for e in experts)
    return migrate_in(target, Copy(layer, tuple(experts), names, version, FOREVER), LocalTransport(peers), source)


def test_a_token_goes_to_the_same_replicas_in_any_company():
    """Half of the rows to each of two replicas, whatever else is in the batch: so the order of sums is a token's own."""
    table, transport = replicated(4)
    dispatcher = Dispatcher(MovingView(table), transport, timeout_s=60)
    x, ids, weights = rows_of(300)
    whole = dispatcher(LAYER, x, ids, weights)
    for part in (slice(0, 1), slice(7, 60), slice(1, 300)):
        assert torch.equal(dispatcher(LAYER, x[part], ids[part], weights[part]), whole[part])
    assert 0.4 < (replica_hash(x) % 2).mean() < 0.6


# -- one shard


@pytest.mark.parametrize(
    ("optim", "num_kinds"),
    [
        (None, 1),
        (OptimConfig(), 2),
        (OptimConfig(matrices="adamw"), 3),
        (OptimConfig(lora=LoraConfig(rank=3)), 7),
        (OptimConfig(freeze=("experts",)), 1),
    ],
)
def test_a_copy_is_the_original_with_all_that_is_its_own(optim, num_kinds):
    """Weights, adapters and optimizer state: an update of the copy gives the bits that an update of the original gives."""
    load = Load(seed=5, training=optim is not None)
    a, b = shard_of("a", range(5), optim, load), shard_of("b", range(5, 8), optim, load)
    both = [a, b]
    for step in (1, 2) if optim else ():
        if step == 2:
            assert copy_all(b, [1, 3], {"a": a}) > 0
        for shard in both:
            rng = torch.Generator().manual_seed(step)
            for layer in MODEL.moe_layers:
                gradients = []
                trained = shard.versions.trained[layer]
                for stack in trained.values():
                    noise = {e: torch.randn(*stack.shape[1:], generator=rng) for e in range(MODEL.num_experts)}
                    wanted = torch.stack([noise[e] for e in shard.experts[layer]])
                    gradients.append(torch.empty_strided(stack.shape, stack.stride()).copy_(wanted))
                shard.gathered.add(f"test:{layer}", tuple(trained), gradients)
            shard.prepare(Prepare(step))
            shard.stage(Stage(step, {"muon": 0.02, "adamw": 0.01}, 1.0))
            shard.commit(Commit(step))
    if optim is None:
        copy_all(b, [1, 3], {"a": a})
    assert b.experts[LAYER] == (5, 6, 7, 1, 3)
    for expert in (1, 3):
        for kind in a.weights.kinds(a.version):
            mine, theirs = (s.fetch(Fetch(LAYER, expert, s.version, FOREVER, kind)) for s in both)
            assert torch.equal(mine, theirs), (expert, kind)
    assert len(a.weights.kinds(a.version)) == num_kinds


def test_what_is_adopted_computes_and_what_is_dropped_does_not():
    a, b = shard_of("a", range(8)), shard_of("b", range(2))
    copy_all(b, range(2, 8), {"a": a})
    assert b.prune_to(PruneTo({LAYER: (3, 6)})) == 6 + 2 * (len(MODEL.moe_layers) - 1)
    assert b.experts[LAYER] == (3, 6)
    assert b.experts[SECOND] == ()
    assert b.prune_to(PruneTo({LAYER: (3, 6)})) == 0, "harmless when repeated"
    assert b.status(Status()).num_experts == 2
    with pytest.raises(WrongEpoch, match=r"does not hold expert \(1, 0\)|does not hold expert"):
        b.fetch(Fetch(LAYER, 0, 0, FOREVER))


def test_counters_of_rows_stay_with_their_experts():
    a, b = shard_of("a", range(8)), shard_of("b", range(4))
    x, ids, weights = rows_of()
    table = PlacementTable.spread(MODEL.moe_layers, 8, ["a"])
    Dispatcher(StaticView(table), LocalTransport({"a": a}), timeout_s=60)(LAYER, x, ids, weights)
    before = a.status(Status()).rows[LAYER]
    a.prune_to(PruneTo(dict.fromkeys(MODEL.moe_layers, (2, 5))))
    copy_all(a, [3], {"b": b})
    assert a.status(Status()).rows[LAYER] == {2: before[2], 5: before[5], 3: 0}


def test_copies_of_another_version_are_refused():
    a, b = shard_of("a", range(8)), shard_of("b", range(2))
    rows = {WEIGHT: (a.fetch(Fetch(LAYER, 4, 0, FOREVER)),)}
    with pytest.raises(StepConflict, match="holds version 0, the copies are of 3"):
        b.install(Install(LAYER, (4,), 3, rows))
    assert b.experts[LAYER] == (0, 1)
    empty = shard_of("c", ())
    assert empty.install(Install(LAYER, (4,), 3, rows)) == 1
    assert empty.version == 3


def test_an_expert_that_nobody_has_comes_from_the_checkpoint():
    a, b = shard_of("a", range(8)), shard_of("b", range(2))
    migrate_in(b, Copy(LAYER, (4,), ("",), 0, FOREVER), LocalTransport({}), SOURCE)
    assert torch.equal(b.fetch(Fetch(LAYER, 4, 0, FOREVER)), a.fetch(Fetch(LAYER, 4, 0, FOREVER)))
    with pytest.raises(StepConflict, match="is on no shard"):
        migrate_in(b, Copy(LAYER, (5,), ("",), 0, FOREVER), LocalTransport({}), None)


# -- callers


class MovingView:
    """A MovingView that a test moves."""

    def __init__(self, table):
        self.table, self.unreachable, self.later, self.distances = table, frozenset(), None, {}

    def mark_unreachable(self, shard):
        self.unreachable |= {shard}

    def refresh(self):
        if self.later is not None:
            self.table, self.later = self.later, None


class Killable(LocalTransport):
    """Shards that are dead or hang do not answer."""

    def __init__(self, shards):
        super().__init__(shards)
        self.dead, self.hung, self.asked = set(), set(), []

    def send(self, shard, verb, message):
        self.asked.append(shard)
        if shard in self.dead:
            return Done(error=Unavailable("dead"))
        if shard in self.hung:
            return Late(message.deadline_s)
        return super().send(shard, verb, message)


class Late:
    def __init__(self, deadline_s):
        self.deadline_s = deadline_s

    def result(self):
        time.sleep(max(0, self.deadline_s - time.monotonic()))
        raise DeadlineExceeded("hung")


def replicated(num_shards):
    """Each expert on two of the shards."""
    held = tuple((e % num_shards, (e + 1) % num_shards) for e in range(MODEL.num_experts))
    names = tuple(f"s{i}" for i in range(num_shards))
    table = PlacementTable(1, names, MODEL.moe_layers, (held,) * len(MODEL.moe_layers))
    shards = {name: shard_of(name, table.experts_of(name)[LAYER]) for name in names}
    return table, Killable(shards)


@pytest.fixture(scope="module")
def want():
    return local_pool(MODEL, SOURCE, backend="torch").dispatcher()(LAYER, *rows_of())


@pytest.mark.parametrize("victims", [{"s0"}, {"s1"}, {"s2", "s0"}])
def test_rows_of_a_dead_shard_go_to_the_replicas(victims, want):
    table, transport = replicated(4)
    view = MovingView(table)
    dispatcher = Dispatcher(view, transport, timeout_s=60)
    transport.dead = victims
    torch.testing.assert_close(dispatcher(LAYER, *rows_of()), want)
    assert view.unreachable == victims
    assert dispatcher.num_retries == len(victims)
    transport.asked.clear()
    torch.testing.assert_close(dispatcher(LAYER, *rows_of()), want)
    assert not victims & set(transport.asked), "who is away is not asked again"
    view.unreachable, transport.dead = frozenset(), set()
    torch.testing.assert_close(dispatcher(LAYER, *rows_of()), want)
    assert victims <= set(transport.asked)


def test_a_hung_shard_costs_one_attempt(want):
    table, transport = replicated(3)
    transport.hung = {"s1"}
    dispatcher = Dispatcher(MovingView(table), transport, timeout_s=20, attempt_s=0.2)
    started = time.monotonic()
    torch.testing.assert_close(dispatcher(LAYER, *rows_of()), want)
    assert time.monotonic() - started > 0.15
    assert transport.asked.count("s1") == 1


def test_a_shard_that_was_quick_is_not_waited_for_as_long(want, monkeypatch):
    """The setting is for shards that nobody knows yet."""
    monkeypatch.setattr(patience, "LEAST_S", 0.1)
    table, transport = replicated(3)
    dispatcher = Dispatcher(MovingView(table), transport, timeout_s=60, attempt_s=50)
    for _ in range(3):
        dispatcher(LAYER, *rows_of())
    transport.hung = {"s1"}
    with sooner_than(25):
        torch.testing.assert_close(dispatcher(LAYER, *rows_of()), want)
    assert dispatcher.num_retries == 1
    assert dispatcher.patience.of("s2", 0) < 1, "who was waited for later has not taken any longer"


def test_patience_is_a_multiple_of_what_a_shard_usually_takes_for_so_many_rows():
    known = Patience(5.0)
    assert known.of("a", 10) == 5.0
    for _ in range(100):
        known.took("a", 0, 0.02)  # as a decode
    assert known.of("a", 0) == patience.LEAST_S
    assert known.of("a", 640) == pytest.approx(10 * 0.02 * 11)
    assert known.of("a", 100_000) == 5.0
    assert known.of("b", 0) == 5.0
    for _ in range(3):
        known.was_late("a")
    assert known.of("a", 0) == pytest.approx(10 * 0.02 * 8), "all that it does takes longer now, maybe"
    known.took("a", 0, 0.0)
    assert known.of("a", 0) < 10 * 0.02 * 8
    for _ in range(5000):
        known.was_late("a")
    assert known.of("a", 0) == 5.0
    for _ in range(200):
        known.took("a", 0, 0.02)
    assert known.of("a", 0) == patience.LEAST_S
    forever = Patience(math.inf)
    forever.took("a", 0, 0.02)
    assert forever.of("a", 0) == math.inf


def test_a_shard_that_no_longer_holds_the_expert_sends_the_caller_to_the_new_table(want):
    a, b = shard_of("a", range(8)), shard_of("b", range(4, 8))
    old = PlacementTable.spread(MODEL.moe_layers, 8, ["a", "b"])
    new = PlacementTable(2, ("a", "b"), old.layers, (((0,),) * 8,) * len(old.layers))
    view = MovingView(old)
    view.later = new
    b.prune_to(PruneTo({}))
    dispatcher = Dispatcher(view, LocalTransport({"a": a, "b": b}), timeout_s=60)
    torch.testing.assert_close(dispatcher(LAYER, *rows_of()), want)
    assert dispatcher.table.epoch == 2


def test_with_nobody_left_the_error_comes_within_the_deadline():
    table, transport = replicated(2)
    transport.dead = {"s0", "s1"}
    with sooner_than(30), pytest.raises(Unavailable, match="dead"):
        Dispatcher(MovingView(table), transport, timeout_s=0.5)(LAYER, *rows_of())


def test_rows_kept_for_a_backward_stay_with_their_shard():
    """A gradient lies where its row was computed: another shard would count it twice or not at all."""
    table, transport = replicated(3)
    transport.dead = {"s1"}
    x, ids, weights = rows_of()
    with pytest.raises(Unavailable):
        Dispatcher(MovingView(table), transport, timeout_s=0.3)(LAYER, x.requires_grad_(), ids, weights)


@pytest.mark.parametrize("seed", range(20))
def test_any_walk_of_moves_and_deaths_gives_the_monoliths_answers(seed):
    rng = random.Random(seed)
    oracle = local_pool(MODEL, SOURCE, backend="torch").dispatcher()
    table = PlacementTable.spread(MODEL.moe_layers, 8, ["a", "b", "c"])
    transport = Killable({name: shard_of(name, table.experts_of(name)[LAYER]) for name in table.shards})
    view = MovingView(table)
    dispatcher = Dispatcher(view, transport, timeout_s=30)
    for turn in range(12):
        table = walk(rng, view, transport)
        for layer in MODEL.moe_layers[:2]:
            rows = rows_of(9, seed * 100 + turn)
            torch.testing.assert_close(dispatcher(layer, *rows), oracle(layer, *rows), atol=1e-5, rtol=1e-5)
    assert table.epoch > 1


def walk(rng, view, transport):
    """A replica more, a replica less, or another shard dead for a while, if its experts are elsewhere."""
    table = view.table
    expert = (LAYER, rng.randrange(8))
    held = [table.shards[at] for at in table.holders(expert)]
    free = [shard for shard in table.shards if shard not in held]
    if free and rng.random() < 0.6:
        shard = rng.choice(free)
        copy_all(transport.shards[shard], [expert[1]], transport.shards)
        view.table = table.with_replica(expert, shard)
    elif len(held) > 1:
        gone = rng.choice(held)
        view.table = table.without_replica(expert, gone)
        view.later = None
        transport.shards[gone].prune_to(PruneTo(view.table.experts_of(gone)))
    victim = rng.choice(table.shards)
    alone = any(held == (view.table.shards.index(victim),) for row in view.table.replicas for held in row)
    transport.dead, view.unreachable = set() if alone else {victim}, frozenset()
    return view.table


# -- the table


def test_present_leaves_out_who_is_away_but_nobody_alone():
    table = PlacementTable(1, ("a", "b", "c"), (0,), (((0, 1), (1,), (2, 0, 1)),))
    shard_LEN, num_LE = table.present({"b"})
    assert num_LE.tolist() == [[1, 1, 2]]
    firsts = [list(shard_LEN[0, e, : num_LE[0, e]]) for e in range(3)]
    assert firsts == [[0], [1], [2, 0]]
    assert np.array_equal(table.present()[1], table.num_replicas_LE)


def test_present_takes_the_nearest_of_those_that_are_there():
    table = PlacementTable(1, ("a", "b", "c"), (0,), (((0, 1), (1,), (2, 0, 1)),))

    def nearest(away, **distance_of):
        shard_LEN, num_LE = table.present(away, distance_of)
        return [list(shard_LEN[0, e, : num_LE[0, e]]) for e in range(3)]

    assert nearest((), a=2, b=0, c=1) == [[1], [1], [1]]
    assert nearest(("b",), a=2, b=0, c=1) == [[0], [1], [2]]
    assert nearest(("b", "c"), a=2, b=0, c=1) == [[0], [1], [0]]
    assert nearest((), a=2, b=2, c=2) == [[0, 1], [1], [2, 0, 1]]


def test_few_rows_go_to_the_nearest_replica_and_many_to_all(want):
    table, transport = replicated(2)
    view = MovingView(table)
    view.distances = {"s0": 0, "s1": 2}
    dispatcher = Dispatcher(view, transport, timeout_s=60, near_rows=32)
    torch.testing.assert_close(dispatcher(LAYER, *rows_of()), want)
    assert set(transport.asked) == {"s0"}
    transport.asked.clear()
    dispatcher(LAYER, *rows_of(num_tokens=100))
    assert set(transport.asked) == {"s0", "s1"}
    transport.asked.clear()
    transport.dead = {"s0"}
    torch.testing.assert_close(dispatcher(LAYER, *rows_of()), want)
    view.distances = {}
    transport.dead, view.unreachable = set(), frozenset()
    transport.asked.clear()
    torch.testing.assert_close(dispatcher(LAYER, *rows_of()), want)
    assert set(transport.asked) == {"s0", "s1"}, "a new distance is news"


def test_a_pool_of_replicas_still_loads_and_reports():
    table, transport = replicated(2)
    pool = ExpertPool(StaticView(table), transport, timeout_s=60)
    assert pool.load(SOURCE) == 0
    assert {status.num_experts for status in pool.status()} == {8 * len(MODEL.moe_layers)}
