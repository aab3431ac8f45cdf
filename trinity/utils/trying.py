"""Calls that may fail, without an `except` of the caller's: again until a deadline, or with the error as a value."""

import time
from collections.abc import Callable
from typing import TypeVar

from trinity.errors import Unavailable

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 0.5  # doubled from one to the other


def retrying(
    call: Callable[[], T],
    until_s: float,
    errors: type[Exception] | tuple[type[Exception], ...] = Unavailable,
    first: Callable[[], T] | None = None,
) -> T:
    """Return what `call` does, calling it again while it raises one of `errors` and there is time (until time.monotonic() is
    `until_s`); then that error is raised. `call` must be harmless when repeated. `first`: the first try, where it is another.
    """
    attempt, pause_s = first or call, FIRST_PAUSE_S
    while True:
        try:
            return attempt()
        except errors:
            if time.monotonic() + pause_s >= until_s:
                raise
        time.sleep(pause_s)
        attempt, pause_s = call, min(2 * pause_s, LAST_PAUSE_S)


def tried(call: Callable[[], T], *errors: type[E]) -> T | E:
    """Return what `call` does, or the error of one of those kinds that it raised."""
    try:
        return call()
    except errors as error:
        return error
