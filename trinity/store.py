"""Versions of named tensors that outlive their process: the last commits, and the one that is being made.

    HEAD            the number of the committed version, replaced by rename
    v-000042.json   a version: its notes, and where each of its tensors lies
    t-000017        the memory of one tensor, mapped

A version is written beside the one before it, never over it, and counts when HEAD names it: a kill at any moment leaves the
last commit or the new one. Memory of versions that nobody needs is used again, so a step writes no more than it would in
place. Decisions: a folder in shared memory outlives its process, not its host; without a folder the same class keeps
versions in the process's own memory. Tensors of a GPU are copied to the folder when their version is put. The one writer is
the process that made the store, until it is dead; others copy a committed version (`read`, Reader).
"""

import fcntl
import json
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.errors import ConfigError, StepConflict, VersionGone
from trinity.experts.backend import as_stored
from trinity.memory import on_huge_pages

HEAD, LOCK = "HEAD", "LOCK"
READ_AGAIN = 8  # times, while versions come and go


@dataclass(frozen=True)
class Version:
    """Tensors by name, and notes of plain JSON values. Nobody writes to the tensors of a version that has been put."""

    number: int
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Block:
    """Memory for one tensor, flat. `mirror` is what the folder has of it: on a CPU the same, for a GPU a copy."""

    file: str
    memory: Tensor
    mirror: Tensor | None


