"""Folders that are made once and kept, each named by a fingerprint of everything it was made from.

Decisions. One is built beside its place and renamed into it when complete; other processes wait for a file lock, and where
locks do not work, or are not wanted, the first rename wins.
"""

import fcntl
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trinity.errors import DataError

FORMAT = 3  # of what lies on disk; part of every fingerprint


def fingerprint(*facts: Any, form: int = FORMAT) -> str:
    return hashlib.sha256(json.dumps([form, *facts]).encode()).hexdigest()[:16]


def made_once(folder: Path, build: Callable[[Path], object], one_at_a_time: bool = True) -> Path:
    """`folder`, complete: built beside it and renamed, unless it exists. Raises DataError when it cannot be written."""
    scratch = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        kind = folder.name.partition("-")[0]  # a store is made of shards, maybe in the same folder
        with _locked(folder.parent / f".{kind}.lock", one_at_a_time):
            if not folder.is_dir():
                scratch.mkdir()
                build(scratch)
                scratch.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process, without locks, was faster
            raise DataError(
                f"cannot write prepared data to {folder} ({error}); free space or set train.out_dir"
            ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def _locked(file: Path, is_wanted: bool) -> Iterator[None]:
    with file.open("w") as lock:
        if is_wanted:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
