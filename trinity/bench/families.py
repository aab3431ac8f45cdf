"""`trinity bench decode --families`: what decoding gains over transformers in each family of models, at the same sizes.

Decisions: milliseconds of processor time a decode step, of one thread, so that others on the machine do not count; the two
programs of a family take turns. In fp32 the greedy tokens are compared before anything is timed, as in decode.py; in bf16 two
programs' tokens part at near ties. What the families have in common is the preset's, the rest as their
published models have it.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trinity.bench import models
from trinity.bench.decode import Ours, Run, Theirs, agreement
from trinity.bench.models import HERE, TRANSFORMERS
from trinity.bench.report import Report, Table, alternated, ratio
from trinity.config import EngineConfig, ModelConfig, preset
from trinity.utils.terminal import say

FIRST = "afmoe"
OWN: dict[str, dict[str, Any]] = {
    FIRST: {},
    "qwen3_moe": {"norm_topk_prob": True},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True},
}
DTYPES = ("float32", "bfloat16")
USUAL: dict[str, Any] = {"requests": (1, 32), "prompt_len": 16, "new_tokens": 33, "rounds": 5, "dtypes": DTYPES}
USUAL |= {"kinds": tuple(OWN)}
QUICK: dict[str, Any] = {"requests": (1, 2), "prompt_len": 4, "new_tokens": 3, "dtypes": DTYPES[:1]}
QUICK |= {"kinds": (FIRST, "glm4_moe")}
LEAST_GAIN = 0.8  # of the first family's


class Arm(NamedTuple):
    dtype: str
    requests: int
    family: str
    program: str


def measure(given: argparse.Namespace) -> Report:
    import torch

    torch.set_num_threads(1)
    report, found = Report("decode-families"), dict[Arm, list[float]]()
    for dtype in given.dtypes:
        for family in given.kinds:
            say(f"timing {family} in {dtype}")
            found |= _timed(report, given, shape(given.preset, family, dtype))
    title = f"A decode step: preset {given.preset}, {given.rounds} rounds, ms of processor time of one thread"
    columns = ("weights", "requests", "family", "ours", TRANSFORMERS, "gain", f"/ {FIRST}'s")
    report.tables.append(Table(title, columns, tuple(_rows(report, given, found))))
    return report


def shape(name: str, family: str, dtype: str) -> ModelConfig:
    """The preset's sizes, as a model of that family."""
    known = ModelConfig.families[family].model_fields
    shared = {field: value for field, value in preset(name).model_dump().items() if field in known}
    return ModelConfig.of({**shared, **OWN[family], "model_type": family, "dtype": dtype})


def _timed(report: Report, given: argparse.Namespace, model: ModelConfig) -> dict[Arm, list[float]]:
    """Milliseconds of each round's steps, by both programs in turns."""
    path = models.checkpoint(model, Path(given.out) / f"{given.preset}-{model.model_type}-{model.dtype}")
    programs = {HERE: _ours(given, path), TRANSFORMERS: Theirs(path, model.dtype, time.process_time)}
    if model.dtype == DTYPES[0]:
        _check(report, given, model, programs)
    runs: dict[Arm, Callable[[], float]] = {}
    for requests in given.requests:
        prompts = models.random_ids(model, requests, given.prompt_len)
        for name, program in programs.items():
            arm = Arm(model.dtype, requests, model.model_type, name)
            runs[arm] = partial(_step_ms, program, prompts, given.new_tokens)
    return alternated(runs, given.rounds)


def _ours(given: argparse.Namespace, path: Path) -> Ours:
    from trinity.llm import LLM

    most, length = max(given.requests), given.prompt_len + given.new_tokens
    settings = EngineConfig(
        num_threads=1, max_num_seqs=most, max_model_len=length, max_num_batched_tokens=most * given.prompt_len,
        kv_cache_bytes=256 << 20, max_draft_tokens=0,
    )  # fmt: skip
    return Ours(LLM(path, engine=settings, device="cpu").engine, time.process_time)


def _check(report: Report, given: argparse.Namespace, model: ModelConfig, programs: Mapping[str, Any]) -> None:
    """Note tokens that are others than transformers', beyond ties: the report fails then."""
    prompts, theirs = models.random_ids(model, max(given.requests), given.prompt_len), programs[TRANSFORMERS]
    oracle = theirs.run(prompts, given.new_tokens, look=True).tokens
    _, _, other = agreement(programs[HERE].run(prompts, given.new_tokens).tokens, oracle, theirs.gaps_NB)
    if other:
        report.failure = (
            f"greedy tokens of {model.model_type} and transformers differ, first {other[0]}: times mean nothing"
        )


def _step_ms(program: Any, prompts: list[list[int]], num_new: int) -> float:
    found: Run = program.run(prompts, num_new)
    return 1e3 * found.decode_s / (num_new - 1)


def _rows(report: Report, given: argparse.Namespace, found: Mapping[Arm, list[float]]) -> list[tuple[Any, ...]]:
    rows = []
    for dtype, requests in itertools.product(given.dtypes, given.requests):
        times = {arm[2:]: each for arm, each in found.items() if arm[:2] == (dtype, requests)}
        gains = {family: ratio(times[family, TRANSFORMERS], times[family, HERE]) for family in given.kinds}
        for family, gain in gains.items():
            medians = [statistics.median(times[family, name]) for name in (HERE, TRANSFORMERS)]
            rows.append((dtype, requests, family, *medians, gain, gain / gains[FIRST]))
            if family != FIRST:
                what = f"{family}, {dtype}, {requests} at once: gain / {FIRST}'s"
                report.target(what, gain / gains[FIRST], at_least=LEAST_GAIN)
    return rows