class Store:
    """Owns the memory of its versions. Not thread-safe: the owner's lock guards it.

    A folder that holds versions already is taken up as it is, as soon as the process that wrote them is dead. Raises
    ConfigError where a tensor finds no room: asking again would not help.
    """

    def __init__(self, folder: Path | None = None, device: str = "cpu"):
        self.folder, self.device = folder, torch.device(device)
        self.versions: dict[int, Version] = {}
        self.committed = -1
        self._held = Counter[int]()
        self._blocks: dict[int, _Block] = {}  # by address
        self._free: list[_Block] = []
        self._taken: set[int] = set()  # addresses: given out, not yet part of a version
        self._count = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (folder / LOCK).open("a")
            fcntl.lockf(self._lock, fcntl.LOCK_EX)
            self._take_up(folder)

    # -- reading

    @property
    def current(self) -> Version:
        return self.get(self.committed)

    @property
    def staged(self) -> Version | None:
        return self.versions.get(self.committed + 1)

    def get(self, number: int) -> Version:
        """Raises VersionGone."""
        try:
            return self.versions[number]
        except KeyError:
            raise VersionGone(f"version {number} is not kept; there are {self.numbers}") from None

    @property
    def numbers(self) -> list[int]:
        """Committed versions that are there, the oldest first."""
        return sorted(number for number in self.versions if number <= self.committed)

    @property
    def num_bytes(self) -> int:
        """Of all versions and of what is free to be written again."""
        return sum(block.memory.nbytes for block in self._blocks.values())

    def extra_bytes(self, numbers: Collection[int]) -> int:
        """Of what these versions use and the committed one does not."""
        own = _addresses(self.versions[self.committed]) if self.committed in self.versions else set()
        used = set[int]().union(*(_addresses(self.versions[n]) for n in numbers if n in self.versions))
        return sum(self._blocks[address].memory.nbytes for address in used - own)

    # -- writing

    def empty_like(self, tensor: Tensor, num: int | None = None) -> Tensor:
        """Memory for a tensor of a version to come, laid out like that one; `num`: another first dimension. Its values are
        anything. `put` makes it part of a version, `give_back` returns all that is not."""
        stored = as_stored(tensor)
        shape = stored.shape if num is None else torch.Size((num, *stored.shape[1:]))
        if not shape.numel():
            made = torch.empty(shape, dtype=tensor.dtype, device=self.device)
        else:
            made = self._block(shape.numel(), tensor.dtype).memory.view(shape)
            self._taken.add(made.data_ptr())
        return made if stored is tensor else made.mT

    def put(self, version: Version) -> None:
        """A version, complete from here on: the next one, to be committed, or other contents of one that is there."""
        if version.number > self.committed + 1 and self.committed >= 0:
            raise StepConflict(f"version {version.number} does not follow {self.committed}")
        if self.folder is not None:
            entries = {name: self._entry(tensor) for name, tensor in version.tensors.items()}
            _replace(self.folder / _file_of(version.number), {"notes": dict(version.notes), "tensors": entries})
        self.versions[version.number] = version
        self._taken -= _addresses(version)
        self._collect()

    def commit(self, number: int) -> None:
        """Make a version that is there the newest. Harmless when it is already. Raises VersionGone."""
        self.get(number)
        if number != self.committed:
            self._set_head(number)

    def give_back(self) -> None:
        """The version that was to come will not: its memory is free, and so is a staged one's."""
        self._taken.clear()
        self._drop([number for number in self.versions if number > self.committed])

    def retire(self, keep: Collection[int] = (), needed: Callable[[str], bool] | None = None) -> None:
        """The committed version, those that are held and those to `keep` stay, the last with the `needed` tensors only; the
        memory of all others may be written again. Nobody may be reading it."""
        self._drop(self.unwanted(keep))
        if needed is None:
            return
        for number in set(keep) & self.versions.keys() - {self.committed} - self._held.keys():
            version = self.versions[number]
            tensors = {name: tensor for name, tensor in version.tensors.items() if needed(name)}
            if len(tensors) < len(version.tensors):
                self.put(replace(version, tensors=tensors))

    def unwanted(self, keep: Collection[int] = ()) -> list[int]:
        """The versions that `retire` would drop."""
        wanted = {self.committed, *keep, *(n for n, times in self._held.items() if times > 0)}
        return [number for number in self.versions if number not in wanted]

    def roll_back(self, number: int) -> None:
        """An older version that is still there is the newest again; later ones are gone. Raises VersionGone."""
        self.get(number)
        self._set_head(number)
        self._drop([later for later in self.versions if later > number])

    def clear(self) -> None:
        """No version any more."""
        if self.folder is not None:
            (self.folder / HEAD).unlink(missing_ok=True)
        self.committed = -1
        self._held.clear()
        self._taken.clear()
        self._drop(list(self.versions))

    def hold(self, number: int) -> None:
        """Keep all of a version, for this process, until it has been released as often. Raises VersionGone."""
        self.get(number)
        self._held[number] += 1

    def release(self, number: int) -> None:
        self._held[number] -= 1
        self._held = +self._held

    def trim(self) -> None:
        """Give free memory back to the system: tensors have other sizes now."""
        for block in self._free:
            del self._blocks[block.memory.data_ptr()]
            if self.folder is not None:
                (self.folder / block.file).unlink(missing_ok=True)
        self._free = []

    # -- inside

    def _block(self, numel: int, dtype: torch.dtype) -> _Block:
        for at, block in enumerate(self._free):
            if block.memory.numel() == numel and block.memory.dtype == dtype:
                return self._free.pop(at)
        file, self._count = f"t-{self._count:06d}", self._count + 1
        mirror = None if self.folder is None else _made(self.folder / file, numel, dtype)
        if mirror is not None and self.device.type == "cpu":
            memory = mirror
        else:
            memory = on_huge_pages(torch.empty(numel, dtype=dtype, device=self.device))
        self._blocks[memory.data_ptr()] = block = _Block(file, memory, mirror)
        return block

    def _entry(self, tensor: Tensor) -> dict[str, Any]:
        """What is written of a tensor; a GPU's is copied to the folder first."""
        stored = as_stored(tensor)
        entry = {"shape": list(stored.shape), "dtype": str(tensor.dtype)[6:], "is_transposed": stored is not tensor}
        if not tensor.numel():
            return {"file": None, **entry}
        block = self._blocks[tensor.data_ptr()]
        if block.mirror is not None and block.mirror is not block.memory:
            block.mirror.copy_(block.memory)
        return {"file": block.file, **entry}

    def _set_head(self, number: int) -> None:
        if self.folder is not None:
            _replace(self.folder / HEAD, {"committed": number})
        self.committed = number

    def _drop(self, numbers: Collection[int]) -> None:
        for number in numbers:
            del self.versions[number]
            if self.folder is not None:
                (self.folder / _file_of(number)).unlink()  # before its memory is written to
        self._collect()

    def _collect(self) -> None:
        used = self._taken.union(*(_addresses(version) for version in self.versions.values()))
        self._free = [block for address, block in self._blocks.items() if address not in used]

    def _take_up(self, folder: Path) -> None:
        head = folder / HEAD
        found = sorted(folder.glob("v-*.json")) if head.is_file() else []
        for path in found:
            number, tree = int(path.stem[2:]), json.loads(path.read_text())
            tensors = {name: self._known(folder, entry) for name, entry in tree["tensors"].items()}
            self.versions[number] = Version(number, tensors, tree["notes"])
        if head.is_file():
            self.committed = json.loads(head.read_text())["committed"]
        named = {block.file for block in self._blocks.values()} | {path.name for path in found} | {HEAD, LOCK}
        for path in folder.iterdir():
            if path.name not in named:
                path.unlink()
        self._count = 1 + max((int(name[2:]) for name in named if name.startswith("t-")), default=-1)

    def _known(self, folder: Path, entry: Mapping[str, Any]) -> Tensor:
        """A tensor of a version that was found; versions share what did not change."""
        block = next((each for each in self._blocks.values() if each.file == entry["file"]), None)
        if block is None and entry["file"] is not None:
            mirror = _mapped(folder / entry["file"], _numel(entry), _dtype(entry))
            memory = mirror if self.device.type == "cpu" else mirror.to(self.device)
            self._blocks[memory.data_ptr()] = block = _Block(entry["file"], memory, mirror)
        return _shaped(None if block is None else block.memory, entry)


