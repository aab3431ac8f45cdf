"""Losses of answers that are preferred, or wanted, or not: DPO and KTO. The reference is the weights that a run begins with.

Legend: P pairs or labelled answers of a micro-batch, A documents of a batch, B = 1 and T tokens of all of them end to end.
rho of an answer is log p - log p_ref, summed over its trained tokens, or their mean (`preferences.length_normalized`, the
normalisation of arXiv 2405.14734).
- DPO (arXiv 2305.18290): -log sigma(beta (rho_chosen - rho_rejected)), a mean over the step's pairs; plus `nll` times the
  cross-entropy of the preferred answers, a mean over their tokens in the step (arXiv 2404.19733).
- SimPO (arXiv 2405.14734) is that of means, without a reference and with a `margin`: -log sigma(beta (rho_c - rho_r) - margin).
- KTO (arXiv 2402.01306, eq. 8): w (1 - sigma(beta (rho - z))) of a wanted answer, w (1 - sigma(beta (z - rho))) of another, a
  mean over the step's answers. z = max(0, mean of rho over the answers of this micro-batch's prompts to other prompts): the
  paper's estimate of the divergence, as TRL has it, without a gradient. Of one micro-batch, so its size matters.
Decisions: both answers of a pair are in one micro-batch. Reference scores come by the path that training takes
(reference.py): no second model, and at the first step DPO's loss is log 2. Balance of the experts goes on as in any step;
answers that only tell z are no part of it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.config import PreferenceConfig
from trinity.data.answers import LabelBatch, PairBatch
from trinity.data.chat_tokens import Example
from trinity.data.dataset import IGNORE, Batch
from trinity.errors import InvalidRequest
from trinity.models.common.decoder import Inputs, Output
from trinity.models.common.losses import document_balance_loss
from trinity.train.loss import Losses, Objective, Whole, packed_inputs, target_logprobs


class Pair(NamedTuple):
    """Two answers to one prompt; `reference`: summed log p of each by the first weights, chosen and rejected."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] | None = None


def pair_batch(pairs: Sequence[Pair]) -> PairBatch:
    """Raises InvalidRequest for an answer without a trained token."""
    answers = [each for pair in pairs for each in pair[:2]]
    if any(not answer.num_trained for answer in answers):
        raise InvalidRequest("an answer of a pair has no token that is trained; leave the pair out", param="pairs")
    ids = [torch.tensor(answer.ids) for answer in answers]
    kept = [torch.tensor(answer.is_trained) for answer in answers]
    targets = [each[1:].where(keep[1:], IGNORE) for each, keep in zip(ids, kept, strict=True)]
    docs = torch.arange(len(answers)).repeat_interleave(torch.tensor([len(each) - 1 for each in ids]))
    reference_P2 = torch.tensor([pair.reference or (0.0, 0.0) for pair in pairs])
    return PairBatch(torch.cat([each[:-1] for each in ids])[None], torch.cat(targets)[None], docs[None], reference_P2)


def dpo(rho_P2: Tensor, beta: float, margin: float = 0.0) -> Tensor:
    """Sum over the pairs, chosen and rejected."""
    return -F.logsigmoid(beta * (rho_P2[:, 0] - rho_P2[:, 1]) - margin).sum()


def kto(rho_P: Tensor, z: Tensor, is_wanted_P: Tensor, settings: PreferenceConfig) -> Tensor:
    """Sum over the answers."""
    sign_P = rho_P.new_ones(()).where(is_wanted_P, -1.0)
    weight_P = rho_P.new_tensor(settings.desirable_weight).where(is_wanted_P, settings.undesirable_weight)
    return (weight_P * (1 - (settings.beta * sign_P * (rho_P - z)).sigmoid())).sum()


def measured(*values: Tensor) -> Tensor:
    """float32 [M, 2]: sum and number of each vector's values."""
    return torch.stack([torch.stack([each.sum(), each.new_tensor(each.numel())]) for each in values]).detach().float()


