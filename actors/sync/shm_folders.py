"""Folders of a pool's processes on a host, in shared memory that outlives them: committed state, what engines have cached, and
the placement's own where the settings name none.

Decisions: a folder belongs to the Ray node (its raylet process) whose actors wrote it, for only that node starts them again;
folders of nodes that have gone are swept away by whoever makes the next one. Containers may share this memory and not see one
another's processes: nobody judges nodes of another PID namespace. Everybody on the host can make names here: a folder that
is not ours is refused. No torch: the process that removes folders needs none.
"""

import hashlib
import logging
import os
import re
import shutil
import stat
from pathlib import Path

import ray

from actors.names import on_node
from trinity.config import PlacementConfig, ray_node_pid
from trinity.errors import ConfigError
from trinity.utils.disk import shared_memory

log = logging.getLogger(__name__)
PREFIX, CACHE_PREFIX, STATE_PREFIX = "trinity-memory", "trinity-kv", "trinity-placement"
REMOVE_S = 10.0


def folder(settings: PlacementConfig, namespace: str, what: str) -> Path | None:
    """Folder of one process of the pool on this node, called `what`; None where nothing is to be kept. Raises ConfigError
    where somebody else has put something in its place."""
    return _made(settings, namespace, PREFIX) / what if settings.durable else None


def cache_folder(settings: PlacementConfig, namespace: str) -> Path:
    """Folder of what the pool's engines on this node have cached. Raises as `folder`."""
    return _made(settings, namespace, CACHE_PREFIX)


def state_folder(settings: PlacementConfig, namespace: str) -> Path:
    """Folder of the pool's placement, which goes with the head's Ray node and with the pool. Raises as `folder`."""
    return _made(settings, namespace, STATE_PREFIX)


def _made(settings: PlacementConfig, namespace: str, prefix: str) -> Path:
    root = shared_memory(settings.memory_dir)
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    found = root / _name(ray_node_pid(), settings.pool, namespace, prefix)
    found.mkdir(mode=0o700, exist_ok=True)
    status = found.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(f"{found} is somebody else's; set placement.memory_dir to a folder of your own")
    return found


def sweep(root: Path) -> None:
    """Remove what belongs to nodes that have gone. Harmless beside others who do the same."""
    ours = re.compile(rf"(?:{PREFIX}|{CACHE_PREFIX}|{STATE_PREFIX})-{os.getuid()}-{_namespace()}-(\d+)-(\d+)-.+")
    for path in root.iterdir() if root.is_dir() else ():
        if (found := ours.fullmatch(path.name)) and _started(int(found[1])) != int(found[2]):
            log.warning("removing %s: its node has gone", path)
            shutil.rmtree(path, ignore_errors=True)


def remove(pool: str, namespace: str, memory_dir: str | None) -> None:
    """Remove it on all nodes that are alive: the pool's processes have ended for good."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 and not any(
        shared_memory(memory_dir).glob(f"trinity-*-{os.getuid()}-*-{_tag(namespace)}-{pool}")
    ):
        return
    refs = [on_node(_remove, node).remote(pool, namespace, memory_dir) for node in nodes]
    ray.wait(refs, num_returns=len(refs), timeout=REMOVE_S) if refs else None


@ray.remote(num_cpus=0, max_retries=0)
def _remove(pool: str, namespace: str, memory_dir: str | None) -> None:
    for prefix in (PREFIX, CACHE_PREFIX, STATE_PREFIX):
        shutil.rmtree(shared_memory(memory_dir) / _name(ray_node_pid(), pool, namespace, prefix), ignore_errors=True)


def _name(raylet: int, pool: str, namespace: str, prefix: str) -> str:
    return f"{prefix}-{os.getuid()}-{_namespace()}-{raylet}-{_started(raylet)}-{_tag(namespace)}-{pool}"


def _tag(namespace: str) -> str:
    """Mark of Ray's namespace, which may be any text: pools of one name in two of them are two pools."""
    return hashlib.blake2b(namespace.encode(), digest_size=4).hexdigest()


def _namespace() -> int:
    """PID namespace of this process; 0 where the system has but one."""
    path = Path("/proc/self/ns/pid")
    return path.stat().st_ino if path.exists() else 0


def _started(pid: int) -> int:
    """Start of the process with that id, in clock ticks since boot; 0 where there is none that runs."""
    path = Path("/proc") / str(pid) / "stat"
    try:
        fields = path.read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])