class Reader:
    """Another process's store, read where it lies; keeps its memory mapped from one version to the next. For any threads."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._mapped: dict[str, tuple[tuple[int, int], Tensor]] = {}  # file -> which one it was, its memory
        self._guard = threading.Lock()

    @contextmanager
    def lent(self, number: int | None, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Version]:
        """A version (None: the committed one) with the `wanted` tensors, which are the store's own memory, for the block.

        Raises VersionGone, also at the block's end: what was made of it is void then.
        """
        what = "HEAD" if number is None else number
        try:
            with self._guard:
                found = json.loads((self.folder / HEAD).read_text())["committed"] if number is None else number
                path = self.folder / _file_of(found)
                before, tree = _identity(path), json.loads(path.read_text())
                yield Version(found, self._tensors(tree["tensors"], wanted), tree["notes"])
                if _identity(path) == before:  # it is there still: nobody has written to its memory
                    return
        except FileNotFoundError:
            pass
        raise VersionGone(f"version {what} is not in {self.folder.name} any more")

    def _tensors(self, entries: Mapping[str, Mapping[str, Any]], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        there = {entry.name for entry in os.scandir(self.folder)}
        self._mapped = {file: each for file, each in self._mapped.items() if file in there}
        return {name: self._tensor(entry) for name, entry in entries.items() if wanted(name)}

    def _tensor(self, entry: Mapping[str, Any]) -> Tensor:
        if entry["file"] is None:
            return _shaped(None, entry)
        path = self.folder / entry["file"]
        status, numel, dtype = path.stat(), _numel(entry), _dtype(entry)
        which = status.st_ino, status.st_size
        before, memory = self._mapped.get(entry["file"], (None, None))
        if before != which or memory is None or memory.dtype != dtype:
            memory = _mapped(path, numel, dtype)
            self._mapped[entry["file"]] = which, memory
        return _shaped(memory, entry)


def read(folder: Path, number: int | None = None, wanted: Callable[[str], bool] = lambda name: True) -> Version:
    """A copy of a version (None: the committed one) of another process's store, with the `wanted` tensors. Raises
    VersionGone."""
    for _ in range(READ_AGAIN - 1):
        with suppress(VersionGone):
            return _copied(folder, number, wanted)
    return _copied(folder, number, wanted)


def _copied(folder: Path, number: int | None, wanted: Callable[[str], bool]) -> Version:
    with Reader(folder).lent(number, wanted) as found:
        copied = replace(found, tensors={name: tensor.clone() for name, tensor in found.tensors.items()})
    return copied


def _addresses(version: Version) -> set[int]:
    return {tensor.data_ptr() for tensor in version.tensors.values() if tensor.numel()}


def _file_of(number: int) -> str:
    return f"v-{number:06d}.json"


def _identity(path: Path) -> tuple[int, int]:
    """Of a file; with the time, because on a disk the next file may get the number of the last one."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _numel(entry: Mapping[str, Any]) -> int:
    return torch.Size(entry["shape"]).numel()


def _dtype(entry: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, entry["dtype"])


def _shaped(memory: Tensor | None, entry: Mapping[str, Any]) -> Tensor:
    stored = torch.empty(entry["shape"], dtype=_dtype(entry)) if memory is None else memory.view(entry["shape"])
    return stored.mT if entry["is_transposed"] else stored


def _made(path: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """New shared memory, all of it there: a page that finds no room later would kill the process without a word."""
    size = numel * dtype.itemsize
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        path.unlink()
        raise _cannot_keep(path.parent, size, error) from None
    finally:
        os.close(handle)
    return _mapped(path, numel, dtype)


def _cannot_keep(folder: Path, size: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot keep {size:,} bytes in {folder}: {error.strerror}. Give shared memory more room (containers: --shm-size), "
        "use more shards, or set placement.memory_dir to another folder or placement.durable false"
    )


def _mapped(path: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """Flat. The mapping ends with the tensor; unlike Python's it keeps no descriptor, of which a process has few."""
    with path.open("r+b") as file:  # torch would make a file that is not there
        return torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=numel, dtype=dtype)


def _replace(path: Path, tree: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{secrets.token_hex(4)}")
    text = json.dumps(tree, separators=(",", ":"))
    try:
        partial.write_text(text)
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _cannot_keep(path.parent, len(text), error) from None
