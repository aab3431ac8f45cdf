"""The loss of a micro-batch as a module: backbone, routed experts, cross-entropy, z-loss and balance loss.

Legend: B sequences of a micro-batch, S sequence length, T = B*S tokens, L layers with experts, E experts.
Decisions: the trainer's copy of the backbone is fp32 whatever the model's type: a bf16 model computes with a cast of it, so
that gradients of micro-batches and workers add up in fp32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trinity.config import Config, ModelConfig
from trinity.data.dataset import Batch
from trinity.data.mixture import numbered_through
from trinity.models.common.attention import PackedAttention, document_positions
from trinity.models.common.balance import expert_counts
from trinity.models.common.decoder import CausalLM, Inputs, Output
from trinity.models.common.losses import (
    IGNORE,
    document_balance_loss,
    loss_from_hidden,
    sequence_balance_loss,
)

CHUNK = 512  # tokens whose logits are held at a time


class Losses(NamedTuple):
    """Sums of one micro-batch, already divided by the step's totals: added up over all they are the step's means, of `ce` and
    `z` over the tokens that are trained, of `balance` over the sequences."""

    ce: Tensor
    z: Tensor
    balance: Tensor
    counts_LE: Tensor
    mean: Tensor  # cross-entropy over this micro-batch's own trained tokens

    @property
    def total(self) -> Tensor:
        return self.ce + self.z + self.balance


def num_trained(batch: Batch) -> int:
    """The targets that count in the loss."""
    return int((batch.targets_BS != IGNORE).sum())


def packed_inputs(config: ModelConfig, ids_BS: Tensor, docs_BS: Tensor | None) -> Inputs:
    """Inputs of the model for B sequences of S tokens that see each other within their document (None: all).

    With `batch_invariant` each document begins at position 0, as it does in serving; else at its place in the sequence, which
    is the same but for rounding.
    """
    positions_T = document_positions(docs_BS if config.batch_invariant else None, *ids_BS.shape)
    return ids_BS.flatten(), positions_T.to(ids_BS.device), PackedAttention(config, docs_BS, *ids_BS.shape)


@torch.no_grad()
def token_logprobs(model: CausalLM, ids_BS: Tensor, docs_BS: Tensor | None = None) -> Tensor:
    """-> float32 [B, S - 1]: log p(ids[b, s + 1] | its document up to s), of the raw distribution, by the training path.

    What a server of the same weights answers for `logprobs`: on CPUs in float32 the same numbers (`batch_invariant`).
    """
    out = model(*packed_inputs(model.config, ids_BS, docs_BS))
    hidden_TD = out.hidden_TD.unflatten(0, ids_BS.shape)[:, :-1].flatten(0, 1)
    targets_T1 = ids_BS[:, 1:].flatten()[:, None]
    parts = zip(hidden_TD.split(CHUNK), targets_T1.split(CHUNK), strict=True)
    logprobs_T1 = [model.logits(h_CD).float().log_softmax(-1).gather(-1, t_C1) for h_CD, t_C1 in parts]
    return torch.cat(logprobs_T1).view(len(ids_BS), -1)


class _Passes(nn.Module):
    """`CausalLM.forward_all` as a module's forward, which is what functional_call takes."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model

    def forward(self, passes: Sequence[Inputs]) -> list[Output]:
        return self.model.forward_all(passes)


class Objective(nn.Module):
    """The loss as a module, so that DDP sees its forward pass."""

    def __init__(self, model: CausalLM, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batches: Sequence[Batch], num_tokens: int) -> list[Losses]:
        """Losses of each micro-batch; they are computed side by side. `num_tokens` are trained in the whole step: a mean over
        those of one micro-batch would make a token count more the more of its neighbours are masked."""
        dtype = getattr(torch, self.config.model.dtype)
        weights = {f"model.{name}": parameter.to(dtype) for name, parameter in self.model.named_parameters()}
        passes = [self._inputs(batch) for batch in batches]
        outputs = torch.func.functional_call(_Passes(self.model), weights, (passes,))
        head = weights["model.lm_head.weight"]
        return [self._losses(head, batch, out, num_tokens) for batch, out in zip(batches, outputs, strict=True)]

    def _inputs(self, batch: Batch) -> Inputs:
        docs_BS = batch.docs_BS if self.config.data.intra_document_mask or self.config.data.is_flat else None
        return packed_inputs(self.config.model, batch.ids_BS, docs_BS)

    def _losses(self, head_VD: Tensor, batch: Batch, out: Output, num_tokens: int) -> Losses:
        num, seq = batch.ids_BS.shape
        z_coef = self.config.optim.z_loss
        is_exact = self.config.model.batch_invariant
        ce, z = loss_from_hidden(head_VD, out.hidden_TD, batch.targets_BS.flatten(), z_coef, is_exact=is_exact)
        own = (batch.targets_BS != IGNORE).sum().clamp_min(1)
        balance = self._balance(batch, out, num, seq)
        return Losses(ce / num_tokens, z / num_tokens, balance, self._counts(out), ce.detach() / own)

    def _balance(self, batch: Batch, out: Output, num: int, seq: int) -> Tensor:
        """A mean over the sequences of the step; over documents by their tokens, where some sequences are not full. Which of
        the two is the settings' word, not the batch's, so that it does not depend on who shares a micro-batch."""
        settings, alpha = self.config.train, self.config.optim.balance_loss
        if self.config.data.is_flat:
            docs_T = numbered_through(batch.docs_BS)
            weights_D = torch.bincount(docs_T).float() / (settings.global_batch_size * settings.seq_len)
            return document_balance_loss(out.routing, self.config.model, docs_T, weights_D, alpha)
        balance = sequence_balance_loss(out.routing, self.config.model, num, seq, alpha)
        return balance * num / settings.global_batch_size

    def _counts(self, out: Output) -> Tensor:
        """int64 counts_LE: the tokens that chose each expert."""
        counts = [expert_counts(r.ids_TK, self.config.model.num_experts) for r in out.routing]
        return torch.stack(counts) if counts else torch.zeros(0, self.config.model.num_experts, dtype=torch.int64)
