"""`trinity bench formats CHECKPOINT`: what a model loses where its weights are rounded: divergence, perplexity, greedy tokens.

Legend: B windows of text, S tokens of one, V vocabulary.
Decisions: the same tokens go through the checkpoint as it is and through each form, and their distributions are compared token
by token: KL(as it is || form), in nats. Perplexity is of the text itself. Arms whose name begins with `experts` round routed
experts as `placement.expert_dtype` does, `backbone` the rest as `engine.weight_dtype` does, `both` both; `weights` are those
that `trinity convert --to` writes, read again. The text should be none that the model was trained on: by default this package's
own sources.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity.bench.report import Report, Table
from trinity.config import num_cpus
from trinity.errors import ConfigError
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from trinity.checkpoint import Checkpoint
    from trinity.models.common.decoder import CausalLM

SOURCES = Path(__file__).parents[1]
USUAL: dict[str, Any] = {"text": SOURCES, "windows": 64, "tokens": 512}
QUICK: dict[str, Any] = {"text": SOURCES, "windows": 2, "tokens": 64}
DTYPES, WEIGHTS = ("bfloat16", "int8", "fp8", "nvfp4"), ("int8", "fp8")
MOST_KL = {"bfloat16": 1e-3, "int8": 1e-2, "fp8": 1e-2}  # mean nats a token: the gate, but of `weights`


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a folder, or a model's name on the Hub")
    parser.add_argument("--text", type=Path, help="a file, or a folder of .py, .md and .txt files (default: ours)")
    parser.add_argument("--windows", type=int, help=f"pieces of text (default: {USUAL['windows']})")
    parser.add_argument("--tokens", type=int, help=f"tokens of a piece (default: {USUAL['tokens']})")


def measure(arguments: argparse.Namespace) -> Report:
    import torch

    from trinity.checkpoint import open_checkpoint

    given = {**(QUICK if arguments.quick else USUAL), **{k: v for k, v in vars(arguments).items() if v is not None}}
    torch.set_num_threads(num_cpus())
    source = open_checkpoint(given["checkpoint"])
    ids_BS = _windows(source, given["text"], given["windows"], given["tokens"])
    report, rows, as_is = Report("formats"), [], _loaded(source, None)
    for arm, model in _arms(source, as_is):
        say(arm)
        found = _scores(model(), ids_BS, as_is)
        rows.append((arm, found.kl, found.kl_p99, f"{found.perplexity:.3f}", f"{found.same_token:.2%}"))
        report.results.append({"arm": arm, **found._asdict()})
        what, _, dtype = arm.partition(" ")
        if what != "weights" and dtype in MOST_KL:
            report.target(f"{arm}: mean KL", found.kl, at_most=MOST_KL[dtype])
    columns = ("weights", "mean KL, nats", "99th percentile", "perplexity", "same likeliest token")
    title = f"{source.name}: {ids_BS.numel():,} tokens of text"
    report.tables.append(Table(title, columns, tuple(rows)))
    return report


class _Scores(NamedTuple):
    """Scores of some weights on the text, and how far they are from those of the checkpoint as it is."""

    perplexity: float
    kl: float
    kl_p99: float
    same_token: float


def _scores(model: "CausalLM", ids_BS: "Tensor", reference: "CausalLM") -> _Scores:
    import torch

    nll, kl, same = [], [], []
    with torch.inference_mode():
        for (
            ids_S
        ) in ids_BS:  # the reference again each time: distributions of all windows may be more than memory holds
            wanted_SV, found_SV = (_logprobs(each, ids_S) for each in (reference, model))
            nll.append(-found_SV.gather(1, ids_S[1:, None])[:, 0])
            kl.append((wanted_SV.exp() * (wanted_SV - found_SV)).sum(-1))
            same.append((found_SV.argmax(-1) == wanted_SV.argmax(-1)).float())
    kl_N = torch.cat(kl)
    figures = (torch.cat(nll).mean().exp(), kl_N.mean(), kl_N.quantile(0.99), torch.cat(same).mean())
    return _Scores(*map(float, figures))


def _logprobs(model: "CausalLM", ids_S: "Tensor") -> "Tensor":
    """Log-probabilities [S - 1, V] of what follows each token of a window, which sees those before it."""
    from trinity.models.common.attention import PackedAttention, packed_positions

    out = model(ids_S, packed_positions(1, len(ids_S)), PackedAttention(model.config, None, 1, len(ids_S)))
    return model.logits(out.hidden_TD)[:-1].float().log_softmax(-1)


def _arms(source: "Checkpoint", as_is: "CausalLM") -> Iterator[tuple[str, "Callable[[], CausalLM]"]]:
    from trinity.checkpoint import open_checkpoint
    from trinity.checkpoint.forms import FORMS
    from trinity.checkpoint.rewrite import rewrite

    yield "as it is", lambda: as_is
    arms: list[tuple[str, str, tuple[str | None, str]]] = [("experts", dtype, (dtype, "auto")) for dtype in DTYPES]
    arms += [("backbone", dtype, (None, dtype)) for dtype in DTYPES] + [("both", d, (d, d)) for d in DTYPES]
    for what, dtype, given in arms:
        if dtype != source.config.dtype:
            yield f"{what} {dtype}", lambda given=given: _loaded(source, *given)  # type: ignore[misc]
    for name in WEIGHTS:
        with tempfile.TemporaryDirectory() as folder:
            rewrite(source, Path(folder) / name, form=FORMS[name])
            yield f"weights {name}", lambda: _loaded(open_checkpoint(Path(folder) / name), None)  # noqa: B023  at once


def _loaded(source: "Checkpoint", expert_dtype: str | None, weight_dtype: str = "auto") -> "CausalLM":
    from trinity.pool.local import local_pool
    from trinity.rpc.messages import Load

    pool = local_pool(source.config, Load(source.name, training=False), expert_dtype=expert_dtype)
    return source.load_model(pool.dispatcher(source.version), "cpu", weight_dtype)


def _windows(source: "Checkpoint", text: Path, num: int, size: int) -> "Tensor":
    """ids_BS, from everywhere in the text."""
    import torch

    files = sorted(p for p in text.rglob("*") if p.suffix in (".py", ".md", ".txt")) if text.is_dir() else [text]
    ids = [i for path in files for i in source.tokenizer.encode(path.read_text(errors="replace"))]
    if len(ids) < num * size:
        raise ConfigError(
            f"{text} has {len(ids):,} tokens; {num} windows of {size} take {num * size:,}: name more text"
        )
    step = (len(ids) - size) // max(1, num - 1)
    return torch.tensor([ids[i * step : i * step + size] for i in range(num)])
