"""Experts of every layer that a shard holds, at every version: how they come, change hands and go.

Decisions: every change makes new stacks and a version with other contents, put in place at once (stacked.py): rows are
computed meanwhile. The store's memory may outlive the process (trinity/state/).
"""

import torch
from torch import Tensor

from trinity.checkpoint import write_tensors
from trinity.errors import InvalidRequest, StepConflict, VersionGone
from trinity.experts.base import Assignments, ExpertBackend, LayerWeights
from trinity.experts.derived import form_for, form_of
from trinity.experts.derived_compute import infer
from trinity.experts.loading import Reading, loaded, with_state
from trinity.experts.row_counts import RowCounts
from trinity.experts.spec import ShardSpec
from trinity.experts.stacked import (
    empty_stacks,
    empty_version,
    experts_of,
    is_value,
    kinds_of,
    named_matrices,
    restacked,
    rows_of,
    stacks_of,
    with_adapters,
    with_form,
    with_notes,
    without_weights,
)
from trinity.experts.weight_versions import WeightVersions
from trinity.rpc.messages import Experts, Fetch, Install, Load, Part, PruneTo, Save
from trinity.state.versioned_store import Version


class ExpertWeights:
    """Which experts are here, with their optimizer state where the shard trains, and how many rows each has computed. For any
    threads: takes the locks of its `versions`."""

    def __init__(self, spec: ShardSpec, backend: ExpertBackend, versions: WeightVersions):
        self.spec, self.versions = spec, versions
        self.row_counts = RowCounts(spec.model.moe_layers, spec.model.num_experts)
        self.form = form_for(spec)
        self._store, self._backend = versions.store, backend
        self.reading = Reading()
        self._epoch = 0  # of the newest table that was acted on

    @property
    def experts(self) -> Experts:
        """Experts held now; before anything is loaded, those that are to be."""
        return experts_of(self._store.current) if self.versions.number >= 0 else dict(self.spec.experts)

    @property
    def num_experts(self) -> int:
        """The number of experts of all layers that are held now."""
        return sum(map(len, self.experts.values())) if self.versions.number >= 0 else 0

    def holds(self, version: int, layer: int) -> tuple[int, ...]:
        """Experts of a layer that are here at that version."""
        with self.versions.lock:
            found = self._store.versions.get(version)
            return experts_of(found)[layer] if found else ()

    def kinds(self, version: int) -> tuple[str, ...]:
        """Kinds of rows that a copy of an expert at that version needs: weights and adapters, and optimizer state where this
        shard trains."""
        with self.versions.lock:
            kinds = kinds_of(self._store.versions.get(version) or self._empty_version(version, 0))
            return kinds if version >= self.versions.number else tuple(filter(is_value, kinds))

    def position(self, message: Fetch) -> int:
        """The place in the stacks of the expert that a caller wants. Raises WrongEpoch when it is not here,
        VersionGone when only its present version is."""
        held = self.versions.find(message.layer, message.version, message.deadline_s).experts
        if message.expert not in held:
            raise self.versions.missing(message.version, message.layer, self._epoch, message.expert)
        return held.index(message.expert)

    def fetch(self, message: Fetch) -> Tensor:
        """-> rows_ND of one expert: its weights or optimizer state, a copy."""
        with self.versions.lock:
            at = self.position(message)
            stacks = stacks_of(self._store.get(message.version), message.layer, message.kind)
            return rows_of(stacks, message.kind, at, self.spec.model)

    # -- coming and going

    @torch.no_grad()
    def install(self, message: Install) -> int:
        """Take up experts; -> how many were not here yet. Raises StepConflict for rows of a version that this shard is not at,
        unless it holds no experts at all: then it takes up theirs. Rows of an older version that is kept elsewhere are of
        weights alone; nobody steps from it. Raises InvalidRequest where optimizer state is wanted and missing."""
        with self.versions.making, self.versions.lock:
            self._epoch = max(self._epoch, message.epoch)
            version = self._place_for(message)
            held = experts_of(version)[message.layer]
            new = [i for i, expert in enumerate(message.experts) if expert not in held]
            if new and version.number >= self.versions.number and not set(kinds_of(version)) <= message.rows.keys():
                raise InvalidRequest(f"experts came with {tuple(message.rows)}; this shard needs {kinds_of(version)}")
            rows = {kind: [found[i] for i in new] for kind, found in message.rows.items()}
            experts = (*held, *(message.experts[i] for i in new))
            self.versions.put(
                restacked(self._store, version, self.spec.model, message.layer, range(len(held)), experts, rows)
            )
            self.versions.on_change()
            return len(new)

    @torch.no_grad()
    def prune_to(self, message: PruneTo) -> int:
        """Drop the experts that the table does not name, from all versions; -> how many the present one had."""
        with self.versions.making, self.versions.lock:
            if message.epoch < self._epoch:  # a late message: what it drops may have been given back
                return 0
            self._epoch, before = message.epoch, self.num_experts
            for version in list(self._store.versions.values()):
                for layer in experts_of(version):
                    version = self._pruned(version, layer, set(message.experts.get(layer, ())))
            return before - self.num_experts

    def _pruned(self, version: Version, layer: int, wanted: set[int]) -> Version:
        """The version, put in place with none but the wanted experts in a layer."""
        held = experts_of(version)[layer]
        keep = [at for at, expert in enumerate(held) if expert in wanted]
        if len(keep) == len(held):
            return version
        self.row_counts.forget(layer, [expert for expert in held if expert not in wanted])
        left = restacked(self._store, version, self.spec.model, layer, keep, tuple(held[at] for at in keep), {})
        self.versions.put(left)
        self.versions.on_change()
        return left

    def _place_for(self, message: Install) -> Version:
        """The version that experts are added to."""
        number, is_other = message.version, message.line != self.versions.line
        if number in self._store.versions and not is_other:
            return self._store.versions[number]
        is_newer = is_other or number > self.versions.number
        if is_newer and self.num_experts:
            raise StepConflict(
                f"shard {self.spec.name} holds version {self.versions.number}, the copies are of {number}"
                + " of another line" * is_other
            )
        version = with_notes(self._empty_version(number, message.num_updates), line=message.line)
        if is_newer:
            self.versions.clear()
        self.versions.put(version, commit=is_newer)
        return version

    # -- files

    @torch.no_grad()
    def load(self, message: Load) -> int:
        """Take the weights from a checkpoint or from the seed; -> version. Nobody computes with half of a checkpoint."""
        with self.versions.making, self.versions.lock:
            self.versions.on_change()
            experts = self.experts
            self.versions.clear()
            self.reading, model = Reading(), self.spec.model
            empty = self._empty_stacks()
            version = loaded(self._store, empty, model, self.spec.optim, experts, message, self.reading, self.form)
            self.versions.put(with_notes(version, line=message.line), commit=True)
            self._warm_up()
            return version.number

    def save(self, message: Save) -> tuple[Part, ...]:
        """Write the named experts, and their optimizer state under training/; -> the files."""
        with self.versions.lock:
            version = self._store.get(message.version)
            values, state = self._kinds_to_save(version)
            if message.training and self._is_trained and version.tensors and not state:
                raise VersionGone(
                    f"shard {self.spec.name} keeps no optimizer state of version {message.version} any more"
                )
            self._store.hold(message.version)
        try:
            matrices = named_matrices(version, self.spec.model, message.experts, values)
            parts = write_tensors(message.folder, f"model-experts-{self.spec.name}", matrices)
            if message.training and state:
                rest = named_matrices(version, self.spec.model, message.experts, state)
                parts += write_tensors(message.folder, f"training/experts-{self.spec.name}", rest)
        finally:
            with self.versions.lock:
                self._store.release(message.version)
        return parts

    # -- inside

    @property
    def _is_trained(self) -> bool:
        return self.spec.optim is not None and self.spec.optim.trains_experts

    def _kinds_to_save(self, version: Version) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """-> what a checkpoint of the version has of an expert, without its frozen weights beside adapters; its state."""
        kinds, optim = kinds_of(version), self.spec.optim
        values = tuple(kind for kind in kinds if is_value(kind) and form_of(kind) is None)
        if not values:
            raise InvalidRequest(
                f"shard {self.spec.name} has experts as {self.spec.expert_dtype} only; nothing is saved"
            )
        if optim is not None and optim.lora.rank:
            values = values[1:]
        return values, tuple(kind for kind in kinds if not is_value(kind))

    def _empty_version(self, number: int, num_updates: int) -> Version:
        """A version without experts; of older ones than the present no optimizer state is kept."""
        version = empty_version(self._empty_stacks(), self.spec.model, number, num_updates)
        if self._is_trained and self.spec.optim is not None and self.spec.optim.lora.rank:
            version = with_adapters(self._store, version, self.spec.model, self.spec.optim.lora, 0)
        if self.form is not None:
            version = with_form(self._store, version, self.spec.model, self.form)
            version = version if self.spec.optim is not None else without_weights(version)
        is_older = number < self.versions.number
        return version if is_older else with_state(self._store, version, self.spec.model, self.spec.optim)

    def _empty_stacks(self) -> LayerWeights:
        is_down_transposed = self._backend.stores_down_transposed(torch.device(self.spec.device))
        return empty_stacks(self.spec.model, self.spec.dtype, self.spec.device, is_down_transposed)

    def _warm_up(self) -> None:
        """Compute one row. Kernels are compiled at their first use: here, while nobody waits for it."""
        ready = next((each for each in self.versions.ready.values() if each.experts), None)
        if ready is None:
            return
        row_A = torch.zeros(1, dtype=torch.int64, device=self.spec.device)
        x_RD = torch.zeros(1, self.spec.model.hidden_size, dtype=self.spec.dtype, device=self.spec.device)
        assigned = Assignments(row_A, row_A, torch.ones_like(row_A, dtype=torch.float32))
        with torch.inference_mode():
            if ready.weights is not None:
                self._backend(x_RD, assigned, ready.weights)
            if ready.derived is not None:
                infer(x_RD, assigned, ready.derived)
