"""F21: steps, moves, replicas and requests in any order; every answer is a monolith's that has the same version.

The oracle is one shard with all experts that takes the same steps on the same rows and keeps every version.
"""

import time
from contextlib import nullcontext, suppress

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from trinity.config import OptimConfig, preset
from trinity.dispatch.dispatcher import Dispatcher
from trinity.dispatch.transport import LocalTransport
from trinity.errors import StepConflict, VersionGone, WrongEpoch
from trinity.experts.migration import migrate_in
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.placement.table import PlacementTable
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import WEIGHT, Commit, Copy, Fetch, Forward, Load, PruneTo, Rows, Stage

MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=16, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, num_hidden_layers=3)
)
NAMES = ("a", "b", "c")
OPTIM = OptimConfig(muon_lr=0.05, adamw_lr=0.01)  # versions differ where it shows, sums in another order do not
SOURCE = Load(seed=3)


class Current:
    """A PlacementView that the test moves."""

    unreachable = frozenset()
    distances = {}

    def __init__(self, table):
        self.table = table

    def mark_unreachable(self, shard):
        raise AssertionError("nobody dies here")

    def refresh(self):
        pass


def made(name, experts):
    shard = ExpertShard(ShardSpec(name, MODEL, experts, OPTIM, backend="reference"))
    shard.load(SOURCE)
    return shard


def rows_of(seed):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.rand(12, MODEL.num_experts, generator=rng).topk(2).indices
    return torch.randn(12, MODEL.hidden_size, generator=rng), ids, torch.rand(12, 2, generator=rng)


