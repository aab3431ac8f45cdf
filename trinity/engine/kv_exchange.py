"""Blocks of a node's KV tier for others than its engines' threads, and what nodes say to one another about them: bytes alone.

Legend: N bytes of a block.
A request names a segment's shape, a line of weights, the versions that will do, and blocks by kind and key; its answer says of
each, in that order, whether it is there, by which versions, and what is in it. Decision: whoever asks checks every length
before it takes a byte for anything, and what it takes in gets a checksum of its own.
"""

import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trinity.engine.kv_segment import KEY_BYTES, Known, KVSegment
from trinity.errors import InvalidRequest

ASKED, WANTED, TOLD = struct.Struct("<16sQqq"), struct.Struct(f"<B{KEY_BYTES}s"), struct.Struct("<?qq")
MOST_WANTED, MOST_TOLD_BYTES = 1 << 14, 256 << 20
PUT_S, LOOK_S = 0.5, 0.002  # for the writer's lock


class Wanted(NamedTuple):
    """A block: the number of its kind, and its key."""

    kind: int
    key: bytes


class Asked(NamedTuple):
    """A question for blocks of one line of weights, by versions from `oldest` to `newest`, of segments of that name."""

    segment: str
    line: int
    oldest: int
    newest: int
    wanted: tuple[Wanted, ...]

    def pack(self) -> bytes:
        head = ASKED.pack(self.segment.encode(), self.line, self.oldest, self.newest)
        return head + b"".join(WANTED.pack(*each) for each in self.wanted)

    @classmethod
    def unpack(cls, data: bytes) -> "Asked":
        """Raises InvalidRequest for what is none."""
        num, rest = divmod(len(data) - ASKED.size, WANTED.size)
        if num < 1 or rest or num > MOST_WANTED:
            raise InvalidRequest(f"{len(data)} bytes are no question for blocks")
        segment, line, oldest, newest = ASKED.unpack_from(data)
        wanted = tuple(Wanted(*each) for each in WANTED.iter_unpack(data[ASKED.size :]))
        return cls(segment.decode("ascii", "replace"), line, oldest, newest, wanted)


MOST_ASKED_BYTES = ASKED.size + MOST_WANTED * WANTED.size


class SharedBlocks:
    """A node's tier, for any thread. Owns a segment of its own."""

    def __init__(self, folder: Path, block_bytes: Sequence[int], num_bytes: int):
        """Raises as KVSegment."""
        self._segment, self._guard = KVSegment(folder, block_bytes, num_bytes), threading.Lock()
        self.name, self.block_bytes = self._segment.name, tuple(block_bytes)

    def close(self) -> None:
        with self._guard:
            self._segment.close()

    def missing(self, asked: Asked) -> tuple[Wanted, ...]:
        """Blocks of it that are not there."""
        with self._guard:
            self._segment.refresh()
            return tuple(each for each in asked.wanted if self._slot(asked, each) is None)

    def told(self, asked: Asked) -> Iterator[bytes | memoryview]:
        """The answer, piece by piece. Raises InvalidRequest for other segments than this, and for too much at once."""
        if asked.segment != self.name or any(each.kind >= len(self.block_bytes) for each in asked.wanted):
            raise InvalidRequest(f"blocks of segment {asked.segment!r} are asked for; this one is {self.name}")
        if self.most_bytes(asked.wanted) > MOST_TOLD_BYTES:
            raise InvalidRequest(f"{len(asked.wanted)} blocks at once are too many; ask for fewer")
        with self._guard:
            self._segment.refresh()
            found = [self._read(asked, each) for each in asked.wanted]
        for each in found:
            yield TOLD.pack(False, 0, 0) if each is None else TOLD.pack(True, each[0].oldest, each[0].newest)
            if each is not None:
                yield each[1].data

    def most_bytes(self, wanted: Sequence[Wanted]) -> int:
        """Bytes of an answer in which all are there."""
        return sum(TOLD.size + self.block_bytes[each.kind] for each in wanted)

    def take(self, asked: Asked, answer: np.ndarray, stamp: int) -> int:
        """Keep what an answer brings; -> how many blocks. Raises InvalidRequest for what is no answer to that."""
        got, at = list[tuple[int, Known, np.ndarray]](), 0
        for kind, key in asked.wanted:
            size = self.block_bytes[kind]
            if len(answer) < at + TOLD.size:
                raise InvalidRequest(f"an answer of {len(answer)} bytes ends too early")
            is_there, oldest, newest = TOLD.unpack_from(answer.data, at)
            at += TOLD.size
            if not is_there:
                continue
            if not asked.oldest <= oldest <= newest <= asked.newest or len(answer) < at + size:
                raise InvalidRequest(
                    f"a block of versions {oldest} to {newest}, or its end, is none that was asked for"
                )
            got.append((kind, Known(key, asked.line, oldest, newest), answer[at : at + size]))
            at += size
        return self._put(got, stamp)

    def _put(self, got: Sequence[tuple[int, Known, np.ndarray]], stamp: int) -> int:
        with self._writing() as is_mine:
            if not is_mine:
                return 0
            kinds = self._segment.kinds
            return sum(kinds[kind].write(known, stamp - place, block) for place, (kind, known, block) in enumerate(got))

    @contextmanager
    def _writing(self) -> Iterator[bool]:
        until_s = time.monotonic() + PUT_S
        while time.monotonic() < until_s:
            with self._guard, self._segment.locked() as is_mine:
                if is_mine:
                    yield True
                    return
            time.sleep(LOOK_S)
        yield False

    def _slot(self, asked: Asked, wanted: Wanted) -> int | None:
        found = self._segment.kinds[wanted.kind].find(wanted.key, asked.line)
        fits = [each for each in found if asked.oldest <= each[1] and each[0] <= asked.newest]
        return max(fits)[2] if fits else None

    def _read(self, asked: Asked, wanted: Wanted) -> tuple[Known, np.ndarray] | None:
        slot, block = self._slot(asked, wanted), np.empty(self.block_bytes[wanted.kind], np.uint8)
        known = None if slot is None else self._segment.kinds[wanted.kind].read(slot, block)
        if known is None or known[:2] != (wanted.key, asked.line):
            return None
        return (known, block) if asked.oldest <= known.oldest and known.newest <= asked.newest else None
