"""Passes that came to nothing for want of good weights: which requests have theirs repeated, and which end.

Decision: a request is left as it was and scheduled again, with another version or with the same one, so many times for each
token; nothing of it is seen by its caller.
"""

import time

from trinity.engine.request import Chunk
from trinity.engine.versions import Versions
from trinity.errors import TrinityError, VersionGone

MAX_REPEATS = 20  # of a request's pass, for want of a version
PAUSE_S = 0.05  # before such a pass, while there is no other version to repeat it with


class Repeats:
    """Counts them. Owned by one engine."""

    def __init__(self, versions: Versions):
        self._versions, self.num = versions, 0

    def after_loss(self, chunks: list[Chunk], error: TrinityError) -> list[Chunk]:
        """The pass's version was not there, or not on every shard, which may change; -> chunks whose requests end with it."""
        if not self._versions.lost():
            time.sleep(PAUSE_S)
        changes = not isinstance(error, VersionGone)
        return [chunk for chunk in chunks if not self._again(chunk, changes)]

    def after_damage(self, version: int, chunks: list[Chunk]) -> list[Chunk]:
        """The pass's logits were not finite; -> chunks whose results count all the same: all, if there is no other version."""
        if not self._versions.quarantine(version):
            return chunks
        return [chunk for chunk in chunks if not self._again(chunk)]

    def _again(self, chunk: Chunk, changes: bool = False) -> bool:
        """Shall its pass be repeated: with another version, or with the same one if what went wrong `changes`?"""
        sequence = chunk.sequence
        if sequence.num_repeats == MAX_REPEATS or not (self._versions.leave(sequence) or changes):
            return False
        sequence.num_repeats += 1
        self.num += 1
        if not chunk.is_single:  # it may have written over what its first tokens look back at
            sequence.num_computed = 0
        return True
