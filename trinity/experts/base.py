"""The contract of expert compute: rows in, weighted sums of SwiGLU experts out, differentiable.

Legend: R rows, A assignments (row, expert) with A >= R, E experts of one layer on this shard, D model, F expert hidden.

    y[r] = sum over a with row_A[a] == r of  weight_A[a] * ((silu(x[r] gate[e]^T) * (x[r] up[e]^T)) down[e]),  e = expert_A[a]

A row travels once, however many local experts want it; the weights of the sum are applied here; products and sums over
experts are fp32 whatever the storage type, and the result is rounded once to x's type. Dropless: every assignment
counts, an expert without rows costs nothing and gets a zero gradient.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trinity.ops.gradient_sums import Sums


class Assignments(NamedTuple):
    """Which local expert each row goes to, in coordinate form. Any order."""

    row_A: Tensor  # int64, in [0, R)
    expert_A: Tensor  # int64, in [0, E): position in the stacked weights, not the checkpoint's index
    weight_A: Tensor  # float32


class LayerWeights(NamedTuple):
    """The stacked weights of one layer's local experts; all three of one shape.

    `down_EFD[e]` is the transpose of the checkpoint's `down_proj.weight` [D, F]. In memory gate and up are contiguous, and
    down as the backend wants it: [E, F, D], or [E, D, F] seen as its transpose.
    """

    gate_EFD: Tensor
    up_EFD: Tensor
    down_EFD: Tensor


Pair = tuple[Tensor, Tensor]  # A [E, r, in], B [E, out, r]


class LayerAdapters(NamedTuple):
    """Changes of low rank r to the three stacks, which stay as they are: gate becomes gate + scale * B A, and so on.

    In a checkpoint's orientation, down's too: A [E, r, F], B [E, D, r]. Computed in the weights' type.
    """

    gate: Pair
    up: Pair
    down: Pair
    scale: float


class ExpertBackend(Protocol):
    """Computes one layer's local experts. Differentiable in x_RD, weight_A, the weights and the adapters; keeps no state. With
    `sums` the backward may add the weights' gradients there instead, which `sums.is_used` then says."""

    name: str

    def stores_down_transposed(self, device: torch.device) -> bool:
        """Say whether it is fastest when down lies in memory as [E, D, F]."""
        ...

    def __call__(
        self,
        x_RD: Tensor,
        assigned: Assignments,
        weights: LayerWeights,
        adapters: LayerAdapters | None = None,
        sums: Sums | None = None,
    ) -> Tensor:
        """-> y_RD in x's dtype. R, A may be 0."""
        ...
