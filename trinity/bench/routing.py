"""`trinity bench serve --routed`: two engines whose requests go where their beginning is cached, and the same two in turn.

Loads have the shape of Mooncake's public traces, generated: `conversations` (each turn has all that was said, answers too) and
`tools and agents` (a few long instructions, some far more often than others, each with a task of its own). Sessions begin at
bursty times that are drawn beforehand; a session's next turn leaves when it has its answer.
Decisions: the arms have what serves, the gateway's own client (serving/routed.py) over engines in this process, each with a
thread and a model of its own, or a client that takes them in turn; a third arm is one engine, than whose hits two have no more.
Prompts and seeds are the same in all, and so are the answers (arithmetic is exact), or the bench ends. The ideal is that of the
trace: an engine that forgets nothing and keeps every window. Processor time and tokens computed are compared: they hold on a
busy machine.
"""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle
from typing import TYPE_CHECKING, Any

from trinity.bench.prefixes import Talk, Turn, ideal, noted, small_engine, small_model
from trinity.bench.report import Report, Table, alternated, percentile, ratio
from trinity.config import EngineConfig, num_cpus
from trinity.errors import TrinityError
from trinity.utils.terminal import say

if TYPE_CHECKING:
    import numpy as np

    from serving.engine import LocalClient
    from serving.routed import Status
    from trinity.engine.request import Delta, SamplingParams

USUAL: dict[str, Any] = {
    "preset": "bench",
    "rounds": 2,
    "sessions": 24,
    "rate": 4.0,
    "input_len": 512,
    "output_len": 16,
}
QUICK: dict[str, Any] = {"preset": "tiny", "rounds": 1, "sessions": 6, "rate": 20.0, "input_len": 64, "output_len": 4}
CHAT, AGENTS = "conversations", "tools and agents"
ROUTED, IN_TURN, ONE = "by prefix", "in turn", "one engine"
NUM_ENGINES, TURNS, NUM_INSTRUCTIONS = 2, 5, 6
BURSTINESS = 0.5  # of arrivals
TIMEOUT_S, POLL_S = 600.0, 1.0


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--routed",
        action="store_true",
        help="instead of URL: two engines, each request sent where its beginning is cached, or in turn, in this process",
    )


def measure(arguments: argparse.Namespace) -> Report:
    given = dict(QUICK if arguments.quick else USUAL)
    given |= {name: value for name, value in vars(arguments).items() if name in given and value is not None}
    report, rows = Report("serve-routed"), []
    models = [small_model(given["preset"]) for _ in range(NUM_ENGINES)]
    for load in (CHAT, AGENTS):
        say(f"{load}:")
        found = alternated_arms(load, models, given)
        rows += [_row(load, arm, turns) for arm, turns in found.items()]
        _compare(report, load, found)
        noted(report, load, found)
    columns = ("load", "arm", "TTFT p50 ms", "p99 ms", "tokens/s", "CPU s", "computed", "hits %", "ideal %", "busier %")
    size = f"{given['sessions']} sessions, {given['rate']:g} a second, prompts of about {given['input_len']} tokens"
    title = f"{NUM_ENGINES} engines, {size}, preset {given['preset']}, on {num_cpus()} cores"
    report.tables.append(Table(title, columns, tuple(rows)))
    return report


def alternated_arms(load: str, models: Sequence[Any], given: dict[str, Any]) -> dict[str, list[Turn]]:
    """Each turn of an arm has engines of its own, cold at first; both arms have the same sessions."""
    numbers = {arm: count() for arm in (ROUTED, IN_TURN, ONE)}
    arms: dict[str, Callable[[], Turn]] = {
        arm: lambda arm=arm: asyncio.run(_turn(load, arm, models, given, next(numbers[arm])))  # type: ignore[misc]
        for arm in numbers
    }
    found = alternated(arms, given["rounds"])
    for turns in zip(*found.values(), strict=True):
        if any(turn.answers != turns[0].answers for turn in turns):
            raise TrinityError("the same prompts have other answers in another engine; this is a bug")
    return found