class AnswerObjective(Objective):
    """Objective of text batches, and of answers besides."""

    def _inputs(self, batch: Any) -> Inputs:
        if isinstance(batch, Batch):
            return super()._inputs(batch)
        return packed_inputs(self.config.model, batch.ids_BS, batch.docs_BS)

    def scores(self, batch: Batch) -> Tensor:
        """float32 [A]: log p of each document's trained tokens, summed. No gradient."""
        with torch.no_grad():
            head, [out] = self._outputs([packed_inputs(self.config.model, batch.ids_BS, batch.docs_BS)])
            return self._sums(head, out, batch.targets_BS[0], batch.docs_BS[0])

    def _sums(self, head_VD: Tensor, out: Output, targets_T: Tensor, docs_T: Tensor) -> Tensor:
        kept_T, is_exact = targets_T != IGNORE, self.config.model.batch_invariant
        logprobs_T = target_logprobs(head_VD, out.hidden_TD, targets_T.where(kept_T, 0), is_exact).where(kept_T, 0)
        return logprobs_T.new_zeros(int(docs_T[-1]) + 1).index_add(0, docs_T, logprobs_T)

    def _rho(self, sums_A: Tensor, reference_A: Tensor, targets_T: Tensor, docs_T: Tensor) -> Tensor:
        rho_A = sums_A - reference_A
        if not self.config.preferences.length_normalized:
            return rho_A
        return rho_A / torch.zeros_like(rho_A).index_add(0, docs_T, (targets_T != IGNORE).to(rho_A.dtype))

    def _found(self, batch: Any, out: Output, loss: Tensor, share: float, measures: Tensor) -> Losses:
        """`share`: this micro-batch's part of the whole."""
        docs_T, coef = batch.docs_BS[0], self.config.optim.balance_loss
        num = int(docs_T[-1]) + 1
        weights_D = torch.full((num,), share / num, device=loss.device)
        balance = document_balance_loss(out.routing, self.config.model, docs_T, weights_D, coef)
        zero = torch.zeros_like(loss)
        return Losses(loss, zero, balance, self._counts(out), loss.detach() / share, measures)


class PairObjective(AnswerObjective):
    """`ce` of pairs is DPO's loss, with `nll`."""

    measures = ("reward_chosen", "reward_rejected", "margin", "accuracy")

    def _losses(self, head_VD: Tensor, batch: Any, out: Output, whole: Whole) -> Losses:
        if not isinstance(batch, PairBatch):
            return super()._losses(head_VD, batch, out, whole)
        settings, targets_T, docs_T = self.config.preferences, batch.targets_BS[0], batch.docs_BS[0]
        sums_A = self._sums(head_VD, out, targets_T, docs_T)
        rho_P2 = self._rho(sums_A, batch.reference_P2.flatten(), targets_T, docs_T).view(-1, 2)
        loss = dpo(rho_P2, settings.beta, settings.margin) / whole.num_sequences
        loss = loss - settings.nll * sums_A[::2].sum() / whole.num_tokens
        chosen_P, rejected_P = (settings.beta * rho_P2).unbind(1)
        told = measured(chosen_P, rejected_P, chosen_P - rejected_P, (chosen_P > rejected_P).float())
        return self._found(batch, out, loss, len(rho_P2) / whole.num_sequences, told)


class LabelObjective(AnswerObjective):
    """`ce` of labelled answers is KTO's loss."""

    measures = ("reward_wanted", "reward_unwanted", "divergence", "accuracy")

    def _losses(self, head_VD: Tensor, batch: Any, out: Output, whole: Whole) -> Losses:
        if not isinstance(batch, LabelBatch):
            return super()._losses(head_VD, batch, out, whole)
        targets_T, docs_T, is_wanted_P = batch.targets_BS[0], batch.docs_BS[0], batch.is_wanted_P
        sums_P = self._sums(head_VD, out, targets_T, docs_T)
        rho_P, z = self._rho(sums_P, batch.reference_P2[:, 0], targets_T, docs_T), self._divergence(batch)
        loss = kto(rho_P, z, is_wanted_P, self.config.preferences) / whole.num_sequences
        reward_P = self.config.preferences.beta * rho_P
        is_right_P = (rho_P > z) == is_wanted_P
        told = measured(reward_P[is_wanted_P], reward_P[~is_wanted_P], z[None], is_right_P.float())
        return self._found(batch, out, loss, len(rho_P) / whole.num_sequences, told)

    def _divergence(self, batch: LabelBatch) -> Tensor:
        """Divergence of the model from the reference, on answers to other prompts; 0 at least."""
        other = Batch(batch.other_ids_BS, batch.other_targets_BS, batch.other_docs_BS)
        rho_P = self._rho(self.scores(other), batch.reference_P2[:, 1], other.targets_BS[0], other.docs_BS[0])
        return rho_P.mean().clamp_min(0)
