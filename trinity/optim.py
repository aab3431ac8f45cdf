"""Optimizers as plain state over named tensors: Muon for hidden matrices, AdamW for the rest.

Legend: M rows and N columns of a matrix, leading dimensions (experts) are a batch of independent matrices.
Decisions: gradients, moments and master weights are fp32 whatever the storage type; the same class serves the backbone and
every expert shard, so a global clip is a sum of their squared norms; state is a flat dict of tensors, made for safetensors.
Sources: learning-rate rule and schedules, arXiv 2602.17004; iteration coefficients, the public Dion code's Newton-Schulz.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trinity.config import OptimConfig
from trinity.experts.backend import as_stored

NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalize(g: Tensor, num_steps: int = 5) -> Tensor:
    """g [..., M, N] -> a nearly orthogonal matrix of the same shape and singular vectors, fp32. Zero stays zero.

    bf16 on CUDA, where it is fast; fp32 on CPU, where small differences between runs should stay small.
    """
    x = g.to(torch.bfloat16 if g.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for step in range(num_steps):
        a, b, c = NEWTON_SCHULZ[min(step, len(NEWTON_SCHULZ) - 1)]
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


def lr_factor(step: int, config: OptimConfig, total_steps: int) -> float:
    """Share of the peak learning rate for the update that makes version `step` (1-based): warmup, flat, decay."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    start = config.warmup_steps if config.decay_start is None else max(config.decay_start, config.warmup_steps)
    if config.decay == "none" or step <= start:
        return 1.0
    done = min(1.0, (step - start) / max(1, total_steps - start))
    left = 1.0 - done if config.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * left


@dataclass(frozen=True)
class Matrix:
    """A tensor under Muon: [..., fan_out, fan_in], or its transpose in storage."""

    fan_out: int
    fan_in: int

    @property
    def lr_scale(self) -> float:
        return math.sqrt(max(1.0, self.fan_out / self.fan_in))


def sq_norm(grads: Iterable[Tensor]) -> float:
    """Sum of squares over all gradients; inf or nan when one of them is. fp32 within a row, fp64 between rows."""
    rows = [torch.linalg.vector_norm(as_stored(g), dim=-1, dtype=torch.float32) for g in grads]
    return float(sum((r.double().square().sum().cpu() for r in rows), torch.zeros((), dtype=torch.float64)))


class Optimizer:
    """Updates `params` in place. Tensors named in `matrices` are under Muon, the others under AdamW.

    One-dimensional tensors (norm gains) are not decayed. A missing gradient counts as zero. Owned by one process.
    """

    def __init__(self, params: Mapping[str, Tensor], matrices: Mapping[str, Matrix], config: OptimConfig):
        self.params, self.matrices, self.config = (
            dict(params),
            dict(matrices) if config.matrices == "muon" else {},
            config,
        )
        self.num_updates = 0
        self.state: dict[str, dict[str, Tensor]] = {name: self._fresh(name, p) for name, p in self.params.items()}

    def _fresh(self, name: str, param: Tensor) -> dict[str, Tensor]:
        kinds = ("momentum",) if name in self.matrices else ("exp_avg", "exp_avg_sq")
        state = {kind: torch.zeros_like(param, dtype=torch.float32) for kind in kinds}
        if param.dtype != torch.float32:
            state["master"] = param.detach().float()
        return state

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], muon_lr: float, adamw_lr: float, grad_scale: float = 1.0) -> None:
        """Apply one update with `grads` multiplied by `grad_scale` (the global clip), in place: their values are used up."""
        self.num_updates += 1
        for name, param in self.params.items():
            found = grads.get(name)
            grad = torch.zeros_like(param, dtype=torch.float32) if found is None else found.float().mul_(grad_scale)
            weight = self.state[name].get("master", param)
            if name in self.matrices:
                self._muon(name, weight, grad, muon_lr)
            else:
                self._adamw(name, weight, grad, adamw_lr)
            if weight is not param:
                param.copy_(weight)

    def _muon(self, name: str, weight: Tensor, grad: Tensor, lr: float) -> None:
        config, momentum = self.config, self.state[name]["momentum"]
        momentum.mul_(config.muon_momentum).add_(grad)
        direction = grad + config.muon_momentum * momentum if config.muon_nesterov else momentum
        update = orthogonalize(direction, config.muon_steps)
        weight.mul_(1.0 - lr * config.weight_decay).sub_(update, alpha=lr * self.matrices[name].lr_scale)

    def _adamw(self, name: str, weight: Tensor, grad: Tensor, lr: float) -> None:
        """torch.optim.AdamW's fused kernel: one pass over memory, where the formula in steps makes fifteen."""
        (beta1, beta2), state = self.config.adamw_betas, self.state[name]
        step = torch.tensor(float(self.num_updates), device=weight.device)
        w, g, mean, square = (as_stored(t) for t in (weight, grad, state["exp_avg"], state["exp_avg_sq"]))
        decay, eps = self.config.weight_decay if weight.ndim > 1 else 0.0, self.config.adamw_eps
        torch._fused_adamw_(
            [w], [g], [mean], [square], [], [step],
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        # The kernel does not count its write; those who keep a packed copy of a weight would not notice.
        torch.autograd.graph.increment_version(w)

    def replace(self, name: str, param: Tensor, state: Mapping[str, Tensor]) -> None:
        """From now on `name` is that tensor, with that state: some of its matrices came or went."""
        self.params[name], self.state[name] = param, dict(state)

    def tensors(self) -> dict[str, Tensor]:
        """All state as `{param}::{kind}`; the tensors are the live ones."""
        return {f"{name}::{kind}": t for name, kinds in self.state.items() for kind, t in kinds.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Copy state written by `tensors()` back in place; every name must be there."""
        for key, mine in self.tensors().items():
            mine.copy_(tensors[key])
        self.num_updates = num_updates
