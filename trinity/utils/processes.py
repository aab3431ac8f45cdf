"""Processes that others have started, from /proc; none are known where there is no such thing."""

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

POLL_S = 0.05


def below(root: int) -> dict[int, str]:
    """pid -> when it started, of all that descend from `root`."""
    seen = {pid: _parent_and_start(pid) for pid in _pids()}
    known = {pid: each for pid, each in seen.items() if each is not None}
    found, more = dict[int, str](), [root]
    while more:
        parent = more.pop()
        children = {pid: start for pid, (its_parent, start) in known.items() if its_parent == parent}
        found |= children
        more += children
    return found


def command_of(pid: int) -> str:
    """The program that it runs; "" when it is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0])
    return ""


def those_left(processes: Mapping[int, str]) -> list[int]:
    """Those that still run; one that has another's number now is not counted."""
    return [pid for pid, start in processes.items() if (_parent_and_start(pid) or (0, ""))[1] == start]


def end_those_left(processes: Mapping[int, str], after_s: float) -> list[int]:
    """Give them so long to go by themselves and kill the others; -> their pids. One that has another's number now is let be."""
    until_s = time.monotonic() + after_s
    while left := those_left(processes):
        if time.monotonic() >= until_s:
            break
        time.sleep(POLL_S)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _parent_and_start(pid: int) -> tuple[int, str] | None:
    """None for one that is gone, or has ended and is not yet buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else (int(fields[1]), fields[19])
