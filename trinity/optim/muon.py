"""Muon's orthogonalised update: Newton-Schulz iteration over matrices.

Legend: M rows and N columns of a matrix, leading dimensions (experts) are a batch of independent matrices.
Sources: learning-rate rule, arXiv 2602.17004; iteration coefficients, the public Dion code's Newton-Schulz.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Matrix:
    """A tensor under Muon: [..., fan_out, fan_in], or its transpose in storage."""

    fan_out: int
    fan_in: int

    @property
    def lr_scale(self) -> float:
        return math.sqrt(max(1.0, self.fan_out / self.fan_in))
