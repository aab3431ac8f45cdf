"""Queue in which what is urgent comes first, and clients take turns: next is the one that the engine has computed least for,
by weight.

Decisions: priorities are strict; among requests of one priority clients take turns. A count of tokens for each client,
prompt and generated alike, divided by its weight (the virtual token counter of Sheng et al. 2024, arXiv 2401.00588).
Whoever had nothing waiting starts at the count of the one that is next, or was last, so that nobody saves turns up. The
requests of one client come in their order; with one client that is first come, first served. What a client was computed
counts whatever its priority was.
"""

import math
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from trinity.engine.request import Sequence


@dataclass
class Turns:
    """Tokens that clients have had, by weight, and whose turn was the last."""

    had: dict[str, float] = field(default_factory=dict)
    last: str = ""


class PriorityQueue:
    """Sequences that wait: a queue for each priority, the lowest number first."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._levels: dict[int, FairQueue] = {}  # none is empty
        self._deadlines = Deadlines()

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return chain(*(self._levels[priority] for priority in sorted(self._levels)))

    def append(self, sequence: Sequence) -> None:
        self._level(sequence).append(sequence)
        self._deadlines.add(sequence)

    def resume(self, sequence: Sequence) -> None:
        """It has run in another engine: it comes before what has not run yet."""
        self._level(sequence).resume(sequence)
        self._deadlines.add(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """It was taken and could not stay."""
        self._level(sequence).put_back(sequence)
        self._deadlines.add(sequence)

    def soon(self, is_soon: Callable[[int, float], bool]) -> Iterator[Sequence]:
        """Those for whom a deadline, `until_s`, would be soon with so many tokens to compute: at most twice as many as they
        have. The rest is not looked at."""
        return self._deadlines.soon(is_soon)

    def first(self) -> Sequence:
        return self._levels[min(self._levels)].first()

    def last(self) -> Sequence:
        """One that all others come before."""
        return self._levels[max(self._levels)].last()

    def take(self) -> Sequence:
        """-> the first, which waits no longer."""
        sequence = self.first()
        self.remove(sequence)
        self._turns.last = sequence.client.name
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget one, wherever it stands."""
        level = self._levels[sequence.priority]
        level.remove(sequence)
        self._deadlines.remove(sequence)
        if not level:
            del self._levels[sequence.priority]

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens of it that are computed."""
        self._turns.had[sequence.client.name] += num_tokens / sequence.client.weight

    def _level(self, sequence: Sequence) -> "FairQueue":
        return self._levels.setdefault(sequence.priority, FairQueue(self._turns))


class Deadlines:
    """Sequences whose callers wait for a time only, the earliest first, those of like lengths together: each pass asks who can
    no longer make it, of thousands that wait."""

    def __init__(self) -> None:
        self._entries = defaultdict[int, list[tuple[float, int, Sequence]]](list)  # by the bits of the length

    def add(self, sequence: Sequence) -> None:
        if sequence.until_s < math.inf:
            insort(self._of(sequence), (sequence.until_s, id(sequence), sequence))

    def remove(self, sequence: Sequence) -> None:
        """It must have as many tokens as when it was added."""
        if sequence.until_s < math.inf:
            own = self._of(sequence)
            del own[bisect_left(own, (sequence.until_s, id(sequence)))]

    def soon(self, is_soon: Callable[[int, float], bool]) -> Iterator[Sequence]:
        for bits, entries in self._entries.items():
            for until_s, _, sequence in entries:
                if not is_soon(1 << bits, until_s):
                    break
                yield sequence

    def _of(self, sequence: Sequence) -> list[tuple[float, int, Sequence]]:
        return self._entries[len(sequence.token_ids).bit_length()]


class FairQueue:
    """Sequences of one priority. Those that have run and were preempted come before all others, in their own order."""

    def __init__(self, turns: Turns) -> None:
        self._preempted: deque[Sequence] = deque()
        self._waiting: dict[str, deque[Sequence]] = {}  # by client; none is empty
        self._turns = turns

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
        self._turns.had[name] = max(self._turns.had.get(name, 0.0), self._level())

    def put_back(self, sequence: Sequence) -> None:
        """It was taken and could not stay."""
        self._preempted.appendleft(sequence)

    def first(self) -> Sequence:
        return self._preempted[0] if self._preempted else self._waiting[self._next()][0]

    def last(self) -> Sequence:
        """The newest of the client that has had most; what was preempted only where nothing else is."""
        if not self._waiting:
            return self._preempted[-1]
        return self._waiting[max(self._waiting, key=self._turns.had.__getitem__)][-1]

    def remove(self, sequence: Sequence) -> None:
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        name = sequence.client.name
        self._waiting[name].remove(sequence)
        if not self._waiting[name]:
            del self._waiting[name]

    def _level(self) -> float:
        had = self._turns.had
        return had[self._next()] if self._waiting else had.get(self._turns.last, 0.0)

    def _next(self) -> str:
        """Name of the client whose turn it is; of equals, who has waited longer."""
        return min(self._waiting, key=self._turns.had.__getitem__)
