"""`trinity chaos train CONFIG`: the training of `trinity train`, under faults; then, with --compare, the same without any.

Decisions: workers start again as often as they are killed. Steps, times and replays are those that the worker notes itself
(actors/chaos/), so that the report needs nothing of what is killed. The undisturbed run is one process, this one, with shards
of the same number as plain objects: whatever the chaos did, its weights are to have the same bits. That is meant for one worker
whose experts stay on as many shards, without replicas: rows that are added up in another order round differently. A host that
is lost without redundancy costs the steps since the last checkpoint; then that is no failure.
"""

import argparse
import functools
import math
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from actors.chaos.plan import OF_PROCESSES, Attempt, Fault, Struck
from trinity.bench.report import Report, Table
from trinity.config import Config, setup_environment
from trinity.errors import ConfigError
from trinity.launch import check_out_dir, load, train
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from actors.chaos.injector import Watch
    from actors.pool import RayPool
    from trinity.checkpoint import Checkpoint

FAULTS = OF_PROCESSES
LOSING = {Fault.CUT_HOST, Fault.CUT_ONE_WAY, Fault.CUT_BETWEEN, Fault.LOSE_POWER}  # memory, without redundancy
GOODPUT = 0.9  # wanted, with faults as rare as on a real cluster
UNDISTURBED = "undisturbed"  # in train.out_dir: the run to compare with


class Compared(NamedTuple):
    """Comparison of the two runs' weights."""

    num_tensors: int
    num_different: int
    largest: float


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or a preset: tiny, nano, mini, large")
    parser.add_argument("--steps", type=int, help="short for --train.steps")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="of chaos, recoveries apart (default: to the end)"
    )
    what = "then train the same undisturbed, in this process: are the weights bitwise equal? (one worker, no moves)"
    parser.add_argument("--compare", action="store_true", help=what)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    config = configured(arguments, flags)
    if arguments.dry_run:
        print(config.to_yaml(), end="")
        return 0
    if check_out_dir(config) is not None:
        raise ConfigError(f"{config.train.out_dir} holds a run already; chaos needs one of its own: --train.out_dir")
    setup_environment(config.cluster.auth, is_local=config.cluster.address == "local")
    result, struck, noted = disturbed(config, arguments)
    compared = compare(config, result["checkpoint"]) if arguments.compare else None
    report(config, arguments, result, struck, noted, compared).write(config.train.out_dir)
    return 0


def configured(arguments: argparse.Namespace, flags: list[str]) -> Config:
    """Raises ConfigError for what cannot be compared in this process."""
    short = ["--train.steps", str(arguments.steps)] if arguments.steps else []
    config = load(arguments.config, [*flags, *short]).replace(train={"max_failures": -1})
    if not arguments.compare:
        return config
    if config.placement.num_gpus_per_shard or config.train.num_gpus_per_worker:
        raise ConfigError("--compare trains in this process on the CPU; leave it out on GPUs")
    threads = config.placement.num_threads_per_shard  # products of other threads may round differently
    return config.replace(train={"num_threads_per_worker": threads})


def disturbed(config: Config, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Struck], list[Attempt]]:
    """Train under chaos; -> the job's result, what struck it, and its attempts."""
    from actors import pool as pools
    from actors.chaos.injector import Watch, exposed_loop
    from actors.cluster import joined

    struck: list[Struck] = []
    say("starting Ray" if config.cluster.address == "local" else f"joining {config.cluster.address}")
    with joined(config.cluster, config.train), Watch(config.train.out_dir) as noted:
        try:
            beside = functools.partial(chaos, config, arguments, struck, noted)
            result = train(config, beside=beside, loop=exposed_loop)
        finally:
            if not config.placement.keep:
                pools.destroy(config.placement.pool, config.cluster.namespace, config.placement.memory_dir)
    return result, struck, noted()


def chaos(
    config: Config, arguments: argparse.Namespace, struck: list[Struck], noted: "Watch", pool: "RayPool"
) -> AbstractContextManager[None]:
    """Faults strike inside the block, from the end of the first step on."""
    from actors.chaos.injector import Chaos, raging
    from actors.chaos.plan import plan, recovery_s

    coming = plan(arguments.seed, arguments.seconds, arguments.faults, arguments.every)
    recovered_s = lambda one: recovery_s(noted(), one.time_s)  # noqa: E731
    hurt = Chaos(pool, config.train.out_dir, arguments.hosts)
    return raging(hurt, coming, lambda: len(noted()) > 1, recovered_s, struck)


def compare(config: Config, checkpoint: str) -> Compared:
    """Train the same here, undisturbed, and compare the weights."""
    import torch

    from trinity.checkpoint import open_checkpoint

    say("training the same in this process, undisturbed")
    mine, theirs = open_checkpoint(checkpoint), undisturbed(config)
    pairs = [(mine.tensor(key), theirs.tensor(key)) for key in theirs.weight_map]
    different = [(a, b) for a, b in pairs if not torch.equal(a, b)]
    largest = max((float((a.double() - b.double()).abs().max()) for a, b in different), default=0.0)
    return Compared(len(pairs), len(different), largest)


