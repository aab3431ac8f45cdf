"""The obvious loop over experts, all in fp32 (fp64 for fp64 input): slow, and the truth in tests.

Legend: R rows, A assignments, N assignments of one expert, E experts, D model, F expert hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.experts.base import Assignments, LayerAdapters, LayerWeights
from trinity.experts.rows import accumulator
from trinity.ops.gradient_sums import Sums


class ReferenceBackend:
    """Gradients come from autograd's own rules, nothing here is hand-derived."""

    name = "reference"

    def stores_down_transposed(self, device: torch.device) -> bool:
        return False

    def __call__(
        self,
        x_RD: Tensor,
        assigned: Assignments,
        weights: LayerWeights,
        adapters: LayerAdapters | None = None,
        sums: Sums | None = None,
    ) -> Tensor:
        kind = accumulator(x_RD.dtype)
        x, y_RD = x_RD.to(kind), x_RD.new_zeros(x_RD.shape, dtype=kind)
        stacks = [stack.to(kind) for stack in weights]
        if adapters is not None:
            gate_EFD, up_EFD, down_EDF = (b.to(kind) @ a.to(kind) * adapters.scale for a, b in adapters[:3])
            stacks = [stacks[0] + gate_EFD, stacks[1] + up_EFD, stacks[2] + down_EDF.mT]
        experts = zip(*(stack.unbind(0) for stack in stacks), strict=True)
        for e, (gate_FD, up_FD, down_FD) in enumerate(experts):
            mine_N = (assigned.expert_A == e).nonzero().squeeze(1)
            row_N = assigned.row_A[mine_N]
            h_NF = F.silu(x[row_N] @ gate_FD.T) * (x[row_N] @ up_FD.T)
            y_RD = y_RD.index_add(0, row_N, assigned.weight_A[mine_N, None].to(kind) * (h_NF @ down_FD))
        return y_RD.to(x_RD.dtype)
