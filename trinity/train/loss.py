"""The loss of a micro-batch as a module: backbone, routed experts, cross-entropy, z-loss and balance loss.

Legend: B sequences of a micro-batch, S sequence length, T = B*S tokens, L layers with experts, E experts.
Decisions: the trainer's copy of the backbone is fp32 whatever the model's type: a bf16 model computes with a cast of it, so
that gradients of micro-batches and workers add up in fp32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trinity.config import Config, ModelConfig
from trinity.data.dataset import Batch
from trinity.data.mixture import numbered_through
from trinity.models.common.attention import PackedAttention, document_positions
from trinity.models.common.balance import expert_counts
from trinity.models.common.decoder import CausalLM, Inputs, Output
from trinity.models.common.layers import product
from trinity.models.common.losses import (
    IGNORE,
    document_balance_loss,
    loss_from_hidden,
    sequence_balance_loss,
)

CHUNK = 512  # tokens whose logits are held at a time
NOTHING = torch.zeros(0, 2)


class Losses(NamedTuple):
    """Sums of one micro-batch, already divided by the step's totals: added up over all they are the step's means, of `ce` and
    `z` over the tokens that are trained, of `balance` over the sequences."""

    ce: Tensor
    z: Tensor
    balance: Tensor
    counts_LE: Tensor
    mean: Tensor  # cross-entropy over this micro-batch's own trained tokens
    measures: Tensor = NOTHING  # float32 [M, 2]: sum and number of whatever else the objective tells of, in its order

    @property
    def total(self) -> Tensor:
        return self.ce + self.z + self.balance


class Whole(NamedTuple):
    """Size of what the losses of a micro-batch are shares of: a step over all workers, or a validation."""

    num_tokens: int  # that are trained
    num_sequences: int


def packed_inputs(config: ModelConfig, ids_BS: Tensor, docs_BS: Tensor | None) -> Inputs:
    """Inputs of the model for B sequences of S tokens that see each other within their document (None: all).

    With `batch_invariant` each document begins at position 0, as it does in serving; else at its place in the sequence, which
    is the same but for rounding.
    """
    positions_T = document_positions(docs_BS if config.batch_invariant else None, *ids_BS.shape)
    return Inputs(ids_BS.flatten(), positions_T.to(ids_BS.device), PackedAttention(config, docs_BS, *ids_BS.shape))


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


def target_logprobs(
    head_VD: Tensor, hidden_TD: Tensor, targets_T: Tensor, is_exact: bool, chunk: int = CHUNK
) -> Tensor:
    """float32 [T], log p(target). Holds the logits of `chunk` tokens at a time, in backward too."""
    return torch.cat(in_chunks(_logprobs, head_VD, (hidden_TD, targets_T), is_exact, chunk))


def target_logprobs_and_entropy(
    head_VD: Tensor, hidden_TD: Tensor, targets_T: Tensor, is_exact: bool, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The same, and float32 [T], the entropy of each place in nats, without a gradient."""
    parts = in_chunks(_logprobs_and_entropy, head_VD, (hidden_TD, targets_T), is_exact, chunk)
    logprobs_T, entropy_T = (torch.cat(each) for each in zip(*parts, strict=True))
    return logprobs_T, entropy_T.detach()


def in_chunks(
    what: Callable[..., Any], head_VD: Tensor, columns_T: Sequence[Tensor], is_exact: bool, chunk: int = CHUNK
) -> list[Any]:
    """Results of `what(head_VD, *columns_C, is_exact)` for `chunk` tokens after the other; computed again in backward."""
    parts = zip(*(column.split(chunk) for column in columns_T), strict=True)
    return [checkpoint(what, head_VD, *part, is_exact, use_reentrant=False) for part in parts]


def _logprobs(head_VD: Tensor, hidden_CD: Tensor, targets_C: Tensor, is_exact: bool) -> Tensor:
    logits_CV = product(hidden_CD, head_VD, is_exact).float()
    return logits_CV.log_softmax(-1).gather(1, targets_C[:, None])[:, 0]  # the sampler's formula, to the bit


