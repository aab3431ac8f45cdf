"""The backbone as a worker trains it: versions in a store, the committed one copied into the model.

A version's tensors are named as in a checkpoint, with `::weight` (fp32) and `::{kind}` of optimizer state; of a selection bias
also `::momentum`. What takes no steps is the same memory in all versions and has no state; adapters are weights of their own,
named after their matrices. Decisions: a step is made beside the present version and counts when the job has decided so, as on
the shards; the model keeps weights of its own, because autograd and caches of packed weights hold on to their tensors.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trinity.adapters import peft
from trinity.adapters.lora import merged
from trinity.checkpoint import Checkpoint
from trinity.config import OptimConfig
from trinity.errors import CheckpointError
from trinity.models.common.balance import sign_update, smebu
from trinity.models.common.decoder import CausalLM
from trinity.models.registry import family_of
from trinity.optim.base import Matrix
from trinity.optim.optimizer import Optimizer
from trinity.rpc.messages import Stage
from trinity.state.versioned_store import Store, Version

WEIGHT, MOMENTUM = "::weight", "::momentum"


class Backbone:
    """Owns the model's values and their optimizer state. Every worker of a job has one, with the same numbers."""

    def __init__(self, model: CausalLM, config: OptimConfig, store: Store | None = None):
        self.model, self.config = model, config
        self.store = store or Store(device=str(next(model.parameters()).device))
        self._adapters, self._biases, self._family = model.adapters(), model.biases(), family_of(model.config)
        self._weights = {**model.weights(), **self._adapters}
        self.trained = {name: weight for name, weight in self._weights.items() if weight.requires_grad}
        self._shown: Version | None = None  # what the model's values are of

    @property
    def version(self) -> int:
        return self.store.committed

    @property
    def num_updates(self) -> int:
        return self.store.current.notes["num_updates"]

    # -- where its values come from

    def load(self, source: Checkpoint) -> None:
        """Take the values of a checkpoint into the model; an adapter stays apart where this run trains one."""
        (source.base if self.config.lora.rank else source).load_backbone(self.model)
        if self._adapters and source.adapter is not None:
            with torch.no_grad():
                source.adapter.fill({peft.PREFIX + name: weight for name, weight in self._adapters.items()})

    @torch.no_grad()
    def begin(self, number: int) -> None:
        """The model's present values are that version; optimizer state is fresh."""
        self.store.clear()
        tensors = {name + WEIGHT: self._stored(value) for name, value in self._values()}
        optimizer = self._optimizer({n: tensors[n + WEIGHT] for n in self.trained}, None, 0)
        tensors |= {name: self._stored(value) for name, value in optimizer.tensors().items()}
        tensors |= {name + MOMENTUM: self._stored(torch.zeros_like(bias)) for name, bias in self._biases.items()}
        self._committed(Version(number, tensors, self._notes(0)))

    def restore(self, source: Checkpoint) -> None:
        """Values and optimizer state of a checkpoint that was written in training."""
        self.load(source)
        self.begin(source.version)
        with torch.no_grad():
            tensors = self.store.current.tensors
            found = source.training_tensors(self.training_state())
            for name, tensor in found.items():
                tensors[name.replace("::master", WEIGHT)].copy_(tensor)
        self._shown = None
        self._committed(Version(source.version, tensors, self._notes(int(source.state["num_updates"]))))

    def take(self, version: Version) -> None:
        """The values of another worker's store, or of a former one's."""
        if self.store.versions.get(version.number) is not version:
            self.store.clear()
            tensors = {name: self._stored(tensor) for name, tensor in version.tensors.items()}
            version = Version(version.number, tensors, {**version.notes, **self._notes(version.notes["num_updates"])})
        self._committed(version)

    def expected(self) -> dict[str, Tensor]:
        """Names and shapes of a version's tensors (on the meta device), for a worker that will receive one."""
        shapes = {name + WEIGHT: value.to("meta") for name, value in self._values()}
        optimizer = self._optimizer({n: shapes[n + WEIGHT] for n in self.trained}, None, 0)
        momenta = {name + MOMENTUM: bias.to("meta") for name, bias in self._biases.items()}
        return {**shapes, **optimizer.tensors(), **momenta}

    # -- a step

    @torch.no_grad()
    def stage(self, gradients: Mapping[str, Tensor], message: Stage, counts_LE: Tensor) -> bool:
        """Make the next version as the shards do; -> whether it is finite. The model does not see it before `commit`."""
        self.store.discard_staged()
        self.store.retire(message.keep, is_value)
        old = self.store.current
        tensors = {n: self.store.empty_like(t) if self._changes(n) else t for n, t in old.tensors.items()}
        before = self._optimizer(*self._parts(old.tensors), self.num_updates)
        after = self._optimizer(*self._parts(tensors), 0)
        before.step_into(after, gradients, message.lrs, message.grad_scale)
        self._update_biases(old.tensors, tensors, counts_LE)
        self.store.put(Version(message.step, tensors, {**self._notes(after.num_updates), "attempt": message.attempt}))
        made = [t for n, t in tensors.items() if n.endswith(WEIGHT) and t.numel() and self._changes(n)]
        return all(bool(torch.isfinite(t.sum())) for t in made)

    def commit(self) -> None:
        """Make what was staged the present version."""
        staged = self.store.staged
        assert staged is not None
        self._committed(staged)

    def discard_staged(self) -> None:
        """Drop what was staged. Harmless when there is nothing."""
        self.store.discard_staged()

    # -- what checkpoints hold

    def values(self, dtype: torch.dtype, version: Version) -> Iterator[tuple[str, Tensor]]:
        """A version in the model's type; the selection biases stay fp32."""
        for name, tensor in version.tensors.items():
            if name.endswith(WEIGHT):
                plain = name.removesuffix(WEIGHT)
                yield plain, tensor if plain in self._biases else tensor.to(dtype)

    def training_state(self, version: Version | None = None) -> dict[str, Tensor]:
        """State beside the values: optimizer state, momenta, and the fp32 weights that a bf16 checkpoint rounds. That of an
        adapter is in fp32."""
        tensors = (version or self.store.current).tensors
        state = {name: tensor for name, tensor in tensors.items() if not name.endswith(WEIGHT)}
        if self.model.config.dtype == "float32" or self.config.lora.rank:
            return state
        return {**state, **{f"{name}::master": tensors[name + WEIGHT] for name in self._weights}}

    def adapter(self, version: Version) -> Iterator[tuple[str, Tensor]]:
        """The adapters of a version, by their keys in PEFT's format."""
        yield from ((peft.PREFIX + name, version.tensors[name + WEIGHT]) for name in self._adapters)

    # -- inside

    def _notes(self, num_updates: int) -> dict[str, Any]:
        """`lora_scale`: who computes with the version's values must merge its adapters."""
        scale = {"lora_scale": self.config.lora.scale} if self._adapters else {}
        return {"num_updates": num_updates, **scale}

    def _changes(self, key: str) -> bool:
        """Say whether a step may change that tensor."""
        name = key.partition("::")[0]
        return self.config.trains("router") if name in self._biases else name in self.trained

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, parameter.detach()) for name, parameter in self._weights.items())
        yield from self._biases.items()

    def _stored(self, value: Tensor) -> Tensor:
        return self.store.empty_like(value).copy_(value)

    @torch.no_grad()
    def _committed(self, version: Version) -> None:
        if version is not self.store.versions.get(version.number):
            self.store.put(version)
        self.store.commit(version.number)
        before, self._shown = self._shown, version
        for name, value in self._values():
            if before is None or before.tensors[name + WEIGHT] is not version.tensors[name + WEIGHT]:
                value.copy_(version.tensors[name + WEIGHT])

    def _parts(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Parameters, and their optimizer state."""
        params = {name: tensors[name + WEIGHT] for name in self.trained}
        state: dict[str, dict[str, Tensor]] = {name: {} for name in params}
        for key, tensor in tensors.items():
            name, _, kind = key.partition("::")
            if name in state and kind != WEIGHT[2:]:
                state[name][kind] = tensor
        return params, state

    def _optimizer(
        self, params: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Tensor]] | None, num_updates: int
    ) -> Optimizer:
        own = {n: p for n, p in params.items() if n not in self._adapters}  # these are no hidden matrices
        matrices = {n: Matrix(*p.shape) for n, p in own.items() if self._family.group(n, p) == "matrices"}
        return Optimizer(params, matrices, self.config, state, num_updates)

    def _update_biases(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], counts_LE: Tensor) -> None:
        """Once per step, from the global counts, identically on every worker."""
        if not self.config.trains("router"):
            return
        config = self.config
        counts_LE = counts_LE.to(self.store.device) if self._biases else counts_LE[:0]  # a family may have none
        for name, counts_E in zip(self._biases, counts_LE, strict=True):
            bias_E, momentum_E = old[name + WEIGHT], old[name + MOMENTUM]
            if config.bias_update == "smebu":
                rates = (config.smebu_lambda, config.smebu_beta, config.smebu_kappa)
                bias_E, momentum_E = smebu(bias_E, momentum_E, counts_E, *rates)
            elif config.bias_update == "sign":
                bias_E = sign_update(bias_E, counts_E, config.sign_gamma)
            new[name + WEIGHT].copy_(bias_E)
            new[name + MOMENTUM].copy_(momentum_E)


def is_value(name: str) -> bool:
    """Say whether a version's tensor of that name is what an engine needs."""
    return name.endswith(WEIGHT)


def load_values(model: CausalLM, version: Version) -> None:
    """Copy a version's values into an engine's model, in its own type, with adapters merged. Raises CheckpointError where one
    is missing."""
    values = {name.removesuffix(WEIGHT): tensor for name, tensor in version.tensors.items() if name.endswith(WEIGHT)}
    for name in [name for name in values if name.endswith(".lora_A.weight")]:
        key, a_rK = name.replace(".lora_A", ""), values[name]
        values[key] = merged(values[key], a_rK, values[name.replace(".lora_A", ".lora_B")], version.notes["lora_scale"])
    try:
        model.load(values)
    except KeyError as missing:
        raise CheckpointError(f"version {version.number} of the backbone has no {missing.args[0]}") from None
