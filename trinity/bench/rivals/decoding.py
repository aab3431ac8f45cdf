"""`trinity bench rivals decode`: tokens per second and processor time of a decode step, beside llama.cpp and vLLM.

Legend: B requests, N new tokens.
Decisions: the same checkpoint in each format, and the same prompts; greedy, to the full length. Where weights are float32, all
must say the same tokens before any time counts; rounding to 16 or 8 bits each in its own way, they need not, and the share of
first tokens that are ours is told. Ours in int8 has all its matrices so but the embedding and the routers.
Steps count from the moment when all requests have a first token.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trinity.bench import models
from trinity.bench.apart import check_room
from trinity.bench.decode import agreement
from trinity.bench.load import written
from trinity.bench.report import Report, Table, ratio
from trinity.bench.rivals.programs import LLAMA, NO_OPPONENT, OURS, VLLM, Arm, Place, gguf, in_turns, running
from trinity.config import preset
from trinity.utils.terminal import say

USUAL: dict[str, Any] = {"preset": "bench", "rounds": 3, "prompt_len": 64, "new_tokens": 49, "requests": (1, 32)}
QUICK: dict[str, Any] = {"preset": "tiny", "rounds": 1, "prompt_len": 8, "new_tokens": 5, "requests": (1, 4)}
USUAL |= {"block_size": None}
QUICK |= {"block_size": None}
LARGE: dict[str, Any] = {**USUAL, "prompt_len": 16, "new_tokens": 17}
WARM_PROMPT, WARM_TOKENS, CHECKED_TOKENS = 8, 3, 17
FILES = {"nano": ("q8_0",)}  # for llama.cpp; of the others in 16 bits, too
HELD = ("bench", "mini-slice", "nano")  # to the targets


class Pair(NamedTuple):
    """Kinds of numbers that are held against each other, and how much faster ours is to be."""

    ours: str
    program: str
    theirs: str
    at_least: float


PAIRS = (
    Pair("float32", LLAMA, "float32", 1.2),
    Pair("bfloat16", LLAMA, "float16", 1.2),
    Pair("int8", LLAMA, "q8_0", 1.2),
    Pair("bfloat16", VLLM, "bfloat16", 1.0),
)
COLUMNS = ("arm", "tokens/s median", "min", "max", "ms a step", "processor ms a step", "first tokens as ours", "runs")
RATIOS = ("ours / theirs", "at once", "tokens/s", "of turns, least and most", "processor time, theirs / ours", "")
Turn = dict[str, Any]  # mode; of each number of requests what child.decode tells


def is_large(name: str) -> bool:
    return preset(name).dtype == "bfloat16"


def measure(given: argparse.Namespace) -> Report:
    most = max(given.requests)
    size = {"max_num_seqs": most, "max_model_len": given.prompt_len + max(given.new_tokens, CHECKED_TOKENS)}
    place = Place(given, {**size, "max_num_batched_tokens": most * given.prompt_len})
    wide, narrow = _arms(given, place)
    prompts = models.random_ids(models.shape(given.preset, None), most, given.prompt_len)
    report = Report("rivals-decode")
    if wide:
        _check(report, place, wide, prompts)
    turns: dict[Arm, list[Turn]] = {arm: [] for arm in (*wide, *narrow) if not arm.eager}
    for arm in in_turns(list(turns), given.rounds):
        turns[arm].append(_turn(place, arm, prompts, given))
        say(f"  {arm.name}: {_summary(turns[arm][-1], given.requests)}")
    _tell(report, given, turns)
    return report


def _arms(given: argparse.Namespace, place: Place) -> tuple[list[Arm], list[Arm]]:
    """-> arms in float32, which must agree and of which vLLM is only asked that; arms of fewer bits. Presets in bf16, which are
    large, have the latter alone."""
    config, wide = models.shape(given.preset, None), list[Arm]()
    if is_large(given.preset):
        low = master = place.out / f"{given.preset}-{config.num_hidden_layers}-random"
        check_room(written(config, low))
    else:
        low = models.checkpoint(config, place.out / f"{given.preset}-bfloat16")
        master = models.checkpoint(models.config_of(given.preset).model, place.out / f"{given.preset}-float32")
        wide = [Arm(OURS, "float32", master), *_files(given, place, master, "float32")]
        wide += [Arm(VLLM, "float32", master, eager=True)]
    narrow = [Arm(OURS, "bfloat16", low), Arm(OURS, "int8", low), Arm(VLLM, "bfloat16", low)]
    narrow += _files(given, place, master, *FILES.get(given.preset, ("float16", "q8_0")))
    wide, narrow = ([arm for arm in arms if arm.program not in given.without] for arms in (wide, narrow))
    return wide, narrow


def _files(given: argparse.Namespace, place: Place, master: Path, *kinds: str) -> list[Arm]:
    return [] if LLAMA in given.without else [Arm(LLAMA, kind, gguf(place, master, kind)) for kind in kinds]


def _check(report: Report, place: Place, arms: Sequence[Arm], prompts: Sequence[Sequence[int]]) -> None:
    """All others' tokens against those of the first arm, ours. The report fails unless they are the same, but for ties."""
    say(f"comparing tokens of {', '.join(arm.name for arm in arms)}")
    oracle, rows = _said(place, arms[0], prompts, gaps=True), []
    gaps_NB = list(zip(*oracle["gaps"], strict=True))
    for arm in arms[1:]:
        same, ties, other = agreement(_said(place, arm, prompts)["tokens"], oracle["tokens"], gaps_NB)
        rows.append((arm.name, same, len(ties), len(other), "; ".join([*other, *ties][:3])))
        if other:
            report.failure = f"{arm.name}: {len(other)} answers are not ours, first {other[0]}: times mean nothing"
    title = f"Greedy tokens against ours in float32: {len(prompts)} requests of {CHECKED_TOKENS} tokens"
    report.tables.append(Table(title, ("arm", "identical", "ties", "different", "the first ones"), tuple(rows)))


