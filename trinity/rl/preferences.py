"""One answer preferred over another: DPO on the live pool, with the weights that it begins from as the reference.

Legend: P pairs of a micro-batch, B = 1 and T tokens of its 2 P answers end to end, each a document of its own.
Source: arXiv 2305.18290, L = -log sigma(beta [(lp_c - ref_c) - (lp_r - ref_r)]), lp the sum of log p over the answer's trained
tokens, or their mean (`is_mean`, the normalisation of arXiv 2405.14734); plus `nll` times the cross-entropy of the preferred
answers, a mean over their tokens in the step. A step's loss is the mean over its pairs.
Decisions: both answers of a pair are in one micro-batch. Reference scores are computed once, by the path that training takes,
before the first step: no second model, and at the first step the loss is exactly log 2. Balance of the experts goes on as in
any step.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity.config import Config
from trinity.data.chat_tokens import Example
from trinity.data.dataset import IGNORE
from trinity.data.prepare import Prepared
from trinity.errors import InvalidRequest
from trinity.models.common.decoder import CausalLM, Inputs, Output
from trinity.models.common.losses import document_balance_loss
from trinity.observability.train_log import StepMetrics
from trinity.pool.pool import ExpertPool
from trinity.rl.policy_trainer import target_logprobs
from trinity.state.versioned_store import Store
from trinity.train.collectives import Comm
from trinity.train.loss import Losses, Objective, packed_inputs
from trinity.train.trainer import Trainer


class Pair(NamedTuple):
    """Two answers to one prompt; `reference`: what the first weights scored them, chosen and rejected."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] | None = None


class PairBatch(NamedTuple):
    """Pairs end to end: chosen, rejected, chosen, ..."""

    ids_BS: Tensor  # int64
    targets_BS: Tensor  # int64; IGNORE where a token is not trained
    docs_BS: Tensor  # int64: the answer, 0 to 2 P - 1
    reference_P2: Tensor  # float32
    share: Tensor  # float32 scalar: 1 / the preferred answers' trained tokens in the step


def pair_batch(pairs: Sequence[Pair], share: float = 0.0) -> PairBatch:
    """Raises InvalidRequest for an answer without a trained token."""
    answers = [each for pair in pairs for each in pair[:2]]
    if any(not answer.num_trained for answer in answers):
        raise InvalidRequest("an answer of a pair has no token that is trained; leave the pair out", param="pairs")
    ids = [torch.tensor(answer.ids) for answer in answers]
    kept = [torch.tensor(answer.is_trained) for answer in answers]
    targets = [each[1:].where(keep[1:], IGNORE) for each, keep in zip(ids, kept, strict=True)]
    docs = torch.arange(len(answers)).repeat_interleave(torch.tensor([len(each) - 1 for each in ids]))
    reference = torch.tensor([pair.reference or (0.0, 0.0) for pair in pairs])
    inputs = torch.cat([each[:-1] for each in ids])
    return PairBatch(inputs[None], torch.cat(targets)[None], docs[None], reference, torch.tensor(share))


def scores(
    head_VD: Tensor, hidden_TD: Tensor, batch: PairBatch, is_exact: bool, is_mean: bool
) -> tuple[Tensor, Tensor]:
    """(score_P2, nll): of both answers of each pair, and minus the summed log p of the preferred ones."""
    targets_T, docs_T = batch.targets_BS[0], batch.docs_BS[0]
    kept_T = targets_T != IGNORE
    logprobs_T = target_logprobs(head_VD, hidden_TD, targets_T.where(kept_T, 0), is_exact).where(kept_T, 0)
    zeros_A = logprobs_T.new_zeros(2 * len(batch.reference_P2))
    sums_A = zeros_A.index_add(0, docs_T, logprobs_T)
    nll = -sums_A[::2].sum()
    if is_mean:
        sums_A = sums_A / zeros_A.index_add(0, docs_T, kept_T.to(zeros_A.dtype))
    return sums_A.view(-1, 2), nll


