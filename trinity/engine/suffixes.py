"""All suffixes of a growing text of tokens, and where each was followed by what.

A suffix automaton (Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text"): at most two states a
token, and a constant number of steps for each on average. Its longest suffix that occurred before is one link away.
Host code, without torch.
"""

from typing import NamedTuple

RECENT = 8  # links up which the newest occurrence is noted


class Match(NamedTuple):
    """The last `length` tokens of a text occurred before `at` in `tokens`, which go on from there."""

    length: int
    at: int
    tokens: list[int]

    def next(self, num: int) -> list[int]:
        """Up to so many tokens that followed; a text that repeats itself is taken to go on so. Ends before what is no token."""
        period = len(self.tokens) - self.at
        found = [self.tokens[self.at + i % period] for i in range(num)] if period else []
        return found[: next((i for i, token in enumerate(found) if token < 0), len(found))]


class SuffixAutomaton:
    """Owns its tokens. Numbers below 0 are tokens that end a draft, such as the boundary between two texts."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]  # `end`: after an occurrence of the state's texts
        self._last = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def push(self, token: int) -> Match:
        """Append a token; -> the longest end of the whole that occurred before, the newest such place that is known."""
        self.tokens.append(token)
        here = self._state(self._length[self._last] + 1, {}, 0, len(self.tokens))
        self._link[here], self._last = self._linked(self._last, token, here), here
        state = self._link[here]
        found = Match(self._length[state], self._end[state], self.tokens)
        self._note_end(state)
        return found

    def follow(self, state: int, length: int, token: int) -> tuple[int, int]:
        """The state and length of the longest end of another text that occurs here, after one more token of it."""
        while state and token not in self._next[state]:
            state = self._link[state]
            length = self._length[state]
        found = self._next[state].get(token)
        return (0, 0) if found is None else (found, length + 1)

    def match(self, state: int, length: int) -> Match:
        return Match(length, self._end[state], self.tokens)

    def _state(self, length: int, after: dict[int, int], link: int, end: int) -> int:
        self._next.append(after)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1

    def _linked(self, state: int, token: int, here: int) -> int:
        """Have the suffixes go on to `here` with that token; -> the state of the longest that went on with it before."""
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = here
            state = self._link[state]
        if state < 0:
            return 0
        old = self._next[state][token]
        return old if self._length[old] == self._length[state] + 1 else self._split(state, token, old)

    def _split(self, state: int, token: int, old: int) -> int:
        """The shorter texts of `old`, which now end here, too, get a state of their own."""
        clone = self._state(self._length[state] + 1, dict(self._next[old]), self._link[old], self._end[old])
        self._link[old] = clone
        while state >= 0 and self._next[state].get(token) == old:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _note_end(self, state: int) -> None:
        for _ in range(RECENT):
            if state <= 0:
                return
            self._end[state] = len(self.tokens)
            state = self._link[state]
