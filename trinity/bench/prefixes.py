"""`trinity bench serve --prefixes`: what a prefix cache spares, and what it costs where nothing is spared.

One model with random weights, an engine with the cache and one without, which take turns at the same loads: conversations (each
turn begins with all that was said), prompts that begin with the same instructions, n continuations of one prompt, and prompts
that have nothing in common. Legend: P tokens of a beginning, T of a turn or of what differs.
Decisions: requests are asked in the engine's own process, `concurrency` at once, each conversation's next turn when it has its
answer, so that server and network do not blur it. Ids are drawn anew for each load and are the same in both arms, answers too
(arithmetic is exact), so that a wrong one would end the bench. The ideal is that of the trace: all of a prompt, but its last
token, that any earlier prompt and answer began with. Processor time is compared besides: it holds on a busy machine.
"""

import argparse
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity.bench.models import config_of
from trinity.bench.report import Report, Table, alternated, percentile, ratio
from trinity.config import EngineConfig, num_cpus
from trinity.errors import TrinityError
from trinity.utils.terminal import say

if TYPE_CHECKING:
    import numpy as np

    from trinity.engine.engine import Engine
    from trinity.engine.request import Delta

USUAL: dict[str, Any] = {"preset": "bench", "rounds": 3, "concurrency": 8, "input_len": 512, "output_len": 32}
QUICK: dict[str, Any] = {"preset": "tiny", "rounds": 1, "concurrency": 2, "input_len": 64, "output_len": 4}
TURNS, SHARING, SAMPLES = 5, 4, 8
CHAT, SHARED, DRAWN, ALONE = "conversations", "one beginning", "n = 8", "nothing in common"
ON, OFF = "cache on", "cache off"


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefixes",
        action="store_true",
        help="instead of URL: prompts that begin alike, with the prefix cache and without, in turns, in this process",
    )


@dataclass
class Talk:
    """A client's requests, one after the other; `grows`: each begins with the one before and its answer."""

    number: int
    parts: list[list[int]]
    grows: bool = False
    said: list[int] = field(default_factory=list)

    def next(self) -> list[int] | None:
        """-> the next prompt, None after the last one."""
        if not self.parts:
            return None
        part = self.parts.pop(0)
        self.said = [*self.said, *part] if self.grows else part
        return self.said


class Turn(NamedTuple):
    """Measurements of one arm at one load."""

    cpu_s: float
    seconds: float
    ttft_s: list[float]
    num_tokens: int
    num_computed: int
    hit_rate: float
    ideal: float
    answers: dict[str, list[int]]
    share: float = 1.0  # of requests, that the busier of several engines had


def noted(report: Report, load: str, found: dict[str, list[Turn]]) -> None:
    """Keep all turns at a load, but for their answers."""
    plain = {arm: [turn._replace(answers={})._asdict() for turn in turns] for arm, turns in found.items()}
    report.results.append({"load": load, **plain})


def measure(arguments: argparse.Namespace) -> Report:
    given = dict(QUICK if arguments.quick else USUAL)
    given |= {name: value for name, value in vars(arguments).items() if name in given and value is not None}
    report = Report("serve-prefixes")
    rows = []
    for load in (CHAT, SHARED, DRAWN, ALONE):
        say(f"{load}:")
        found = _alternated(load, given)
        rows += [_row(load, arm, turns) for arm, turns in found.items()]
        _compare(report, load, found)
        noted(report, load, found)
    columns = ("load", "arm", "TTFT p50 ms", "p99 ms", "tokens/s", "CPU s", "tokens computed", "hits %", "ideal %")
    size = f"Prompts of about {given['input_len']} tokens, {given['concurrency']} at once"
    title = f"{size}, preset {given['preset']}, on {num_cpus()} cores"
    report.tables.append(Table(title, columns, tuple(rows)))
    return report


def _alternated(load: str, given: dict[str, Any]) -> dict[str, list[Turn]]:
    """Each turn of an arm is an engine of its own, cold at first; `number` gives both arms the same prompts."""
    model = small_model(given["preset"], num_cpus())
    numbers = {arm: iter(range(given["rounds"] + 1)) for arm in (ON, OFF)}
    arms: dict[str, Callable[[], Turn]] = {
        arm: partial(_turn, load, model, given, arm == ON, numbers[arm]) for arm in numbers
    }
    found = alternated(arms, given["rounds"])
    for on, off in zip(found[ON], found[OFF], strict=True):
        if on.answers != off.answers:
            raise TrinityError("the same prompts have other answers with the prefix cache; this is a bug")
    return found


def small_model(preset: str, num_threads: int = 1) -> Any:
    """A preset's model with random weights in float32, and its experts beside it."""
    import torch

    from trinity.models.registry import build
    from trinity.pool.local import local_pool
    from trinity.rpc.messages import Load

    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    whole = config_of(preset).model
    config = whole.model_validate({**whole.model_dump(), "dtype": "float32"})
    return build(config, local_pool(config, Load(training=False)).dispatcher()).eval()


def _turn(load: str, model: Any, given: dict[str, Any], is_on: bool, numbers: Any) -> Turn:
    import numpy as np

    talks = talks_of(load, given, model.config.vocab_size, np.random.default_rng(next(numbers)))
    longest, at_once = 2 * given["input_len"] + TURNS * given["output_len"], given["concurrency"]
    engine = small_engine(model, longest, at_once, 8 * at_once, num_threads=num_cpus(), prefix_cache=is_on)
    cpu_s, started_s = time.process_time(), time.perf_counter()
    asked = Asked(engine, given)
    asked.run(talks)
    cpu_s, seconds = time.process_time() - cpu_s, time.perf_counter() - started_s
    stats = engine.stats()
    rate = stats.num_prefix_hits / max(1, stats.num_prefix_queries)
    best, num_tokens = ideal(asked.prompts, asked.answers), sum(map(len, asked.answers.values()))
    return Turn(cpu_s, seconds, asked.ttft_s, num_tokens, stats.num_computed_tokens, rate, best, asked.answers)


