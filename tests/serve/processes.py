"""The processes of Ray Serve that a test has started."""

import contextlib
import os
from pathlib import Path


def processes():
    """(process id, title) of every process of Ray Serve that comes from this one."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_text().strip("\0")
            is_serve = title.startswith("ray::ServeReplica") or "ProxyActor" in title
            if is_serve and str(os.getpid()) in ancestors(pid):
                found.append((pid, title))
    return found


def ancestors(pid):
    """Its parent's process id, that one's parent's, and so on."""
    found = []
    while pid not in ("0", "1"):
        pid = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
        found.append(pid)
    return found


def engine_pids():
    return [int(pid) for pid, title in processes() if "Engine" in title]


def gateway_pids():
    return [int(pid) for pid, title in processes() if "Gateway" in title]
