"""Disks that take no more: what the system says of one, as a sentence; and the one that is memory."""

import errno
import tempfile
from pathlib import Path

from trinity.errors import Unavailable

SHM = Path("/dev", "shm")
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def refusal_of(error: BaseException) -> Unavailable | None:
    """The error of a disk that takes nothing as ours, with what could not be written; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return None
    what = f"cannot write {error.filename or 'to the disk'}: {error.strerror}"
    return Unavailable(f"{what}; make room there and start the command again, of a run in training with --resume")


def shared_memory(memory_dir: str | None) -> Path:
    """The folder, on this machine, of what processes share and what outlives them: `memory_dir`, if there is one."""
    return Path(memory_dir) if memory_dir else SHM if SHM.is_dir() else Path(tempfile.gettempdir())
