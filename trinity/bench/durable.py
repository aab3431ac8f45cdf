"""`trinity bench durable`: what it costs that committed state outlives its process, and what that buys.

Decisions: two pools of shard actors with the same weights and data take steps in turns; one keeps its versions, and its
backbone's, in memory that outlives the process, the other in the processes' own. Then shards of the first are killed, one in
each of some steps, at a random moment: the figure is from SIGKILL to the end of the next step that was decided.
"""

import argparse
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity.bench import models
from trinity.bench.report import Curve, Report, Table, alternated
from trinity.bench.train import Ours, config_of, random_text
from trinity.errors import TrinityError
from trinity.utils.disk import shared_memory
from trinity.utils.hugepages import keep_freed_memory
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from actors.pool import RayPool

USUAL: dict[str, Any] = {"preset": "bench", "rounds": 6, "kills": 3, "micro_batch": 8, "micros": 1, "seq_len": 256}
QUICK: dict[str, Any] = {"preset": "tiny", "rounds": 2, "kills": 1, "micro_batch": 2, "micros": 1, "seq_len": 32}
WARM_UP = 2  # steps: from then on memory is used again
DURABLE, OWN = "outlives the process", "the process's own"
PHASES = ("boundary", "prepare", "stage", "decide", "commit")
MAX_OVERHEAD = 0.05
ASK_S = 30.0


def flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", help=f"model (default: {USUAL['preset']}; with --quick tiny)")
    add("--rounds", type=int, help=f"steps that each pool takes (default: {USUAL['rounds']})")
    add("--kills", type=int, help=f"shards that are killed afterwards (default: {USUAL['kills']})")
    add("--micro-batch", type=int, help=f"sequences of a step (default: {USUAL['micro_batch']})")
    add("--seq-len", type=int, help=f"tokens of a sequence (default: {USUAL['seq_len']})")
    add("--threads", type=int, help="of the backbone (default: all cores); each shard has one")


def measure(arguments: argparse.Namespace) -> Report:
    import torch

    given = models.filled(arguments, USUAL, QUICK)
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    path = models.checkpoint(models.config_of(given.preset).model, Path(given.out) / f"{given.preset}-float32")
    config = config_of(given, path, "adamw")
    report = Report("durable")
    data = random_text(config, WARM_UP + given.rounds + 3 * given.kills)
    with models.ray_joined(wanted=True), ExitStack() as stack:
        pools = {
            arm: stack.enter_context(models.shard_actors(config.model, 1, optim=config.optim, durable=arm == DURABLE))
            for arm in (DURABLE, OWN)
        }
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="trinity-bench-", dir=shared_memory(None)))
        )
        runs = {arm: Timed(config, pool, data, folder if arm == DURABLE else None) for arm, pool in pools.items()}
        say(f"steps of {given.micro_batch * given.seq_len:,} tokens in turns")
        seconds = alternated({arm: run.seconds for arm, run in runs.items()}, given.rounds, WARM_UP)
        _check(runs)
        _tell(report, given, seconds, runs)
        found = [killed(runs[DURABLE], pools[DURABLE], random.Random(n)) for n in range(given.kills)]
        _tell_kills(report, found, statistics.median(seconds[DURABLE]))
    return report


