"""The MoE feed-forward: router and shared experts here, routed experts wherever the injected ExpertLayer keeps them.

Legend: T tokens, D model, E experts, K top-k.
Routed experts are never parameters of the backbone. expert_bias is a persistent buffer that stays fp32 in a bf16
model: rounding it to bf16 (as a bf16-loaded transformers model does) moves it by more than an update.
"""

from collections.abc import Callable, Generator
from typing import Protocol

import torch
from torch import Tensor, nn

from trinity.config import ModelConfig
from trinity.models.common.layers import SwiGLU
from trinity.models.common.router import Router, Routing


class Pending(Protocol):
    """Rows on their way to their experts and back."""

    def result(self) -> Tensor:
        """Wait; -> y_TD."""
        ...


class ExpertLayer(Protocol):
    """Computes routed experts of any layer, from local tensors or on shards. Differentiable in x and weights."""

    def begin(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Pending:
        """Start on y_TD = sum over k of weights_TK[:, k] * SwiGLU_{ids_TK[:, k]}(x_TD), in x's dtype.

        ids int64, the checkpoint's expert indices; weights float32, applied to the experts' outputs.
        """
        ...


class MoE(nn.Module):
    """Shared experts (one ungated SwiGLU of their total width) plus the weighted sum of the routed ones."""

    def __init__(self, config: ModelConfig, layer: int, *, device=None, dtype=None):
        super().__init__()
        self.layer = layer
        shared = config.moe_intermediate_size * config.num_shared_experts
        self.router = Router(config, device=device, dtype=dtype)
        self.shared_experts = SwiGLU(config.hidden_size, shared, device=device, dtype=dtype)
        self.expert_bias: Tensor
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, device=device, dtype=torch.float32))

    def forward(self, x_TD: Tensor, experts: ExpertLayer) -> Generator[None, None, tuple[Tensor, Routing]]:
        """Yields once, while rows are away: shared experts and other passes (see `interleave`) use that time."""
        routing = self.router(x_TD, self.expert_bias)
        pending = experts.begin(self.layer, x_TD, routing.ids_TK, routing.weights_TK)
        shared_TD = self.shared_experts(x_TD)
        yield
        return shared_TD + pending.result(), routing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoE":
        """Follow `.to(device)` but not `.to(dtype)`: the bias keeps its fp32 value."""
        exact = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != torch.float32:
            self.expert_bias = exact.to(self.expert_bias.device)
        return self
