"""Hardware to place experts on: shards, their room, speed and hosts. Frozen values, checked on construction.

Legend: L layers, S shards, E experts of a layer.
Decisions: room is counted in whole experts of one layer, because a plan is made layer by layer. A bound in bytes is over all
layers and is dealt out evenly; what is left over goes to the layers that have the least room, by a rule that knows no
loads, so that room does not wander between two plans.
"""

from collections import Counter
from dataclasses import dataclass
from math import isfinite

import numpy as np

from trinity.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """One shard. `slots` bounds its experts in each layer, `memory_bytes` in all layers; at least one must be given.

    `capacity` is its relative speed: of two shards with 1.0 and 2.0 the second should get twice the rows.
    A `draining` shard gets nothing and is emptied. Shards on one `host` fail together.
    """

    name: str
    host: str = "localhost"
    slots: int | None = None
    memory_bytes: int | None = None
    capacity: float = 1.0
    draining: bool = False

    def __post_init__(self) -> None:
        if self.slots is None and self.memory_bytes is None:
            raise ConfigError(f"shard {self.name} has no bound; give slots (experts per layer) or memory_bytes")
        for what in ("slots", "memory_bytes"):
            value = getattr(self, what)
            if value is not None and value < 0:
                raise ConfigError(f"shard {self.name} has {what} {value}; use 0 or more")
        if not (isfinite(self.capacity) and self.capacity > 0):
            raise ConfigError(f"shard {self.name} has capacity {self.capacity}; use a number above 0, such as 1.0")


@dataclass(frozen=True)
class Topology:
    """All shards that exist, in any order. `expert_bytes` is what one replica takes with all that travels with it."""

    shards: tuple[Shard, ...]
    expert_bytes: int = 1

    def __post_init__(self) -> None:
        if self.expert_bytes < 1:
            raise ConfigError(f"an expert has {self.expert_bytes} bytes; use 1 or more")
        twice = [name for name, times in Counter(shard.name for shard in self.shards).items() if times > 1]
        if twice:
            raise ConfigError(f"shard names repeat: {', '.join(twice)}; give each shard a name of its own")
        if not self.usable:
            raise ConfigError(f"none of {len(self.shards)} shards may hold experts; add one that is not draining")

    @property
    def usable(self) -> tuple[Shard, ...]:
        """The shards that may hold experts."""
        return tuple(shard for shard in self.shards if not shard.draining)

    def ordered(self, first: tuple[str, ...] = ()) -> tuple[Shard, ...]:
        """The usable shards: those named in `first` in that order, then the others, so that positions stay."""
        by_name = {shard.name: shard for shard in self.usable}
        known = [by_name.pop(name) for name in first if name in by_name]
        return (*known, *by_name.values())

    def slots_LS(self, shards: tuple[Shard, ...], num_layers: int, num_experts: int) -> np.ndarray:
        """int64 [L, S]: how many experts of each layer each shard may hold; never more than there are.

        Raises ConfigError when a layer's experts do not fit once.
        """
        slots_LS = np.zeros((num_layers, len(shards)), dtype=np.int64)
        for s, shard in enumerate(shards):
            slots_LS[:, s] = self._room_L(shard, slots_LS.sum(1), num_experts)
        short = np.flatnonzero(slots_LS.sum(1) < num_experts)
        if short.size:
            have = int(slots_LS[short[0]].sum())
            raise ConfigError(
                f"{len(shards)} shards have room for {have} experts in {short.size} of {num_layers} layers, "
                f"which have {num_experts}; add shards, or raise their slots or memory_bytes"
            )
        return slots_LS

    def _room_L(self, shard: Shard, room_L: np.ndarray, num_experts: int) -> np.ndarray:
        """Room of one shard; `room_L` is what the shards before it have."""
        most = num_experts if shard.slots is None else min(shard.slots, num_experts)
        if shard.memory_bytes is None:
            return np.full(len(room_L), most)
        each, left = divmod(shard.memory_bytes // self.expert_bytes, max(1, len(room_L)))
        more_L = np.zeros(len(room_L), dtype=np.int64)
        more_L[np.argsort(room_L, kind="stable")[:left]] = 1
        return np.minimum(each + more_L, most)
