"""Weights that rows can be computed with at this moment: the committed version of a shard and those before it, by layer.

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


class PublishedVersions:
    """Versions by number, as callers compute with them; the staged one lies ready among them and cannot be found yet."""

    def __init__(self, shard: str, model: ModelConfig, optim: OptimConfig | None):
        self.committed = -1
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
        self.publish_natively()

    def publish_natively(self) -> None:
        """Let readers in C++ compute with what readers in Python may, and wait for those that do with anything else."""
        if self.native is not None:
            self.native.publish({n: layers for n, (_, layers) in self._versions.items() if n <= self.committed})

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
            self._num_readers[version] += 1
        try:
            yield found
        finally:
            self._leave(version)

    @contextmanager
    def lent_whole(self, version: int) -> Iterator[Mapping[int, ReadyLayer]]:
        """All layers of a committed version, unchanged inside the block; none of a version that is not here."""
        with self._readers:
            found = self._versions[version][1] if version in self._versions and version <= self.committed else {}
            self._num_readers[version] += 1
        try:
            yield found
        finally:
            self._leave(version)

    def _leave(self, version: int) -> None:
        with self._readers:
            self._num_readers[version] -= 1
            self._readers.notify_all()

    def find(self, version: int, layer: int) -> ReadyLayer:
        """A layer, for whoever holds the shard's lock.

        Raises Unavailable without any weights, StepConflict for a version to come, VersionGone for one that was, and
        WrongEpoch for a layer of which nothing is here.
        """
        if self.committed < 0:
            raise Unavailable(f"shard {self._shard} has no weights yet")
        if version > self.committed:
            raise StepConflict(f"shard {self._shard} holds version {self.committed}, the caller wants {version}")
        if version not in self._versions:
            raise VersionGone(f"shard {self._shard} keeps versions {self._numbers()}, the caller wants {version}")
        found = self._versions[version][1].get(layer)
        if found is None:
            raise WrongEpoch(f"shard {self._shard} holds nothing of layer {layer}")
        return found

    def missing(self, version: int, layer: int, epoch: int, expert: int) -> TrinityError:
        """The error for a caller that wants an expert which is not here at that version: where it came later, its older weights
        are kept nowhere that the table leads to, and no other table would help."""
        with self._readers:
            present = self._versions[self.committed][1].get(layer) if self.committed in self._versions else None
        if version < self.committed and present is not None and expert in present.experts:
            return VersionGone(
                f"shard {self._shard} has expert ({layer}, {expert}), but nothing of its version {version}"
            )
        return WrongEpoch(f"shard {self._shard} does not hold expert ({layer}, {expert}) of placement epoch {epoch}")

    def layers(self) -> Mapping[int, ReadyLayer]:
        """The committed version by layer; empty without one."""
        return self._versions[self.committed][1] if self.committed in self._versions else {}

    def _numbers(self) -> list[int]:
        return sorted(number for number in self._versions if number <= self.committed)
