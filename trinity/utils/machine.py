"""Facts about this machine: memory, and versions of installed packages."""

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path


def meminfo() -> dict[str, int]:
    """Bytes by name; empty where there is no /proc."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of installed packages."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
