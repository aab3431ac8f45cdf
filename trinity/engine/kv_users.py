"""Users of a folder in shared memory: the last who leaves takes along what is in it. Host code, no torch.

Decision: each holds a lock of the kernel's on a file there, which ends with its process, however that ends. So a user that was
killed is none, what it has left is there for the next one, and only who leaves of his own accord looks whether he is the last.
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from trinity.errors import Unavailable

NAME, WAIT_S, LOOK_S = "users", 5.0, 0.01


class FolderUser:
    """A user of `folder`, which is there while this is. Raises Unavailable where others go on leaving it."""

    def __init__(self, folder: Path):
        self._folder, self._fd = folder, -1
        until_s = time.monotonic() + WAIT_S
        while not self._entered():
            if time.monotonic() > until_s:
                raise Unavailable(f"{folder} is being removed by its last user, and this takes too long; start again")
            time.sleep(LOOK_S)

    def leave(self) -> None:
        """Remove the folder where nobody else uses it. Harmless when repeated."""
        if self._fd < 0:
            return
        if self._lock(fcntl.LOCK_EX):
            self._remove()
        os.close(self._fd)
        self._fd = -1

    def _remove(self) -> None:
        users = self._folder / NAME  # the last to go: who comes meanwhile waits for it
        for path in [path for path in self._folder.iterdir() if path != users]:
            path.unlink(missing_ok=True)
        users.unlink()
        with suppress(OSError):  # somebody is there already
            self._folder.rmdir()

    def _entered(self) -> bool:
        """Be a user, unless the folder has just gone, or goes now."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._folder / NAME
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return False
        if self._lock(fcntl.LOCK_SH) and os.fstat(self._fd).st_nlink:
            return True
        os.close(self._fd)
        self._fd = -1
        return False

    def _lock(self, how: int) -> bool:
        try:
            fcntl.flock(self._fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
