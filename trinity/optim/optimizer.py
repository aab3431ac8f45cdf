"""Optimizers as plain state over named tensors: Muon for hidden matrices, AdamW for the rest.

Decisions: gradients, moments and master weights are fp32 whatever the storage type; the same class serves the backbone and
every expert shard, so a global clip is a sum of their squared norms; state is a flat dict of tensors, made for safetensors.
An update may go beside the old values instead of over them: a step is made before it is decided (trinity/state/).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trinity.config import OptimConfig
from trinity.optim.muon import Matrix, orthogonalize
from trinity.state.strides import as_stored

PIECE = 1 << 18  # elements: four tensors of a piece are 4 MiB


Kinds = Mapping[str, Tensor]


def sq_norm(grads: Iterable[Tensor]) -> float:
    """Sum of squares over all gradients; inf or nan when one of them is. fp32 within a row, fp64 between rows."""
    rows = [torch.linalg.vector_norm(as_stored(g), dim=-1, dtype=torch.float32) for g in grads]
    return float(sum((r.double().square().sum().cpu() for r in rows), torch.zeros((), dtype=torch.float64)))


class Optimizer:
    """Updates `params`. Tensors named in `matrices` are under Muon, the others under AdamW.

    One-dimensional tensors (norm gains) are not decayed. A missing gradient counts as zero. Owned by one process.
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
        self.params, self.config, self.num_updates = dict(params), config, num_updates
        self.matrices = dict(matrices) if config.matrices == "muon" else {}
        fresh = {name: self._fresh(name, p) for name, p in self.params.items()} if state is None else state
        self.state: dict[str, dict[str, Tensor]] = {name: dict(kinds) for name, kinds in fresh.items()}

    def _fresh(self, name: str, param: Tensor) -> dict[str, Tensor]:
        state = {kind: torch.zeros_like(param, dtype=torch.float32) for kind in self.kinds(name, param.dtype)}
        if "master" in state:
            state["master"].copy_(param)
        return state

    def kinds(self, name: str, dtype: torch.dtype) -> tuple[str, ...]:
        """Of state that a tensor of that name and type has, all fp32."""
        kinds = ("momentum",) if name in self.matrices else ("exp_avg", "exp_avg_sq")
        return kinds if dtype == torch.float32 else (*kinds, "master")

    def step(self, grads: Mapping[str, Tensor], muon_lr: float, adamw_lr: float, grad_scale: float = 1.0) -> None:
        """Apply one update in place, with `grads` multiplied by `grad_scale` (the global clip): their values are used up."""
        self.step_into(self, grads, muon_lr, adamw_lr, grad_scale)

    @torch.no_grad()
    def step_into(
        self,
        target: "Optimizer",
        grads: Mapping[str, Tensor],
        muon_lr: float,
        adamw_lr: float,
        grad_scale: float = 1.0,
    ) -> None:
        """Like `step`, but the new values go to the tensors of `target`, whose old ones do not matter; nothing of this one
        is written, unless it is the target itself. The same bits either way."""
        target.num_updates = self.num_updates + 1
        for name, param in target.params.items():
            found = grads.get(name)
            grad = torch.zeros_like(param, dtype=torch.float32) if found is None else found.float().mul_(grad_scale)
            old, new = ({"weight": each.params[name], **each.state[name]} for each in (self, target))
            kind = "master" if "master" in new else "weight"
            if name in self.matrices:
                self._muon(name, kind, grad, muon_lr, old, new)
            else:
                self._adamw(target.num_updates, kind, grad, adamw_lr, old, new)
            if kind == "master":
                param.copy_(new["master"])

    def _muon(self, name: str, kind: str, grad: Tensor, lr: float, old: Kinds, new: Kinds) -> None:
        config, momentum = self.config, new["momentum"]
        torch.mul(old["momentum"], config.muon_momentum, out=momentum).add_(grad)
        direction = grad + config.muon_momentum * momentum if config.muon_nesterov else momentum
        update = orthogonalize(direction, config.muon_steps)
        decayed = torch.mul(old[kind], 1.0 - lr * config.weight_decay, out=new[kind])
        decayed.sub_(update, alpha=lr * self.matrices[name].lr_scale)

    def _adamw(self, num_updates: int, kind: str, grad: Tensor, lr: float, old: Kinds, new: Kinds) -> None:
        """torch.optim.AdamW's fused kernel: one pass over memory, where the formula in steps makes fifteen. Old values are
        copied piece by piece, so that the kernel finds them in the processor's cache."""
        config, names = self.config, (kind, "exp_avg", "exp_avg_sq")
        step = torch.tensor(float(num_updates), device=grad.device)
        decay = config.weight_decay if grad.ndim > 1 else 0.0
        grads = as_stored(grad).reshape(-1).split(PIECE)
        pieces = [zip(*(as_stored(k[n]).reshape(-1).split(PIECE) for n in names), strict=True) for k in (old, new)]
        for g, before, after in zip(grads, *pieces, strict=True):
            if old[kind] is not new[kind]:
                for source, target in zip(before, after, strict=True):
                    target.copy_(source)
            w, mean, square = after
            torch._fused_adamw_(
                [w], [g], [mean], [square], [], [step],
                lr=lr, beta1=config.adamw_betas[0], beta2=config.adamw_betas[1], weight_decay=decay,
                eps=config.adamw_eps, amsgrad=False, maximize=False,
            )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """All state as `{param}::{kind}`; the tensors are the live ones."""
        return {f"{name}::{kind}": t for name, kinds in self.state.items() for kind, t in kinds.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Copy state written by `tensors()` back in place; every name must be there."""
        for key, mine in self.tensors().items():
            mine.copy_(tensors[key])
        self.num_updates = num_updates
