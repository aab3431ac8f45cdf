"""New shards for a change that is wanted. They start while all else goes on, steps too: Ray may have no room for them, and
nobody waits for that."""

import time
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, Protocol

import ray

from actors.names import ask
from trinity.errors import Unavailable

SAID_S = 1.0  # for an answer that is there


class Starts(Protocol):
    """Whoever starts and ends them (actors/control/shards.py)."""

    def start(self, name: str, node: str | None) -> Any: ...

    def end(self, name: str) -> None: ...


class Spare(NamedTuple):
    """A shard that was asked for, on that node (None: anywhere), and the answer that it gives once it is there."""

    where: Any
    node: str | None
    since_s: float


class Spares:
    """Shards that no table names yet. Owned by one thread; others may read the names."""

    def __init__(self, shards: Starts, within_s: float):
        self._shards, self._within_s, self._all = shards, within_s, dict[str, Spare]()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._all)

    @property
    def nodes(self) -> frozenset[str]:
        """Nodes that they were asked for: they have the room there."""
        return frozenset(spare.node for spare in self._all.values() if spare.node)

    def start(self, names: Iterable[str], node: str | None) -> None:
        for name in names:
            self._all[name] = Spare(self._shards.start(name, node).where.remote(), node, time.monotonic())

    def are_there(self, names: Collection[str]) -> bool:
        """Say whether all of them have started. Raises Unavailable for one that has not in time, or never will."""
        for name in names:
            spare = self._all[name]
            if not ray.wait([spare.where], timeout=0)[0]:
                self._check_time(name, spare)
                return False
            ask(spare.where, SAID_S, f"the new shard {name}")
        return True

    def keep_only(self, names: Collection[str]) -> None:
        """End the others: they are not wanted any more."""
        for name in set(self._all) - set(names):
            del self._all[name]
            self._shards.end(name)

    def give(self, names: Iterable[str]) -> None:
        """Give them away, to a change that is made now."""
        for name in names:
            self._all.pop(name, None)

    def _check_time(self, name: str, spare: Spare) -> None:
        if time.monotonic() - spare.since_s > self._within_s:
            raise Unavailable(
                f"the new shard {name} has not started within {self._within_s:.0f} s (placement.ready_timeout_s); has any "
                "node room for another one (placement.resources, num_cpus_per_shard, num_gpus_per_shard)?"
            )
