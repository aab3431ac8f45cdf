"""`trinity bench serve URL`: an open-loop Poisson load on a running server, once for each --request-rate.

In place of the URL, --with-training: with_training.py; --prefixes: prefixes.py; --speculation: speculation.py; --routed:
routing.py. With --roles: roles.py.

Decisions: --seed fixes arrival times and lengths. The token ids of the prompts are new in every run, or the prefix cache
of a server that has met them would answer in the model's place. The machine in the report is the one that sends.
"""

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity.bench import prefixes, roles, routing, speculation, with_training
from trinity.bench.report import Curve, Report, Table
from trinity.config import api_key
from trinity.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from trinity.bench.clients import Card, Client
    from trinity.bench.open_load import Mark, Timeline

USUAL = {"num_prompts": 100, "request_rate": [4.0], "input_len": 128, "output_len": 64}
QUICK = {"num_prompts": 6, "request_rate": [40.0, 80.0], "input_len": 8, "output_len": 4}
GOALS = ("ttft", "tpot", "e2el")
BUSY = 0.7  # of one core: beyond this the generator's own work shows in the latencies
UNITS = ("_throughput", "_goodput", "_tokens", "_ttft_ms", "_tpot_ms", "_itl_ms", "_e2el_ms")
FIGURES = (
    *("duration", "completed", "failed", "max_output_tokens_per_s", "max_concurrent_requests"),
    *("p99_lag_ms", "num_late", "p99_client_queue_ms", "generator_cpu_share"),
)
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("TTFT", "ms", {"p50": "median_ttft_ms", "p99": "p99_ttft_ms"}),
    ("ITL", "ms", {"p50": "median_itl_ms", "p99": "p99_itl_ms"}),
    ("Throughput", "tokens/s", {"output": "output_throughput", "input + output": "total_token_throughput"}),
    (
        "Requests",
        "requests/s",
        {"offered": "request_rate", "answered": "request_throughput", "good": "request_goodput"},
    ),
)


def flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", nargs="?", help="for example http://127.0.0.1:8000; with --endpoint grpc the address of the gRPC port")
    with_training.flags(parser)
    prefixes.flags(parser)
    speculation.flags(parser)
    routing.flags(parser)
    roles.flags(parser)
    add("--endpoint", choices=["completions", "grpc"], default="completions", help="OpenAI over HTTP, or trinity.v1")
    add("--num-prompts", type=_whole, help=f"requests for each rate (default: {USUAL['num_prompts']})")
    rate = "mean requests a second, or inf for all at once; repeat it for a sweep (default: 4)"
    add("--request-rate", type=_positive, action="append", help=rate)
    add("--burstiness", type=_finite, default=1.0, help="shape of the gaps: 1 Poisson, less is burstier")
    add("--max-concurrency", type=_whole, help="at most so many requests at once; the loop is then no longer open")
    add("--input-len", type=_whole, help=f"prompt tokens (default: {USUAL['input_len']})")
    add("--output-len", type=_whole, help=f"generated tokens (default: {USUAL['output_len']})")
    add("--random-range-ratio", type=_share, default=0.0, help="lengths vary uniformly by this share, 0 to 1")
    add("--goodput", type=_goal, nargs="+", default=[], metavar="NAME:MS", help="such as ttft:200 tpot:50 e2el:5000")
    eos = "end at the end-of-text token instead of at --output-len"
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help=f"(default); --no-: {eos}")
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=0, help="of arrival times and lengths; the prompts' tokens are always new")
    add("--timeout-s", type=_finite, default=600.0, help="for one request (default: 600)")
    add("--model", help="default: the first that the server lists")
    add("--vocab-size", type=_whole, help="prompts are ids below this (default: ask the server)")
    add("--api-key-file", help="file that holds the key (default: TRINITY_API_KEY)")


