"""Health as the control loop sees it: which shards answer, what they hold, how many rows each expert gets.

Legend: L layers, E experts of a layer.
Counters of rows only grow and start again with their process; the load is their rate, in an exponential window.
"""

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from actors.names import Handles, translate_ray_errors
from trinity.config import PlacementConfig
from trinity.errors import DeadlineExceeded, TrinityError
from trinity.placement.snapshot import ShardView
from trinity.placement.table import PlacementTable
from trinity.rpc.messages import ShardStatus, Status
from trinity.utils.trying import tried

MIN_WAIT_S = 1.0
ANSWER_S = 0.2  # for what has arrived
LATE = object()
MISSES = 3  # a shard may be busy for a while; one that is dead says so at once


@dataclass(frozen=True)
class ShardSeen:
    """A shard when it was last asked."""

    is_there: bool
    missed: int = 0
    since_s: float = 0.0  # time.monotonic() when it came or went
    node: str = ""
    pid: int = 0
    version: int = -1
    num_experts: int = 0
    weight_bytes: int = 0
    rows_per_s: float = 0.0
    expert_dtype: str = ""
    computes: str = ""
    held: dict[int, frozenset[int]] = field(default_factory=dict)


class Watch:
    def __init__(self, table: PlacementTable, window_s: float):
        self.window_s = window_s
        self.load_LE = np.zeros((len(table.layers), table.num_experts))  # rows per second
        self.seen: dict[str, ShardSeen] = {}
        self.num_recoveries = 0
        self._counts: dict[str, np.ndarray] = {}
        self._looked_s = time.monotonic()

    @property
    def there(self) -> frozenset[str]:
        return frozenset(name for name, seen in self.seen.items() if seen.is_there)

    @property
    def version(self) -> int:
        """The newest that any shard has; -1 without any."""
        return max((seen.version for seen in self.seen.values() if seen.is_there), default=-1)

    @property
    def node_of(self) -> dict[str, str]:
        return {name: seen.node for name, seen in self.seen.items()}

    def lost(self, after_s: float) -> frozenset[str]:
        """Shards that have been away for so long."""
        now_s = time.monotonic()
        return frozenset(n for n, seen in self.seen.items() if not seen.is_there and now_s - seen.since_s > after_s)

    def rows_in_window(self) -> float:
        return float(self.load_LE.sum()) * self.window_s

    def look(self, table: PlacementTable, handles: Handles, timeout_s: float) -> None:
        """Ask every shard of the table, and wait a moment for those that are slow; who does not answer is away."""
        refs = {name: ref for name in table.shards if (ref := _asked(handles, name)) is not None}
        if refs:
            said = [status for status, _ in refs.values()]
            ray.wait(said, num_returns=len(said), timeout=max(MIN_WAIT_S, timeout_s))
        now_s = time.monotonic()
        elapsed_s, self._looked_s = max(1e-3, now_s - self._looked_s), now_s
        fresh_LE = np.zeros_like(self.load_LE)
        seen = {}
        for name in table.shards:
            found = _answer(name, refs.get(name))
            seen[name] = self._note(table, name, found, elapsed_s, fresh_LE)
        keep = math.exp(-elapsed_s / self.window_s)
        self.load_LE = keep * self.load_LE + (1 - keep) * fresh_LE
        self.seen = seen

    def _note(self, table: PlacementTable, name: str, found: Any, elapsed_s: float, fresh_LE: np.ndarray) -> ShardSeen:
        before = self.seen.get(name)
        if found is None or found is LATE:
            return self._missed(name, before, is_late=found is LATE)
        status, (node, pid) = found
        if before is not None and _was_elsewhere(before, node, pid):
            self.num_recoveries += 1
        rows_LE = self._new_rows(name, _counts(table, status)) / elapsed_s
        fresh_LE += rows_LE
        return ShardSeen(
            is_there=True,
            since_s=before.since_s if before and before.is_there else time.monotonic(),
            node=node,
            pid=pid,
            version=status.version,
            num_experts=status.num_experts,
            weight_bytes=status.weight_bytes,
            rows_per_s=float(rows_LE.sum()),
            expert_dtype=status.expert_dtype,
            computes=status.computes,
            held={layer: frozenset(rows) for layer, rows in status.rows.items()},
        )

    def _missed(self, name: str, before: ShardSeen | None, is_late: bool) -> ShardSeen:
        missed = (before.missed if before else 0) + 1 if is_late else MISSES
        if missed >= MISSES:
            self._counts.pop(name, None)
        there = missed < MISSES and before is not None and before.is_there
        since_s = before.since_s if before and before.is_there == there else time.monotonic()
        return replace(before or ShardSeen(False), is_there=there, missed=missed, since_s=since_s, rows_per_s=0.0)

    def _new_rows(self, name: str, counts_LE: np.ndarray) -> np.ndarray:
        """Since it was last asked; none where that is not known."""
        old_LE = self._counts.get(name)
        self._counts[name] = counts_LE
        if old_LE is None:
            return np.zeros_like(counts_LE)
        return np.where(counts_LE >= old_LE, counts_LE - old_LE, counts_LE)