def sessions(load: str, given: dict[str, Any], vocab: int, rng: "np.random.Generator") -> list[Talk]:
    """Requests of each session. Lengths vary; a conversation's last prompt and an agent's have about `input_len` tokens."""
    whole, num = given["input_len"], given["sessions"]

    def drawn(mean: float) -> list[int]:
        return list(map(int, rng.integers(vocab, size=1 + int(rng.exponential(mean)))))

    if load == CHAT:
        turns = 1 + rng.poisson(TURNS - 1, size=num)
        return [Talk(i, [drawn(whole / TURNS) for _ in range(turns[i])], grows=True) for i in range(num)]
    instructions = [list(map(int, rng.integers(vocab, size=whole * 3 // 4))) for _ in range(NUM_INSTRUCTIONS)]
    often = 1 / (1 + rng.permutation(NUM_INSTRUCTIONS))
    chosen = rng.choice(NUM_INSTRUCTIONS, size=(num, 2), p=often / often.sum())
    return [Talk(i, [[*instructions[each], *drawn(whole / 4)] for each in chosen[i]]) for i in range(num)]


class Engines:
    """Engines in this process by name, as a Fleet. Owns them."""

    def __init__(self, models: Sequence[Any], given: dict[str, Any]):
        from serving.engine import LocalClient
        from trinity.engine.async_engine import AsyncEngine

        self.clients: dict[str, LocalClient] = {}
        self.num_sent = Counter[str]()
        longest = 3 * given["input_len"] + 2 * TURNS * given["output_len"]
        for number, model in enumerate(models):
            made = small_engine(model, longest, given["sessions"], 8 * given["sessions"])
            name = f"engine-{number}"
            self.clients[name] = LocalClient(AsyncEngine(made), made.tokenizer, "bench", name=name)

    async def generate(self, engine: str | None, *asked: Any, **more: Any) -> AsyncGenerator["Delta", None]:
        name, client = self._pick(engine)
        self.num_sent[name] += 1
        async with aclosing(client.generate(*asked, **more)) as deltas:
            async for delta in deltas:
                yield delta

    async def prefill(self, engine: str, *asked: Any) -> Any:
        return await self.clients[engine].prefill(*asked)

    async def status(self, engine: str | None, besides: Collection[str], **told: Any) -> "Status":
        _, client = self._pick(engine, besides)
        return await client.status(**told)

    async def reset_prefix_cache(self) -> None:
        for client in self.clients.values():
            await client.reset_prefix_cache()

    def close(self) -> None:
        for client in self.clients.values():
            client.engine.close()

    def _pick(self, engine: str | None, besides: Collection[str] = ()) -> tuple[str, "LocalClient"]:
        name = engine or min(self.clients, key=lambda each: each in besides)
        return name, self.clients[name]


class InTurn:
    """The engines in turn."""

    def __init__(self, engines: Engines):
        self._engines, self._names = engines, cycle(engines.clients)

    def generate(self, *asked: Any) -> AsyncGenerator["Delta", None]:
        return self._engines.generate(next(self._names), *asked)


async def _turn(load: str, arm: str, models: Sequence[Any], given: dict[str, Any], number: int) -> Turn:
    import numpy as np

    from trinity.bench.open_load import arrivals

    rng = np.random.default_rng(number)
    talks = sessions(load, given, models[0].config.vocab_size, rng)
    plan = arrivals(len(talks), given["rate"], BURSTINESS, rng)
    engines = Engines(models[:1] if arm == ONE else models, given)
    try:
        return await _measured(engines, arm, talks, plan, given)
    finally:
        engines.close()


async def _measured(
    engines: Engines, arm: str, talks: Sequence[Talk], plan: Sequence[float], given: dict[str, Any]
) -> Turn:
    from serving.routed import RoutedClient
    from trinity.bench.open_load import offer

    client = RoutedClient(engines, EngineConfig(replicas=NUM_ENGINES))
    for _ in engines.clients:
        await client.infos()
    asked = Asked(client if arm == ROUTED else InTurn(engines), given)
    watch = asyncio.create_task(_watch(client))
    cpu_s, started_s = time.process_time(), time.perf_counter()
    lines, _ = await offer(plan, partial(asked.session, talks))
    cpu_s, seconds = time.process_time() - cpu_s, time.perf_counter() - started_s
    watch.cancel()
    if failed := [line.failure for line in lines if line.failure]:
        raise failed[0]
    stats = [each.engine.stats() for each in engines.clients.values()]
    hits, queries = sum(each.num_prefix_hits for each in stats), sum(each.num_prefix_queries for each in stats)
    num_tokens, num_computed = sum(map(len, asked.answers.values())), sum(each.num_computed_tokens for each in stats)
    share = max(engines.num_sent.values()) / engines.num_sent.total()
    best = ideal(asked.prompts, asked.answers)
    times = (cpu_s, seconds, asked.ttft_s)
    return Turn(*times, num_tokens, num_computed, hits / max(1, queries), best, asked.answers, share)


async def _watch(client: Any) -> None:
    """Ask engines how they are, as a gateway does."""
    while True:
        await asyncio.sleep(POLL_S)
        await client.infos()


@dataclass
class Asked:
    """Prompts and answers of all sessions by session and turn, in the order in which they were asked."""

    client: Any
    given: dict[str, Any]
    prompts: dict[str, list[int]] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)

    async def session(self, talks: Sequence[Talk], number: int, mark: Callable[[str], None]) -> tuple[int, int]:
        """All turns of a session, one after the other."""
        talk, num_input, num_output = talks[number], 0, 0
        for name, prompt in _turns(talk):
            self.prompts[name], self.answers[name] = prompt, []
            await self._ask(name, prompt, mark)
            talk.said = [*talk.said, *self.answers[name]]
            num_input, num_output = num_input + len(prompt), num_output + len(self.answers[name])
        return num_input, num_output

    async def _ask(self, name: str, prompt: list[int], mark: Callable[[str], None]) -> None:
        from trinity.config import ANYBODY

        began_s = time.perf_counter()
        stream = self.client.generate(name, prompt, self._params(name), TIMEOUT_S, ANYBODY)
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                if not self.answers[name]:
                    self.ttft_s.append(time.perf_counter() - began_s)
                self.answers[name] += delta.token_ids
                mark(delta.text)

    def _params(self, name: str) -> "SamplingParams":
        from trinity.engine.request import SamplingParams

        return SamplingParams(max_tokens=self.given["output_len"], seed=int(name.replace(".", "")), ignore_eos=True)


def _turns(talk: Talk) -> Iterator[tuple[str, list[int]]]:
    while (prompt := talk.next()) is not None:
        yield f"{talk.number}.{len(talk.parts)}", prompt


def _row(load: str, arm: str, turns: list[Turn]) -> tuple[Any, ...]:
    ttft_ms = [1e3 * each for turn in turns for each in turn.ttft_s]
    per_s = sum(turn.num_tokens for turn in turns) / sum(turn.seconds for turn in turns)
    sums = (sum(getattr(turn, name) for turn in turns) for name in ("cpu_s", "num_computed"))
    shares = (100 * sum(getattr(turn, name) for turn in turns) / len(turns) for name in ("hit_rate", "ideal", "share"))
    return (load, arm, percentile(ttft_ms, 0.5), percentile(ttft_ms, 0.99), per_s, *sums, *shares)


def _compare(report: Report, load: str, found: dict[str, list[Turn]]) -> None:
    routed, in_turn = found[ROUTED], found[IN_TURN]
    hits = ratio([turn.hit_rate for turn in routed], [turn.hit_rate for turn in found[ONE]])
    report.target(f"{load}: hits by prefix / those of one engine", hits, at_least=0.9)
    computed = ratio([turn.num_computed for turn in routed], [turn.num_computed for turn in in_turn])
    report.target(f"{load}: tokens computed by prefix / in turn", computed, at_most=0.85)
    cpu = ratio([turn.cpu_s for turn in routed], [turn.cpu_s for turn in in_turn])
    report.target(f"{load}: processor time by prefix / in turn", cpu, at_most=0.9)
