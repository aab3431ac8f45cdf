"""Adapters as checkpoints: a folder in PEFT's format, ours or anybody's, that counts as its base with the adapter merged in.

Legend: N outputs and K inputs of a matrix, r rank.
Decisions: whoever reads weights gets base + (alpha / r) B A, rounded once, so that an adapter is served, scored, converted and
trained on like any checkpoint; who goes on training the adapter reads `base` and `adapter` apart. Names, shapes and the base's
fingerprint are checked when the folder is opened, numbers when they are read.
"""

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinity.adapters import peft
from trinity.adapters.lora import merged
from trinity.checkpoint.layout import all_experts
from trinity.checkpoint.quantised import QuantisedMatrix
from trinity.checkpoint.read import Checkpoint, open_checkpoint
from trinity.checkpoint.strict import read_json, reading
from trinity.checkpoint.tensor_file import TYPES, Part, Reading, TensorFile
from trinity.config import AdapterRef, ModelConfig, OptimConfig, Target
from trinity.errors import CheckpointError, ConfigError
from trinity.models.common.adapted import BackboneAdapter
from trinity.models.common.family import Nobody
from trinity.models.common.keys import PROJECTIONS
from trinity.models.registry import build, family_of, read_config
from trinity.rpc.messages import Experts

AGAIN = "put its files back, or load it anew under another name"


class Adapter:
    """The tensors of one adapter, read on demand, for a model of that architecture."""

    def __init__(self, path: Path, config: peft.AdapterConfig, model: ModelConfig):
        self.path, self.config = path, config
        with reading(path):
            self._file = TensorFile(path)
            self._stamp = self._file.stamp()
        parts = [peft.module_of(key, path) for key in self._file.keys]
        self.modules, matrices = frozenset(module for module, _ in parts), adaptable(model)
        for module in sorted(self.modules):
            self._check(module, matrices.get(module))

    def _check(self, module: str, matrix: "Matrix | None") -> None:
        if matrix is None:
            raise CheckpointError(
                f"{self.path}: the model has no matrix {module!r}; is this the adapter of another one?"
            )
        (num_out, num_in), rank = matrix.shape, self.config.rank
        wanted = dict(zip(peft.PARTS, ((rank, num_in), (num_out, rank)), strict=True))
        for part, size in wanted.items():
            key = peft.key_of(module, part)
            with reading(self.path, f"{key!r} in "):
                entry = self._file.entry(key)
            if entry.shape != size or entry.dtype not in TYPES:
                raise CheckpointError(
                    f"{self.path}: {key} is {entry.dtype} {[*entry.shape]}, the model and r {self.config.rank} want {[*size]}"
                )

    def check_base(self, base: Checkpoint) -> None:
        """Raise CheckpointError where it is known to be an adapter to other weights than these."""
        if self.config.content not in (None, base.content):
            raise CheckpointError(
                f"{self.path} is an adapter to other weights than {base.name} has; it was trained on {self.config.base}"
            )

    def tensor(self, key: str) -> Tensor:
        """A part by its key, fp32. Raises CheckpointError where it is missing, or not finite."""
        with reading(self.path, f"{key!r} in "):
            found = torch.empty(self._file.entry(key).shape)
            self._file.read(Part(key, found))
            self._check_same(self._file.stamp())
        if not torch.isfinite(found).all():
            raise CheckpointError(f"{self.path}: {key} has numbers that are not finite; take an earlier checkpoint")
        return found

    @cached_property
    def content(self) -> int:
        """A number above 0 made of all that is in its file, its rank and its share: whoever computes with an adapter of that
        number computes with these factors."""
        with reading(self.path):
            digest = self._file.digest()
        digest.update(f"{self.config.rank} {self.config.alpha!r}".encode())
        return int.from_bytes(digest.digest()[:8], "big") >> 1 or 1

    def check_content(self, wanted: int) -> None:
        """Raise CheckpointError where its files are others than those that somebody has seen."""
        if wanted != self.content:
            raise CheckpointError(f"{self.path} has changed since the adapter was loaded; {AGAIN}")

    def _check_same(self, stamp: tuple[int, int]) -> None:
        if stamp != self._stamp:
            raise CheckpointError(f"{self.path} was written to while it was in use; {AGAIN}")

    def verify(self) -> None:
        """Look at every number. Raises CheckpointError for one that is not finite."""
        for module in self.modules:
            for part in peft.PARTS:
                self.tensor(peft.key_of(module, part))

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copy parts into this memory, by their keys."""
        for key, target in targets.items():
            target.copy_(self.tensor(key))

    def add_to(self, module: str, weight_NK: Tensor) -> None:
        """Merge what it has for a matrix, if anything, into the matrix."""
        if module in self.modules:
            a_rK, b_Nr = (self.tensor(peft.key_of(module, part)) for part in peft.PARTS)
            weight_NK.copy_(merged(weight_NK, a_rK, b_Nr, self.config.scale))


class AdapterFolder(Checkpoint):
    """An adapter's folder, or one on the Hub, for a model that somebody else has opened. Raises CheckpointError where it is the
    adapter of another architecture."""

    def __init__(self, source: str | Path, model: ModelConfig):
        self.config = model
        super().__init__(source)

    def _open_weights(self) -> None:
        path = self._verified(peft.CONFIG)
        self._adapter = Adapter(self._verified(peft.WEIGHTS), peft.config_of(read_json(path), path), self.config)

    @property
    def adapter(self) -> Adapter:
        return self._adapter


def examined(source: str, model: ModelConfig, base: str | None) -> AdapterFolder:
    """An adapter for that model, all its files and numbers looked at. `base`: the weights' checkpoint, where it is known."""
    folder = AdapterFolder(source, model)
    if base is not None and folder.adapter.config.content is not None:
        served = open_checkpoint(base)
        if served.adapter is not None:
            raise CheckpointError(f"{source} belongs to plain weights, {base} has an adapter of its own merged in")
        folder.adapter.check_base(served)
    folder.verify()
    folder.adapter.verify()
    return folder


