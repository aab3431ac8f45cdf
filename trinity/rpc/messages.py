"""Messages between callers and shards: one frozen message per verb. Tensors for data, numbers for control.

Legend: R rows, D model, K slots of a row (top-k).
Every mutation is named (op_id, or the step) and applied once, however often it is delivered.
"""

from __future__ import annotations  # so that those who only control need no torch

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Of messages, frames and handshake: processes of another one are refused by name (docs/operations.md, Upgrades).
PROTOCOL = 10
Experts = dict[int, tuple[int, ...]]  # layer -> expert indices, as in the checkpoint


REMOTE = -1  # an expert id: this slot is another shard's


@dataclass(frozen=True)
class Rows:
    """The rows of one layer that one shard computes, each with its K slots. Experts are numbered as in the checkpoint, not
    by position on the shard; ids_RK is REMOTE in slots that are not for this shard. `adapter_R`: the content of each row's
    adapter (trinity.config.AdapterRef), 0 where it has none; None where no row has one. Inference alone has some."""

    x_RD: Tensor
    ids_RK: Tensor  # int64
    weights_RK: Tensor  # float32
    adapter_R: Tensor | None = None  # int64

    def only(self, own_R: Tensor) -> Rows:
        """Those rows, as if they had no adapter."""
        sent = (self.x_RD, self.ids_RK, self.weights_RK)
        return Rows(*(each.index_select(0, own_R.to(each.device)) for each in sent))


@dataclass(frozen=True)
class Forward:
    """Verb `infer` -> y_RD. `keep` asks the shard to remember the activations under op_id, for the backward to come. Of those
    that wait, the lowest `priority` (int64) is first; PATIENT ones, of an engine that only computes prompts, get what others
    leave of the cores."""

    op_id: str
    layer: int
    epoch: int
    version: int  # by its name (trinity/utils/lines.py)
    deadline_s: float  # this process's time.monotonic() after which nobody waits for the answer
    rows: Rows
    keep: bool = False
    priority: int = 0


@dataclass(frozen=True)
class Backward:
    """Verb `backward` -> (dx_RD, dweights_RK). `rows` are sent only after the shard has said InputGone."""

    op_id: str
    layer: int
    epoch: int
    version: int
    deadline_s: float
    dy_RD: Tensor
    rows: Rows | None = None


def other_release(who: str, theirs: int | None) -> str:
    """Sentence about a peer that speaks another protocol."""
    known = "an older protocol" if theirs is None else f"protocol {theirs}"
    return f"{who} speaks {known}, this process {PROTOCOL}: run one release of Trinity (docs/operations.md, Upgrades)"


def departing(message: Any) -> Any:
    """The message with the time that is left in place of its deadline, if it has one: hosts' clocks differ."""
    return _moved(message, -time.monotonic())


def arrived(message: Any) -> Any:
    """The inverse, for this process's clock."""
    return _moved(message, time.monotonic())


def _moved(message: Any, by_s: float) -> Any:
    return replace(message, deadline_s=message.deadline_s + by_s) if hasattr(message, "deadline_s") else message


def attempt_of(op_id: str) -> int:
    """The attempt at a step that a training op belongs to; 0 for ops of no attempt. See `op_name`."""
    head, dot, _ = op_id.partition(".")
    return int(head, 16) if dot and all(c in "0123456789abcdef" for c in head) and head else 0


def caller_of(op_id: str) -> tuple[int, str]:
    """Callers whose gradients an op adds to, in their order."""
    name = op_id.rpartition(":")[0].rpartition(".")[2]
    return (int(name), "") if name.isdecimal() else (-1, name)


def op_name(attempt: int, caller: str, number: int) -> str:
    """The op_id of a caller's `number`-th exchange. Attempts only grow: a newer one makes what came of older ones void."""
    return f"{attempt:x}.{caller}:{number}" if attempt else f"{caller}:{number}"


Holders = dict[int, dict[int, tuple[str, ...]]]  # layer -> expert -> shards, the primary first


@dataclass(frozen=True)
class Prepare:
    """Verb `prepare` -> StepReport. Where experts have several replicas (`shared`), each takes up the others' gradients, and
    its primary alone reports their norm. Changes no weights; harmless when repeated."""

    step: int
    attempt: int = 0
    shared: Holders = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """Sums of a shard for `step`: distinct backward ops, and the squared norm of its gradients (nan, inf: bad)."""

    step: int
    num_ops: int
    sq_norm: float


@dataclass(frozen=True)
class Stage:
    """Verb `stage` -> whether the new weights are finite. Makes the weights of a prepared step beside the present ones, so
    that nothing can prevent its commit any more. Callers go on computing with the present version meanwhile; versions
    before it are gone, except those to `keep`. `lrs` has the learning rate of each parameter group. `num_ops`: so many
    backward ops each shard steps with; one that has another number refuses. `idle`: experts that no row of the step came to,
    anywhere; they stay as they are. Harmless when repeated."""

    step: int
    lrs: Mapping[str, float]
    grad_scale: float
    attempt: int = 0
    keep: tuple[int, ...] = ()
    num_ops: Mapping[str, int] = field(default_factory=dict)
    idle: Experts = field(default_factory=dict)


