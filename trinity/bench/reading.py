"""`trinity bench reading`: how fast one core reads packed batches, how full they are, and what an order costs.

Decisions: documents of a log-normal mix of lengths, whose tokens lie in shards as those of a run do; batches are read as one
worker reads them, whole steps, micro-batch by micro-batch; seconds are those of this thread's processor, in turns, the median
of rounds. No model: what is measured must keep one fed.
"""

import argparse
import functools
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trinity.bench.report import Report, Table
from trinity.config import Sequences

if TYPE_CHECKING:
    from trinity.data.dataset import Dataset
    from trinity.data.token_store import TokenStore

USUAL: dict[str, Any] = {"documents": 100_000, "seq_len": 4096, "global_batch": 192, "rounds": 5, "replayed": 50_000}
USUAL |= {"shards": 64}
QUICK: dict[str, Any] = {"documents": 300, "shards": 3, "seq_len": 256, "global_batch": 16, "rounds": 1, "replayed": 20}
MICRO, MEAN_LOG, SIGMA, LONGEST = 8, 6.0, 1.0, 100_000  # median 403 tokens, mean 665
ORDER = 2_000_000_000


def flags(parser: argparse.ArgumentParser) -> None:
    for name, text in (
        ("documents", "of the store"),
        ("shards", "that hold them; 0: one array, as older releases made"),
        ("seq_len", "tokens of a sequence"),
        ("global_batch", "sequences of a step"),
        ("rounds", "of each packing"),
        ("replayed", "sequences of a slot of the buffer"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{text} (default: {USUAL[name]:,})")


def measure(arguments: argparse.Namespace) -> Report:
    given = {**(QUICK if arguments.quick else USUAL), **{k: v for k, v in vars(arguments).items() if v is not None}}
    with tempfile.TemporaryDirectory() as folder:
        datasets = _datasets(_store(Path(folder), given["documents"], given["shards"]), given)
        rates = _rates(datasets, given)
        replayed = _replayed(datasets["rsdb"], given["replayed"])
    return _report(given, datasets, rates, replayed)


def _store(folder: Path, num: int, num_shards: int) -> "TokenStore":
    from trinity.data.shards import Shard
    from trinity.data.token_store import SourceShards, TokenStore, write_documents, write_order

    rng = np.random.default_rng(0)
    lengths_N = rng.lognormal(MEAN_LOG, SIGMA, num).astype(np.int64).clip(2, LONGEST)
    if num_shards:
        shards = [
            _shard(folder / f"shard-{n}", part, rng) for n, part in enumerate(np.array_split(lengths_N, num_shards))
        ]
        write_order(folder, [SourceShards("", list(map(Shard, shards)))], 0.0, 0)
        return TokenStore(folder / "train")
    tokens = (rng.integers(0, 200_000, length, np.uint32) for length in lengths_N)
    trained = (rng.random(length) < 0.5 for length in lengths_N)
    write_documents(folder, tokens, lengths_N, trained)
    return TokenStore(folder)


def _shard(folder: Path, lengths_N: np.ndarray, rng: np.random.Generator) -> Path:
    """Write a shard of random documents of these lengths."""
    from trinity.data.shards import TOKENS, TRAINED, write_facts

    folder.mkdir()
    num = int(lengths_N.sum())
    rng.integers(0, 200_000, num, np.uint32).tofile(folder / TOKENS[0])
    (rng.random(num) < 0.5).tofile(folder / TRAINED[0])
    write_facts(folder, lengths_N, rng.integers(0, 2**64, len(lengths_N), np.uint64), left_out={})
    return folder


def _datasets(store: "TokenStore", given: dict[str, Any]) -> "dict[str, Dataset]":
    from trinity.data.best_fit import PackedDocuments
    from trinity.data.dataset import PackedDataset, Source
    from trinity.data.mixture import Mixture
    from trinity.data.packed_chats import PackedChats
    from trinity.data.rsdb import BufferedDocuments

    seq_len, total = given["seq_len"], given["global_batch"]
    found: dict[str, Dataset] = {
        "stream": PackedDataset(store, seq_len, 0),
        "rsdb": BufferedDocuments(store, seq_len, 0, total, 256),
        "best_fit": PackedDocuments(store, seq_len, 0),
        "chats": PackedChats(store, seq_len, 0),
    }
    of_text = [Source("a", 0.7, PackedDataset(store, seq_len, 1)), Source("b", 0.3, PackedDataset(store, seq_len, 2))]
    buffered = Source("b", 0.3, BufferedDocuments(store, seq_len, 2, max(1, round(0.3 * total)), 256))
    with_chats = Source("b", 0.3, PackedChats(store, seq_len, 2))
    for name, other in (("stream", of_text[1]), ("rsdb", buffered), ("chats", with_chats)):
        found[f"mixture of stream and {name}"] = Mixture([of_text[0], other], seq_len, 0)
    return found


def _rates(datasets: "dict[str, Dataset]", given: dict[str, Any]) -> dict[str, list[float]]:
    """Tokens per second of processor time, of each round."""
    rates: dict[str, list[float]] = {name: [] for name in datasets}
    for step in range(given["rounds"] + 1):  # the first is not counted: files come into memory
        for name, dataset in datasets.items():
            seconds, num = _timed(functools.partial(_read, dataset, step, given["global_batch"]))
            rates[name].append(num / seconds)
    return {name: found[1:] for name, found in rates.items()}


def _read(dataset: "Dataset", step: int, total: int) -> int:
    """Tokens of a step, read micro-batch by micro-batch."""
    return sum(
        dataset.batch(Sequences.nth(step, total), 0, 1, micro, MICRO).ids_BS.numel() for micro in range(total // MICRO)
    )


def _replayed(dataset: Any, num: int) -> float:
    """Sequences of a slot per second, without reading them: what a run that resumes does first."""
    from trinity.data.rsdb import Slot

    seconds, _ = _timed(lambda: len(Slot(dataset, 0).sequence(num - 1)))
    return num / seconds


def _timed(what: Callable[[], int]) -> tuple[float, int]:
    begin = time.thread_time()
    num = what()
    return max(time.thread_time() - begin, 1e-9), num


def _report(given: dict[str, Any], datasets: Any, rates: dict[str, list[float]], replayed: float) -> Report:
    rows = []
    for name, found in rates.items():
        fill = getattr(datasets[name], "fill", None)
        rows.append((name, statistics.median(found) / 1e6, "" if fill is None else f"{fill:.2%}"))
    store = f"{given['documents']:,} documents in {given['shards'] or 'no'} shards"
    title = f"Steps of {given['global_batch']} x {given['seq_len']} tokens, {store}, on one core"
    report = Report("reading", [Table(title, ("packing", "M tokens/s", "fill"), tuple(rows)), _order(given, replayed)])
    report.results.append({"rates": rates, "replayed": replayed})
    for name, found in rates.items():
        report.target(f"{name}, tokens/s on one core", statistics.median(found), at_least=1e6)
    for name in ("best_fit", "chats"):
        report.target(f"fill of {name}", datasets[name].fill, at_least=0.98)
    return report


def _order(given: dict[str, Any], replayed: float) -> Table:
    from trinity.data.shuffle import permutation

    places = np.arange(1_000_000)
    seconds, _ = _timed(lambda: len(permutation(ORDER, [0, 0])[places]))
    tracemalloc.start()
    permutation(ORDER, [0, 0])[places[: given["global_batch"]]]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows = (
        (f"order of {ORDER:,} sequences: indices per second", len(places) / seconds),
        ("the same: memory to look up those of a step, KiB", peak / 1024),
        ("rsdb: sequences of a slot replayed per second", replayed),
    )
    return Table("Orders", ("what", "value"), rows)
