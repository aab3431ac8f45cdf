"""States of the small model of the control protocol: what there is at one moment, and the bounds of an exploration."""

import json
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from tests.unit.protocol_parts import Call, ShardState
from trinity.placement.table import PlacementTable


class Process(NamedTuple):
    """A shard's process. `heard`: of a decision, while it starts."""

    name: str
    state: ShardState
    is_up: bool = True
    heard: tuple[int, int] | None = None
    wire: frozenset[Call] = frozenset()
    is_cut_off: bool = False

    @property
    def shown(self) -> str:
        return f"the old process of {self.name}" if self.is_cut_off else self.name


class Trainer(NamedTuple):
    """`phase`: start, idle, begin, rows, prepare, stage, decide. `heard`: shards whose answer to it has come."""

    phase: str
    version: int
    attempt: int = 0
    table: PlacementTable | None = None
    heard: frozenset[str] = frozenset()


class Move(NamedTuple):
    """A change of the placement under way. `phase`: drop, copy, older, publish."""

    phase: str
    expert: int
    source: str
    target: str
    version: int
    table: PlacementTable


class World(NamedTuple):
    record: str  # the ledger's file
    lineage: tuple[int, ...]  # the attempts that decided steps 1, 2, ...
    history: tuple[tuple[PlacementTable, int], ...]  # what callers have heard, the newest last
    processes: tuple[Process, ...]
    trainers: tuple[Trainer, ...]
    cut_off: tuple[Process, ...] = ()  # replaced, and still alive
    was_cut: bool = False  # that host's memory is lost; another would be one too many
    move: Move | None = None
    todo: tuple[tuple[int, str], ...] = ()  # moves that are wanted: expert, target
    faults: int = 0
    wrong: str = ""  # what must never happen, and did

    @property
    def table(self) -> PlacementTable:
        return self.history[-1][0]


class Step(NamedTuple):
    label: str
    world: World
    is_fault: bool = False


@dataclass(frozen=True)
class Setting:
    """Bounds of an exploration. `replicas`: the positions in `shards` that hold each expert."""

    shards: tuple[str, ...] = ("a",)
    replicas: tuple[tuple[int, ...], ...] = ((0,), (0,))
    num_steps: int = 2
    num_faults: int = 1
    faults: tuple[str, ...] = ("kill", "give up", "replace")
    moves: tuple[tuple[int, str], ...] = ()
    late_is_fault: bool = False  # what comes again or late costs one, but for what the sender does not wait for
    looks_again: bool = True  # a trainer that cannot go on from what was decided: is there a newer decision?
    wires_end: bool = True  # with their process
    cuts_any_time: bool = False  # also between a shard's word that a step is staged and the decision
    old_commits: bool = False  # a process that was cut off, at the word of a caller who reaches it
    hears_both: bool = True  # a caller hears of a version not before its table


@cache
def decided(record: str) -> tuple[int, int]:
    """Version that was decided last, and by which attempt."""
    found = json.loads(record)["decision"]
    return found["version"], found["notes"].get("attempt", 0)
