"""The optimizer of named tensors: each is of a parameter group, and a group has its rule and its learning rate.

Decisions: gradients, moments and master weights are fp32 whatever the storage type; the same class serves the backbone and
every expert shard, so a global clip is a sum of their squared norms; state is a flat dict of tensors, made for safetensors.
An update may go beside the old values instead of over them: a step is made before it is decided (trinity/state/).
A group is called after its rule; hidden matrices are of the group `optim.matrices`, everything else of AdamW's.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from trinity.config import OptimConfig
from trinity.optim.adamw import AdamW
from trinity.optim.base import WEIGHT, Change, Kinds, Matrix, Rule
from trinity.optim.muon import Muon
from trinity.state.strides import as_stored

RULES: Mapping[str, type[Rule]] = {"muon": Muon, "adamw": AdamW}
REST = "adamw"  # the group of what is no hidden matrix
MASTER = "master"  # the kind of state that holds fp32 values of a tensor stored in another type


def groups(config: OptimConfig) -> tuple[str, ...]:
    """The parameter groups of a model, that of its hidden matrices first."""
    return tuple(dict.fromkeys([config.matrices, REST]))


def peak_lrs(config: OptimConfig) -> dict[str, float]:
    """Group -> its highest learning rate."""
    return {group: RULES[group].peak_lr(config) for group in groups(config)}


def sq_norm(grads: Iterable[Tensor]) -> float:
    """Sum of squares over all gradients; inf or nan when one of them is. fp32 within a row, fp64 between rows."""
    rows = [torch.linalg.vector_norm(as_stored(g), dim=-1, dtype=torch.float32) for g in grads]
    return float(sum((r.double().square().sum().cpu() for r in rows), torch.zeros((), dtype=torch.float64)))


class Optimizer:
    """Updates `params`; those named in `matrices` are the hidden matrices.

    A missing gradient counts as zero. Owned by one process.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        matrices: Mapping[str, Matrix],
        config: OptimConfig,
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
        num_updates: int = 0,
    ):
        """`state`: as it is, with `num_updates` done; without it: fresh."""
        self.params, self.matrices, self.config = dict(params), dict(matrices), config
        self.num_updates = num_updates
        self.rules = {group: RULES[group](config) for group in groups(config)}
        fresh = {name: self._fresh(name, p) for name, p in self.params.items()} if state is None else state
        self.state: dict[str, dict[str, Tensor]] = {name: dict(kinds) for name, kinds in fresh.items()}

    def _fresh(self, name: str, param: Tensor) -> dict[str, Tensor]:
        state = {kind: torch.zeros_like(param, dtype=torch.float32) for kind in self.kinds(name, param.dtype)}
        if MASTER in state:
            state[MASTER].copy_(param)
        return state

    def group(self, name: str) -> str:
        """The parameter group of a tensor."""
        return self.config.matrices if name in self.matrices else REST

    def kinds(self, name: str, dtype: torch.dtype) -> tuple[str, ...]:
        """Kinds of state that a tensor of that name and type has, all fp32."""
        kinds = self.rules[self.group(name)].kinds
        return kinds if dtype == torch.float32 else (*kinds, MASTER)

    def step(self, grads: Mapping[str, Tensor], lrs: Mapping[str, float], grad_scale: float = 1.0) -> None:
        """Apply one update in place, with `grads` multiplied by `grad_scale` (the global clip): their values are used up.
        `lrs` has the learning rate of each group."""
        self.step_into(self, grads, lrs, grad_scale)

    @torch.no_grad()
    def step_into(
        self,
        target: "Optimizer",
        grads: Mapping[str, Tensor],
        lrs: Mapping[str, float],
        grad_scale: float = 1.0,
        idle: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        """Like `step`, but the new values go to the tensors of `target`, whose old ones do not matter; nothing of this one
        is written, unless it is the target itself. The same bits either way. `idle`: by name the places of a stack that stay as
        they are, state and all: a rule that is blind to scale would move them for ever by what is left of their momentum."""
        target.num_updates = self.num_updates + 1
        for name, param in target.params.items():
            old, new, resting = self._values(name), target._values(name), list(idle.get(name, ()))
            kept = {kind: values[resting] for kind, values in old.items()}  # a copy: new may lie over old
            if not resting or len(resting) < len(param):
                found = grads.get(name)
                grad = torch.zeros_like(param, dtype=torch.float32) if found is None else found.float()
                group = self.group(name)
                matrix, number = self.matrices.get(name), target.num_updates
                change = Change(grad, lrs[group], number, matrix, old, new, grad_scale)
                self.rules[group].update(change)
            for kind, values in kept.items():
                new[kind][resting] = values
            if MASTER in target.state[name]:
                param.copy_(target.state[name][MASTER])

    def _values(self, name: str) -> Kinds:
        """The fp32 tensors of one name by kind; they are the live ones."""
        state = self.state[name]
        return {**state, WEIGHT: state.get(MASTER, self.params[name])}

    def tensors(self) -> dict[str, Tensor]:
        """All state as `{param}::{kind}`; the tensors are the live ones."""
        return {f"{name}::{kind}": t for name, kinds in self.state.items() for kind, t in kinds.items()}
