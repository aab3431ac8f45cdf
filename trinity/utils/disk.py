"""Disks that take no more: what the system says of one, as a sentence."""

import errno

from trinity.errors import Unavailable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def refusal_of(error: BaseException) -> Unavailable | None:
    """The error of a disk that takes nothing as ours, with what could not be written; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return None
    what = f"cannot write {error.filename or 'to the disk'}: {error.strerror}"
    return Unavailable(f"{what}; make room there and start the command again, of a run in training with --resume")
