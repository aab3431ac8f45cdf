"""The obvious loop over experts, all in fp32 (fp64 for fp64 input): slow, and the truth in tests.

Legend: R rows, A assignments, N assignments of one expert, E experts, D model, F expert hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.experts.base import Assignments, LayerWeights
from trinity.experts.rows import accumulator


class ReferenceBackend:
    """Gradients come from autograd's own rules, nothing here is hand-derived."""

    name = "reference"

    def stores_down_transposed(self, device: torch.device) -> bool:
        return False

    def __call__(self, x_RD: Tensor, assigned: Assignments, weights: LayerWeights) -> Tensor:
        kind = accumulator(x_RD.dtype)
        x, y_RD = x_RD.to(kind), x_RD.new_zeros(x_RD.shape, dtype=kind)
        experts = zip(*(stack.to(kind).unbind(0) for stack in weights), strict=True)
        for e, (gate_FD, up_FD, down_FD) in enumerate(experts):
            mine_N = (assigned.expert_A == e).nonzero().squeeze(1)
            row_N = assigned.row_A[mine_N]
            h_NF = F.silu(x[row_N] @ gate_FD.T) * (x[row_N] @ up_FD.T)
            y_RD = y_RD.index_add(0, row_N, assigned.weight_A[mine_N, None].to(kind) * (h_NF @ down_FD))
        return y_RD.to(x_RD.dtype)
