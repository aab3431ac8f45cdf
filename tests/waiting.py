"""Waiting for what must come to pass: for the event itself, never for a time in which it should have come.

The limit is no measure of speed. It is there so that a hang fails with a sentence, on a machine as busy as you like.
"""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

WAIT_S = 60.0  # under pytest's own limit, which would end the process without saying what was waited for
LEAST_SHARE = 0.25  # of a machine whose cores are busy, a test that wants to run gets more


def have_passed(seconds: float, since_s: float) -> bool:
    """Whether so much time of a machine that is ours has passed since that moment of time.monotonic(). What others take of
    the cores does not count; what this run takes itself does."""
    passed_s = time.monotonic() - since_s
    return passed_s >= seconds and passed_s * max(LEAST_SHARE, 1 - others_share()) >= seconds


def others_share(over_s: float = 1.0) -> float:
    """The share of all cores' time that goes to others than this run of pytest and what it started; 0 where no /proc tells."""
    if not Path("/proc/stat").exists():
        return 0.0
    ours, (busy, all_) = our_ticks(), machine_ticks()
    time.sleep(over_s)
    more_ours = sum(max(0, ticks - ours.get(process, 0)) for process, ticks in our_ticks().items())
    more_busy, more_all = (now - before for now, before in zip(machine_ticks(), (busy, all_), strict=True))
    return max(0.0, (more_busy - more_ours) / max(1, more_all))


def machine_ticks() -> tuple[int, int]:
    """-> the ticks in which a core was busy, and all."""
    user, nice, system, idle, iowait, *others = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    busy = user + nice + system + sum(others)
    return busy, busy + idle + iowait


def our_ticks() -> dict[str, int]:
    """The ticks of each process that this run started; they have the variable that pytest sets."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if folder.name == str(os.getpid()) or b"PYTEST_VERSION=" in (folder / "environ").read_bytes():
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                found[folder.name] = int(fields[11]) + int(fields[12])
    return found


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
