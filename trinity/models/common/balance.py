"""Load balance without an auxiliary loss: how expert_bias follows the token counts, once per optimizer step.

Legend: E experts, T tokens, K top-k; a leading layer dimension is allowed everywhere.
Pure functions; counts are global, summed over all workers and micro-batches of the step (arXiv 2602.17004, section 2).
"""

import torch
from torch import Tensor


def expert_counts(ids_TK: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how many (token, slot) pairs chose each expert."""
    return torch.bincount(ids_TK.flatten(), minlength=num_experts)


def sign_update(bias_E: Tensor, counts_E: Tensor, gamma: float) -> Tensor:
    """b + gamma * sign(mean(n) - n), re-centred to mean 0 (Nano and Mini)."""
    counts = counts_E.double()
    bias = bias_E + gamma * (counts.mean(-1, keepdim=True) - counts).sign().to(bias_E.dtype)
    return bias - bias.mean(-1, keepdim=True)


def smebu(
    bias_E: Tensor, momentum_E: Tensor, counts_E: Tensor, lam: float, beta: float, kappa: float
) -> tuple[Tensor, Tensor]:
    """Soft-clamped momentum update (Large) -> (bias, momentum). The update is centred, the bias is not re-centred.

    v = (mean(n) - n) / mean(n); delta = lam tanh(kappa v), centred; m' = beta m + (1 - beta) delta; b' = b + m'.
    Without any token v is 0, so only the momentum's remainder moves the bias.
    """
    counts = counts_E.double()
    mean = counts.mean(-1, keepdim=True)
    violation = ((mean - counts) / mean.clamp_min(torch.finfo(mean.dtype).tiny)).to(bias_E.dtype)
    delta = lam * torch.tanh(kappa * violation)
    delta = delta - delta.mean(-1, keepdim=True)
    momentum = beta * momentum_E + (1 - beta) * delta
    return bias_E + momentum, momentum
