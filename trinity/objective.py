"""The loss of a micro-batch as a module: backbone, routed experts, cross-entropy, z-loss and balance loss.

Legend: B sequences of a micro-batch, S sequence length, T = B*S tokens, L layers with experts, E experts.
Decisions: the trainer's copy of the backbone is fp32 whatever the model's type: a bf16 model computes with a cast of it, so
that gradients of micro-batches and workers add up in fp32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.config import Config
from trinity.data import Batch
from trinity.model.afmoe import Afmoe, Inputs, Output
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


class _Passes(nn.Module):
    """`Afmoe.forward_all` as a module's forward, which is what functional_call takes."""

    def __init__(self, model: Afmoe):
        super().__init__()
        self.model = model

    def forward(self, passes: Sequence[Inputs]) -> list[Output]:
        return self.model.forward_all(passes)


class Objective(nn.Module):
    """The loss as a module, so that DDP sees its forward pass."""

    def __init__(self, model: Afmoe, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batches: Sequence[Batch]) -> list[Losses]:
        """Of each micro-batch; they are computed side by side."""
        dtype = getattr(torch, self.config.model.dtype)
        weights = {f"model.{name}": parameter.to(dtype) for name, parameter in self.model.named_parameters()}
        passes = [self._inputs(batch) for batch in batches]
        outputs = torch.func.functional_call(_Passes(self.model), weights, (passes,))
        head = weights["model.lm_head.weight"]
        return [self._losses(head, batch, out) for batch, out in zip(batches, outputs, strict=True)]

    def _inputs(self, batch: Batch) -> Inputs:
        num, seq = batch.ids_BS.shape
        docs_BS = batch.docs_BS if self.config.data.intra_document_mask else None
        attend = PackedAttention(self.config.model, docs_BS, num, seq)
        return batch.ids_BS.flatten(), packed_positions(num, seq, batch.ids_BS.device), attend

    def _losses(self, head_VD: Tensor, batch: Batch, out: Output) -> Losses:
        num, seq = batch.ids_BS.shape
        share = 1.0 / self.config.train.global_batch_size
        z_coef = self.config.optim.z_loss
        ce, z = loss_from_hidden(head_VD, out.hidden_TD, batch.targets_BS.flatten(), z_coef)
        balance = sequence_balance_loss(out.routing, self.config.model, num, seq, self.config.optim.balance_loss)
        return Losses(ce * share / seq, z * share / seq, balance * share * num, self._counts(out))

    def _counts(self, out: Output) -> Tensor:
        """int64 counts_LE: the tokens that chose each expert."""
        counts = [expert_counts(r.ids_TK, self.config.model.num_experts) for r in out.routing]
        return torch.stack(counts) if counts else torch.zeros(0, self.config.model.num_experts, dtype=torch.int64)
