"""`trinity bench train`: tokens per second of whole training steps, ours in one process and with shard actors, and
transformers', all in fp32 or all in bf16.

Legend: B sequences of a micro-batch, S sequence length, V vocabulary.
Decisions: all arms start from one checkpoint and see the same random tokens in the same order; the first step's loss and
gradient norm must agree before any time counts. Against transformers with AdamW, as there; ours carries its z-loss, its
balance loss and its bias update all the same. Muon is compared with itself. Arms take turns, one step each. transformers has a
process to itself, with malloc as a user has it; ours sets it as `trinity train` does.
"""

import argparse
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity.bench import models
from trinity.bench.models import ACTORS, HERE, TRANSFORMERS, Split, actor_arm
from trinity.bench.process import Child
from trinity.bench.process import say as tell_parent
from trinity.bench.report import Curve, Report, Table, alternated, ratio
from trinity.config import Config
from trinity.errors import TrinityError
from trinity.utils.hugepages import keep_freed_memory, return_freed_memory
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from trinity.data.prepare import Prepared
    from trinity.pool.pool import ExpertPool
    from trinity.state.versioned_store import Store

USUAL: dict[str, Any] = {"preset": "bench", "splits": (Split(2, 1), Split(1, 1), Split(2, 2)), "rounds": 5}
USUAL |= {"micro_batch": 8, "micros": 1, "seq_len": 256, "curve": (1, 2, 4), "dtype": "float32"}
QUICK: dict[str, Any] = {"preset": "tiny", "splits": (Split(1, 1),), "rounds": 1}
QUICK |= {"micro_batch": 2, "micros": 2, "seq_len": 32, "curve": (1,), "dtype": "float32"}
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 1e-2}  # of first losses, and of gradient norms as a share
LEAST_OF_TRANSFORMERS = {"float32": 1.7, "bfloat16": 1.5}
PHASES = ("forward", "backward", "optimizer")


def flags(parser: argparse.ArgumentParser) -> None:
    models.flags(parser, USUAL)
    parser.add_argument("--micro-batch", type=int, help=f"sequences in a pass (default: {USUAL['micro_batch']})")
    parser.add_argument("--dtype", choices=tuple(MAX_DIFFERENCE), help="what all arms compute in (default: float32)")
    parser.add_argument("--micros", type=int, help=f"passes in a step (default: {USUAL['micros']})")
    parser.add_argument("--curve", type=models.numbers, metavar="N,…", help="sequences of a step, for the picture "
                        f"(default: {USUAL['curve']})")  # fmt: skip
    parser.add_argument("--seq-len", type=int, help=f"tokens of a sequence (default: {USUAL['seq_len']})")


class Step(NamedTuple):
    """Findings of one step, and the seconds of its phases."""

    number: int
    loss: float
    grad_norm: float
    phases_s: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.phases_s.values())


class Stopwatch:
    """Seconds by phase: each call ends the present phase and begins the named one."""

    def __init__(self) -> None:
        self.phases_s = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "", 0.0

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        if self._phase:
            self.phases_s[self._phase] += now - self._since
        self._phase, self._since = phase, now


class Barrier:
    """A Comm of one worker. A trainer's first `all_reduce` in a step is where its backward ends."""

    rank, world = 0, 1

    def __init__(self) -> None:
        self.watch = Stopwatch()

    def all_reduce(self, tensor: "Tensor") -> "Tensor":
        self.watch("optimizer")
        return tensor

    def from_first(self, tensor: "Tensor") -> "Tensor":
        return tensor


class Ours:
    """A Trainer on `pool`, from the checkpoint's weights; its backbone in `store`."""

    def __init__(self, config: Config, pool: "ExpertPool", data: "Prepared", store: "Store | None" = None):
        from trinity.train.trainer import Trainer

        self.comm = Barrier()
        job = secrets.token_hex(4)  # the pool saw other races: this one begins
        self.trainer = Trainer(config, pool, data, self.comm, store=store, job=job)
        self.trainer.start()
        self.trainer.objective.register_forward_pre_hook(lambda *_: self.comm.watch("forward"))
        self.trainer.objective.register_forward_hook(lambda *_: self.comm.watch("backward"))

    def step(self) -> Step:
        watch = self.comm.watch = Stopwatch()
        watch("forward")
        found = self.trainer.step()
        watch("")
        return Step(found.step, found.loss, found.grad_norm, watch.phases_s)


