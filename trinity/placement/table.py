"""The placement table: which shards hold a replica of which expert. Frozen; every change is a new table and epoch.

Legend: L layers with routed experts, E experts of a layer, S shards, N replicas of one expert.
The trainer, the server, the balancer and the recovery code all read this one value.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from trinity.errors import ConfigError

Expert = tuple[int, int]  # (layer, index), as in the checkpoint


@dataclass(frozen=True)
class PlacementTable:
    """`replicas[l][e]` are the positions in `shards` that hold expert (layers[l], e), the first being its primary.

    Invariants, checked on construction: every expert has a replica; no shard holds one expert twice; positions exist.
    """

    epoch: int
    shards: tuple[str, ...]
    layers: tuple[int, ...]
    replicas: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        if len(set(self.shards)) != len(self.shards):
            raise ConfigError(f"placement epoch {self.epoch}: shard names repeat: {', '.join(self.shards)}")
        if len(self.replicas) != len(self.layers):
            raise ConfigError(f"placement epoch {self.epoch}: {len(self.replicas)} rows for {len(self.layers)} layers")
        for layer, experts in zip(self.layers, self.replicas, strict=True):
            for expert, held in enumerate(experts):
                self._check(layer, expert, held)

    def _check(self, layer: int, expert: int, held: tuple[int, ...]) -> None:
        where = f"placement epoch {self.epoch}: expert ({layer}, {expert})"
        if not held:
            raise ConfigError(f"{where} has no replica; every expert needs at least one")
        if len(set(held)) != len(held):
            raise ConfigError(f"{where} has two replicas on one shard: {held}")
        if not all(0 <= s < len(self.shards) for s in held):
            raise ConfigError(f"{where} names shard position {max(held)} of {len(self.shards)}")

    @classmethod
    def spread(cls, layers: Iterable[int], num_experts: int, shards: Iterable[str], epoch: int = 1) -> "PlacementTable":
        """One replica of each expert, contiguous ranges of nearly equal size."""
        names = tuple(shards)
        if not 1 <= len(names) <= num_experts:
            raise ConfigError(f"{len(names)} shards for {num_experts} experts a layer; use 1 to {num_experts} shards")
        row = tuple((e * len(names) // num_experts,) for e in range(num_experts))
        layers = tuple(layers)
        return cls(epoch, names, layers, (row,) * len(layers))

    def with_replica(self, expert: Expert, shard: str) -> "PlacementTable":
        """The next epoch, with one more replica of `expert`, on `shard`."""
        held = self.holders(expert)
        return self._with(expert, (*held, self.shards.index(shard)))

    def without_replica(self, expert: Expert, shard: str) -> "PlacementTable":
        """The next epoch, with the replica of `expert` on `shard` gone."""
        return self._with(expert, tuple(s for s in self.holders(expert) if s != self.shards.index(shard)))

    def holders(self, expert: Expert) -> tuple[int, ...]:
        layer, index = expert
        return self.replicas[self.layers.index(layer)][index]

    def experts_of(self, shard: str) -> dict[int, tuple[int, ...]]:
        """layer -> ascending expert indices held by `shard`."""
        position = self.shards.index(shard)
        return {
            layer: tuple(e for e, held in enumerate(row) if position in held)
            for layer, row in zip(self.layers, self.replicas, strict=True)
        }

    def primaries_of(self, shard: str) -> dict[int, tuple[int, ...]]:
        """layer -> the experts whose first replica is on `shard`: the ones it writes to a checkpoint."""
        position = self.shards.index(shard)
        return {
            layer: tuple(e for e, held in enumerate(row) if held[0] == position)
            for layer, row in zip(self.layers, self.replicas, strict=True)
        }

    @property
    def num_experts(self) -> int:
        return len(self.replicas[0]) if self.replicas else 0

    @cached_property
    def num_replicas_LE(self) -> np.ndarray:
        """int64 [L, E]."""
        return np.array([[len(held) for held in row] for row in self.replicas], dtype=np.int64)

    @cached_property
    def shard_LEN(self) -> np.ndarray:
        """int64 [L, E, N]: shard position of the n-th replica; past the last one the list starts again."""
        most = int(self.num_replicas_LE.max(initial=1))
        return np.array(
            [[[held[n % len(held)] for n in range(most)] for held in row] for row in self.replicas], dtype=np.int64
        )

    def to_json(self) -> str:
        return json.dumps(
            {"epoch": self.epoch, "shards": self.shards, "layers": self.layers, "replicas": self.replicas},
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> "PlacementTable":
        tree: Mapping = json.loads(text)
        replicas = tuple(tuple(tuple(held) for held in row) for row in tree["replicas"])
        return cls(int(tree["epoch"]), tuple(tree["shards"]), tuple(tree["layers"]), replicas)

    def _with(self, expert: Expert, held: tuple[int, ...]) -> "PlacementTable":
        layer, index = expert
        at = self.layers.index(layer)
        row = (*self.replicas[at][:index], held, *self.replicas[at][index + 1 :])
        rows = (*self.replicas[:at], row, *self.replicas[at + 1 :])
        return replace(self, epoch=self.epoch + 1, replicas=rows)
