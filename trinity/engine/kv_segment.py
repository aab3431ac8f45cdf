"""Segment of a node's shared memory in which blocks of the KV cache outlive the engine that computed them. Host code, no torch.

Legend: N slots of a kind of layer.
One file for any number of processes, each with a KVSegment of its own. A slot holds the bytes of a block; what they are
stands in columns at the head of the file, from which each process makes its own index.
Decisions. One writer at a time, by a lock of the kernel's that ends with its holder, and nobody waits for it: who does not get
it tries again later. A slot's number is odd while it is written, so whoever has the lock and finds one knows that its writer
died there. Readers take no lock: the number must be the same before and after, and a checksum over all must fit, so that
neither a torn write nor damaged memory is ever taken for a block. Bytes go by pread and pwrite: where memory has run out, a
write then fails, where a mapped store would end the process. The least stamp goes first; a block without those before it is of
no use, so of one text the beginning gets the highest.
"""

import fcntl
import os
import stat
import zlib
from bisect import insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trinity.errors import ConfigError

FORMAT = b"TRINITY-KV-1"
KEY_BYTES = 32
COLUMNS = ("number", "stamp", "check", "line", "oldest", "newest")  # 8 bytes each, and the key
SLOT_BYTES = 8 * len(COLUMNS) + KEY_BYTES
SHORTLIST = 512  # slots that are sought at once to be written next


class Known(NamedTuple):
    """A block's key, and whose it is: `line` names the weights whose versions `oldest` and `newest` are."""

    key: bytes
    line: int
    oldest: int
    newest: int


