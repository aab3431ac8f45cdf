"""Several continuations of one prompt: `n` of them, or the `n` best of `best_of`.

Decisions: an engine knows single sequences only; whoever asks it draws each with the parameters that `each` gives. The best
are those with the highest log-probability per token (OpenAI's definition), by the model's raw distribution.
"""

from collections.abc import Sequence

from trinity.engine.request import INT64, SamplingParams, TokenLogprobs


def each(params: SamplingParams) -> list[SamplingParams]:
    """Parameters of every continuation that is drawn; with log-probabilities where the best are to be chosen."""
    more = {"logprobs": 0} if chooses(params) and params.logprobs is None else {}
    return [single(params, i).model_copy(update=more) for i in range(params.num_drawn)]


def single(params: SamplingParams, sample: int) -> SamplingParams:
    """Parameters of the `sample`-th: each has its own seed, wrapped to 64 bits."""
    seed = None if params.seed is None else (params.seed + sample + INT64) % (2 * INT64) - INT64
    return params.model_copy(update={"n": 1, "best_of": None, "seed": seed})


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
