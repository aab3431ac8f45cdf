"""Queue in which clients take turns: next is the one that the engine has computed least for, by weight.

Decisions: a count of tokens for each client, prompt and generated alike, divided by its weight (the virtual token counter of
Sheng et al. 2024, arXiv 2401.00588). Whoever had nothing waiting starts at the count of the one that is next, or was last, so
that nobody saves turns up. The requests of one client come in their order; with one client that is first come, first served.
"""

from collections import deque
from collections.abc import Iterator
from itertools import chain

from trinity.engine.request import Sequence


class FairQueue:
    """Sequences that wait. Those that have run and were preempted come before all others, in their own order."""

    def __init__(self) -> None:
        self._preempted: deque[Sequence] = deque()
        self._waiting: dict[str, deque[Sequence]] = {}  # by client; none is empty
        self._had: dict[str, float] = {}  # tokens by weight
        self._last = ""  # whose turn was the last

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()), len(self._preempted))

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._preempted, *self._waiting.values())

    def append(self, sequence: Sequence) -> None:
        name = sequence.client.name
        if name not in self._waiting:
            self._begin(name)
            self._waiting[name] = deque()
        self._waiting[name].append(sequence)

    def resume(self, sequence: Sequence) -> None:
        """It has run in another engine: it comes before what has not run yet."""
        self._begin(sequence.client.name)
        self._preempted.append(sequence)

    def _begin(self, name: str) -> None:
        self._had[name] = max(self._had.get(name, 0.0), self._level())

    def put_back(self, sequence: Sequence) -> None:
        """It was taken and could not stay."""
        self._preempted.appendleft(sequence)

    def first(self) -> Sequence:
        return self._preempted[0] if self._preempted else self._waiting[self._next()][0]

    def take(self) -> Sequence:
        """-> the first, which waits no longer."""
        sequence = self.first()
        self.remove(sequence)
        self._last = sequence.client.name
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget one, wherever it stands."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        name = sequence.client.name
        self._waiting[name].remove(sequence)
        if not self._waiting[name]:
            del self._waiting[name]

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens of it that are computed."""
        self._had[sequence.client.name] += num_tokens / sequence.client.weight

    def _level(self) -> float:
        return self._had[self._next()] if self._waiting else self._had.get(self._last, 0.0)

    def _next(self) -> str:
        """Name of the client whose turn it is; of equals, who has waited longer."""
        return min(self._waiting, key=self._had.__getitem__)