class Theirs:
    """The loop a transformers user writes: forward, cross-entropy, backward, clip, torch's AdamW."""

    def __init__(self, config: Config, path: Path, data: "Prepared"):
        import torch

        self.config, self.data, self.number = config, data, 0
        self.model = models.twin(path, config.model.dtype).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.optim.adamw_lr)

    def step(self) -> Step:
        import torch

        watch, settings, loss = Stopwatch(), self.config.train, 0.0
        for micro in range(settings.num_micro):
            watch("forward")
            part = self._loss(micro) / settings.num_micro
            watch("backward")
            part.backward()
            loss += part.item()
        watch("optimizer")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        watch("")
        self.number += 1
        return Step(self.number, loss, float(norm), watch.phases_s)

    def _loss(self, micro: int) -> Any:
        import torch.nn.functional as F

        settings = self.config.train
        batch = self.data.train.batch(settings.sequences_of(self.number), 0, 1, micro, settings.micro_batch_size)
        logits_BSV = self.model(input_ids=batch.ids_BS, use_cache=False).logits
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), batch.targets_BS.flatten())


class Apart:
    """Theirs in a process of its own."""

    def __init__(self, config: Config, threads: int):
        self.child = Child(role="transformers", config=config.model_dump(mode="json"), threads=threads)

    def step(self) -> Step:
        self.child.tell()
        return Step(**self.child.hear())


def theirs_apart(config: dict[str, Any], threads: int) -> None:
    """The role `transformers` of process.py: a step for each line of stdin."""
    import sys

    import torch

    torch.set_num_threads(threads)
    made = Config.model_validate(config)
    theirs = Theirs(made, Path(str(made.train.init_from)), text_of(made))
    for _ in sys.stdin:
        tell_parent(**theirs.step()._asdict())


ROLES = {"transformers": theirs_apart}


@dataclass
class Race:
    """Arms by name, and the steps that each of them has made."""

    num_tokens: int
    max_difference: float = MAX_DIFFERENCE["float32"]
    runs: dict[str, Callable[[], float]] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)

    def add(self, name: str, threads: int, step: Callable[[], Step]) -> None:
        self.steps[name] = []
        self.runs[name] = partial(self._run, name, threads, step)

    def _run(self, name: str, threads: int, step: Callable[[], Step]) -> float:
        """-> tokens per second of one step."""
        import torch

        torch.set_num_threads(threads)
        self.steps[name].append(step())
        return self.num_tokens / self.steps[name][-1].seconds

    def check(self) -> None:
        """Run one step of each, and raise TrinityError unless all found the same loss and gradient norm."""
        alternated(self.runs, rounds=1, warmup=0)
        firsts = {name: steps[0] for name, steps in self.steps.items() if steps[0].number == 1}
        here, most = firsts[HERE], self.max_difference
        for name, first in firsts.items():
            same_loss = abs(first.loss - here.loss) < most
            same_norm = abs(first.grad_norm - here.grad_norm) < most * here.grad_norm
            if not (same_loss and same_norm):  # nan is close to nothing
                raise TrinityError(
                    f"step 1 of {name!r} has loss {first.loss:.5f} and gradient norm {first.grad_norm:.5f}, {HERE!r} has "
                    f"{here.loss:.5f} and {here.grad_norm:.5f}; they may differ by {most}: times mean nothing"
                )


def measure(arguments: argparse.Namespace) -> Report:
    given = models.filled(arguments, USUAL, QUICK)
    report, out = Report("train"), Path(given.out)
    keep_freed_memory()
    model = models.config_of(given.preset).replace(model={"dtype": given.dtype}).model
    path = models.checkpoint(model, out / f"{given.preset}-{given.dtype}")
    with models.ray_joined("actors" not in given.without):
        _adamw(report, given, config_of(given, path, "adamw"))
        return_freed_memory()
        _muon(report, given, config_of(given, path, "muon"))
    return report


