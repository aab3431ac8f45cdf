"""Several continuations of one prompt: `n` of them, or the `n` best of `best_of`.

Decisions: an engine knows single sequences only; whoever asks it draws each with the parameters that `each` gives. The best
are those with the highest log-probability per token (OpenAI's definition), by the model's raw distribution.
"""

import secrets
from collections.abc import Sequence
from typing import Any

from trinity.engine.request import INT64, SamplingParams, TokenLogprobs


def each(params: SamplingParams) -> list[SamplingParams]:
    """Parameters of every continuation that is drawn; with log-probabilities where the best are to be chosen."""
    more = {"logprobs": 0} if chooses(params) and params.logprobs is None else {}
    return [single(params, i, **more) for i in range(params.num_drawn)]


def single(params: SamplingParams, sample: int, **more: Any) -> SamplingParams:
    """Parameters of the `sample`-th, with what else is to be changed: each has its own seed, wrapped to 64 bits. The same
    object where nothing changes: a copy takes two kilobytes."""
    seed = None if params.seed is None else (params.seed + sample + INT64) % (2 * INT64) - INT64
    changed = {"n": 1, "best_of": None, "seed": seed, **more}
    if all(getattr(params, name) == value for name, value in changed.items()):
        return params
    return params.model_copy(update=changed)


def drawn_seed() -> int:
    """A seed for a request without one."""
    return secrets.randbits(63)


def with_seed(params: SamplingParams) -> SamplingParams:
    """Parameters that give the same text on any engine."""
    return params if params.seed is not None else params.model_copy(update={"seed": drawn_seed()})


def chooses(params: SamplingParams) -> bool:
    return params.num_drawn > params.n


def best(params: SamplingParams, drawn: Sequence[Sequence[TokenLogprobs]]) -> list[int]:
    """Indices of the `n` continuations that are the answer: the best first where there was a choice, else all in order."""
    indices = range(len(drawn))
    if not chooses(params):
        return list(indices)
    return sorted(indices, key=lambda i: -_per_token(drawn[i]))[: params.n]


def _per_token(positions: Sequence[TokenLogprobs]) -> float:
    return sum(position.logprob for position in positions) / len(positions)