class PreferenceObjective(Objective):
    """Objective of text batches, and of pairs besides; `ce` of these is DPO's loss."""

    def __init__(self, model: CausalLM, config: Config, beta: float, nll: float, is_mean: bool):
        super().__init__(model, config)
        self.beta, self.nll, self.is_mean = beta, nll, is_mean

    def _inputs(self, batch: Any) -> Inputs:
        if not isinstance(batch, PairBatch):
            return super()._inputs(batch)
        return packed_inputs(self.config.model, batch.ids_BS, batch.docs_BS)

    def _losses(self, head_VD: Tensor, batch: Any, out: Output, num_tokens: int) -> Losses:
        if not isinstance(batch, PairBatch):
            return super()._losses(head_VD, batch, out, num_tokens)
        config = self.config
        score_P2, nll = scores(head_VD, out.hidden_TD, batch, config.model.batch_invariant, self.is_mean)
        gain_P = (score_P2 - batch.reference_P2) @ score_P2.new_tensor([1.0, -1.0])
        loss = -F.logsigmoid(self.beta * gain_P).sum() / config.train.global_batch_size
        loss = loss + self.nll * nll * batch.share
        share = len(gain_P) / config.train.global_batch_size
        weights_D = torch.full((2 * len(gain_P),), 0.5 / config.train.global_batch_size, device=loss.device)
        balance = document_balance_loss(
            out.routing, config.model, batch.docs_BS[0], weights_D, config.optim.balance_loss
        )
        return Losses(loss, torch.zeros_like(loss), balance, self._counts(out), loss.detach() / share)


class PreferenceTrainer(Trainer):
    """A Trainer whose `prefer` takes pairs where `step` takes text: train.global_batch_size of them in a step."""

    def __init__(
        self,
        config: Config,
        pool: ExpertPool,
        data: Prepared,
        comm: Comm,
        device: str = "cpu",
        store: Store | None = None,
        *,
        beta: float = 0.1,
        nll: float = 0.0,
        is_mean: bool = False,
    ):
        self.is_mean = is_mean
        objective = partial(PreferenceObjective, beta=beta, nll=nll, is_mean=is_mean)
        super().__init__(config, pool, data, comm, device, store, objective)

    @torch.no_grad()
    def referenced(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs with the scores that the present weights give them: to be asked before the first step."""
        self.dispatcher.use(self.version)
        found, config, dtype = list[Pair](), self.config.model, getattr(torch, self.config.model.dtype)
        for start in range(0, len(pairs), self.config.train.micro_batch_size):
            part = pairs[start : start + self.config.train.micro_batch_size]
            batch = self.micro_batches.on_device(pair_batch(part))
            weights = {name: parameter.to(dtype) for name, parameter in self.model.named_parameters()}
            inputs = packed_inputs(config, batch.ids_BS, batch.docs_BS)
            out = torch.func.functional_call(self.model, weights, inputs)
            score_P2, _ = scores(weights["lm_head.weight"], out.hidden_TD, batch, config.batch_invariant, self.is_mean)
            found += [pair._replace(reference=(c, r)) for pair, (c, r) in zip(part, score_P2.tolist(), strict=True)]
        return found

    def prefer(self, pairs: Sequence[Pair]) -> StepMetrics:
        """One optimizer step on this worker's pairs, which have their reference scores; `loss` is DPO's.

        Raises InvalidRequest unless there are global_batch_size / num_workers of them."""
        settings = self.config.train
        wanted = settings.global_batch_size // self.comm.world
        if len(pairs) != wanted or any(pair.reference is None for pair in pairs):
            raise InvalidRequest(
                f"{len(pairs)} pairs for a step of {wanted} (train.global_batch_size / train.num_workers); give as many, each "
                "with its reference scores (`referenced`)",
                param="pairs",
            )
        num = self.comm.all_reduce(torch.tensor([float(sum(pair.chosen.num_trained for pair in pairs))]))
        starts = range(0, wanted, settings.micro_batch_size)
        batches = [pair_batch(pairs[at : at + settings.micro_batch_size], 1.0 / float(num)) for at in starts]
        return self.step(batches.__getitem__)
