"""Facts about this machine: memory, versions of installed packages, the commit that runs."""

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path("/")
FILE_PAGES = ("inactive_file", "active_file")  # memory.stat: the kernel gives them up when memory is wanted


def meminfo(root: Path = ROOT) -> dict[str, int]:
    """Bytes by name; empty where there is no /proc."""
    path = root / "proc/meminfo"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def available_bytes(root: Path = ROOT) -> int:
    """Memory that this process can still have without swapping: the machine's, and no more than its control groups allow.

    A container's limit is a control group's. Without /proc: all that is installed.
    """
    found = meminfo(root).get("MemAvailable")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if found is None else found
    return max(0, min([machine, *_left_to_groups(root)]))


def free_and_total(device: str) -> tuple[int, int]:
    """Bytes of the device's memory that nobody uses yet, and all of them; on a CPU both are what this process can have."""
    if device == "cpu":
        return (available_bytes(),) * 2
    import torch  # only here: on a CPU the numbers need none

    free, total = torch.cuda.mem_get_info(device)
    return int(free), int(total)


def _left_to_groups(root: Path) -> Iterator[int]:
    """Bytes that each control group with a limit has left (v2, and v1's memory controller), from the process's own up."""
    path = root / "proc/self/cgroup"
    for line in path.read_text().splitlines() if path.is_file() else ():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        own = top / group.strip("/")
        for folder in (own, *(each for each in own.parents if each.is_relative_to(top))):
            if all((folder / name).is_file() for name in names):
                yield from _left(folder, *names)


def _left(folder: Path, limit: str, usage: str) -> Iterator[int]:
    """Bytes that one group has left, if it has a limit. Cached files count as free."""
    most = (folder / limit).read_text().strip()
    if most != "max":
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in FILE_PAGES)  # v1 has totals besides
        yield int(most) - int((folder / usage).read_text()) + cached


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of installed packages."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """Commit of the source tree this runs from; with `+` when it has changes."""
    if shutil.which("git") is None:
        return "commit unknown"
    here = Path(__file__).parent
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True)  # noqa: S607
    return f"commit {run.stdout.strip()}" if run.returncode == 0 else "commit unknown"
