"""Unix sockets that nobody else's processes reach: files in the user's own folder.

Decisions: a file gets its final name when its socket listens, so one that refuses belongs to a process that was killed, and
whoever starts next removes it.
"""

import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trinity.utils.private import private_folder

READY, MAKING = ".sock", ".new"


def listen(backlog: int) -> tuple[socket.socket, Path]:
    """-> a listening socket, and its file, which its owner removes in the end."""
    folder = private_folder()
    _remove_orphans(folder)
    name, unix = secrets.token_hex(8), socket.socket(socket.AF_UNIX)
    making = folder / (name + MAKING)
    with reachable(making) as path:
        unix.bind(path)
    unix.listen(backlog)
    return unix, making.rename(making.with_suffix(READY))


@contextmanager
def reachable(path: Path | str) -> Iterator[str]:
    """A name for the file in a socket's address, which has room for about a hundred bytes."""
    if sys.platform != "linux":
        yield str(path)
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def _remove_orphans(folder: Path) -> None:
    for path in folder.glob(f"*{READY}"):
        with socket.socket(socket.AF_UNIX) as probe, reachable(path) as name:
            probe.setblocking(False)
            try:
                probe.connect(name)
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except (BlockingIOError, FileNotFoundError):  # busy; or its owner was quicker
                continue
