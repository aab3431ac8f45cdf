"""Versions of named tensors that outlive their process: the last commits, and the one that is being made.

    HEAD            the number of the committed version, replaced by rename
    v-000042.json   a version: its notes, and where each of its tensors lies
    t-000017        the memory of one tensor, mapped (memory.py)

A version is written beside the one before it, never over it, and counts when HEAD names it: a kill at any moment leaves the
last commit or the new one. Memory of versions that nobody needs is used again, so a step writes no more than it would in
place. Decisions: a folder in shared memory outlives its process, not its host; without a folder the same class keeps
versions in the process's own memory. Tensors of a GPU are copied to the folder when their version is put. The one writer is
the process that made the store, until it is dead; others copy a committed version (`read`, Reader).
"""

import fcntl
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.errors import StepConflict, VersionGone
from trinity.state.files import replace_json, shaped, version_file
from trinity.state.memory import Memory
from trinity.state.strides import as_stored

HEAD, LOCK = "HEAD", "LOCK"


@dataclass(frozen=True)
class Version:
    """Tensors by name, and notes of plain JSON values. Nobody writes to the tensors of a version that has been put."""

    number: int
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]


class Store:
    """Owns the memory of its versions. Not thread-safe: the owner's lock guards it.

    A folder that holds versions already is taken up as it is, as soon as the process that wrote them is dead. Raises
    ConfigError where a tensor finds no room: asking again would not help.
    """

    def __init__(self, folder: Path | None = None, device: str = "cpu"):
        self.folder, self.device = folder, torch.device(device)
        self.memory = Memory(folder, self.device)
        self.versions: dict[int, Version] = {}
        self.committed = -1
        self._held = Counter[int]()
        self._taken: set[int] = set()  # addresses: given out, not yet part of a version
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (folder / LOCK).open("a")
            fcntl.lockf(self._lock, fcntl.LOCK_EX)
            self._reopen(folder)

    # -- reading

    @property
    def current(self) -> Version:
        """The committed version. Raises VersionGone without one."""
        return self.get(self.committed)

    @property
    def staged(self) -> Version | None:
        """The version after the committed one, complete and not committed."""
        return self.versions.get(self.committed + 1)

    def get(self, number: int) -> Version:
        """A version that is there. Raises VersionGone."""
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
        """Memory of all versions and what is free to be written again."""
        return self.memory.num_bytes

    def extra_bytes(self, numbers: Collection[int]) -> int:
        """Memory that these versions use and the committed one does not."""
        own = _addresses(self.versions[self.committed]) if self.committed in self.versions else set()
        used = set[int]().union(*(_addresses(self.versions[n]) for n in numbers if n in self.versions))
        return self.memory.num_bytes_at(used - own)

    # -- writing

    def empty_like(self, tensor: Tensor, num: int | None = None) -> Tensor:
        """Memory for a tensor of a version to come, laid out like that one; `num`: another first dimension. Its values are
        anything. `put` makes it part of a version, `discard_staged` returns all that is not."""
        stored = as_stored(tensor)
        shape = stored.shape if num is None else torch.Size((num, *stored.shape[1:]))
        if not shape.numel():
            made = torch.empty(shape, dtype=tensor.dtype, device=self.device)
        else:
            made = self.memory.take(shape.numel(), tensor.dtype).view(shape)
            self._taken.add(made.data_ptr())
        return made if stored is tensor else made.mT

    def put(self, version: Version) -> None:
        """Take in a version, complete from here on: the next one, to be committed, or other contents of one that is there."""
        if version.number > self.committed + 1 and self.committed >= 0:
            raise StepConflict(f"version {version.number} does not follow {self.committed}")
        if self.folder is not None:
            others = [each for number, each in self.versions.items() if number != version.number]
            known = set[int]().union(*map(_addresses, others))  # what they share has been written
            entries = {name: self._entry(tensor, known) for name, tensor in version.tensors.items()}
            replace_json(self.folder / version_file(version.number), {"notes": dict(version.notes), "tensors": entries})
        self.versions[version.number] = version
        self._taken -= _addresses(version)
        self._collect()

    def commit(self, number: int) -> None:
        """Make a version that is there the newest. Harmless when it is already. Raises VersionGone."""
        self.get(number)
        if number != self.committed:
            self._set_head(number)

    def discard_staged(self) -> None:
        """Let go of the version to come, whether it is staged or being made: its memory is free."""
        self._taken.clear()
        self._drop([number for number in self.versions if number > self.committed])

    def retire(self, keep: Collection[int] = (), needed: Callable[[str], bool] | None = None) -> None:
        """Drop all versions but the committed one, those that are held, and those to `keep`, of which the `needed` tensors
        stay. The memory of all else may be written again: nobody may be reading it."""
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
        """Make an older version the newest again; later ones are gone. Raises VersionGone."""
        self.get(number)
        self._set_head(number)
        self._drop([later for later in self.versions if later > number])

    def clear(self) -> None:
        """Drop all versions, those that are held too."""
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
        """Take back one `hold`."""
        self._held[number] -= 1
        self._held = +self._held

    def trim(self) -> None:
        """Give free memory back to the system: tensors have other sizes now."""
        self.memory.trim()

    # -- inside

    def _entry(self, tensor: Tensor, known: Collection[int]) -> dict[str, Any]:
        """The version's file's entry for a tensor, whose values are in the folder from then on."""
        stored = as_stored(tensor)
        entry = {"shape": list(stored.shape), "dtype": str(tensor.dtype)[6:], "is_transposed": stored is not tensor}
        address = tensor.data_ptr()
        return {"file": self.memory.written(address, address in known) if tensor.numel() else None, **entry}

    def _set_head(self, number: int) -> None:
        if self.folder is not None:
            replace_json(self.folder / HEAD, {"committed": number})
        self.committed = number

    def _drop(self, numbers: Collection[int]) -> None:
        for number in numbers:
            del self.versions[number]
            if self.folder is not None:
                (self.folder / version_file(number)).unlink()  # before its memory is written to
        self._collect()

    def _collect(self) -> None:
        self.memory.keep(self._taken.union(*(_addresses(version) for version in self.versions.values())))

    def _reopen(self, folder: Path) -> None:
        """Go on from what a process before left in the folder; what it was about to make is removed."""
        head = folder / HEAD
        found = sorted(folder.glob("v-*.json")) if head.is_file() else []
        for path in found:
            number, tree = int(path.stem[2:]), json.loads(path.read_text())
            parts = ((name, self.memory.found(entry), entry) for name, entry in tree["tensors"].items())
            tensors = {name: shaped(memory, entry, self.device) for name, memory, entry in parts}
            self.versions[number] = Version(number, tensors, tree["notes"])
        if head.is_file():
            self.committed = json.loads(head.read_text())["committed"]
        named = self.memory.files | {path.name for path in found} | {HEAD, LOCK}
        for path in folder.iterdir():
            if path.name not in named:
                path.unlink()


def _addresses(version: Version) -> set[int]:
    """Places of its tensors; those without elements lie nowhere."""
    return {tensor.data_ptr() for tensor in version.tensors.values() if tensor.numel()}