def config_of(given: argparse.Namespace, path: Path, matrices: str) -> Config:
    """torch's defaults for AdamW; a constant learning rate; no attention between sequences, and no documents in them."""
    sizes = {"seq_len": given.seq_len, "micro_batch_size": given.micro_batch}
    folders = {"out_dir": str(Path(given.out) / "train"), "init_from": str(path.resolve())}
    train = {**folders, **sizes, "global_batch_size": given.micro_batch * given.micros}
    optim = {"matrices": matrices, "warmup_steps": 0, "decay": "none", "adamw_lr": 1e-3}
    optim |= {"adamw_betas": (0.9, 0.999), "weight_decay": 0.01}
    made = models.config_of(given.preset, train=train, optim=optim, data={"intra_document_mask": False})
    return made.replace(model={"dtype": given.dtype})


def random_text(config: Config, num_steps: int) -> "Prepared":
    """Random tokens for that many steps, as one document."""
    import numpy as np

    from trinity.data.token_store import write_documents

    settings = config.train
    num_tokens = num_steps * settings.global_batch_size * settings.seq_len + 1
    ids = np.array(models.random_ids(config.model, num_tokens), np.uint32)
    write_documents(Path(settings.out_dir), [ids], np.array([num_tokens]))
    return text_of(config)


def text_of(config: Config) -> "Prepared":
    """The text that `random_text` has written."""
    from trinity.checkpoint import open_checkpoint
    from trinity.data.dataset import PackedDataset
    from trinity.data.prepare import Prepared
    from trinity.data.token_store import TokenStore

    settings = config.train
    dataset = PackedDataset(TokenStore(Path(settings.out_dir)), settings.seq_len, settings.seed)
    return Prepared(open_checkpoint(str(settings.init_from)).tokenizer, dataset, dataset)


def _adamw(report: Report, given: argparse.Namespace, config: Config) -> None:
    """Every thread split against one process; beside the first one transformers, and the curve over the batch."""
    groups = models.by_shard_threads(given.splits if "actors" not in given.without else ())
    table: list[tuple[Any, ...]] = []
    for shard_threads, splits in (groups or {0: []}).items():
        is_first = not splits or given.splits[0] in splits
        theirs = is_first and "transformers" not in given.without
        with _pools(config, shard_threads) as pools:
            race, rates = _race(config, given, pools, splits, theirs)
            _tell(report, given, "AdamW", config, race, rates)
            for split in splits:
                found = rates[actor_arm(split)]
                share = ratio(found, rates[HERE])
                table.append((actor_arm(split), statistics.median(found), min(found), max(found), share))
            if is_first:
                _hold(report, given, "AdamW", rates)
                report.curves.append(_curve(given, config, pools, theirs, rates))
    if len(table) > 1:
        columns = ("arm", "tokens/s median", "min", "max", f"/ {HERE}")
        report.tables.append(Table("Threads of backbone : shard", columns, tuple(table)))


def _muon(report: Report, given: argparse.Namespace, config: Config) -> None:
    splits = [] if "actors" in given.without else [given.splits[0]]
    with _pools(config, splits[0].shard if splits else 0) as pools:
        race, rates = _race(config, given, pools, splits, theirs=False)
    _tell(report, given, "Muon", config, race, rates)
    _hold(report, given, "Muon", rates)


@contextmanager
def _pools(config: Config, shard_threads: int) -> Iterator[dict[str, "ExpertPool"]]:
    """The experts in this process and, with `shard_threads`, in shard actors."""
    from trinity.pool.local import local_pool
    from trinity.rpc.messages import Load

    load = Load(config.train.init_from, training=False)
    pools: dict[str, ExpertPool] = {HERE: local_pool(config.model, load, optim=config.optim)}
    with ExitStack() as stack:
        if shard_threads:
            made = models.shard_actors(config.model, shard_threads, optim=config.optim)
            pools[ACTORS] = stack.enter_context(made)
        yield pools


