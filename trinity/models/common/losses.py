"""Losses that training minimises, and how unbalanced the experts are.

Legend: T tokens (= B*S), C tokens of a chunk, V vocabulary, D model, B batch, S sequence, E experts, K top-k, L layers.
Softmax mathematics is fp32 whatever the logits' type, and runs over chunks of tokens: with 200,192 words the fp32
logits of a batch are never held at once. `loss_from_hidden` does not even hold them in the model's type.
Losses are sums over the tokens whose target is not IGNORE; callers divide by the global token count.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trinity.config import ModelConfig
from trinity.models.common.balance import expert_counts
from trinity.models.common.layers import product
from trinity.models.common.router import Routing
from trinity.ops import batch_invariant

IGNORE = -100


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, z_coef: float, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """(ce_sum, z_sum), fp32 scalars: -log p(target), and z_coef * logsumexp^2, summed over tokens. Minimise their sum.

    Softmax is recomputed in backward, chunk by chunk. Targets are int64 in [0, V) or IGNORE.
    """
    pairs = zip(logits_TV.split(chunk), targets_T.split(chunk), strict=True)
    losses = [checkpoint(_token_losses, logits, targets, use_reentrant=False) for logits, targets in pairs]
    return _sums(losses, targets_T, z_coef)


def loss_from_hidden(
    head_VD: Tensor, hidden_TD: Tensor, targets_T: Tensor, z_coef: float, chunk: int = 512, is_exact: bool = False
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of `hidden @ head^T` that holds the logits of `chunk` tokens at a time, in backward too."""
    given = head_VD, hidden_TD, targets_T, z_coef, chunk, is_exact
    is_trained = hidden_TD.requires_grad and torch.is_grad_enabled()
    if is_trained and not head_VD.requires_grad:
        return _FrozenHeadLoss.apply(*given)
    return _HeadLoss.apply(*given, is_trained and hidden_TD.is_cpu)


def _token_losses(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """(-log p(target), logsumexp) per token, fp32; the first means nothing where the target is IGNORE."""
    logits_CV = logits_CV.float()
    lse_C = logits_CV.logsumexp(-1)
    picked_C1 = logits_CV.gather(-1, _indexable(targets_C)[:, None])
    return lse_C - picked_C1.squeeze(-1), lse_C


def _indexable(targets_C: Tensor) -> Tensor:
    """IGNORE becomes word 0; any other target outside the vocabulary still fails to index."""
    return targets_C.where(targets_C != IGNORE, 0)


def _sums(losses: list[tuple[Tensor, Tensor]], targets_T: Tensor, z_coef: float) -> tuple[Tensor, Tensor]:
    keep_T = targets_T != IGNORE
    ce_T, lse_T = (torch.cat(parts).where(keep_T, 0) for parts in zip(*losses, strict=True))
    return ce_T.sum(), z_coef * lse_T.square().sum()


class _HeadLoss(torch.autograd.Function):
    """Head and loss in one: the head's gradient accumulates in fp32. Where `is_early`, gradients are made while the logits are
    there, as though both sums counted alike, which in training they do. Otherwise, and for a backward that weighs them apart or
    is the second one, logits are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        head_VD: Tensor,
        hidden_TD: Tensor,
        targets_T: Tensor,
        z_coef: float,
        chunk: int,
        is_exact: bool,
        is_early: bool,
    ) -> Any:
        losses, ctx.found = [], _Gradients(head_VD) if is_early else None
        for h_CD, targets_C in zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True):
            logits_CV = product(h_CD, head_VD, is_exact)
            losses.append(_token_losses(logits_CV, targets_C))
            if ctx.found is not None:
                ctx.found.add(h_CD, _grad_logits(logits_CV, targets_C, losses[-1][1][:, None], 1.0, z_coef))
        ctx.save_for_backward(head_VD, hidden_TD, targets_T, torch.cat([lse_C for _, lse_C in losses]))
        ctx.z_coef, ctx.chunk = z_coef, chunk
        return _sums(losses, targets_T, z_coef)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_ce: Tensor, g_z: Tensor) -> Any:
        (found, ctx.found), (head_VD, *per_token) = (ctx.found, None), ctx.saved_tensors
        if found is not None and not (ctx.z_coef and g_ce != g_z):
            return *found.times(g_ce), None, None, None, None, None
        found = _Gradients(head_VD)
        for h_CD, targets_C, lse_C in zip(*(x.split(ctx.chunk) for x in per_token), strict=True):
            found.add(h_CD, _grad_logits(h_CD @ head_VD.T, targets_C, lse_C[:, None], g_ce, ctx.z_coef * g_z))
        return *found.times(1.0), None, None, None, None, None


class _Gradients:
    """Gradients of a head, summed up in fp32, and of hidden states, chunk by chunk."""

    def __init__(self, head_VD: Tensor):
        self.head_VD = head_VD
        self._sum_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        self._parts_CD: list[Tensor] = []

    def add(self, h_CD: Tensor, d_CV: Tensor) -> None:
        """Take up a chunk of hidden states and the gradient of its logits."""
        if batch_invariant.is_for(d_CV):
            from trinity.ops.batch_invariant import outer

            self._parts_CD.append(outer.products(d_CV, self.head_VD[None], torch.tensor([len(d_CV)])))
            outer.add_to(self._sum_VD, d_CV, h_CD)
            return
        self._parts_CD.append(d_CV @ self.head_VD)
        self._sum_VD += d_CV.T @ h_CD

    def times(self, factor: Tensor | float) -> tuple[Tensor, Tensor]:
        """Both in their tensors' types, times a factor. Once: the sums are used up."""
        return self._sum_VD.mul_(factor).to(self.head_VD.dtype), torch.cat(self._parts_CD).mul_(factor)


class _FrozenHeadLoss(torch.autograd.Function):
    """The same of a head that takes no steps: the gradient of the hidden states is made while the logits are there, and nothing
    is computed twice. d sum(-log p) = (p - [v == target]) head; what the squares add is made of it, p head being that plus
    the target's row."""

    @staticmethod
    def forward(
        ctx: Any, head_VD: Tensor, hidden_TD: Tensor, targets_T: Tensor, z_coef: float, chunk: int, is_exact: bool
    ) -> Any:
        losses, grads_TD = [], []
        for h_CD, targets_C in zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True):
            logits_CV = product(h_CD, head_VD, is_exact)
            losses.append(_token_losses(logits_CV, targets_C))
            grads_TD.append(_grad_logits(logits_CV, targets_C, losses[-1][1][:, None], 1.0, 0.0) @ head_VD)
        ctx.save_for_backward(head_VD, torch.cat(grads_TD), targets_T, torch.cat([lse_C for _, lse_C in losses]))
        ctx.z_coef = z_coef
        return _sums(losses, targets_T, z_coef)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_ce: Tensor, g_z: Tensor) -> Any:
        head_VD, of_ce_TD, targets_T, lse_T = ctx.saved_tensors
        grad_TD = of_ce_TD.float() * g_ce
        if ctx.z_coef:
            share_T = (2 * ctx.z_coef * g_z * lse_T).where(targets_T != IGNORE, 0)
            grad_TD.addcmul_(of_ce_TD + head_VD[_indexable(targets_T)], share_T[:, None])
        return None, grad_TD.to(of_ce_TD.dtype), None, None, None, None


