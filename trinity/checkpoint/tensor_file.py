"""A safetensors file whose tensors are read straight into memory that is there already: once, without mapped pages or copies.

Decisions: the library checks the header (offsets cover the file without overlap and fit the shapes), we read by it. A target of
another type or device, or one that is not dense, gets a copy of the part that is read. Many parts are read in the order of
the file by a few threads: a disk answers several questions at once, and copies out of the page cache use several cores.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from trinity.config import num_cpus

MAX_HEADER_BYTES = 32 << 20
LFS_POINTER = b"version "  # the first of its words, where a header's length would be
MAX_READERS = 4
MOST_BYTES = 1 << 30  # of one read: the kernel gives no more than 2 GiB
TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Part(NamedTuple):
    """A dense run of numbers of a stored tensor, and the memory that they belong in. `start`: numbers before it; `name`: of the
    matrix, where the stored tensor is a stack of several."""

    key: str
    target: Tensor
    start: int = 0
    name: str = ""

    @property
    def module(self) -> str:
        """The matrix's name in a checkpoint without `.weight`."""
        return self.name or self.key.removesuffix(".weight")


class Entry(NamedTuple):
    """Facts of the header about a tensor. `offset`: of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorFile:
    """An open file. Raises ValueError, OSError or the library's error for one that is damaged; owns its descriptor."""

    def __init__(self, path: Path):
        self._file = path.open("rb", buffering=0)
        head = self._file.read(8)
        if head == LFS_POINTER:
            raise ValueError("it stands for a file that Git LFS keeps elsewhere; `git lfs pull` fetches it")
        size = int.from_bytes(head, "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {size:,} bytes; {MAX_HEADER_BYTES:,} is the most there may be")
        header = json.loads(self._file.read(size), object_pairs_hook=unique)
        with safe_open(str(path), framework="pt"):  # it raises for what does not fit together
            self._entries = {key: _entry(found, 8 + size) for key, found in header.items() if key != "__metadata__"}

    @property
    def name(self) -> str:
        return str(self._file.name)

    @property
    def keys(self) -> Iterable[str]:
        return self._entries

    def entry(self, key: str) -> Entry:
        if key not in self._entries:
            raise ValueError("it is not in this file, though the index says so")
        return self._entries[key]

    def stamp(self) -> tuple[int, int]:
        """Return when it was written to the last time, and its size: others where somebody writes to it."""
        found = os.fstat(self._file.fileno())
        return found.st_mtime_ns, found.st_size

    def digest(self) -> "hashlib._Hash":
        """SHA-256 of all that is in it. For one thread."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256")

    def leave_memory(self) -> None:
        """Have the kernel forget what it has read of it."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def order(self, part: Part) -> int:
        """The place of a part in the file, in bytes."""
        entry = self.entry(part.key)
        return entry.offset + part.start * TYPES[entry.dtype].itemsize

    def read_bytes(self, key: str, target: Tensor, start: int = 0) -> None:
        """Fill dense memory with what is stored of a tensor from that byte on, whatever its type. How much is there is the
        caller's to check."""
        self._fill(target.view(-1).view(torch.uint8), self.entry(key).offset + start)

    @torch.no_grad()
    def read(self, part: Part) -> None:
        """Fill the target. Its shape is the caller's to check."""
        target, dtype = part.target, TYPES[self.entry(part.key).dtype]
        is_direct = target.is_cpu and target.dtype == dtype and target.is_contiguous()
        memory = target.detach() if is_direct else torch.empty(target.shape, dtype=dtype)
        self._fill(memory.view(-1).view(torch.uint8), self.order(part))
        if not is_direct:
            target.copy_(memory)

    def _fill(self, bytes_n: Tensor, offset: int) -> None:
        view, done = bytes_n.numpy().data, 0
        while done < len(view):
            num = os.preadv(self._file.fileno(), [view[done : done + MOST_BYTES]], offset + done)
            if num == 0:
                raise ValueError(f"{self.name} ends after {offset + done:,} bytes: was it cut while it was read?")
            done += num


class Reading(Protocol):
    """Memory that is to be filled from a file. `order`: where it lies, by file and byte."""

    @property
    def part(self) -> Part: ...

    @property
    def order(self) -> tuple[str, int]: ...

    def read(self) -> None: ...


class StoredPart(NamedTuple):
    """A part and the file that has it as it is wanted."""

    file: TensorFile
    part: Part

    @property
    def order(self) -> tuple[str, int]:
        return self.file.name, self.file.order(self.part)

    def read(self) -> None:
        self.file.read(self.part)


def read_all(readings: Iterable[Reading], told: Callable[[int], object]) -> None:
    """Fill all targets, which may not overlap; `told` hears of each part's bytes when they are there, on any thread."""

    def read(each: Reading) -> None:
        each.read()
        told(each.part.target.nbytes)

    ordered = sorted(readings, key=lambda each: each.order)
    with ThreadPoolExecutor(min(MAX_READERS, num_cpus()), thread_name_prefix="trinity-read") as readers:
        for _ in readers.map(read, ordered):
            pass


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, no key of which is there twice; for `object_pairs_hook`. Raises ValueError."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice = next(key for key, num in Counter(key for key, _ in pairs).items() if num > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return tree


def _entry(found: dict[str, Any], begin: int) -> Entry:
    return Entry(found["dtype"], tuple(found["shape"]), begin + found["data_offsets"][0])
