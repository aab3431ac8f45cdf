"""Versions of a shard as functions: expert weights and optimizer state in stacks, one for each projection of a layer.

Legend: E experts of a layer on this shard, F expert hidden, D model, r rank of adapters, N = 3F rows of an expert.
A version's tensors are named `{layer}.{gate|up|down}::{kind}`, what comes before `::` being the stack's name; its notes say
which experts the stacks hold, in order, and how many updates were done. Adapters are further stacks, `{layer}.gate.lora_A` and
so on, in the checkpoint's orientation: A [E, r, inputs] and B [E, outputs, r], fp32. What a caller calls a kind says which
three stacks are meant, too: `momentum`, or `lora_A.exp_avg`. Nothing here writes to a version: each change is a new one, which
shares with the old what did not change.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trinity.adapters import peft
from trinity.adapters.lora import first_a
from trinity.checkpoint import PROJECTIONS, expert_key
from trinity.config import LoraConfig, ModelConfig, OptimConfig
from trinity.errors import InvalidRequest
from trinity.experts.base import LayerWeights
from trinity.experts.derived import Form, form_of, shapes_of
from trinity.optim.base import Matrix
from trinity.optim.optimizer import MASTER, Optimizer
from trinity.rpc.messages import WEIGHT, Experts
from trinity.state.versioned_store import Store, Version

# -- reading a version


def stack_names(layer: int, part: str = "") -> tuple[str, str, str]:
    """Names of a layer's stacks, as optimizers and gradients have them: of weights, or of a part of their adapters."""
    end = f".{part}" if part else ""
    return f"{layer}.gate{end}", f"{layer}.up{end}", f"{layer}.down{end}"


def trained_names(layer: int, optim: OptimConfig | None) -> tuple[str, ...]:
    """Names of the stacks of a layer that take steps."""
    if optim is None or not optim.trains_experts:
        return ()
    return tuple(name for part in (peft.PARTS if optim.lora.rank else ("",)) for name in stack_names(layer, part))


def is_weight(key: str) -> bool:
    """Say whether a version's tensor of that name is a stack of weights, not of optimizer state."""
    return key.endswith(f"::{WEIGHT}")


def is_value(kind: str) -> bool:
    """Say whether a kind is of numbers that are computed with, not of optimizer state."""
    return kind.rpartition(".")[2] == WEIGHT


def experts_of(version: Version) -> Experts:
    """Experts that its stacks hold, by layer and in their order."""
    return {int(layer): tuple(held) for layer, held in version.notes["experts"].items()}


def places_of(version: Version, experts: Experts) -> dict[str, list[int]]:
    """Places of those of the experts that the version has, by the name of the stack."""
    held = experts_of(version).items()
    return {
        name: [at for at, expert in enumerate(ids) if expert in set(experts.get(layer, ()))]
        for layer, ids in held
        for part in ("", *peft.PARTS)
        for name in stack_names(layer, part)
        if f"{name}::{WEIGHT}" in version.tensors
    }


def stacks_of(version: Version, layer: int, kind: str) -> tuple[Tensor, ...]:
    """The stacks of a layer: gate, up and down. Raises InvalidRequest for a kind that the version does not have."""
    try:
        return tuple(version.tensors[key] for key in _keys(layer, kind))
    except KeyError:
        raise InvalidRequest(
            f"version {version.number} has no {kind!r} of layer {layer}, only {kinds_of(version)}"
        ) from None


def kinds_of(version: Version) -> tuple[str, ...]:
    """Kinds of rows that an expert has: its weights, and adapters, other forms and optimizer state where there are some."""
    return tuple(sorted(dict.fromkeys(map(_kind, version.tensors)), key=lambda kind: kind != WEIGHT)) or (WEIGHT,)


def _kind(key: str) -> str:
    name, _, kind = key.partition("::")
    return ".".join([*name.split(".")[2:], kind])


def _keys(layer: int, kind: str) -> tuple[str, ...]:
    """Keys of the three tensors of a layer that a kind means."""
    part, _, own = kind.rpartition(".")
    return tuple(f"{name}::{own}" for name in stack_names(layer, part))


def packed(parts: Sequence[Tensor]) -> Tensor:
    """Matrices as one tensor: one under the other, or, of unlike widths, end to end in one row."""
    if len({part.shape[-1] for part in parts}) == 1:
        return torch.cat(list(parts))
    return torch.cat([part.flatten() for part in parts])[None]


