"""`trinity bench serve URL --roles`: what long prompts do to others' tokens, with prompts and answers apart and without.

Three arms in turn against one server of two engines, whose roles the bench changes while it runs: short requests alone, beside
long prompts with two engines that do everything, and beside them with a prefill and a decode engine. Short requests leave at
times that are drawn beforehand; of long ones, so many are there all the time. All prompts are new, so nothing is cached.
"""

import argparse
import asyncio
from typing import TYPE_CHECKING, Any

from trinity.bench.priority import flood, prompts
from trinity.bench.report import Report, Table, percentile
from trinity.config import admin_key, api_key
from trinity.errors import Unavailable
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from trinity.bench.clients import Card, HttpClient
    from trinity.bench.open_load import Timeline

USUAL: dict[str, Any] = {"rounds": 3, "num_prompts": 40, "request_rate": [4.0], "input_len": 10, "output_len": 32}
QUICK: dict[str, Any] = {"rounds": 1, "num_prompts": 4, "request_rate": [20.0], "input_len": 10, "output_len": 4}
LONG_LEN, LONG_AT_ONCE = 8000, 1
SETTLE_S = 2.0  # until all gateways and engines have heard of new roles
SOLO, BOTH, APART = "short ones alone", "both, beside long ones", "apart, beside long ones"
ROLES = {SOLO: ["prefill", "decode"], BOTH: ["both"], APART: ["prefill", "decode"]}
MAX_ITL_RATIO, MAX_TTFT_RATIO = 1.3, 3.0


def flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--roles", action="store_true", help="URL: two engines; short requests beside long prompts, whose roles change")
    add("--long-len", type=int, default=LONG_LEN, help=f"with --roles: tokens of a long prompt (default: {LONG_LEN})")
    add("--long-at-once", type=int, default=LONG_AT_ONCE, help="with --roles: long requests at a time (default: 1)")


def measure(arguments: argparse.Namespace) -> Report:
    for name, value in (QUICK if arguments.quick else USUAL).items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    found = asyncio.run(_rounds(arguments))
    return report_of(arguments, found)


async def _rounds(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    from trinity.bench.clients import Ask, http_client

    found: dict[str, dict[str, list[float]]] = {arm: {"ttft": [], "itl": [], "long": []} for arm in ROLES}
    async with http_client(Ask(arguments.url, api_key(), vocab_size=arguments.vocab_size)) as client:
        card = await client.card()
        for number in range(arguments.rounds):
            for arm in list(ROLES)[:: -1 if number % 2 else 1]:
                await _take_roles(client, ROLES[arm])
                lines, num_long = await _arm(client, card, arguments, arm)
                found[arm]["ttft"] += [line.ttft_s for line in lines]
                found[arm]["itl"] += [gap for line in lines for gap in line.itls_s]
                found[arm]["long"].append(num_long)
                say(f"round {number + 1}, {arm}: {num_long} long answers")
    return found


async def _take_roles(client: "HttpClient", roles: list[str]) -> None:
    """Raises Unavailable where it may not."""
    key = admin_key() or api_key()
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = await client.http.post("/engine_roles", json={"roles": roles}, headers=headers)
    if answer.status_code != 200:
        raise Unavailable(f"/engine_roles: the server answered {answer.status_code}: {answer.text[:200]}")
    await asyncio.sleep(SETTLE_S)


async def _arm(
    client: "HttpClient", card: "Card", arguments: argparse.Namespace, arm: str
) -> tuple[list["Timeline"], int]:
    """Short requests, and how many long ones had an answer meanwhile. Raises Unavailable where a short one has none."""
    if arm == SOLO:
        return await _short(client, card, arguments), 0
    async with flood(client, card, arguments.long_at_once, arguments.long_len, 1) as answers:
        lines = await _short(client, card, arguments)
        return lines, len(answers)


async def _short(client: "HttpClient", card: "Card", arguments: argparse.Namespace) -> list["Timeline"]:
    import numpy as np

    from trinity.bench import open_load

    num, rng = arguments.num_prompts, np.random.default_rng(arguments.seed)
    plan = open_load.arrivals(num, arguments.request_rate[0], 1.0, rng)
    asked = prompts(card, num, arguments.input_len)
    ask = lambda i, mark: client.generate(card.model, asked[i], arguments.output_len, mark)  # noqa: E731
    lines, _ = await open_load.offer(plan, ask)
    if failed := [line.failure for line in lines if line.failure is not None]:
        raise Unavailable(f"a short request got no answer: {failed[0].kind}: {failed[0].detail}")
    return lines


def report_of(arguments: argparse.Namespace, found: dict[str, dict[str, list[float]]]) -> Report:
    rows = []
    for arm, each in found.items():
        figures = (1e3 * percentile(each[name], share) for name in ("ttft", "itl") for share in (0.5, 0.99))
        rows.append((arm, *figures, sum(each["long"])))
    long = f"{arguments.long_at_once} of {arguments.long_len:,} tokens at a time"
    title = f"Short requests ({arguments.input_len} tokens, {arguments.request_rate[0]:g} a second), long ones {long}"
    columns = ("", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "long answers")
    report = Report("serve-roles", [Table(title, columns, tuple(rows))], results=[found])
    for name, most in (("itl", MAX_ITL_RATIO), ("ttft", MAX_TTFT_RATIO)):
        solo, both, apart = (percentile(found[arm][name], 0.99) for arm in (SOLO, BOTH, APART))
        report.target(f"p99 {name.upper()} of short requests, apart / alone", apart / solo, at_most=most)
        report.target(f"p99 {name.upper()} of short requests, apart / both", apart / both, at_most=1.0)
    return report
