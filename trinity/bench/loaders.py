"""Processes that load a checkpoint for `trinity bench load`, and who watches them.

    python -m trinity.bench.loaders ROLE FOLDER     says `imported`, then `ready`, a line each, and waits for its stdin to close

Decisions: a process and all that it started count, Ray's included, whose session they are; a process that ends while it is
looked at counts as nothing.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trinity.errors import Unavailable

KV_BYTES = 64 << 20
MAX_LEN = 1024
LOOK_S = 0.05


class Loaded(NamedTuple):
    """One turn of an arm: seconds to ready, of these to the end of imports, and the most memory at once, in bytes."""

    ready_s: float
    imports_s: float
    peak_bytes: int


# -- who watches


def watched(role: str, folder: Path) -> Loaded:
    """Start the process of a role, watch it until it is ready, and end it. Raises Unavailable where it fails."""
    begun_s, peak, done = time.monotonic(), [0], threading.Event()
    command = [sys.executable, "-m", "trinity.bench.loaders", role, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, done), daemon=True)
        watcher.start()
        assert process.stdout is not None
        seen = {line.strip(): time.monotonic() - begun_s for line in _until_ready(process.stdout)}
        done.set()
        watcher.join()
        assert process.stdin is not None
        process.stdin.close()
    if "ready" not in seen:
        raise Unavailable(f"the process that loads as {role} ended early; what it said is above")
    return Loaded(seen["ready"], seen["imported"], peak[0])


def _until_ready(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line
        if line.strip() == "ready":
            return


def _watch(pid: int, peak: list[int], done: threading.Event) -> None:
    while not done.wait(LOOK_S):
        peak[0] = max(peak[0], sum(map(own_bytes, family(pid))))


def family(pid: int) -> list[int]:
    """The process, and those that it or they started."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def own_bytes(pid: int) -> int:
    """Proportional set size of a process without the pages of files; 0 for one that has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return 0


# -- who loads


def llm(folder: str) -> object:
    from trinity.llm import LLM

    _say("imported")
    return LLM(folder, max_model_len=MAX_LEN, kv_cache_bytes=KV_BYTES, device="cpu")


def actors(folder: str) -> object:
    """Two shard actors in a Ray of their own, and an engine here."""
    from contextlib import ExitStack

    from trinity.bench import models

    undo = ExitStack()
    undo.enter_context(models.ray_joined(True))
    from trinity.checkpoint import open_checkpoint
    from trinity.llm import LLM
    from trinity.rpc.messages import Load

    _say("imported")
    found = open_checkpoint(folder)
    pool = undo.enter_context(models.shard_actors(found.config, num_threads=1))
    pool.load(Load(folder, training=False))
    experts = pool.dispatcher(found.version)
    return undo, LLM(folder, experts=experts, max_model_len=MAX_LEN, kv_cache_bytes=KV_BYTES, device="cpu")


def transformers(folder: str) -> object:
    import torch
    from transformers import AutoModelForCausalLM

    _say("imported")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)


ROLES = {"llm": llm, "actors": actors, "transformers": transformers}


def _say(word: str) -> None:
    print(word, flush=True)


def main() -> None:
    role, folder = sys.argv[1:]
    kept = ROLES[role](str(Path(folder).resolve()))
    _say("ready")
    sys.stdin.read()
    if isinstance(kept, tuple):
        kept[0].close()
    sys.stdout.flush()
    os._exit(0)  # a thread that waits inside torch or a socket would abort the usual way out


if __name__ == "__main__":
    main()
