"""Muon: momentum, then the orthogonalised update of whole matrices, by Newton-Schulz iteration.

Legend: M rows and N columns of a matrix, leading dimensions (experts) are a batch of independent matrices.
Sources: learning-rate rule, arXiv 2602.17004; iteration coefficients, the public Dion code's Newton-Schulz.
"""

import math

import torch
from torch import Tensor

from trinity.config import OptimConfig
from trinity.optim.base import WEIGHT, Change, Matrix

NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Muon:
    """The rule of hidden matrices (trinity/optim/base.py)."""

    kinds: tuple[str, ...] = ("momentum",)

    def __init__(self, config: OptimConfig):
        self.config = config

    @staticmethod
    def peak_lr(config: OptimConfig) -> float:
        return config.muon_lr

    def update(self, change: Change) -> None:
        config, lr, momentum, weight = self.config, change.lr, change.new["momentum"], change.new[WEIGHT]
        assert change.matrix is not None
        grad = change.grad.mul_(change.scale)
        torch.mul(change.old["momentum"], config.muon_momentum, out=momentum).add_(grad)
        direction = grad + config.muon_momentum * momentum if config.muon_nesterov else momentum
        update = orthogonalize(direction, config.muon_steps)
        torch.mul(change.old[WEIGHT], 1.0 - lr * config.weight_decay, out=weight)
        weight.sub_(update, alpha=lr * lr_scale(change.matrix))


def lr_scale(matrix: Matrix) -> float:
    """Factor of the learning rate for matrices of that shape."""
    return math.sqrt(max(1.0, matrix.fan_out / matrix.fan_in))


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