def _logprobs_and_entropy(
    head_VD: Tensor, hidden_CD: Tensor, targets_C: Tensor, is_exact: bool
) -> tuple[Tensor, Tensor]:
    logprobs_CV = product(hidden_CD, head_VD, is_exact).float().log_softmax(-1)
    with torch.no_grad():
        entropy_C = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
    return logprobs_CV.gather(1, targets_C[:, None])[:, 0], entropy_C


class _Passes(nn.Module):
    """`CausalLM.forward_all` as a module's forward, which is what functional_call takes."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model

    def forward(self, passes: Sequence[Inputs]) -> list[Output]:
        return self.model.forward_all(passes)


class Objective(nn.Module):
    """The loss as a module, so that DDP sees its forward pass. `measures` names what it tells of besides."""

    measures: tuple[str, ...] = ()

    def __init__(self, model: CausalLM, config: Config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batches: Sequence[Any], num_tokens: int, num_sequences: int | None = None) -> list[Losses]:
        """Losses of each micro-batch; they are computed side by side. `num_tokens` are trained in the whole step: a mean over
        those of one micro-batch would make a token count more the more of its neighbours are masked. `num_sequences`: in the
        whole, train.global_batch_size unless told otherwise."""
        whole = Whole(num_tokens, num_sequences or self.config.train.global_batch_size)
        head, outputs = self._outputs([self._inputs(batch) for batch in batches])
        return [self._losses(head, batch, out, whole) for batch, out in zip(batches, outputs, strict=True)]

    def _outputs(self, passes: Sequence[Inputs]) -> tuple[Tensor, list[Output]]:
        """The head in the type that the model computes in, and what comes out of each pass."""
        dtype = getattr(torch, self.config.model.dtype)
        weights = {f"model.{name}": parameter.to(dtype) for name, parameter in self.model.named_parameters()}
        outputs = torch.func.functional_call(_Passes(self.model), weights, (passes,))
        return weights["model.lm_head.weight"], outputs

    def _inputs(self, batch: Any) -> Inputs:
        docs_BS = batch.docs_BS if self.config.data.intra_document_mask or self.config.data.is_flat else None
        return packed_inputs(self.config.model, batch.ids_BS, docs_BS)

    def _losses(self, head_VD: Tensor, batch: Any, out: Output, whole: Whole) -> Losses:
        z_coef = self.config.optim.z_loss
        is_exact = self.config.model.batch_invariant
        ce, z = loss_from_hidden(head_VD, out.hidden_TD, batch.targets_BS.flatten(), z_coef, is_exact=is_exact)
        own = (batch.targets_BS != IGNORE).sum().clamp_min(1)
        balance = self._balance(batch, out, whole)
        return Losses(ce / whole.num_tokens, z / whole.num_tokens, balance, self._counts(out), ce.detach() / own)

    def _balance(self, batch: Batch, out: Output, whole: Whole) -> Tensor:
        """A mean over the sequences of the step; over documents by their tokens, where some sequences are not full. Which of
        the two is the settings' word, not the batch's, so that it does not depend on who shares a micro-batch."""
        (num, seq), alpha = batch.ids_BS.shape, self.config.optim.balance_loss
        if self.config.data.is_flat:
            docs_T = numbered_through(batch.docs_BS)
            weights_D = torch.bincount(docs_T).float() / (whole.num_sequences * self.config.train.seq_len)
            return document_balance_loss(out.routing, self.config.model, docs_T, weights_D, alpha)
        balance = sequence_balance_loss(out.routing, self.config.model, num, seq, alpha)
        return balance * num / whole.num_sequences

    def _counts(self, out: Output) -> Tensor:
        """int64 counts_LE: the tokens that chose each expert."""
        counts = [expert_counts(r.ids_TK, self.config.model.num_experts) for r in out.routing]
        return torch.stack(counts) if counts else torch.zeros(0, self.config.model.num_experts, dtype=torch.int64)
