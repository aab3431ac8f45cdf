"""The loss of answers that were drawn and judged: the clipped surrogate, whose share each token is, and what it tells.

Legend: B = 1 and S of a packed batch, T = S tokens, L MoE layers, K top-k, D model.
Formulas. rho = p / p_drawn of a token, or with `rl.ratio` sequence its geometric mean over the answer's tokens (GSPO, arXiv
2507.18071); A is its answer's advantage. Each token that counts adds
- clip (arXiv 1707.06347, with the bounds of arXiv 2503.14476): -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A);
- tis: an importance weight that is cut off, -min(rho, tis_cap) A p / sg(p), of which only p has a gradient;
- icepop: the same with w = rho within icepop_band, and 0 outside;
- kl: coefficient times e^d - d - 1, d = log p_ref - log p (the estimator of arXiv 2402.03300); kl_unbiased: times rho, through
  which the gradient is that of the divergence itself (arXiv 2512.02556).
The sum is divided by the tokens that count in the step (DAPO), by answers times max_tokens (Dr. GRPO, arXiv 2503.20783), or
that of each answer by its own length, and by the number of answers (GRPO, GSPO).
Decisions: p_drawn is of the weights that an answer was drawn from (its `versions`), however many steps ago, so there is no
third set of log-probabilities. Answers that do not count are no part of a batch, unless it would be empty.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinity.config import RLConfig
from trinity.models.common.decoder import CausalLM, Inputs, Output
from trinity.models.common.losses import document_balance_loss
from trinity.models.common.router import Routing
from trinity.rl.rollout import Sample, packed
from trinity.train.loss import Losses, Objective, Whole, packed_inputs, target_logprobs_and_entropy

SAMPLED = (
    "reward",
    "length",
    "truncated",
    "staleness",
    "staleness_max",
    "unjudged",
    "uniform",
    "turns",
)  # of answers and groups: `told_M2`
COUNTED = ("divergence", "entropy", "clipped")  # of tokens that count


class PolicyBatch(NamedTuple):
    """Samples end to end, each a document of its own (B = 1), and how much to make each target more likely."""

    ids_BS: Tensor  # int64
    targets_BS: Tensor  # int64
    docs_BS: Tensor  # int64
    counts_BS: Tensor  # bool: whether the target counts in the loss; not in prompts, nor in what an environment said
    advantages_BS: Tensor  # float32: of its answer, or its own
    logprobs_BS: Tensor  # float32: the target's when it was sampled; 0 in prompts
    reference_BS: Tensor  # float32: the target's by the reference, where there is one
    experts_BSLK: Tensor  # of each input, as the engine chose them
    told_M2: Tensor  # float32: sum and number of each of SAMPLED

    @property
    def num_trained(self) -> int:
        return int(self.counts_BS.sum())


class Judged(NamedTuple):
    """A sample and its advantage, or that of each of its N tokens; `reference_T`: log p of its tokens but the first by the
    reference, where there is one."""

    sample: Sample
    advantage: float | Tensor
    counts: bool = True
    reference_T: Tensor | None = None


def policy_batch(judged: Sequence[Judged], told_M2: Tensor | None = None) -> PolicyBatch:
    kept = [each for each in judged if each.counts] or judged[:1]
    batch = packed([(*each.sample.prompt_ids, *each.sample.token_ids) for each in kept])
    lengths = [(len(each.sample.prompt_ids) - 1, len(each.sample.token_ids)) for each in kept]

    def answers(values: Sequence[Tensor]) -> Tensor:
        pairs = zip(lengths, values, strict=True)
        return torch.cat([part for (before, _), value in pairs for part in (value.new_zeros(before), value)])[None]

    return PolicyBatch(
        *batch,
        answers([_counts(each) for each in kept]),
        answers([torch.as_tensor(each.advantage).expand(num) for each, (_, num) in zip(kept, lengths, strict=True)]),
        answers([each.sample.logprobs_N for each in kept]),
        torch.cat([_reference(each) for each in kept])[None],
        torch.cat([each.sample.experts_TLK for each in kept])[None],
        torch.zeros(len(SAMPLED), 2) if told_M2 is None else told_M2,
    )


def _counts(judged: Judged) -> Tensor:
    own_N = judged.sample.is_own_N
    return torch.full((len(judged.sample.token_ids),), judged.counts) if own_N is None else own_N & judged.counts


def _reference(judged: Judged) -> Tensor:
    if judged.reference_T is not None:
        return judged.reference_T
    return torch.zeros(len(judged.sample.prompt_ids) + len(judged.sample.token_ids) - 1)


def log_ratios(log_T: Tensor, counts_T: Tensor, docs_T: Tensor) -> Tensor:
    """log rho of each token's answer: the mean of `log_T` over its tokens that count."""
    sums_D = log_T.new_zeros(int(docs_T[-1]) + 1).index_add(0, docs_T, log_T.where(counts_T, 0))
    return sums_D[docs_T] / lengths(counts_T, docs_T)


def lengths(counts_T: Tensor, docs_T: Tensor) -> Tensor:
    """int64 [T], of each token's answer: its tokens that count, 1 where none does."""
    num_D = docs_T.new_zeros(int(docs_T[-1]) + 1).index_add(0, docs_T, counts_T.to(docs_T.dtype))
    return num_D.clamp_min(1)[docs_T]


