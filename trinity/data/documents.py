"""Find documents: files, folders and globs of text, JSON, Parquet, Arrow and archives (formats.py)."""

import glob
import itertools
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trinity.data.formats import HEAD_BYTES, kind_of, opened, other_than_text, say_once, texts
from trinity.errors import DataError

NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}  # the last two are tables
ABOUT_DATA = {"readme.md", "license", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLIT = re.compile(r"(?P<split>[A-Za-z]\w*)-\d{5}-of-\d{5}")  # of a file of a dataset as the Hub has them
TRAIN, MOST_NAMED = "train", 3


def documents(patterns: Sequence[str], text_field: str = "text", max_documents: int | None = None) -> Iterator[str]:
    """Non-empty texts of files, folders and globs, in sorted order: `text_field` of each row of a file of rows, the whole of
    any other file as UTF-8 with errors replaced; the word `stdlib` is the modules of Python's standard library, about
    10 MB without its tests and tables. In folders, hidden files and what is no text are left out, as are the card and the
    other splits of a dataset. Streams; says what it leaves out. Raises DataError."""
    found = (
        text for pattern in patterns for file in files(pattern) for text in texts(file, text_field, _is_named(pattern))
    )
    yield from itertools.islice(filter(None, found), max_documents)


def _is_named(pattern: str) -> bool:
    return Path(pattern).expanduser().is_file()


def files(pattern: str) -> list[Path]:
    """The files that a pattern means, in sorted order. Raises DataError where there is none."""
    path = Path(pattern).expanduser()
    if pattern == "stdlib":
        found = list(_standard_library())
    elif path.is_file():
        return [path]
    elif path.is_dir():
        found = _of_dataset(_without_others(path.rglob("*"), path), path)
    else:
        root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        below = path.relative_to(root) / ("*" if path.name == "**" else "")
        found = _without_others(root.glob(str(below)), root)  # enters no links
    if not found:
        raise DataError(f"no text file matches {pattern!r}; give files, folders, globs or the word stdlib")
    return sorted(found)


def _standard_library() -> Iterator[Path]:
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - NOT_STDLIB  # os.walk then does not enter these
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _without_others(found: Iterator[Path], root: Path) -> list[Path]:
    """Those of the files that were found, not named, which hold documents: not hidden below `root`."""
    files = [file for file in found if not _is_hidden(file, root) and file.is_file()]
    others = [file for file in files if not _holds_documents(file)]
    _say_left_out(others, root, "hold no text")
    return [file for file in files if file not in set(others)]


def _is_hidden(file: Path, root: Path) -> bool:
    return file.is_relative_to(root) and any(part.startswith(".") for part in file.relative_to(root).parts)


def _holds_documents(file: Path) -> bool:
    if kind_of(file) != ("", ""):
        return True
    with opened(file) as stream:
        return not other_than_text(stream.read(HEAD_BYTES))


def _of_dataset(files: list[Path], root: Path) -> list[Path]:
    """Files of a folder but, where it is a dataset (it has files of rows), what describes it and its other splits."""
    rows = [file for file in files if kind_of(file)[0] not in ("", ".json")]
    about = {file for file in files if rows and file.name.lower() in ABOUT_DATA}
    splits = {file: found["split"].lower() for file in rows if (found := SPLIT.match(file.name))}
    held = {file for file, split in splits.items() if TRAIN in splits.values() and split != TRAIN}
    _say_left_out(sorted(about), root, "describe the data")
    _say_left_out(sorted(held), root, f"are of other splits than {TRAIN}; name them to train on them")
    return [file for file in files if file not in about | held]


def _say_left_out(files: Sequence[Path], root: Path, why: str) -> None:
    if files:
        named = ", ".join(str(file.relative_to(root)) for file in sorted(files)[:MOST_NAMED])
        more = ", ..." if len(files) > MOST_NAMED else ""
        say_once(f"{root}: {len(files)} files are left out, they {why}: {named}{more}")


def stamps(patterns: Sequence[str]) -> list[Any]:
    """Stamps that tell whether the files changed. Python's own are told by size: their dates differ between machines."""
    own = sysconfig.get_path("stdlib")
    return [
        [str(file.relative_to(own)), file.stat().st_size]
        if pattern == "stdlib"
        else [str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns]
        for pattern in patterns
        for file in files(pattern)
    ]