def undisturbed(config: Config) -> "Checkpoint":
    """The whole run in this process, from the same seed or weights, over as many shards."""
    import torch

    from trinity.checkpoint import open_checkpoint
    from trinity.data.prepare import prepare
    from trinity.pool.local import local_pool
    from trinity.rl.kinds import trainer_kind
    from trinity.rpc.messages import Load
    from trinity.train.collectives import Alone

    out_dir = Path(config.train.out_dir) / UNDISTURBED
    config = config.replace(train={"out_dir": str(out_dir), "num_workers": 1, "eval_every": 0, "save_every": 0})
    torch.set_num_threads(config.train.num_threads_per_worker)
    settings = {"num_shards": config.placement.num_shards, "backend": config.placement.backend}
    pool = local_pool(config.model, Load(), optim=config.optim, **settings)  # type: ignore[arg-type]
    trainer = trainer_kind(config)(config, pool, prepare(config.data, config.train, config.model, out_dir), Alone())
    trainer.start()
    return open_checkpoint(trainer.run()["checkpoint"])


def report(
    config: Config,
    arguments: argparse.Namespace,
    result: dict[str, Any],
    struck: list[Struck],
    noted: list[Attempt],
    compared: Compared | None,
) -> Report:
    """`failure` where a step was lost, or bits differ that must not."""
    from actors.chaos import plan

    lost = plan.num_lost(noted)
    rows = [
        ("steps", result["position"]),
        ("steps lost", lost),
        ("replays (attempts that came to nothing)", plan.num_replays(noted)),
        ("goodput (steps x their median time / wall)", plan.goodput(noted)),
        ("final loss", _final_loss(config)),
        ("validation loss", result["val_loss"]),
    ]
    kinds = {each.fault for each in struck if not each.error}
    is_alone = config.train.num_workers == 1 and not config.placement.redundancy
    expected = is_alone and Fault.MOVE_EXPERTS not in kinds
    if compared is not None:
        rows += _compared_rows(compared, expected)
    tables = [_faults(struck, noted), Table("Training under chaos", ("", "value"), tuple(rows))]
    facts = {
        "seed": arguments.seed,
        "every_s": arguments.every,
        "values": dict(rows),
        "faults": _records(struck, noted),
    }
    found = Report("chaos", tables, results=[facts])
    found.target("goodput", plan.goodput(noted), at_least=GOODPUT)
    if lost and (config.placement.redundancy or not kinds & LOSING):
        found.failure = f"{lost} steps were lost"
    elif compared is not None and expected and compared.num_different:
        found.failure = f"{compared.num_different} of {compared.num_tensors} tensors differ from the undisturbed run's"
    return found


def _final_loss(config: Config) -> float:
    """Read it from the log: a worker that starts again after the last step knows it no more."""
    from trinity.observability.train_log import read_rows

    rows = reversed(read_rows(Path(config.train.out_dir, "metrics.jsonl")))
    return float(next(row["loss"] for row in rows if "loss" in row))


def _compared_rows(compared: Compared, expected: bool) -> list[tuple[str, Any]]:
    why = "" if expected else " (not expected: replicas, moved experts or several workers add up in another order)"
    same = (
        "yes" if not compared.num_different else f"no, {compared.num_different} of {compared.num_tensors} tensors{why}"
    )
    return [
        ("weights bitwise those of the undisturbed run", same),
        ("largest difference of a weight", compared.largest),
    ]


def _records(struck: list[Struck], noted: list[Attempt]) -> list[dict[str, Any]]:
    """A row for each fault; seconds from the end of the first step."""
    from actors.chaos import plan

    began_s = noted[1].time_s if len(noted) > 1 else 0.0
    ends = [*(each.time_s for each in struck[1:]), math.inf]
    return [
        {
            "fault": each.fault.value,
            "target": each.target or f"not found: {each.error}",
            "at_s": each.time_s - began_s,
            "step": plan.step_at(noted, each.time_s),
            "recovered_s": each.recovered_s,
            "longest_step_s": plan.longest_step_s(noted, each.time_s, until_s),
        }
        for each, until_s in zip(struck, ends, strict=True)
    ]


def _faults(struck: list[Struck], noted: list[Attempt]) -> Table:
    columns = ("fault", "what", "at, s", "in step", "got over in, s", "longest step after, s")
    rows = [tuple("-" if value is None else value for value in row.values()) for row in _records(struck, noted)]
    steps_s = [after - before for before, after in pairwise(_reached(noted))]
    median = f"; a step takes {sorted(steps_s)[len(steps_s) // 2]:.2f} s (median)" if steps_s else ""
    return Table(f"Faults{median}", columns, tuple(rows))


def _reached(noted: list[Attempt]) -> list[float]:
    from actors.chaos import plan

    return list(plan.done_at(noted).values())