class Timed(Ours):
    """A trainer whose steps are timed, and in them what the two phases take beside forward and backward."""

    def __init__(self, config: Any, pool: "RayPool", data: Any, folder: Path | None):
        from trinity.state.versioned_store import Store

        super().__init__(config, pool, data, Store(folder))
        self.phases_s = {phase: [0.0] for phase in PHASES}
        self.losses: list[float] = []
        self.cpu_s: list[float] = []
        self.pool = pool
        trainer = self.trainer
        for phase, owner, name in (
            ("boundary", pool, "begin_attempt"),
            ("prepare", pool, "prepare"),
            ("decide", pool, "decide"),
            ("commit", pool, "commit"),
            ("commit", trainer.backbone, "commit"),
        ):
            self._time(phase, owner, name)
        self._time_staging(pool)

    def seconds(self) -> float:
        """Seconds of one step."""
        for found in self.phases_s.values():
            found.append(0.0)
        started_s, cpu_s = time.perf_counter(), self._cpu_s()
        self.losses.append(self.trainer.step().loss)
        self.cpu_s.append(self._cpu_s() - cpu_s)
        return time.perf_counter() - started_s

    def _cpu_s(self) -> float:
        """CPU time of this process and the pool's shards so far: other programs show less in it than in the clock."""
        shards = (_pid(self.pool, shard) for shard in self.pool.table.shards)
        ticks = (
            sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) for pid in shards
        )
        return time.process_time() + sum(ticks) / os.sysconf("SC_CLK_TCK")

    def _time(self, phase: str, owner: Any, name: str) -> None:
        setattr(owner, name, self._timed(phase, getattr(owner, name)))

    def _timed(self, phase: str, call: Callable[..., Any], since_s: float | None = None) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started_s = time.perf_counter() if since_s is None else since_s
            try:
                return call(*arguments)
            finally:
                self.phases_s[phase][-1] += time.perf_counter() - started_s

        return timed

    def _time_staging(self, pool: "RayPool") -> None:
        """Time from the message to the last shard's answer; the backbone's own is made meanwhile."""
        stage = pool.stage
        pool.stage = lambda message: self._timed("stage", stage(message), time.perf_counter())  # type: ignore[method-assign]


def killed(run: Timed, pool: "RayPool", rng: random.Random) -> tuple[float, float]:
    """SIGKILL of a shard in the course of a step; -> how far into it, and from there to its end, in seconds."""
    pid = _pid(pool, rng.choice(pool.table.shards))
    into_s, when_s = rng.uniform(0.1, 0.9) * run.seconds(), []

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)
        when_s.append(time.perf_counter())

    timer = threading.Timer(into_s, kill)
    timer.start()
    run.seconds()
    while not when_s:  # the step was over sooner than the one before
        run.seconds()
    return into_s, time.perf_counter() - when_s[0]


def _pid(pool: "RayPool", shard: str) -> int:
    from actors.names import ask

    return int(ask(pool.shards[shard].where.remote(), ASK_S, f"shard {shard}")[1])


def _check(runs: dict[str, Timed]) -> None:
    if runs[DURABLE].losses != runs[OWN].losses:
        raise TrinityError(f"the two pools' losses differ, {[run.losses for run in runs.values()]}: times mean nothing")


def _tell(report: Report, given: argparse.Namespace, seconds: dict[str, list[float]], runs: dict[str, Timed]) -> None:
    rows = []
    for arm, run in runs.items():
        phases = [1000 * statistics.median(run.phases_s[phase][-given.rounds :]) for phase in PHASES]
        rows.append((arm, 1000 * statistics.median(seconds[arm]), *phases))
    size = f"preset {given.preset}, {given.micro_batch * given.seq_len:,} tokens, AdamW, {given.rounds} rounds"
    report.tables.append(Table(f"Milliseconds of a step (medians): {size}", ("memory", "step", *PHASES), tuple(rows)))
    cpu = {arm: run.cpu_s[WARM_UP : WARM_UP + given.rounds] for arm, run in runs.items()}
    longer = [("clock", *_longer(seconds)), ("CPU of all its processes", *_longer(cpu))]
    columns = ("by", "share", "min", "max")
    report.tables.append(Table("A step in memory that outlives the process takes longer", columns, tuple(longer)))
    report.curves.append(Curve("Seconds of a step", "round", "s", tuple(range(1, given.rounds + 1)),
                               {arm: tuple(found) for arm, found in seconds.items()}))  # fmt: skip
    if given.preset == "bench":
        for by, share, *_ in longer:
            report.target(f"durable memory, longer by ({by})", share, at_most=MAX_OVERHEAD)


def _longer(found: dict[str, list[float]]) -> tuple[float, float, float]:
    """Median, least and most of the rounds."""
    shares = [a / b - 1 for a, b in zip(found[DURABLE], found[OWN], strict=True)]
    return statistics.median(shares), min(shares), max(shares)


def _tell_kills(report: Report, found: list[tuple[float, float]], step_s: float) -> None:
    rows = [(into_s, after_s, after_s - (step_s - into_s)) for into_s, after_s in found]
    columns = ("killed after (s of a step)", "to the next decided step (s)", "of it lost (s)")
    report.tables.append(Table(f"SIGKILL of a shard; a step takes {step_s:.3g} s", columns, tuple(rows)))