def surrogate(log_ratio_T: Tensor, advantages_T: Tensor, settings: RLConfig) -> tuple[Tensor, Tensor]:
    """(loss_T, is_clipped_T) of tokens, before any sum: see the head of this file."""
    ratio_T = log_ratio_T.exp()
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    if settings.correction == "clip":
        loss_T = -torch.minimum(ratio_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
        return loss_T, torch.where(advantages_T > 0, ratio_T > high, ratio_T < low) & (advantages_T != 0)
    ratio_T, one_T = ratio_T.detach(), (log_ratio_T - log_ratio_T.detach()).exp()
    if settings.correction == "tis":
        is_clipped_T, weights_T = ratio_T > settings.tis_cap, ratio_T.clamp(max=settings.tis_cap)
    else:
        least, most = settings.icepop_band
        is_clipped_T = (ratio_T < least) | (ratio_T > most)
        weights_T = ratio_T.masked_fill(is_clipped_T, 0)
    return -weights_T * advantages_T * one_T, is_clipped_T


def k3(of_T: Tensor, to_T: Tensor) -> Tensor:
    """An estimate of KL(p, q) from tokens drawn of p, never negative: q / p - log(q / p) - 1."""
    difference_T = to_T - of_T
    return difference_T.exp() - difference_T - 1


class PolicyObjective(Objective):
    """Objective of text batches, and of policy batches besides; `ce` of a policy batch is its loss."""

    measures = (*COUNTED, "kl", *SAMPLED)

    def forward(self, batches: Sequence[Any], num_tokens: int, num_sequences: int | None = None) -> list[Losses]:
        old = [batch.experts_BSLK[0] for batch in batches if isinstance(batch, PolicyBatch)]
        with replayed(self.model, old) if old and self.config.rl.replay else nullcontext():
            return super().forward(batches, num_tokens, num_sequences)

    def _inputs(self, batch: Any) -> Inputs:
        if not isinstance(batch, PolicyBatch):
            return super()._inputs(batch)
        return packed_inputs(self.config.model, batch.ids_BS, batch.docs_BS)

    def _losses(self, head_VD: Tensor, batch: Any, out: Output, whole: Whole) -> Losses:
        if not isinstance(batch, PolicyBatch):
            return super()._losses(head_VD, batch, out, whole)
        settings, is_exact = self.config.rl, self.config.model.batch_invariant
        targets_T, counts_T, reference_T = batch.targets_BS[0], batch.counts_BS[0], batch.reference_BS[0]
        drawn_T, advantages_T = batch.logprobs_BS[0], batch.advantages_BS[0]
        logprobs_T, entropy_T = target_logprobs_and_entropy(head_VD, out.hidden_TD, targets_T, is_exact)
        logprobs_T = logprobs_T.where(counts_T, drawn_T)  # ratios of 1 and no gradient where nothing counts
        log_ratio_T, docs_T = logprobs_T - drawn_T, batch.docs_BS[0]
        by_answer_T = log_ratios(log_ratio_T, counts_T, docs_T) if settings.ratio == "sequence" else log_ratio_T
        loss_T, is_clipped_T = surrogate(by_answer_T, advantages_T, settings)
        kl_T = k3(logprobs_T, reference_T.where(counts_T, logprobs_T.detach()))
        kl_T = kl_T * log_ratio_T.exp() if settings.kl_unbiased else kl_T
        divisor = {
            "tokens": whole.num_tokens,
            "constant": whole.num_sequences * settings.max_tokens,
            "answers": whole.num_sequences,
        }[settings.divisor]
        loss_T = (loss_T + settings.kl * kl_T).where(counts_T, 0)
        loss_T = loss_T / lengths(counts_T, docs_T) if settings.divisor == "answers" else loss_T
        loss = loss_T.sum() / divisor
        rows = (k3(drawn_T, logprobs_T), entropy_T, is_clipped_T.float(), kl_T)
        num = counts_T.sum()
        told = [torch.stack([row_T.where(counts_T, 0).sum(), num.float()]) for row_T in rows]
        if not settings.kl:
            told[-1] = torch.zeros_like(told[-1])
        told_M2 = torch.cat([torch.stack(told), batch.told_M2]).detach()
        balance = self._document_balance(batch, out, whole)
        mean = loss.detach() * divisor / num.clamp_min(1)
        return Losses(loss, torch.zeros_like(loss), balance, self._counts(out), mean, told_M2)

    def _document_balance(self, batch: PolicyBatch, out: Output, whole: Whole) -> Tensor:
        docs_T = batch.docs_BS[0]
        weights_D = torch.full((int(docs_T[-1]) + 1,), 1 / whole.num_sequences, device=docs_T.device)
        return document_balance_loss(out.routing, self.config.model, docs_T, weights_D, self.config.optim.balance_loss)


@contextmanager
def replayed(model: CausalLM, passes: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the routers take their choices from `passes`, experts_TLK of each pass of one `forward_all`, in its order."""
    hooks = []
    for at, router in enumerate(model.routers.values()):
        turns = iter([experts_TLK[:, at].long() for experts_TLK in passes])
        hooks.append(router.register_forward_hook(partial(_chosen_before, turns)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _chosen_before(turns: Iterator[Tensor], router: Any, inputs: tuple[Any, ...], routing: Routing) -> Routing:
    ids_TK = next(turns)
    return routing._replace(ids_TK=ids_TK, weights_TK=router.weights(routing.scores_TE, ids_TK))
