"""Find documents: files, folders and globs, here or at addresses (remote.py), of every format (formats.py)."""

import functools
import glob
import itertools
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from trinity.data import remote
from trinity.data.formats import HEAD_BYTES, DataFile, kind_of, opened, other_than_text, say_once, texts
from trinity.data.remote import RemoteFile
from trinity.errors import DataError

NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}  # the last two are tables
ABOUT_DATA = {"readme.md", "license", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLIT = re.compile(r"(?P<split>[A-Za-z]\w*)-\d{5}-of-\d{5}")  # of a file of a dataset as the Hub has them
TRAIN, MOST_NAMED = "train", 3


class Found(NamedTuple):
    """A file that a pattern means: whether that names it alone, and what it was when it was listed."""

    file: DataFile
    is_named: bool
    stamp: list[Any]

    @property
    def num_bytes(self) -> int | None:
        """Its size, where its store says one."""
        size: int | None = self.stamp[1]
        return size

    @property
    def facts(self) -> list[Any]:
        """Facts that its documents depend on."""
        is_text = (
            kind_of(self.file)[0] == ".json" and not self.is_named
        )  # where nobody named it, unless it has the field
        return [self.stamp, is_text]


def documents(patterns: Sequence[str], text_field: str = "text", max_documents: int | None = None) -> Iterator[str]:
    """Non-empty texts of files, folders and globs, in sorted order: `text_field` of each row of a file of rows, the whole of
    any other file as UTF-8 with errors replaced; the word `stdlib` is the modules of Python's standard library, about
    10 MB without its tests and tables. In folders, hidden files and what is no text are left out, as are the card and the
    other splits of a dataset. Streams; says what it leaves out. Raises DataError."""
    yield from itertools.islice(
        (text for pattern in patterns for text in _documents(pattern, text_field)), max_documents
    )


def _documents(pattern: str, text_field: str) -> Iterator[str]:
    left_out = Counter[str]()
    for found in found_by(pattern):
        yield from texts_of(found, text_field, left_out)
    say_left_out(pattern, left_out)


def texts_of(found: Found, text_field: str, left_out: Counter[str]) -> Iterator[str]:
    """Non-empty texts of one file; what it leaves out is counted. Raises DataError."""
    num, num_before = 0, left_out.total()
    for text in filter(None, texts(found.file, text_field, found.is_named, left_out)):
        num += 1
        yield text
    left_out["files without text"] += not num and left_out.total() == num_before


def say_left_out(pattern: str, left_out: Counter[str]) -> None:
    """Say in one line, once, what of a source is left out, and why."""
    if left_out.total():
        say_once(f"{pattern}: left out are {', '.join(f'{num:,} {what}' for what, num in left_out.items() if num)}")


def files(pattern: str) -> list[DataFile]:
    """The files that a pattern means, in sorted order. Raises DataError where there is none."""
    return [found.file for found in found_by(pattern)]


def found_by(pattern: str) -> list[Found]:
    """The files that a pattern means, in sorted order, as they are now. Raises DataError where there is none."""
    found, is_named = _listed(pattern.removeprefix("file://"))
    if not found:
        raise DataError(
            f"no text file matches {pattern!r}; give files, folders, globs, addresses such as s3://BUCKET/FOLDER, or the "
            "word stdlib"
        )
    return [Found(file, is_named, _stamp(file, pattern == "stdlib")) for file in sorted(found, key=_parts)]


def _parts(file: DataFile) -> tuple[str, ...]:
    """Parts of its path or address, which files are sorted by."""
    return PurePosixPath(str(file)).parts


def _listed(pattern: str) -> tuple[list[DataFile], bool]:
    """(files, is_named): whether the pattern names that one file."""
    path = Path(pattern).expanduser()
    if pattern == "stdlib":
        return list(_standard_library()), False
    if remote.is_address(pattern):
        return _remote(pattern)
    if path.is_file():
        return [path], True
    if path.is_dir():
        return _of_dataset(_without_others(path.rglob("*"), path), path), False
    root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    below = path.relative_to(root) / ("*" if path.name == "**" else "")
    return _without_others(root.glob(str(below)), root), False  # enters no links


def _remote(pattern: str) -> tuple[list[DataFile], bool]:
    found, root = remote.listed(pattern)
    if not root:
        return list(found), True
    texts = _without_others(iter(found), root)
    return (texts if remote.has_magic(pattern) else _of_dataset(texts, root)), False


def _standard_library() -> Iterator[Path]:
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - NOT_STDLIB  # os.walk then does not enter these
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _without_others(found: Iterator[DataFile], root: Path | str) -> list[DataFile]:
    """Those of the files that were found, not named, which hold documents: not hidden below `root`."""
    files = [file for file in found if not _is_hidden(file, root) and (isinstance(file, RemoteFile) or file.is_file())]
    others = [file for file in files if not _holds_documents(file)]
    _say_left_out(others, root, "hold no text")
    return [file for file in files if file not in set(others)]


def _is_hidden(file: DataFile, root: Path | str) -> bool:
    is_below = isinstance(file, RemoteFile) or file.is_relative_to(root)
    return is_below and any(part.startswith(".") for part in file.relative_to(root).parts)


def _holds_documents(file: DataFile) -> bool:
    if kind_of(file) != ("", ""):
        return True
    return _remote_text(file) if isinstance(file, RemoteFile) else _begins_as_text(file)


@functools.lru_cache(maxsize=1 << 20)
def _remote_text(file: RemoteFile) -> bool:
    """Asked for once: the file is told by what it was when it was listed."""
    return _begins_as_text(file)


def _begins_as_text(file: DataFile) -> bool:
    with opened(file, HEAD_BYTES) as stream:
        return not other_than_text(stream.read(HEAD_BYTES))


def _of_dataset(files: list[DataFile], root: Path | str) -> list[DataFile]:
    """Files of a folder but, where it is a dataset (it has files of rows), what describes it and its other splits."""
    rows = [file for file in files if kind_of(file)[0] not in ("", ".json")]
    about = {file for file in files if rows and file.name.lower() in ABOUT_DATA}
    splits = {file: found["split"].lower() for file in rows if (found := SPLIT.match(file.name))}
    held = {file for file, split in splits.items() if TRAIN in splits.values() and split != TRAIN}
    _say_left_out(about, root, "describe the data")
    _say_left_out(held, root, f"are of other splits than {TRAIN}; name them to train on them")
    return [file for file in files if file not in about | held]


def _say_left_out(files: Collection[DataFile], root: Path | str, why: str) -> None:
    if files:
        named = ", ".join(str(file.relative_to(root)) for file in sorted(files, key=_parts)[:MOST_NAMED])
        more = ", ..." if len(files) > MOST_NAMED else ""
        say_once(f"{root}: {len(files)} files are left out, they {why}: {named}{more}")


def stamps(patterns: Sequence[str]) -> list[Any]:
    """Stamps that tell whether the files changed."""
    return [found.stamp for pattern in patterns for found in found_by(pattern)]


def require_unchanged(found: Found) -> None:
    """Raise DataError unless the file still is what it was when it was listed."""
    if isinstance(found.file, RemoteFile):
        found.file.require_unchanged()
    elif _stamp(found.file, not Path(found.stamp[0]).is_absolute()) != found.stamp:
        raise DataError(f"{found.file} has changed since it was listed; start again when nobody writes to it")


def _stamp(file: DataFile, is_pythons: bool) -> list[Any]:
    """Address or path, size, and hash or date. Python's own are told by size: their dates differ between machines."""
    if isinstance(file, RemoteFile):
        return file.stamp
    try:
        told = file.stat()
    except OSError as error:
        raise DataError(f"{file} was listed and cannot be found any more: {error.strerror}") from None
    if is_pythons:
        return [str(file.relative_to(sysconfig.get_path("stdlib"))), told.st_size]
    return [str(file.absolute()), told.st_size, told.st_mtime_ns]
