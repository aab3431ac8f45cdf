"""Drafts: tokens that may come next because the same words went on so before, in the request's own text or in earlier answers.

Decisions. A guess costs nothing to check where the token is computed anyway: how often the present match would have been right
is counted at every token, drafted or not, by the length of the match; so nothing is spent to find out that drafts do not pay.
Earlier answers are those of the same client alone, or the time that an answer takes would tell what others were answered.
"""

import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterable

from trinity.engine.suffixes import Match, SuffixAutomaton

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of matches, that are counted apart
FIRST_SHARE, PRIOR_WEIGHT, FORGET = 0.4, 4.0, 0.98
MAX_REMEMBERED = 1 << 16  # tokens of a client's answers
MAX_CLIENTS = 64
BOUNDARY = -1


class Trust:
    """Counts of how often guesses came true, by the length of the match behind them; where little is known, as in `prior`."""

    def __init__(self, prior: "Trust | None" = None):
        self._prior = prior
        self._right, self._all = [0.0] * (len(LENGTHS) + 1), [0.0] * (len(LENGTHS) + 1)

    def share(self, length: int) -> float:
        at = bisect_right(LENGTHS, length)
        before = FIRST_SHARE if self._prior is None else self._prior.share(length)
        return (self._right[at] + PRIOR_WEIGHT * before) / (self._all[at] + PRIOR_WEIGHT)

    def note(self, length: int, is_right: bool) -> None:
        at = bisect_right(LENGTHS, length)
        self._right[at] = FORGET * self._right[at] + is_right
        self._all[at] = FORGET * self._all[at] + 1
        if self._prior is not None:
            self._prior.note(length, is_right)


class Memory:
    """The last answers of one client, in two halves: when the newer is full, the older is forgotten."""

    def __init__(self, most: int = MAX_REMEMBERED):
        self._half = most // 2
        self.halves = (SuffixAutomaton(), SuffixAutomaton())

    def push(self, token: int) -> None:
        if len(self.halves[1]) >= self._half and token == BOUNDARY:
            self.halves = (self.halves[1], SuffixAutomaton())
        self.halves[1].push(token)


class Drafter:
    """The drafts of one sequence. `push` takes its tokens as they come, those of the prompt first."""

    def __init__(self, memory: Memory, trust: Trust):
        self._memory, self._trust, self._own = memory, trust, SuffixAutomaton()
        self._walks: dict[SuffixAutomaton, tuple[int, int]] = {}  # where its end stands in each half of the memory
        self._match: Match | None = None

    def __len__(self) -> int:
        return len(self._own)

    def push(self, token: int, is_answer: bool = True) -> None:
        """Take the next token; one of the answer shows whether the guess was right."""
        if is_answer and self._match is not None and (guess := self._match.next(1)):
            self._trust.note(self._match.length, guess[0] == token)
        self._walks = {half: half.follow(*self._walks.get(half, (0, 0)), token) for half in self._memory.halves}
        matches = [self._own.push(token), *(half.match(*walk) for half, walk in self._walks.items())]
        best = max(matches, key=lambda match: match.length)
        self._match = best if best.length else None

    def draft(self, most: int, least: float) -> tuple[int, ...]:
        """Up to `most` tokens, each with all before it as likely as `least` to come."""
        if self._match is None:
            return ()
        likely, num = 1.0, 0
        found = self._match.next(most)
        while num < len(found) and (likely := likely * self._trust.share(self._match.length + num)) >= least:
            num += 1
        return tuple(found[:num])


class Clients:
    """Answers of late, by client."""

    def __init__(self) -> None:
        self._memories: OrderedDict[str, Memory] = OrderedDict()
        self._untold: deque[tuple[Memory, int]] = deque()

    def memory(self, name: str) -> Memory:
        found = self._memories.setdefault(name, Memory())
        self._memories.move_to_end(name)
        if len(self._memories) > MAX_CLIENTS:
            self._memories.popitem(last=False)
        return found

    def remember(self, name: str, answer_ids: Iterable[int]) -> None:
        """Note an answer, a little at a time (`work`)."""
        memory = self.memory(name)
        self._untold.extend((memory, token) for token in (BOUNDARY, *answer_ids))

    def work(self, until_s: float) -> None:
        """Take up what was noted, until that moment of time.perf_counter()."""
        while self._untold and time.perf_counter() < until_s:
            memory, token = self._untold.popleft()
            memory.push(token)
