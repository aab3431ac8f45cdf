"""Routers: which K experts each token goes to, and with what weight.

Legend: T tokens, D model, E experts, K top-k, N groups.
fp32 throughout, the multiplication by the gate included: bf16 logits flip near-ties between kernels.
A selection bias takes part in the selection only; the weights use the scores alone, so no gradient reaches the bias. It is a
persistent buffer that stays fp32 in a bf16 model: rounding it to bf16 moves it by more than an update.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from trinity.models.common.layers import Device, Dtype, Linear, product, sigmoid, softmax


class Routing(NamedTuple):
    """Decision of one MoE layer's router."""

    logits_TE: Tensor  # float32
    scores_TE: Tensor  # float32, what the weights are made of
    ids_TK: Tensor  # int64, the checkpoint's expert indices
    weights_TK: Tensor  # float32


class Router(nn.Module):
    """Token-choice top-K. A family picks `scores` and `choice`; `bias_E` is None where there is no selection bias."""

    is_exact = False
    bias_E: Tensor | None

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, has_bias: bool, device: Device = None, dtype: Dtype = None
    ):
        super().__init__()
        self.top_k = top_k
        self.gate = Linear(dim, num_experts, device=device, dtype=dtype)
        bias_E = torch.zeros(num_experts, device=device, dtype=torch.float32) if has_bias else None
        self.register_buffer("bias_E", bias_E)

    def forward(self, x_TD: Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):  # fp32 even inside a caller's bf16 region
            logits_TE = product(x_TD.float(), self.gate.weight.float(), self.is_exact)
        return self.routed(logits_TE)

    def routed(self, logits_TE: Tensor) -> Routing:
        """The choice that these logits make."""
        scores_TE = self.scores(logits_TE)
        ids_TK = self.choice(scores_TE.detach()).topk(self.top_k, dim=-1).indices
        return Routing(logits_TE, scores_TE, ids_TK, self.weights(scores_TE, ids_TK))

    def scores(self, logits_TE: Tensor) -> Tensor:
        raise NotImplementedError

    def choice(self, scores_TE: Tensor) -> Tensor:
        """The scores of which the K largest are taken."""
        return scores_TE if self.bias_E is None else scores_TE + self.bias_E

    def weights(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """weights_TK of the chosen experts, whoever chose them."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `.to(device)` but not `.to(dtype)`: the bias keeps its fp32 value."""
        exact = self.bias_E
        super()._apply(fn, recurse)
        if exact is not None and self.bias_E is not None and self.bias_E.dtype != torch.float32:
            self.bias_E = exact.to(self.bias_E.device)
        return self


class SigmoidRouter(Router):
    """Sigmoid scores, a selection bias, weights normalised over K and scaled (DeepSeek-V3; arXiv 2602.17004, eq. 16-18).

    With `num_groups` N > 1 a token first picks the `top_groups` whose two best experts have most, and then experts of these.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, scale: float, normalises: bool = True, num_groups: int = 1,
        top_groups: int = 1, device: Device = None, dtype: Dtype = None,
    ):  # fmt: skip
        super().__init__(dim, num_experts, top_k, has_bias=True, device=device, dtype=dtype)
        self.scale, self.normalises, self.num_groups, self.top_groups = scale, normalises, num_groups, top_groups

    def scores(self, logits_TE: Tensor) -> Tensor:
        return sigmoid(logits_TE, self.is_exact)

    def choice(self, scores_TE: Tensor) -> Tensor:
        choice_TE = super().choice(scores_TE)
        if self.num_groups == 1:
            return choice_TE
        choice_TNe = choice_TE.unflatten(-1, (self.num_groups, -1))
        best_TN = choice_TNe.topk(2, dim=-1).values.sum(-1)
        groups_Tn = best_TN.topk(self.top_groups, dim=-1).indices
        closed_TN = torch.ones_like(best_TN, dtype=torch.bool).scatter_(1, groups_Tn, False)
        return choice_TNe.masked_fill(closed_TN[..., None], -torch.inf).flatten(1)

    def weights(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        weights_TK = scores_TE.gather(-1, ids_TK)
        if self.normalises:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return weights_TK * self.scale


class SoftmaxRouter(Router):
    """Softmax over all experts; weights are the probabilities, normalised over K if asked (Qwen3-MoE). No selection bias."""

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, normalises: bool, device: Device = None, dtype: Dtype = None
    ):
        super().__init__(dim, num_experts, top_k, has_bias=False, device=device, dtype=dtype)
        self.normalises = normalises

    def scores(self, logits_TE: Tensor) -> Tensor:
        return softmax(logits_TE, self.is_exact)

    def weights(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        weights_TK = scores_TE.gather(-1, ids_TK)
        return weights_TK / weights_TK.sum(-1, keepdim=True) if self.normalises else weights_TK
