"""`trinity bench load`: seconds until a checkpoint can be asked, and the memory that it takes on the way there.

Arms, a fresh process each in every turn: `LLM(path)` in one process, two shard actors and a backbone (without a server), and
transformers' `from_pretrained`; beside them the plain reading of the same files. Time counts from the start of the process, its
imports included. Memory is the most that was seen at once, summed over the arm's processes: proportional set size without file
pages (smaps_rollup), looked at every 50 ms.

Decisions: the checkpoint has a preset's shape and random weights in bf16, and no manifest, as those of the Hub have none; files
were read once before the first turn, unless `--cold` asks the kernel to forget them before each.
"""

import argparse
import os
import shutil
import statistics
import time
from functools import partial
from pathlib import Path

from trinity.bench.loaders import KV_BYTES, Loaded, watched
from trinity.bench.models import SEED, shape
from trinity.bench.report import Report, Table, alternated, ratio
from trinity.config import ModelConfig, num_cpus
from trinity.errors import ConfigError
from trinity.utils.terminal import say
from trinity.utils.units import size

HERE, ACTORS, TRANSFORMERS, RAW = "one process", "2 shard actors", "transformers", "reading alone"
READ_BYTES = 16 << 20


def flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", help="shape of the model (default: nano, 12 GB on the disk; with --quick tiny)")
    add("--layers", type=int, help="take so many of its layers")
    add("--rounds", type=int, help="turns that each arm takes (default: 3; with --quick 1)")
    add("--without", action="append", default=[], choices=["actors", "transformers"], help="leave this arm out")
    add("--cold", action="store_true", help="have the kernel forget the files before each turn: at the disk's speed")


def measure(arguments: argparse.Namespace) -> Report:
    model = shape(_preset(arguments), arguments.layers)
    folder = Path(arguments.out) / f"{_preset(arguments)}-{model.num_hidden_layers}-random"
    num_bytes = written(model, folder)
    arms = {HERE: "llm", ACTORS: "actors", TRANSFORMERS: "transformers"}
    wanted = [name for name, role in arms.items() if role not in arguments.without]
    runs = {name: partial(_turn, arms[name], folder, arguments.cold) for name in wanted}
    runs[RAW] = partial(_reading, folder, arguments.cold)
    _reading(folder, cold=False)
    found = alternated(runs, arguments.rounds or (1 if arguments.quick else 3), warmup=0)
    return _report(found, num_bytes, model)


def _preset(arguments: argparse.Namespace) -> str:
    return arguments.preset or ("tiny" if arguments.quick else "nano")


def written(model: ModelConfig, folder: Path) -> int:
    """Make the folder unless it is there; -> bytes of its weights. Raises ConfigError where the disk has too little room."""
    from trinity.bench.random_weights import write
    from trinity.models.registry import weight_bytes

    num_bytes = sum(weight_bytes(model))
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < num_bytes * 1.1:
            raise ConfigError(f"{folder} would take {size(num_bytes)}, its disk has {size(free)}: choose another --out")
        say(f"writing {size(num_bytes)} of random weights to {folder}")
        write(model, folder, SEED)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _turn(role: str, folder: Path, cold: bool) -> Loaded:
    """Start the arm's process, watch its memory and that of its children until it is ready, and end it."""
    if cold:
        _forget(folder)
    found = watched(role, folder)
    say(f"  {role}: {found.ready_s:.1f} s, {size(found.peak_bytes)}")
    return found


def _reading(folder: Path, cold: bool) -> Loaded:
    """Read all files into one small buffer."""
    if cold:
        _forget(folder)
    buffer, begun_s = bytearray(READ_BYTES), time.monotonic()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return Loaded(time.monotonic() - begun_s, 0.0, 0)


def _forget(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _report(found: dict[str, list[Loaded]], num_bytes: int, model: ModelConfig) -> Report:
    report, rows = Report("load"), []
    for name, turns in found.items():
        ready_s, imports_s = (statistics.median(getattr(t, field) for t in turns) for field in ("ready_s", "imports_s"))
        peak = max(turn.peak_bytes for turn in turns)
        speed = num_bytes / max(ready_s - imports_s, 1e-9) / 1e9
        rows.append((name, ready_s, imports_s, speed, size(peak) if peak else "", peak / (num_bytes + KV_BYTES)))
        if name in (HERE, ACTORS):
            over = peak / (num_bytes + KV_BYTES)
            report.target(f"{name}: memory / (weights + KV cache)", over, at_most=1.1)
        if name == HERE and TRANSFORMERS in found:
            pair = ([turn.ready_s for turn in found[each]] for each in (HERE, TRANSFORMERS))
            report.target("seconds to ready, one process / transformers", ratio(*pair), at_most=1.0)
    columns = ("arm", "ready s", "of these imports s", "GB/s after them", "memory", "x weights + KV")
    title = f"{size(num_bytes)} of {model.model_type}, {model.num_hidden_layers} layers, on {num_cpus()} cores"
    report.tables.append(Table(title, columns, tuple(rows)))
    return report
