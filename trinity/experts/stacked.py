"""What a shard holds, as a version of its store: expert weights and optimizer state, stacked by layer.

Legend: E experts of a layer on this shard, F expert hidden, D model, N = 3F rows of an expert.
A version's tensors are named `{layer}.{gate|up|down}::{kind}`; its notes say which experts the stacks hold, in order.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinity.checkpoint import PROJECTIONS, expert_key
from trinity.config import ModelConfig, OptimConfig
from trinity.errors import InvalidRequest
from trinity.experts.base import LayerWeights
from trinity.optim.base import Matrix
from trinity.optim.optimizer import Optimizer
from trinity.rpc.messages import REMOTE, WEIGHT, Experts
from trinity.state.versioned_store import Store, Version

STRANGER = -2  # below REMOTE: an expert that this shard does not hold


class Layer(NamedTuple):
    """One layer of one version, ready to compute."""

    experts: tuple[int, ...]
    local_X: Tensor  # int64 [experts of the model + 1]: position in the stacks, STRANGER, or REMOTE (the last)
    held_E: Tensor  # int64: `experts`
    weights: LayerWeights


def names_of(layer: int) -> tuple[str, str, str]:
    return f"{layer}.gate", f"{layer}.up", f"{layer}.down"


def experts_of(version: Version) -> Experts:
    return {int(layer): tuple(held) for layer, held in version.notes["experts"].items()}


def layers_of(version: Version, model: ModelConfig, train: bool) -> dict[int, Layer]:
    """The version as it is computed with."""
    layers = {}
    for layer, held in experts_of(version).items():
        stacks = (version.tensors[f"{name}::{WEIGHT}"].detach() for name in names_of(layer))
        weights = LayerWeights(*(stack.requires_grad_(train) for stack in stacks))
        layers[layer] = Layer(held, _positions(held, model.num_experts), torch.tensor(held, dtype=torch.int64), weights)
    return layers


def stacks_of(version: Version, layer: int, kind: str) -> tuple[Tensor, ...]:
    """gate, up and down of all experts of a layer. Raises InvalidRequest for a kind that the version does not have."""
    try:
        return tuple(version.tensors[f"{name}::{kind}"] for name in names_of(layer))
    except KeyError:
        raise InvalidRequest(
            f"version {version.number} has no {kind!r} of layer {layer}, only {kinds_of(version)}"
        ) from None


def kinds_of(version: Version) -> tuple[str, ...]:
    """What belongs to an expert: its weights, and its optimizer state where the version has it."""
    return tuple(dict.fromkeys([WEIGHT, *(name.partition("::")[2] for name in version.tensors)]))


def optimizer_of(version: Version, model: ModelConfig, config: OptimConfig) -> Optimizer:
    """Over the version's own tensors."""
    f, d = model.moe_intermediate_size, model.hidden_size
    shapes = (Matrix(f, d), Matrix(f, d), Matrix(d, f))  # fan_out, fan_in of gate, up, down
    matrices = {n: m for layer in experts_of(version) for n, m in zip(names_of(layer), shapes, strict=True)}
    state: dict[str, dict[str, Tensor]] = {name: {} for name in matrices}
    for key, tensor in version.tensors.items():
        name, _, kind = key.partition("::")
        state[name][kind] = tensor
    params = {name: kinds.pop(WEIGHT) for name, kinds in state.items()}
    return Optimizer(params, matrices, config, state, version.notes["num_updates"])


def version_of(optimizer: Optimizer, number: int, experts: Experts) -> Version:
    """The inverse of `optimizer_of`."""
    weights = {f"{name}::{WEIGHT}": tensor for name, tensor in optimizer.params.items()}
    return made(number, {**weights, **optimizer.tensors()}, experts, optimizer.num_updates)


def made(number: int, tensors: Mapping[str, Tensor], experts: Experts, num_updates: int) -> Version:
    named = {str(layer): list(held) for layer, held in experts.items()}
    return Version(number, tensors, {"experts": named, "num_updates": num_updates})


def noted(version: Version, **notes: Any) -> Version:
    """The version with other notes beside those it has."""
    return Version(version.number, version.tensors, {**version.notes, **notes})


def empty_version(empty: LayerWeights, model: ModelConfig, number: int, num_updates: int) -> Version:
    """Weights of no experts, in all layers."""
    experts: Experts = dict.fromkeys(model.moe_layers, ())
    stacks = {f"{n}::{WEIGHT}": t for layer in experts for n, t in zip(names_of(layer), empty, strict=True)}
    return made(number, stacks, experts, num_updates)


def restacked(
    store: Store,
    version: Version,
    layer: int,
    keep: Sequence[int],
    experts: tuple[int, ...],
    rows: Mapping[str, Sequence[Tensor]],
) -> Version:
    """The version with other experts in a layer: those at `keep`, then the ones whose `rows[kind]` [N, D] are given."""
    tensors = dict(version.tensors)
    for kind in kinds_of(version):
        added = [row_ND.chunk(3) for row_ND in rows.get(kind, ())]
        for i, name in enumerate(names_of(layer)):
            old_EFD = tensors[f"{name}::{kind}"]
            new_EFD = store.empty_like(old_EFD, len(experts))
            for at, position in enumerate(keep):
                new_EFD[at].copy_(old_EFD[position])
            for at, parts in enumerate(added, len(keep)):
                new_EFD[at].copy_(parts[i])
            tensors[f"{name}::{kind}"] = new_EFD
    return noted(
        Version(version.number, tensors, version.notes), experts={**version.notes["experts"], str(layer): experts}
    )


def named_matrices(version: Version, experts: Experts, kinds: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint key, matrix in the checkpoint's orientation), as views; keys of optimizer state end with `::kind`."""
    there = experts_of(version)
    for layer, held in experts.items():
        for expert in held:
            at = there[layer].index(expert)
            for projection, name in zip(PROJECTIONS, names_of(layer), strict=True):
                for kind in kinds:
                    matrix = version.tensors[f"{name}::{kind}"][at]
                    key = expert_key(layer, expert, projection)
                    yield (
                        key if kind == WEIGHT else f"{key}::{kind}",
                        matrix.mT if projection == "down_proj" else matrix,
                    )


def _positions(held: tuple[int, ...], num_experts: int) -> Tensor:
    local_X = torch.full((num_experts + 1,), STRANGER, dtype=torch.int64)
    local_X[list(held)] = torch.arange(len(held))
    local_X[REMOTE] = REMOTE
    return local_X
