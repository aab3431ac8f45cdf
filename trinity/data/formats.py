"""Formats of files with documents: plain text, rows of JSON, Parquet and Arrow, archives of samples; packed or not.

Decisions: a format is told by the name, and plain text besides by its first bytes: what is none cannot become a document. A row
without a value is no document; rows that are left out are counted and said. JSON is a file of rows or, where it was found
beside other text, a text.
"""

import bz2
import codecs
import functools
import gzip
import io
import itertools
import json
import logging
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from trinity.data.remote import RemoteFile
from trinity.errors import DataError
from trinity.utils.trying import tried

DataFile = Path | RemoteFile
MAX_DOCUMENT_BYTES = 1 << 30
HEAD_BYTES, MOST_NAMES = 8192, 100
PACKED: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: _unzstd(file),
}
OTHERS = {  # first bytes of what is no text
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
    b"PAR1": "Parquet", b"ARROW1": "Arrow", b"%PDF": "PDF",
}  # fmt: skip
MARKS = {  # the longer ones first: one begins with another
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)  # what a damaged or packed file raises

log = logging.getLogger(__name__)


@functools.cache
def say_once(text: str) -> None:
    """Log what is left out; data are read for the tokenizer and again for the tokens."""
    log.warning("%s", text)


def kind_of(file: DataFile) -> tuple[str, str]:
    """(format, packing) by the name's ends, as `.jsonl` and `.gz`; empty where they say nothing."""
    ends = [end.lower() for end in file.suffixes]
    packing = ends.pop() if ends and ends[-1] in PACKED else ""
    last = ends[-1] if ends else ""
    return (".tar", ".gz") if last == ".tgz" else (last if last in READERS else "", packing)


def texts(file: DataFile, field: str, is_named: bool, left_out: Counter[str]) -> Iterator[str]:
    """Documents of a file, in its order: `field` of each row that has one, or the whole of a text; `left_out` counts what is
    none, by reason. Raises DataError."""
    with _unpacked(file) as stream:
        yield from READERS[kind_of(file)[0]](stream, field, file, is_named, left_out)


def rows(file: DataFile) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file of rows, in its order. Raises DataError."""
    read = ROWS.get(kind_of(file)[0])
    if read is None:
        raise DataError(f"{file} is no file of rows; give {', '.join(ROWS)}, packed or not")
    with _unpacked(file) as stream:
        yield from read(stream, file)


@contextmanager
def _unpacked(file: DataFile) -> Iterator[Any]:
    packing = kind_of(file)[1]
    with opened(file) as raw:
        try:
            yield PACKED[packing](raw) if packing else raw
        except BROKEN as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{file} cannot be read: {reason}") from None


def opened(file: DataFile, buffering: int = -1) -> Any:
    try:
        return file.open("rb", buffering)
    except OSError as error:
        raise DataError(f"{file} cannot be opened: {error.strerror}") from None


def other_than_text(head: bytes) -> str:
    """The name of what a file with this beginning is, if it is no text; else empty."""
    if any(head.startswith(mark) for mark in MARKS):
        return ""
    known = next((name for first, name in OTHERS.items() if head.startswith(first)), "")
    return known or ("binary" if b"\0" in head else "")


def _unzstd(file: Any) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))


# -- readers: (stream, field, file, is_named, left_out) -> texts


def _text(stream: Any, _: str, file: DataFile, is_named: bool, left_out: Counter[str]) -> Iterator[str]:
    yield _decoded(_piece(stream.read, file), file)


def _decoded(data: bytes, file: DataFile) -> str:
    if what := other_than_text(data[:HEAD_BYTES]):
        ends = ", ".join(filter(None, READERS))
        raise DataError(f"{file} is {what}, no text; leave it out, or give it the end of its format ({ends})")
    found = next((encoding for mark, encoding in MARKS.items() if data.startswith(mark)), "utf-8")
    text = data.decode(found, "replace")
    if lost := text.count("\ufffd") - data.count("\ufffd".encode()):
        say_once(f"{file}: {lost:,} characters are no {found.upper()} and are replaced")
    return text


def _json_lines(stream: Any, field: str, file: DataFile, is_named: bool, left_out: Counter[str]) -> Iterator[str]:
    yield from _of_rows(_rows_of_lines(stream, file), field, file, left_out)


def _json_file(stream: Any, field: str, file: DataFile, is_named: bool, left_out: Counter[str]) -> Iterator[str]:
    """Rows where they have the field. What is no JSON, or other JSON, is a text where nobody named it."""
    data = _piece(stream.read, file)
    found = tried(lambda: list(_rows_of_json(io.BytesIO(data), file)), DataError)
    if not is_named and (
        isinstance(found, DataError) or not any(isinstance(row, dict) and field in row for _, row in found)
    ):
        yield _decoded(data, file)
        return
    yield from _of_rows(_rows_of_json(io.BytesIO(data), file), field, file, left_out)


def _rows_of_lines(stream: Any, file: DataFile) -> Iterator[tuple[str, Any]]:
    for i, line in enumerate(iter(lambda: _piece(stream.readline, file), b""), 1):
        if line.strip():
            yield f"{file}:{i}", _json(line, f"{file}:{i}")


def _rows_of_json(stream: Any, file: DataFile) -> Iterator[tuple[str, Any]]:
    """A list of rows, or one in each line, or a single one."""
    data = _piece(stream.read, file)
    found = tried(partial(json.loads, data), ValueError, RecursionError)
    if isinstance(found, Exception):
        yield from _rows_of_lines(io.BytesIO(data), file)
        return
    for i, row in enumerate(found if isinstance(found, list) else [found], 1):
        yield f"{file}: row {i}", row


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); repair or remove the line") from None


def _of_rows(rows: Iterable[tuple[str, Any]], field: str, file: DataFile, left_out: Counter[str]) -> Iterator[str]:
    """Texts of (place, row), of rows that have one."""
    counts, names = Counter[bool](), set[str]()
    for where, row in rows:
        text = _text_of(row, field, where)
        counts[bool(text)] += 1
        left_out[without(field)] += not text
        names |= row.keys() if len(names) < MOST_NAMES else set()
        if text:
            yield text.encode(
                "utf-8", "replace"
            ).decode()  # JSON can spell half a surrogate pair, which is no character
    if counts and not counts[True] and field not in names:
        found = ", ".join(sorted(names)) or "nothing"
        raise DataError(f"{file} has no text in {field!r}, only {found}; set data.text_field")


def _text_of(row: Any, field: str, where: str) -> str | None:
    if not isinstance(row, dict):
        raise DataError(
            f"{where} has no text in {field!r}, only {type(row).__name__}; give objects with that field in each row"
        )
    text = row.get(field)
    if not isinstance(text, str | None):
        raise DataError(f"{where} has no text in {field!r}, a {type(text).__name__} is there; set data.text_field")
    return text


def without(field: str) -> str:
    """Name of rows that are left out."""
    return f"rows without text in {field!r}"


def _parquet(stream: Any, field: str, file: DataFile, is_named: bool, left_out: Counter[str]) -> Iterator[str]:
    yield from _of_tables(_parquet_tables(stream, file, field), field, file, "Parquet", left_out)


def _arrow(stream: Any, field: str, file: DataFile, is_named: bool, left_out: Counter[str]) -> Iterator[str]:
    yield from _of_tables(_arrow_tables(stream, file, field), field, file, "Arrow", left_out)


def _parquet_tables(stream: Any, file: DataFile, field: str | None = None) -> Iterator[Any]:
    """Row groups, of that column or of all."""
    import pyarrow.parquet

    found = pyarrow.parquet.ParquetFile(stream)
    _check_column(field, found.schema_arrow.names, file)
    for group in range(found.num_row_groups):
        yield found.read_row_group(group, columns=field and [field])


def _arrow_tables(stream: Any, file: DataFile, field: str | None = None) -> Iterator[Any]:
    """Batches of the file format, and of the stream's, which is what datasets on disk have."""
    import pyarrow

    is_file = stream.peek(6)[:6] == b"ARROW1"
    found = pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)
    _check_column(field, found.schema.names, file)
    yield from (found.get_batch(i) for i in range(found.num_record_batches)) if is_file else found


