"""ExpertShard: the weights, gradients and optimizer state of some experts of every layer, and what is done to them.

Legend: R rows, D model, F expert hidden, K slots of a row, E local experts of a layer, A assignments (row, expert).
Decisions: a plain class, no Ray; it owns its tensors and nobody else writes them. A mutation is applied once per name: a
backward per op_id, a commit per step. Weights are versions of a store (trinity/state/): a step is staged beside the
present version, so rows of that version are computed meanwhile, and those of the one before until the next step is staged.
`lock` guards everything; long work (staging, saving) and inference run without it, beside training. Activations kept for
backward are a bounded cache, never the truth.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.errors import InputGone, StepConflict, WrongEpoch
from trinity.experts.base import Assignments
from trinity.experts.grad_accumulator import GradAccumulator
from trinity.experts.stacked import STRANGER, Layer, experts_of, names_of, noted, optimizer_of, version_of
from trinity.experts.weights import DTYPES, ExpertWeights, ShardSpec
from trinity.optim.optimizer import Optimizer
from trinity.rpc.messages import (
    GRADIENT,
    REMOTE,
    WEIGHT,
    Abort,
    Backward,
    Commit,
    Fetch,
    Forward,
    Prepare,
    Rows,
    ShardStatus,
    Stage,
    Status,
    StepReport,
    attempt_of,
)
from trinity.state.versioned_store import Store, Version

FUTURE_US = 24 * 3600 * 1_000_000  # attempts are numbered by the clock: one of the far future would void all others

__all__ = ["DTYPES", "ExpertShard", "ShardSpec"]


class _Slots(NamedTuple):
    """What a shard computes of the rows it was sent, host side."""

    slot_A: Tensor  # position in the flattened [R * K]
    row_A: Tensor
    expert_A: Tensor  # position in the stacks


@dataclass
class _Op:
    """What is remembered of a forward: its graph until the backward, its result afterwards."""

    leaves: tuple[Tensor, Tensor]  # x_RD, weights_RK
    y_RD: Tensor
    result: tuple[Tensor, Tensor] | None
    num_bytes: int


class ExpertShard(ExpertWeights):
    """Holds `spec.experts`, or what the store holds already; its methods are the verbs of trinity/rpc/messages.py.

    `peers` is how it reaches other replicas' gradients: a Transport (trinity/dispatch/), set by the owner.
    """

    def __init__(self, spec: ShardSpec, store: Store | None = None):
        super().__init__(spec, store)
        self.peers: object = None
        self._ops: OrderedDict[str, _Op] = OrderedDict()
        self._cached_bytes = self.cache_misses = 0
        staged = self.store.staged
        self.gathered = GradAccumulator(staged.notes["attempt"] if staged else 0, spec.ordered_gradients)

    # -- the data path

    def infer(self, call: Forward) -> Tensor:
        """-> y_RD, one row per row received. Pure, unless `keep`: then it runs beside all else."""
        if not call.keep:
            with self.reading(call) as layer, torch.inference_mode():
                slots = self._counted(layer, call)
                x_RD, assigned = call.rows.x_RD.to(self.spec.device), self._assign(slots, call.rows.weights_RK)
                return self.backend(x_RD, assigned, layer.weights)
        with self.lock:
            self._check_trains(call)
            layer = self._layer(call.layer, call.version, call.deadline_s)
            slots = self._counted(layer, call)
            self._enter(attempt_of(call.op_id), call.version)
            return self._remember(call.op_id, layer, call.rows, slots).y_RD.detach()

    def backward(self, call: Backward) -> tuple[Tensor, Tensor]:
        """-> dx_RD, dweights_RK. Adds to the experts' gradients the first time an op_id is seen, and only then."""
        with self.lock:
            self._check_trains(call)
            layer = self._layer(call.layer, call.version, call.deadline_s)
            self._enter(attempt_of(call.op_id), call.version)
            op = self._ops.get(call.op_id) or self._recompute(layer, call)
            if op.result is not None:
                return op.result
            first = not self.gathered.has(call.op_id)
            weights = layer.weights if first else ()
            gradients = torch.autograd.grad(op.y_RD, [*op.leaves, *weights], call.dy_RD.to(op.y_RD))
            if first:
                self.gathered.add(call.op_id, names_of(call.layer), gradients[2:])
            op.result = (gradients[0], gradients[1])
            op.y_RD = op.y_RD.detach()
            return op.result

    # -- the two-phase step

    def prepare(self, message: Prepare) -> StepReport:
        with self.lock:
            self._expect_next(message.step)
            self._enter(message.attempt, message.step - 1)
            gathered = self.gathered
            gathered.close()
        gathered.share(message, self.spec.name, experts_of(self.store.current), self.peers)
        return StepReport(message.step, gathered.num_ops, gathered.sq_norm())

    def stage(self, message: Stage) -> bool:
        with self.making:  # the same message may come twice: the second waits for what the first makes
            return self._stage(message)

    @torch.no_grad()
    def _stage(self, message: Stage) -> bool:
        with self.lock:
            staged = self.store.current if message.step == self.version else self.store.staged
            if staged is not None and staged.notes.get("attempt") == message.attempt:
                return staged.notes["is_finite"]
            self._expect_next(message.step)
            gradients = self.gathered.take(message.attempt, self.weights)
            self.store.discard_staged()
            self._withdraw(self.store.unwanted(message.keep))
            self.store.retire(message.keep, lambda name: name.endswith(f"::{WEIGHT}"))
            self._publish()
            before = self.store.current
            optimizer = self._optimizer(before)
            target = self._target(optimizer)
        optimizer.step_into(target, gradients, message.lrs, message.grad_scale)
        is_finite = all(bool(torch.isfinite(weight.sum())) for weight in target.params.values())
        with self.lock:
            if self.gathered.attempt != message.attempt or self.store.committed != before.number:
                raise StepConflict(f"shard {self.spec.name}: step {message.step} was given up while it was staged")
            version = version_of(target, message.step, experts_of(before))
            self.store.put(noted(version, attempt=message.attempt, is_finite=is_finite))
            self._publish()
        return is_finite

    def commit(self, message: Commit) -> int:
        with self.lock:
            if message.step != self.version:
                self._expect_next(message.step)
                self._commit()
            return self.version

    def abort(self, message: Abort) -> int:
        with self.lock:
            if message.step == self.version + 1 and message.attempt == self.gathered.attempt:
                self._forget(message.attempt)
            return self.version

    # -- control

    def status(self, message: Status) -> ShardStatus:
        with self.lock:
            held = self.experts if self.version >= 0 else {}
            with self._reading:
                rows = {layer: {e: int(self._rows[layer][e]) for e in experts} for layer, experts in held.items()}
                for counts in self._rows.values() if message.reset_counts else ():
                    counts.zero_()
            layers = self._layers.get(self.version, (None, {}))[1]
            return ShardStatus(
                shard=self.spec.name,
                version=self.version,
                backend=self.backend.name,
                device=str(self.spec.device),
                num_experts=sum(map(len, held.values())),
                weight_bytes=sum(t.nbytes for layer in layers.values() for t in layer.weights),
                cached_ops=len(self._ops),
                cache_misses=self.cache_misses,
                versions=tuple(self.store.numbers),
                extra_bytes=self.store.extra_bytes([n for n in self.store.versions if n != self.version]),
                rows=rows,
            )

    # -- inside: versions

    def _changed(self) -> None:
        self._forget(self.gathered.attempt)

    def _moved(self) -> None:
        self._ops.clear()
        self._cached_bytes = 0
        self.gathered = GradAccumulator(self.gathered.attempt, self.spec.ordered_gradients)

    def _rows_of(self, message: Fetch, at: int) -> Tensor:
        if message.kind == GRADIENT:
            return self.gathered.rows(message.layer, at, self.weights[message.layer])
        return super()._rows_of(message, at)

    def _forget(self, attempt: int) -> None:
        """Nothing is gathered or staged; what comes next is that attempt's."""
        self._ops.clear()
        self._cached_bytes = 0
        self.gathered = GradAccumulator(attempt, self.spec.ordered_gradients)
        self.store.discard_staged()

    def _enter(self, attempt: int, version: int) -> None:
        """A training call. Whatever older attempts at the step gathered here is void; their stragglers are refused."""
        if version != self.version:
            raise StepConflict(f"shard {self.spec.name} is at version {self.version}, a step on {version} is void")
        if attempt > time.time_ns() // 1000 + FUTURE_US:
            raise StepConflict(f"attempt {attempt:x} is of the future; are the clocks of this cluster apart?")
        if attempt < self.gathered.attempt:
            raise StepConflict(
                f"shard {self.spec.name}: attempt {attempt:x} was given up for {self.gathered.attempt:x}"
            )
        if attempt > self.gathered.attempt:
            self._forget(attempt)

    def _check_trains(self, call: Forward | Backward) -> None:
        """Another attempt may find what is missing here; to wait for it in the middle of one would be in vain."""
        if self.version < 0:
            raise StepConflict(f"shard {self.spec.name} has no weights; the step on {call.version} must wait for them")

    def _expect_next(self, step: int) -> None:
        if self.store.staged is not None and step == self.version + 2:
            self._commit()  # whoever goes on from it knows that it was decided
        if step != self.version + 1:
            raise StepConflict(f"shard {self.spec.name} is at version {self.version}; step {step} does not follow")

    def _optimizer(self, version: Version) -> Optimizer:
        if self.spec.optim is None:
            raise StepConflict(f"shard {self.spec.name} serves; it takes no steps")
        return optimizer_of(version, self.spec.model, self.spec.optim)

    def _target(self, optimizer: Optimizer) -> Optimizer:
        """Memory for the next version."""
        params = {name: self.store.empty_like(tensor) for name, tensor in optimizer.params.items()}
        state = {n: {k: self.store.empty_like(t) for k, t in kinds.items()} for n, kinds in optimizer.state.items()}
        return Optimizer(params, optimizer.matrices, optimizer.config, state)

    # -- inside: rows

    def _counted(self, layer: Layer, call: Forward) -> _Slots:
        slots = self._slots(layer, call)
        with self._reading:
            self._rows[call.layer][layer.held_E] += torch.bincount(slots.expert_A, minlength=len(layer.experts))
        return slots

    def _slots(self, layer: Layer, call: Forward | Backward) -> _Slots:
        """The slots that are for this shard, with checkpoint expert numbers as positions in the stacks."""
        assert call.rows is not None
        ids_RK = call.rows.ids_RK
        local_X = layer.local_X[ids_RK.cpu().flatten()]  # REMOTE finds the last
        slot_A = (local_X != REMOTE).nonzero().squeeze(1)
        expert_A = local_X[slot_A]
        if len(expert_A) and int(expert_A.min()) == STRANGER:
            stranger = int(ids_RK.flatten()[slot_A[expert_A == STRANGER][0]])
            raise WrongEpoch(
                f"shard {self.spec.name} does not hold expert ({call.layer}, {stranger}) of placement epoch {call.epoch}"
            )
        return _Slots(slot_A, slot_A // ids_RK.shape[1], expert_A)

    def _assign(self, slots: _Slots, weights_RK: Tensor) -> Assignments:
        """On the shard's device; differentiable in the weights."""
        slot_A, row_A, expert_A = (index.to(self.spec.device) for index in slots)
        return Assignments(row_A, expert_A, weights_RK.to(self.spec.device).flatten().index_select(0, slot_A))

    def _remember(self, op_id: str, layer: Layer, rows: Rows, slots: _Slots) -> _Op:
        if op_id in self._ops:
            return self._ops[op_id]
        x_RD = rows.x_RD.to(self.spec.device).detach().requires_grad_()
        weights_RK = rows.weights_RK.detach().requires_grad_()
        with torch.enable_grad():
            y_RD = self.backend(x_RD, self._assign(slots, weights_RK), layer.weights)
        f, d, size = self.spec.model.moe_intermediate_size, self.spec.model.hidden_size, x_RD.element_size()
        num_bytes = size * (2 * x_RD.numel() + len(slots.slot_A) * (4 * f + 2 * d))
        op = self._ops[op_id] = _Op((x_RD, weights_RK), y_RD, None, num_bytes)
        self._cached_bytes += op.num_bytes
        while self._cached_bytes > self.spec.activation_cache_bytes and len(self._ops) > 1:
            self._cached_bytes -= self._ops.popitem(last=False)[1].num_bytes
        return op

    def _recompute(self, layer: Layer, call: Backward) -> _Op:
        if call.rows is None:
            self.cache_misses += 1
            raise InputGone(
                f"shard {self.spec.name} no longer has the activations of {call.op_id}; send the rows again"
            )
        return self._remember(call.op_id, layer, call.rows, self._slots(layer, call))
