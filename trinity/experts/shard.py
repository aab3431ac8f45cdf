"""ExpertShard: the weights, gradients and optimizer state of some experts of every layer, and what is done to them.

Legend: R rows, D model, F expert hidden, K slots of a row, A assignments (row, expert).
Decisions: a plain class, no Ray; it owns its tensors and nobody else writes them. A mutation is applied once per name: a
backward per op_id, a commit per step. Weights are versions of a store (trinity/state/): a step is staged beside the
present version, so rows of that version are computed meanwhile, and those of the one before until the next step is staged.
`lock` guards everything; long work (staging, saving) and inference run without it, beside training. Activations kept for
backward are a bounded cache, never the truth.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trinity import native
from trinity.errors import InputGone, InvalidRequest, StepConflict
from trinity.experts import native_experts
from trinity.experts.activation_cache import ActivationCache, Activations
from trinity.experts.derived_compute import infer
from trinity.experts.grad_accumulator import GradAccumulator
from trinity.experts.layer import ReadyLayer, Slots, assignments, slots_of
from trinity.experts.named_adapters import NamedAdapters, both
from trinity.experts.native_layers import NativeLayers
from trinity.experts.peers import Peers
from trinity.experts.registry import resolve
from trinity.experts.spec import ShardSpec
from trinity.experts.stacked import derive, places_of
from trinity.experts.weight_versions import WeightVersions
from trinity.experts.weights import ExpertWeights
from trinity.ops.gradient_sums import Stacks, Sums
from trinity.rpc.messages import (
    GRADIENT,
    Abort,
    Adapt,
    Backward,
    BytesRead,
    Commit,
    Experts,
    Fetch,
    Forget,
    Forward,
    Install,
    Load,
    Part,
    Prepare,
    Progress,
    PruneTo,
    Recover,
    Rows,
    Save,
    ShardStatus,
    Stage,
    Status,
    StepReport,
    TakenAdapter,
    attempt_of,
)
from trinity.state.versioned_store import Store
from trinity.utils.gradients import gradients_of

__all__ = ["ExpertShard", "ShardSpec"]


class ExpertShard:
    """Holds `spec.experts`, or what the store holds already; its methods are the verbs of trinity/rpc/messages.py.

    It is made of the `versions` of its weights, of the `weights` that say which experts they are of, of the gradients
    `gathered` for the step under way, and of the `activations` that a backward is to come for. `peers` is how it reaches other
    replicas' gradients, set by the owner.
    """

    def __init__(self, spec: ShardSpec, store: Store | None = None):
        self.spec = spec
        self.backend = resolve(spec.backend, spec.device)
        self.store = Store(device=spec.device) if store is None else store
        self.versions = WeightVersions(spec, self.store, self._void)
        self.lock = self.versions.lock
        self.weights = ExpertWeights(spec, self.backend, self.versions)
        attempt = self.store.staged.notes["attempt"] if self.store.staged else 0
        self.adapters = NamedAdapters(spec)
        self.gathered = GradAccumulator(spec.name, attempt, spec.ordered_gradients)
        self.activations = ActivationCache(spec.activation_cache_bytes)
        self.cache_misses = 0
        self.peers: Peers | None = None
        self.native: NativeLayers | None = None
        self._last: tuple[Any, ...] = None, None, {}  # of `_described`

    def compute_natively(self) -> NativeLayers | None:
        """Let threads in C++ compute inference, beside all that is computed here and with the same bits; None where there are
        none for this shard. Harmless when repeated."""
        with self.lock:
            if self.native is None and self._is_native_possible():
                self.native = NativeLayers(self.spec.model)
                self.versions.compute_natively(self.native)
                self.weights.row_counts.others = self.native.take_counts
            return self.native

    def _is_native_possible(self) -> bool:
        return self.spec.device == "cpu" and self.backend.name == "torch" and hasattr(native.lib, "ring_service")

    @property
    def version(self) -> int:
        """Number of the weights that count; -1 without any."""
        return self.versions.number

    @property
    def experts(self) -> Experts:
        """Experts held now; before anything is loaded, those that are to be."""
        return self.weights.experts

    # -- the data path

    def infer(self, call: Forward) -> Tensor:
        """-> y_RD, one row per row received. Pure, unless `keep`: then it runs beside all else."""
        if not call.keep:
            with self.versions.reading(call) as layer, torch.inference_mode():
                return self._inferred(layer, call)
        if call.rows.adapter_R is not None:
            raise InvalidRequest("rows of a named adapter are for inference; no gradient is kept of them")
        with self.lock:
            layer = self._layer_to_train(call)
            slots = self._counted(layer, call)
            self._enter(attempt_of(call.op_id), call.version)
            return self._remembered(call.op_id, layer, call.rows, slots).y_RD.detach()

    @contextmanager
    def lend(self, version: int, dtype: torch.dtype) -> Iterator[Mapping[int, bytes]]:
        """Layers, as the extension computes rows of that type with them (native_experts.described), that stay as they are
        inside the block: those of a version that `infer` would compute without waiting, and in the same way."""
        with self.versions.reading_whole(version) as layers:
            yield self._described(layers, dtype)

    def _described(self, layers: Mapping[int, ReadyLayer], dtype: torch.dtype) -> Mapping[int, bytes]:
        if self._last[0] is not layers or self._last[1] != dtype:
            top_k, counts = self.spec.model.num_experts_per_tok, self.weights.row_counts.running
            sizes = dtype, self.spec.model.hidden_size, top_k
            own = {number: layer for number, layer in layers.items() if self._is_native(layer)}
            found = {n: native_experts.described(layer, *sizes, counts[n]) for n, layer in own.items()}
            self._last = layers, dtype, {n: what for n, what in found.items() if what is not None}
        return self._last[2]

    def _is_native(self, layer: ReadyLayer) -> bool:
        """Say whether the extension has the bits that Python would give the layer's rows."""
        return layer.derived is not None or getattr(self.backend, "is_in_order", False)

    def backward(self, call: Backward) -> tuple[Tensor, Tensor]:
        """-> dx_RD, dweights_RK. Adds to the experts' gradients the first time an op_id is seen, and only then."""
        with self.lock:
            layer = self._layer_to_train(call)
            self._enter(attempt_of(call.op_id), call.version)
            op = self.activations.get(call.op_id) or self._recomputed(layer, call)
            if op.answer is not None:
                return op.answer
            op.keep_only(self._gradients(op, layer, call))
            assert op.answer is not None
            return op.answer

    def fetch(self, message: Fetch) -> Tensor:
        """-> rows_ND of one expert: weights, optimizer state, or the gradient gathered so far."""
        if message.kind != GRADIENT:
            return self.weights.fetch(message)
        with self.lock:
            if self.version < 0:  # weights may come again, what was gathered with them does not
                raise StepConflict(
                    f"shard {self.spec.name} has lost its weights, and what step {message.version + 1} gathered"
                )
            at = self.weights.position(message)
            return self.gathered.rows(message.layer, at, self.versions.trained[message.layer])

    # -- the two-phase step

    def prepare(self, message: Prepare) -> StepReport:
        """Close what was gathered for the step, and take up the gradients of other replicas."""
        with self.lock:
            self.versions.expect_next(message.step)
            self._enter(message.attempt, message.step - 1)
            gathered, held = self.gathered, self.experts
            gathered.close()
        gathered.share(message, held, self.peers, self.spec.device)
        return StepReport(message.step, gathered.num_ops, gathered.sq_norm())

    def stage(self, message: Stage) -> bool:
        """Make the next version beside the present one; -> whether its weights are finite."""
        with self.versions.making:  # the same message may come twice: the second waits for what the first makes
            return self._stage(message)

    @torch.no_grad()
    def _stage(self, message: Stage) -> bool:
        with self.lock:
            made = self.versions.staged_by(message.attempt, message.step)
            if made is not None:
                return made.notes["is_finite"]
            self.versions.expect_next(message.step)
            num_ops = message.num_ops.get(self.spec.name)
            gradients = self.gathered.take(message.attempt, self.versions.trained, num_ops)
            optimizer, target, derived = self.versions.begin_next(message.keep)
        idle = places_of(self.store.current, message.idle)
        optimizer.step_into(target, gradients, message.lrs, message.grad_scale, idle)
        derive(derived, self.spec.model, target)
        is_finite = all(bool(torch.isfinite(weight.sum())) for weight in target.params.values())
        with self.lock:
            if self.gathered.attempt != message.attempt or self.version != message.step - 1:
                raise StepConflict(f"shard {self.spec.name}: step {message.step} was given up while it was staged")
            self.versions.stage(target, derived, attempt=message.attempt, is_finite=is_finite)
        return is_finite

    def commit(self, message: Commit) -> int:
        """Make the staged version the present one; -> version."""
        with self.lock:
            self.versions.commit(message.step)
            return self.version

    def abort(self, message: Abort) -> int:
        """Forget what that attempt gathered and staged; -> version."""
        with self.lock:
            if message.step == self.version + 1 and message.attempt == self.gathered.attempt:
                self._void()
                self.versions.discard_staged()
            return self.version

    # -- control

    def adapt(self, message: Adapt) -> TakenAdapter:
        return self.adapters.adapt(message, self.experts)

    def forget(self, message: Forget) -> bool:
        return self.adapters.forget(message)

    def load(self, message: Load) -> int:
        return self.weights.load(message)

    def save(self, message: Save) -> tuple[Part, ...]:
        return self.weights.save(message)

    def install(self, message: Install) -> int:
        return self.weights.install(message)

    def prune_to(self, message: PruneTo) -> int:
        return self.weights.prune_to(message)

    def recover(self, message: Recover) -> int:
        """Be at the version that was decided on, made by that attempt, or without any: see WeightVersions."""
        with self.lock:
            self.versions.recover_to(message.version, message.attempt, message.line)
            return self.version

    def progress(self, message: Progress) -> BytesRead:
        """Takes no lock: a load has it."""
        return BytesRead(self.weights.reading.done, self.weights.reading.total)

    def status(self, message: Status) -> ShardStatus:
        with self.lock:
            held = self.experts if self.version >= 0 else {}
            return ShardStatus(
                shard=self.spec.name,
                version=self.version,
                backend=self.backend.name,
                device=str(self.spec.device),
                num_experts=self.weights.num_experts,
                weight_bytes=self.versions.num_bytes,
                expert_dtype=self.spec.expert_dtype or self.spec.model.dtype,
                computes=native.computes()
                if self.spec.device == "cpu"
                else f"{self.backend.name}: {self.spec.model.dtype}",
                cached_ops=len(self.activations),
                cache_misses=self.cache_misses,
                versions=tuple(self.store.numbers),
                extra_bytes=self.store.extra_bytes([n for n in self.store.versions if n != self.version]),
                rows=self.weights.row_counts.read(held, message.reset_counts),
            )

    # -- inside: attempts

    def _layer_to_train(self, call: Forward | Backward) -> ReadyLayer:
        """The layer of a training call, which without weights fails at once: another attempt may find what is missing here; to
        wait for it in the middle of one would be in vain."""
        if self.version < 0:
            raise StepConflict(f"shard {self.spec.name} has no weights; the step on {call.version} must wait for them")
        return self.versions.find(call.layer, call.version, call.deadline_s)

    def _enter(self, attempt: int, version: int) -> None:
        """Let a training call in. Whatever older attempts at the step gathered here is void; their stragglers are refused."""
        if version != self.version:
            raise StepConflict(f"shard {self.spec.name} is at version {self.version}, a step on {version} is void")
        gathered = self.gathered.of(attempt)
        if gathered is not self.gathered:
            self.gathered = gathered
            self.activations.clear()
            self.versions.discard_staged()

    def _void(self) -> None:
        """Forget what was gathered on weights that are others now, or of a step that was given up."""
        self.activations.clear()
        self.gathered = self.gathered.renewed()

    # -- inside: rows

    def _slots(self, layer: ReadyLayer, call: Forward | Backward) -> Slots:
        return slots_of(layer, call, partial(self.versions.missing, call.version, call.layer, call.epoch))

    def _counted(self, layer: ReadyLayer, call: Forward) -> Slots:
        slots = self._slots(layer, call)
        rows_E = torch.bincount(slots.expert_A, minlength=len(layer.experts))
        self.weights.row_counts.add(call.layer, layer.ids_E, rows_E)
        return slots

    def _inferred(self, layer: ReadyLayer, call: Forward) -> Tensor:
        """y_RD. Rows of each adapter, and those of none, are computed apart: then all have the bits that they have alone."""
        rows = call.rows
        if layer.derived is not None and (layer.adapters is not None or rows.adapter_R is not None):
            raise InvalidRequest(
                f"shard {self.spec.name} computes experts as {self.spec.expert_dtype}, beside which no adapter is; leave "
                "placement.expert_dtype out"
            )
        if rows.adapter_R is None:
            if (found := self._at_once(layer, rows)) is not None:
                self.weights.row_counts.add(call.layer, layer.ids_E, found[1])
                return found[0]
            if layer.derived is not None:
                assigned = assignments(self._counted(layer, call), rows.weights_RK, self.spec.device)
                return infer(rows.x_RD, assigned, layer.derived)
            return self._compute(rows.x_RD.to(self.spec.device), rows.weights_RK, self._counted(layer, call), layer)
        contents = rows.adapter_R.unique().tolist()
        named = self.adapters.of(contents, call.layer, layer.experts)
        ready = [layer._replace(adapters=both(layer.adapters, each)) for each in named]
        if len(ready) == 1:
            return self._inferred(ready[0], replace(call, rows=replace(rows, adapter_R=None)))
        y_RD = torch.empty_like(rows.x_RD, device=self.spec.device)
        for content, own in zip(contents, ready, strict=True):
            own_R = (rows.adapter_R == content).nonzero().squeeze(1)
            y_RD[own_R.to(y_RD.device)] = self._inferred(own, replace(call, rows=rows.only(own_R)))
        return y_RD

    def _at_once(self, layer: ReadyLayer, rows: Rows) -> tuple[Tensor, Tensor] | None:
        """y_RD and rows_E by the extension, where it can."""
        if not self._is_native(layer):
            return None
        return native_experts.infer(layer, rows.x_RD, rows.ids_RK, rows.weights_RK)

    def _compute(
        self, x_RD: Tensor, weights_RK: Tensor, slots: Slots, layer: ReadyLayer, sums: Sums | None = None
    ) -> Tensor:
        assert layer.weights is not None, "only shards that do not train are without"
        assigned = assignments(slots, weights_RK, self.spec.device)
        return self.backend(x_RD, assigned, layer.weights, layer.adapters, sums)

    def _remembered(self, op_id: str, layer: ReadyLayer, rows: Rows, slots: Slots) -> Activations:
        """The op's activations, computed where they are not in the cache."""
        if known := self.activations.get(op_id):
            return known
        x_RD = rows.x_RD.to(self.spec.device).detach().requires_grad_()
        weights_RK = rows.weights_RK.detach().requires_grad_()
        sums = Sums()
        with torch.enable_grad():
            y_RD = self._compute(x_RD, weights_RK, slots, layer, sums)
        f, d = self.spec.model.moe_intermediate_size, self.spec.model.hidden_size
        num_bytes = x_RD.element_size() * (2 * x_RD.numel() + len(slots.slot_A) * (4 * f + 2 * d))
        return self.activations.put(op_id, Activations(x_RD, weights_RK, y_RD, num_bytes, sums))

    def _gradients(self, op: Activations, layer: ReadyLayer, call: Backward) -> tuple[Tensor, Tensor]:
        """dx_RD, dweights_RK; those of what is trained are gathered, unless they were already."""
        leaves, dy_RD = (op.x_RD, op.weights_RK), call.dy_RD.to(op.y_RD)
        if self.gathered.has(call.op_id):
            dx_RD, dweights_RK = gradients_of(op.y_RD, dy_RD, leaves)
        elif op.sums.is_used and layer.trained:
            with self.gathered.adding(call.op_id, layer.trained) as ((gate_EFD, up_EFD, down_EFD), is_new):
                op.sums.add_to(Stacks(gate_EFD, up_EFD, down_EFD.mT), is_new)
                dx_RD, dweights_RK = gradients_of(op.y_RD, dy_RD, leaves)
        else:
            dx_RD, dweights_RK, *gradients = gradients_of(op.y_RD, dy_RD, (*leaves, *layer.trained.values()))
            self.gathered.add(call.op_id, tuple(layer.trained), gradients)
        return dx_RD, dweights_RK

    def _recomputed(self, layer: ReadyLayer, call: Backward) -> Activations:
        """The activations of a backward whose forward has left the cache. Raises InputGone without its rows."""
        if call.rows is None:
            self.cache_misses += 1
            raise InputGone(
                f"shard {self.spec.name} no longer has the activations of {call.op_id}; send the rows again"
            )
        return self._remembered(call.op_id, layer, call.rows, self._slots(layer, call))
