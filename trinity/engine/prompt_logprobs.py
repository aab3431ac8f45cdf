"""Log-probabilities of a prompt's tokens: what a request with `prompt_logprobs` gets. Host code, without torch.

Legend: T tokens of the prompt, S = T - 1 of them that follow others, N alternatives.
Decision: arrays, because a long prompt has millions of numbers; tuples are made of them a piece at a time, for whoever wants
them. A pass writes its part, in any order and again after a preemption or a repeat: the last time counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trinity.engine.request import TokenLogprobs


@dataclass(frozen=True, eq=False)
class PromptLogprobs:
    """Row s is of token s + 1 given those before it, of the model's raw distribution. Nothing is known of the first token.

    The rank counts from 1, the most likely. The token itself need not be among the `top` ones; where it is, its
    log-probability is the same float. A row that no pass has computed yet is NaN.
    """

    token_ids_T: np.ndarray
    logprob_S: np.ndarray
    rank_S: np.ndarray
    top_ids_SN: np.ndarray
    top_logprobs_SN: np.ndarray

    @classmethod
    def empty(cls, token_ids: Sequence[int], num_top: int) -> "PromptLogprobs":
        rows = len(token_ids) - 1
        return cls(
            np.array(token_ids, np.int32),
            np.full(rows, np.nan, np.float32),
            np.zeros(rows, np.int32),
            np.zeros((rows, num_top), np.int32),
            np.full((rows, num_top), np.nan, np.float32),
        )

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return len(self.token_ids_T)

    def is_finite(self, start: int = 0, end: int | None = None) -> bool:
        """Say whether the rows [start, end) hold numbers."""
        return bool(np.isfinite(self.logprob_S[start:end]).all())

    def positions(self, start: int = 0, end: int | None = None) -> list[TokenLogprobs | None]:
        """One for each token of [start, end); None for the prompt's first."""
        first: list[TokenLogprobs | None] = [None] if start == 0 < len(self) else []
        return [*first, *self._rows(max(0, start - 1), len(self) - 1 if end is None else end - 1)]

    def _rows(self, start: int, end: int) -> Iterator[TokenLogprobs]:
        rows = slice(start, max(start, end))
        ids, logprobs, ranks = self.token_ids_T[1:][rows], self.logprob_S[rows], self.rank_S[rows]
        tops = zip(self.top_ids_SN[rows].tolist(), self.top_logprobs_SN[rows].tolist(), strict=True)
        for token_id, logprob, rank, top in zip(ids.tolist(), logprobs.tolist(), ranks.tolist(), tops, strict=True):
            yield TokenLogprobs(token_id, logprob, tuple(zip(*top, strict=True)), rank=rank)
