"""`trinity bench rivals prefixes`: the loads of `trinity bench serve --prefixes` in our engine and in vLLM's, prefix caches on.

Decisions: requests are asked in each engine's own process, greedily and in float32, so many at once, each conversation's next
turn when it has its answer, by the same loop. A turn's process meets all loads one after the other, after a small one that is
not timed; ids are drawn anew for each load and round, the same for both. Answers are compared: where two tokens are nearly as
likely the programs may part, and a conversation then goes on with each one's own. llama.cpp's C API has no scheduler.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trinity.bench import models, prefixes
from trinity.bench.prefixes import CHAT, DRAWN, SHARED, TURNS, ideal
from trinity.bench.report import Report, Table, percentile, ratio
from trinity.bench.rivals.programs import NO_OPPONENT, OURS, VLLM, Arm, Place, in_turns, running
from trinity.utils.terminal import say

USUAL: dict[str, Any] = {**prefixes.USUAL, "block_size": None}
QUICK: dict[str, Any] = {**prefixes.QUICK, "block_size": None}
LOADS = (CHAT, SHARED, DRAWN)
LEAST_ALIKE = 0.9  # of answers
MAX_BATCHED_TOKENS = 1024  # in one pass, of both
COLUMNS = ("load", "arm", "TTFT p50 ms", "p99 ms", "tokens/s", "processor s", "hits %", "ideal %", "runs")
RATIOS = (
    "load",
    "TTFT p50, theirs / ours",
    "tokens/s, ours / theirs",
    "processor time, theirs / ours",
    "same answers",
    "",
)
Turn = dict[str, Any]  # mode; of each load what child.talks tells


def measure(given: argparse.Namespace) -> Report:
    model = models.config_of(given.preset).model
    longest = min(2 * given.input_len + TURNS * given.output_len, model.max_position_embeddings)
    size = {"max_num_seqs": given.concurrency, "max_model_len": longest, "max_num_batched_tokens": MAX_BATCHED_TOKENS}
    place = Place(given, size)
    path = models.checkpoint(model, place.out / f"{given.preset}-float32")
    arms, drawn = [Arm(program, "float32", path) for program in (OURS, VLLM)], _drawn(given, model.vocab_size)
    turns: dict[str, list[Turn]] = {arm.program: [] for arm in arms}
    for arm in in_turns(arms, given.rounds):
        turns[arm.program].append(_turn(place, arm, drawn[len(turns[arm.program])], given))
        say(f"  {arm.program}: {_summary(turns[arm.program][-1])}")
    return _report(given, turns)


def _drawn(given: argparse.Namespace, vocab_size: int) -> list[dict[str, list[Any]]]:
    """Loads of each round, "" the first one of a process."""
    import numpy as np

    small = {**vars(given), "input_len": max(TURNS, given.input_len // 4)}
    return [
        {"": prefixes.talks_of(CHAT, small, vocab_size, np.random.default_rng([number]))}
        | {load: prefixes.talks_of(load, vars(given), vocab_size, np.random.default_rng([number, at]))
           for at, load in enumerate(LOADS, 1)}
        for number in range(given.rounds)
    ]  # fmt: skip


def _turn(place: Place, arm: Arm, drawn: Mapping[str, list[Any]], given: argparse.Namespace) -> Turn:
    how = {"do": "talks", "concurrency": given.concurrency, "output_len": given.output_len}
    with running(place, arm) as program:
        found = {load: program.ask(talks=list(map(asdict, talks)), **how) for load, talks in drawn.items()}
        return {"mode": program.mode, **found}


# -- the report


def _report(given: argparse.Namespace, turns: Mapping[str, list[Turn]]) -> Report:
    report, size = Report("rivals-prefixes"), f"Prompts of about {given.input_len} tokens, {given.concurrency} at once"
    title = f"{size}: preset {given.preset} in fp32, {given.threads} threads, {given.rounds} turns"
    rows = tuple(_row(load, program, found) for load in LOADS for program, found in turns.items())
    report.tables.append(Table(title, COLUMNS, rows))
    beside = tuple(_compared(load, turns) for load in LOADS)
    report.tables.append(Table("Ours beside vLLM", RATIOS, beside))
    for load in LOADS:
        if (same := _same(load, turns)) < LEAST_ALIKE:
            report.failure = f"{load}: {same:.0%} of the answers are the same: times mean nothing"
    report.results += [{"arm": program, "turns": list(map(_figures, found))} for program, found in turns.items()]
    return report


def _row(load: str, program: str, turns: Sequence[Turn]) -> tuple[Any, ...]:
    found = [turn[load] for turn in turns]
    ttft_ms = [1e3 * each for turn in found for each in turn["ttft_s"]]
    per_s = sum(map(_num_said, found)) / sum(turn["seconds"] for turn in found)
    hits = sum(turn["num_cached"] for turn in found) / sum(map(_num_asked, found))
    best = sum(ideal(turn["prompts"], turn["answers"]) for turn in found) / len(found)
    cpu_s = sum(turn["cpu_s"] for turn in found)
    figures = (percentile(ttft_ms, 0.5), percentile(ttft_ms, 0.99), per_s, cpu_s, 100 * hits, 100 * best)
    return (load, program, *figures, turns[0]["mode"])


def _compared(load: str, turns: Mapping[str, list[Turn]]) -> tuple[Any, ...]:
    ours, theirs = ([turn[load] for turn in turns[program]] for program in (OURS, VLLM))
    ttft = [[percentile(turn["ttft_s"], 0.5) for turn in found] for found in (theirs, ours)]
    rates = [[_num_said(turn) / turn["seconds"] for turn in found] for found in (ours, theirs)]
    cpu = [[turn["cpu_s"] for turn in found] for found in (theirs, ours)]
    remark = NO_OPPONENT if any(turn["mode"] == "eager" for turn in turns[VLLM]) else ""
    return load, ratio(*ttft), ratio(*rates), ratio(*cpu), f"{_same(load, turns):.0%}", remark


def _same(load: str, turns: Mapping[str, list[Turn]]) -> float:
    """Share of answers that both gave."""
    pairs = [pair for ours, theirs in zip(turns[OURS], turns[VLLM], strict=True)
             for pair in _answers(ours[load], theirs[load])]  # fmt: skip
    return sum(mine == yours for mine, yours in pairs) / len(pairs)


def _answers(ours: Turn, theirs: Turn) -> Iterator[tuple[list[int], list[int]]]:
    return ((answer, theirs["answers"][name]) for name, answer in ours["answers"].items())


def _num_said(turn: Turn) -> int:
    return sum(map(len, turn["answers"].values()))


def _num_asked(turn: Turn) -> int:
    return sum(map(len, turn["prompts"].values()))


def _figures(turn: Turn) -> Turn:
    """A turn without its texts, for the JSON."""
    return {load: {name: value for name, value in found.items() if name not in ("prompts", "answers")}
            for load, found in turn.items() if load in LOADS} | {"mode": turn["mode"]}  # fmt: skip


def _summary(turn: Turn) -> str:
    rates = (f"{load} {_num_said(turn[load]) / turn[load]['seconds']:,.0f}" for load in LOADS)
    return f"{', '.join(rates)} tokens/s {turn['mode']}"
