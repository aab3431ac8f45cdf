"""Real parts of the control protocol as frozen values: what each does with a message is computed once and remembered.

Decisions: the explorer (protocol_world.py) holds hundreds of thousands of states, in which a shard is in one of a few hundred.
So a shard's state is read off a real ExpertShard, and the next one is computed by making a real shard of that state and
sending it the real message; nothing of a shard or of the ledger is written here a second time. Two states are the same when
all that a shard acts on is: its versions with their contents, what it gathered, its attempt and its epoch. A content is
known by its numbers, so that gradients applied twice, not at all or on other weights make another one.
"""

import copy
import threading
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from actors.control import ledger as ledgers
from actors.control.ledger import Ledger
from actors.control.state import PoolSpec, PoolState
from actors.shard_server import ShardServer
from trinity.config import OptimConfig, PlacementConfig, preset
from trinity.dispatch.transport import LocalTransport
from trinity.errors import TrinityError
from trinity.experts import shard as shards
from trinity.experts.grad_accumulator import GradAccumulator
from trinity.experts.migration import migrate_in
from trinity.experts.registry import resolve
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.experts.stacked import experts_of
from trinity.placement.table import PlacementTable
from trinity.pool.ledger import Decision
from trinity.rpc import messages as m
from trinity.state.versioned_store import Store
from trinity.utils.trying import tried

SIZES = dict(hidden_size=4, moe_intermediate_size=2, num_experts=2, num_experts_per_tok=1, num_hidden_layers=2)
MODEL, OPTIM, SOURCE = preset("tiny").model_copy(update=SIZES), OptimConfig(), m.Load(seed=5)
(LAYER,) = MODEL.moe_layers
EXPERTS, FOREVER = range(MODEL.num_experts), 4e9
X_ED, DY_ED = torch.tensor([[1.0, 2, -1, 0.5], [0.5, -1, 2, 1]]), torch.tensor([[1.0, -1, 0.5, 2], [2, 1, -1, 0.5]])


class Call(NamedTuple):
    """A message, of whatever fields its verb needs. `experts`: of backward and infer, one row for each time it is named."""

    verb: str
    step: int = 0
    attempt: int = 0
    epoch: int = 0
    experts: tuple[int, ...] = ()
    source: str = ""
    num_ops: int = 0
    shared: tuple[tuple[int, tuple[str, ...]], ...] = ()


class Held(NamedTuple):
    """A version on a shard. `experts`: (index, content), in the order of its stacks."""

    number: int
    attempt: int | None
    num_updates: int
    experts: tuple[tuple[int, int], ...]


class ShardState(NamedTuple):
    """All that a shard acts on. What is not on disk is as at the start of a process in the state of one that is down."""

    number: int = -1
    versions: tuple[Held, ...] = ()
    attempt: int = 0
    ops: frozenset[str] = frozenset()
    gradient: int = -1
    is_closed: bool = False
    is_taken: bool = False
    epoch: int = 0

    @property
    def on_disk(self) -> "ShardState":
        return ShardState(self.number, self.versions)


class Answer(NamedTuple):
    """The value that came back, or the name of the error."""

    value: Any = None
    error: str = ""