def measure(arguments: argparse.Namespace) -> Report:
    if arguments.with_training:
        return with_training.measure(arguments)
    if arguments.prefixes:
        return prefixes.measure(arguments)
    if arguments.speculation:
        return speculation.measure(arguments)
    if arguments.routed:
        return routing.measure(arguments)
    if arguments.url is None:
        raise ConfigError("give the URL of a server, --with-training, --prefixes, --speculation or --routed")
    if arguments.roles:
        return roles.measure(arguments)
    for name, value in (QUICK if arguments.quick else USUAL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    results = asyncio.run(_sweep(arguments))
    report = Report("serve", [_table(results), *_errors(results)], _curves(results), results=results)
    if not any(result["completed"] for result in results):
        kinds = sorted({kind for result in results for kind in result["errors_by_kind"]})
        report.failure = f"all requests failed: {', '.join(kinds)}"
    return report


async def _sweep(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from trinity.bench.clients import CLIENTS, Ask

    key = _read_key(Path(arguments.api_key_file).expanduser()) if arguments.api_key_file else api_key()
    how = (arguments.model, arguments.vocab_size, arguments.ignore_eos, arguments.temperature)
    ask = Ask(arguments.url, key, *how)
    async with CLIENTS[arguments.endpoint](ask) as client:
        card = await client.card()
        _check_fits(arguments, card)
        await _try_once(client, card, arguments)
        results = []
        for rate in arguments.request_rate:
            results.append(await one_load(client, card, arguments, rate))
            _comment(results[-1])
        return results


async def _try_once(client: "Client", card: "Card", arguments: argparse.Namespace) -> None:
    """One request outside the measurement: a wrong flag ends the bench at once. Raises Unavailable."""
    lines, _ = await _offer(client, card, arguments, [0.0], [arguments.input_len], [arguments.output_len])
    if failure := lines[0].failure:
        raise Unavailable(f"the trial request failed: {failure.kind}: {failure.detail}")


async def one_load(client: "Client", card: "Card", arguments: argparse.Namespace, rate: float) -> dict[str, Any]:
    """One rate: draw the load, send it, sum it up."""
    import numpy as np

    from trinity.bench import open_load

    num, ratio, rng = arguments.num_prompts, arguments.random_range_ratio, np.random.default_rng(arguments.seed)
    plan = open_load.arrivals(num, rate, arguments.burstiness, rng)
    num_inputs = open_load.lengths(num, arguments.input_len, ratio, rng)
    num_outputs = open_load.lengths(num, arguments.output_len, ratio, rng)
    print(f"{num} requests, {rate:g} a second: the last leaves after {plan[-1]:.3g} s", file=sys.stderr)
    cpu_s = time.process_time()
    lines, duration_s = await _offer(client, card, arguments, plan, num_inputs, num_outputs)
    used = (time.process_time() - cpu_s) / duration_s
    others = sum(line.failure is None and line.num_output != n for line, n in zip(lines, num_outputs, strict=True))
    own = {"generator_cpu_share": used, "num_other_output_len": others}
    return {
        **_settings(arguments, card, rate),
        **open_load.summarize(lines, duration_s, dict(arguments.goodput)),
        **own,
    }


async def _offer(
    client: "Client",
    card: "Card",
    arguments: argparse.Namespace,
    plan: Sequence[float],
    num_inputs: Sequence[int],
    num_outputs: Sequence[int],
) -> tuple[list["Timeline"], float]:
    """Send prompts of new random ids, of these lengths, at these times."""
    import numpy as np

    from trinity.bench import open_load

    rng = np.random.default_rng()
    prompts = [rng.integers(card.vocab_size, size=num).tolist() for num in num_inputs]

    def send(i: int, mark: "Mark") -> Awaitable[tuple[int, int]]:
        return client.generate(card.model, prompts[i], num_outputs[i], mark)

    return await open_load.offer(plan, send, arguments.max_concurrency, arguments.timeout_s)


def _check_fits(arguments: argparse.Namespace, card: "Card") -> None:
    from trinity.bench.open_load import bounds

    need = sum(bounds(num, arguments.random_range_ratio)[1] for num in (arguments.input_len, arguments.output_len))
    if card.max_model_len and need > card.max_model_len:
        raise ConfigError(
            f"--input-len and --output-len come to {need} tokens at most; {card.model} takes {card.max_model_len}"
        )


def _settings(arguments: argparse.Namespace, card: "Card", rate: float) -> dict[str, Any]:
    names = ("url", "endpoint", "num_prompts", "burstiness", "max_concurrency", "input_len", "output_len")
    more = ("random_range_ratio", "ignore_eos", "temperature", "seed")
    kept = {name: getattr(arguments, name) for name in (*names, *more)}
    return {
        "model": card.model,
        "server_version": card.version,
        "request_rate": rate if math.isfinite(rate) else "inf",  # as in vLLM: JSON has no infinity
        **kept,
        "goodput": dict(arguments.goodput),
    }


def _comment(result: dict[str, Any]) -> None:
    """Remarks that a reader of the figures must know, on stderr; all of it is in the JSON too."""
    num = result["num_prompts"]
    if result["num_late"]:
        lag = f"p99 {result['p99_lag_ms']:.0f} ms"
        _warn(
            f"{result['num_late']} of {num} requests left over 50 ms late ({lag}): the generator did not keep its plan"
        )
    if result["generator_cpu_share"] > BUSY:
        share = result["generator_cpu_share"]
        _warn(f"the generator used {share:.0%} of a core; its own work is in these latencies, so offer less at once")
    if result["num_other_output_len"]:
        _warn(f"{result['num_other_output_len']} answers did not have the length asked for")
    if result["failed"]:
        _warn(f"{result['failed']} of {num} requests failed: {result['errors_by_kind']}")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _table(results: Sequence[dict[str, Any]]) -> Table:
    """A row for each figure, a column for each rate."""
    kept = [
        name for name in results[0] if not name.startswith("percentiles") and (name.endswith(UNITS) or name in FIGURES)
    ]
    first = results[0]
    cap = f", at most {first['max_concurrency']} at once" if first["max_concurrency"] else ""
    size = f"{first['num_prompts']} requests a rate, {first['input_len']} tokens in and {first['output_len']} out"
    title = f"{first['model']} over {first['endpoint']}: {size}{cap}"
    rates = [f"{result['request_rate']}/s" for result in results]
    rows = [(name, *["-" if result[name] is None else result[name] for result in results]) for name in kept]
    return Table(title, ("", *rates), tuple(rows))


def _errors(results: Sequence[dict[str, Any]]) -> list[Table]:
    rows = [
        (f"{result['request_rate']}/s", kind, num, result["error_examples"][kind])
        for result in results
        for kind, num in result["errors_by_kind"].items()
    ]
    return [Table("Failed requests", ("rate", "kind", "number", "the first one's words"), tuple(rows))] if rows else []


def _curves(results: Sequence[dict[str, Any]]) -> list[Curve]:
    """Figures against rate where several finite rates were answered, else their distributions."""
    done = [result for result in results if result["completed"]]
    swept = sorted((r for r in done if r["request_rate"] != "inf"), key=lambda result: result["request_rate"])
    if len(swept) < 2:
        return [
            _distribution(name, done) for name in ("ttft", "itl") if done and done[0][f"median_{name}_ms"] is not None
        ]
    return [curve for panel in PANELS if (curve := _against_rate(swept, *panel)).lines]


def _against_rate(swept: Sequence[dict[str, Any]], title: str, unit: str, lines: dict[str, str]) -> Curve:
    there = {label: name for label, name in lines.items() if all(result[name] is not None for result in swept)}
    values = {label: tuple(result[name] for result in swept) for label, name in there.items()}
    return Curve(title, "offered requests/s", unit, tuple(result["request_rate"] for result in swept), values)


def _distribution(name: str, done: Sequence[dict[str, Any]]) -> Curve:
    from trinity.bench.open_load import SHARES

    lines = {f"{result['request_rate']}/s": tuple(result[f"percentiles_{name}_ms"]) for result in done}
    return Curve(name.upper(), "% that took longer", "ms", tuple(100 - share for share in SHARES), lines)


def _read_key(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"key file {path} does not exist")
    return path.read_text().strip()


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _finite(text: str) -> float:
    value = _positive(text)
    if value == math.inf:
        raise argparse.ArgumentTypeError("inf is only for --request-rate")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def _goal(text: str) -> tuple[str, float]:
    name, _, bound = text.partition(":")
    if name not in GOALS or not bound:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(GOALS)}, a colon and milliseconds")
    return name, _finite(bound)
