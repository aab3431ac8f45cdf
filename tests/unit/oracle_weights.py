"""The weights of the oracle's world (oracle_world.py): several versions, each with a backbone and a pool of its own, whose
experts move between shards; a run that commits, goes back and loses versions; adapters beside all of them.
"""

import shutil
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from tests.unit.adapter_folders import write_adapter
from trinity.checkpoint import backbone_adapter, examined
from trinity.config import AdapterRef, ModelConfig, preset
from trinity.errors import VersionGone
from trinity.experts.migration import migrate_in
from trinity.models.common.adapted import BackboneAdapter
from trinity.models.common.decoder import CausalLM
from trinity.models.registry import build, family_of
from trinity.placement.table import Expert, PlacementTable
from trinity.pool.local import local_pool
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Copy, Load, PruneTo
from trinity.utils.lines import line_of, named, step_of

VOCAB, NUM_WEIGHTS, NUM_SHARDS, NUM_ADAPTERS = 40, 3, 3, 2
TINY = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8}
CONFIG = type(preset("tiny")).model_validate(
    {**preset("tiny").model_dump(), **TINY, "num_dense_layers": 2, "num_experts": 4, "sliding_window": 9}
)


class Moving:
    """The placement as callers see it, which changes."""

    unreachable, distances = frozenset[str](), {}

    def __init__(self, table: PlacementTable):
        self.table = table

    def mark_unreachable(self, shard):
        raise AssertionError(f"{shard} is always there")

    def refresh(self):
        pass


class Weights(NamedTuple):
    model: CausalLM
    pool: ExpertPool


@lru_cache
def weights(number: int, num_shards: int, config: ModelConfig = CONFIG) -> Weights:
    """The same numbers, over so many shards."""
    pool = local_pool(config, Load(seed=number, training=False), num_shards=num_shards)
    pool.view = Moving(pool.table)
    model = build(config, pool.dispatcher())
    family_of(config).init_weights(model, number)
    noise = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return Weights(model.eval(), pool)


def move(expert: Expert, shard: str, is_copy: bool) -> None:
    """Have a shard hold an expert, as the placement service does it; others keep it only for `is_copy`."""
    for number in range(NUM_WEIGHTS):
        pool = weights(number, NUM_SHARDS).pool
        old, (layer, at) = pool.table, expert
        holders = [old.shards[holder] for holder in old.holders(expert)]
        new = old if shard in holders else old.with_replica(expert, shard)
        for other in () if is_copy else holders:
            new = new.without_replica(expert, other) if other != shard else new
        _publish(pool, new.renewed() if new is old else new, {shard: (layer, at, holders[0])})


def settle() -> None:
    """All experts where they were at first."""
    for number in range(NUM_WEIGHTS):
        pool = weights(number, NUM_SHARDS).pool
        first = PlacementTable.spread(CONFIG.moe_layers, CONFIG.num_experts, pool.table.shards)
        if pool.table.replicas != first.replicas:
            for layer in first.layers:
                for at in range(CONFIG.num_experts):
                    [home] = first.holders((layer, at))
                    move((layer, at), first.shards[home], is_copy=False)


def _publish(pool: ExpertPool, table: PlacementTable, copies: dict[str, tuple[int, int, str]]) -> None:
    shards = pool.transport.shards
    for shard, (layer, at, source) in copies.items():
        if at not in pool.table.experts_of(shard).get(layer, ()):
            message = Copy(layer, (at,), (source,), 0, float("inf"), 0, table.epoch)
            migrate_in(shards[shard], message, pool.transport, None)
    pool.view.table = table
    for name, shard in shards.items():
        shard.prune_to(PruneTo(table.experts_of(name), table.epoch))


class Adapters:
    """Adapters of all matrices, in a folder that goes with them."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._made = [self._one(f"adapter-{at}", at) for at in range(NUM_ADAPTERS)]

    def _one(self, name: str, seed: int) -> BackboneAdapter:
        path = str(write_adapter(self._folder / name, CONFIG, seed, size=0.2))
        return backbone_adapter(AdapterRef(name, examined(path, CONFIG, None).adapter.content, path), CONFIG, "cpu")

    def get(self, at: int | None) -> BackboneAdapter | None:
        return None if at is None else self._made[at]

    def close(self) -> None:
        shutil.rmtree(self._folder)


class Run:
    """Weights of a run that goes on. A version's are of a number; a step that the run went back behind comes again, with
    others. Who holds a version is counted, by its name."""

    def __init__(self) -> None:
        self.version, self.holders = named(1, 1), Counter[tuple[str, int]]()
        self.lost, self._gone = set[int](), set[int]()  # though held; because nobody did
        self._made, self._numbers = 1, {self.version: 1}
        self._checkpoints = {1: 1}  # of the last weights of each step

    def number(self, version: int) -> int:
        return self._numbers.get(version, 0)  # an answer that was given up before it began has none

    def line(self, version: int) -> str:
        return f"line {line_of(version)}"

    def commit(self) -> None:
        self._made += 1
        self._become(line_of(self.version), step_of(self.version) + 1, self._made % NUM_WEIGHTS)

    def go_back(self, num_steps: int) -> None:
        """To a checkpoint of an earlier step, for good: others follow, and whatever was held of the steps before is lost."""
        step = max(1, step_of(self.version) - num_steps)
        self.lost.update(version for (_, version), num in self.holders.items() if num)
        self._become(line_of(self.version) + 1, step, self._checkpoints[step])

    def _become(self, line: int, step: int, number: int) -> None:
        self.version = named(line, step)
        self._numbers[self.version] = self._checkpoints[step] = number
        for each in (self.lost, self._gone):
            each.discard(self.version)  # comes again, where a line is no part of its name

    def lose(self) -> None:
        """An old version that is held goes all the same."""
        old = sorted({version for (_, version), num in self.holders.items() if num and version < self.version})
        self.lost.update(old[:1])

    def hold(self, name: str, version: int) -> None:
        if version != self.version and not any(num for (_, held), num in self.holders.items() if held == version):
            self._gone.add(version)
        self.holders[name, version] += 1

    def release(self, name: str, version: int) -> None:
        self.holders[name, version] -= 1
        assert self.holders[name, version] >= 0, "a version was released more often than held"

    def drop(self, name: str) -> None:
        """Whoever has that name is gone, with what it holds."""
        for key in [key for key in self.holders if key[0] == name]:
            del self.holders[key]

    def model(self, name: str, version: int) -> CausalLM:
        if version in self.lost | self._gone and version != self.version:
            raise VersionGone(f"version {version} has gone")
        assert version == self.version or self.holders[name, version], "an old version is used and not held"
        return weights(self.number(version), NUM_SHARDS).model


class Source:
    """A WeightSource of one engine."""

    def __init__(self, run: Run, name: str):
        self.run, self.name = run, name

    def newest(self) -> int:
        return self.run.version

    def model(self, version: int) -> CausalLM:
        return self.run.model(self.name, version)

    def hold(self, version: int) -> None:
        self.run.hold(self.name, version)

    def release(self, version: int) -> None:
        self.run.release(self.name, version)

    def quarantine(self, version: int) -> None:
        raise AssertionError(f"version {version} is sound")