def _of_tables(tables: Iterator[Any], field: str, file: DataFile, name: str, left_out: Counter[str]) -> Iterator[str]:
    """Texts of that column, a piece of the file at a time."""
    import pyarrow

    with _readable(file, f"{name} file with text in {field!r}"):
        for table in tables:
            found = table.column(field).cast(pyarrow.large_string()).to_pylist()
            left_out[without(field)] += sum(not text for text in found)
            yield from filter(None, found)


def _rows_of_tables(
    tables_of: Callable[[Any, DataFile], Iterator[Any]], name: str, stream: Any, file: DataFile
) -> Iterator[tuple[str, Any]]:
    with _readable(file, f"{name} file"):
        rows = (row for table in tables_of(stream, file) for row in table.to_pylist())
        for i, row in enumerate(rows, 1):
            yield f"{file}: row {i}", {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """The value without the fields that are null, at any depth: tables pad unlike ones with them."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


@contextmanager
def _readable(file: DataFile, what: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable {what}: {error}") from None


def _check_column(field: str | None, names: list[str], file: DataFile) -> None:
    if field is not None and field not in names:
        raise DataError(f"{file} has no column {field!r}, only {', '.join(names)}; set data.text_field")


def _tar(stream: Any, field: str, file: DataFile, is_named: bool, left_out: Counter[str]) -> Iterator[str]:
    """Samples of an archive (webdataset): its .txt files, and the field of its .json files."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            data = archive.extractfile(member) if member.isfile() else None
            end = Path(member.name).suffix.lower()
            if data is None or end not in (".txt", ".json"):
                left_out["files of archives that are neither .txt nor .json"] += data is not None
                continue
            inside = file.inside(member.name) if isinstance(file, RemoteFile) else file / member.name
            yield from filter(None, (_json_file if end == ".json" else _text)(data, field, inside, True, left_out))


def _piece(read: Callable[[int], bytes], file: DataFile) -> bytes:
    """A whole document, or none at the end. Raises DataError for one that is too large to be held."""
    found = read(MAX_DOCUMENT_BYTES + 1)
    if len(found) > MAX_DOCUMENT_BYTES:
        raise DataError(f"{file} has a document of more than {MAX_DOCUMENT_BYTES:,} bytes; cut it into several")
    return found


Reader = Callable[[Any, str, DataFile, bool, Counter[str]], Iterator[str]]
COLUMNS = (".parquet", ".parq", ".pq", ".arrow", ".feather", ".ipc")
READERS: dict[str, Reader] = {
    "": _text,
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    ".json": _json_file,
    **dict(zip(COLUMNS, itertools.chain([_parquet] * 3, [_arrow] * 3), strict=True)),
    ".tar": _tar,
}
ROWS: dict[str, Callable[[Any, DataFile], Iterator[tuple[str, Any]]]] = {
    **dict.fromkeys((".jsonl", ".ndjson"), _rows_of_lines),
    ".json": _rows_of_json,
    **dict.fromkeys(COLUMNS[:3], partial(_rows_of_tables, _parquet_tables, "Parquet")),
    **dict.fromkeys(COLUMNS[3:], partial(_rows_of_tables, _arrow_tables, "Arrow")),
}