def _grad_logits(
    logits_CV: Tensor, targets_C: Tensor, lse_C1: Tensor, g_ce: Tensor | float, g_z: Tensor | float
) -> Tensor:
    """Gradient of g_ce * sum(-log p) + g_z * sum(lse^2), in the logits' type; zero rows where the target is IGNORE.

    d(-log p(target)) / d logit_v = p_v - [v == target];  d(lse^2) / d logit_v = 2 lse p_v;  p_v = exp(logit_v - lse)
    """
    keep_C1 = (targets_C != IGNORE)[:, None]
    grad_CV = (logits_CV.float() - lse_C1).exp_().mul_((g_ce + 2 * g_z * lse_C1) * keep_C1)
    grad_CV.scatter_add_(1, _indexable(targets_C)[:, None], -g_ce * keep_C1)
    return grad_CV.to(logits_CV.dtype)


def sequence_balance_loss(
    routing: Sequence[Routing], config: ModelConfig, batch: int, seq: int, alpha: float
) -> Tensor:
    """alpha * sum_i f_i P_i per sequence, mean over sequences and over MoE layers (arXiv 2602.17004, eq. 29-32).

    P_i is the mean over the sequence of scores normalised over experts; f_i = E / (K S) times the count of expert i
    among the selected (with bias). Gradients flow through P only. alpha when balanced; 0 without MoE layers.
    The paper does not say how layers are reduced: the mean keeps alpha's meaning whatever the depth.
    """
    if not routing:
        return torch.zeros(())
    per_layer = [_layer_balance(r, config.num_experts, batch, seq) for r in routing]
    return alpha * torch.stack(per_layer).mean()


def _layer_balance(routing: Routing, num_experts: int, batch: int, seq: int) -> Tensor:
    scores_TE, top_k = routing.scores_TE, routing.ids_TK.shape[-1]
    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    p_BE = share_TE.unflatten(0, (batch, seq)).mean(1)
    sequence_B11 = torch.arange(batch, device=scores_TE.device)[:, None, None] * num_experts
    ids_BSK = routing.ids_TK.unflatten(0, (batch, seq)) + sequence_B11
    f_BE = expert_counts(ids_BSK, batch * num_experts).view(batch, num_experts) * (num_experts / (top_k * seq))
    return (f_BE * p_BE).sum(-1).mean()


def document_balance_loss(
    routing: Sequence[Routing], config: ModelConfig, docs_T: Tensor, weights_D: Tensor, alpha: float
) -> Tensor:
    """The same of documents that lie end to end: alpha * sum_d w_d sum_i f_di P_di, mean over MoE layers. `docs_T` numbers them
    from 0. So what one adds depends on its own tokens, whatever else is in the micro-batch."""
    if not routing:
        return torch.zeros(())
    num, lengths_D1 = config.num_experts, torch.bincount(docs_T, minlength=len(weights_D))[:, None]
    per_layer = []
    for each in routing:
        share_TE, top_k = each.scores_TE / each.scores_TE.sum(-1, keepdim=True), each.ids_TK.shape[-1]
        sums_DE = share_TE.new_zeros(len(weights_D), num).index_add(0, docs_T, share_TE)
        counts_DE = expert_counts(each.ids_TK + num * docs_T[:, None], len(weights_D) * num).view(-1, num)
        f_DE, p_DE = counts_DE * num / (top_k * lengths_D1), sums_DE / lengths_D1
        per_layer.append(weights_D @ (f_DE * p_DE).sum(-1))
    return alpha * torch.stack(per_layer).mean()


def max_vio(counts_LE: Tensor) -> Tensor:
    """float32 [L]: (max - mean) / mean of the tokens per expert of each layer; 0 is balance, and 0 without tokens."""
    counts = counts_LE.float()
    mean = counts.mean(-1)
    return (counts.amax(-1) - mean) / mean.clamp_min(torch.finfo(mean.dtype).tiny)
