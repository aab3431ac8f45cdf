"""Lists of files, noted where they came from an address: a store that does not answer stops nobody whose data are prepared."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from uuid import uuid4

from trinity.data import remote
from trinity.data.documents import Found, found_by
from trinity.data.formats import say_once
from trinity.data.kept import fingerprint
from trinity.errors import Unavailable
from trinity.utils.trying import tried


def listed(patterns: Sequence[str], folder: Path) -> dict[str, list[Found]]:
    """The files that each pattern means, as they are now, or where a store does not answer as `folder` has noted them. Raises
    DataError, and Unavailable where nothing is noted."""
    return {
        pattern: _noted(pattern, folder) if remote.is_address(pattern) else found_by(pattern) for pattern in patterns
    }


def _noted(pattern: str, folder: Path) -> list[Found]:
    note = folder / f"listed-{fingerprint(pattern)}.json"
    found = tried(partial(found_by, pattern), Unavailable)
    if not isinstance(found, Unavailable):
        _write(note, json.dumps([[each.stamp, each.is_named] for each in found]))
        return found
    if not note.is_file():
        raise found
    say_once(f"{pattern}: its store does not answer; going on with what was prepared of it")
    return [Found(remote.RemoteFile(*stamp), is_named, stamp) for stamp, is_named in json.loads(note.read_text())]


def _write(note: Path, text: str) -> None:
    """Replace the note at once, unless it says so already."""
    if note.is_file() and note.read_text() == text:
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    part = note.with_name(f".{note.name}-{uuid4().hex}")
    part.write_text(text)
    part.rename(note)
