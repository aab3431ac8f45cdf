"""The loss of a micro-batch as a module: backbone, routed experts, cross-entropy, z-loss and balance loss.

Legend: B sequences of a micro-batch, S sequence length, T = B*S tokens, L layers with experts, E experts.
Decisions: the trainer's copy of the backbone is fp32 whatever the model's type: a bf16 model computes with a cast of it, so
that gradients of micro-batches and workers add up in fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.config import Config
from trinity.model.afmoe import Afmoe
from trinity.model.attention import PackedAttention, packed_positions
from trinity.model.balance import expert_counts
from trinity.model.losses import loss_from_hidden, sequence_balance_loss


class Losses(NamedTuple):
    """Sums of one micro-batch, already divided by the step's totals: adding them up over all gives the step's means."""

    ce: Tensor
    z: Tensor
    balance: Tensor
    counts_LE: Tensor

    @property
    def total(self) -> Tensor:
        return self.ce + self.z + self.balance


class Objective(nn.Module):
    """The loss as a module, so that DDP sees its forward pass."""

    def __init__(self, model: Afmoe, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, ids_BS: Tensor, targets_BS: Tensor, docs_BS: Tensor | None) -> Losses:
        batch, seq = ids_BS.shape
        attend = PackedAttention(self.config.model, docs_BS, batch, seq)
        dtype = getattr(torch, self.config.model.dtype)
        weights = {name: parameter.to(dtype) for name, parameter in self.model.named_parameters()}
        inputs = (ids_BS.flatten(), packed_positions(batch, seq, ids_BS.device), attend)
        out = torch.func.functional_call(self.model, weights, inputs)
        share = 1.0 / self.config.train.global_batch_size
        z_coef = self.config.optim.z_loss
        ce, z = loss_from_hidden(weights["lm_head.weight"], out.hidden_TD, targets_BS.flatten(), z_coef)
        balance = sequence_balance_loss(out.routing, self.config.model, batch, seq, self.config.optim.balance_loss)
        counts = [expert_counts(r.ids_TK, self.config.model.num_experts) for r in out.routing]
        counts_LE = torch.stack(counts) if counts else torch.zeros(0, self.config.model.num_experts, dtype=torch.int64)
        return Losses(ce * share / seq, z * share / seq, balance * share * batch, counts_LE)
