"""The placement table: which shards hold a replica of which expert. Frozen; every change is a new table and epoch.

Legend: L layers with routed experts, E experts of a layer, S shards, N replicas of one expert, X = L * E, R all replicas.
The trainer, the server, the balancer and the recovery code all read this one value.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

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
        if not self._is_sound():
            for layer, experts in zip(self.layers, self.replicas, strict=True):
                for expert, held in enumerate(experts):
                    self._check(layer, expert, held)

    def _is_sound(self) -> bool:
        """All invariants of all replicas at once: a large model has tens of thousands."""
        counts_X, shard_R = self.flat()
        if not ((counts_X > 0).all() and (shard_R >= 0).all() and (shard_R < len(self.shards)).all()):
            return False
        seen_XS = np.zeros((len(counts_X), len(self.shards)), dtype=bool)
        seen_XS[np.repeat(np.arange(len(counts_X)), counts_X), shard_R] = True
        return int(seen_XS.sum()) == len(shard_R)

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

    def num_hosts_LE(self, host_of: Mapping[str, str], only: Collection[str] | None = None) -> np.ndarray:
        """int64 [L, E]: hosts that have the expert. A shard whose host is not known counts as one of its own. `only`: as if
        other shards had none."""
        names = [host_of.get(shard) or shard for shard in self.shards]
        hosts = {name: i for i, name in enumerate(dict.fromkeys(names))}
        counts_X, shard_R = self.flat()
        has_XH = np.zeros((len(counts_X), len(hosts)), dtype=bool)
        counts_R = np.array([only is None or shard in only for shard in self.shards])[shard_R]
        has_XH[np.repeat(np.arange(len(counts_X)), counts_X), np.array([hosts[name] for name in names])[shard_R]] |= (
            counts_R
        )
        num_LE: np.ndarray = has_XH.sum(1).reshape(len(self.layers), self.num_experts)
        return num_LE

    def renewed(self) -> "PlacementTable":
        """The next epoch, with everything where it is: an epoch that shards were told of is never used for another table."""
        return replace(self, epoch=self.epoch + 1)

    def with_replica(self, expert: Expert, shard: str) -> "PlacementTable":
        """The next epoch, with one more replica of `expert`, on `shard`."""
        held = self.holders(expert)
        return self._with(expert, (*held, self.shards.index(shard)))

    def without_replica(self, expert: Expert, shard: str) -> "PlacementTable":
        """The next epoch, with the replica of `expert` on `shard` gone."""
        return self._with(expert, tuple(s for s in self.holders(expert) if s != self.shards.index(shard)))

    def without_shards(self, names: Collection[str]) -> "PlacementTable | None":
        """The next epoch, without these shards and what they hold; None where an expert is on no other."""
        left = tuple(shard for shard in self.shards if shard not in names)
        at = {self.shards.index(shard): position for position, shard in enumerate(left)}
        rows = tuple(tuple(tuple(at[s] for s in held if s in at) for held in row) for row in self.replicas)
        if not all(held for row in rows for held in row):
            return None
        return replace(self, epoch=self.epoch + 1, shards=left, replicas=rows)

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

    @cached_property
    def shared(self) -> dict[int, dict[int, tuple[str, ...]]]:
        """layer -> expert -> its shards, the primary first, of experts that several shards hold."""
        rows = zip(self.layers, self.replicas, strict=True)
        several = {
            n: {e: tuple(self.shards[at] for at in h) for e, h in enumerate(row) if len(h) > 1} for n, row in rows
        }
        return {layer: experts for layer, experts in several.items() if experts}

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [L * E] replicas of each expert; int64 [R] the shard positions of all of them, one expert after another."""
        held = list(chain.from_iterable(self.replicas))
        counts_X = np.fromiter(map(len, held), np.int64, len(held))
        return counts_X, np.fromiter(chain.from_iterable(held), np.int64, int(counts_X.sum()))

    @property
    def num_experts(self) -> int:
        return len(self.replicas[0]) if self.replicas else 0

    @cached_property
    def num_replicas_LE(self) -> np.ndarray:
        """int64 [L, E]."""
        return self.flat()[0].reshape(len(self.layers), self.num_experts)

    @cached_property
    def shard_LEN(self) -> np.ndarray:
        """int64 [L, E, N]: shard position of the n-th replica; past the last one the list starts again."""
        counts_X, shard_R = self.flat()
        most = int(counts_X.max(initial=1))
        first_X = np.cumsum(counts_X) - counts_X
        shard_XN: np.ndarray = shard_R[first_X[:, None] + np.arange(most) % counts_X[:, None]]
        return shard_XN.reshape(len(self.layers), self.num_experts, most)

    def present(
        self, away: Collection[str] = (), distance_of: Mapping[str, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`shard_LEN` and `num_replicas_LE` of each expert's nearest replicas alone: those on shards that are away are farther
        than any other; without a distance a shard is near."""
        far = distance_of or {}
        distance_S = np.array([np.iinfo(np.int64).max if name in away else far.get(name, 0) for name in self.shards])
        if not distance_S.any():
            return self.shard_LEN, self.num_replicas_LE
        shard_LEN, num_LE = self.shard_LEN, self.num_replicas_LE
        is_real_LEN = np.arange(shard_LEN.shape[2]) < num_LE[..., None]
        least_LE1 = distance_S[shard_LEN].min(-1, initial=np.iinfo(np.int64).max, where=is_real_LEN, keepdims=True)
        is_here_LEN = is_real_LEN & (distance_S[shard_LEN] == least_LE1)
        order_LEN = np.argsort(~is_here_LEN, axis=-1, kind="stable")
        return np.take_along_axis(shard_LEN, order_LEN, -1), is_here_LEN.sum(-1)

    def to_json(self) -> str:
        return json.dumps(
            {"epoch": self.epoch, "shards": self.shards, "layers": self.layers, "replicas": self.replicas},
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> "PlacementTable":
        tree: Mapping[str, Any] = json.loads(text)
        replicas = tuple(tuple(tuple(held) for held in row) for row in tree["replicas"])
        return cls(int(tree["epoch"]), tuple(tree["shards"]), tuple(tree["layers"]), replicas)

    def _with(self, expert: Expert, held: tuple[int, ...]) -> "PlacementTable":
        layer, index = expert
        at = self.layers.index(layer)
        row = (*self.replicas[at][:index], held, *self.replicas[at][index + 1 :])
        rows = (*self.replicas[:at], row, *self.replicas[at + 1 :])
        return replace(self, epoch=self.epoch + 1, replicas=rows)