def unpacked(rows: Tensor, shapes: Iterable[torch.Size]) -> list[Tensor]:
    """The inverse of `packed`, by the shapes."""
    shapes = list(shapes)
    pieces = rows.flatten().split([shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def rows_of(stacks: Sequence[Tensor], kind: str, at: int, model: ModelConfig) -> Tensor:
    """rows_ND of one expert, as `fetch` gives them: a copy. Words of a form are one row, seen as fp32."""
    if (form := form_of(kind)) is None:
        return packed([stack[at] for stack in stacks])
    rows = [form.row(stack, at, shape) for stack, shape in zip(stacks, shapes_of(model), strict=True)]
    return torch.cat(rows)[None].view(torch.float32)


def derived_rows(rows_ND: Tensor, form: Form, model: ModelConfig) -> Tensor:
    """The same of the form that an expert's weights have: gate, up and the transpose of down, one under the other."""
    gate, up, down = rows_ND.chunk(3)
    stacks = [form.empty(shape, 1) for shape in shapes_of(model)]
    for stack_EW, matrix_NK in zip(stacks, (gate, up, down.mT), strict=True):
        form.derive(stack_EW, 0, matrix_NK)
    return rows_of(stacks, form.kind, 0, model)


def put_rows(stacks: Sequence[Tensor], kind: str, at: int, rows_ND: Tensor, model: ModelConfig) -> None:
    """The inverse: fill one expert's places in the stacks."""
    if (form := form_of(kind)) is None:
        for stack, part in zip(stacks, unpacked(rows_ND, [stack.shape[1:] for stack in stacks]), strict=True):
            stack[at].copy_(part)
        return
    words = rows_ND.flatten().view(torch.int32).split([stack.shape[1] for stack in stacks])
    for stack, shape, row_W in zip(stacks, shapes_of(model), words, strict=True):
        form.put(stack, at, shape, row_W)


def named_matrices(
    version: Version, model: ModelConfig, experts: Experts, kinds: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint key, matrix in the checkpoint's orientation), as views; keys of optimizer state end with `::kind`."""
    there = experts_of(version)
    for layer, held in experts.items():
        for expert in held:
            at = there[layer].index(expert)
            for i, projection in enumerate(PROJECTIONS):
                for kind in kinds:
                    part, _, own = kind.rpartition(".")
                    matrix = version.tensors[_keys(layer, kind)[i]][at]
                    key = expert_key(model, layer, expert, projection)
                    key = peft.key_of(key, part) if part else key
                    is_turned = projection == "down_proj" and not part
                    yield key if own == WEIGHT else f"{key}::{own}", matrix.mT if is_turned else matrix


# -- making one


def make_version(number: int, tensors: Mapping[str, Tensor], experts: Experts, num_updates: int) -> Version:
    """A version of tensors whose stacks hold these experts."""
    named = {str(layer): list(held) for layer, held in experts.items()}
    return Version(number, tensors, {"experts": named, "num_updates": num_updates})


def with_notes(version: Version, **notes: Any) -> Version:
    """The version with these notes in the place of its own of the same names, or beside them."""
    return Version(version.number, version.tensors, {**version.notes, **notes})


def empty_stacks(model: ModelConfig, dtype: torch.dtype, device: str, is_down_transposed: bool) -> LayerWeights:
    """Stacks of no experts, laid out as a backend wants them: what is added to them keeps type and layout."""
    f, d = model.moe_intermediate_size, model.hidden_size
    plain = torch.empty((0, f, d), dtype=dtype, device=device)
    down = torch.empty((0, d, f), dtype=dtype, device=device).mT if is_down_transposed else plain
    return LayerWeights(plain, plain, down)


def empty_version(empty: LayerWeights, model: ModelConfig, number: int, num_updates: int) -> Version:
    """Weights of no experts, in all layers. `empty`: see `empty_stacks`."""
    experts: Experts = dict.fromkeys(model.moe_layers, ())
    stacks = {f"{n}::{WEIGHT}": t for layer in experts for n, t in zip(stack_names(layer), empty, strict=True)}
    return make_version(number, stacks, experts, num_updates)


def with_form(store: Store, version: Version, model: ModelConfig, form: Form) -> Version:
    """The version with its weights in a form, too: in memory of the store, whose values are anything."""
    tensors = dict(version.tensors)
    for layer, held in experts_of(version).items():
        for key, shape in zip(_keys(layer, form.kind), shapes_of(model), strict=True):
            tensors[key] = store.empty_like(form.empty(shape), len(held))
    return Version(version.number, tensors, version.notes)


def without_weights(version: Version) -> Version:
    """The version without what its forms are made of."""
    tensors = {key: tensor for key, tensor in version.tensors.items() if _kind(key) != WEIGHT}
    return Version(version.number, tensors, version.notes)


@torch.no_grad()
def derive(tensors: Mapping[str, Tensor], model: ModelConfig, optimizer: Optimizer) -> None:
    """Fill stacks of a form from the weights that an optimizer has, fp32 masters where there are some; of frozen ones from
    those beside them."""
    for key, stack_EW in tensors.items():
        name, form = key.partition("::")[0].rpartition(".")[0], form_of(_kind(key))
        if form is not None:
            beside = tensors.get(f"{name}::{WEIGHT}")
            weight_EFD = (
                optimizer.state[name].get(MASTER, optimizer.params[name]) if name in optimizer.params else beside
            )
            assert weight_EFD is not None, f"{key} is made of nothing"
            for at, matrix_FD in enumerate(weight_EFD):
                form.derive(stack_EW, at, matrix_FD.mT if name.endswith("down") else matrix_FD)


def unfilled_version(store: Store, empty: LayerWeights, model: ModelConfig, experts: Experts) -> Version:
    """Weights of these experts in memory of the store, whose values are anything. `empty`: see `empty_stacks`."""
    held: Experts = {layer: experts.get(layer, ()) for layer in model.moe_layers}
    stacks = {
        f"{name}::{WEIGHT}": store.empty_like(stack, len(ids))
        for layer, ids in held.items()
        for name, stack in zip(stack_names(layer), empty, strict=True)
    }
    return make_version(0, stacks, held, 0)


def with_adapters(store: Store, version: Version, model: ModelConfig, lora: LoraConfig, seed: int) -> Version:
    """The version with an adapter beside each of its matrices, as a run of that seed begins: B is zero."""
    f, d, tensors = model.moe_intermediate_size, model.hidden_size, dict(version.tensors)
    for layer, held in experts_of(version).items():
        for i, (num_out, num_in) in enumerate(((f, d), (f, d), (d, f))):
            a_ErK, b_ENr = (
                store.empty_like(torch.empty((0, *shape), dtype=torch.float32, device="meta"), len(held))
                for shape in ((lora.rank, num_in), (num_out, lora.rank))
            )
            for at, expert in enumerate(held):
                key = expert_key(model, layer, expert, PROJECTIONS[i])
                a_ErK[at].copy_(first_a(lora.rank, num_in, seed, key))
            for part, stack in zip(peft.PARTS, (a_ErK, b_ENr.zero_()), strict=True):
                tensors[f"{stack_names(layer, part)[i]}::{WEIGHT}"] = stack
    return Version(version.number, tensors, version.notes)


def restacked(
    store: Store,
    version: Version,
    model: ModelConfig,
    layer: int,
    keep: Sequence[int],
    experts: tuple[int, ...],
    rows: Mapping[str, Sequence[Tensor]],
) -> Version:
    """The version with other experts in a layer: those at the positions to `keep`, then the ones whose `rows[kind]` [N, D] are
    given; where those of a kind are not, zeros."""
    tensors = dict(version.tensors)
    for kind in kinds_of(version):
        old = stacks_of(version, layer, kind)
        parts = [*(rows_of(old, kind, at, model) for at in keep), *rows.get(kind, ())]
        new = [store.empty_like(stack, len(experts)).zero_() for stack in old]
        for at, row_ND in enumerate(parts):
            put_rows(new, kind, at, row_ND, model)
        tensors |= zip(_keys(layer, kind), new, strict=True)
    notes = {**version.notes, "experts": {**version.notes["experts"], str(layer): experts}}
    return Version(version.number, tensors, notes)


# -- a version and its optimizer


def optimizer_of(version: Version, model: ModelConfig, config: OptimConfig) -> Optimizer:
    """The optimizer over the version's own tensors that take steps. Adapters are no hidden matrices: to make their updates
    orthogonal would be another method."""
    f, d = model.moe_intermediate_size, model.hidden_size
    shapes = (Matrix(f, d), Matrix(f, d), Matrix(d, f))  # fan_out, fan_in of gate, up, down
    matrices = {n: m for layer in experts_of(version) for n, m in zip(stack_names(layer), shapes, strict=True)}
    state: dict[str, dict[str, Tensor]] = {n: {} for layer in experts_of(version) for n in trained_names(layer, config)}
    for key, tensor in version.tensors.items():
        name, _, kind = key.partition("::")
        if name in state:
            state[name][kind] = tensor
    params = {name: kinds.pop(WEIGHT) for name, kinds in state.items()}
    return Optimizer(params, matrices, config, state, version.notes["num_updates"])


def version_after(before: Version, made: Optimizer, derived: Mapping[str, Tensor]) -> Version:
    """The version that follows, of the tensors that a step has made and the forms of these; what takes no steps is the same
    memory."""
    weights = {f"{name}::{WEIGHT}": tensor for name, tensor in made.params.items()}
    tensors = {**before.tensors, **weights, **made.tensors(), **derived}
    return make_version(before.number + 1, tensors, experts_of(before), made.num_updates)


def empty_forms(store: Store, version: Version, made: Optimizer) -> dict[str, Tensor]:
    """Memory for the forms of what a step makes, by the names that they have in the version; the values are anything."""
    names = [key for key in version.tensors if form_of(_kind(key)) is not None]
    own = [key for key in names if key.partition("::")[0].rpartition(".")[0] in made.params]
    return {key: store.empty_like(version.tensors[key]) for key in own}


def empty_optimizer(store: Store, like: Optimizer) -> Optimizer:
    """An optimizer like that one over new memory of the store, for the version that its step makes; the values are anything."""
    params = {name: store.empty_like(tensor) for name, tensor in like.params.items()}
    state = {name: {k: store.empty_like(t) for k, t in kinds.items()} for name, kinds in like.state.items()}
    return Optimizer(params, like.matrices, like.config, state)
