"""DenseExperts: the routed experts of all layers as leaf tensors, computed by the obvious loop: an oracle.

Legend: T tokens, D model, F expert hidden, E experts, K top-k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.dispatch.transport import Done


class DenseExperts:
    """weights[layer] = (gate_EFD, up_EFD, down_EDF), in the checkpoint's layout; gradients gather on these leaves."""

    def __init__(self, weights: dict[int, tuple[Tensor, Tensor, Tensor]]):
        self.weights = {layer: tuple(w.detach().clone().requires_grad_() for w in ws) for layer, ws in weights.items()}

    @classmethod
    def from_hf(cls, model) -> "DenseExperts":
        """Copies of the stacked experts of a transformers AfmoeForCausalLM (gate rows first in gate_up_proj)."""
        moes = {i: layer.mlp.experts for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}
        return cls({i: (*moe.gate_up_proj.chunk(2, dim=1), moe.down_proj) for i, moe in moes.items()})

    def begin(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Done:
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for e, (gate, up, down) in enumerate(zip(*self.weights[layer], strict=True)):
            row_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
            if not len(row_R) and not torch.is_grad_enabled():
                continue
            x_RD = x_TD[row_R]
            out_RD = (F.silu(x_RD @ gate.T) * (x_RD @ up.T)) @ down.T
            y_TD = y_TD.index_add(0, row_R, out_RD * weights_TK[row_R, slot_R, None])
        return Done(y_TD.to(x_TD.dtype))
