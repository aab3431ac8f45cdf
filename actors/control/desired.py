"""Desired state of a pool, and the change that brings it there: frozen values and pure functions.

Legend: L layers, E experts of a layer.
`desired_change(table, seen, desired, rules)` is the whole of deciding; actors/control/reconciler.py looks, asks it, and has the
change made (actors/control/migration.py).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from actors.control.spreading import Relocation, num_apart, relocation
from trinity.config import turn_of
from trinity.errors import ConfigError
from trinity.placement.planner import PlanGoal, balance, plan, with_floor
from trinity.placement.table import PlacementTable
from trinity.placement.topology import Shard, Topology

ROOM = 1.25
MIN_ROWS = 1000.0  # per layer, in the window: with fewer, balance is chance
ANY_BALANCE = 1e-9
WHATEVER_ELSE = 0.985  # the balance to plan for where experts must move anyway


@dataclass(frozen=True)
class DesiredState:
    """Wishes of operators; they outlive the service. Replicas beyond what the settings' redundancy asks for."""

    num_shards: int
    drained: tuple[str, ...] = ()
    replicas: tuple[tuple[int, int, int], ...] = ()  # layer, expert, how many
    next_name: int = 0
    reason: str = "start"

    @classmethod
    def of(cls, table: PlacementTable) -> "DesiredState":
        """State of a new pool: what it is."""
        return cls(len(table.shards), next_name=len(table.shards))

    def with_shards(self, num_shards: int, table: PlacementTable) -> "DesiredState":
        """Raises ConfigError, as the two below, for what can never be."""
        if not 1 <= num_shards <= table.num_experts:
            raise ConfigError(f"{num_shards} shards for {table.num_experts} experts a layer; ask for 1 to that many")
        return replace(self, num_shards=num_shards)

    def without(self, shard: str, table: PlacementTable) -> "DesiredState":
        """One shard fewer, and it is this one. Harmless when repeated."""
        if shard in self.drained:
            return self
        if shard not in table.shards:
            raise ConfigError(f"there is no shard {shard!r}; there are: {', '.join(table.shards)}")
        if self.num_shards < 2:
            raise ConfigError(f"{shard} is the last shard; add another one before it is drained")
        return replace(self, drained=(*self.drained, shard), num_shards=self.num_shards - 1)

    def with_replicas(self, layer: int, expert: int, num_replicas: int, table: PlacementTable) -> "DesiredState":
        if layer not in table.layers or not 0 <= expert < table.num_experts:
            raise ConfigError(
                f"there is no expert ({layer}, {expert}); layers {table.layers}, experts 0 to {table.num_experts - 1}"
            )
        if not 1 <= num_replicas <= len(table.shards):
            raise ConfigError(
                f"{num_replicas} replicas on {len(table.shards)} shards; ask for 1 to that many, or add shards first"
            )
        others = (each for each in self.replicas if each[:2] != (layer, expert))
        return replace(self, replicas=(*others, (layer, expert, num_replicas)))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "DesiredState":
        tree = json.loads(text)
        pairs = {"drained": tuple(tree["drained"]), "replicas": tuple(tuple(each) for each in tree["replicas"])}
        return cls(**{**tree, **pairs})


@dataclass(frozen=True)
class Rules:
    """The settings that deciding knows."""

    redundancy: int = 0
    experts_per_layer: int | None = None
    balance_goal: float = 0.9
    bytes_by_form: tuple[int, ...] = (1,)  # of a replica, of several each shard's by its number


@dataclass(frozen=True, eq=False)
class Seen:
    """The pool when it was last looked at."""

    load_LE: np.ndarray  # rows per second
    rows_in_window: float = math.inf
    node_of: Mapping[str, str] = field(default_factory=dict)  # of shards that were seen
    lost: frozenset[str] = frozenset()  # shards that have been away for too long
    leaving_nodes: frozenset[str] = frozenset()  # nodes that will be gone by a deadline
    scaled_LE: np.ndarray | None = None  # replicas that the load asks for, at least
    may_balance: bool = False  # it is time to look for better places
    must_balance: bool = False  # somebody asked for it
    may_spread: bool = False  # it is time to look for nodes that replicas do not share
    roomy_nodes: frozenset[str] = frozenset()  # nodes on which one more shard could be
    spares: tuple[str, ...] = ()  # shards that have been started, and no table names yet


@dataclass(frozen=True)
class Change:
    """The table that is wanted, the shards that are new in it, and why."""

    table: PlacementTable
    fresh: tuple[str, ...]
    reason: str
    node: str | None = None  # where the fresh shards are to be; None: wherever there is room


