"""`trinity bench decode` of models in bf16, of which one machine holds one at a time: a process for each turn of an arm.

Decisions: arms take turns, and change who begins; a turn's process says when it is loaded, warms up, and runs all sizes.
Loading counts from the start of the process to its word, and in nothing else. In bf16 two programs' tokens part at near ties,
of which random weights in many layers have many: ours must be among transformers' NUM_LIKELY likeliest first tokens (of Nano's
200,192) at least half the time. Of one request the share of the memory's
speed is told: bytes of all matrices that a token is multiplied with and of the keys and values it sees, per second, over the
best of several loops that only read (memory_speed.py), in the same process right after.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trinity.bench import models
from trinity.bench.load import written
from trinity.bench.models import HERE, NUM_LIKELY, TRANSFORMERS
from trinity.bench.process import Child
from trinity.bench.process import say as tell_parent
from trinity.bench.report import Report, Table, ratio
from trinity.config import EngineConfig, ModelConfig
from trinity.errors import ConfigError
from trinity.utils.machine import meminfo
from trinity.utils.terminal import say
from trinity.utils.units import size as bytes_text


class Size(NamedTuple):
    requests: int
    prompt_len: int
    new_tokens: int

    @property
    def name(self) -> str:
        return f"{self.requests} x {self.prompt_len:,}"


USUAL = (Size(1, 32, 25), Size(8, 32, 13), Size(32, 32, 9), Size(1, 2048, 2))
QUICK = (Size(1, 8, 4), Size(4, 8, 3))
WARM_UP = Size(4, 8, 3)
ROLES_OF = {HERE: "engine", TRANSFORMERS: "generate"}
KV_BYTES = 1 << 30
LEAST_LIKELY = 0.5  # of first tokens; by chance it would be 0.0001
DECODE, PREFILL, LOADING = "decode, tokens/s, {} at once", "prefill, tokens/s, {}", "loading, 1/s"
TARGETS = {DECODE.format(requests): 3.0 for requests in (1, 8, 32)}  # of Nano whole, over transformers
TARGETS |= {PREFILL.format(size): 1.5 for size in ("8 x 32", "32 x 32", "1 x 2,048")} | {LOADING: 1.0}
LEAST_SHARE = 0.7
Turn = dict[str, Any]  # load_s; of each size first_s, decode_s, num_decoded, tokens; and of ours bytes_per_s


def measure(given: argparse.Namespace) -> Report:
    model, sizes = models.shape(given.preset, given.layers), QUICK if given.quick else USUAL
    path = Path(given.out) / f"{given.preset}-{model.num_hidden_layers}-random"
    num_bytes = written(model, path)
    check_room(num_bytes)
    arms = [name for name in ROLES_OF if name not in given.without]
    turns: dict[str, list[Turn]] = {name: [] for name in arms}
    for number in range(given.rounds):
        for name in arms if number % 2 == 0 else reversed(arms):
            turns[name].append(turn(ROLES_OF[name], path, given.threads, sizes))
            say(f"  {name}: {_summary(turns[name][-1], sizes)}")
    return report(given, model, sizes, turns)


def check_room(num_bytes: int) -> None:
    """Raise ConfigError where the weights and some more would not fit into the memory that is free."""
    wanted, free = int(num_bytes * 1.05) + KV_BYTES, meminfo().get("MemAvailable", sys.maxsize)
    if wanted > free:
        raise ConfigError(
            f"weights and cache take {bytes_text(wanted)}, and {bytes_text(free)} of memory are free: "
            "end what else runs here, or take fewer of the layers (--layers)"
        )


def turn(role: str, path: Path, threads: int, sizes: Sequence[Size]) -> Turn:
    begun_s = time.perf_counter()
    child = Child(role=role, path=str(path), threads=threads, sizes=sizes)
    try:
        child.hear()
        load_s = time.perf_counter() - begun_s
        return {"load_s": load_s, **child.hear()}
    finally:
        child.close()


# -- the processes


def engine(path: str, threads: int, sizes: list[list[int]]) -> None:
    """The role `engine` of process.py."""
    from trinity.bench.decode import Ours
    from trinity.bench.memory_speed import best_read_speed
    from trinity.llm import LLM

    wanted = [Size(*each) for each in sizes]
    most = max(each.requests for each in (*wanted, WARM_UP))
    settings = EngineConfig(
        num_threads=threads, max_num_seqs=most, kv_cache_bytes=KV_BYTES, max_draft_tokens=0,
        max_num_batched_tokens=max(each.requests * each.prompt_len for each in (*wanted, WARM_UP)),
        max_model_len=max(each.prompt_len + each.new_tokens for each in (*wanted, WARM_UP)),
    )  # fmt: skip
    llm = LLM(path, engine=settings, device="cpu")
    tell_parent(ready=True)
    found = _run_all(Ours(llm.engine), llm.engine.config, wanted)
    tell_parent(runs=found, bytes_per_s=best_read_speed(threads))
    sys.stdin.read()


def generate(path: str, threads: int, sizes: list[list[int]]) -> None:
    """The role `generate` of process.py."""
    import torch

    from trinity.bench.decode import Theirs
    from trinity.checkpoint import open_checkpoint

    torch.set_num_threads(threads)
    theirs = Theirs(Path(path), "bfloat16")
    tell_parent(ready=True)
    model, wanted = open_checkpoint(path).config, [Size(*each) for each in sizes]
    tell_parent(runs=_run_all(theirs, model, wanted, lambda: {"likely": theirs.likely_BN}))
    sys.stdin.read()


ROLES = {"engine": engine, "generate": generate}


def _run_all(
    program: Any, model: ModelConfig, sizes: Sequence[Size], seen: Callable[[], dict[str, Any]] = dict
) -> list[dict[str, Any]]:
    runs = []
    for each in (WARM_UP, *sizes):
        run = program.run(models.random_ids(model, each.requests, each.prompt_len), each.new_tokens)
        runs.append({**run._asdict(), **seen()})
    return runs[1:]


# -- the report


def report(
    given: argparse.Namespace, model: ModelConfig, sizes: Sequence[Size], turns: Mapping[str, list[Turn]]
) -> Report:
    is_nano = given.preset == "nano" and not given.layers
    made = Report("decode", results=[{"arm": name, "turns": found} for name, found in turns.items()])
    rates = {name: [_rates(each, sizes) for each in found] for name, found in turns.items()}
    by_row = {what: {name: [each[what] for each in found] for name, found in rates.items()}
              for what in next(iter(rates.values()))[0]}  # fmt: skip
    if is_nano and len(turns) == len(ROLES_OF):
        for what, bound in TARGETS.items():
            made.target(f"{what}: {HERE} / {TRANSFORMERS}", ratio(*by_row[what].values()), at_least=bound)
    rows = [_row(what, found) for what, found in by_row.items()]
    title = (
        f"{given.preset}, {model.num_hidden_layers} layers, bf16, {given.threads} threads, {given.rounds} turns of each"
    )
    made.tables.append(Table(title, ("what", *turns, f"/ {TRANSFORMERS}", "of turns, least and most"), tuple(rows)))
    if HERE in turns:
        share, table = _bandwidth(model, sizes[0], turns[HERE])
        made.tables.append(table)
        if is_nano:
            made.target("1 request: share of the memory's speed", share, at_least=LEAST_SHARE)
    if len(turns) == len(ROLES_OF):
        _compare_tokens(made, turns)
    return made


def _rates(found: Turn, sizes: Sequence[Size]) -> dict[str, float]:
    """More is better: tokens per second of each size, and loadings per second."""
    rates = {}
    for each, run in zip(sizes, found["runs"], strict=True):
        if each.new_tokens > 2:
            rates[DECODE.format(each.requests)] = run["num_decoded"] / run["decode_s"]
        rates[PREFILL.format(each.name)] = each.requests * each.prompt_len / run["first_s"]
    return {**rates, LOADING: 1 / found["load_s"]}


def _row(what: str, found: Mapping[str, list[float]]) -> tuple[Any, ...]:
    medians = [statistics.median(values) for values in found.values()]
    if len(found) < len(ROLES_OF):
        return what, *medians, "", ""
    ratios = [ours / theirs for ours, theirs in zip(found[HERE], found[TRANSFORMERS], strict=True)]
    return what, *medians, ratio(*found.values()), f"{min(ratios):.3g}, {max(ratios):.3g}"


def token_bytes(model: ModelConfig, num_seen: float) -> tuple[int, int]:
    """Bytes that are read to decode one token alone: of matrices, and of keys and values."""
    from trinity.models.registry import family_of

    weights = family_of(model).count_params(model).multiplied * model.itemsize
    kept = sum(
        cache.token_bytes(model.itemsize) * min(num_seen, cache.window or num_seen) for cache in model.layer_caches
    )
    return weights, int(kept)


def _bandwidth(model: ModelConfig, one: Size, turns: Sequence[Turn]) -> tuple[float, Table]:
    """Share of the memory's speed of single requests, the first size, and how it comes about."""
    weights, kept = token_bytes(model, one.prompt_len + one.new_tokens / 2)
    steps_s = [found["runs"][0]["decode_s"] / (one.new_tokens - 1) for found in turns]
    shares = [(weights + kept) / step_s / found["bytes_per_s"] for step_s, found in zip(steps_s, turns, strict=True)]
    share = statistics.median(shares)
    rows = (
        ("bytes of matrices a token, GB", weights / 1e9),
        ("of keys and values, GB", kept / 1e9),
        ("ms a token", 1e3 * statistics.median(steps_s)),
        ("best reading loop, GB/s", statistics.median(found["bytes_per_s"] for found in turns) / 1e9),
        ("share of it", share),
    )
    return share, Table("One request and the memory", ("what", "median"), rows)


def _compare_tokens(made: Report, turns: Mapping[str, list[Turn]]) -> None:
    """First tokens of all requests of the first turns."""
    firsts = [[row[0] for run in found[0]["runs"] for row in run["tokens"]] for found in turns.values()]
    likely = [likely_N for run in turns[TRANSFORMERS][0]["runs"] for likely_N in run["likely"]]
    same, num = sum(a == b for a, b in zip(*firsts, strict=True)), len(likely)
    near = sum(token in likely_N for token, likely_N in zip(firsts[list(turns).index(HERE)], likely, strict=True))
    columns = ("requests", "same", f"among {TRANSFORMERS}' {NUM_LIKELY} likeliest")
    made.tables.append(Table("First tokens", columns, ((num, same, near),)))
    if near < LEAST_LIKELY * num:
        made.failure = (
            f"{near} of {num} first tokens are among {TRANSFORMERS}' {NUM_LIKELY} likeliest: times mean nothing"
        )


def _summary(found: Turn, sizes: Sequence[Size]) -> str:
    rates = ", ".join(f"{what} {rate:.3g}" for what, rate in _rates(found, sizes).items() if what[0] != "l")
    return f"loaded in {found['load_s']:.1f} s; {rates}"