class Parts:
    """Memory of all states seen, and of what was computed from them. `folder`: for the ledger's and the table's files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._contents: list[torch.Tensor] = []
        self._ids: dict[bytes, int] = {}
        self._kept: dict[ShardState, tuple[dict, Any]] = {}
        for name in ("obey", "restarted", "truth", "ledger", "published"):
            setattr(self, name, cache(getattr(self, name)))

    # -- a shard

    def obey(self, name: str, call: Call, state: ShardState, others: tuple[tuple[str, ShardState], ...] = ()) -> tuple:
        """-> the shard's state afterwards, the answer, and the states of the others that it asks."""
        peers = {other: self._thawed(other, theirs) for other, theirs in others}
        shard = self._thawed(name, state)
        shard.peers = LocalTransport(peers)
        found = tried(partial(_sent, shard, call), TrinityError)
        answer = Answer(error=type(found).__name__) if isinstance(found, TrinityError) else Answer(self._value(found))
        return self._frozen(shard), answer, tuple((other, self._frozen(each)) for other, each in peers.items())

    def restarted(self, name: str, disk: ShardState, experts: tuple[int, ...], decision: tuple) -> ShardState:
        """The shard after a restart that found this on its disk and heard of that decision: (version, attempt)."""
        store, _ = self._store(disk)
        shard = ExpertShard(ShardSpec(name, MODEL, {LAYER: experts}, OPTIM, backend="reference"), store)
        version, attempt = decision
        notes = {"attempt": attempt} if attempt else {"is_source": True}
        service = SimpleNamespace(ask=lambda _: Decision(version, notes), source=lambda: SOURCE)
        server = SimpleNamespace(shard=shard, service=service)
        server._load = partial(ShardServer._load, server)
        ShardServer._recover(server)
        return self._frozen(shard)

    def truth(self, lineage: tuple[int, ...]) -> dict[int, tuple[int, int]]:
        """expert -> its content, and what it answers, once the attempts of the lineage have each made a step, undisturbed."""
        shard = ExpertShard(ShardSpec("truth", MODEL, {LAYER: tuple(EXPERTS)}, OPTIM, backend="reference"))
        shard.load(SOURCE)
        for step, attempt in enumerate(lineage, 1):
            _sent(shard, Call("backward", step, attempt, 1, batch_of(EXPERTS)))
            for verb in ("prepare", "stage", "commit"):
                _sent(shard, Call(verb, step, attempt, num_ops=1))
        contents = dict(self._frozen(shard).versions[-1].experts)
        answers = {e: self._value(_sent(shard, Call("infer", len(lineage), experts=(e,)))) for e in EXPERTS}
        return {e: (contents[e], answers[e]) for e in EXPERTS}

    # -- the service

    def ledger(self, record: str, verb: str, *numbers: int) -> tuple[str, Answer]:
        """What the file of decisions says afterwards, and the answer. "": there is none yet."""
        notes = {"begin": [{"is_source": True}], "decide": [{"attempt": (0, *numbers)[-1]}]}.get(verb, [])
        file = self.folder / "record.json"
        file.write_text(record) if record else file.unlink(missing_ok=True)
        ledger = Ledger(self.folder, threading.Condition())
        found = tried(partial(getattr(ledger, verb), *numbers, *notes), TrinityError)
        answer = Answer(error=type(found).__name__) if isinstance(found, TrinityError) else Answer(found)
        return file.read_text(), answer

    def published(self, table: PlacementTable, following: PlacementTable) -> PlacementTable | str:
        """The newest table on disk after publishing; the name of the error where it was refused."""
        with TemporaryDirectory(dir=self.folder) as folder:
            spec = PoolSpec(MODEL, OPTIM, 1, "cpu", (1 << 20,))
            Path(folder, f"epoch-{table.epoch:08d}.json").write_text(table.to_json())
            make = partial(PoolState, Path(folder), spec, PlacementConfig(), "test", is_again=True)
            found = tried(lambda: make().publish(following), TrinityError)
            return type(found).__name__ if isinstance(found, TrinityError) else make().table

    # -- inside

    def _value(self, found: Any) -> Any:
        if isinstance(found, torch.Tensor):
            return self._id(found)
        return found.num_ops if isinstance(found, m.StepReport) else found

    def _id(self, tensor: torch.Tensor) -> int:
        """The number of a content: sums in another order are the same."""
        flat, bits = tensor.detach().flatten(), tensor.detach().contiguous().numpy().tobytes()
        if bits not in self._ids:
            same = (
                i for i, t in enumerate(self._contents) if t.shape == flat.shape and torch.allclose(t, flat, atol=1e-4)
            )
            self._ids[bits] = next(same, len(self._contents))
            self._contents += [flat.clone()] if self._ids[bits] == len(self._contents) else []
        return self._ids[bits]

    def _store(self, state: ShardState) -> tuple[Store, Any]:
        store = Store()
        versions, gathered = self._kept.get(state, ({}, None))
        store.versions, store.committed = dict(versions), state.number
        return store, gathered

    def _thawed(self, name: str, state: ShardState) -> ExpertShard:
        store, gathered = self._store(state)
        shard = ExpertShard(ShardSpec(name, MODEL, {LAYER: ()}, OPTIM, backend="reference"), store)
        shard.weights._epoch = state.epoch
        if gathered is not None:
            shard.gathered = _copied(gathered)
            shard.gathered._shard = name
        return shard

    def _frozen(self, shard: ExpertShard) -> ShardState:
        held = tuple(self._held(version) for _, version in sorted(shard.store.versions.items()))
        g = shard.gathered
        sums = [t.flatten() for _, t in sorted(g.sums().items())] + [
            t.flatten() for _, (_, t) in sorted(g._shared.items())
        ]
        gradient = self._id(torch.cat(sums)) if sums else -1
        ops = frozenset(g._ops)
        state = ShardState(
            shard.version, held, g.attempt, ops, gradient, g._is_closed, g._is_taken, shard.weights._epoch
        )
        self._kept.setdefault(state, (shard.store.versions, g))
        self._kept.setdefault(state.on_disk, (shard.store.versions, None))
        return state

    def _held(self, version: Any) -> Held:
        def content(at: int) -> int:
            return self._id(torch.cat([version.tensors[name][at].flatten() for name in sorted(version.tensors)]))

        experts = tuple((e, content(at)) for at, e in enumerate(experts_of(version)[LAYER]))
        return Held(version.number, version.notes.get("attempt"), version.notes["num_updates"], experts)


