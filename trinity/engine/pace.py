"""Pace of an engine: how many tokens a step may have to stay within a time, and the least that tokens take.

Decisions: no model of what a pass costs, which is another on each machine and for each model: the size of the next step follows
from the time that the last full one took. It begins small and at most doubles.
"""

import time
from collections import deque

FIRST_TOKENS = 32  # of a step that is bounded, before anything is known
MEMORY_S = 60.0  # of the longest step
FORGET = 1.001  # each step, the least that was ever seen grows by so much: machines get slower, too


class Pace:
    """Decides on a step's tokens: up to `most`, in at most `max_s` where that is set. `longest_s` is the longest step
    of the last minute's."""

    def __init__(self, most: int, max_pass_s: float | None = None):
        self._most, self.max_s = most, max_pass_s
        self._size = most if max_pass_s is None else min(most, FIRST_TOKENS)
        self._least_s, self._least_token_s = 0.0, 0.0  # of a step, and of a token in a full one; 0: nothing is known
        self._recent = deque[tuple[float, float]]()  # (ended, seconds) of steps that no later one was longer than
        self.longest_s = self.last_s = 0.0

    def size(self, num_running: int) -> int:
        """Tokens that the next step may have; one for each running sequence in any case."""
        return max(self._size, min(num_running, self._most))

    def took(self, num_tokens: int, seconds: float) -> None:
        """Note a step of so many tokens."""
        if not num_tokens or seconds <= 0:
            return
        self._least_s = min(seconds, FORGET * self._least_s or seconds)
        self.last_s = seconds
        self._note_longest(time.monotonic(), seconds)
        is_full = num_tokens >= self._size
        if is_full:
            self._least_token_s = min(seconds / num_tokens, FORGET * self._least_token_s or seconds / num_tokens)
        if self.max_s is not None and (is_full or seconds > self.max_s):
            self._size = max(1, min(self._most, int(num_tokens * min(2.0, self.max_s / seconds))))

    def _note_longest(self, now_s: float, seconds: float) -> None:
        while self._recent and self._recent[-1][1] <= seconds:
            self._recent.pop()
        self._recent.append((now_s, seconds))
        while self._recent[0][0] < now_s - MEMORY_S:
            self._recent.popleft()
        self.longest_s = self._recent[0][1]

    def least_s(self, num_tokens: int) -> float:
        """Seconds until the next token of a sequence that has so many to compute before it, if nothing else is done."""
        return max(self._least_s, num_tokens * self._least_token_s)
