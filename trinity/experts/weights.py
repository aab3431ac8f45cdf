"""What a shard holds: experts of every layer, in versions, and how they come and go.

Legend: E local experts of a layer, F expert hidden, D model.
Decisions: `lock` guards everything, `making` the memory of versions that are not there yet. Every change makes new stacks and a
version with other contents, put in place at once; the store's memory may outlive the process (trinity/state/). Who only
computes with a version needs no lock, because nobody writes to it: memory is used again when its readers have left.
"""

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trinity.checkpoint import open_checkpoint, write_tensors
from trinity.config import ModelConfig, OptimConfig
from trinity.errors import DeadlineExceeded, StepConflict, Unavailable, VersionGone, WrongEpoch
from trinity.experts.base import Assignments, LayerWeights
from trinity.experts.loading import loaded, read_expert, with_state
from trinity.experts.registry import resolve
from trinity.experts.stacked import (
    Layer,
    empty_version,
    experts_of,
    kinds_of,
    layers_of,
    named_matrices,
    restacked,
    stacks_of,
)
from trinity.rpc.messages import WEIGHT, Experts, Fetch, Forward, Install, Load, Part, PruneTo, Save
from trinity.state.versioned_store import Store, Version

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
    ordered_gradients: bool = True


class ExpertWeights:
    """The part of an ExpertShard (shard.py) that owns its versions."""

    def __init__(self, spec: ShardSpec, store: Store | None = None):
        self.spec, self.lock = spec, threading.RLock()
        self.making = threading.Lock()  # held, before `lock`, by whoever fills memory of a version; it may take long
        self._epoch = 0  # of the newest table that was acted on
        self.store = Store(device=spec.device) if store is None else store
        self.backend = resolve(spec.backend, torch.device(spec.device))
        self._layers: dict[int, tuple[Version, dict[int, Layer]]] = {}
        self._reading = threading.Condition()  # guards the two below, for whoever does not hold `lock`
        self._num_readers = Counter[int]()  # by version
        self._rows = {layer: torch.zeros(spec.model.num_experts, dtype=torch.int64) for layer in spec.model.moe_layers}
        self._publish()

    @property
    def version(self) -> int:
        """Of the weights that count; -1 without any."""
        return self.store.committed

    @property
    def experts(self) -> Experts:
        """Held now; before anything is loaded, what is to be."""
        return experts_of(self.store.current) if self.version >= 0 else dict(self.spec.experts)

    @property
    def weights(self) -> dict[int, LayerWeights]:
        """Of the present version, by layer."""
        return {layer: held.weights for layer, held in self._layers[self.version][1].items()}

    def recover_to(self, committed: int, attempt: int | None) -> None:
        """After a restart: be at the version that the pool has decided on, made by that attempt, if it is here. Otherwise hold
        nothing."""
        with self.lock:
            found = self.store.versions.get(committed)
            if found is not None and found.notes.get("attempt") in (None, attempt):  # None: copied from others
                self.store.roll_back(committed) if committed < self.version else self.store.commit(committed)
            else:
                self._clear()
            self._publish()

    # -- which experts are here

    def fetch(self, message: Fetch) -> Tensor:
        with self.lock:
            held = self._layer(message.layer, message.version, message.deadline_s).experts
            if message.expert not in held:
                raise WrongEpoch(f"shard {self.spec.name} does not hold expert ({message.layer}, {message.expert})")
            return self._rows_of(message, held.index(message.expert))

    def _rows_of(self, message: Fetch, at: int) -> Tensor:
        stacks = stacks_of(self.store.get(message.version), message.layer, message.kind)
        return torch.cat([stack[at] for stack in stacks])

    @torch.no_grad()
    def install(self, message: Install) -> int:
        """Raises StepConflict for rows of a version that this shard is not at, unless it holds no experts at all: then it
        takes up theirs. Rows of an older version that is kept elsewhere are of weights alone."""
        with self.making, self.lock:
            self._epoch = max(self._epoch, message.epoch)
            version = self._place_for(message.version, message.num_updates)
            held = experts_of(version)[message.layer]
            new = [i for i, expert in enumerate(message.experts) if expert not in held]
            rows = {kind: [found[i] for i in new] for kind, found in message.rows.items()}
            experts = (*held, *(message.experts[i] for i in new))
            self._put(restacked(self.store, version, message.layer, range(len(held)), experts, rows))
            self._moved()
            return len(new)

    @torch.no_grad()
    def prune_to(self, message: PruneTo) -> int:
        with self.making, self.lock:
            if message.epoch < self._epoch:  # a late message: what it drops may have been given back
                return 0
            num, self._epoch = 0, message.epoch
            for version in list(self.store.versions.values()):
                for layer, held in experts_of(version).items():
                    wanted = set(message.experts.get(layer, ()))
                    keep = [at for at, expert in enumerate(held) if expert in wanted]
                    if len(keep) < len(held):
                        num += (len(held) - len(keep)) * (version.number == self.version)
                        self._rows[layer][[expert for expert in held if expert not in wanted]] = 0  # counters
                        left = tuple(held[at] for at in keep)
                        version = restacked(self.store, version, layer, keep, left, {})
                        self._put(version)
                        self._moved()
            return num

    def holds(self, version: int, layer: int) -> tuple[int, ...]:
        """Experts of a layer that are here at that version."""
        with self.lock:
            found = self.store.versions.get(version)
            return experts_of(found)[layer] if found else ()

    def kinds(self, version: int) -> tuple[str, ...]:
        """What a copy of an expert at that version consists of: weights, and optimizer state where this shard trains."""
        with self.lock:
            if self.spec.optim is None or version < self.version:
                return (WEIGHT,)
            return kinds_of(self.store.versions.get(version) or self._empty_version(version, 0))

    def from_source(self, layer: int, expert: int, message: Load) -> Tensor:
        """What `fetch` would give, of the weights in a checkpoint."""
        source = open_checkpoint(message.checkpoint) if message.checkpoint else None
        return read_expert(source, self.spec.model, layer, expert, message.seed).to(DTYPES[self.spec.model.dtype])

    # -- files

    @torch.no_grad()
    def load(self, message: Load) -> int:
        """Take the weights from a checkpoint or from the seed; -> version. Nobody computes with half of a checkpoint."""
        with self.making, self.lock:
            self._changed()
            experts = self.experts
            self._clear()
            version = loaded(self.store, self._empty, self.spec.model, self.spec.optim, experts, message)
            self._put(version)
            self.store.commit(version.number)
            self._publish()
            if any(experts.values()):
                self._warm_up()
            return self.version

    def save(self, message: Save) -> tuple[Part, ...]:
        """Write the named experts, and their optimizer state under training/; -> the files."""
        with self.lock:
            version = self.store.get(message.version)
            if message.training and self.spec.optim is not None and version.tensors and kinds_of(version) == (WEIGHT,):
                raise VersionGone(
                    f"shard {self.spec.name} keeps no optimizer state of version {message.version} any more"
                )
            self.store.hold(message.version)
        try:
            matrices = named_matrices(version, message.experts, (WEIGHT,))
            parts = write_tensors(message.folder, f"model-experts-{self.spec.name}", matrices)
            if message.training and len(kinds := kinds_of(version)) > 1:
                state = named_matrices(version, message.experts, kinds[1:])
                parts += write_tensors(message.folder, f"training/experts-{self.spec.name}", state)
        finally:
            with self.lock:
                self.store.release(message.version)
        return parts

    # -- inside

    @contextmanager
    def reading(self, call: Forward) -> Iterator[Layer]:
        """What the call's version has of its layer, unchanged inside the block. Nobody waits for `lock`, which training may
        hold for as long as it computes, unless the version is not committed yet."""
        if call.version > self.version:
            with self.lock:
                self._layer(call.layer, call.version, call.deadline_s)
        self._check_time(call.deadline_s)
        with self._reading:
            found = self._found(call.layer, call.version)
            self._num_readers[call.version] += 1
        try:
            yield found
        finally:
            with self._reading:
                self._num_readers[call.version] -= 1
                self._reading.notify_all()

    def _withdraw(self, versions: Collection[int]) -> None:
        """Nobody computes with these any more, from here on."""
        with self._reading:
            self._layers = {number: each for number, each in self._layers.items() if number not in versions}
            self._reading.wait_for(lambda: not any(self._num_readers[number] for number in versions))

    def _clear(self) -> None:
        self._withdraw(list(self.store.versions))
        self.store.clear()
        self._publish()

    def _layer(self, layer: int, version: int, deadline_s: float) -> Layer:
        """What that version has of a layer. A caller that names the staged version knows that it was decided on."""
        self._check_time(deadline_s)
        if version == self.version + 1 and self.store.staged is not None and self.version >= 0:
            self._commit()
        return self._found(layer, version)

    def _check_time(self, deadline_s: float) -> None:
        if time.time() > deadline_s:
            raise DeadlineExceeded(
                f"shard {self.spec.name}: the call's deadline passed {time.time() - deadline_s:.2f} s ago"
            )

    def _found(self, layer: int, version: int) -> Layer:
        if self.version < 0:
            raise Unavailable(f"shard {self.spec.name} has no weights yet")
        if version > self.version:
            raise StepConflict(f"shard {self.spec.name} holds version {self.version}, the caller wants {version}")
        if version not in self._layers:
            raise VersionGone(f"shard {self.spec.name} keeps versions {self.store.numbers}, the caller wants {version}")
        found = self._layers[version][1].get(layer)
        if found is None:
            raise WrongEpoch(f"shard {self.spec.name} holds nothing of layer {layer}")
        return found

    def _publish(self) -> None:
        """What there is to compute with is what the store has."""
        train = self.spec.optim is not None
        self._layers = {
            number: known
            if (known := self._layers.get(number)) and known[0] is version
            else (version, layers_of(version, self.spec.model, train))
            for number, version in self.store.versions.items()
        }

    def _put(self, version: Version) -> None:
        self.store.put(version)
        self.store.trim()
        self._publish()

    def _commit(self) -> None:
        if self.store.staged is None:
            raise StepConflict(f"shard {self.spec.name} has nothing staged after version {self.version}")
        self.store.commit(self.version + 1)
        self._changed()
        self._publish()

    def _changed(self) -> None:
        """The present version is another one, or none."""

    def _moved(self) -> None:
        """Experts have come or gone: positions in stacks are others."""

    def _place_for(self, number: int, num_updates: int) -> Version:
        """The version that experts of that number are added to."""
        if number in self.store.versions:
            return self.store.versions[number]
        is_empty = not any(self.experts.values()) or self.version < 0
        if not is_empty and number > self.version:
            raise StepConflict(f"shard {self.spec.name} holds version {self.version}, the copies are of {number}")
        version = self._empty_version(number, num_updates)
        if number > self.version:
            self._clear()
        self._put(version)
        if number > self.version:
            self.store.commit(number)
            self._publish()
        return version

    @property
    def _empty(self) -> LayerWeights:
        """Stacks of no experts, of the type and layout that the backend wants."""
        device, dtype = torch.device(self.spec.device), DTYPES[self.spec.model.dtype]
        f, d = self.spec.model.moe_intermediate_size, self.spec.model.hidden_size
        plain = torch.empty((0, f, d), dtype=dtype, device=device)
        is_DF = self.backend.stores_down_transposed(device)
        return LayerWeights(plain, plain, torch.empty((0, d, f), dtype=dtype, device=device).mT if is_DF else plain)

    def _empty_version(self, number: int, num_updates: int) -> Version:
        """Without experts; of older versions than the present one only weights are kept."""
        version = empty_version(self._empty, self.spec.model, number, num_updates)
        return version if number < self.version else with_state(self.store, version, self.spec.model, self.spec.optim)

    def _warm_up(self) -> None:
        """Kernels are compiled at their first use: here, while nobody waits for a row."""
        for weights in [each for each in self.weights.values() if len(each.gate_EFD)][:1]:
            row_A = torch.zeros(1, dtype=torch.int64, device=self.spec.device)
            x_RD = torch.zeros(1, self.spec.model.hidden_size, dtype=weights.gate_EFD.dtype, device=self.spec.device)
            with torch.inference_mode():
                self.backend(x_RD, Assignments(row_A, row_A, torch.ones_like(row_A, dtype=torch.float32)), weights)
