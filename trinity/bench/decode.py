"""`trinity bench decode`: tokens per second of many requests at once, our engine in one process and with shard actors, and
transformers' `generate`.

Legend: B requests, N new tokens, V vocabulary.
Decisions: every arm has the same checkpoint and prompts, decodes greedily and ignores the end-of-text token; no time counts
before all arms have said the same tokens. Decoding is timed from the moment when every request has its first token to the
last token of all; the figures from start to end, with the prompts, stand beside it. Arms take turns. Models in bf16, which
two programs cannot both hold, are compared by processes that take turns: apart.py.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity.bench import models
from trinity.bench.models import ACTORS, HERE, NUM_LIKELY, NUM_SHARDS, TRANSFORMERS, Split, actor_arm
from trinity.bench.report import Curve, Report, Table, alternated, ratio
from trinity.config import EngineConfig, ModelConfig, preset
from trinity.errors import TrinityError
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from trinity.engine.engine import Engine

USUAL: dict[str, Any] = {
    "preset": "bench",
    "layers": None,
    "splits": (Split(2, 1), Split(1, 1), Split(2, 2)),
    "rounds": 3,
}
USUAL |= {
    "prompt_len": 64,
    "new_tokens": 128,
    "concurrency": 32,
    "requests": (1, 4, 16, 64, 256),
    "shards": (1, 2, 4, 8),
}
QUICK: dict[str, Any] = {"preset": "tiny", "layers": None, "splits": (Split(1, 1),), "rounds": 1}
QUICK |= {"prompt_len": 8, "new_tokens": 6, "concurrency": 4, "requests": (1, 4), "shards": (1, 2)}
CURVE_PROMPT, CURVE_TOKENS = 8, 9
FREE = f"{HERE}, batch_invariant false"
TIE = 1e-4  # logits of transformers' two best tokens that are as close as this have no order


def flags(parser: argparse.ArgumentParser) -> None:
    models.flags(parser, USUAL)
    for name, text in (("prompt-len", "tokens of a prompt"), ("new-tokens", "tokens to generate for each"),
                       ("concurrency", "requests at once")):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, help=f"{text} (default: {USUAL[name.replace('-', '_')]})")
    parser.add_argument("--requests", type=models.numbers, metavar="N,…", help="for the curve over requests "
                        f"(default: {USUAL['requests']})")  # fmt: skip
    parser.add_argument("--apart", action="store_true", help="in bf16, by a process for each turn of an arm: as presets "
                        "in bf16 are in any case")  # fmt: skip
    parser.add_argument("--families", action="store_true", help="instead: the gain over transformers in each family of "
                        "models, in processor time")  # fmt: skip
    parser.add_argument("--layers", type=int, help="with --apart: take so many of the preset's layers")
    parser.add_argument("--shards", type=models.numbers, metavar="N,…", help="for the curve over shards "
                        f"(default: {USUAL['shards']})")  # fmt: skip


class Run(NamedTuple):
    """Tokens [B][N]; seconds until every request had its first token, and from there to the end; tokens of the latter."""

    tokens: list[list[int]]
    first_s: float
    decode_s: float
    num_decoded: int

    @property
    def decode_rate(self) -> float:
        return self.num_decoded / self.decode_s

    @property
    def whole_rate(self) -> float:
        return sum(map(len, self.tokens)) / (self.first_s + self.decode_s)


class Ours:
    """An engine, driven until all its requests are done. `clock`: seconds, of what is to be counted."""

    def __init__(self, engine: "Engine", clock: Callable[[], float] = time.perf_counter):
        self.engine, self.clock = engine, clock

    def run(self, prompts: Sequence[Sequence[int]], num_new: int) -> Run:
        from trinity.engine.request import SamplingParams

        params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
        tokens: list[list[int]] = [[] for _ in prompts]
        started, first = self.clock(), 0.0
        for i, prompt in enumerate(prompts):
            self.engine.add(str(i), prompt, params)
        while self.engine.has_work:
            self._step(tokens)
            if not first and all(tokens):
                first, num_first = self.clock(), sum(map(len, tokens))
        ended = self.clock()
        return Run(tokens, first - started, ended - first, sum(map(len, tokens)) - num_first)

    def _step(self, tokens: list[list[int]]) -> None:
        for delta in self.engine.step():
            if delta.finish_reason == "error":
                raise delta.cause or TrinityError(delta.error or "a request failed")
            tokens[int(delta.request_id)] += delta.token_ids


class Theirs:
    """transformers' `generate` over all prompts as one batch. Of a run with `look`, `gaps_NB` tells how far apart the two
    best logits of each step were; of the last run, `likely_BN` has the likeliest first tokens."""

    def __init__(self, path: Path, dtype: str = "float32", clock: Callable[[], float] = time.perf_counter):
        self.model, self.clock = models.twin(path, dtype).eval(), clock
        self.gaps_NB: list[list[float]] = []
        self.likely_BN: list[list[int]] = []

    def run(self, prompts: Sequence[Sequence[int]], num_new: int, look: bool = False) -> Run:
        import torch

        ids_BP, stamps = torch.tensor(prompts), list[float]()

        def processor(ids: "Tensor", logits_BV: "Tensor") -> "Tensor":
            stamps.append(self.clock())
            if len(stamps) == 1:
                self.likely_BN = logits_BV.topk(NUM_LIKELY).indices.tolist()
            if look:
                best_B2 = logits_BV.topk(2).values
                self.gaps_NB.append((best_B2[:, 0] - best_B2[:, 1]).tolist())
            return logits_BV

        started = self.clock()
        with torch.inference_mode():
            options = {"do_sample": False, "max_new_tokens": num_new, "logits_processor": [processor]}
            found = self.model.generate(ids_BP, attention_mask=torch.ones_like(ids_BP), pad_token_id=0, **options)
        ended = self.clock()
        tokens = found[:, ids_BP.shape[1] :].tolist()
        return Run(tokens, stamps[0] - started, ended - stamps[0], len(prompts) * (num_new - 1))


@dataclass
class Race:
    """Arms by name, and the runs that each of them has made."""

    runs: dict[str, Callable[[], float]] = field(default_factory=dict)
    found: dict[str, list[Run]] = field(default_factory=dict)

    def add(self, name: str, threads: int, run: Callable[[], Run]) -> None:
        self.found[name] = []
        self.runs[name] = partial(self._run, name, threads, run)

    def _run(self, name: str, threads: int, run: Callable[[], Run]) -> float:
        """-> tokens per second of decoding."""
        import torch

        torch.set_num_threads(threads)
        self.found[name].append(run())
        return self.found[name][-1].decode_rate

    def median(self, name: str, value: Callable[[Run], float]) -> float:
        return statistics.median(map(value, self.found[name]))


class Bench:
    """One run of the bench: its flags, model, checkpoint and prompts, and the report that grows."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.report = given, Report("decode")
        self.model: ModelConfig = models.config_of(given.preset).model
        self.path = models.checkpoint(self.model, Path(given.out) / f"{given.preset}-float32")
        self.prompts = models.random_ids(self.model, given.concurrency, given.prompt_len)
        self.has_actors = "actors" not in given.without
        self.splits: list[tuple[Any, ...]] = []

    def ours(self, experts: Any = None, num_shards: int = 1) -> Ours:
        from trinity.llm import LLM

        settings = self.settings()
        return Ours(LLM(self.path, engine=settings, experts=experts, num_shards=num_shards, device="cpu").engine)

    def free(self) -> Ours:
        """An engine of the same checkpoint without `batch_invariant`: attention and backbone are the libraries' own."""
        from trinity.checkpoint import open_checkpoint
        from trinity.engine.engine import Engine
        from trinity.engine.weights import FixedWeights
        from trinity.models.registry import build
        from trinity.pool.local import local_pool
        from trinity.rpc.messages import Load

        config, checkpoint = self.model.model_copy(update={"batch_invariant": False}), open_checkpoint(self.path)
        pool = local_pool(config, Load(str(self.path), training=False))
        model = build(config, pool.dispatcher(checkpoint.version)).eval()
        checkpoint.load_backbone(model)
        weights = FixedWeights(model, checkpoint.version)
        return Ours(Engine(weights, config, self.settings(), checkpoint.tokenizer))

    def settings(self) -> EngineConfig:
        """Room for the largest number of requests; all prompts of a race fit in one pass."""
        given, most = self.given, max(self.given.concurrency, *self.given.requests)
        return EngineConfig(
            num_threads=given.threads,
            max_num_seqs=most,
            max_num_batched_tokens=max(given.concurrency * given.prompt_len, most * CURVE_PROMPT),
            max_model_len=max(given.prompt_len + given.new_tokens, CURVE_PROMPT + CURVE_TOKENS),
            kv_cache_bytes=1 << 30,
            max_draft_tokens=0,  # random weights repeat themselves: speculation.py
        )

    @contextmanager
    def actors(self, shard_threads: int, num_shards: int = NUM_SHARDS) -> Iterator[Ours]:
        """An engine here, with its experts in shard actors."""
        from trinity.rpc.messages import Load

        with models.shard_actors(self.model, shard_threads, num_shards) as pool:
            version = pool.load(Load(str(self.path.resolve()), training=False))
            yield self.ours(pool.dispatcher(version))

    # -- the race

    def compare(self, here: Ours) -> None:
        """The race with the first split, then all splits against one process."""
        given = self.given
        if not self.has_actors:
            self._race({HERE: (given.threads, here), **self._extra()})
            self._over_requests({HERE: (given.threads, here)})
        for shard_threads, splits in models.by_shard_threads(given.splits if self.has_actors else ()).items():
            with self.actors(shard_threads) as actors:
                arms = {HERE: (given.threads, here), **{actor_arm(split): (split.backbone, actors) for split in splits}}
                if given.splits[0] in splits:
                    main = {name: arms[name] for name in (HERE, actor_arm(given.splits[0]))}
                    self._race({**main, **self._extra()})
                    self._over_requests(main)
                if len(given.splits) > 1:
                    self._compare_splits(arms)
        if self.splits:
            columns = ("arm", "tokens/s median", "min", "max", f"/ {HERE}")
            self.report.tables.append(Table("Threads of backbone : shard", columns, tuple(self.splits)))

    def _extra(self) -> dict[str, tuple[int, Ours]]:
        return {} if "free" in self.given.without else {FREE: (self.given.threads, self.free())}

    def _race(self, arms: Mapping[str, tuple[int, Ours]]) -> None:
        given, race = self.given, Race()
        for name, (threads, ours) in arms.items():
            race.add(name, threads, partial(ours.run, self.prompts, given.new_tokens))
        if "transformers" not in given.without:
            theirs = Theirs(self.path)
            self._check(race, theirs)
            race.add(TRANSFORMERS, given.threads, partial(theirs.run, self.prompts, given.new_tokens))
        say(f"timing {', '.join(race.runs)}")
        rates = alternated(race.runs, given.rounds, warmup=int("transformers" in given.without))
        models.tell(rates)
        self._tell(race, rates)
        self._hold(rates)

    def _check(self, race: Race, theirs: Theirs) -> None:
        """Every arm's tokens against transformers'. The report fails unless they are the same, but for ties."""
        say("comparing tokens with transformers'")
        oracle, rows = theirs.run(self.prompts, self.given.new_tokens, look=True).tokens, []
        for name, run in race.runs.items():
            run()
            same, ties, other = agreement(race.found[name][-1].tokens, oracle, theirs.gaps_NB)
            rows.append((name, same, len(ties), len(other), "; ".join(ties + other)))
            if other:
                self.report.failure = (
                    f"{name!r} and transformers' greedy tokens differ in {len(other)} of {len(oracle)} requests beyond "
                    f"ties of {TIE}, first {other[0]}: times mean nothing"
                )
        title = f"Greedy tokens against transformers': {len(oracle)} requests of {self.given.new_tokens} tokens"
        self.report.tables.append(Table(title, ("arm", "identical", "ties", "different", "where"), tuple(rows)))

    def _compare_splits(self, arms: Mapping[str, tuple[int, Ours]]) -> None:
        say(f"timing {', '.join(arms)}")
        race, num_new = Race(), max(2, self.given.new_tokens // 8)
        for name, (threads, ours) in arms.items():
            race.add(name, threads, partial(ours.run, self.prompts, num_new))
        rates = alternated(race.runs, self.given.rounds)
        models.tell(rates)
        for name, found in rates.items():
            self.splits.append((name, statistics.median(found), min(found), max(found), ratio(found, rates[HERE])))

    def _tell(self, race: Race, rates: Mapping[str, list[float]]) -> None:
        given, rows = self.given, []
        for name, found in rates.items():
            runs = race.found[name][-given.rounds :]
            parts = [statistics.median(values) for values in zip(*(_parts(run) for run in runs), strict=True)]
            rows.append((name, statistics.median(found), min(found), max(found), ratio(found, rates[HERE]), *parts))
        size = f"{given.concurrency} requests of {given.prompt_len} + {given.new_tokens} tokens"
        title = f"Decoding: preset {given.preset} in fp32, {size}, {given.threads} threads, {given.rounds} rounds"
        columns = ("arm", "tokens/s median", "min", "max", f"/ {HERE}", "ms a step", "prompts s", "tokens/s in all")
        self.report.tables.append(Table(title, columns, tuple(rows)))

    def _hold(self, rates: Mapping[str, list[float]]) -> None:
        """The targets are for preset `bench`."""
        if self.given.preset != "bench" or self.given.quick or TRANSFORMERS not in rates:
            return
        theirs, split = rates[TRANSFORMERS], actor_arm(self.given.splits[0])
        self.report.target(f"{HERE} / {TRANSFORMERS}", ratio(rates[HERE], theirs), at_least=4.0)
        if split in rates:
            self.report.target(f"{split} / {TRANSFORMERS}", ratio(rates[split], theirs), at_least=3.6)

    # -- the curves

    def _layer_ms(self, run: Run) -> float:
        return 1e3 * run.decode_s / (CURVE_TOKENS - 1) / self.model.num_hidden_layers

    def _times(self, arms: Mapping[str, tuple[int, Ours]], num_requests: int) -> dict[str, float]:
        """-> ms per layer of a decode step of so many requests, by arm."""
        race, prompts = Race(), models.random_ids(self.model, num_requests, CURVE_PROMPT)
        for name, (threads, ours) in arms.items():
            race.add(name, threads, partial(ours.run, prompts, CURVE_TOKENS))
        alternated(race.runs, self.given.rounds, warmup=0)
        return {name: race.median(name, self._layer_ms) for name in arms}

    def _over_requests(self, arms: Mapping[str, tuple[int, Ours]]) -> None:
        say(f"timing 1 to {self.given.requests[-1]} requests")
        found = [self._times(arms, n) for n in self.given.requests]
        self._draw("requests", self.given.requests, found, [float(n) for n in self.given.requests])

    def over_shards(self, here: Ours) -> None:
        """Shards in this process, and in actors, with the requests of the race."""
        given, found = self.given, []
        for n in given.shards:
            say(f"timing {n} shards")
            arms = {f"shards in {HERE}": (given.threads, here if n == 1 else self.ours(num_shards=n))}
            if not self.has_actors:
                found.append(self._times(arms, given.concurrency))
                continue
            with self.actors(given.splits[0].shard, n) as actors:
                arms[f"{ACTORS}, threads {given.splits[0]}"] = (given.splits[0].backbone, actors)
                found.append(self._times(arms, given.concurrency))
        self._draw("shards", given.shards, found, [rows_sent(self.model, n) for n in given.shards])

    def _draw(self, axis: str, x: Sequence[int], found: list[dict[str, float]], work: list[float]) -> None:
        """A curve, its table, and how its ends compare with the work's."""
        lines = {name: tuple(times[name] for times in found) for name in found[0]}
        title = f"Decode step, preset {self.given.preset}"
        self.report.curves.append(Curve(title, axis, "ms per layer", tuple(map(float, x)), lines))
        rows = tuple((n, *times.values(), share / work[0]) for n, times, share in zip(x, found, work, strict=True))
        what = "rows to compute" if axis == "requests" else "rows on their way"
        self.report.tables.append(Table(f"ms per layer of a decode step over {axis}", (axis, *lines, what), rows))
        if self.given.preset == "bench" and not self.given.quick and len(x) > 1:
            for name, times in lines.items():
                text = f"{name}: time's growth / work's growth, {x[0]} to {x[-1]} {axis}"
                self.report.target(text, times[-1] / times[0] / (work[-1] / work[0]), at_most=1.0)


def measure(arguments: argparse.Namespace) -> Report:
    given = models.filled(arguments, USUAL, QUICK)
    if given.families:
        from trinity.bench import families

        return families.measure(models.filled(arguments, {**USUAL, **families.USUAL}, {**QUICK, **families.QUICK}))
    if given.apart or preset(given.preset).dtype == "bfloat16":
        from trinity.bench import apart

        return apart.measure(given)
    with models.ray_joined("actors" not in given.without):
        bench = Bench(given)
        here = bench.ours()
        bench.compare(here)
        bench.over_shards(here)
    return bench.report


def _parts(run: Run) -> tuple[float, float, float]:
    """ms of a step, seconds for the prompts, tokens per second from start to end."""
    num_steps = max(map(len, run.tokens)) - 1
    return 1e3 * run.decode_s / num_steps, run.first_s, run.whole_rate


def agreement(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], gaps_NB: Sequence[Sequence[float]]
) -> tuple[int, list[str], list[str]]:
    """-> how many requests have the same tokens; those that part at a tie; those that part elsewhere."""
    same, ties, other = 0, list[str](), list[str]()
    for request, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        if list(mine) == list(yours):
            same += 1
            continue
        at = next(n for n, (a, b) in enumerate(zip(mine, yours, strict=True)) if a != b)
        gap = gaps_NB[at][request]
        (ties if gap < TIE else other).append(f"request {request} at token {at}: gap {gap:.1e}")
    return same, ties, other


def rows_sent(model: ModelConfig, num_shards: int) -> float:
    """Rows that travel for one token, on average: the shards that hold one of its K experts, drawn evenly."""
    from math import comb

    elsewhere = model.num_experts - model.num_experts // num_shards
    k = model.num_experts_per_tok
    return num_shards * (1.0 - comb(elsewhere, k) / comb(model.num_experts, k))
