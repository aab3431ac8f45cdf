"""Folders of tokenised data that are made once: in a folder here and, with `data.cache` at an address, there for all hosts.

Decisions. There, a folder is what lies below an address: its files are written first and WHOLE last, which names them with
their sizes and the hashes of their blocks; so it is there whole or not at all, and is never written again. Who makes the same
at the same time writes the same bytes. Here it is copied, but for what is read by pieces (LAZY): of that a file with
holes is made, whose blocks are fetched when they are first read, checked, and noted beside it once they are on disk.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from trinity.data import remote
from trinity.data.kept import made_once
from trinity.errors import DataError, Unavailable
from trinity.utils.trying import tried

WHOLE, ORIGIN, THERE = "whole.json", "origin", ".there"
LAZY = ".bin"  # how names of files end that are read by pieces
BLOCK_BYTES = 1 << 20
AT_ONCE = 16  # questions to a store
Build = Callable[[Path], object]


class Cache(NamedTuple):
    """Folders in `folder`, and with an `address` below that, too."""

    folder: Path
    address: str | None = None

    @classmethod
    def of_shards(cls, folder: Path, setting: str | None) -> "Cache":
        """Shards of a run whose data are in `folder`, with that `data.cache`."""
        is_there = setting is not None and remote.is_address(setting)
        return cls(folder / "shards", setting) if is_there else cls(Path(setting or folder / "shards"))

    @classmethod
    def of_orders(cls, folder: Path, setting: str | None) -> "Cache":
        """Orders of documents, and tokenizers, that such a run makes: a folder here has them for itself."""
        return cls(folder, setting if setting is not None and remote.is_address(setting) else None)

    def made(self, name: str, build: Build, one_at_a_time: bool = True) -> Path:
        """The folder of that name, whole: as it is here, else as it is there, else built. Raises DataError, and Unavailable
        where the store does not answer."""
        place = self.folder / name
        if self.address is None:
            return made_once(place, build, one_at_a_time)
        self.share([name])
        return made_once(place, partial(Shared(self._address(name)).fetched_or_built, build), one_at_a_time)

    def share(self, names: Sequence[str]) -> None:
        """Write there what is here of a time before it was shared."""
        places = [self.folder / name for name in names if self.address is not None]
        mine = [place.name for place in places if place.is_dir() and not (place / WHOLE).is_file()]
        _side_by_side(lambda name: Shared(self._address(name)).put(self.folder / name), mine)

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the names that are neither here nor there."""
        lacking = self._lacking(names)
        if self.address is None:
            return lacking
        found = _side_by_side(lambda name: Shared(self._address(name)).is_whole, lacking)
        return [name for name, is_whole in zip(lacking, found, strict=True) if not is_whole]

    def fetch(self, names: Sequence[str]) -> None:
        """Fetch those that are there and not here, side by side."""
        if self.address is not None:
            _side_by_side(self._fetch, self._lacking(names))

    def _fetch(self, name: str) -> None:
        there = Shared(self._address(name))
        if there.is_whole:
            made_once(self.folder / name, there.fetched, one_at_a_time=False)

    def _lacking(self, names: Sequence[str]) -> list[str]:
        return [name for name in dict.fromkeys(names) if not (self.folder / name).is_dir()]

    def _address(self, name: str) -> str:
        return f"{str(self.address).rstrip('/')}/{name}"


def _side_by_side(what: Callable[[str], Any], names: Sequence[str]) -> list[Any]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(what, names))


