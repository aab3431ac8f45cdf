"""The sigmoid router: which K experts each token goes to, and with what weight.

Legend: T tokens, D model, E experts, K top-k.
fp32 throughout, the multiplication by the gate included: bf16 logits flip near-ties between kernels.
expert_bias takes part in the selection only; the weights use the scores alone, so no gradient reaches the bias.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.config import ModelConfig
from trinity.models.common.layers import linear, product, sigmoid


class Routing(NamedTuple):
    """What one MoE layer's router decided."""

    logits_TE: Tensor  # float32
    scores_TE: Tensor  # float32, sigmoid(logits)
    ids_TK: Tensor  # int64, the checkpoint's expert indices, by falling score + bias
    weights_TK: Tensor  # float32, normalised over K and times route_scale


class Router(nn.Module):
    """Token-choice top-K over sigmoid scores (arXiv 2602.17004, eq. 16-18)."""

    is_exact = False

    def __init__(self, config: ModelConfig, *, device=None, dtype=None):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.route_scale = config.route_scale
        self.gate = linear(config.hidden_size, config.num_experts, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor, bias_E: Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):  # fp32 even inside a caller's bf16 region
            logits_TE = product(x_TD.float(), self.gate.weight.float(), self.is_exact)
        scores_TE = sigmoid(logits_TE, self.is_exact)
        ids_TK = (scores_TE.detach() + bias_E).topk(self.top_k, dim=-1).indices
        return Routing(logits_TE, scores_TE, ids_TK, self.weights(scores_TE, ids_TK))

    def weights(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """weights_TK of the chosen experts, whoever chose them."""
        weights_TK = scores_TE.gather(-1, ids_TK)
        return weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20) * self.route_scale
