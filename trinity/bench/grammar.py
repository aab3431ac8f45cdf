"""`trinity bench grammar`: what grammars add to a decode step, at Nano's shape with as many of its layers as fit.

Legend: B requests, V vocabulary. Decisions: one engine decodes B requests that are free and B that follow a schema, in turns;
what lies between their steps is what grammars cost, for the masks are made while the pass runs. Few layers make a short step,
in which masks have least time, so the difference is an upper bound. Its share is given of that step and of one with all
layers, whose time is that of the measured ones and the head's, multiplied. Weights are random; tokens are pieces of a small
vocabulary and pairs of them, as many as the model has.
"""

import argparse
import statistics
import time
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity.bench.models import config_of
from trinity.bench.report import Report, Table, alternated, percentile
from trinity.config import EngineConfig, ModelConfig, num_cpus
from trinity.text.grammar.constraint import Constraint

if TYPE_CHECKING:
    from trinity.engine.engine import Engine
    from trinity.models.common.decoder import CausalLM
    from trinity.text.tokenizer import Tokenizer

USUAL: dict[str, Any] = {"preset": "nano", "layers": 6, "concurrency": 32, "steps": 24, "rounds": 5}
QUICK: dict[str, Any] = {"preset": "tiny", "layers": 2, "concurrency": 4, "steps": 4, "rounds": 1}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3},
        "scores": {"type": "array", "items": {"type": "number"}, "minItems": 3},
    },
    "required": ["name", "age", "mail", "tags", "scores"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}
FREE, BOUND = "free", "by a schema"


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help=f"model (default: {USUAL['preset']}; with --quick tiny)")
    for name, text in (("layers", "of the model that are there"), ("concurrency", "requests at once"),
                       ("steps", "in a turn"), ("rounds", "turns of each"), ("threads", "of the engine")):  # fmt: skip
        default = f" (default: {USUAL[name]})" if name in USUAL else " (default: all cores)"
        parser.add_argument(f"--{name}", type=int, help=text + default)


class Steps(NamedTuple):
    """Milliseconds of each step of a turn."""

    milliseconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def measure(arguments: argparse.Namespace) -> Report:
    import torch

    given = {**(QUICK if arguments.quick else USUAL), **{k: v for k, v in vars(arguments).items() if v is not None}}
    threads = given.get("threads") or num_cpus()
    torch.set_num_threads(threads)
    whole = config_of(given["preset"]).model
    engine, model = _engine(whole, given, threads)
    arms = {FREE: None, BOUND: Constraint.of({"json": SCHEMA})}
    found = alternated({name: partial(_turn, engine, given, wish) for name, wish in arms.items()}, given["rounds"])
    return _report(whole, given, found, _masks(engine, given), _head_ms(model, given))


def _engine(whole: ModelConfig, given: dict[str, Any], threads: int) -> tuple["Engine", "CausalLM"]:
    from trinity.engine.engine import Engine
    from trinity.engine.weights import FixedWeights
    from trinity.models.registry import build
    from trinity.pool.local import local_pool
    from trinity.rpc.messages import Load

    layers = {"num_hidden_layers": given["layers"], "layer_types": (), "dtype": "float32"}
    config = whole.model_validate({**whole.model_dump(), **layers})
    model = build(config, local_pool(config, Load(training=False)).dispatcher()).eval()
    length = 16 + given["steps"]
    most = given["concurrency"]
    settings = EngineConfig(
        num_threads=threads,
        max_num_seqs=most,
        max_model_len=length,
        kv_cache_bytes=1 << 30,
        max_num_batched_tokens=8 * most,
        max_draft_tokens=0,  # a token in each step
    )
    return Engine(FixedWeights(model, 0), config, settings, _wide(config.vocab_size)), model


def _wide(size: int) -> "Tokenizer":
    """A tokenizer whose table has that many tokens, for an engine that is given ids."""
    from trinity.text.tokenizer import Tokenizer

    texts = (path.read_text() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    own = Tokenizer.train(texts, min(size, 4096))
    added = set(own.added_ids.values())
    pieces = [token for i, token in enumerate(own.token_bytes) if i not in added and len(token) > 1]
    own.token_bytes += [a + b for a, b in islice(product(pieces, pieces), size - len(own.token_bytes))]
    return own


def _turn(engine: "Engine", given: dict[str, Any], wish: Constraint | None) -> Steps:
    from trinity.engine.request import SamplingParams

    params = SamplingParams(max_tokens=given["steps"], temperature=0, ignore_eos=True, structured_outputs=wish)
    for i in range(given["concurrency"]):
        engine.add(str(i), [20 + i, 30, 40 + i], params)
    engine.step()
    spent = []
    while engine.has_work:
        started = time.perf_counter()
        engine.step()
        spent.append(1000 * (time.perf_counter() - started))
    return Steps(spent)


def _masks(engine: "Engine", given: dict[str, Any]) -> list[float]:
    """Milliseconds of single masks along an answer of greedy tokens, by themselves."""
    import numpy as np

    at, spent, rng = engine.grammars.progress(Constraint.of({"json": SCHEMA}), [20]), [], np.random.default_rng(0)
    for _ in range(given["steps"] * given["concurrency"]):
        started = time.perf_counter()
        allowed_V = at.allowed_V()
        spent.append(1000 * (time.perf_counter() - started))
        assert allowed_V is not None, "the schema has no end that these steps reach"
        at.take(int(rng.choice(np.flatnonzero(allowed_V))))
    return spent


def _head_ms(model: "CausalLM", given: dict[str, Any]) -> float:
    import torch

    spent, hidden_BD = [], torch.randn(given["concurrency"], model.config.hidden_size)
    with torch.inference_mode():
        for _ in range(1 + given["rounds"]):
            started = time.perf_counter()
            model.logits(hidden_BD)
            spent.append(1000 * (time.perf_counter() - started))
    return statistics.median(spent[1:])


def _report(
    whole: ModelConfig, given: dict[str, Any], found: dict[str, list[Steps]], masks: list[float], head_ms: float
) -> Report:
    report = Report("grammar")
    free, bound = (statistics.median(steps.median for steps in found[name]) for name in (FREE, BOUND))
    more = statistics.median(b.median - f.median for f, b in zip(found[FREE], found[BOUND], strict=True))
    all_layers = head_ms + (free - head_ms) * whole.num_hidden_layers / given["layers"]
    rows = (
        (f"a step of {given['layers']} layers, {FREE}", free),
        (f"the same, {BOUND}", bound),
        ("the head of it", head_ms),
        (f"a step of {whole.num_hidden_layers} layers, by those", all_layers),
        ("a mask by itself, median", percentile(masks, 0.5)),
        ("a mask by itself, 99th of 100", percentile(masks, 0.99)),
    )
    title = f"{given['preset']}, {given['concurrency']} requests, a vocabulary of {whole.vocab_size:,}"
    report.tables.append(Table(title, ("", "ms"), rows))
    report.target("grammars / step of the layers measured", more / free, at_most=0.05)
    report.target("grammars / step of all layers", more / all_layers, at_most=0.05)
    report.results.append({"free": found[FREE], "bound": found[BOUND], "masks_ms": masks})
    return report