def _race(
    config: Config, given: argparse.Namespace, pools: Mapping[str, "ExpertPool"], splits: Sequence[Split], theirs: bool
) -> tuple[Race, dict[str, list[float]]]:
    """-> tokens per second of each arm's steps, once all agree on the first."""
    race = Race(config.train.global_batch_size * config.train.seq_len, MAX_DIFFERENCE[config.model.dtype])
    data = random_text(config, (given.rounds + 1) * max(1, len(splits)))
    race.add(HERE, given.threads, Ours(config, pools[HERE], data).step)
    if splits:
        actors = Ours(config, pools[ACTORS], data)
        for split in splits:
            race.add(actor_arm(split), split.backbone, actors.step)
    apart = Apart(config, given.threads) if theirs else None
    if apart:
        race.add(TRANSFORMERS, given.threads, apart.step)
    say(f"training steps of {race.num_tokens:,} tokens: {', '.join(race.runs)}")
    try:
        race.check()
        rates = alternated(race.runs, given.rounds, warmup=0)
    finally:
        if apart:
            apart.child.close()
    models.tell(rates)
    return race, rates


def _curve(
    given: argparse.Namespace,
    config: Config,
    pools: Mapping[str, "ExpertPool"],
    theirs: bool,
    whole: Mapping[str, list[float]],
) -> Curve:
    """Tokens per second over the size of the batch; its right end is the race that was run already."""
    splits = list(given.splits[:1]) if ACTORS in pools else []
    found = []
    for sequences in given.curve:
        sizes = {"micro_batch_size": sequences, "global_batch_size": sequences}
        found.append(_race(config.replace(train=sizes), given, pools, splits, theirs)[1])
    found.append(dict(whole))
    x = tuple(float(n * config.train.seq_len) for n in (*given.curve, config.train.global_batch_size))
    lines = {arm: tuple(statistics.median(rates[arm]) for rates in found) for arm in found[0]}
    return Curve(f"AdamW, preset {given.preset}", "tokens of a step", "tokens/s", x, lines)


def _size(given: argparse.Namespace, config: Config) -> str:
    settings = config.train
    batch = f"{settings.num_micro} x {settings.micro_batch_size} x {settings.seq_len} tokens a step"
    arms = f"{given.threads} threads in one process, {given.rounds} rounds"
    return f"preset {given.preset} in {given.dtype}, {batch}, {arms}"


def _tell(
    report: Report,
    given: argparse.Namespace,
    optimizer: str,
    config: Config,
    race: Race,
    rates: Mapping[str, list[float]],
) -> None:
    rows, phases = [], []
    for name, found in rates.items():
        share = ratio(found, rates[HERE])
        rows.append((name, statistics.median(found), min(found), max(found), share, *_first(race.steps[name][0])))
        split = [statistics.median(step.phases_s[p] for step in race.steps[name][-given.rounds :]) for p in PHASES]
        phases.append((name, *split, sum(split)))
    columns = ("arm", "tokens/s median", "min", "max", f"/ {HERE}", "loss of step 1", "gradient norm")
    report.tables.append(Table(f"Training with {optimizer}: {_size(given, config)}", columns, tuple(rows)))
    report.tables.append(Table("Seconds of a step (medians)", ("arm", *PHASES, "sum"), tuple(phases)))


def _first(step: Step) -> tuple[str, str]:
    """Arms that share a trainer are further on when their turn first comes."""
    return (f"{step.loss:.5f}", f"{step.grad_norm:.5f}") if step.number == 1 else ("-", "-")


def _hold(report: Report, given: argparse.Namespace, optimizer: str, rates: Mapping[str, list[float]]) -> None:
    """The targets are for preset `bench`."""
    if given.preset != "bench" or given.quick:
        return
    here, split = rates[HERE], actor_arm(given.splits[0])
    if split in rates:
        report.target(f"{optimizer}: {split} / {HERE}", ratio(rates[split], here), at_least=1.0)
    if TRANSFORMERS in rates:
        least = LEAST_OF_TRANSFORMERS[given.dtype]
        report.target(f"{optimizer}: {HERE} / {TRANSFORMERS}", ratio(here, rates[TRANSFORMERS]), at_least=least)
