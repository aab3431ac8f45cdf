"""Speculation: several tokens of a sequence in one pass, where the first of them are likely enough to be worth the others.

A pass computes the last token and a draft of what follows; each position is then sampled as it would have been alone, with its
own history and its own noise, and the draft counts as far as it is what was sampled. So the text is the same with and without.

Decision: what pays follows from what passes take. If a pass of n single tokens takes a + b n seconds, B sequences get
B / (a + b B) tokens a second, and a token more in the pass costs b; it is worth that if it is likelier to count than
b B / (a + b B). That is little where one sequence runs alone, and almost 1 where many do.
"""

import math
import time
from collections.abc import Sequence as Ids

from trinity.engine.drafts import Clients, Drafter, Trust
from trinity.engine.request import Chunk, Sequence

FORGET = 0.98
UNKNOWN_SHARE, LITTLE = 0.5, 0.25
HELD_UP = 3.0
WORK_SHARE = 0.01  # of a pass's time that may go into what drafters are behind, such as prompts
AT_ONCE = 16  # tokens, between two looks at the clock
MAX_PROMPT = 1 << 16  # the last tokens of a prompt, that drafts are made from


class PassCost:
    """Seconds of passes of single tokens, as a line over their number: by least squares, forgetting. As long as their number
    has varied little, the line is near the one that UNKNOWN_SHARE says."""

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of 1, n, n n, t, n t

    def took(self, num_tokens: int, seconds: float) -> None:
        """Note a pass; what takes many times as long as others was held up by something else."""
        one, n, nn, t, nt = [FORGET * old for old in self._sums]
        seconds = min(seconds, HELD_UP * t / one) if one else seconds
        self._sums = one + 1.0, n + num_tokens, nn + num_tokens * num_tokens, t + seconds, nt + num_tokens * seconds

    def share(self, num_tokens: int) -> float:
        """The share of a pass of so many tokens that grows with their number."""
        one, n, nn, t, nt = self._sums
        if not n or not t or not num_tokens:
            return UNKNOWN_SHARE
        mean_n, mean_t = n / one, t / one
        known, unknown = nn / one - mean_n**2, (LITTLE * mean_n) ** 2
        slope = (nt / one - mean_n * mean_t + unknown * UNKNOWN_SHARE * mean_t / mean_n) / (known + unknown)
        slope = min(max(slope, 0.0), mean_t / mean_n)
        return slope * num_tokens / (mean_t - slope * mean_n + slope * num_tokens)


class Speculation:
    """The drafters of the sequences that run. With `most` 0 there are none, and nothing is done."""

    def __init__(self, most: int):
        self.most, self.num_drafted, self.num_accepted = most, 0, 0
        self._drafters: dict[str, Drafter] = {}
        self._ready: dict[str, Drafter] = {}  # those whose first guess is worth computing
        self._trust, self._clients, self._cost = Trust(), Clients(), PassCost()
        self._least = UNKNOWN_SHARE

    def begin(self, running: Ids[Sequence], last_pass_s: float) -> None:
        """Take up what the last step gave to each; and what else drafters have not seen, for as long as that is a small part of
        a pass."""
        if not self.most:
            return
        until_s, least = time.perf_counter() + WORK_SHARE * last_pass_s, self._cost.share(len(running))
        self._least, self._ready = least, {}
        for sequence in running:
            name, tokens = sequence.request_id, sequence.token_ids
            drafter = self._drafters.get(name) or self._begun(sequence)
            behind = len(tokens) - drafter.num_tokens
            if behind == 1:
                drafter.push(tokens[-1])
            elif behind:
                self._catch_up(drafter, sequence, math.inf if behind <= 1 + self.most else until_s)
            if drafter.num_tokens == len(tokens) and drafter.share >= least:
                self._ready[name] = drafter
        self._clients.work(until_s)

    def _begun(self, sequence: Sequence) -> Drafter:
        memory, first = self._clients.memory(_whose(sequence)), max(0, sequence.num_prompt - MAX_PROMPT)
        found = self._drafters[sequence.request_id] = Drafter(memory, Trust(self._trust), first)
        return found

    def _catch_up(self, drafter: Drafter, sequence: Sequence, until_s: float) -> None:
        while (at := drafter.num_tokens) < len(sequence.token_ids) and time.perf_counter() < until_s:
            for place, token in enumerate(sequence.token_ids[at : at + AT_ONCE], start=at):
                drafter.push(token, is_answer=place >= sequence.num_prompt)

    def draft(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """Tokens to compute after the last one, up to `room`."""
        drafter = self._ready.get(sequence.request_id)
        if drafter is None or not sequence.num_generated:
            return ()
        left = sequence.params.max_tokens - sequence.num_generated - 1  # the pass gives one token more than its draft
        return drafter.draft(min(self.most, room, left), self._least)

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended: others may go on as it did."""
        self._ready.pop(sequence.request_id, None)
        if self._drafters.pop(sequence.request_id, None) is not None:
            self._clients.remember(_whose(sequence), sequence.generated_ids)

    def took(self, chunks: Ids[Chunk], seconds: float) -> None:
        """Note the time of a step, up to what its requests were told."""
        if self.most and chunks and all(chunk.is_single for chunk in chunks):
            self._cost.took(sum(chunk.count for chunk in chunks), seconds)

    def note(self, chunk: Chunk, num_accepted: int) -> None:
        """Count what became of a draft, and forget where the tokens went that did not come true."""
        self.num_drafted += len(chunk.draft)
        self.num_accepted += num_accepted
        del chunk.sequence.experts[chunk.start + chunk.num_own + num_accepted :]


def _whose(sequence: Sequence) -> tuple[str, str | None]:
    """Name of those who see each other's answers by the time that theirs take: as in the prefix cache."""
    return sequence.client.name, sequence.params.cache_salt
