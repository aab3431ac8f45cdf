"""Waiting for what must come to pass: for the event itself, never for a time in which it should have come.

The limit is no measure of speed. It is there so that a hang fails with a sentence, on a machine as busy as you like.
"""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import contextmanager

NUM_CORES = os.cpu_count() or 1
WAIT_S = 60.0  # under pytest's own limit, which would end the process without saying what was waited for


def patience(seconds: float) -> float:
    """So many seconds of a machine that is ours, and longer by as much as others take of it: what wants to run now, for each
    core, of which the suite itself is two."""
    return seconds * max(1.0, os.getloadavg()[0] / (2 * NUM_CORES))


def until(holds: Callable[[], object], within_s: float = WAIT_S, every_s: float = 0.01) -> None:
    """Return as soon as `holds()` is true; fail after `within_s`."""
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s, f"it did not come to pass within {within_s:.0f} s"
        time.sleep(every_s)


async def eventually(holds: Callable[[], object], within_s: float = WAIT_S, every_s: float = 0.01) -> None:
    """`until`, for what happens on this event loop."""
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s, f"it did not come to pass within {within_s:.0f} s"
        await asyncio.sleep(every_s)


@contextmanager
def sooner_than(seconds):
    """Fail where the block takes as long: for what must not wait, `seconds` far above what it takes on a busy machine, and
    below what it would take if it did."""
    began_s = time.monotonic()
    yield
    assert time.monotonic() - began_s < seconds