class Shared:
    """A folder at an address."""

    def __init__(self, address: str):
        self.address = address

    @property
    def is_whole(self) -> bool:
        return self._whole() is not None

    def _whole(self) -> bytes | None:
        return remote.read(f"{self.address}/{WHOLE}")

    def fetched_or_built(self, build: Build, to: Path) -> None:
        if not self.fetched(to):
            build(to)
            self.put(to)

    def fetched(self, to: Path) -> bool:
        """Copy it, unless it is not there; -> whether it was."""
        if (text := self._whole()) is None:
            return False
        for name, told in _files(text, self.address):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            with (to / name).open("wb") as out:
                if name.endswith(LAZY):
                    out.truncate(told["bytes"])
                    (to / f"{name}{THERE}").write_bytes(bytes(len(told["blocks"])))
                else:
                    out.writelines(block_of(f"{self.address}/{name}", told, n) for n in range(len(told["blocks"])))
        (to / ORIGIN).write_text(self.address)
        (to / WHOLE).write_bytes(text)
        return True

    def put(self, folder: Path) -> None:
        """Write a folder there, unless another host has written the same. Raises DataError where that is not the same."""
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        text = json.dumps({"files": {name: _told(folder / name) for name in names}}).encode()
        found = self._whole()
        if found is None:
            for name in names:
                remote.write(f"{self.address}/{name}", folder / name)
            remote.write(f"{self.address}/{WHOLE}", text)
        elif found != text:
            raise DataError(f"{self.address} holds something else than what is made here under its name; delete either")
        (folder / WHOLE).write_bytes(text)


def _told(file: Path) -> dict[str, Any]:
    """Facts of a file that who fetches it goes by."""
    with file.open("rb") as stream:
        blocks = [_hash(block) for block in iter(partial(stream.read, BLOCK_BYTES), b"")]
        return {"bytes": stream.tell(), "block": BLOCK_BYTES, "blocks": blocks}


def _hash(block: bytes) -> str:
    return hashlib.blake2b(block, digest_size=8).hexdigest()


def _files(text: bytes, address: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, facts) of each file that WHOLE names. Raises DataError for what is none, and names that lead elsewhere."""
    found = tried(lambda: list(json.loads(text)["files"].items()), ValueError, KeyError, TypeError, AttributeError)
    if isinstance(found, Exception):
        raise DataError(f"{address}/{WHOLE} is damaged ({found!r}); delete what lies at {address}")
    for name, told in found:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or {"bytes", "block", "blocks"} - {*told}:
            raise DataError(f"{address}/{WHOLE} names {name!r}, which is no file of it; delete what lies at {address}")
        yield name, told


def block_of(address: str, told: dict[str, Any], number: int) -> bytes:
    """A block of a file at an address. Raises DataError where it is not what was written."""
    begin = number * told["block"]
    data = remote.read(address, begin, min(begin + told["block"], told["bytes"]))
    if data is None or _hash(data) != told["blocks"][number]:
        what = "is gone" if data is None else "is not what was written there"
        raise DataError(
            f"{address} {what}, from byte {begin:,} on; delete what lies there and here, and prepare it anew"
        )
    return data


class Ranged:
    """An array in a file with holes, which are filled from its address when they are first read. Read by slices. Safe between
    processes: who fetches the same block writes the same bytes."""

    def __init__(self, file: Path, kind: Any):
        files = dict(_files((file.parent / WHOLE).read_bytes(), str(file.parent)))
        self._told, self._address = files[file.name], f"{(file.parent / ORIGIN).read_text()}/{file.name}"
        self._file, self.dtype = file, np.dtype(kind)
        self._array = np.asarray(np.memmap(file, kind, "r"))
        self._there = np.memmap(file.with_name(f"{file.name}{THERE}"), np.uint8, "r+")

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, at: slice) -> np.ndarray:
        begin, end, _ = at.indices(len(self))
        size, block = self.dtype.itemsize, self._told["block"]
        for number in range(begin * size // block, -(-end * size // block) if end > begin else 0):
            if not self._there[number]:
                self._fill(number)
        found: np.ndarray = self._array[at]
        return found

    def _fill(self, number: int) -> None:
        """Fetch a block. Raises Unavailable where the store refuses: it may be mended."""
        data = tried(partial(block_of, self._address, self._told, number), remote.Refused)
        if isinstance(data, remote.Refused):
            raise Unavailable(data.message)
        with self._file.open("r+b") as out:
            os.pwrite(out.fileno(), data, number * self._told["block"])
            os.fdatasync(out.fileno())
        self._there[number] = 1