def _copied(gathered: GradAccumulator) -> GradAccumulator:
    """The accumulator, whose sums are added to in place, once more."""
    made = copy.copy(gathered)
    made._ops, made._shared = set(gathered._ops), dict(gathered._shared)
    made._callers = {c: {n: t.clone() for n, t in sums.items()} for c, sums in gathered._callers.items()}
    return made


def batch_of(experts: Any, copies: int = 2) -> tuple[int, ...]:
    """Rows of a step's batch: two for each expert."""
    return tuple(e for e in experts for _ in range(copies))


def _rows(experts: tuple[int, ...]) -> m.Rows:
    return m.Rows(X_ED[list(experts)], torch.tensor([[e] for e in experts]), torch.ones(len(experts), 1))


def _sent(shard: ExpertShard, call: Call) -> Any:
    """The real message to the real shard; its value. Raises what the shard does."""
    verb, step, attempt, epoch, experts, source, num_ops, shared = call
    if verb == "copy":
        sources = (source,) * len(experts)
        return migrate_in(shard, m.Copy(LAYER, experts, sources, step, FOREVER, step, epoch), shard.peers, None)
    if verb == "backward":
        op_id = m.op_name(attempt, "0", 1)
        shard.backward(m.Backward(op_id, LAYER, epoch, step - 1, FOREVER, DY_ED[list(experts)], _rows(experts)))
        return True
    lrs = dict.fromkeys(("muon", "adamw"), 0.1 * (1 + attempt))  # so that each attempt makes another content
    made = {
        "infer": lambda: m.Forward("caller:1", LAYER, epoch, step, FOREVER, _rows(experts)),
        "prepare": lambda: m.Prepare(step, attempt, {LAYER: dict(shared)} if shared else {}),
        "stage": lambda: m.Stage(step, lrs, 1.0, attempt, (), {shard.spec.name: num_ops}),
        "commit": lambda: m.Commit(step),
        "recover": lambda: m.Recover(step, attempt or None),
        "abort": lambda: m.Abort(step, attempt),
        "prune_to": lambda: m.PruneTo({LAYER: experts}, epoch),
        "load": lambda: SOURCE,
    }[verb]
    return getattr(shard, verb)(made())


@contextmanager
def real_parts(folder: Path, *patches: Any):
    """-> Parts, where attempts are numbered 1, 2, 3; `patches` are of the code under test."""
    clock = SimpleNamespace(monotonic=lambda: 0.0, time_ns=lambda: 0)
    fixed = [mock.patch.object(ledgers, "time", clock), mock.patch.object(shards, "resolve", cache(resolve))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for patch in (*fixed, *patches):
        patch.start()
    try:
        yield Parts(folder)
    finally:
        for patch in (*patches, *fixed):
            patch.stop()
        torch.set_num_threads(threads)
