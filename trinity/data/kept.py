"""Folders that are made once and kept, each named by a fingerprint of everything it was made from.

Decisions. One is built beside its place and renamed into it when complete; other processes wait for a file lock, and where
locks do not work, or are not wanted, the first rename wins. What a builder that was killed left behind is removed by the next
one: it is what nobody holds a lock on, and nobody has written into for LEFT_S.
"""

import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trinity.errors import DataError
from trinity.utils.trying import tried

FORMAT = 3  # of what lies on disk; part of every fingerprint
LEFT_S = 3600.0


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
                remove_left(folder.parent, kind)
                scratch.mkdir()
                with _held(scratch):
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


@contextmanager
def _held(scratch: Path) -> Iterator[bool]:
    """Hold a lock on a folder inside the block, where nobody else does; -> whether it is held."""
    handle = os.open(scratch, os.O_RDONLY)
    try:
        yield not isinstance(tried(lambda: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB), OSError), OSError)
    finally:
        os.close(handle)


@functools.cache
def remove_left(parent: Path, kind: str) -> None:
    """Remove folders of that kind that were not completed; once in a process."""
    for scratch in parent.glob(f".{kind}-*"):
        tried(functools.partial(_remove_if_left, scratch), OSError)  # another one was faster


def _remove_if_left(scratch: Path) -> None:
    newest_s = max(file.stat().st_mtime for file in (scratch, *scratch.rglob("*")))
    if scratch.is_dir() and time.time() - newest_s > LEFT_S:
        with _held(scratch) as is_held:
            if is_held:
                shutil.rmtree(scratch, ignore_errors=True)
