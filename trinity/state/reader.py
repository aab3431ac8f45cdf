"""Reading versions that another process makes: where they lie, or as a copy."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trinity.errors import VersionGone
from trinity.state.files import dtype_of, identity, mapped, numel_of, shaped, version_file
from trinity.state.versioned_store import HEAD, Version

READ_AGAIN = 8  # times, while versions come and go


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
                path = self.folder / version_file(found)
                before, tree = identity(path), json.loads(path.read_text())
                yield Version(found, self._tensors(tree["tensors"], wanted), tree["notes"])
                if identity(path) == before:  # it is there still: nobody has written to its memory
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
            return shaped(None, entry)
        path = self.folder / entry["file"]
        status, numel, dtype = path.stat(), numel_of(entry), dtype_of(entry)
        which = status.st_ino, status.st_size
        before, memory = self._mapped.get(entry["file"], (None, None))
        if before != which or memory is None or memory.dtype != dtype:
            memory = mapped(path, numel, dtype)
            self._mapped[entry["file"]] = which, memory
        return shaped(memory, entry)


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
