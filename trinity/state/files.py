"""The files of a store: how a version is named and described, and how its tensors are mapped."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.errors import ConfigError


def version_file(number: int) -> str:
    """Name of the file that describes a version."""
    return f"v-{number:06d}.json"


def identity(path: Path) -> tuple[int, int]:
    """Identity of a file, which none has that takes its place: with the time, because on a disk the next file may get
    the number of the last one."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def numel_of(entry: Mapping[str, Any]) -> int:
    """Elements of a tensor that a version's file describes."""
    return torch.Size(entry["shape"]).numel()


def dtype_of(entry: Mapping[str, Any]) -> torch.dtype:
    """Type of a tensor that a version's file describes."""
    return getattr(torch, entry["dtype"])


def shaped(memory: Tensor | None, entry: Mapping[str, Any], device: torch.device | None = None) -> Tensor:
    """The tensor that flat memory holds, as its entry describes it; without memory one of no elements, on that device."""
    shape = entry["shape"]
    stored = torch.empty(shape, dtype=dtype_of(entry), device=device) if memory is None else memory.view(shape)
    return stored.mT if entry["is_transposed"] else stored


def created(path: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """New shared memory, all of it there: a page that finds no room later would kill the process without a word."""
    size = numel * dtype.itemsize
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        path.unlink()
        raise _cannot_keep(path.parent, size, error) from None
    finally:
        os.close(handle)
    return mapped(path, numel, dtype)


def _cannot_keep(folder: Path, size: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot keep {size:,} bytes in {folder}: {error.strerror}. Give shared memory more room (containers: --shm-size), "
        "use more shards, or set placement.memory_dir to another folder or placement.durable false"
    )


def mapped(path: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """The memory of a file, flat. The mapping ends with the tensor; unlike Python's it keeps no descriptor, of which a process
    has few."""
    with path.open("r+b") as file:  # torch would make a file that is not there
        return torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=numel, dtype=dtype)


def replace_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a file in one rename: a kill leaves the old one or the new one."""
    partial = path.with_name(f".{secrets.token_hex(4)}")
    text = json.dumps(tree, separators=(",", ":"))
    try:
        partial.write_text(text)
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _cannot_keep(path.parent, len(text), error) from None