def backbone_adapter(ref: AdapterRef, model: ModelConfig, device: str) -> BackboneAdapter:
    """An adapter's part that is beside the backbone."""
    adapter = AdapterFolder(ref.source, model).adapter
    adapter.check_content(ref.content)
    dtype, matrices = getattr(torch, model.dtype), adaptable(model)
    own = [module for module in adapter.modules if matrices[module].role != "experts"]
    pairs = {
        module: [adapter.tensor(peft.key_of(module, part)).to(device, dtype) for part in peft.PARTS] for module in own
    }
    return BackboneAdapter(ref, {module: (a_rK, b_Nr) for module, (a_rK, b_Nr) in pairs.items()}, adapter.config.scale)


class AdaptedCheckpoint(Checkpoint):
    """The base that an adapter's folder names, with the adapter merged into what is read."""

    def _open_weights(self) -> None:
        path = self._verified(peft.CONFIG)
        config = peft.config_of(read_json(path), path)
        self._base = Checkpoint(self._near(config.base))
        self.config: ModelConfig = self._base.config
        if (self.path / "config.json").is_file():
            self.config = read_config(read_json(self._verified("config.json")), self.path)
        self._adapter = Adapter(self._verified(peft.WEIGHTS), config, self.config)
        self._adapter.check_base(self._base)

    def _near(self, base: str) -> str:
        """The base's name; a path may be relative to the adapter's folder."""
        return str(self.path / base) if (self.path / base / "config.json").is_file() else base

    @property
    def base(self) -> Checkpoint:
        return self._base

    @property
    def adapter(self) -> Adapter:
        return self._adapter

    @property
    def generation(self) -> dict[str, Any] | None:
        return self._base.generation

    @property
    def has_tokenizer(self) -> bool:
        return super().has_tokenizer or self._base.has_tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        from trinity.text.tokenizer import Tokenizer

        return Tokenizer.load(self.path) if super().has_tokenizer else self._base.tokenizer

    @cached_property
    def weight_map(self) -> dict[str, str]:
        return self._base.weight_map

    def verify(self) -> None:
        super().verify()
        self._base.verify()
        self._adapter.verify()

    def fetch(self, experts: Experts | None = None) -> None:
        self._base.fetch(experts)

    def tensor(self, key: str, shape: Iterable[int] | None = None) -> Tensor:
        found = self._base.tensor(key, shape)
        self._adapter.add_to(key.removesuffix(".weight"), found)
        return found

    def expert_parts(self, layer: int, expert: int, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> list[Part]:
        return self._base.expert_parts(layer, expert, gate_FD, up_FD, down_DF)

    def check(self, key: str, shape: Iterable[int]) -> None:
        self._base.check(key, shape)

    def _reading(self, part: Part) -> Reading:
        return AdaptedPart(self._base._reading(part), self._adapter)

    def _as_stored(self, key: str) -> QuantisedMatrix | None:
        return None if key.removesuffix(".weight") in self._adapter.modules else self._base._as_stored(key)


@dataclass(frozen=True)
class AdaptedPart:
    """One part as the base has it, with the adapter merged in, to be read with others."""

    base: Reading
    adapter: Adapter

    @property
    def part(self) -> Part:
        return self.base.part

    @property
    def order(self) -> tuple[str, int]:
        return self.base.order

    def read(self) -> None:
        self.base.read()
        self.adapter.add_to(self.part.module, self.part.target)


class Matrix(NamedTuple):
    """A matrix that may have an adapter: what it is for (OptimConfig's word), and its shape (N, K)."""

    role: str
    shape: tuple[int, int]


def adaptable(model: ModelConfig) -> dict[str, Matrix]:
    """The matrices of a model that may have an adapter, by their names in a checkpoint without `.weight`."""
    keys, weights = family_of(model).keys, build(model, Nobody(), device="meta").weights()
    roles = {key: keys.role(key) for key, weight in weights.items() if weight.ndim == 2 and weight.numel()}
    found = {key: Matrix(role, (len(weights[key]), weights[key].shape[1])) for key, role in roles.items()}
    f, d = model.moe_intermediate_size, model.hidden_size
    shapes = dict(zip(PROJECTIONS, ((f, d), (f, d), (d, f)), strict=True))
    for layer, held in all_experts(model).items():
        for expert in held:
            found |= {keys.expert.of(layer, expert, name): Matrix("experts", shape) for name, shape in shapes.items()}
    allowed = typing.get_args(Target)
    return {key.removesuffix(".weight"): matrix for key, matrix in found.items() if matrix.role in allowed}


def check_adapter(source: Checkpoint | None, optim: OptimConfig, is_own: bool) -> None:
    """Raise ConfigError where a run of these settings cannot go on from that checkpoint. `is_own`: it is of the run itself,
    else what the run begins with (None: the seed)."""
    lora, adapter = optim.lora, None if source is None else source.adapter
    if source is None:
        if lora.rank:
            raise ConfigError("optim.lora without train.init_from: name the checkpoint that the adapter is for")
    elif adapter is not None and lora.rank:
        _check_same(source, adapter, optim)
    elif is_own and (adapter is None) == bool(lora.rank):
        what = "whole weights" if adapter is None else f"an adapter of rank {adapter.config.rank}"
        raise ConfigError(
            f"{source.path} is {what}, and optim.lora.rank is {lora.rank}; restore it, or begin another run with "
            "train.init_from"
        )


def _check_same(source: Checkpoint, adapter: Adapter, optim: OptimConfig) -> None:
    theirs, mine = adapter.config, optim.lora
    if (theirs.rank, theirs.alpha) != (mine.rank, mine.alpha):
        raise ConfigError(
            f"{source.path} is an adapter of rank {theirs.rank} and alpha {theirs.alpha:g}, optim.lora has {mine.rank} and "
            f"{mine.alpha:g}; take the same, or merge it first (trinity convert)"
        )
    matrices = adaptable(source.config)
    wanted = {module for module, matrix in matrices.items() if matrix.role in mine.targets}
    if differs := sorted(wanted ^ adapter.modules):
        raise ConfigError(
            f"{source.path} is an adapter of other matrices than optim.lora.targets {', '.join(mine.targets)}: {differs[0]} "
            f"and {len(differs) - 1} more; take the same, or merge it first (trinity convert)"
        )
