"""Tokenised files: a shard each, made once and kept, so that a file that is added is tokenised alone.

Legend: N documents of a shard, H shards.
Decisions. A shard is named by what its tokens depend on: the file as it was listed, how it is read, and the tokenizer; neither
the run's seed nor other files are among that. Documents lie in the order of the file, with a digest of each. What was left out
is counted in it. A file that changes while it is read makes none.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trinity.data.cache import THERE, Cache, Ranged
from trinity.data.documents import Found, require_unchanged
from trinity.data.kept import fingerprint
from trinity.errors import DataError

TOKENS, TRAINED = ("tokens.bin", np.uint32), ("trained.bin", np.bool_)


class Recipe(ABC):
    """A way to make a shard of a file, of `most` documents of it at most."""

    most: int | None

    @property
    @abstractmethod
    def facts(self) -> list[Any]:
        """Facts that the tokens depend on, besides the file."""

    @abstractmethod
    def write(self, found: Found, to: Path) -> tuple[Sequence[int], Sequence[int], Counter[str]]:
        """Write TOKENS, and TRAINED where it is wanted; -> lengths_N, digests_N, and what was left out."""

    def name(self, found: Found) -> str:
        """Name of the shard of a file."""
        return f"shard-{fingerprint(*self.facts, found.facts)}"

    def missing(self, files: Sequence[Found], cache: Cache) -> list[Found]:
        """Files without a shard, each once."""
        named = {self.name(found): found for found in files}
        return [named[name] for name in cache.missing(list(named))]

    def all_made(self, files: Sequence[Found], cache: Cache) -> "Iterator[Shard]":
        """The shard of each file, one after the other, made now unless it is there."""
        cache.fetch([self.name(found) for found in files])
        return (self.made(found, cache) for found in files)

    def made(self, found: Found, cache: Cache, one_at_a_time: bool = True) -> "Shard":
        """The shard of a file, made now unless it is there. Raises DataError."""
        return Shard(cache.made(self.name(found), partial(self._build, found), one_at_a_time))

    def _build(self, found: Found, to: Path) -> None:
        lengths, digests, left_out = self.write(found, to)
        require_unchanged(found)
        write_facts(to, lengths, digests, stamp=found.stamp, facts=self.facts, left_out=left_out)


def write_facts(
    to: Path, lengths: Sequence[int] | np.ndarray, digests: Sequence[int] | np.ndarray, **facts: Any
) -> None:
    """Write what a Shard reads besides tokens."""
    np.save(to / "lengths.npy", np.array(lengths, np.int64))
    np.save(to / "digests.npy", np.array(digests, np.uint64))
    (to / "shard.json").write_text(json.dumps({"documents": len(lengths), **facts}, indent=2))


class Shard:
    """The documents of a file on disk: lengths_N, digests_N (64-bit hashes of them), `left_out`: reason -> number."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.lengths_N, self.digests_N = np.load(folder / "lengths.npy"), np.load(folder / "digests.npy")
            self.left_out = Counter(json.loads((folder / "shard.json").read_text())["left_out"])
            self.has_trained = (folder / TRAINED[0]).is_file()
        except (OSError, ValueError, KeyError) as error:
            raise damaged(folder, error) from None

    @property
    def num_tokens(self) -> int:
        return int(self.lengths_N.sum())


def damaged(folder: Path, error: object) -> DataError:
    return DataError(f"prepared data in {folder} is damaged ({error}); delete that folder")


def mapped(folder: Path, what: tuple[str, Any], num: int) -> Any:
    """The tokens of a shard, `num` of them, or whether they are trained; memory-mapped, or a Ranged. Raises DataError."""
    name, kind = what
    try:
        found: Any = np.asarray(np.memmap(folder / name, kind, "r")) if num else np.empty(0, kind)
        if num and (folder / f"{name}{THERE}").is_file():
            found = Ranged(folder / name, kind)
    except (OSError, ValueError, KeyError) as error:
        raise damaged(folder, error) from None
    if len(found) != num:
        raise damaged(folder, f"{name} has {len(found):,} entries for {num:,}")
    return found