def _said(place: Place, arm: Arm, prompts: Sequence[Sequence[int]], gaps: bool = False) -> Turn:
    with running(place, arm) as program:
        return program.ask(do="decode", prompts=prompts, num_new=CHECKED_TOKENS, gaps=gaps)


def _turn(place: Place, arm: Arm, prompts: Sequence[Sequence[int]], given: argparse.Namespace) -> Turn:
    with running(place, arm) as program:
        for num in given.requests:
            short = [prompt[:WARM_PROMPT] for prompt in prompts[:num]]
            program.ask(do="decode", prompts=short, num_new=WARM_TOKENS)
        runs = {
            str(num): program.ask(do="decode", prompts=prompts[:num], num_new=given.new_tokens)
            for num in given.requests
        }
        return {"mode": program.mode, **runs}


# -- the report


def _rate(turn: Turn, num: int) -> float:
    return float(turn[str(num)]["num_decoded"] / turn[str(num)]["seconds"])


def _cpu_ms(turn: Turn, num: int) -> float:
    return float(1e3 * turn[str(num)]["cpu_s"] / turn[str(num)]["num_steps"])


def _summary(turn: Turn, requests: Sequence[int]) -> str:
    rates = ", ".join(
        f"{num} at once {_rate(turn, num):,.0f} tokens/s, {_cpu_ms(turn, num):.1f} ms" for num in requests
    )
    return f"{rates} of a processor a step{'; ' if turn['mode'] else ''}{turn['mode']}"


def _tell(report: Report, given: argparse.Namespace, turns: Mapping[Arm, list[Turn]]) -> None:
    size = f"{given.prompt_len} + {given.new_tokens} tokens, {given.threads} threads, {given.rounds} turns"
    for num in given.requests:
        rows = tuple(_row(arm, found, num, turns) for arm, found in turns.items())
        report.tables.append(Table(f"Decoding {num} at once: preset {given.preset}, {size}", COLUMNS, rows))
    pairs = [pair for pair in PAIRS if _both(pair, turns)]
    beside = tuple(_compared(report, given, turns, pair, num) for pair in pairs for num in given.requests)
    report.tables.append(Table("Ours beside theirs", RATIOS, beside))
    report.results += [{"arm": arm.name, "turns": found} for arm, found in turns.items()]


def _row(arm: Arm, found: list[Turn], num: int, turns: Mapping[Arm, list[Turn]]) -> tuple[Any, ...]:
    rates = [_rate(turn, num) for turn in found]
    ours = _firsts(next(iter(turns.values())), num)
    same = sum(a == b for a, b in zip(_firsts(found, num), ours, strict=True))
    cpu_ms = statistics.median(_cpu_ms(turn, num) for turn in found)
    median = statistics.median(rates)
    return arm.name, median, min(rates), max(rates), 1e3 * num / median, cpu_ms, f"{same} of {num}", found[0]["mode"]


def _firsts(found: Sequence[Turn], num: int) -> list[int]:
    return [tokens[0] for tokens in found[0][str(num)]["tokens"]]


def _both(pair: Pair, turns: Mapping[Arm, list[Turn]]) -> tuple[list[Turn], list[Turn]] | None:
    by_name = {(arm.program, arm.kind): found for arm, found in turns.items()}
    ours, theirs = by_name.get((OURS, pair.ours)), by_name.get((pair.program, pair.theirs))
    return (ours, theirs) if ours and theirs else None


def _compared(
    report: Report, given: argparse.Namespace, turns: Mapping[Arm, list[Turn]], pair: Pair, num: int
) -> tuple[Any, ...]:
    ours, theirs = _both(pair, turns) or ([], [])
    rates = [[_rate(turn, num) for turn in found] for found in (ours, theirs)]
    each = [a / b for a, b in zip(*rates, strict=True)]
    cpu = [[_cpu_ms(turn, num) for turn in found] for found in (theirs, ours)]
    what, unfair = f"{pair.ours} / {pair.program} {pair.theirs}", any(turn["mode"] == "eager" for turn in theirs)
    if given.preset in HELD and not given.quick and not unfair:
        report.target(f"{num} at once, {what}: tokens/s", ratio(*rates), at_least=pair.at_least)
    return what, num, ratio(*rates), f"{min(each):.3g}, {max(each):.3g}", ratio(*cpu), NO_OPPONENT if unfair else ""
