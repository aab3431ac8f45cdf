"""Small model of the control protocol: all that trainers, shards, moves and callers may do next, from any state.

Decisions: what a shard, the ledger and the table do is the real code's (protocol_parts.py); written here is only who sends
what when, as Trainer, Recovery, Migration and the placement service do, one message at a time. Messages: a call that was sent
lies on the wire of the process it went to, for good. From there it may come at any time, once more, late, or never; its
answer counts only for who still waits for it. A wire ends with its process. Callers: whoever heard of a table and a version
at one moment may ask by them at any later one. Faults cost; what costs nothing happens by itself sooner or later.
"""

from collections.abc import Iterator
from functools import cache

from tests.unit.protocol_parts import EXPERTS, LAYER, Answer, Call, Parts, ShardState
from tests.unit.protocol_states import Move, Process, Setting, Step, Trainer, World, decided
from trinity.placement.table import PlacementTable

NEXT = {"rows": "prepare", "prepare": "stage", "stage": "decide"}


class Protocol:
    """Steps of one setting over the real parts."""

    def __init__(self, parts: Parts, setting: Setting):
        self.parts, self.setting = parts, setting
        self._routed, self._left = cache(self._routed), cache(self._left)

    def initial(self) -> World:
        """Version 0 is loaded and decided; a trainer is about to begin."""
        setting = self.setting
        table = PlacementTable(1, setting.shards, (LAYER,), (setting.replicas,))
        record, _ = self.parts.ledger("", "begin", 0)
        made = (
            Process(s, self.parts.restarted(s, ShardState(), table.experts_of(s)[LAYER], (0, 0))) for s in table.shards
        )
        trainer = Trainer("idle", 0)
        return World(record, (), ((table, 0),), tuple(made), (trainer,), todo=setting.moves, faults=setting.num_faults)

    def steps(self, world: World) -> Iterator[Step]:
        """All that may happen next."""
        for at in range(len(world.trainers)):
            yield from self._trainer_steps(world, at)
        yield from self._move_steps(world)
        yield from self._start_steps(world)
        yield from self._repair_steps(world)
        yield from self._late_steps(world)
        yield from self._caller_steps(world)
        if world.faults:
            for step in self._fault_steps(world):
                yield step._replace(world=step.world._replace(faults=world.faults - 1), is_fault=True)

    # -- trainers

    def _trainer_steps(self, world: World, at: int) -> Iterator[Step]:
        trainer = world.trainers[at]
        if len(world.trainers) == 2 and at == 0:
            yield Step("the old trainer ends", world._replace(trainers=world.trainers[1:]))
        if trainer.phase == "idle" and trainer.version < self.setting.num_steps:
            after, label = self._begun(world, at), f"trainer {at} begins an attempt"
            is_old = at < len(world.trainers) - 1  # it was replaced, and does not know it yet
            if not is_old and not any(self._repair_steps(world)):
                yield Step(label, after)
            elif world.faults:  # else it might be tried in vain without end
                yield Step(label, after._replace(faults=world.faults - 1), is_fault=True)
        elif trainer.phase == "begin" and world.move is None:
            yield Step(f"trainer {at} has its ticket", self._with(world, at, self._entered(trainer, "rows", world)))
        elif trainer.phase == "decide":
            yield Step(f"trainer {at} decides", self._decided(world, at))
        elif trainer.phase in ("start", *NEXT):
            for shard in (trainer.table or world.table).shards:
                process = self._process(world, shard)
                if process is not None and process.is_up and shard not in trainer.heard:
                    yield Step(f"{shard} answers trainer {at}: {trainer.phase}", self._answered(world, at, shard))

    def _begun(self, world: World, at: int) -> World:
        trainer = world.trainers[at]
        record, answer = self.parts.ledger(world.record, "new_attempt", trainer.version)
        world = world._replace(record=record)
        if answer.error:  # it is tried until the job ends, and is started again
            return self._with(world, at, self._entered(trainer, "start", world))
        if world.todo and world.move is None:
            world = self._move_begun(world, trainer.version)
        return self._with(world, at, trainer._replace(phase="begin", attempt=answer.value))

    def _entered(self, trainer: Trainer, phase: str, world: World) -> Trainer:
        """The trainer at the beginning of a phase. It follows the newest table from the beginning of an attempt."""
        version = decided(world.record)[0] if phase == "start" else trainer.version
        table = world.table if phase in ("rows", "start") else trainer.table
        without = (s for s in table.shards if phase == "rows" and not self._routed(table, s))
        return Trainer(phase, version, trainer.attempt if phase != "idle" else 0, table, frozenset(without))

    def _with(self, world: World, at: int, trainer: Trainer) -> World:
        """The world with another state of a trainer, who sends what belongs to it."""
        trainers = (*world.trainers[:at], trainer, *world.trainers[at + 1 :])
        world = world._replace(trainers=trainers)
        for shard in set(trainer.table.shards) - trainer.heard if trainer.phase in NEXT else ():
            world = self._sent(world, shard, self._call(trainer, shard))
        return world

    def _call(self, trainer: Trainer, shard: str) -> Call:
        step, table = trainer.version + 1, trainer.table
        if trainer.phase == "start":
            return Call("commit", trainer.version)
        if trainer.phase == "rows":
            return Call("backward", step, trainer.attempt, table.epoch, self._routed(table, shard))
        shared = tuple(table.shared.get(LAYER, {}).items()) if trainer.phase == "prepare" else ()
        num_ops = int(trainer.phase == "stage" and bool(self._routed(table, shard)))
        return Call(trainer.phase, step, trainer.attempt, num_ops=num_ops, shared=shared)

    def _routed(self, table: PlacementTable, shard: str) -> tuple[int, ...]:
        """Experts of the rows that go to a shard: two rows for each, or one where another replica gets the other."""
        position = table.shards.index(shard)
        holders = {e: table.holders((LAYER, e)) for e in EXPERTS}
        return tuple(e for e in EXPERTS if position in holders[e] for _ in range(2 // len(holders[e])))

    def _answered(self, world: World, at: int, shard: str) -> World:
        trainer = world.trainers[at]
        world, answer = self._delivered(world, shard, self._call(trainer, shard))
        if not self._is_well(trainer, shard, answer):
            return self._failed(world, at, answer)
        heard = trainer.heard | {shard}
        if heard < set(trainer.table.shards):
            return self._with(world, at, trainer._replace(heard=heard))
        phase = NEXT.get(trainer.phase, "idle")
        return self._with(world, at, self._entered(trainer, phase, world))

    def _is_well(self, trainer: Trainer, shard: str, answer: Answer) -> bool:
        """Say whether it is what ExpertPool and Trainer go on from."""
        num_ops = bool(self._routed(trainer.table, shard))
        wanted = {"start": trainer.version, "rows": True, "prepare": num_ops, "stage": True}[trainer.phase]
        return not answer.error and answer.value == wanted

    def _failed(self, world: World, at: int, answer: Answer) -> World:
        trainer = world.trainers[at]
        if trainer.phase != "start":
            return self._with(world, at, self._entered(trainer, "idle", world))
        if decided(world.record)[0] == trainer.version or not self.setting.looks_again:
            return world._replace(wrong=f"version {trainer.version} was decided and cannot be gone on from: {answer}")
        return self._with(world, at, self._entered(trainer, "start", world))

    def _decided(self, world: World, at: int) -> World:
        trainer, before = world.trainers[at], decided(world.record)[0]
        record, answer = self.parts.ledger(world.record, "decide", trainer.version + 1, trainer.attempt)
        world = world._replace(record=record)
        if answer.error:  # the job ends, and is started again
            return self._with(world, at, self._entered(trainer, "start", world))
        version = decided(record)[0]
        if version != before:
            world = world._replace(
                lineage=(*world.lineage, trainer.attempt), history=(*world.history, (world.table, version))
            )
        for shard in trainer.table.shards:
            world = self._sent(world, shard, Call("commit", version))
        return self._with(world, at, Trainer("idle", version))

    # -- moves

    def _move_begun(self, world: World, version: int) -> World:
        (expert, target), *todo = world.todo
        to = world.table.shards.index(target)
        source = world.table.shards[world.table.holders((LAYER, expert))[0]]
        table = world.table._with((LAYER, expert), (to,))
        return world._replace(move=Move("drop", expert, source, target, version, table), todo=tuple(todo))

    def _move_steps(self, world: World) -> Iterator[Step]:
        move = world.move
        if move is None:
            return
        if move.phase == "publish":
            yield Step(f"epoch {move.table.epoch} is published", self._published(world, move.table))
        elif (process := self._process(world, move.target)) is not None and process.is_up:
            call = self._move_call(world, move)
            after, answer = self._delivered(self._sent(world, move.target, call), move.target, call)
            phases = {"drop": "copy", "copy": "older" if move.version else "publish", "older": "publish"}
            if not answer.error or (move.phase, answer.error) == ("older", "VersionGone"):
                yield Step(f"move: {move.phase}", after._replace(move=move._replace(phase=phases[move.phase])))
            else:
                yield Step(f"move: {move.phase} fails: {answer.error}", self._rolled_back(after))

    def _move_call(self, world: World, move: Move) -> Call:
        if move.phase == "drop":
            return Call("prune_to", epoch=world.table.epoch, experts=world.table.experts_of(move.target)[LAYER])
        version = move.version - (move.phase == "older")
        return Call("copy", version, epoch=move.table.epoch, experts=(move.expert,), source=move.source)

    def _rolled_back(self, world: World) -> World:
        return self._published(world, world.table.renewed())

    def _published(self, world: World, following: PlacementTable) -> World:
        """The world with the next table; what it gives to others is dropped by shards that hear of it."""
        table = self.parts.published(world.table, following)
        if isinstance(table, str) or table.epoch <= world.table.epoch:
            return world._replace(wrong=f"epoch {following.epoch} after {world.table.epoch}: {table}")
        world = world._replace(history=(*world.history, (table, decided(world.record)[0])), move=None)
        for shard in table.shards:
            call = Call("prune_to", epoch=table.epoch, experts=table.experts_of(shard)[LAYER])
            world = self._sent(world, shard, call)
        return world

    # -- shards

    def _start_steps(self, world: World) -> Iterator[Step]:
        for process in world.processes:
            name, disk = process.name, process.state
            if process.is_up:
                continue
            if process.heard is None:
                after = process._replace(heard=decided(world.record))
                yield Step(f"{name} starts, and hears of {after.heard}", self._put(world, after))
            else:
                experts = world.table.experts_of(name)[LAYER]
                state = self.parts.restarted(name, disk, experts, process.heard)
                yield Step(f"{name} is up", self._put(world, process._replace(state=state, is_up=True, heard=None)))

    def _repair_steps(self, world: World) -> Iterator[Step]:
        """What a shard lacks of the table is copied from another replica, at the version that was decided."""
        version, attempt = decided(world.record)
        yield from self._recover_steps(world, version, attempt)
        for process in world.processes if world.move is None else ():
            held = next((h.experts for h in process.state.versions if h.number == process.state.number), ())
            missing = set(world.table.experts_of(process.name)[LAYER]) - {e for e, _ in held}
            for expert in missing if process.is_up and process.state.number in (-1, version) else ():
                for source in self._sources(world, expert, process.name):
                    call = Call("copy", version, epoch=world.table.epoch, experts=(expert,), source=source)
                    after, answer = self._delivered(world, process.name, call)
                    yield Step(f"{process.name} copies expert {expert} from {source}: {answer}", after)

    def _recover_steps(self, world: World, version: int, attempt: int) -> Iterator[Step]:
        """Who is at an older version is asked to be at the decided one, or empty, where another replica could fill it."""
        for process in world.processes:
            if process.is_up and 0 <= process.state.number < version and self._is_shared(world, process.name):
                after, answer = self._delivered(world, process.name, Call("recover", version, attempt))
                yield Step(f"{process.name} is told to be at {version}: {answer}", after)

    def _is_shared(self, world: World, name: str) -> bool:
        """Say whether another shard has all its experts."""
        experts = world.table.experts_of(name)[LAYER]
        return all(self._sources(world, expert, name) for expert in experts)

    def _sources(self, world: World, expert: int, target: str) -> list[str]:
        names = {world.table.shards[at] for at in world.table.holders((LAYER, expert))} - {target}
        return [p.name for p in world.processes if p.name in names and p.is_up and p.state.number >= 0]

    def _late_steps(self, world: World) -> Iterator[Step]:
        """Calls that come again, or late; nobody waits for the answer."""
        for process in (*world.processes, *world.cut_off):
            for call in process.wire if process.is_up else ():
                to = process
                if call.verb == "copy":  # one that comes once more makes void what was gathered: once is enough
                    to = process._replace(wire=process.wire - {call})
                after, _ = self._delivered(self._put(world, to), process.name, call, to)
                label, is_fault = f"{process.shown} gets a late {call}", self._is_fault(call)
                if not is_fault and after != world:
                    yield Step(label, after)
                elif world.faults and after != world:
                    yield Step(label, after._replace(faults=world.faults - 1), is_fault=True)
        if world.cut_off:
            yield Step(f"the old process of {world.cut_off[0].name} ends", world._replace(cut_off=()))

    def _is_fault(self, call: Call) -> bool:
        return self.setting.late_is_fault and call.verb not in ("commit", "abort", "prune_to")

    # -- callers

    def _caller_steps(self, world: World) -> Iterator[Step]:
        for process in (*world.processes, *world.cut_off):
            for table, version in self._known(world) if process.is_up else ():
                for expert in table.experts_of(process.name)[LAYER] if self._may_ask(process, version) else ():
                    after, answer = self._delivered(
                        world, process.name, Call("infer", version, experts=(expert,)), process
                    )
                    label = f"{process.shown} is asked for expert {expert} at {version}, epoch {table.epoch}"
                    if not answer.error and answer.value != self._right(world, version)[expert][1]:
                        yield Step(label, after._replace(wrong="an answer from another version's content"))
                    elif after is not world:
                        yield Step(label, after)

    def _may_ask(self, process: Process, version: int) -> bool:
        return self.setting.old_commits or not process.is_cut_off or version <= process.state.number

    def _known(self, world: World) -> set[tuple[PlacementTable, int]]:
        if self.setting.hears_both:
            return set(world.history)
        return {(table, version) for i, (table, _) in enumerate(world.history) for _, version in world.history[i:]}

    def _right(self, world: World, version: int) -> dict[int, tuple[int, int]]:
        return self.parts.truth(world.lineage[:version])

    # -- faults

    def _fault_steps(self, world: World) -> Iterator[Step]:
        kinds = self.setting.faults
        for process in world.processes:
            if "kill" in kinds and (process.is_up or process.heard):
                yield Step(f"{process.name} is killed", self._put(world, self._dead(process)))
            if "cut" in kinds and process.is_up and self._may_cut(world):
                fresh, old = Process(process.name, ShardState(), is_up=False), process._replace(is_cut_off=True)
                yield Step(f"{process.name} is cut off", self._put(world, fresh)._replace(cut_off=(old,), was_cut=True))
        for at, trainer in enumerate(world.trainers):
            if "give up" in kinds and trainer.phase in ("rows", "prepare", "stage", "decide"):
                yield Step(f"trainer {at} gives up", self._given_up(world, at))
        if "replace" in kinds and len(world.trainers) == 1:
            new = self._entered(world.trainers[0], "start", world)
            yield Step("a new trainer starts", world._replace(trainers=(*world.trainers, new)))
        if world.move is not None and "give up" in kinds:
            yield Step("the move is given up", self._rolled_back(world))
        if "service" in kinds:
            yield Step("the service is killed", self._service_again(world))

    def _may_cut(self, world: World) -> bool:
        is_staging = any(trainer.phase in ("stage", "decide") for trainer in world.trainers)
        return not world.was_cut and (self.setting.cuts_any_time or not is_staging)

    def _given_up(self, world: World, at: int) -> World:
        """The attempt of a trainer comes to nothing. Staged and not decided: its numbers were not finite, shards are told."""
        trainer = world.trainers[at]
        for shard in trainer.table.shards if trainer.phase == "decide" else ():
            world = self._sent(world, shard, Call("abort", trainer.version + 1, trainer.attempt))
        return self._with(world, at, self._entered(trainer, "idle", world))

    def _service_again(self, world: World) -> World:
        """A move under way is forgotten; who waits for a ticket asks again."""
        world = self._published(world, world.table.renewed())
        trainers = (t._replace(phase="idle", attempt=0) if t.phase == "begin" else t for t in world.trainers)
        return world._replace(trainers=tuple(trainers))

    def _dead(self, process: Process) -> Process:
        wire = frozenset[Call]() if self.setting.wires_end else process.wire
        return Process(process.name, process.state.on_disk, is_up=False, wire=wire)

    # -- inside

    def _process(self, world: World, name: str) -> Process | None:
        return next((each for each in world.processes if each.name == name), None)

    def _put(self, world: World, process: Process) -> World:
        """The world with another state of a process."""
        if process.is_cut_off:
            return world._replace(cut_off=(process,))
        return world._replace(processes=tuple(process if p.name == process.name else p for p in world.processes))

    def _sent(self, world: World, shard: str, call: Call) -> World:
        process = self._process(world, shard)
        if process is None or call in process.wire:
            return world
        if process.is_up and not self._left(shard, process.state, frozenset({call})):
            return world
        return self._put(world, process._replace(wire=process.wire | {call}))

    def _left(self, shard: str, state: ShardState, wire: frozenset[Call]) -> frozenset[Call]:
        """The wire without calls that this process will refuse for good: what they are older than only grows."""

        def is_void(call: Call) -> bool:
            older = {"commit": call.step <= state.number, "prune_to": call.epoch < state.epoch, "copy": False}
            default = call.attempt < state.attempt and call.step <= state.number + 1
            return older.get(call.verb, default) and self.parts.obey(shard, call, state)[0] == state

        return frozenset(call for call in wire if not is_void(call))

    def _delivered(self, world: World, shard: str, call: Call, to: Process | None = None) -> tuple[World, Answer]:
        """A call to a shard's process (default: the present one) that is up, and its answer."""
        process = to or self._process(world, shard)
        needed = {call.source} - {""} | {s for _, held in call.shared if shard in held for s in held if s != shard}
        peers = [p for p in world.processes if p.name in needed]
        if not all(p.is_up for p in peers):
            return world, Answer(error="Unavailable")
        state, answer, others = self.parts.obey(shard, call, process.state, tuple((p.name, p.state) for p in peers))
        for name, theirs in others:
            peer = self._process(world, name)
            world = self._put(world, peer._replace(state=theirs)) if theirs != peer.state else world
        if state == process.state:
            return world, answer
        after = process._replace(state=state, wire=self._left(shard, state, process.wire))
        return self._put(world, after), answer
