"""Rows of a log while it is written, maybe by another machine.

Whoever follows a file sees each of its lines once it is whole. A run that starts again from its last checkpoint puts another
file in its place: that is read from its beginning, and what was seen before comes again.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trinity.observability.train_log import parse_row

CHUNK_BYTES = 1 << 20


class Follower:
    """Rows as they are appended to a file that may not exist yet and may be replaced by another.

    What is there already was shown by the run before, unless it is to be read `from_start`.
    """

    def __init__(self, file: Path, from_start: bool = False):
        self.file, self._inode, self._offset = file, 0, 0
        if file.is_file() and not from_start:
            self._inode, self._offset = file.stat().st_ino, file.stat().st_size

    @property
    def has_news(self) -> bool:
        """Say whether the file has grown, or is another one, since it was read."""
        if not self.file.is_file():
            return False
        found = self.file.stat()
        return found.st_size > (self._offset if found.st_ino == self._inode else 0)

    def new_rows(self) -> Iterator[dict[str, Any]]:
        """Rows that came since, in their order; in memory is a part of the file at a time."""
        while whole := self._read():
            yield from (row for line in whole.decode().splitlines() if (row := parse_row(line)))

    def _read(self) -> bytes:
        """Whole lines from where the last ones ended; empty where there are none."""
        if not self.file.is_file():
            return b""
        with self.file.open("rb") as stream:
            inode = self.file.stat().st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            stream.seek(self._offset)
            whole, end, _ = stream.read(CHUNK_BYTES).rpartition(b"\n")
        self._offset += len(whole) + len(end)
        return whole