def desired_change(table: PlacementTable, seen: Seen, desired: DesiredState, rules: Rules) -> Change | None:
    """Return what to change next; None: all is well. Raises ConfigError where experts have no room.

    Shards that are lost are left out at once where others hold all that they held: nothing is copied, and what is to come in
    their place may find no room for long."""
    if (gone := seen.lost & set(table.shards)) and (rest := table.without_shards(gone)):
        return Change(rest, (), "lost")
    leaving, moved = leaving_shards(table, seen, desired), None
    if not leaving and seen.may_spread and len(table.shards) == desired.num_shards:
        moved = relocation(table, seen.node_of, seen.roomy_nodes, rules.redundancy)
        leaving = (moved.shard,) if moved else ()
    fresh = fresh_names(desired, len(table.shards) - len(leaving), seen.spares)
    num_shards = len(table.shards) - len(leaving) + len(fresh)
    replicas_LE = wanted_replicas_LE(table, seen, desired, rules, num_shards)
    same = not leaving and not fresh and bool((replicas_LE == table.num_replicas_LE).all())
    if same and not is_worth_balancing(table, seen, rules):
        return parted(table, seen, replicas_LE, rules) if seen.may_spread else None
    found = plan(
        with_floor(seen.load_LE * (same or has_seen_enough(table, seen))),
        _topology(table, seen, leaving, fresh, _rooms(replicas_LE, num_shards, rules), moved),
        table,
        PlanGoal(goal=rules.balance_goal if same else WHATEVER_ELSE),
        replicas_LE=replicas_LE,
    )
    if found is table:
        return None
    if moved:
        return Change(found, fresh, "spread", moved.node)
    return Change(found, fresh, "balance" if same else desired.reason)


def leaving_shards(table: PlacementTable, seen: Seen, desired: DesiredState) -> tuple[str, ...]:
    """Shards to be emptied: those asked for, those on nodes that will go, those that do not come back, and the newest of
    what is too many."""
    gone = {
        shard
        for shard in table.shards
        if shard in desired.drained or shard in seen.lost or seen.node_of.get(shard, "") in seen.leaving_nodes
    }
    left = [name for name in table.shards if name not in gone]
    return (*sorted(gone), *left[desired.num_shards :])


def fresh_names(desired: DesiredState, num_staying: int, spares: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the shards to be added: of spares, then of shards to be made; never one that was used before."""
    num = max(0, desired.num_shards - num_staying)
    return (*spares[:num], *(f"shard-{desired.next_name + i}" for i in range(num - len(spares))))


def wanted_replicas_LE(
    table: PlacementTable, seen: Seen, desired: DesiredState, rules: Rules, num_shards: int
) -> np.ndarray:
    least = 1 + rules.redundancy
    counts_LE = np.full((len(table.layers), table.num_experts), least)
    if seen.scaled_LE is not None:
        counts_LE = np.maximum(counts_LE, seen.scaled_LE)
    for layer, expert, num in desired.replicas:
        counts_LE[table.layers.index(layer), expert] = max(num, least)
    return np.minimum(counts_LE, num_shards)


def is_worth_balancing(table: PlacementTable, seen: Seen, rules: Rules) -> bool:
    if seen.must_balance:
        return True
    may = seen.may_balance and has_seen_enough(table, seen)
    return may and balance(with_floor(seen.load_LE), table).overall < rules.balance_goal


def parted(table: PlacementTable, seen: Seen, replicas_LE: np.ndarray, rules: Rules) -> Change | None:
    """Return the change that brings experts to more nodes, with the shards that are there; None where none does. The load is no
    reason for anything here."""
    num_before = num_apart(table, seen.node_of, rules.redundancy)
    if num_before is None:
        return None
    topology = _topology(table, seen, (), (), _rooms(replicas_LE, len(table.shards), rules), None)
    found = plan(np.ones_like(seen.load_LE), topology, table, PlanGoal(goal=ANY_BALANCE), replicas_LE=replicas_LE)
    num_after = num_apart(found, seen.node_of, rules.redundancy)
    return Change(found, (), "spread") if num_after is None or num_after > num_before else None


def has_seen_enough(table: PlacementTable, seen: Seen) -> bool:
    """Say whether shares of rows mean something; with fewer they are chance, and all experts count the same."""
    return seen.rows_in_window >= MIN_ROWS * len(table.layers)


def _rooms(replicas_LE: np.ndarray, num_shards: int, rules: Rules) -> Callable[[str], int]:
    """Experts of a layer that each shard may hold: rows are not all that is to be even, memory is bounded. Where forms differ,
    all have the bytes of a shard whose experts are the largest."""
    if rules.experts_per_layer:
        return lambda shard: rules.experts_per_layer or 0
    even, most = math.ceil(int(replicas_LE.sum(axis=1).max(initial=0)) / num_shards), max(rules.bytes_by_form)
    room, num_experts = math.ceil(ROOM * even), replicas_LE.shape[1]
    return lambda shard: min(num_experts, room * most // (turn_of(shard, rules.bytes_by_form) or most))


def _topology(
    table: PlacementTable,
    seen: Seen,
    leaving: tuple[str, ...],
    fresh: tuple[str, ...],
    room_of: Callable[[str], int],
    moved: Relocation | None,
) -> Topology:
    """New shards are taken to be on hosts of their own until they are seen, unless it is said where they are to be."""
    known = [Shard(s, seen.node_of.get(s) or s, slots=room_of(s), draining=s in leaving) for s in table.shards]
    new = (Shard(name, moved.node if moved else name, slots=room_of(name)) for name in fresh)
    return Topology((*known, *new))
