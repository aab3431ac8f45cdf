"""`kernel`: the decorator of everything that is compiled here, and where the compiler keeps what it has made.

Decision: numba keeps it beside the source or below the user's home, and refuses to compile where it may write to neither: an
installation of somebody else's, a container that runs as any user. Then it is the user's own folder among temporary files.
"""

import functools
from typing import Any

import numba

from trinity.utils.private import private_folder
from trinity.utils.trying import tried

kernel: Any = functools.partial(numba.njit, nogil=True, cache=True, error_model="numpy")


def _nothing() -> None:
    """Something to compile, in a file that lies where the others do."""


if isinstance(tried(lambda: kernel(_nothing), RuntimeError), RuntimeError):
    numba.config.CACHE_DIR = str(private_folder() / "kernels")  # type: ignore[attr-defined]
