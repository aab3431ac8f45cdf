"""Speculation: several tokens of a sequence in one pass, where the first of them are likely enough to be worth the others.

A pass computes the last token and a draft of what follows; each position is then sampled as it would have been alone, with its
own history and its own noise, and the draft counts as far as it is what was sampled. So the text is the same with and without.

Decision: what pays follows from what passes take. If a pass of n single tokens takes a + b n seconds, B sequences get
B / (a + b B) tokens a second, and a token more in the pass costs b; it is worth that if it is likelier to count than
b B / (a + b B). That is little where one sequence runs alone, and almost 1 where many do.
"""

import time
from collections.abc import Sequence as Ids

from trinity.engine.drafts import Clients, Drafter, Trust
from trinity.engine.request import Chunk, Sequence

FORGET = 0.98
UNKNOWN_SHARE = 0.5
WORK_SHARE, LEAST_WORK_S = 0.02, 1e-4  # of a pass's time that may go into the upkeep of drafts


class PassCost:
    """Seconds of passes of single tokens, as a line over their number: by least squares, forgetting."""

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of 1, n, n n, t, n t

    def took(self, num_tokens: int, seconds: float) -> None:
        new = (1.0, num_tokens, num_tokens**2, seconds, num_tokens * seconds)
        self._sums = tuple(FORGET * old + each for old, each in zip(self._sums, new, strict=True))  # type: ignore[assignment]

    def share(self, num_tokens: int) -> float:
        """The share of a pass of so many tokens that grows with their number; UNKNOWN_SHARE until they have varied."""
        one, n, nn, t, nt = self._sums
        spread = one * nn - n * n
        if spread <= 1e-3 * one * one or not num_tokens:
            return UNKNOWN_SHARE
        slope = min(max((one * nt - n * t) / spread, 0.0), t / n)
        fixed = (t - slope * n) / one
        return slope * num_tokens / (fixed + slope * num_tokens)


class Speculation:
    """The drafters of the sequences that run. With `most` 0 there are none, and nothing is done."""

    def __init__(self, most: int):
        self.most, self.num_drafted, self.num_accepted = most, 0, 0
        self._drafters: dict[str, Drafter] = {}
        self._trust, self._clients, self._cost = Trust(), Clients(), PassCost()
        self._least = UNKNOWN_SHARE

    def begin(self, running: Ids[Sequence], last_pass_s: float) -> None:
        """Take up tokens that drafters have not seen, before a step, for as long as that is a small part of a pass."""
        if not self.most:
            return
        until_s = time.perf_counter() + max(LEAST_WORK_S, WORK_SHARE * last_pass_s)
        for sequence in running:
            self._catch_up(self._drafter(sequence), sequence, until_s)
        self._clients.work(until_s)
        self._least = self._cost.share(len(running))

    def _drafter(self, sequence: Sequence) -> Drafter:
        if (found := self._drafters.get(sequence.request_id)) is None:
            found = Drafter(self._clients.memory(sequence.client.name), Trust(self._trust))
            self._drafters[sequence.request_id] = found
        return found

    def _catch_up(self, drafter: Drafter, sequence: Sequence, until_s: float) -> None:
        while len(drafter) < len(sequence.token_ids) and time.perf_counter() < until_s:
            at = len(drafter)
            drafter.push(sequence.token_ids[at], is_answer=at >= sequence.num_prompt)

    def draft(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """Tokens to compute after the last one, up to `room`."""
        drafter = self._drafters.get(sequence.request_id)
        if drafter is None or len(drafter) < len(sequence.token_ids) or not sequence.num_generated:
            return ()
        left = sequence.params.max_tokens - sequence.num_generated - 1  # the pass gives one token more than its draft
        return drafter.draft(min(self.most, room, left), self._least)

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended: others may go on as it did."""
        if self._drafters.pop(sequence.request_id, None) is not None:
            self._clients.remember(sequence.client.name, sequence.generated_ids)

    def took(self, chunks: Ids[Chunk], seconds: float) -> None:
        """Note the time of a step."""
        if self.most and chunks and all(chunk.is_single for chunk in chunks):
            self._cost.took(sum(chunk.count for chunk in chunks), seconds)

    def note(self, chunk: Chunk, num_accepted: int) -> None:
        """Count what became of a draft, and forget where the tokens went that did not come true."""
        self.num_drafted += len(chunk.draft)
        self.num_accepted += num_accepted
        del chunk.sequence.experts[chunk.start + chunk.num_own + num_accepted :]
