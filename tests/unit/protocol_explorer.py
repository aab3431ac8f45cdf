"""Exhaustive search of a small protocol: every state within the bounds, what must never be, and whether all can still end well.

`explore` goes breadth first from the initial state, each state once, so that a trace that it finds is a shortest one. What it
shows is true of all states within the setting's bounds, and of nothing beyond them.
"""

from collections import deque
from typing import NamedTuple

from tests.unit.protocol_parts import EXPERTS, LAYER, Call
from tests.unit.protocol_states import Process, World, decided
from tests.unit.protocol_world import Protocol


class Found(NamedTuple):
    """`violation`: "" if none; then `trace` has the labels of the steps to it."""

    num_states: int
    num_steps: int
    violation: str = ""
    trace: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        return "\n".join((f"{self.violation}, after {len(self.trace)} steps:", *self.trace))


def explore(protocol: Protocol, most: int = 10**7) -> Found:
    """Look at every state. Safety first: the search ends at the first violation. Liveness then: from every state a good one
    must be reachable by steps that are no faults."""
    first = protocol.initial()
    came: dict[World, tuple[World, str] | None] = {first: None}
    back: dict[World, list[World]] = {}
    todo, good, num_steps = deque([first]), [], 0
    while todo:
        world = todo.popleft()
        wrong = violation(protocol, world)
        if wrong or len(came) > most:
            return Found(len(came), num_steps, wrong or "too many states", _trace(came, world))
        if is_good(protocol, world):
            good.append(world)
        for step in protocol.steps(world):
            num_steps += 1
            if not step.is_fault:
                back.setdefault(step.world, []).append(world)
            if step.world not in came:
                came[step.world] = world, step.label
                todo.append(step.world)
    stuck = came.keys() - _reaching(good, back)
    shortest = next((world for world in came if world in stuck), None)
    if shortest is not None:
        return Found(len(came), num_steps, "no good state can be reached from here", _trace(came, shortest))
    return Found(len(came), num_steps)


def _reaching(good: list[World], back: dict[World, list[World]]) -> set[World]:
    """States from which one of the good ones can be reached."""
    found, todo = set(good), list(good)
    while todo:
        for world in back.get(todo.pop(), ()):
            if world not in found:
                found.add(world)
                todo.append(world)
    return found


def _trace(came: dict, world: World) -> tuple[str, ...]:
    labels = []
    while (step := came[world]) is not None:
        world, label = step
        labels.append(label)
    return tuple(reversed(labels))


def violation(protocol: Protocol, world: World) -> str:
    """Say what must never be, and is in this state; "" if nothing."""
    if world.wrong:
        return world.wrong
    version = decided(world.record)[0]
    if version != len(world.lineage):
        return f"version {version} is decided after {len(world.lineage)} steps"
    return next((text for process in world.processes if (text := _wrong_on(protocol, world, process))), "") or next(
        (f"expert {e} of version {version} is lost" for e in EXPERTS if not _is_kept(protocol, world, e)), ""
    )


def _wrong_on(protocol: Protocol, world: World, process: Process) -> str:
    """What a shard's present version, of the experts that the table gives it, must not be."""
    number = process.state.number
    if number > len(world.lineage):
        return f"{process.name} has committed version {number}, which is not decided"
    mine = world.table.experts_of(process.name)[LAYER]
    right = protocol.parts.truth(world.lineage[: max(number, 0)])
    held = next((h.experts for h in process.state.versions if h.number == number), ())
    bad = [e for e, content in held if e in mine and content != right[e][0]]
    return f"{process.name} has another content of experts {bad} at version {number} than was decided" if bad else ""


def _is_kept(protocol: Protocol, world: World, expert: int) -> bool:
    """Say whether a shard that the table names for the expert has the decided version of it, staged or committed."""
    version, right = len(world.lineage), protocol.parts.truth(world.lineage)[expert][0]
    holders = {world.table.shards[at] for at in world.table.holders((LAYER, expert))}
    return version == 0 or any(
        (expert, right) in held.experts and held.number == version
        for process in world.processes
        if process.name in holders
        for held in process.state.versions
    )


def is_good(protocol: Protocol, world: World) -> bool:
    """Say whether the last step is decided and committed everywhere, and a caller with the newest table gets its rows."""
    version = decided(world.record)[0]
    if version < protocol.setting.num_steps or world.move or any(p.state.number != version for p in world.processes):
        return False
    return all(_answers(protocol, world, expert, version) for expert in EXPERTS)


def _answers(protocol: Protocol, world: World, expert: int, version: int) -> bool:
    call = Call("infer", version, experts=(expert,))
    right = protocol.parts.truth(world.lineage)[expert][1]
    names = {world.table.shards[at] for at in world.table.holders((LAYER, expert))}
    asked = [p for p in world.processes if p.name in names]
    return all(p.is_up and protocol.parts.obey(p.name, call, p.state)[1].value == right for p in asked)
