"""`trinity chaos serve CHECKPOINT`: the server of `trinity serve` under an open-loop load, while faults strike its pool.

Decisions: prompts are few and fixed, answers greedy; each prompt's answer is asked for once, alone, before the chaos, and every
later one must be that text. A quiet part of the same load comes first: a stall counts from what was usual in it.
"""

import argparse
import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from actors.chaos.plan import Fault, Struck, plan
from trinity.bench.report import Report, Table
from trinity.config import Config, merged, setup_environment
from trinity.errors import ConfigError, Unavailable
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from actors.chaos.injector import Chaos
    from trinity.bench.clients import Card, Client
    from trinity.bench.open_load import Mark, Timeline

FAULTS = (Fault.KILL_SHARD, Fault.STOP_SHARD, Fault.KILL_SERVICE, Fault.MOVE_EXPERTS)
NUM_PROMPTS, PROMPT_LEN, OUTPUT_LEN = 16, 16, 32
QUIET_SHARE = 0.25  # of --seconds, before the chaos
AVAILABILITY = 0.995
ANY_PORTS = {"http_port": 0, "grpc_port": 0}


class Answers(NamedTuple):
    """Findings of one load: how the requests went, and what they said."""

    lines: "list[Timeline]"
    texts: list[str]


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a checkpoint's folder")
    parser.add_argument("config", nargs="?", help="a YAML file")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load under chaos (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4.0, help="mean requests a second (default: %(default)s)")
    parser.add_argument("--out", default="runs/chaos", help="folder for chaos.json (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    from serving.launch import check_source, resolve, source_of

    tree = merged(arguments.config, flags, serve=ANY_PORTS)
    source = source_of(arguments.source, tree)
    config = resolve(source, tree)
    if arguments.dry_run:
        print(config.to_yaml(), end="")
        return 0
    if config.serve.is_of_run:
        raise ConfigError("the answers of weights that train change by themselves; give a checkpoint")
    check_source(source, config)
    setup_environment(config.cluster.auth, is_local=config.cluster.address == "local")
    served(config, source, arguments).write(arguments.out)
    return 0


def served(config: Config, source: str, arguments: argparse.Namespace) -> Report:
    """Serve it, disturb it, and end it. A pool that was there stays."""
    from actors import pool as pools
    from actors.chaos.injector import Chaos
    from actors.cluster import joined
    from serving import app
    from serving.launch import provide_pool

    say("starting Ray" if config.cluster.address == "local" else f"joining {config.cluster.address}")
    with joined(config.cluster):
        ends = provide_pool(config, source)
        try:
            server = app.start(config, source)
            pool = pools.connect(config.placement, config.cluster.namespace)
            try:
                return asyncio.run(disturbed(server.http_url, config, Chaos(pool, hosts=arguments.hosts), arguments))
            finally:
                server.stop()
        finally:
            if ends:
                pools.destroy(config.placement.pool, config.cluster.namespace, config.placement.memory_dir)


async def disturbed(url: str, config: Config, chaos: "Chaos", arguments: argparse.Namespace) -> Report:
    """The answers alone, then the load in quiet, then under chaos."""
    import numpy as np

    from trinity.bench.clients import CLIENTS, Ask

    struck: list[Struck] = []
    async with CLIENTS["completions"](Ask(url, config.serve.api_key, vocab_size=config.model.vocab_size)) as client:
        card, rng = await client.card(), np.random.default_rng(arguments.seed)
        prompts = rng.integers(card.vocab_size, size=(NUM_PROMPTS, PROMPT_LEN)).tolist()
        say(f"{url}: {NUM_PROMPTS} prompts alone")
        alone = [(await offered(client, card, [prompt], [0.0])) for prompt in prompts]
        if failure := next((answer.lines[0].failure for answer in alone if answer.lines[0].failure), None):
            raise Unavailable(f"a request failed before any chaos: {failure.kind}: {failure.detail}")
        calm_s = QUIET_SHARE * arguments.seconds
        say(f"{arguments.rate:g} requests a second: {calm_s:g} s in quiet, then {arguments.seconds:g} s under chaos")
        quiet = await offered(client, card, prompts, arrivals(calm_s, arguments))
        with raging_at(chaos, arguments, struck):
            stormy = await offered(client, card, prompts, arrivals(arguments.seconds, arguments))
    return report([answer.texts[0] for answer in alone], quiet, stormy, struck, arguments)


def raging_at(chaos: "Chaos", arguments: argparse.Namespace, struck: list[Struck]) -> AbstractContextManager[None]:
    from actors.chaos.injector import raging

    def recovered_s(one: Struck) -> float | None:
        return time.monotonic() - one.time_s if chaos.is_whole() else None

    coming = plan(arguments.seed, arguments.seconds, arguments.faults, arguments.every)
    return raging(chaos, coming, lambda: True, recovered_s, struck)


def arrivals(seconds: float, arguments: argparse.Namespace) -> list[float]:
    import numpy as np

    from trinity.bench import open_load

    num = max(1, round(seconds * arguments.rate))
    return open_load.arrivals(num, arguments.rate, 1.0, np.random.default_rng(arguments.seed))


async def offered(client: "Client", card: "Card", prompts: Sequence[list[int]], at_s: Sequence[float]) -> Answers:
    """Send the prompts in turn at these times, and read what comes."""
    from trinity.bench import open_load

    pieces: list[list[str]] = [[] for _ in at_s]

    def send(i: int, mark: "Mark") -> Awaitable[tuple[int, int]]:
        def noted(text: str) -> None:
            pieces[i].append(text)
            mark(text)

        return client.generate(card.model, prompts[i % len(prompts)], OUTPUT_LEN, noted)

    lines, _ = await open_load.offer(at_s, send)
    return Answers(lines, ["".join(each) for each in pieces])


def report(
    alone: Sequence[str], quiet: Answers, stormy: Answers, struck: list[Struck], arguments: argparse.Namespace
) -> Report:
    """`failure` where a text was another one."""
    failures = [line.failure.kind for line in stormy.lines if line.failure is not None]
    wrong = num_wrong(alone, quiet) + num_wrong(alone, stormy)
    availability = 1 - len(failures) / len(stormy.lines)
    rows = (
        ("requests", len(stormy.lines)),
        ("failed", len(failures)),
        ("availability", availability),
        ("wrong texts", wrong),
        ("longest added stall, s", longest_stall_s(quiet, stormy)),
    )
    began_s = struck[0].time_s if struck else 0.0
    faults = [
        (each.fault.value, each.target or f"not found: {each.error}", each.time_s - began_s, each.recovered_s)
        for each in struck
    ]
    columns = ("fault", "what", "after the first, s", "whole again in, s")
    shown = tuple(tuple("-" if value is None else value for value in row) for row in faults)
    facts: dict[str, Any] = {"seed": arguments.seed, "every_s": arguments.every, "rate": arguments.rate}
    facts |= {"values": dict(rows), "failures": dict(Counter(failures))}
    facts["faults"] = [dict(zip(("fault", "target", "at_s", "recovered_s"), row, strict=True)) for row in faults]
    found = Report("chaos", [Table("Faults", columns, shown), Table("Serving under chaos", ("", "value"), rows)])
    found.results = [facts]
    found.target("availability", availability, at_least=AVAILABILITY)
    found.failure = f"{wrong} answers were not those of the undisturbed server" if wrong else ""
    return found


def num_wrong(alone: Sequence[str], answers: Answers) -> int:
    """Whole answers with another text than the same prompt's alone."""
    pairs = enumerate(zip(answers.lines, answers.texts, strict=True))
    return sum(line.failure is None and text != alone[i % len(alone)] for i, (line, text) in pairs)


def longest_stall_s(quiet: Answers, stormy: Answers) -> float | None:
    """Longest wait of an answered request for a first or a next token, beyond the quiet load's median wait."""
    usual, found = (
        [line for line in quiet.lines if line.failure is None],
        [x for x in stormy.lines if x.failure is None],
    )
    if not usual or not found:
        return None
    first_s = statistics.median(line.ttft_s for line in usual)
    next_s = statistics.median([gap for line in usual for gap in line.itls_s] or [0.0])
    return max(max(line.ttft_s - first_s, *(gap - next_s for gap in [*line.itls_s, 0.0])) for line in found)
