"""`trinity bench serve --with-training`: what requests and training cost each other on one pool of shards.

One private Ray, one training run whose live weights are served, three arms that take turns: requests while training pauses,
training without requests, both. Decisions: the load is open (open_load.py), the same in both arms that have it; latencies are
compared round by round, and so is the rate of training, counted from the end of one step to the end of another within an arm.
"""

import argparse
import asyncio
import os
import re
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from trinity.bench import models
from trinity.bench.report import Curve, Report, Table
from trinity.config import Config, merge, num_cpus, parse_flags, setup_environment
from trinity.errors import TrinityError
from trinity.utils.terminal import say

USUAL: dict[str, Any] = {"preset": "tiny", "rounds": 5, "request_rate": [1.0], "num_prompts": 12}
USUAL |= {"input_len": 64, "output_len": 32, "max_concurrency": None, "url": None}
SIZES: dict[str, Any] = {
    "tiny": {"seq_len": 256, "micro_batch_size": 4, "global_batch_size": 4},
    "bench": {"seq_len": 256, "micro_batch_size": 2, "global_batch_size": 2},
}
QUICK: dict[str, Any] = {"rounds": 1, "request_rate": [20.0], "num_prompts": 4, "input_len": 8, "output_len": 4}
POLL_S, SETTLE_STEPS = 0.02, 2
REQUESTS, TRAINING, BOTH = "requests alone", "training alone", "both"
FIGURES = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")
MAX_P99_RATIO, MIN_TRAINING_SHARE = 1.2, 0.76


def flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--with-training",
        action="store_true",
        help="instead of URL: serve a run while it trains, and each alone, in turns",
    )
    add("--preset", help=f"with --with-training: the model (default: {USUAL['preset']})")
    add("--rounds", type=int, help=f"with --with-training: turns of each arm (default: {USUAL['rounds']})")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="with --with-training: a setting of the run, such as "
        "placement.niceness=0")  # fmt: skip


