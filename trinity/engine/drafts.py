"""Drafts: tokens that may come next because the same words went on so before, in the request's own text or in earlier answers.

Decisions. Where the last two tokens occurred before, or else the last one, is looked up in a table, of each text the newest
place; of several places the one that agrees for longest is followed, without another look for as long as it is right. (A suffix
automaton, which knows the longest match at every token, spared as many passes, within 0.3 %, for three times the time and ten
times the memory.)
A guess costs nothing to check where the token is computed anyway: how often the present match would have been right is counted
at every token, drafted or not, by the length of the match; so nothing is spent to find out that drafts do not pay.
Earlier answers are those of the same client and salt alone, or the time that an answer takes would tell what others were told.
Host code, without torch.
"""

import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable

BITS = 32  # of a token
BOUNDARY = (1 << BITS) - 1  # no token: ends a draft, such as between two texts
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of matches, that are counted apart
PLACE = [bisect_right(LENGTHS, length) for length in range(LENGTHS[-1] + 1)]
FIRST_SHARE, PRIOR_WEIGHT, FORGET = 0.4, 4.0, 0.98
MAX_REMEMBERED = 1 << 16  # tokens of a client's answers
MAX_CLIENTS, MAX_OF_ALL = 64, 1 << 18
MAX_UNTOLD = (
    1 << 14
)  # tokens of answers that wait to be taken up, all of which are let go where there is no time for it


class Trust:
    """Counts of how often guesses came true, by the length of the match behind them; where little is known, as in `prior`."""

    def __init__(self, prior: "Trust | None" = None):
        self._prior = prior
        self._right, self._all = [0.0] * (len(LENGTHS) + 1), [0.0] * (len(LENGTHS) + 1)

    def share(self, length: int) -> float:
        at = PLACE[min(length, LENGTHS[-1])]
        before = FIRST_SHARE if self._prior is None else self._prior.share(length)
        return (self._right[at] + PRIOR_WEIGHT * before) / (self._all[at] + PRIOR_WEIGHT)

    def note(self, length: int, is_right: bool) -> None:
        at = PLACE[min(length, LENGTHS[-1])]
        self._right[at] = FORGET * self._right[at] + is_right
        self._all[at] = FORGET * self._all[at] + 1
        if self._prior is not None:
            self._prior.note(length, is_right)


class Text:
    """A growing text, and where each token and each pair of them was last."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._pairs: dict[int, int] = {}
        self._singles: dict[int, int] = {}
        self._last = BOUNDARY

    def __len__(self) -> int:
        return len(self.tokens)

    def push(self, token: int) -> int:
        """Append a token; -> the place after where its last tokens were before, 0 for none."""
        pair, self._last = self._last << BITS | token, token
        self.tokens.append(token)
        found = self._pairs.get(pair) or self._singles.get(token, 0)
        self._pairs[pair] = self._singles[token] = len(self.tokens)
        return found

    def find(self, other: list[int]) -> int:
        """The place after where the last tokens of another text were last, 0 for none."""
        before = other[-2] if len(other) > 1 else BOUNDARY
        return self._pairs.get(before << BITS | other[-1]) or self._singles.get(other[-1], 0)

    def agrees(self, at: int, other: list[int]) -> int:
        """Number of tokens before `at` that are the last ones of the other text, up to as many as are counted apart."""
        tokens, num, most = self.tokens, 0, min(at, len(other), LENGTHS[-1])
        while num < most and tokens[at - 1 - num] == other[-1 - num]:
            num += 1
        return num

    def after(self, at: int, num: int) -> list[int]:
        """Up to so many tokens that followed; a text that repeats itself is taken to go on so. Ends before a boundary."""
        period = len(self.tokens) - at
        found = [self.tokens[at + i % period] for i in range(num)] if period else []
        return found[: found.index(BOUNDARY)] if BOUNDARY in found else found


class Memory:
    """The last answers of one client, in two halves: when the newer is full, the older is forgotten."""

    def __init__(self, most: int = MAX_REMEMBERED):
        self._half = most // 2
        self.halves = (Text(), Text())

    def __len__(self) -> int:
        return sum(map(len, self.halves))

    def push(self, token: int) -> None:
        if len(self.halves[1]) >= self._half and token == BOUNDARY:
            self.halves = (self.halves[1], Text())
        self.halves[1].push(token)


class Drafter:
    """The drafts of one sequence, from its token `first` on. `push` takes its tokens as they come, the prompt's first."""

    def __init__(self, memory: Memory, trust: Trust, first: int = 0):
        self._memory, self._trust, self._first, self._own = memory, trust, first, Text()
        self._text, self._at = self._own, 0  # what is followed
        self._length = 0  # how long it has been right; 0: nothing is followed

    @property
    def num_tokens(self) -> int:
        """Tokens that it knows of, with those before its first."""
        return self._first + len(self._own.tokens)

    @property
    def share(self) -> float:
        """Likelihood of its guess of the next token; 0 where its last ones were not seen before."""
        return self._trust.share(self._length) if self._length else 0.0

    def push(self, token: int, is_answer: bool = True) -> None:
        """Take the next token; one of the answer shows whether the guess was right."""
        followed = self._text.tokens if self._length else ()
        is_right = self._at < len(followed) and followed[self._at] == token
        if is_answer and self._at < len(followed):
            self._trust.note(self._length, is_right)
        found = self._own.push(token)
        if is_right:
            self._at, self._length = self._at + 1, self._length + 1
        else:
            self._look(found)

    def _look(self, at: int) -> None:
        """Follow the place that agrees for longest: `at` in the own text, or one of the memory's."""
        tokens = self._own.tokens
        self._text, self._at, self._length = self._own, at, self._own.agrees(at, tokens) if at else 0
        for half in self._memory.halves:
            if half.tokens and (place := half.find(tokens)) and (length := half.agrees(place, tokens)) > self._length:
                self._text, self._at, self._length = half, place, length

    def draft(self, most: int, least: float) -> tuple[int, ...]:
        """Up to `most` tokens, each with all before it as likely as `least` to come."""
        likely, num = 1.0, 0
        found = self._text.after(self._at, most) if self._length else []
        while num < len(found) and (likely := likely * self._trust.share(self._length + num)) >= least:
            num += 1
        return tuple(found[:num])


class Clients:
    """Answers of late, by client. Whose were asked for last are kept."""

    def __init__(self) -> None:
        self._memories: OrderedDict[Hashable, Memory] = OrderedDict()
        self._untold: deque[tuple[Memory, int]] = deque()

    def memory(self, name: Hashable) -> Memory:
        found = self._memories.setdefault(name, Memory())
        self._memories.move_to_end(name)
        return found

    def remember(self, name: Hashable, answer_ids: Iterable[int]) -> None:
        """Note an answer, of which `work` takes up a little at a time."""
        memory = self.memory(name)
        if len(self._untold) > MAX_UNTOLD:
            self._untold.clear()
        self._untold.extend((memory, token) for token in (BOUNDARY, *answer_ids))
        while len(self._memories) > MAX_CLIENTS or sum(map(len, self._memories.values())) > MAX_OF_ALL:
            self._memories.popitem(last=False)

    def work(self, until_s: float) -> None:
        """Take up what was noted, until that moment of time.perf_counter()."""
        while self._untold and time.perf_counter() < until_s:
            memory, token = self._untold.popleft()
            memory.push(token)