class Slots:
    """The slots of one kind, in one process. Its index is as old as the last `refresh`."""

    def __init__(self, fd: int, head: np.ndarray, first_byte: int, block_bytes: int):
        num = len(head) // SLOT_BYTES
        self._fd, self._first_byte, self.block_bytes, self.num = fd, first_byte, block_bytes, num
        words = head[: 8 * len(COLUMNS) * num].view(np.uint64).reshape(len(COLUMNS), num)
        self._number_N, self._stamp_N, self._check_N, self._line_N = words[:4]
        self._oldest_N, self._newest_N = words[4:].view(np.int64)
        self._key_N = head[8 * len(COLUMNS) * num :].reshape(num, KEY_BYTES)
        self._seen_N = np.zeros(num, np.uint64)
        self._slots: dict[bytes, list[int]] = {}
        self._keys: dict[int, bytes] = {}
        self._damaged = set[int]()
        self._next: list[tuple[int, int]] = []  # (rank, slot), the last is the first to be written
        self.num_evicted = self.num_damaged = 0

    @property
    def num_used(self) -> int:
        return int(np.count_nonzero(self._number_N))

    def refresh(self) -> None:
        """Take in what others have written since."""
        changed = np.flatnonzero(self._number_N != self._seen_N).tolist()
        for slot in changed:
            self._look(slot)
        if changed:
            self._next.clear()

    def _look(self, slot: int) -> None:
        number = self._number_N[slot]
        self._seen_N[slot] = number
        if (key := self._keys.pop(slot, None)) is not None:
            self._slots[key].remove(slot)
            if not self._slots[key]:
                del self._slots[key]
        if number and not number & np.uint64(1):
            key = self._keys[slot] = self._key_N[slot].tobytes()
            self._slots.setdefault(key, []).append(slot)

    def find(self, key: bytes, line: int) -> list[tuple[int, int, int]]:
        """-> (newest, oldest, slot) of what there is of these tokens, by weights of that line."""
        found = [slot for slot in self._slots.get(key, ()) if int(self._line_N[slot]) == line]
        return [(int(self._newest_N[slot]), int(self._oldest_N[slot]), slot) for slot in found]

    def read(self, slot: int, block: np.ndarray) -> Known | None:
        """Read a block; -> what it is, or None where it is no more, or damaged."""
        number = self._number_N[slot]
        if not number or number & np.uint64(1):
            return None
        known, check = self._known(slot), int(self._check_N[slot])
        num_bytes = os.preadv(self._fd, [block.data], self._at(slot))
        if self._number_N[slot] != number:
            return None
        if num_bytes == self.block_bytes and check == _check(known, block):
            return known
        self._damaged.add(slot)
        self.num_damaged += 1
        return None

    def touch(self, slots: Sequence[int], stamps: Sequence[int]) -> None:
        """Give these higher stamps: they are in use."""
        at = np.asarray(slots, np.int64)
        self._stamp_N[at] = np.maximum(self._stamp_N[at], np.asarray(stamps, np.uint64))

    # -- for the holder of the lock

    def write(self, known: Known, stamp: int, block: np.ndarray) -> bool:
        """Write a block where room is, or where the least stamp is; False where all others have higher ones, or the machine's
        memory is full."""
        rank, slot = self._take()
        if rank > stamp:
            self._next.append((rank, slot))
            return False
        number = self._number_N[slot] | np.uint64(1)
        self.num_evicted += bool(self._number_N[slot]) and number != self._number_N[slot]
        self._number_N[slot] = number
        self._stamp_N[slot] = 0
        self._key_N[slot] = np.frombuffer(known.key, np.uint8)
        self._line_N[slot], self._oldest_N[slot], self._newest_N[slot] = known[1:]
        try:
            written = os.pwrite(self._fd, block.data, self._at(slot))
        except OSError:  # no memory left
            written = 0
        is_whole = written == self.block_bytes
        self._check_N[slot], self._stamp_N[slot] = _check(known, block), stamp if is_whole else 0
        self._number_N[slot] = number + np.uint64(1) if is_whole else 0
        self._look(slot)
        if self._next and stamp < self._next[0][0]:
            insort(self._next, (stamp, slot), key=lambda pair: -pair[0])
        return is_whole

    def drop(self, slots: Sequence[int]) -> None:
        """Let what is in them be found no more."""
        for slot in slots:
            self._stamp_N[slot] = self._number_N[slot] = 0
            self._look(slot)
        self._next.clear()

    def drop_damaged(self) -> None:
        self.drop([slot for slot in self._damaged if not self._number_N[slot] & np.uint64(1)])
        self._damaged.clear()

    def all_of(self, line: int) -> list[tuple[int, int, int]]:
        """-> (newest, oldest, slot) of all that there is of that line, and of those who died writing."""
        at = np.flatnonzero((self._number_N != 0) & (self._line_N == np.uint64(line)))
        return list(zip(self._newest_N[at].tolist(), self._oldest_N[at].tolist(), at.tolist(), strict=True))

    def _take(self) -> tuple[int, int]:
        while True:
            if not self._next:
                self._next = self._shortlist()
            rank, slot = self._next.pop()
            if rank == self._rank(self._number_N[slot : slot + 1], self._stamp_N[slot : slot + 1])[0]:
                return rank, slot

    def _shortlist(self) -> list[tuple[int, int]]:
        rank_N = self._rank(self._number_N, self._stamp_N)
        at = np.argpartition(rank_N, min(SHORTLIST, self.num) - 1)[:SHORTLIST]
        return sorted(zip(rank_N[at].tolist(), at.tolist(), strict=True), reverse=True)

    def _rank(self, number_N: np.ndarray, stamp_N: np.ndarray) -> np.ndarray:
        return np.where((number_N == 0) | (number_N & np.uint64(1) != 0), np.uint64(0), stamp_N)

    def _known(self, slot: int) -> Known:
        versions = int(self._oldest_N[slot]), int(self._newest_N[slot])
        return Known(self._key_N[slot].tobytes(), int(self._line_N[slot]), *versions)

    def _at(self, slot: int) -> int:
        return self._first_byte + slot * self.block_bytes


def _check(known: Known, block: np.ndarray) -> int:
    """Checksum over all of a slot; never 0, as in memory that nobody has written."""
    about = repr(known).encode()
    return zlib.crc32(block.data, zlib.crc32(about)) | 1 << 32