def small_engine(model: Any, longest: int, max_num_seqs: int, max_num_kept: int, **settings: Any) -> "Engine":
    """An engine over that model, with a tokenizer that nobody needs."""
    from trinity.engine.engine import Engine
    from trinity.engine.weights import FixedWeights
    from trinity.text.tokenizer import Tokenizer

    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_kept=max_num_kept,
        max_model_len=min(longest, model.config.max_position_embeddings),
        kv_cache_bytes=1 << 30,
        max_draft_tokens=0,  # random weights repeat themselves
        **settings,
    )
    tokenizer = Tokenizer.train(iter(["def f(x): return x + 1\n" * 50]), 320)
    return Engine(FixedWeights(model, 0), model.config, config, tokenizer)


def talks_of(load: str, given: dict[str, Any], vocab: int, rng: "np.random.Generator") -> list[Talk]:
    """Requests of each client. What differs is a fifth of a prompt."""
    whole, clients = given["input_len"], given["concurrency"]
    few = max(1, whole // TURNS)

    def drawn(num: int) -> list[int]:
        return list(map(int, rng.integers(vocab, size=num)))

    if load == CHAT:
        return [Talk(i, [drawn(few) for _ in range(TURNS)], grows=True) for i in range(clients)]
    if load == SHARED:
        system = drawn(whole - few)
        return [Talk(i, [[*system, *drawn(few)] for _ in range(SHARING)]) for i in range(clients)]
    if load == DRAWN:
        prompts = [drawn(whole) for _ in range(2)]
        return [Talk(i, [prompts[i // SAMPLES]]) for i in range(2 * SAMPLES)]
    return [Talk(i, [drawn(whole) for _ in range(2)]) for i in range(clients)]


class Asked:
    """Requests of all clients, so many at once; prompts and answers by client and turn."""

    def __init__(self, engine: "Engine", given: dict[str, Any]):
        self._engine, self._given = engine, given
        self._open: dict[str, Talk] = {}
        self._began_s: dict[str, float] = {}
        self.prompts: dict[str, list[int]] = {}
        self.answers: dict[str, list[int]] = {}
        self.ttft_s: list[float] = []

    def run(self, talks: Sequence[Talk]) -> None:
        later = deque(talks)
        while later or self._open:
            while later and len(self._open) < self._given["concurrency"]:
                self._ask(later.popleft())
            for delta in self._engine.step():
                self._take(delta)

    def _ask(self, talk: Talk) -> None:
        if (prompt := talk.next()) is None:
            return
        name = f"{talk.number}.{len(talk.parts)}"
        seed = 1000 * talk.number + len(talk.parts)
        from trinity.engine.request import SamplingParams

        temperature = self._given.get("temperature", 1.0)
        params = SamplingParams(
            max_tokens=self._given["output_len"], seed=seed, ignore_eos=True, temperature=temperature
        )
        self._engine.add(name, prompt, params)
        self._open[name], self.prompts[name], self.answers[name] = talk, prompt, []
        self._began_s[name] = time.perf_counter()

    def _take(self, delta: "Delta") -> None:
        name = delta.request_id
        if not self.answers[name]:
            self.ttft_s.append(time.perf_counter() - self._began_s[name])
        self.answers[name] += delta.token_ids
        if delta.finish_reason:
            talk = self._open.pop(name)
            talk.said = [*talk.said, *self.answers[name]]
            self._ask(talk)


def ideal(prompts: dict[str, list[int]], answers: dict[str, list[int]]) -> float:
    """Share of all prompts' tokens that an earlier prompt and answer began with."""
    seen, found, num = set[int](), 0, 0
    for name, prompt in prompts.items():
        key, known = 0, True
        num += len(prompt)
        for place, token in enumerate((*prompt, *answers[name])):
            key = hash((key, token))
            known = known and key in seen and place < len(prompt) - 1
            found += known
            seen.add(key)
    return found / max(1, num)


def _row(load: str, arm: str, turns: list[Turn]) -> tuple[Any, ...]:
    ttft_ms = [1e3 * each for turn in turns for each in turn.ttft_s]
    seconds = sum(turn.seconds for turn in turns)
    per_s = sum(turn.num_tokens for turn in turns) / seconds
    shares = (100 * sum(getattr(turn, name) for turn in turns) / len(turns) for name in ("hit_rate", "ideal"))
    sums = (sum(getattr(turn, name) for turn in turns) for name in ("cpu_s", "num_computed"))
    return (load, arm, percentile(ttft_ms, 0.5), percentile(ttft_ms, 0.99), per_s, *sums, *shares)


def _compare(report: Report, load: str, found: dict[str, list[Turn]]) -> None:
    cpu = ratio([turn.cpu_s for turn in found[ON]], [turn.cpu_s for turn in found[OFF]])
    if load == ALONE:
        report.target("processor time with the cache / without, nothing in common", cpu, at_most=1.02)
        return
    computed = ratio([turn.num_computed for turn in found[ON]], [turn.num_computed for turn in found[OFF]])
    report.target(f"{load}: tokens computed with the cache / without", computed, at_most=0.6)
    report.target(f"{load}: processor time with the cache / without", cpu, at_most=0.7)
    hits = ratio([turn.hit_rate for turn in found[ON]], [turn.ideal for turn in found[ON]])
    report.target(f"{load}: hits / those of the trace", hits, at_least=0.9)
