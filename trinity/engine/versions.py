"""Which version of the weights each request computes with, and what becomes of its cache when that changes.

Decisions. A pass has one version. Live requests share one, the source's newest; a pinned request keeps that of its first
pass, which the engine holds for it. Versions go by their names (trinity/utils/lines.py): of a run that has gone back the same
steps are others. What is cached of a version that was withdrawn (rolled back, quarantined) is used by nobody any more. A pinned
request uses what its version alone has computed, a live one what is at most `engine.kv_max_age` steps older than its own
version; what is older is computed again. In that case the next version waits until every request that the last one threw back
has got a token: a trainer that commits faster than contexts are computed would otherwise stop them all.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from trinity.engine.request import Chunk, Sequence
from trinity.engine.weights import WeightSource
from trinity.errors import Overloaded
from trinity.utils.lines import line_of, oldest_of, step_of

if TYPE_CHECKING:
    from trinity.models.common.decoder import CausalLM

log = logging.getLogger(__name__)


class Versions:
    """The engine's dealings with its WeightSource, which it borrows. `live` is the version of all live requests.

    `max_pinned` bounds the versions that pinned requests hold; the live one comes on top. `max_age`: None is unbounded.
    """

    def __init__(self, source: WeightSource, max_pinned: int, max_age: int | None):
        self._source, self._max_pinned, self._max_age = source, max_pinned, max_age
        self._pinned: Counter[int] = Counter()  # version -> requests that hold it
        self._behind: list[tuple[Sequence, int]] = []  # thrown back by the last switch, and the tokens they had then
        self._handed_over = deque[tuple[float, int]]()  # until when a version is held for who goes on at another engine
        self._damaged: set[int] = set()
        self._withdrawn: set[int] = (
            set()
        )  # versions that went while pinned requests held them: another may get that number
        self._found_damage = False  # since the last `follow`
        self._loaded: int | None = None
        self.live = source.newest()
        self.switch_s = 0.0  # seconds that it took to take up the present live version
        if max_age is not None:  # it may be in use when it is not the newest any more
            source.hold(self.live)

    @property
    def num_held(self) -> int:
        """Versions that pinned requests hold."""
        return len(self._pinned)

    @property
    def num_quarantined(self) -> int:
        """Versions that gave logits which are not finite."""
        return len(self._damaged)

    def follow(self, running: Iterable[Sequence], waiting: Iterable[Sequence] = ()) -> bool:
        """Take up the newest version before the passes of a step, and have computed again what that makes stale.

        `waiting`: those that begin when others have computed what they need. -> whether cached keys and values may be wrong.
        """
        while self._handed_over and self._handed_over[0][0] <= time.monotonic():
            self._source.release(self._handed_over.popleft()[1])
        newest, is_wrong = self._source.newest(), self._found_damage
        goes_back = newest < self.live or line_of(newest) != line_of(self.live)
        if goes_back or (newest > self.live and not self._catching_up):
            is_wrong |= goes_back or bool(self._damaged)
            self._switch(newest)
        elif not is_wrong:
            return False
        stale = [s for s in running if s.pinned is None and s.num_computed and self._is_stale(s)]
        for sequence in stale:
            sequence.num_computed = 0
        behind = [*stale, *waiting] if self._max_age is not None else []
        self._behind = [(s, s.num_generated) for s in behind]
        self._found_damage = False
        return is_wrong

    def _is_stale(self, sequence: Sequence) -> bool:
        return self.is_withdrawn(sequence.oldest, sequence.version) or sequence.oldest < self.bounds(sequence)[0]

    def is_withdrawn(self, oldest: int, newest: int) -> bool:
        """Shall nothing be used any more that these versions, and those between them, have computed?"""
        bad = self._withdrawn | (self._damaged - {self.live})
        is_past = self._is_past(newest) or self._is_past(oldest)
        return is_past or any(oldest <= version <= newest for version in bad)

    def bounds(self, sequence: Sequence) -> tuple[int, int]:
        """The oldest and the newest version whose keys and values it may use."""
        version = self.of(sequence)
        max_age = self._max_age if sequence.params.version_policy == "live" else 0
        return oldest_of(version, max_age), version

    @property
    def _catching_up(self) -> bool:
        is_here = (s.num_generated == before for s, before in self._behind if s.row is not None or s.awaits is not None)
        return any(is_here)

    def _switch(self, newest: int) -> None:
        if self._max_age is not None:
            self._source.hold(newest)
            self._source.release(self.live)
        self._withdrawn |= {version for version in self._pinned if newest < version <= self.live}
        self.live = newest

    def passes(self, batch: Iterable[Chunk]) -> list[tuple[int, list[Chunk]]]:
        """The chunks by version, newest first."""
        found: dict[int, list[Chunk]] = {}
        for chunk in batch:
            found.setdefault(self.of(chunk.sequence), []).append(chunk)
        return sorted(found.items(), reverse=True)

    def of(self, sequence: Sequence) -> int:
        """The version that it computes with, or would if it began now."""
        if sequence.params.version_policy == "live":
            return self.live
        if sequence.pinned is not None:
            return sequence.pinned
        free = self.live in self._pinned or len(self._pinned) < self._max_pinned
        return self.live if free else max(self._pinned, key=lambda v: (not self._is_past(v), v))

    def _is_past(self, version: int) -> bool:
        """Say whether it is withdrawn for good."""
        return version > self.live or line_of(version) != line_of(self.live)

    def begin(self, sequence: Sequence) -> None:
        """Pin a request that wants it to the live version; with too many held already, to the newest of those (at best not a
        withdrawn one)."""
        if sequence.params.version_policy == "pinned" and sequence.pinned is None:
            self._hold(sequence, self.of(sequence))

    def pin_to(self, sequence: Sequence, version: int) -> None:
        """Pin a request that another engine has begun to what it had there. Raises Overloaded while too many others are held;
        whether that one is there is said by its first pass."""
        if version not in self._pinned and len(self._pinned) >= self._max_pinned:
            raise Overloaded(
                f"pinned requests hold versions {sorted(map(step_of, self._pinned))}, engine.max_versions is "
                f"{self._max_pinned}; one at version {step_of(version)} has to wait"
            )
        self._hold(sequence, version)

    def _hold(self, sequence: Sequence, version: int) -> None:
        sequence.pinned = version
        self._pinned[version] += 1
        self._source.hold(version)

    def release(self, sequence: Sequence, held_s: float = 0.0) -> None:
        """The request has ended, or starts again: what it held is free, after `held_s` where there are not too many such."""
        version, sequence.pinned = sequence.pinned, None
        if version is not None:
            kept = {other for _, other in self._handed_over}
            if held_s and (version in kept or len(kept) < self._max_pinned):
                self._source.hold(version)
                self._handed_over.append((time.monotonic() + held_s, version))
            self._source.release(version)
            self._pinned[version] -= 1
            self._pinned += Counter()  # drops zeros
            self._withdrawn &= self._pinned.keys()

    def model(self, version: int) -> "CausalLM":
        """Raises what the source raises."""
        started_s = time.perf_counter()
        model = self._source.model(version)
        if version == self.live != self._loaded:
            self._loaded, self.switch_s = version, time.perf_counter() - started_s
        return model

    def quarantine(self, version: int) -> bool:
        """Report that its logits were not finite; -> whether there is another one to use instead."""
        if version not in self._damaged:
            log.warning("version %d of the weights gives logits that are not finite", step_of(version))
        self._source.quarantine(version)
        self._damaged.add(version)
        self._behind.clear()
        is_other = self._source.newest() != version
        self._found_damage |= is_other
        return is_other

    def lost(self) -> bool:
        """A version was not there for a pass; -> whether live requests have another one to use now."""
        self._behind.clear()
        return self._source.newest() != self.live

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that the requests hold what is held."""
        pinned = Counter(s.pinned for s in sequences if s.pinned is not None)
        assert pinned == self._pinned, "a version is held for nobody, or used without being held"
        assert len(pinned) <= self._max_pinned, "too many versions are held"

    def leave(self, sequence: Sequence) -> bool:
        """Say whether it may go on at another version. Live requests may; pinned ones that have no token yet start again."""
        if sequence.params.version_policy == "live":
            return True
        if sequence.num_generated:
            return False
        self.release(sequence)
        sequence.num_computed = 0
        return True
