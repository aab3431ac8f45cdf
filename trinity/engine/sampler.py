"""Tokens drawn from logits, for many requests at once.

Legend: B sequences, R the rows among them that a step concerns, V vocabulary, C candidates.
Decisions: a draw is the inverse of the cumulative distribution, in token order, at one number in [0, 1) that depends on
(seed, position) alone; so a seed gives the same text in any batch, on any engine and after preemption. Filters keep
every token as probable as the last one kept, so ties do not depend on sorting. Log-probabilities are those of the raw
distribution, as vLLM's are.
"""

import hashlib
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from trinity import native
from trinity.engine.grammars import within_grammars
from trinity.engine.request import SamplingParams, Sequence, TokenLogprobs

CANDIDATES = (64, 1024)  # most top-p sets are as small as this: try before sorting the whole vocabulary


class Sampled(NamedTuple):
    """token_id is None where the logits were not finite: the model is broken for this sequence, not the sampler."""

    token_id: int | None
    logprobs: TokenLogprobs | None


@torch.inference_mode()
def sample(logits_BV: Tensor, sequences: list[Sequence], mask_BV: Tensor | None = None) -> list[Sampled]:
    """One token for each sequence, in order; `mask_BV`, 0 or -inf, is what grammars allow."""
    if not sequences:
        return []
    if mask_BV is None and all(is_plain(sequence.params) and not sequence.rules for sequence in sequences):
        return [
            Sampled(token if isfinite(best) else None, None) for token, best in zip(*highest(logits_BV), strict=True)
        ]
    raw_BV = logits_BV.float()
    steered_BV = steer(raw_BV, sequences)
    if mask_BV is not None:
        steered_BV = within_grammars(steered_BV, raw_BV, mask_BV)
    best_B, token_B = steered_BV.max(dim=-1)
    random = [i for i, s in enumerate(sequences) if not s.params.greedy]
    if random:
        token_B[random] = draw(steered_BV[random], [sequences[i] for i in random])
    tokens, finite = token_B.tolist(), best_B.isfinite().tolist()
    logprobs = _logprobs(raw_BV, tokens, [s.params.logprobs for s in sequences])
    if any(s.params.trace for s in sequences):
        drawn = _drawn(steered_BV, token_B, sequences)
        logprobs = [lp and lp._replace(drawn=drawn.get(i)) for i, lp in enumerate(logprobs)]
    return [Sampled(t if ok else None, lp) for t, ok, lp in zip(tokens, finite, logprobs, strict=True)]


def is_plain(params: SamplingParams) -> bool:
    """Say whether a request wants the highest logit's token, and nothing said of it."""
    is_steered = params.penalizes or params.logit_bias
    return params.greedy and not (is_steered or params.trace) and params.logprobs is None


def highest(logits_BV: Tensor) -> tuple[list[int], list[float]]:
    """The first of each row's highest logits, and that logit; NaN is the highest."""
    is_possible = logits_BV.is_cpu and logits_BV.is_contiguous() and logits_BV.dtype in (torch.float32, torch.bfloat16)
    if not is_possible or not hasattr(native.lib, "step_highest"):
        best_B, token_B = logits_BV.float().max(dim=-1)
        return token_B.tolist(), best_B.tolist()
    num, vocab = logits_BV.shape
    token_B, best_B = torch.empty(num, dtype=torch.int64), torch.empty(num)
    places = (each.data_ptr() for each in (logits_BV, token_B, best_B))
    is_brain = logits_BV.dtype == torch.bfloat16
    native.lib.step_highest(is_brain, torch.get_num_threads(), num, vocab, *places)
    return token_B.tolist(), best_B.tolist()


def _drawn(logits_BV: Tensor, token_B: Tensor, sequences: list[Sequence]) -> dict[int, float]:
    """Log-probability of each traced sequence's token where it was drawn; 0 where there was no choice."""
    traced = {i: s.params for i, s in enumerate(sequences) if s.params.trace}
    rows = [i for i, params in traced.items() if not params.greedy]
    if not rows:
        return dict.fromkeys(traced, 0.0)
    probs_RV = filtered_probs(logits_BV[rows], [traced[i] for i in rows]).double()
    share_R = probs_RV.gather(1, token_B[rows, None])[:, 0] / probs_RV.sum(-1)
    return dict.fromkeys(traced, 0.0) | dict(zip(rows, share_R.log().tolist(), strict=True))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2**-53, that depends on its arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def steer(logits_BV: Tensor, sequences: list[Sequence]) -> Tensor:
    """Penalties, bias and masks (token_rules.py); a copy if any row has them.

    Repetition divides positive and multiplies negative logits of tokens in prompt or output; presence and frequency
    subtract once, and per occurrence, for tokens in the output (the OpenAI API's definition, and vLLM's order).
    """
    rows = [i for i, s in enumerate(sequences) if s.params.penalizes or s.params.logit_bias or s.rules]
    if not rows:
        return logits_BV
    logits_BV = logits_BV.clone()
    for i in rows:
        _penalize(logits_BV[i], sequences[i])
        if bias := sequences[i].params.logit_bias:
            ids = torch.tensor(list(bias), device=logits_BV.device)
            logits_BV[i, ids] += torch.tensor(list(bias.values()), device=logits_BV.device)
        _restrict(logits_BV[i], sequences[i])
    return logits_BV


