"""Journals: what is known of a shard that is not finished yet, so that no answer is asked for twice.

Decisions: a line of JSON for each question, written at once. A line that a kill has cut is dropped, as is a second one of the
same question. The first line says of which file it is: of another content, the journal is begun anew. The last line of a whole
journal has its counts.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trinity.errors import Unavailable

Key = tuple[int, ...]


class Journal:
    """Entries by the key of their question. `head` says of which file they are; None: of whichever it is. Owns its file; one at
    a time writes. `summary` is empty until all entries are there."""

    def __init__(self, path: Path, head: Mapping[str, Any] | None):
        self.path, self.head, self.summary = path, dict(head or {}), dict[str, Any]()
        self._places: dict[Key, int] = {}
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self._size = self._read(head)
            os.truncate(path, self._size)
            self._file = path.open("ab", buffering=0)
        if not self._size:
            self._write({"head": self.head})

    def _read(self, head: Mapping[str, Any] | None) -> int:
        """Take in the whole lines that are there; -> their bytes. Of another head: none."""
        end = 0
        with self.path.open("rb") as lines:
            for line in lines:
                tree = _tree(line)
                if tree is None or (end == 0 and head not in (None, tree.get("head"))):
                    break
                self.head = tree.get("head", self.head)
                if "key" in tree:
                    self._places.setdefault(tuple(tree["key"]), end)
                self.summary = tree.get("summary", self.summary)
                end += len(line)
        return end

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def add(self, key: Key, entry: Mapping[str, Any]) -> None:
        self._places[key] = self._size
        self._write({"key": key, **entry})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Say that all questions have their entries; it is on disk then."""
        self.summary = dict(summary)
        self._write({"summary": self.summary})
        with named(self.path):
            os.fsync(self._file.fileno())

    def entries(self) -> Iterator[dict[str, Any]]:
        """All entries in the order of their keys."""
        with self.path.open("rb") as lines:
            for _, place in sorted(self._places.items()):
                lines.seek(place)
                yield json.loads(lines.readline())

    def close(self) -> None:
        self._file.close()

    def _write(self, tree: Mapping[str, Any]) -> None:
        line = json.dumps(tree, ensure_ascii=True).encode() + b"\n"
        with named(self.path):
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(line)


def _tree(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line; None for one that was cut."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn what the disk refuses in the block into Unavailable that names the file."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"{path} cannot be written: {error.strerror or error}; what is made is kept: mend that (free some room), and start "
            "the same command again"
        ) from None