class KVSegment:
    """An open segment: `kinds` are the slots of each kind of layer. Not for two threads at once; each may have its own."""

    def __init__(self, folder: Path, block_bytes: Sequence[int], num_bytes: int):
        """Open it, or make it where there is none: as many blocks of each kind as go into `num_bytes`. Raises ConfigError where
        these are too few, where memory is short, or where something else is in its place."""
        num = num_slots(block_bytes, num_bytes)
        shape = f"{FORMAT.decode()} {num} {tuple(block_bytes)} {PAGESIZE}"
        self.name = sha256(shape.encode()).hexdigest()[:16]  # another shape is another file
        self._path, columns = folder / f"kv-{self.name}", _whole_pages(SLOT_BYTES * num)
        self._head_bytes = PAGESIZE + columns * len(block_bytes)
        self._title, self._num_bytes = sha256(shape.encode()).digest(), self._head_bytes + num * sum(block_bytes)
        self._fd = self._opened()
        try:
            self._settle()
            memory = np.frombuffer(mmap(self._fd, self._head_bytes), np.uint8)
        except BaseException:
            os.close(self._fd)
            raise
        self.kinds, first = list[Slots](), self._head_bytes
        for at, size in enumerate(block_bytes):
            start = PAGESIZE + at * columns
            self.kinds.append(Slots(self._fd, memory[start : start + SLOT_BYTES * num], first, size))
            first += num * size

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks that are there."""
        return sum(slots.num_used * slots.block_bytes for slots in self.kinds)

    def refresh(self) -> None:
        for slots in self.kinds:
            slots.refresh()

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Be the writer inside the block, if nobody is: -> whether it is so. Never waits."""
        is_mine = self._lock()
        try:
            if is_mine:
                for slots in self.kinds:
                    slots.refresh()
                    slots.drop_damaged()
            yield is_mine
        finally:
            if is_mine:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Harmless when repeated. What is there stays."""
        if self._fd >= 0:
            self.kinds.clear()
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _opened(self) -> int:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot open {self._path}: {error.strerror}; remove it, or set placement.memory_dir"
            ) from None
        found = os.fstat(fd)
        is_ours = found.st_uid == os.geteuid() and found.st_nlink == 1 and not found.st_mode & 0o077
        if not (stat.S_ISREG(found.st_mode) and is_ours):
            os.close(fd)
            raise ConfigError(f"{self._path} is somebody else's; remove it, or set placement.memory_dir")
        return fd

    def _settle(self) -> None:
        """Make it what it is to be, unless it is: its title is written last."""
        if self._is_whole():
            return
        with self._making():
            if self._is_whole():
                return
            check_room(self._path.parent, self._num_bytes)
            os.ftruncate(self._fd, self._num_bytes)
            os.posix_fallocate(self._fd, 0, self._head_bytes)
            np.frombuffer(mmap(self._fd, self._head_bytes), np.uint8)[:] = 0
            os.pwrite(self._fd, self._title, 0)

    def _is_whole(self) -> bool:
        return os.fstat(self._fd).st_size == self._num_bytes and os.pread(self._fd, len(self._title), 0) == self._title

    @contextmanager
    def _making(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # who makes it does nothing else meanwhile
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)


def num_slots(block_bytes: Sequence[int], num_bytes: int) -> int:
    """Blocks of each kind that go into a segment of `num_bytes`. Raises ConfigError where it is none."""
    each, heads = sum(size + SLOT_BYTES for size in block_bytes), (1 + len(block_bytes)) * PAGESIZE
    if num_bytes < each + heads:
        raise ConfigError(
            f"engine.kv_tier_bytes {num_bytes} holds no block of each kind of layer; raise it to at least {each + heads}"
        )
    return (num_bytes - heads) // each


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise ConfigError where a segment would take more than is free."""
    about = os.statvfs(folder)
    free = about.f_bavail * about.f_frsize
    if free < num_bytes:
        raise ConfigError(
            f"engine.kv_tier_bytes takes {num_bytes} bytes of {folder}, where {free} are free; lower it, or give the machine "
            "more shared memory (a container: --shm-size)"
        )


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGESIZE) * PAGESIZE