class Life(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        table = PlacementTable.spread(MODEL.moe_layers, MODEL.num_experts, NAMES)
        self.view = Current(table)
        self.shards = {name: made(name, table.experts_of(name)) for name in NAMES}
        self.whole = made("whole", dict.fromkeys(MODEL.moe_layers, tuple(range(MODEL.num_experts))))
        self.pools = [self._pool(self.view, self.shards), self._pool(Current(self._alone()), {"whole": self.whole})]
        self.version, self.attempt, self.pinned = 0, 0, set()

    def _pool(self, view, shards):
        transport = LocalTransport(shards)
        for shard in shards.values():
            shard.peers = transport
        return ExpertPool(view, transport, timeout_s=60)

    def _alone(self):
        return PlacementTable.spread(MODEL.moe_layers, MODEL.num_experts, ["whole"])

    def _gradients(self, pool, attempt, seed):
        dispatcher = pool.dispatcher()
        dispatcher.use(self.version, attempt)
        for layer in MODEL.moe_layers:
            x, ids, weights = rows_of(seed)
            dispatcher(layer, x.requires_grad_(), ids, weights.requires_grad_()).square().sum().backward()
        assert dispatcher.failure is None
        return dispatcher.num_sent_ops

    # -- what may happen

    @rule(seed=st.integers(0, 99), is_given_up=st.booleans(), hears_of_it=st.booleans())
    def step(self, seed, is_given_up, hears_of_it):
        """An attempt that is given up somewhere on the way leaves nothing behind."""
        self.attempt += 1
        here, whole = self.pools
        num_sent_ops = self._gradients(here, self.attempt, seed)
        here.prepare(self.version + 1, num_sent_ops, self.attempt)
        if is_given_up:
            if hears_of_it:
                self.shards["b"].stage(self._stage(tuple(self.pinned)))
            return
        here.stage(self._stage(tuple(self.pinned)))()
        whole.prepare(self.version + 1, self._gradients(whole, self.attempt, seed), self.attempt)
        whole.stage(self._stage(tuple(range(self.version))))()
        whole.commit(self.version + 1)
        if hears_of_it:
            here.commit(self.version + 1)
        self.version += 1  # decided: who has not heard of it does so from the next call

    def _stage(self, keep):
        return Stage(self.version + 1, {"muon": 0.05, "adamw": 0.01}, 1.0, self.attempt, keep)

    @rule(layer=st.sampled_from(MODEL.moe_layers), expert=st.integers(0, 3), to=st.sampled_from(NAMES))
    def copy(self, layer, expert, to):
        """One more replica, with all that belongs to it, in every version that is in use."""
        table = self.view.table
        if table.shards.index(to) in table.holders((layer, expert)):
            return
        origin = table.shards[table.holders((layer, expert))[0]]
        for shard in self.shards.values():  # between two steps all know what was decided
            if shard.version < self.version:
                shard.commit(Commit(self.version))
        updates = self.shards[origin].store.current.notes["num_updates"]
        new = table.with_replica((layer, expert), to)
        self.shards[to].prune_to(PruneTo(table.experts_of(to), table.epoch))  # leftovers have missed steps
        for version in (self.version, *self.pinned, self.version - 1):
            if version in self.shards[origin].store.versions:
                message = Copy(layer, (expert,), (origin,), version, time.monotonic() + 60, updates, new.epoch)
                with nullcontext() if version == self.version else suppress(VersionGone):  # as Migration does
                    migrate_in(self.shards[to], message, LocalTransport(self.shards), SOURCE)
        self.view.table = new

    @rule(layer=st.sampled_from(MODEL.moe_layers), expert=st.integers(0, 3), to=st.sampled_from(NAMES))
    def fail_to_copy(self, layer, expert, to):
        """A change that is taken back after its copies were made: nothing of it may pass for a copy later."""
        before = self.view.table
        self.copy(layer, expert, to)
        if self.view.table is not before:
            self.view.table = before.renewed()
            for shard in NAMES:
                self.shards[shard].prune_to(PruneTo(before.experts_of(shard), self.view.table.epoch))

    @rule(
        layer=st.sampled_from(MODEL.moe_layers), expert=st.integers(0, 3), at=st.integers(0, 2), is_late=st.booleans()
    )
    def drop(self, layer, expert, at, is_late):
        table = self.view.table
        held = table.holders((layer, expert))
        if len(held) == 1:
            return
        name = table.shards[held[at % len(held)]]
        self.view.table = table.without_replica((layer, expert), name)
        if not is_late:  # else it keeps what is no longer its own, until a later table is tidied
            for shard in NAMES:
                self.shards[shard].prune_to(PruneTo(self.view.table.experts_of(shard), self.view.table.epoch))

    @rule()
    def pin(self):
        if len(self.pinned) < 2:
            self.pinned.add(self.version)

    @rule()
    def unpin(self):
        self.pinned = set()

    @rule(which=st.integers(0, 3), seed=st.integers(0, 99))
    def ask(self, which, seed):
        """At the present version, at a pinned one, or at the last one, which may be gone."""
        found = [self.version, *sorted(self.pinned), max(0, self.version - 1)]
        version = found[which % len(found)]
        must_be_there = version == self.version or version in self.pinned
        for layer in MODEL.moe_layers:
            got, want = (self._answer(pool, version, layer, seed) for pool in self.pools)
            if got is None:
                assert not must_be_there, f"version {version} is in use, and gone"
            else:
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    def _answer(self, pool, version, layer, seed):
        dispatcher = Dispatcher(pool.view, pool.transport, timeout_s=0.5, version=version)
        try:
            with torch.inference_mode():
                return dispatcher(layer, *rows_of(seed))
        except (VersionGone, StepConflict, WrongEpoch):
            return None

    # -- what must hold

    @invariant()
    def replicas_are_equal(self):
        if not hasattr(self, "version"):
            return
        for layer, experts in self.view.table.shared.items():
            for expert, holders in experts.items():
                found = []
                for name in holders:
                    held = self.shards[name].store.versions.get(self.version)
                    if held is not None:
                        at = held.notes["experts"][str(layer)].index(expert)
                        found.append([held.tensors[f"{layer}.{p}::weight"][at] for p in ("gate", "up", "down")])
                for other in found[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=60, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_a_replica_that_came_later_has_nothing_of_older_versions_and_says_so():
    """By the table `b` has both experts; of version 0 it has but the one that was copied to it, since it had let go of it."""
    life = Life()
    life.begin()
    layer, home = MODEL.moe_layers[0], life.shards["b"]
    (own,) = life.view.table.experts_of("b")[layer]
    life.step(seed=0, is_given_up=False, hears_of_it=False)
    life.step(seed=0, is_given_up=True, hears_of_it=True)
    assert home.store.numbers == [1]
    life.copy(layer, (own + 1) % 3, "b")
    assert home.store.numbers == [0, 1]
    rows = Rows(torch.randn(1, MODEL.hidden_size), torch.full((1, 2), own), torch.rand(1, 2))
    for ask in (
        lambda: home.fetch(Fetch(layer, own, 0, time.monotonic() + 60, WEIGHT)),
        lambda: home.infer(Forward("x:1", layer, life.view.table.epoch, 0, time.monotonic() + 60, rows, False)),
    ):
        with pytest.raises(VersionGone, match="nothing of its version 0"):
            ask()
    life.copy(layer, own, "a")  # the present version is; of the older one there is nothing to be had
    assert own in life.view.table.experts_of("a")[layer]


def test_experts_change_places_with_an_update_in_between():
    """[0, 1, 2, 3] -> [0, 2, 1, 3]: the case in which others' routers and weights part company."""
    life = Life()
    life.begin()
    life.step(1, False, True)
    layer = MODEL.moe_layers[0]
    first, second = (life.view.table.shards[life.view.table.holders((layer, e))[0]] for e in (1, 2))
    for expert, to in ((1, second), (2, first)):
        life.copy(layer, expert, to)
        life.ask(0, 5)
        life.step(2 + expert, False, expert == 1)
        life.drop(layer, expert, 0, False)
        life.ask(0, 6)
        life.ask(1, 7)
    life.step(9, False, False)
    life.ask(0, 8)
    assert life.version == 4