@dataclass(frozen=True)
class Commit:
    """Verb `commit` -> version. Makes staged weights the present ones; harmless when they are already."""

    step: int


@dataclass(frozen=True)
class Abort:
    """Verb `abort` -> version. Forgets what was gathered and staged for `step` by that attempt."""

    step: int
    attempt: int = 0


@dataclass(frozen=True)
class Recover:
    """Verb `recover` -> version: the one that was decided on, of that line and made by that attempt, if the shard has it; -1
    where it has not, and holds nothing from now on. Harmless when repeated."""

    version: int
    attempt: int | None = None
    line: int = 0


@dataclass(frozen=True)
class Load:
    """Verb `load` -> version. Weights (and optimizer state, if it has them and `training`) from a checkpoint folder, or,
    without one, the seeded initial weights at version 0. They are of that line (trinity/utils/lines.py)."""

    checkpoint: str | None = None
    seed: int = 0
    training: bool = True
    line: int = 0


@dataclass(frozen=True)
class Adapt:
    """Verb `adapt` -> TakenAdapter. Take up an adapter from its files, for inference beside weights of any version.
    `content`: what it must be of, or 0 to have all its numbers looked at; `base`: the checkpoint that it must be an adapter
    of, where that is known. Raises CheckpointError. Harmless when repeated."""

    source: str
    deadline_s: float
    content: int = 0
    base: str | None = None


@dataclass(frozen=True)
class TakenAdapter:
    content: int
    source: str  # by what any process finds the same


@dataclass(frozen=True)
class Forget:
    """Verb `forget` -> whether it was here: the shard lets go of an adapter."""

    content: int


WEIGHT = "weight"  # the kind of rows that every expert has; the others are kinds of optimizer state
GRADIENT = "gradient"  # what backward ops have added up for the step under way


@dataclass(frozen=True)
class Fetch:
    """Verb `fetch` -> rows_ND, N = 3F: gate, up and the transpose of down of one expert, one under the other; weights in the
    model's dtype, optimizer state and gradients in fp32. Of adapters, which are of unlike widths: one row. Changes nothing."""

    layer: int
    expert: int
    version: int
    deadline_s: float
    kind: str = WEIGHT


@dataclass(frozen=True)
class Install:
    """Verb `install` -> how many were taken up. `rows[kind][i]` is what `fetch` gave for experts[i]; all kinds that this
    shard has must be there. Experts that it holds already are left alone: harmless when repeated."""

    layer: int
    experts: tuple[int, ...]
    version: int
    rows: dict[str, tuple[Tensor, ...]]
    num_updates: int = 0  # of their optimizer
    epoch: int = 0  # of the table that names this shard for them
    line: int = 0


@dataclass(frozen=True)
class Copy:
    """Verb `copy` of a shard's process -> bytes. It fetches the experts of one layer from those shards and takes them
    up; where a source is "", from the checkpoint that the pool was loaded from."""

    layer: int
    experts: tuple[int, ...]
    sources: tuple[str, ...]
    version: int
    deadline_s: float
    num_updates: int = 0
    epoch: int = 0  # of the table to come
    line: int = 0


@dataclass(frozen=True)
class PruneTo:
    """Verb `prune_to` -> the number of experts dropped: all that are not named by the table of that `epoch`. Harmless when
    repeated, and when a newer table has been acted on."""

    experts: Experts
    epoch: int = 0


@dataclass(frozen=True)
class Save:
    """Verb `save` -> tuple of Part. Writes `experts` (those this shard is the primary of) of a committed version into an
    existing folder; steps go on meanwhile."""

    folder: str
    experts: Experts
    version: int
    training: bool = True


@dataclass(frozen=True)
class Part:
    """A file of a checkpoint, with what the index and the manifest say about it."""

    file: str
    num_bytes: int
    sha256: str
    tensors: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Progress:
    """Verb `progress` -> BytesRead of the load that is under way, or was the last one. Answered while it runs."""


@dataclass(frozen=True)
class BytesRead:
    done: int
    total: int


@dataclass(frozen=True)
class Status:
    """Verb `status` -> ShardStatus; `reset_counts` starts the row counters anew."""

    reset_counts: bool = False


@dataclass(frozen=True)
class ShardStatus:
    shard: str
    version: int
    backend: str
    device: str
    num_experts: int
    weight_bytes: int
    cached_ops: int
    cache_misses: int
    versions: tuple[int, ...]  # all that it can compute with
    extra_bytes: int  # memory of versions besides the present one
    rows: dict[int, dict[int, int]]  # layer -> expert -> rows computed
    expert_dtype: str = ""  # of what inference computes with
    computes: str = ""  # by which kernels, and the formats that they know (trinity/native.py)
