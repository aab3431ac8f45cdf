"""Which threads give way where cores are short: training's, to requests.

Decisions: niceness shares a core out, but whoever wakes up, as inference does at every message, still waits for the running
thread's time slice, some milliseconds. Only from an idle one (Linux's SCHED_IDLE) is the core taken at once. A thread cannot
take back what it gave up, so what gives way has threads of its own. Elsewhere than on Linux, where niceness belongs to
processes, nothing happens.
"""

import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

log = logging.getLogger(__name__)
NICEST = 19
MOST_THREADS = 32  # most of them wait for a lock
IDLE = 20  # one more: only what nobody else wants
PATIENT = (1 << 63) - 1  # the last priority of rows: what computes them on a shard gives way
USUAL = 10  # of a run that nobody serves


def give_way(niceness: int | None) -> None:
    """Make this thread, and those that it starts, give way for good: 0 or None not at all, 1 to 19 so nice, IDLE."""
    if sys.platform != "linux" or not niceness:
        return
    try:
        if niceness >= IDLE:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # a sandbox may have no such class
        log.warning("no thread can be idle here: those of training are nice instead")
    os.setpriority(os.PRIO_PROCESS, 0, max(min(niceness, NICEST), os.getpriority(os.PRIO_PROCESS, 0)))


class LowPriorityExecutor:
    """Runs work on threads of its own, which give way; without niceness on the caller's. `begin`: what each does first."""

    def __init__(self, niceness: int | None = None, begin: Callable[[], None] = lambda: None):
        def ready() -> None:
            give_way(niceness)
            begin()

        self._threads = ThreadPoolExecutor(MOST_THREADS, "trinity-patient", ready) if niceness else None

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """-> what it returned. Raises what it raised."""
        return work(*arguments) if self._threads is None else self._threads.submit(work, *arguments).result()


def of_this_thread() -> tuple[int, int]:
    """The priority of threads that it starts now."""
    return (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)) if sys.platform == "linux" else (0, 0)
