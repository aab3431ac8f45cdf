"""A shard's weights and optimizer state from a checkpoint, or from the seed."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from trinity.adapters import peft
from trinity.checkpoint import Checkpoint, open_checkpoint
from trinity.config import ModelConfig, OptimConfig
from trinity.errors import ConfigError
from trinity.experts.base import LayerWeights
from trinity.experts.derived import Form, shapes_of
from trinity.experts.sizes import replica_bytes
from trinity.experts.stacked import (
    derive,
    derived_rows,
    experts_of,
    is_value,
    kinds_of,
    make_version,
    named_matrices,
    optimizer_of,
    rows_of,
    stacks_of,
    unfilled_version,
    with_adapters,
    with_form,
)
from trinity.models.rules.init import init_expert
from trinity.rpc.messages import WEIGHT, Experts, Load
from trinity.state.versioned_store import Store, Version
from trinity.utils.hugepages import regather
from trinity.utils.machine import free_and_total
from trinity.utils.units import size

AT_ONCE_BYTES = 64 << 20  # of experts in fp32 that are made into another form
ADAPTERS = tuple(f"{part}.{WEIGHT}" for part in peft.PARTS)  # kinds


class Reading:
    """Bytes of one load, counted on any thread."""

    def __init__(self) -> None:
        self.done = self.total = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.done += num_bytes


def loaded(
    store: Store,
    empty: LayerWeights,
    model: ModelConfig,
    optim: OptimConfig | None,
    experts: Experts,
    message: Load,
    reading: Reading,
    form: Form | None = None,
) -> Version:
    """The version that the message names, of `experts`, in memory of the store; not put there yet. `empty`: stacks of none;
    `form`: one in which they are wanted, too, or alone where nothing is trained."""
    source = open_checkpoint(message.checkpoint) if message.checkpoint else None
    if source is not None:
        source.fetch(experts)
    if form is not None and optim is None:
        return _settled(_in_form(store, model, form, experts, source, message.seed, reading), source)
    check_free(sum(map(len, experts.values())), model, optim, form, str(empty.gate_EFD.device))
    version = unfilled_version(store, empty, model, experts)
    if source is None:
        _draw(version, model, message.seed)
    elif optim is not None and optim.lora.rank:
        _read(version, source.base, reading)  # its adapter is trained on, or another one is
    else:
        _read(version, source, reading)
    if optim is not None and optim.lora.rank and optim.trains_experts:
        version = with_adapters(store, version, model, optim.lora, message.seed)
        if source is not None and source.adapter is not None:
            source.adapter.fill(dict(named_matrices(version, model, experts, ADAPTERS)))
    version = with_state(store, version, model, optim)
    num_updates = 0
    if optim is not None and source is not None and message.training and source.has_training_state:
        state = [kind for kind in kinds_of(version) if not is_value(kind)]
        mine = dict(named_matrices(version, model, experts, state))
        for key, tensor in source.training_tensors(mine).items():
            mine[key].copy_(tensor)
        num_updates = int(source.state["num_updates"])
    if form is not None and optim is not None:
        version = with_form(store, version, model, form)
        derive(version.tensors, model, optimizer_of(version, model, optim))
    # A run that starts from somebody's weights counts its own steps from 0.
    number = source.version if source and (message.training or optim is None) else 0
    return _settled(make_version(number, version.tensors, experts, num_updates), source)


def _settled(version: Version, source: Checkpoint | None) -> Version:
    """The version, its memory on huge pages."""
    if source is not None:
        regather(version.tensors.values(), source.leave_memory)
    return version


def _in_form(
    store: Store,
    model: ModelConfig,
    form: Form,
    experts: Experts,
    source: Checkpoint | None,
    seed: int,
    reading: Reading,
) -> Version:
    """The weights of these experts in that form and no other, made a few at a time; what is stored so keeps its numbers."""
    held: Experts = {layer: experts.get(layer, ()) for layer in model.moe_layers}
    check_free(sum(map(len, held.values())), model, None, form, "cpu")
    version = with_form(store, make_version(source.version if source else 0, {}, held, 0), model, form)
    num = max(1, AT_ONCE_BYTES // (4 * model.expert_params))
    reading.total = 4 * model.expert_params * sum(map(len, held.values()))
    for layer, ids in held.items():
        stacks = stacks_of(version, layer, form.kind)
        made = [at for at, expert in enumerate(ids) if not _is_kept(stacks, form, at, layer, expert, source)]
        reading.add(4 * model.expert_params * (len(ids) - len(made)))
        for places in (made[start : start + num] for start in range(0, len(made), num)):
            matrices = [torch.empty((len(places), *shape)) for shape in shapes_of(model)]
            _fill(matrices, layer, [ids[at] for at in places], model, source, seed, reading)
            for stack_EW, matrix_CNK in zip(stacks, matrices, strict=True):
                for at, matrix_NK in zip(places, matrix_CNK, strict=True):
                    form.derive(stack_EW, at, matrix_NK)
    return version


def _is_kept(
    stacks: Sequence[Tensor], form: Form, at: int, layer: int, expert: int, source: Checkpoint | None
) -> bool:  # fmt: skip
    """Fill an expert's places from a checkpoint that has it in that form; say whether it does."""
    kept = source.kept_expert(layer, expert, form.name) if source is not None else None
    for stack_EW, matrix in zip(stacks, kept or (), strict=False):
        form.keep(stack_EW, at, matrix)
    return kept is not None


