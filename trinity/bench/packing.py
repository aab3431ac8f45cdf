"""`trinity bench packing`: how unlike the micro-batches of a step are, and the loss, by the way documents become sequences.

Decisions: documents of four domains that have nothing in common (code, tables of numbers, prose of a few words, a log), each
about as long as a micro-batch and all made from a seed; the same model, rate and text in all arms; a comparison for each
seed. What is compared is the mean of BatchHet over the second half of the steps: in the first, all text is new. The first arm
is what a loader reads that takes documents as they come; our `stream` shuffles the sequences that they are cut into.
"""

import argparse
import json
import random
import statistics
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trinity.bench.report import Report, Table, ratio
from trinity.config import Config, num_cpus

if TYPE_CHECKING:
    from trinity.data.dataset import PackedDataset

USUAL: dict[str, Any] = {"steps": 120, "seeds": 3, "documents": 200, "chars": 800, "seq_len": 64}
QUICK: dict[str, Any] = {"steps": 4, "seeds": 1, "documents": 3, "chars": 500, "seq_len": 64}
IN_ORDER, STREAM, BUFFER = "documents as they come", "stream", "rsdb"
ARMS: dict[str, dict[str, Any]] = {IN_ORDER: {}, STREAM: {}, BUFFER: {"packing": "rsdb", "rsdb_documents": 8}}
WORDS = "the sea was calm and no one on the long shore had seen a sail since the winter came"


def flags(parser: argparse.ArgumentParser) -> None:
    for name, text in (("steps", "of each run"), ("seeds", "runs of each arm"), ("documents", "of each domain"),
                       ("chars", "of a document"), ("seq_len", "tokens of a sequence")):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{text} (default: {USUAL[name]})")


def measure(arguments: argparse.Namespace) -> Report:
    import torch

    given = {**(QUICK if arguments.quick else USUAL), **{k: v for k, v in vars(arguments).items() if v is not None}}
    torch.set_num_threads(num_cpus())
    found: dict[str, list[list[tuple[float, float]]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.jsonl")
        text.write_text(
            "".join(json.dumps({"text": each}) + "\n" for each in documents(given["documents"], given["chars"]))
        )
        for seed in range(given["seeds"]):
            for arm, data in ARMS.items():
                found[arm].append(_run(arm, {**data, "train": [str(text)]}, seed, given))
    return _report(given, found)


def documents(num: int, chars: int) -> Iterator[str]:
    """Texts of each domain, so many of so many characters; always the same."""
    rng = random.Random(0)
    source = "\n".join(
        path.read_text("utf-8", "replace") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))
    )
    for _ in range(num):
        at = rng.randrange(max(1, len(source) - chars))
        yield source[at : at + chars]
        yield _until(chars, lambda: ",".join(str(rng.randrange(10**6)) for _ in range(8)) + "\n")
        yield _until(chars, lambda: " ".join(rng.choices(WORDS.split(), k=12)) + ". ")
        yield _until(
            chars, lambda: f"[{rng.random():.6f}] WARN host-{rng.randrange(99):02d} retry={rng.randrange(9)}\n"
        )


def _until(chars: int, line: Any) -> str:
    lines, num = list[str](), 0
    while num < chars:
        lines.append(line())
        num += len(lines[-1])
    return "".join(lines)[:chars]


def _run(arm: str, data: dict[str, Any], seed: int, given: dict[str, Any]) -> list[tuple[float, float]]:
    """(BatchHet, loss) of each step."""
    from trinity.data.dataset import PackedDataset
    from trinity.data.prepare import prepare
    from trinity.pool.local import local_pool
    from trinity.rpc.messages import Load
    from trinity.train.collectives import Alone
    from trinity.train.trainer import Trainer

    out_dir = str(Path(data["train"][0]).parent / "run")
    shape = {"seq_len": given["seq_len"], "global_batch_size": 16, "micro_batch_size": 4, "seed": seed}
    train = {**shape, "steps": given["steps"], "out_dir": out_dir}
    tree = {"model": {"preset": "tiny", "vocab_size": 512}, "data": {**data, "val_fraction": 0.0}, "train": train}
    config = Config.from_tree({**tree, "optim": {"warmup_steps": 10}})
    pool = local_pool(config.model, Load(seed=seed), optim=config.optim, backend="torch")
    made = prepare(config.data, config.train, config.model, out_dir)
    if arm == IN_ORDER:
        assert isinstance(made.train, PackedDataset)
        made = made._replace(train=_in_order(PackedDataset)(made.train.store, given["seq_len"], seed))
    trainer = Trainer(config, pool, made, Alone())
    trainer.start()
    steps = [trainer.step() for _ in range(given["steps"])]
    return [(each.batch_het or 0.0, each.loss) for each in steps]


def _in_order(packed: type["PackedDataset"]) -> type["PackedDataset"]:
    """The same sequences, one after the other."""

    class InOrder(packed):  # type: ignore[valid-type,misc]  # a class is only known where torch is
        def indices(self, nth_B: np.ndarray) -> np.ndarray:
            numbers: np.ndarray = nth_B % self.num_sequences
            return numbers

    return InOrder


def _report(given: dict[str, Any], found: dict[str, list[list[tuple[float, float]]]]) -> Report:
    later = given["steps"] // 2
    hets = {arm: [statistics.mean(het for het, _ in run[later:]) for run in runs] for arm, runs in found.items()}
    losses = {arm: [statistics.mean(loss for _, loss in run[later:]) for run in runs] for arm, runs in found.items()}
    rows = tuple(
        (seed, arm, round(hets[arm][seed], 3), round(losses[arm][seed], 3))
        for seed in range(given["seeds"])
        for arm in ARMS
    )
    title = (
        f"Micro-batches of 4 x {given['seq_len']} tokens, 16 in a step, steps {later + 1} to {given['steps']}: means"
    )
    report = Report("packing", [Table(title, ("seed", "packing", "BatchHet", "loss"), rows)])
    report.results.append({"hets": hets, "losses": losses})
    for arm in (STREAM, BUFFER):
        report.target(f"BatchHet of {arm} / {IN_ORDER}", ratio(hets[arm], hets[IN_ORDER]), at_most=0.7)
    return report
