"""Place of one answer in its grammar.

Legend: V vocabulary. Decisions: the state follows from the tokens of the answer alone, each of which is taken once, so that
preemption, repeated passes and company change nothing. A grammar that begins after reasoning waits for the token that ends it;
until then anything but the end of the text is allowed. An error of the grammar ends its own request.
"""

from collections.abc import Collection, Sequence

import numpy as np
from llguidance import LLMatcher

from trinity.text.grammar.compiler import NO_TEXT, mask_V, reason
from trinity.text.grammar.vocabulary import Vocabulary


class Progress:
    """Owned by one sequence. `error` says why no token can be chosen any more; `is_complete`: no other may follow."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, after: int | None = None):
        self._matcher, self._vocabulary, self._after = matcher.deep_copy(), vocabulary, after
        self.error: str | None = None

    @property
    def is_complete(self) -> bool:
        return self._after is None and self.error is None and self._matcher.is_stopped()

    def allowed_V(self) -> np.ndarray | None:
        """The tokens that may come next: bool [V]; None after an error. Calling again gives the same."""
        if self._after is not None:
            return self._unbound_V()
        mask = mask_V(self._matcher, len(self._vocabulary.tokens))
        if self._matcher.is_error() or not mask.any():
            self.error = self.error or (reason(self._matcher) if self._matcher.is_error() else NO_TEXT)
        return None if self.error else mask

    def take(self, token_id: int) -> None:
        """Go on with that token of the answer, which was allowed."""
        if self._after is not None:
            self._after = None if token_id == self._after else self._after
        elif self.error is None and not self._matcher.consume_token(token_id):
            self.error = reason(self._matcher)

    def _unbound_V(self) -> np.ndarray:
        mask = np.array([bool(token) for token in self._vocabulary.tokens])
        mask[list(self._vocabulary.eos_ids)] = False
        return mask


def reasoning_end(
    prompt_ids: Sequence[int], begins: int | None, ends: int | None, turn_ends: Collection[int]
) -> int | None:
    """The token that ends the reasoning which the prompt leaves open; None where it leaves none. What stands in earlier turns
    does not count: a text may speak of the markers."""
    for token_id in reversed(prompt_ids):
        if token_id == ends or token_id in turn_ends:
            return None
        if token_id == begins:
            return ends
    return None
