"""`trinity bench priority URL`: what urgent requests wait for beside a flood of less urgent ones.

Two arms that take turns against one server: urgent requests alone, and the same beside so many others that its queue is
never empty. An urgent request may wait for the pass under way and for nothing else: the goal is a p99 of its time to first
token within that of the idle server + 1.2 times the longest pass, which the server tells (`trinity_longest_pass_seconds`);
for prompts of 512 tokens and more within 1.5 times the idle one. Decisions: others have priority 5 and urgent ones 0, so
that any key may run it; the flood is closed (each answer is followed by another request), for an open one of that size
would end in refusals alone.
"""

import argparse
import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trinity.bench.report import Report, Table, percentile
from trinity.config import api_key
from trinity.errors import Unavailable
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from trinity.bench.clients import Card, HttpClient
    from trinity.bench.open_load import Timeline

USUAL = {"rounds": 3, "num_urgent": 20, "concurrency": 96, "input_len": 128, "output_len": 64, "urgent_len": 32}
QUICK = {"rounds": 1, "num_urgent": 3, "concurrency": 4, "input_len": 8, "output_len": 8, "urgent_len": 8}
LATER, LONG_PROMPT = 5, 512
SLACK, LONG_RATIO = 1.2, 1.5
IDLE, BUSY = "idle", "beside the flood"
LONGEST = re.compile(r"^trinity_longest_pass_seconds (\S+)$", re.MULTILINE)


def flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", help="for example http://127.0.0.1:8000")
    add("--rounds", type=int, help=f"turns of each arm (default: {USUAL['rounds']})")
    add("--num-urgent", type=int, help=f"urgent requests in a turn, one every 0.25 s (default: {USUAL['num_urgent']})")
    add("--urgent-len", type=int, help=f"tokens of an urgent prompt (default: {USUAL['urgent_len']})")
    add("--concurrency", type=int, help=f"others at the same time (default: {USUAL['concurrency']})")
    add("--input-len", type=int, help=f"tokens of another's prompt (default: {USUAL['input_len']})")
    add("--output-len", type=int, help=f"tokens of another's answer (default: {USUAL['output_len']})")
    add("--vocab-size", type=int, help="prompts are ids below this (default: ask the server)")


def measure(arguments: argparse.Namespace) -> Report:
    for name, value in (QUICK if arguments.quick else USUAL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return _report(arguments, asyncio.run(_rounds(arguments)))


async def _rounds(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    from trinity.bench.clients import Ask, http_client

    ask = Ask(arguments.url, api_key(), vocab_size=arguments.vocab_size)
    found: dict[str, list[Any]] = {IDLE: [], BUSY: [], "passes": [], "others": []}
    async with http_client(ask) as urgent, http_client(replace(ask, priority=LATER)) as other:
        card = await urgent.card()
        for number in range(arguments.rounds):
            found[IDLE] += await _urgent(urgent, card, arguments)
            async with flood(other, card, *others_of(arguments)) as others:
                found[BUSY] += await _urgent(urgent, card, arguments)
                found["passes"].append(await _longest_pass_s(urgent))
            found["others"].append(len(others))
            say(f"round {number + 1}: {len(others)} answers of others, longest pass {found['passes'][-1]:.3f} s")
    return found


async def _urgent(client: "HttpClient", card: "Card", arguments: argparse.Namespace) -> list[float]:
    """Seconds to the first token of each. Raises Unavailable where one gets none."""
    from trinity.bench import open_load

    plan = [0.25 * i for i in range(arguments.num_urgent)]
    asked = prompts(card, arguments.num_urgent, arguments.urgent_len)
    lines, _ = await open_load.offer(plan, lambda i, mark: client.generate(card.model, asked[i], 4, mark))
    return [_ttft_s(line) for line in lines]


def _ttft_s(line: "Timeline") -> float:
    if line.failure is not None:
        raise Unavailable(f"an urgent request got no answer: {line.failure.kind}: {line.failure.detail}")
    return line.ttft_s


@contextlib.asynccontextmanager
async def flood(
    client: "HttpClient", card: "Card", num: int, input_len: int, output_len: int
) -> AsyncIterator[list[Any]]:
    """Inside, `num` others ask all the time. It begins when all of them have asked and one has a token; -> their answers."""
    answers: list[Any] = []
    began = asyncio.Event()

    async def one() -> None:
        from trinity.bench.open_load import RequestFailed

        while True:
            (prompt,) = prompts(card, 1, input_len)
            try:
                answers.append(await client.generate(card.model, prompt, output_len, lambda _: began.set()))
            except RequestFailed:
                await asyncio.sleep(1.0)  # it was refused, as it may be

    tasks = [asyncio.create_task(one()) for _ in range(num)]
    try:
        await began.wait()
        yield answers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def others_of(arguments: argparse.Namespace) -> tuple[int, int, int]:
    return arguments.concurrency, arguments.input_len, arguments.output_len


def prompts(card: "Card", num: int, length: int) -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng()
    return [rng.integers(card.vocab_size, size=length).tolist() for _ in range(num)]


async def _longest_pass_s(client: "HttpClient") -> float:
    await asyncio.sleep(1.5)  # the gateway asks its engines each second
    answer = await client.http.get("/metrics")
    if (line := LONGEST.search(answer.text)) is None:
        raise Unavailable("the server's /metrics do not tell trinity_longest_pass_seconds; is it of an older release?")
    return float(line[1])


def _report(arguments: argparse.Namespace, found: dict[str, list[Any]]) -> Report:
    rows = [
        (name, *(1e3 * percentile(found[name], share) for share in (0.5, 0.99)), len(found[name]))
        for name in (IDLE, BUSY)
    ]
    idle_ms, busy_ms = (1e3 * percentile(found[name], 0.99) for name in (IDLE, BUSY))
    pass_ms, is_long = 1e3 * max(found["passes"]), arguments.urgent_len >= LONG_PROMPT
    most_ms = LONG_RATIO * idle_ms if is_long else idle_ms + SLACK * pass_ms
    title = (
        f"Time to first token of urgent requests, {arguments.urgent_len} tokens, beside {arguments.concurrency} others"
    )
    table = Table(title, ("", "p50 ms", "p99 ms", "requests"), tuple(rows))
    bounds = (("longest pass", pass_ms), ("p99 may be", most_ms), ("others' answers", sum(found["others"])))
    report = Report(
        "priority", [table, Table("What it is held against", ("", "ms or number"), bounds)], [], results=[found]
    )
    report.target("p99 beside the flood / what it may be", busy_ms / most_ms, at_most=1.0)
    return report
