"""A folder that only this user's processes enter: for sockets, and for what Ray writes while it runs."""

import os
import stat
import tempfile
from pathlib import Path

SHORT = 32  # Ray's own sockets lie 70 characters further down, and their addresses have room for 107


def private_folder(is_short: bool = False) -> Path:
    """The user's own folder among temporary files, of mode 0700, made if need be. One that is somebody else's, or that others
    may enter, is not used: then it is a new one. `is_short`: not where the folder for temporary files has a long name."""
    base = Path(tempfile.gettempdir())
    if is_short and len(str(base)) > SHORT:
        base = Path("/tmp")  # noqa: S108  (its own mode is what counts)
    folder = base / f"trinity-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return folder if is_ours else Path(tempfile.mkdtemp(prefix="trinity-", dir=base))