class Steps:
    """Times at which steps of the run ended, from its log. Its thread ends with the process, or by `stop`."""

    def __init__(self, log: Path):
        from trinity.observability.follow import Follower

        self._follower = Follower(log)
        self._ended_s: list[float] = []
        self._stopped = threading.Event()
        threading.Thread(target=self._follow, name="trinity-steps", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _follow(self) -> None:
        while not self._stopped.wait(POLL_S):
            self._ended_s += [time.monotonic() for row in self._follower.new_rows() if "loss" in row]

    def after(self, since_s: float) -> list[float]:
        return [at for at in self._ended_s if at > since_s]

    def wait_for(self, num: int, since_s: float) -> None:
        while len(self.after(since_s)) < num:
            time.sleep(POLL_S)

    def wait_for_rest(self) -> None:
        """Wait until no step has ended for longer than the longest of the last ones took."""
        gaps = [b - a for a, b in zip(self._ended_s[-4:], self._ended_s[-3:], strict=False)]
        while time.monotonic() - self._ended_s[-1] < 1.5 * max(gaps):
            time.sleep(POLL_S)

    def per_second(self, since_s: float) -> float:
        """Rate from the end of the first step since then to the end of the last one."""
        ended = self.after(since_s)
        return (len(ended) - 1) / (ended[-1] - ended[0])


class Rounds:
    """The three arms, one after the other, against one server. `found[arm]` has a dict of figures for each round."""

    def __init__(self, arguments: argparse.Namespace, config: Config, url: str):
        from actors.train import PAUSE

        self.arguments, self.url = arguments, url
        self._tokens = config.train.global_batch_size * config.train.seq_len
        self._pause = Path(config.train.out_dir, PAUSE)
        self.steps = Steps(Path(config.train.out_dir, "metrics.jsonl"))
        self.found: dict[str, list[dict[str, Any]]] = {REQUESTS: [], TRAINING: [], BOTH: []}

    async def run(self) -> None:
        from trinity.bench.clients import Ask, http_client

        async with http_client(Ask(self.url)) as client:
            card = await client.card()
            await self._offer(client, card)  # warm-up
            await asyncio.to_thread(self.steps.wait_for, 2, 0.0)
            for number in range(self.arguments.rounds):
                for arm in self._turns(number):
                    self.found[arm].append(await self._arm(arm, client, card))
                    say(f"round {number + 1}, {arm}: " + _short(self.found[arm][-1]))
        self.steps.stop()

    def _turns(self, number: int) -> list[str]:
        """Every other round backwards: what drifts, drifts both ways."""
        arms = list(self.found)
        return arms[::-1] if number % 2 else arms

    async def _arm(self, arm: str, client: Any, card: Any) -> dict[str, Any]:
        await asyncio.to_thread(self._settle, arm)
        since_s, cpu_s = time.monotonic(), tree_cpu_s(os.getpid())
        found: dict[str, Any] = {} if arm == TRAINING else await self._offer(client, card)
        if arm == TRAINING:
            await asyncio.sleep(self._duration_s)
        found["cores"] = (tree_cpu_s(os.getpid()) - cpu_s) / (time.monotonic() - since_s)
        if arm != REQUESTS:
            await asyncio.to_thread(self.steps.wait_for, 2, since_s)
            found["training_tokens_per_s"] = self._tokens * self.steps.per_second(since_s)
        if arm == BOTH:
            found |= {
                "switch_seconds": await _switch_s(client),
                "versions": await _versions(client, card, self.arguments),
            }
        return found

    def _settle(self, arm: str) -> None:
        """Training pauses, or goes on."""
        if arm == REQUESTS:
            self._pause.touch()
            self.steps.wait_for_rest()
        else:
            self._pause.unlink(missing_ok=True)
            self.steps.wait_for(SETTLE_STEPS, time.monotonic())

    @property
    def _duration_s(self) -> float:
        return float(self.arguments.num_prompts / self.arguments.request_rate[0])

    async def _offer(self, client: Any, card: Any) -> dict[str, Any]:
        from trinity.bench import serve

        return await serve.one_load(client, card, self.arguments, self.arguments.request_rate[0])


def tree_cpu_s(root: int) -> float:
    """CPU seconds so far of a process and all that descend from it and live."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(stat.parent.name)], used[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:13]))
    tree = [root]
    for pid in tree:
        tree += [child for child, parent in parents.items() if parent == pid]
    return sum(used.get(pid, 0) for pid in tree) / os.sysconf("SC_CLK_TCK")


async def _switch_s(client: Any) -> float:
    """The time the engine took to take up the version in use."""
    text = (await client.http.get("/metrics")).text
    found = re.search(r"^trinity_weights_switch_seconds (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else float("nan")


async def _versions(client: Any, card: Any, arguments: argparse.Namespace) -> int:
    """Number of versions that one answer of the load's size is computed with."""
    prompt = [i % card.vocab_size for i in range(20, 20 + arguments.input_len)]
    body = {"model": card.model, "prompt": prompt, "max_tokens": arguments.output_len, "ignore_eos": True}
    answer = (await client.http.post("/v1/completions", json=body)).raise_for_status().json()
    used = answer["choices"][0]["weights_versions"]
    return int(used["last"] - used["first"] + 1)


def measure(arguments: argparse.Namespace) -> Report:
    given = models.filled(arguments, USUAL, {**USUAL, **QUICK})
    with tempfile.TemporaryDirectory(prefix="trinity-bench-") as folder:
        config = config_of(given, folder)
        found = _served(given, config).found
    return report_of(given, config, found)


def config_of(given: argparse.Namespace, folder: str) -> Config:
    """A run without end, on Python's standard library."""
    train = {"out_dir": folder, "steps": 1_000_000, "eval_every": 0, "eval_sequences": 0, **SIZES.get(given.preset, {})}
    own = {"train": train, "data": {"max_documents": 100}, "placement": {"pool": "bench"}}
    own["serve"] = {"http_port": 0, "grpc_port": 0, "weights": "live"}
    own["model"] = {"preset": given.preset, "dtype": "float32"}
    return Config.from_tree(merge(own, parse_flags([f"--{each}" for each in given.set])))


def _served(given: argparse.Namespace, config: Config) -> Rounds:
    """Train and serve until all rounds have been made. Raises what ended them."""
    setup_environment(config.cluster.auth)
    from actors import pool as pools
    from actors.cluster import joined
    from actors.train import STOP
    from trinity.launch import train

    outcome: list[Rounds | BaseException] = []

    def rounds(http_url: str, grpc_address: str) -> None:
        try:
            made = Rounds(given, config, http_url)
            asyncio.run(made.run())
            outcome.append(made)
        except BaseException as error:
            outcome.append(error)
        finally:
            Path(config.train.out_dir, STOP).touch()

    with joined(config.cluster, config.train):
        try:
            train(config, rounds)
        finally:
            pools.destroy(config.placement.pool, config.cluster.namespace, config.placement.memory_dir)
    if not outcome:
        raise TrinityError("training ended before the server answered; what it said is above")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def report_of(given: argparse.Namespace, config: Config, found: dict[str, list[dict[str, Any]]]) -> Report:
    report = Report("serve-with-training", results=[{"arm": arm, "rounds": rounds} for arm, rounds in found.items()])
    ratios = {name: _ratios(found[BOTH], found[REQUESTS], name) for name in FIGURES}
    shares = _ratios(found[BOTH], found[TRAINING], "training_tokens_per_s")
    cores = _ratios(found[BOTH], found[TRAINING], "cores")
    report.tables.append(_table(given, config, found, {**ratios, "training_tokens_per_s": shares, "cores": cores}))
    both = found[BOTH]
    facts = [
        (
            "requests failed, of",
            f"{sum(r['failed'] for r in (*both, *found[REQUESTS]))} of {2 * given.num_prompts * given.rounds}",
        ),
        ("versions that computed one answer, median", statistics.median(r["versions"] for r in both)),
        ("ms to take up a version, median", 1000 * statistics.median(r["switch_seconds"] for r in both)),
    ]
    report.tables.append(Table("With both", ("", "value"), tuple(facts)))
    report.curves.append(_picture(ratios, shares))
    for name in ("p99_ttft_ms", "p99_itl_ms"):
        report.target(f"{name}, both / {REQUESTS}", statistics.median(ratios[name]), at_most=MAX_P99_RATIO)
    report.target(f"training, both / {TRAINING}", statistics.median(shares), at_least=MIN_TRAINING_SHARE)
    return report


def _ratios(over: list[dict[str, Any]], under: list[dict[str, Any]], name: str) -> list[float]:
    """Round by round."""
    return [a[name] / b[name] for a, b in zip(over, under, strict=True)]


def _table(
    given: argparse.Namespace, config: Config, found: dict[str, list[dict[str, Any]]], ratios: dict[str, list[float]]
) -> Table:
    rows = []
    for name, each in ratios.items():
        medians = [_median(found[arm], name) for arm in (REQUESTS, TRAINING, BOTH)]
        rows.append((name, *medians, statistics.median(each), min(each), max(each)))
    load = f"{given.request_rate[0]:g} requests/s, {given.input_len} tokens in, {given.output_len} out"
    step = f"steps of {config.train.global_batch_size * config.train.seq_len:,} tokens"
    size = f"{given.rounds} rounds of {given.num_prompts} requests"
    title = f"Preset {given.preset} on {num_cpus()} cores: {load}, {step}, {size}"
    return Table(title, ("medians", REQUESTS, TRAINING, BOTH, "both / alone", "min", "max"), tuple(rows))


def _median(rounds: list[dict[str, Any]], name: str) -> float | str:
    there = [found[name] for found in rounds if name in found]
    return statistics.median(there) if there else "-"


def _picture(ratios: dict[str, list[float]], shares: list[float]) -> Curve:
    lines = {
        name.removesuffix("_ms").replace("median", "p50").replace("_", " "): tuple(each)
        for name, each in ratios.items()
    }
    lines["training tokens/s"] = tuple(shares)
    return Curve("Both at once / alone", "round", "ratio", tuple(range(1, len(shares) + 1)), lines)


def _short(found: dict[str, Any]) -> str:
    names = (*FIGURES, "training_tokens_per_s", "cores", "failed", "versions")
    return ", ".join(f"{name} {found[name]:,.1f}" for name in names if name in found)