def _was_elsewhere(before: ShardSeen, node: str, pid: int) -> bool:
    """Say whether a shard that is there has started again since; one that only was slow to answer at first has not."""
    if not before.pid:
        return before.missed >= MISSES
    return not before.is_there or (before.node, before.pid) != (node, pid)


def shard_view(name: str, seen: ShardSeen | None, is_drained: bool) -> ShardView:
    """View of a shard, as operators see it."""
    if seen is None:
        return ShardView(name, "", "starting", -1, 0, 0, 0.0)
    state = "away" if not seen.is_there else "draining" if is_drained else "ready"
    known = (seen.version, seen.num_experts, seen.weight_bytes, seen.rows_per_s, seen.expert_dtype, seen.computes)
    return ShardView(name, seen.node, state, *known)


def _asked(handles: Handles, name: str) -> Any:
    """-> references of what it will say; None where there is no such actor."""
    actor = tried(lambda: handles[name], TrinityError)
    return None if isinstance(actor, TrinityError) else (actor.handle.remote("status", Status()), actor.where.remote())


def _answer(name: str, refs: Any) -> Any:
    """Its answer, LATE, or None where it is dead."""
    if refs is None:
        return None

    def got() -> Any:
        with translate_ray_errors(name):
            return ray.get(list(refs), timeout=ANSWER_S)

    found = tried(got, TrinityError, RayError)
    if isinstance(found, Exception):
        return LATE if isinstance(found, DeadlineExceeded) else None
    status, where = found
    return None if isinstance(status, TrinityError) else (status, where)


def _counts(table: PlacementTable, status: ShardStatus) -> np.ndarray:
    counts_LE = np.zeros((len(table.layers), table.num_experts))
    for at, layer in enumerate(table.layers):
        rows = status.rows.get(layer, {})
        counts_LE[at, list(rows)] = list(rows.values())
    return counts_LE


def draining_nodes() -> frozenset[str]:
    """Nodes that will be gone by a deadline that Ray was told: their experts must move before."""
    state = ray._private.state.state  # Ray has no public call for it (2.60)
    return frozenset(node.hex() if isinstance(node, bytes) else str(node) for node in state.get_draining_nodes())


def roomy_nodes(settings: PlacementConfig) -> frozenset[str]:
    """Nodes on which Ray could start one more shard, and which stay."""
    wanted = {"CPU": settings.num_cpus_per_shard, "GPU": settings.num_gpus_per_shard, **settings.resources}
    left = ray._private.state.available_resources_per_node()  # Ray has no public call for it (2.60)
    roomy = (n for n, free in left.items() if all(free.get(what, 0) >= num for what, num in wanted.items()))
    return frozenset(roomy) - draining_nodes()
