"""Files that are there whole or not at all: written beside, on disk before they get their name."""

import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trinity.synthesis.journal import named


def replaced(path: Path, text: str) -> None:
    """Write a small file. Raises Unavailable."""
    with JsonLines(path, "") as file:
        file.write_bytes(text.encode() + b"\n")
        file.finish()


class JsonLines:
    """Lines of JSON in a new file, packed as its name's end says: "", ".gz" or ".zst"; the same rows are the same bytes. Inside
    `with` it may be written to; without `finish` it gets no name. Raises Unavailable for what the disk refuses."""

    def __init__(self, path: Path, packing: str):
        self.path, self._beside = path, path.with_name(f".{path.name}.partial")  # hidden: no source
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._raw = self._beside.open("wb")
        self._file = PACK[packing](self._raw)

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        with named(self.path):
            self._raw.close()

    def write(self, row: Mapping[str, Any]) -> None:
        self.write_bytes(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")

    def write_bytes(self, data: bytes) -> None:
        with named(self.path):
            self._file.write(data)

    def finish(self) -> None:
        """Give it its name; the file is on disk before."""
        with named(self.path):
            if self._file is not self._raw:
                self._file.close()
            self._raw.flush()
            os.fsync(self._raw.fileno())
            os.replace(self._beside, self.path)


def _zstd(raw: Any) -> Any:
    import pyarrow

    return pyarrow.CompressedOutputStream(_Open(raw), "zstd")


class _Open:
    """A file that whoever packs into it cannot close."""

    def __init__(self, raw: Any):
        self.write, self.closed = raw.write, False

    def flush(self) -> None:
        return None

    def close(self) -> None:
        return None


PACK: dict[str, Callable[[Any], Any]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.GzipFile("", "wb", fileobj=raw, mtime=0),
    ".zst": _zstd,
}
