"""ExpertShard: the weights, gradients and optimizer state of some experts of every layer, and what is done to them.

Legend: R rows, D model, F expert hidden, K slots of a row, E local experts of a layer, A assignments (row, expert).
Decisions: a plain class, one thread, no Ray; it owns its tensors and nobody else writes them. A mutation is applied once
per name: a backward per op_id, a commit per step. Activations kept for backward are a bounded cache, never the truth.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.checkpoint import PROJECTIONS, Checkpoint, expert_key, open_checkpoint, write_tensors
from trinity.config import ModelConfig, OptimConfig
from trinity.errors import DeadlineExceeded, InputGone, InvalidRequest, StepConflict, Unavailable, WrongEpoch
from trinity.experts.backend import Assignments, LayerWeights, as_stored
from trinity.experts.backends import resolve
from trinity.init import init_expert
from trinity.memory import on_huge_pages
from trinity.messages import (
    ELSEWHERE,
    WEIGHT,
    Abort,
    Adopt,
    Backward,
    Commit,
    Experts,
    Fetch,
    Forward,
    Load,
    Part,
    Prepare,
    Retain,
    Rows,
    Save,
    ShardStatus,
    Status,
    StepReport,
)
from trinity.optim import Matrix, Optimizer, sq_norm

STRANGER = -2  # below ELSEWHERE: an expert that this shard does not hold
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ShardSpec:
    """What a shard is made from. `optim` None: it serves and does not train."""

    name: str
    model: ModelConfig
    experts: Experts
    optim: OptimConfig | None = None
    backend: str = "auto"
    device: str = "cpu"
    activation_cache_bytes: int = 1 << 30


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


class ExpertShard:
    """Holds `spec.experts`; its methods are the verbs of trinity/messages.py."""

    def __init__(self, spec: ShardSpec):
        self.spec, self.version = spec, -1
        self.experts = dict(spec.experts)  # now; `spec.experts` is what it began with
        self.backend = resolve(spec.backend, torch.device(spec.device))
        f, d = spec.model.moe_intermediate_size, spec.model.hidden_size
        self.weights = {layer: self._empty(len(held), f, d) for layer, held in spec.experts.items()}
        self._local = {layer: _positions(held, spec.model.num_experts) for layer, held in spec.experts.items()}
        self._rows = {layer: torch.zeros(len(held), dtype=torch.int64) for layer, held in spec.experts.items()}
        self._ops: OrderedDict[str, _Op] = OrderedDict()
        self._applied: set[str] = set()
        self._cached_bytes = self.cache_misses = 0
        self.grads: dict[str, Tensor] = {}
        self.optimizer: Optimizer | None = None

    # -- the data path

    def infer(self, call: Forward) -> Tensor:
        """-> y_RD, one row per row received. Pure, unless `keep`."""
        self._check(call.layer, call.version, call.deadline_s)
        slots = self._slots(call.layer, call.rows.ids_RK, call.epoch)
        self._rows[call.layer] += torch.bincount(slots.expert_A, minlength=len(self._rows[call.layer]))
        if call.keep:
            return self._remember(call.op_id, call.layer, call.rows, slots).y_RD.detach()
        with torch.inference_mode():
            x_RD, assigned = call.rows.x_RD.to(self.spec.device), self._assign(slots, call.rows.weights_RK)
            return self.backend(x_RD, assigned, self.weights[call.layer])

    def backward(self, call: Backward) -> tuple[Tensor, Tensor]:
        """-> dx_RD, dweights_RK. Adds to the experts' gradients the first time an op_id is seen, and only then."""
        self._check(call.layer, call.version, call.deadline_s)
        op = self._ops.get(call.op_id) or self._recompute(call)
        if op.result is not None:
            return op.result
        first = call.op_id not in self._applied
        weights = self.weights[call.layer] if first else ()
        gradients = torch.autograd.grad(op.y_RD, [*op.leaves, *weights], call.dy_RD.to(op.y_RD))
        if first:
            self._applied.add(call.op_id)
            self._accumulate(call.layer, gradients[2:])
        op.result = (gradients[0], gradients[1])
        op.y_RD = op.y_RD.detach()
        return op.result

    # -- the two-phase step

    def prepare(self, message: Prepare) -> StepReport:
        """What this shard brings to `step`; it must be the next one."""
        self._expect_next(message.step)
        return StepReport(message.step, len(self._applied), sq_norm(self.grads.values()))

    @torch.no_grad()
    def commit(self, message: Commit) -> int:
        """Update the weights; -> version. Harmless when this step is already committed."""
        if message.step == self.version:
            return self.version
        self._expect_next(message.step)
        assert self.optimizer is not None
        self.optimizer.step(self.grads, message.muon_lr, message.adamw_lr, message.grad_scale)
        self._forget()
        self.version = message.step
        return self.version

    def abort(self, message: Abort) -> int:
        """Drop what was gathered for `step`; the weights stay at their version. Harmless when repeated."""
        if message.step == self.version + 1:
            self._forget()
        return self.version

    # -- which experts are here

    def fetch(self, message: Fetch) -> Tensor:
        self._check(message.layer, message.version, message.deadline_s)
        if message.expert not in self.experts[message.layer]:
            raise WrongEpoch(f"shard {self.spec.name} does not hold expert ({message.layer}, {message.expert})")
        at = self.experts[message.layer].index(message.expert)
        return torch.cat([stack.detach()[at] for stack in self._stacks(message.layer, message.kind)])

    @torch.no_grad()
    def adopt(self, message: Adopt) -> int:
        """Raises StepConflict for rows of another version, except on a shard without experts, which takes up theirs."""
        if not any(self.experts.values()):
            self.version = message.version
            if self.optimizer is not None:
                self.optimizer.num_updates = message.num_updates
        if message.version != self.version:
            raise StepConflict(
                f"shard {self.spec.name} holds version {self.version}, the copies are of {message.version}"
            )
        held = self.experts[message.layer]
        new = [i for i, expert in enumerate(message.experts) if expert not in held]
        rows = {kind: [found[i] for i in new] for kind, found in message.rows.items()}
        self._restack(message.layer, list(range(len(held))), (*held, *(message.experts[i] for i in new)), rows)
        return len(new)

    @torch.no_grad()
    def retain(self, message: Retain) -> int:
        num = 0
        for layer, held in self.experts.items():
            wanted = set(message.experts.get(layer, ()))
            keep = [at for at, expert in enumerate(held) if expert in wanted]
            num += len(held) - len(keep)
            if len(keep) < len(held):
                self._restack(layer, keep, tuple(held[at] for at in keep), {})
        return num

    @property
    def kinds(self) -> tuple[str, ...]:
        """What belongs to an expert: its weights, and its optimizer state where this shard trains."""
        if self.optimizer is None or not self.weights:
            return (WEIGHT,)
        return (WEIGHT, *self.optimizer.state[_names(next(iter(self.weights)))[0]])

    def from_source(self, layer: int, expert: int, message: Load) -> Tensor:
        """What `fetch` would give, of the weights in a checkpoint."""
        source = open_checkpoint(message.checkpoint) if message.checkpoint else None
        return torch.cat(self._read(source, layer, expert, message)).to(DTYPES[self.spec.model.dtype])

    # -- control

    @torch.no_grad()
    def load(self, message: Load) -> int:
        """Take the weights from a checkpoint or from the seed; -> version."""
        self._forget()
        self.version = -1  # until all of it is there: nobody may compute with half of a checkpoint
        source = open_checkpoint(message.checkpoint) if message.checkpoint else None
        for layer, held in self.experts.items():
            for position, expert in enumerate(held):
                for stack, matrix in zip(self.weights[layer], self._read(source, layer, expert, message), strict=True):
                    stack.detach()[position].copy_(matrix)
        if self.spec.optim is not None:
            self._make_optimizer(source if message.training else None)
        self._warm_up()
        # A run that starts from somebody's weights counts its own steps from 0.
        self.version = source.version if source and (message.training or self.optimizer is None) else 0
        return self.version

    def save(self, message: Save) -> tuple[Part, ...]:
        """Write the named experts, and their optimizer state under training/; -> the files."""
        parts = write_tensors(message.folder, f"model-experts-{self.spec.name}", self._named(message.experts))
        if message.training and self.optimizer is not None:
            state = self._named_state(message.experts)
            parts += write_tensors(message.folder, f"training/experts-{self.spec.name}", state)
        return parts

    def status(self, message: Status) -> ShardStatus:
        rows = {layer: dict(zip(held, self._rows[layer].tolist(), strict=True)) for layer, held in self.experts.items()}
        if message.reset_counts:
            for counts in self._rows.values():
                counts.zero_()
        return ShardStatus(
            shard=self.spec.name,
            version=self.version,
            backend=self.backend.name,
            device=str(self.spec.device),
            num_experts=sum(map(len, self.experts.values())),
            weight_bytes=sum(t.nbytes for w in self.weights.values() for t in w),
            cached_ops=len(self._ops),
            cache_misses=self.cache_misses,
            rows=rows,
        )

    # -- inside

    def _empty(self, *shape: int) -> LayerWeights:
        dtype, device = DTYPES[self.spec.model.dtype], self.spec.device
        num, f, d = shape
        is_DF = self.backend.stores_down_transposed(torch.device(self.spec.device))
        shapes = (shape, shape, (num, d, f) if is_DF else shape)
        gate_EFD, up_EFD, down = (on_huge_pages(torch.empty(s, dtype=dtype, device=device)).zero_() for s in shapes)
        down_EFD = down.mT if is_DF else down
        train = self.spec.optim is not None
        return LayerWeights(*(t.requires_grad_(train) for t in (gate_EFD, up_EFD, down_EFD)))

    def _stacks(self, layer: int, kind: str) -> tuple[Tensor, ...]:
        if kind == WEIGHT:
            return self.weights[layer]
        if kind not in self.kinds:
            raise InvalidRequest(f"shard {self.spec.name} has no {kind!r} of its experts, only {', '.join(self.kinds)}")
        assert self.optimizer is not None
        return tuple(self.optimizer.state[name][kind] for name in _names(layer))

    def _restack(self, layer: int, keep: list[int], experts: tuple[int, ...], rows: dict[str, list[Tensor]]) -> None:
        """Make `experts` what is held of a layer: those at `keep`, then the ones in `rows`. The old stacks stay whole until the
        new ones are."""
        made = {}
        for kind in self.kinds:
            added = [row_ND.chunk(3) for row_ND in rows.get(kind, [])]
            old = self._stacks(layer, kind)
            made[kind] = [restacked(stack, keep, [parts[i] for parts in added]) for i, stack in enumerate(old)]
        train = self.spec.optim is not None
        self.weights[layer] = LayerWeights(*(stack.requires_grad_(train) for stack in made.pop(WEIGHT)))
        counts = self._rows[layer]
        self._rows[layer] = torch.cat([counts[keep], counts.new_zeros(len(experts) - len(keep))])
        self.experts[layer], self._local[layer] = experts, _positions(experts, self.spec.model.num_experts)
        for i, name in enumerate(_names(layer)):
            if self.optimizer is not None:
                state = {kind: stacks[i] for kind, stacks in made.items()}
                self.optimizer.replace(name, self.weights[layer][i].detach(), state)

    def _read(self, source: Checkpoint | None, layer: int, expert: int, message: Load) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and the transpose of down."""
        seeded = (self.spec.model, layer, expert, message.seed, torch.float32)
        gate, up, down = source.expert(layer, expert) if source else init_expert(*seeded)
        return gate, up, down.mT

    def _warm_up(self) -> None:
        """Kernels are compiled at their first use: here, while nobody waits for a row."""
        for weights in [each for each in self.weights.values() if len(each.gate_EFD)][:1]:
            row_A = torch.zeros(1, dtype=torch.int64, device=self.spec.device)
            x_RD = torch.zeros(1, self.spec.model.hidden_size, dtype=weights.gate_EFD.dtype, device=self.spec.device)
            with torch.inference_mode():
                self.backend(x_RD, Assignments(row_A, row_A, torch.ones_like(row_A, dtype=torch.float32)), weights)

    def _check(self, layer: int, version: int, deadline_s: float) -> None:
        if time.time() > deadline_s:
            raise DeadlineExceeded(
                f"shard {self.spec.name}: the call's deadline passed {time.time() - deadline_s:.2f} s ago"
            )
        if self.version < 0:
            raise Unavailable(f"shard {self.spec.name} has no weights yet")
        if version != self.version:
            raise StepConflict(f"shard {self.spec.name} holds version {self.version}, the caller wants {version}")
        if layer not in self.weights:
            raise WrongEpoch(f"shard {self.spec.name} holds nothing of layer {layer}")

    def _slots(self, layer: int, ids_RK: Tensor, epoch: int) -> "_Slots":
        """The slots that are for this shard, with checkpoint expert numbers as positions in the stacks."""
        local_X = self._local[layer][ids_RK.cpu().flatten()]  # ELSEWHERE finds the last
        slot_A = (local_X != ELSEWHERE).nonzero().squeeze(1)
        expert_A = local_X[slot_A]
        if len(expert_A) and int(expert_A.min()) == STRANGER:
            stranger = int(ids_RK.flatten()[slot_A[expert_A == STRANGER][0]])
            raise WrongEpoch(
                f"shard {self.spec.name} does not hold expert ({layer}, {stranger}) of placement epoch {epoch}"
            )
        return _Slots(slot_A, slot_A // ids_RK.shape[1], expert_A)

    def _assign(self, slots: "_Slots", weights_RK: Tensor) -> Assignments:
        """On the shard's device; differentiable in the weights."""
        slot_A, row_A, expert_A = (index.to(self.spec.device) for index in slots)
        return Assignments(row_A, expert_A, weights_RK.to(self.spec.device).flatten().index_select(0, slot_A))

    def _remember(self, op_id: str, layer: int, rows: Rows, slots: "_Slots") -> _Op:
        if op_id in self._ops:
            return self._ops[op_id]
        x_RD = rows.x_RD.to(self.spec.device).detach().requires_grad_()
        weights_RK = rows.weights_RK.detach().requires_grad_()
        with torch.enable_grad():
            y_RD = self.backend(x_RD, self._assign(slots, weights_RK), self.weights[layer])
        f, d, size = self.spec.model.moe_intermediate_size, self.spec.model.hidden_size, x_RD.element_size()
        num_bytes = size * (2 * x_RD.numel() + len(slots.slot_A) * (4 * f + 2 * d))
        op = _Op((x_RD, weights_RK), y_RD, None, num_bytes)
        self._ops[op_id] = op
        self._cached_bytes += op.num_bytes
        while self._cached_bytes > self.spec.activation_cache_bytes and len(self._ops) > 1:
            self._cached_bytes -= self._ops.popitem(last=False)[1].num_bytes
        return op

    def _recompute(self, call: Backward) -> _Op:
        if call.rows is None:
            self.cache_misses += 1
            raise InputGone(
                f"shard {self.spec.name} no longer has the activations of {call.op_id}; send the rows again"
            )
        slots = self._slots(call.layer, call.rows.ids_RK, call.epoch)
        return self._remember(call.op_id, call.layer, call.rows, slots)

    def _accumulate(self, layer: int, gradients: tuple[Tensor, ...]) -> None:
        for name, gradient in zip(_names(layer), gradients, strict=True):
            if name in self.grads:
                self.grads[name].add_(gradient)
            else:
                self.grads[name] = gradient.float()  # laid out as its weight: the backends see to it

    def _expect_next(self, step: int) -> None:
        if step != self.version + 1:
            raise StepConflict(f"shard {self.spec.name} is at version {self.version}; step {step} does not follow")

    def _forget(self) -> None:
        self._ops.clear()
        self._applied.clear()
        self.grads.clear()
        self._cached_bytes = 0

    def _make_optimizer(self, source: Checkpoint | None) -> None:
        assert self.spec.optim is not None
        f, d = self.spec.model.moe_intermediate_size, self.spec.model.hidden_size
        shapes = (Matrix(f, d), Matrix(f, d), Matrix(d, f))  # fan_out, fan_in of gate, up, down
        params = {name: t for layer, w in self.weights.items() for name, t in zip(_names(layer), w, strict=True)}
        matrices = {name: m for layer in self.weights for name, m in zip(_names(layer), shapes, strict=True)}
        self.optimizer = Optimizer({name: t.detach() for name, t in params.items()}, matrices, self.spec.optim)
        if source is not None and source.has_training_state:
            self._restore_optimizer(source)

    def _restore_optimizer(self, source: Checkpoint) -> None:
        assert self.optimizer is not None
        mine = dict(self._named_state(self.experts))
        for key, tensor in source.training_tensors(mine).items():
            mine[key].copy_(tensor)
        self.optimizer.num_updates = int(source.state["num_updates"])

    def _named(self, experts: Experts) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint key, matrix in the checkpoint's orientation), as views."""
        for layer, held in experts.items():
            for expert in held:
                at = int(self._local[layer][expert])
                gate, up, down = self.weights[layer]
                for projection, matrix in zip(PROJECTIONS, (gate[at], up[at], down[at].mT), strict=True):
                    yield expert_key(layer, expert, projection), matrix.detach()

    def _named_state(self, experts: Experts) -> Iterator[tuple[str, Tensor]]:
        """(key::kind, matrix) of the optimizer state, as views in the checkpoint's orientation."""
        assert self.optimizer is not None
        for layer, held in experts.items():
            for expert in held:
                at = int(self._local[layer][expert])
                for projection, name in zip(PROJECTIONS, _names(layer), strict=True):
                    for kind, stack in self.optimizer.state[name].items():
                        matrix = stack[at].mT if projection == "down_proj" else stack[at]
                        yield f"{expert_key(layer, expert, projection)}::{kind}", matrix


def restacked(stack_EFD: Tensor, keep: list[int], added: list[Tensor]) -> Tensor:
    """The matrices at `keep`, then the added ones [F, D]; laid out in memory as the stack was."""
    stack_EFD = stack_EFD.detach()
    stored = as_stored(stack_EFD)
    made = on_huge_pages(
        torch.empty((len(keep) + len(added), *stored.shape[1:]), dtype=stored.dtype, device=stored.device)
    )
    seen = made if stored is stack_EFD else made.mT
    for at, old in enumerate(keep):
        seen[at].copy_(stack_EFD[old])
    for at, matrix_FD in enumerate(added, len(keep)):
        seen[at].copy_(matrix_FD)
    return seen


def _names(layer: int) -> tuple[str, str, str]:
    return f"{layer}.gate", f"{layer}.up", f"{layer}.down"


def _positions(held: tuple[int, ...], num_experts: int) -> Tensor:
    """int64 [experts of the layer + 1]: position in the stack, STRANGER where another shard has it; the last: ELSEWHERE."""
    local = torch.full((num_experts + 1,), STRANGER, dtype=torch.int64)
    local[list(held)] = torch.arange(len(held))
    local[ELSEWHERE] = ELSEWHERE
    return local
