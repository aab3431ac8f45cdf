"""Find documents: files, folders and globs of text, JSON lines and Parquet."""

import glob
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trinity.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}  # the last two are tables


def documents(patterns: Sequence[str], text_field: str = "text", max_documents: int | None = None) -> Iterator[str]:
    """Non-empty texts of files, folders (without hidden and binary files) and globs, in sorted order: `text_field` of
    each line of a .jsonl and row of a .parquet file, the whole of any other file as UTF-8 with errors replaced; the
    word `stdlib` is the modules of Python's standard library, about 10 MB without its tests and tables. Streams.
    Raises DataError."""
    found = (text for pattern in patterns for file in _files(pattern) for text in _read(file, text_field))
    yield from itertools.islice(filter(None, found), max_documents)


def _files(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if pattern == "stdlib":
        files = list(_standard_library())
    elif path.is_file():
        return [path]
    elif path.is_dir():
        files = [file for file in path.rglob("*") if _is_text(file, path)]
    else:
        root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        below = path.relative_to(root) / ("*" if path.name == "**" else "")
        files = [file for file in root.glob(str(below)) if _is_text(file, root)]  # enters no links
    if not files:
        raise DataError(f"no text file matches {pattern!r}; give files, folders, globs or the word stdlib")
    return sorted(files)


def _standard_library() -> Iterator[Path]:
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - NOT_STDLIB  # os.walk then does not enter these
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _is_text(file: Path, root: Path) -> bool:
    """Say whether a file that was found, not named, holds text: not hidden below `root`, no NUL in its first 8 KiB."""
    hidden = file.is_relative_to(root) and any(part.startswith(".") for part in file.relative_to(root).parts)
    if hidden or not file.is_file():
        return False
    with _opened(file) as stream:
        return file.suffix == ".parquet" or b"\0" not in stream.read(8192)


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{file} cannot be opened: {error.strerror}") from None


def _read(file: Path, field: str) -> Iterator[str]:
    with _opened(file) as stream:
        if file.suffix == ".jsonl":
            lines = enumerate(iter(lambda: _piece(stream.readline, file), b""), 1)
            yield from (_json_text(line, field, f"{file}:{i}") for i, line in lines if line.strip())
        elif file.suffix == ".parquet":
            yield from _parquet(stream, field, file)
        else:
            yield _piece(stream.read, file).decode("utf-8", "replace")


def _piece(read: Callable[[int], bytes], file: Path) -> bytes:
    """A whole document, or none at the end. Raises DataError for one that is too large to be held, or cannot be read."""
    try:
        found = read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    if len(found) > MAX_DOCUMENT_BYTES:
        raise DataError(f"{file} has a document of more than {MAX_DOCUMENT_BYTES:,} bytes; cut it into several")
    return found


def _json_text(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); repair or remove the line") from None
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no text in {field!r}, only {found or 'nothing'}; set data.text_field")
    return text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair, which is no character


def _parquet(stream: Any, field: str, file: Path) -> Iterator[str]:
    """Row group by row group; rows without a value are no documents."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(stream)
        names = table.schema_arrow.names
        if field not in names:
            raise DataError(f"{file} has no column {field!r}, only {', '.join(names)}; set data.text_field")
        for group in range(table.num_row_groups):
            column = table.read_row_group(group, columns=[field]).column(field)
            yield from (text for text in column.cast(pyarrow.string()).to_pylist() if text)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file with text in {field!r}: {error}") from None


def stamps(patterns: Sequence[str]) -> list[Any]:
    """Stamps that tell whether the files changed. Python's own are told by size: their dates differ between machines."""
    own = sysconfig.get_path("stdlib")
    return [
        [str(file.relative_to(own)), file.stat().st_size]
        if pattern == "stdlib"
        else [str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns]
        for pattern in patterns
        for file in _files(pattern)
    ]
