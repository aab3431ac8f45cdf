"""What callers and shards say to one another: one frozen message per verb. Tensors for data, numbers for control.

Legend: R rows, D model, A assignments (row, expert).
Every mutation is named (op_id, or the step) and applied once, however often it is delivered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Experts = dict[int, tuple[int, ...]]  # layer -> expert indices, as in the checkpoint


@dataclass(frozen=True)
class Rows:
    """The rows of one layer that one shard computes. Expert numbers are the checkpoint's, not positions on the shard."""

    x_RD: Tensor
    row_A: Tensor  # int64, into x_RD
    expert_A: Tensor  # int64
    weight_A: Tensor  # float32


@dataclass(frozen=True)
class Forward:
    """Verb `infer` -> y_RD. `keep` asks the shard to remember the activations under op_id, for the backward to come."""

    op_id: str
    layer: int
    epoch: int
    version: int
    deadline_s: float  # time.time() after which nobody waits for the answer
    rows: Rows
    keep: bool = False


def merged(calls: Sequence[Forward]) -> Forward:
    """Forwards of one layer and version as one: their rows one after the other, the latest deadline."""
    counts = [len(call.rows.x_RD) for call in calls]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    rows = Rows(
        x_RD=torch.cat([call.rows.x_RD for call in calls]),
        row_A=torch.cat([call.rows.row_A + start for call, start in zip(calls, starts, strict=True)]),
        expert_A=torch.cat([call.rows.expert_A for call in calls]),
        weight_A=torch.cat([call.rows.weight_A for call in calls]),
    )
    return replace(calls[0], rows=rows, deadline_s=max(call.deadline_s for call in calls))


@dataclass(frozen=True)
class Backward:
    """Verb `backward` -> (dx_RD, dweight_A). `rows` are sent only after the shard has said InputGone."""

    op_id: str
    layer: int
    epoch: int
    version: int
    deadline_s: float
    dy_RD: Tensor
    rows: Rows | None = None


@dataclass(frozen=True)
class Prepare:
    """Verb `prepare` -> StepReport. Nothing is changed by it."""

    step: int


@dataclass(frozen=True)
class StepReport:
    """What a shard has gathered for `step`: distinct backward ops, and the squared norm of its gradients (nan, inf: bad)."""

    step: int
    num_ops: int
    sq_norm: float


@dataclass(frozen=True)
class Commit:
    """Verb `commit` -> version. Makes version `step` of a prepared step; harmless when it is already there."""

    step: int
    muon_lr: float
    adamw_lr: float
    grad_scale: float


@dataclass(frozen=True)
class Abort:
    """Verb `abort` -> version. Forgets the gradients and op_ids gathered for `step`."""

    step: int


@dataclass(frozen=True)
class Load:
    """Verb `load` -> version. Weights (and optimizer state, if it has them and `training`) from a checkpoint folder, or,
    without one, the seeded initial weights at version 0."""

    checkpoint: str | None = None
    seed: int = 0
    training: bool = True


@dataclass(frozen=True)
class Save:
    """Verb `save` -> tuple of Part. Writes `experts` (those this shard is the primary of) into an existing folder."""

    folder: str
    experts: Experts
    training: bool = True


@dataclass(frozen=True)
class Part:
    """A file of a checkpoint, with what the index and the manifest say about it."""

    file: str
    num_bytes: int
    sha256: str
    tensors: tuple[str, ...] = field(default=())


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
    rows: dict[int, dict[int, int]]  # layer -> expert -> rows computed
