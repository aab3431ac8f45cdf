"""AdamW by torch's fused kernel: one pass over memory, where the formula in steps makes fifteen."""

import torch
from torch import Tensor

from trinity.config import OptimConfig
from trinity.optim.base import WEIGHT, Change
from trinity.state.strides import as_stored

PIECE = 1 << 18  # elements: four tensors of a piece are 4 MiB


class AdamW:
    """The rule of all that is no hidden matrix (trinity/optim/base.py). Tensors of one dimension (norm gains) do not decay."""

    kinds: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(self, config: OptimConfig):
        self.config = config

    @staticmethod
    def peak_lr(config: OptimConfig) -> float:
        return config.adamw_lr

    def update(self, change: Change) -> None:
        """Copy old values and clip gradients piece by piece, so that the kernel finds them in the processor's cache."""
        kinds = (WEIGHT, *self.kinds)
        step = torch.tensor(float(change.number), device=change.grad.device)
        decay = self.config.weight_decay if change.grad.ndim > 1 else 0.0
        pieces = [
            zip(*(_pieces(side[kind]) for kind in kinds), strict=True) for side in (change.old, change.new)
        ]  # fmt: skip
        clipped = torch.empty(min(PIECE, change.grad.numel()), device=change.grad.device)
        for grad, before, after in zip(_pieces(change.grad), *pieces, strict=True):
            if change.old[WEIGHT] is not change.new[WEIGHT]:
                for source, target in zip(before, after, strict=True):
                    target.copy_(source)
            self._fused(torch.mul(grad, change.scale, out=clipped[: len(grad)]), after, step, change.lr, decay)

    def _fused(self, grad: Tensor, values: tuple[Tensor, ...], step: Tensor, lr: float, decay: float) -> None:
        weight, mean, square = values
        beta1, beta2 = self.config.adamw_betas
        torch._fused_adamw_(
            [weight], [grad], [mean], [square], [], [step],
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=self.config.adamw_eps, amsgrad=False, maximize=False,
        )  # fmt: skip


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return as_stored(tensor).reshape(-1).split(PIECE)
