"""One layer of one version, ready to compute with, and which slots of a caller's rows are for it.

Legend: R rows, K slots of a row, A assignments (row, expert), E experts of the layer on this shard, X experts of the model.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trinity.adapters import peft
from trinity.config import ModelConfig, OptimConfig
from trinity.errors import TrinityError
from trinity.experts.base import Assignments, LayerAdapters, LayerWeights
from trinity.experts.derived import DerivedLayer, form_of, shapes_of
from trinity.experts.stacked import experts_of, kinds_of, stack_names, stacks_of, trained_names
from trinity.rpc.messages import REMOTE, WEIGHT, Backward, Forward
from trinity.state.versioned_store import Version

NOT_HELD = -2  # in the place of a position, below REMOTE: an expert that this shard does not hold


class ReadyLayer(NamedTuple):
    """The experts of a layer that are here, where to find each, their stacked weights and adapters, and which of the stacks are
    trained, by name."""

    experts: tuple[int, ...]
    ids_E: Tensor  # int64: `experts`
    position_X: Tensor  # int64 [X + 1]: where in the stacks, NOT_HELD, or REMOTE (the last)
    weights: LayerWeights | None  # None: they are here in another form only
    derived: DerivedLayer | None  # what inference computes with where there is one
    adapters: LayerAdapters | None
    trained: Mapping[str, Tensor]


class Slots(NamedTuple):
    """The slots of a caller's rows that this shard computes, host side."""

    slot_A: Tensor  # position in the flattened [R * K]
    row_A: Tensor
    expert_A: Tensor  # position in the stacks


def _derived(version: Version, layer: int, model: ModelConfig) -> DerivedLayer | None:
    """The layer's weights in another form, where the version has them."""
    for form in filter(None, map(form_of, kinds_of(version))):
        stacks = zip(stacks_of(version, layer, form.kind), shapes_of(model), strict=True)
        return DerivedLayer(form, *(form.parts(stack_EW, shape) for stack_EW, shape in stacks))
    return None


def ready_layers(version: Version, model: ModelConfig, optim: OptimConfig | None) -> dict[int, ReadyLayer]:
    """Layers of a version by number; stacks that take steps are leaves of autograd's graph."""
    layers = {}
    for layer, held in experts_of(version).items():
        ids_E, trained = torch.tensor(held, dtype=torch.int64), trained_names(layer, optim)
        names = [name for part in ("", *peft.PARTS) for name in stack_names(layer, part)]
        found = {name: version.tensors[key] for name in names if (key := f"{name}::{WEIGHT}") in version.tensors}
        leaves = {name: stack.detach().requires_grad_(name in trained) for name, stack in found.items()}
        weights = LayerWeights(*(leaves[name] for name in names[:3])) if names[0] in leaves else None
        adapters, derived = None, _derived(version, layer, model)
        if optim is not None and names[3] in leaves:
            gate, up, down = ((leaves[a], leaves[b]) for a, b in zip(names[3:6], names[6:9], strict=True))
            adapters = LayerAdapters(gate, up, down, optim.lora.scale)
        ready = {name: leaves[name] for name in trained}
        layers[layer] = ReadyLayer(held, ids_E, _positions(ids_E, model.num_experts), weights, derived, adapters, ready)
    return layers


def slots_of(layer: ReadyLayer, call: Forward | Backward, missing: Callable[[int], TrinityError]) -> Slots:
    """Slots of the call's rows that are not REMOTE. Raises `missing(expert)` for one that is not here."""
    assert call.rows is not None
    ids_RK = call.rows.ids_RK
    position_S = layer.position_X[ids_RK.cpu().flatten()]  # S = R * K; REMOTE finds the last
    slot_A = (position_S != REMOTE).nonzero().squeeze(1)
    expert_A = position_S[slot_A]
    if len(expert_A) and int(expert_A.min()) == NOT_HELD:
        raise missing(int(ids_RK.flatten()[slot_A[expert_A == NOT_HELD][0]]))
    return Slots(slot_A, slot_A // ids_RK.shape[1], expert_A)


def assignments(slots: Slots, weights_RK: Tensor, device: str) -> Assignments:
    """The slots as a backend takes them, on the device; differentiable in the weights."""
    slot_A, row_A, expert_A = (index.to(device) for index in slots)
    return Assignments(row_A, expert_A, weights_RK.to(device).flatten().index_select(0, slot_A))


def _positions(ids_E: Tensor, num_experts: int) -> Tensor:
    position_X = torch.full((num_experts + 1,), NOT_HELD, dtype=torch.int64)
    position_X[ids_E] = torch.arange(len(ids_E))
    position_X[REMOTE] = REMOTE
    return position_X
