"""Weights that rows can be computed with at this moment: the committed version of a shard and those before it, by layer.

All of them are of one line (trinity/utils/lines.py): callers name it with the step, and those of another are refused.
Decisions: the shard's lock guards every change, but who only computes needs none of it, because nobody writes to a version
that is here. Readers are counted, and a version is withdrawn when the last has left: then its memory may be written again.
"""

import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from trinity.config import ModelConfig, OptimConfig
from trinity.errors import StepConflict, TrinityError, Unavailable, VersionGone, WrongEpoch
from trinity.experts.layer import ReadyLayer, ready_layers
from trinity.experts.native_layers import NativeLayers
from trinity.state.versioned_store import Version
from trinity.utils.lines import line_of, named, step_of


class PublishedVersions:
    """Versions by number, as callers compute with them; the staged one lies ready among them and cannot be found yet."""

    def __init__(self, shard: str, model: ModelConfig, optim: OptimConfig | None):
        self.committed, self.line = -1, 0
        self._shard, self._model, self._optim = shard, model, optim
        self._versions: dict[int, tuple[Version, dict[int, ReadyLayer]]] = {}
        self._readers = threading.Condition()  # guards all that is above and below, for readers
        self._num_readers = Counter[int]()  # by version
        self.native: NativeLayers | None = None  # the same, for readers that are no Python

    def publish(self, versions: Mapping[int, Version], committed: int) -> None:
        """Make these versions the ones to compute with. What was published of a version that is the same stays as it is."""
        ready = {
            number: known
            if (known := self._versions.get(number)) and known[0] is version
            else (version, ready_layers(version, self._model, self._optim))
            for number, version in versions.items()
        }
        with self._readers:
            self._versions, self.committed = ready, committed
            self.line = line_noted(versions.get(committed))
        self.publish_natively()

    def publish_natively(self) -> None:
        """Let readers in C++ compute with what readers in Python may, and wait for those that do with anything else."""
        if self.native is not None:
            found = [(n, layers) for n, (_, layers) in self._versions.items() if n <= self.committed]
            self.native.publish({name: layers for n, layers in found for name in (n, named(self.line, n))})

    def withdraw(self, numbers: Collection[int]) -> None:
        """Let nobody begin to compute with these versions, and wait for those who do."""
        with self._readers:
            self._versions = {number: each for number, each in self._versions.items() if number not in numbers}
            self._readers.wait_for(lambda: not any(self._num_readers[number] for number in numbers))
        self.publish_natively()

    @contextmanager
    def lent(self, version: int, layer: int) -> Iterator[ReadyLayer]:
        """A layer, unchanged inside the block. Raises what `find` raises."""
        with self._readers:
            found = self.find(version, layer)
            number = self.number(version)
            self._num_readers[number] += 1
        try:
            yield found
        finally:
            self._leave(number)

    @contextmanager
    def lent_whole(self, version: int) -> Iterator[Mapping[int, ReadyLayer]]:
        """All layers of a committed version, unchanged inside the block; none of a version that is not here."""
        number = step_of(version)
        with self._readers:
            is_here = line_of(version) in (0, self.line) and number in self._versions and number <= self.committed
            found = self._versions[number][1] if is_here else {}
            self._num_readers[number] += 1
        try:
            yield found
        finally:
            self._leave(number)

    def _leave(self, number: int) -> None:
        with self._readers:
            self._num_readers[number] -= 1
            self._readers.notify_all()

    def is_to_come(self, version: int) -> bool:
        """Say whether a version that a caller names may yet be committed here."""
        return named(line_of(version) or self.line, step_of(version)) > named(self.line, self.committed)

    def number(self, version: int) -> int:
        """The step of a version that a caller names.

        Raises Unavailable without any weights, StepConflict for a line to come, and VersionGone for one that was.
        """
        if self.committed < 0:
            raise Unavailable(f"shard {self._shard} has no weights yet")
        line, step = line_of(version), step_of(version)
        if line in (0, self.line):
            return step
        if line > self.line:
            raise StepConflict(f"shard {self._shard} is not at the line yet that the caller's version {step} is of")
        raise VersionGone(f"the run has gone back: shard {self._shard} has none of what version {step} was then")

    def find(self, version: int, layer: int) -> ReadyLayer:
        """A layer, for whoever holds the shard's lock.

        Raises what `number` raises, StepConflict for a version to come, VersionGone for one that was, and WrongEpoch for a
        layer of which nothing is here.
        """
        number = self.number(version)
        if number > self.committed:
            raise StepConflict(f"shard {self._shard} holds version {self.committed}, the caller wants {number}")
        if number not in self._versions:
            raise VersionGone(f"shard {self._shard} keeps versions {self._numbers()}, the caller wants {number}")
        found = self._versions[number][1].get(layer)
        if found is None:
            raise WrongEpoch(f"shard {self._shard} holds nothing of layer {layer}")
        return found

    def missing(self, version: int, layer: int, epoch: int, expert: int) -> TrinityError:
        """The error for a caller that wants an expert which is not here at that version: where it came later, its older weights
        are kept nowhere that the table leads to, and no other table would help."""
        with self._readers:
            present = self._versions[self.committed][1].get(layer) if self.committed in self._versions else None
        if step_of(version) < self.committed and present is not None and expert in present.experts:
            return VersionGone(
                f"shard {self._shard} has expert ({layer}, {expert}), but nothing of its version {step_of(version)}"
            )
        return WrongEpoch(f"shard {self._shard} does not hold expert ({layer}, {expert}) of placement epoch {epoch}")

    def layers(self) -> Mapping[int, ReadyLayer]:
        """The committed version by layer; empty without one."""
        return self._versions[self.committed][1] if self.committed in self._versions else {}

    def _numbers(self) -> list[int]:
        return sorted(number for number in self._versions if number <= self.committed)


def line_noted(version: Version | None) -> int:
    """The line that a shard's version is of."""
    return 0 if version is None else version.notes.get("line", 0)