def _restrict(logits_V: Tensor, sequence: Sequence) -> None:
    """Leave only tokens that the request's rules let come next."""
    if sequence.rules is None:
        return
    generated_ids = sequence.generated_ids  # a copy
    if (forced := sequence.rules.forced(generated_ids)) is not None:
        kept = logits_V[forced].clone()
        logits_V.fill_(-torch.inf)[forced] = kept
        return
    if sequence.rules.allowed is not None:
        allowed = torch.tensor(list(sequence.rules.allowed), device=logits_V.device)
        kept = logits_V[allowed]
        logits_V.fill_(-torch.inf)[allowed] = kept
    if banned := sequence.rules.banned(generated_ids):
        logits_V[torch.tensor(list(banned), device=logits_V.device)] = -torch.inf


def _penalize(logits_V: Tensor, sequence: Sequence) -> None:
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sequence.token_ids, device=logits_V.device).unique()
        at = logits_V[seen]
        logits_V[seen] = torch.where(at > 0, at / params.repetition_penalty, at * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.num_generated:
        used, count = torch.tensor(sequence.generated_ids, device=logits_V.device).unique(return_counts=True)
        logits_V[used] -= params.presence_penalty + params.frequency_penalty * count


def draw(logits_RV: Tensor, sequences: list[Sequence]) -> Tensor:
    """Token ids [R] drawn from the filtered distributions."""
    device = logits_RV.device
    probs_RV = filtered_probs(logits_RV, [s.params for s in sequences])
    noise = [uniform(s.seed, len(s.token_ids)) for s in sequences]
    cumulative_RV = probs_RV.cumsum(-1, dtype=torch.float64)
    total_R1 = cumulative_RV[:, -1:]
    target_R1 = torch.tensor(noise, dtype=torch.float64, device=device)[:, None] * total_R1
    below_R1 = torch.minimum(target_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    return torch.searchsorted(cumulative_RV, below_R1, right=True)[:, 0].clamp_(max=logits_RV.shape[1] - 1)


def filtered_probs(logits_RV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Unnormalised probabilities [R, V] after temperature, min_p, top_k and top_p; 0 for what is filtered out."""
    temperature_R1 = _column([p.temperature for p in params], logits_RV)
    best_R1 = logits_RV.max(-1, keepdim=True).values
    probs_RV = ((logits_RV - best_R1) / temperature_R1).softmax(-1)  # minus the best first: T may be tiny
    if any(p.min_p for p in params):
        least_R1 = _column([p.min_p for p in params], logits_RV) * probs_RV.max(-1, keepdim=True).values
        probs_RV = probs_RV * (probs_RV >= least_R1)
    vocab = logits_RV.shape[1]
    rows = [i for i, p in enumerate(params) if 0 < p.top_k < vocab or p.top_p < 1]
    if rows:
        least_R1 = torch.zeros_like(best_R1)
        least_R1[rows] = _least_kept(probs_RV[rows], [params[i] for i in rows])
        probs_RV = probs_RV * (probs_RV >= least_R1)
    return probs_RV


def _least_kept(probs_RV: Tensor, params: list[SamplingParams]) -> Tensor:
    """The probability [R, 1] of the last token that top_k and then top_p (of what top_k left) keep."""
    vocab = probs_RV.shape[1]
    top_k_R1 = _column([min(p.top_k or vocab, vocab) for p in params], probs_RV, torch.int64)
    top_p_R1 = _column([p.top_p for p in params], probs_RV, torch.float64)
    mass_R1 = probs_RV.sum(-1, keepdim=True, dtype=torch.float64)
    whole_R1 = top_p_R1 >= 1  # asked apart: sums are rounded, and a share of 1e-17 is a share
    for num in (*CANDIDATES, vocab):
        sorted_RC = probs_RV.topk(min(vocab, max(num, *(p.top_k for p in params)))).values
        covered_R1 = ~whole_R1 & (sorted_RC.sum(-1, keepdim=True, dtype=torch.float64) >= top_p_R1 * mass_R1)
        if bool((covered_R1 | (top_k_R1 <= sorted_RC.shape[1])).all()):
            break
    rank_C = torch.arange(sorted_RC.shape[1], device=probs_RV.device)
    kept_RC = sorted_RC.double() * (rank_C < top_k_R1)
    total_R1 = torch.where(top_k_R1 < vocab, kept_RC.sum(-1, keepdim=True), mass_R1)
    before_RC = kept_RC.cumsum(-1) - kept_RC
    num_R1 = ((whole_R1 | (before_RC < top_p_R1 * total_R1)) & (rank_C < top_k_R1)).sum(-1, keepdim=True)
    return sorted_RC.gather(1, (num_R1 - 1).clamp_(min=0))


def _column(values: list[float] | list[int], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _logprobs(raw_BV: Tensor, tokens: list[int], wanted: list[int | None]) -> list[TokenLogprobs | None]:
    rows = [i for i, num in enumerate(wanted) if num is not None]
    out: list[TokenLogprobs | None] = [None] * len(tokens)
    if not rows:
        return out
    logprobs_RV = raw_BV[rows].log_softmax(-1)
    chosen_R = logprobs_RV[range(len(rows)), [tokens[i] for i in rows]].tolist()
    top = logprobs_RV.topk(min(max(wanted[i] or 0 for i in rows), raw_BV.shape[1]))
    ids_RC, values_RC = top.indices.tolist(), top.values.tolist()
    for at, i in enumerate(rows):
        best = tuple(zip(ids_RC[at], values_RC[at], strict=True))[: wanted[i]]
        out[i] = TokenLogprobs(tokens[i], chosen_R[at], best)
    return out