def _fill(
    matrices: Sequence[Tensor], layer: int, ids: Sequence[int], model: ModelConfig, source: Checkpoint | None, seed: int,
    reading: Reading,
) -> None:  # fmt: skip
    """Fill gate, up and down [C, N, K] with some experts, as a checkpoint or the seed has them."""
    each = zip(ids, *matrices, strict=True)
    if source is not None:
        return source.fill([p for i, *three in each for p in source.expert_parts(layer, i, *three)], told=reading.add)
    for i, *three in each:
        for mine, drawn in zip(three, init_expert(model, layer, i, seed, torch.float32), strict=True):
            mine.copy_(drawn)


def check_free(num: int, model: ModelConfig, optim: OptimConfig | None, form: Form | None, device: str) -> None:
    """Raise ConfigError where so many experts, with all that training needs of them, do not fit into what is free there."""
    if torch.device(device).type not in ("cpu", "cuda"):  # nobody says what is free on others
        return
    dtype = form.name if form else model.dtype
    each, (free, _) = replica_bytes(model, optim, dtype), free_and_total(device)
    if num * each.most > free:
        raise ConfigError(
            f"{num} experts take {size(num * each.most)} of memory ({each.described(num, dtype)}), {size(free)} is free on the "
            "node of this shard: raise placement.num_shards, lower placement.redundancy, or let the node have more"
        )


def _read(version: Version, source: Checkpoint, reading: Reading) -> None:
    """Fill the stacks from the files, each number once and straight into its place."""
    parts = []
    for layer, held in experts_of(version).items():
        gate_EFD, up_EFD, down_EFD = stacks_of(version, layer, WEIGHT)
        for at, expert in enumerate(held):
            parts += source.expert_parts(layer, expert, gate_EFD[at], up_EFD[at], down_EFD[at].mT)
    reading.total = sum(part.target.nbytes for part in parts)
    source.fill(parts, "reading the experts", reading.add)


def _draw(version: Version, model: ModelConfig, seed: int) -> None:
    """Fill the stacks with what a run of that seed starts from."""
    for layer, held in experts_of(version).items():
        gate_EFD, up_EFD, down_EFD = stacks_of(version, layer, WEIGHT)
        for at, expert in enumerate(held):
            gate_FD, up_FD, down_DF = init_expert(model, layer, expert, seed, torch.float32)
            for stack, matrix in ((gate_EFD, gate_FD), (up_EFD, up_FD), (down_EFD, down_DF.mT)):
                stack[at].copy_(matrix)


def with_state(store: Store, version: Version, model: ModelConfig, optim: OptimConfig | None) -> Version:
    """The version with fresh optimizer state beside its weights; as it is, where nothing is trained."""
    if optim is None:
        return version
    optimizer, tensors = optimizer_of(version, model, optim), dict(version.tensors)
    for name, weight in optimizer.params.items():
        for kind in optimizer.kinds(name, weight.dtype):
            fresh = store.empty_like(torch.empty_like(weight, dtype=torch.float32, device="meta"))
            tensors[f"{name}::{kind}"] = fresh.copy_(weight) if kind == "master" else fresh.zero_()
    return Version(version.number, tensors, version.notes)


def read_form(source: Checkpoint | None, model: ModelConfig, layer: int, expert: int, seed: int, form: Form) -> Tensor:
    """The row of words of a form, as `fetch` gives it, of an expert in a checkpoint or of the seed."""
    stacks = [form.empty(shape, 1) for shape in shapes_of(model)]
    if _is_kept(stacks, form, 0, layer, expert, source):
        return rows_of(stacks, form.kind, 0, model)
    return derived_rows(read_expert(source, model, layer, expert, seed), form, model)


def read_expert(source: Checkpoint | None, model: ModelConfig, layer: int, expert: int, seed: int) -> Tensor:
    """rows_ND: gate, up and the transpose of down, from a checkpoint or from the seed."""
    gate, up, down = source.expert(layer, expert) if source else init_expert(model, layer, expert, seed, torch.float32)
    return torch.cat([gate, up, down.mT])