def keys_of(digests_N: np.ndarray, seed: int) -> np.ndarray:
    """Keys that the documents are ordered by, uint64: for seed 0 the digests, else a mixture of both (splitmix64's)."""
    if not seed:
        return digests_N
    salt = int.from_bytes(hashlib.blake2b((seed % 2**64).to_bytes(8, "little"), digest_size=8).digest(), "little")
    mixed = digests_N ^ np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    keys: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return keys


class Gathered:
    """Documents that lie in several arrays, as if end to end in one: document n is starts_N[n] : starts_N[n + 1] of this, and
    begins at places_N[n] of `parts`, end to end. Read by slices, and by integer arrays, of which runs are read at once."""

    def __init__(self, parts: Sequence[Any], starts_N: np.ndarray, places_N: np.ndarray):
        self._parts, self._starts_N, self._places_N = parts, starts_N, places_N
        self._begins_H = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)[:-1]
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self._starts_N[-1])

    def __getitem__(self, at: Any) -> np.ndarray:
        if isinstance(at, slice):
            begin, end, step = at.indices(len(self))
            return self._runs(np.array([begin]), np.array([max(begin, end)]))[::step]
        places = np.asarray(at)
        flat = places.ravel()
        cuts = np.flatnonzero(np.diff(flat, prepend=-2, append=-2) != 1)
        begins_R, nums_R = flat[cuts[:-1]], np.diff(cuts)
        return self._runs(begins_R, begins_R + nums_R).reshape(places.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype)

    def _runs(self, begins_R: np.ndarray, ends_R: np.ndarray) -> np.ndarray:
        """Entries begin : end of each run, which may be of many documents, one run after the other."""
        if len(begins_R) and not (begins_R.min() >= 0 and ends_R.max() <= len(self)):
            raise IndexError(f"{begins_R.min()}:{ends_R.max()} of {len(self)}")
        starts_N = self._starts_N
        first_R = starts_N.searchsorted(begins_R, "right") - 1
        nums_R = np.maximum(starts_N.searchsorted(ends_R, "left") - first_R, 0) * (ends_R > begins_R)
        documents_P, runs_P = ranges(first_R, nums_R), np.repeat(np.arange(len(begins_R)), nums_R)
        begins_P = np.maximum(starts_N[documents_P], begins_R[runs_P])
        sizes_P = np.minimum(starts_N[documents_P + 1], ends_R[runs_P]) - begins_P
        places_P = self._places_N[documents_P] + begins_P - starts_N[documents_P]
        parts_P = self._begins_H.searchsorted(places_P, "right") - 1
        inside_P = places_P - self._begins_H[parts_P]
        pieces = zip(parts_P.tolist(), inside_P.tolist(), (inside_P + sizes_P).tolist(), strict=True)
        return np.concatenate([*(self._parts[part][begin:end] for part, begin, end in pieces), np.empty(0, self.dtype)])


class Order(NamedTuple):
    """Documents of shards in one order: starts_N (N + 1 of them), and the places_N of each in the shards, end to end."""

    starts_N: np.ndarray
    places_N: np.ndarray

    @classmethod
    def of(cls, lengths_N: np.ndarray, chosen: np.ndarray) -> "Order":
        """Order of the documents with these numbers, of all that have these lengths."""
        ends_N = np.cumsum(lengths_N)
        starts = np.concatenate([[0], np.cumsum(lengths_N[chosen])]).astype(np.int64)
        return cls(starts, (ends_N - lengths_N)[chosen].astype(np.int64))


def ranges(begins_P: np.ndarray, nums_P: np.ndarray) -> np.ndarray:
    """begin, begin + 1, ... of each piece, `num` of them, one piece after the other."""
    ends_P = np.cumsum(nums_P)
    found = np.arange(ends_P[-1] if len(ends_P) else 0)
    found += np.repeat(begins_P - (ends_P - nums_P), nums_P)
    return found
