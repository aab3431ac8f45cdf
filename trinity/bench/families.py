"""`trinity bench decode --families`: what decoding gains over transformers in each family of models, at the same sizes.

Decisions: milliseconds of processor time a decode step, of one thread, so that others on the machine do not count; all programs
of a type of weights take turns within one run. In fp32 the greedy tokens are compared before anything is timed, as in
decode.py; in bf16 two programs' tokens part at near ties. What the families have in common is the preset's, the rest as their
published models have it.
"""

import argparse
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
USUAL: dict[str, Any] = {"requests": (1, 32), "prompt_len": 16, "new_tokens": 33, "rounds": 5}
QUICK: dict[str, Any] = {"requests": (1, 2), "prompt_len": 4, "new_tokens": 3}
DTYPES = ("float32", "bfloat16")
LEAST_GAIN = 0.8  # of the first family's


class Arm(NamedTuple):
    family: str
    program: str
    requests: int


Programs = Mapping[tuple[str, str], Any]  # by family and program: Ours or Theirs


def measure(given: argparse.Namespace) -> Report:
    import torch

    torch.set_num_threads(1)
    report, rows = Report("decode-families"), list[tuple[Any, ...]]()
    for dtype in DTYPES:
        programs = {(family, name): made for family in OWN for name, made in _programs(given, family, dtype)}
        if dtype == DTYPES[0]:
            _check(report, given, programs)
        rows += _rows(report, dtype, _timed(given, programs))
    title = f"A decode step: preset {given.preset}, {given.rounds} rounds, ms of processor time of one thread"
    columns = ("weights", "requests", "family", "ours", TRANSFORMERS, "gain", f"/ {FIRST}'s")
    report.tables.append(Table(title, columns, tuple(rows)))
    return report


def shape(name: str, family: str, dtype: str) -> ModelConfig:
    """The preset's sizes, as a model of that family."""
    known = ModelConfig.families[family].model_fields
    shared = {field: value for field, value in preset(name).model_dump().items() if field in known}
    return ModelConfig.of({**shared, **OWN[family], "model_type": family, "dtype": dtype})


def _programs(given: argparse.Namespace, family: str, dtype: str) -> list[tuple[str, Any]]:
    from trinity.llm import LLM

    model = shape(given.preset, family, dtype)
    path = models.checkpoint(model, Path(given.out) / f"{given.preset}-{family}-{dtype}")
    most, length = max(given.requests), given.prompt_len + given.new_tokens
    settings = EngineConfig(
        num_threads=1, max_num_seqs=most, max_model_len=length, max_num_batched_tokens=most * given.prompt_len,
        kv_cache_bytes=1 << 30, max_draft_tokens=0,
    )  # fmt: skip
    ours = Ours(LLM(path, engine=settings, device="cpu").engine, time.process_time)
    return [(HERE, ours), (TRANSFORMERS, Theirs(path, dtype, time.process_time))]


def _check(report: Report, given: argparse.Namespace, programs: Programs) -> None:
    """Note a family's tokens that are others than transformers', beyond ties: the report fails then."""
    for family in OWN:
        say(f"comparing tokens of {family}")
        prompts = models.random_ids(shape(given.preset, family, DTYPES[0]), max(given.requests), given.prompt_len)
        theirs = programs[family, TRANSFORMERS]
        oracle = theirs.run(prompts, given.new_tokens, look=True).tokens
        found = programs[family, HERE].run(prompts, given.new_tokens).tokens
        _, _, other = agreement(found, oracle, theirs.gaps_NB)
        if other:
            report.failure = f"greedy tokens of {family} and transformers differ, first {other[0]}: times mean nothing"


def _timed(given: argparse.Namespace, programs: Programs) -> dict[Arm, list[float]]:
    """Milliseconds of each round's steps."""
    runs: dict[Arm, Callable[[], float]] = {}
    for requests in given.requests:
        for (family, name), program in programs.items():
            prompts = models.random_ids(shape(given.preset, family, DTYPES[0]), requests, given.prompt_len)
            runs[Arm(family, name, requests)] = partial(_step_ms, program, prompts, given.new_tokens)
    return alternated(runs, given.rounds)


def _step_ms(program: Any, prompts: list[list[int]], num_new: int) -> float:
    found: Run = program.run(prompts, num_new)
    return 1e3 * found.decode_s / (num_new - 1)


def _rows(report: Report, dtype: str, found: Mapping[Arm, list[float]]) -> list[tuple[Any, ...]]:
    rows = []
    for requests in dict.fromkeys(arm.requests for arm in found):
        gains = {
            family: ratio(found[Arm(family, TRANSFORMERS, requests)], found[Arm(family, HERE, requests)])
            for family in OWN
        }
        for family, gain in gains.items():
            medians = [statistics.median(found[Arm(family, name, requests)]) for name in (HERE, TRANSFORMERS)]
            rows.append((dtype, requests, family, *medians, gain, gain / gains[FIRST]))
            if family != FIRST:
                what = f"{family}, {dtype}, {requests} requests: gain / {FIRST}'s"
                report.target(what, gain / gains[FIRST], at_least=LEAST_GAIN)
    return rows
