"""Strict reading of small files: JSON without a key twice, names that stay inside a folder, errors that name a file."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from trinity.checkpoint.tensor_file import unique
from trinity.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20
MAX_NAME_BYTES = 255


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Turn whatever a file does to its reader into an error that names it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {what}{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    with reading(path):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes; a JSON file may have {MAX_JSON_BYTES:,}")
        tree = json.loads(path.read_bytes(), object_pairs_hook=unique)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return tree


def check_inside(file: str, source: Path) -> None:
    """Raise CheckpointError for a name that leads out of the folder."""
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts or "\\" in file or not file or len(file.encode()) > MAX_NAME_BYTES:
        raise CheckpointError(f"{source} names a file outside the checkpoint: {file[:MAX_NAME_BYTES]!r}")


def sha256(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
