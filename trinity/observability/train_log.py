"""The log of a training run.

Legend: L layers with experts, E experts.

Decisions.
- A run writes metrics.jsonl (one object a line: a step, a validation, or scores), expert_load.jsonl (rows per expert, at most
  about 200 times in a run) and TensorBoard events. A number that is not finite is null; a field that has nothing to say
  (no step was tried again) is left out.
- The first step that is logged says where a run resumes: lines from there on are dropped, so each step is there once,
  whatever was written between the last checkpoint and a crash. A line torn by the crash is dropped too.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)
LOADS_PER_RUN = 200
AFTER = {"val_loss", "scores"}  # in rows of what was found out after a step
NONE: Mapping[str, float] = {}


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all workers. Losses in nats per token; `skipped` counts the steps skipped so far.

    `retries` counts this step's attempts that came to nothing, by reason (trinity/train/retry.py). `seconds` and `phases_s` are
    of the attempt that counted; `checkpoint_s` is how long the checkpoint took that was finished since the step before.
    """

    step: int
    loss: float
    z_loss: float
    balance_loss: float
    grad_norm: float
    tokens: int
    seconds: float
    max_vio: float
    lrs: Mapping[str, float] = field(default_factory=dict)  # of each parameter group, that of hidden matrices first
    skipped: int = 0
    retries: Mapping[str, int] = field(default_factory=dict)
    phases_s: Mapping[str, float] = field(default_factory=dict)
    checkpoint_s: float | None = None
    counts_LE: Sequence[Sequence[int]] | None = None
    batch_het: float | None = None  # the highest mean loss of a micro-batch over the mean of all
    norm_kurtosis: float | None = None  # of the gradient norms of the last steps
    measures: Mapping[str, float] = field(default_factory=dict)  # what an objective tells of besides: rewards, margins
    source_tokens: Mapping[str, int] = field(default_factory=dict)  # of the tokens, those of each source of a mixture
    global_batch_size: int | None = None  # sequences of the step, where steps differ
    tokens_per_s_per_gpu: float | None = None  # None without GPUs
    mfu: float | None = None  # of 1; None also where the GPUs' peak is not known

    def row(self) -> dict[str, Any]:
        """Plain values, without counts_LE and without what there is nothing to say of."""
        return {key: value for key, value in asdict(self).items() if key != "counts_LE" and value not in (None, {})}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "StepMetrics":
        """The inverse of `row`, of rows that other versions of this program wrote, too."""
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in row.items() if key in known}, **_lrs_of_before(row))


def _lrs_of_before(row: Mapping[str, Any]) -> dict[str, Any]:
    """Learning rates used to be fields of their own."""
    lrs = {key.removesuffix("_lr"): row[key] for key in ("muon_lr", "adamw_lr") if key in row}
    return {"lrs": lrs} if lrs else {}


def main_lr(row: Mapping[str, Any]) -> float:
    """The learning rate of hidden matrices in a row of metrics.jsonl; nan in one that has none."""
    lrs = row.get("lrs") or _lrs_of_before(row).get("lrs", {})
    return next(iter(lrs.values()), math.nan)


class RunLog(Protocol):
    """A listener to how a run goes."""

    def retry(self, reason: str) -> None:
        """The step under way is tried again; its metrics will say so once it succeeds."""

    def step(self, metrics: StepMetrics) -> None:
        """One step has been taken, or skipped."""

    def validation(self, step: int, loss: float, by_source: Mapping[str, float], measures: Mapping[str, float]) -> None:
        """The weights after `step` have that loss on held-out data, those on each source's, where there are several, and
        whatever else is told of it."""

    def scores(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The weights after `step` have these scores in the run's tasks (trinity/evaluate/score.py)."""


class TrainLog:
    """The log of one run, written by one process. Steps count from 1 and come in order; call `close` at the end.

    Nothing is written before the first step. What a person sees of it is trinity/train/progress.py's.
    """

    def __init__(self, out_dir: str | Path, total_steps: int):
        self.out_dir, self.total_steps = Path(out_dir), total_steps
        self._files: _Files | None = None

    def retry(self, reason: str) -> None:
        """Nothing: the row of a step has its retries."""

    def step(self, metrics: StepMetrics) -> None:
        """Record one step."""
        files = self._opened(metrics.step, is_validation=False)
        counts_LE = metrics.counts_LE
        files.write_row(metrics.row())
        every = max(1, self.total_steps // LOADS_PER_RUN)
        if counts_LE and (metrics.step % every == 0 or metrics.step == self.total_steps):
            files.write_load({"step": metrics.step, "counts_LE": counts_LE})

    def catch_up(self, metrics: StepMetrics) -> None:
        """Record the step that a run goes on from, if whoever took it died before it was logged."""
        rows = read_rows(self.out_dir / "metrics.jsonl")
        if not any(row["step"] == metrics.step and "loss" in row for row in rows):
            self.step(metrics)

    def validation(
        self, step: int, loss: float, by_source: Mapping[str, float] = NONE, measures: Mapping[str, float] = NONE
    ) -> None:
        """Record the validation of the weights after `step`."""
        told = {"val_losses": by_source, "val_measures": measures}
        row = {"step": step, "val_loss": loss, **{name: dict(each) for name, each in told.items() if each}}
        self._opened(step, is_validation=True).write_row(row)

    def scores(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record the scores of the weights after `step`."""
        self._opened(step, is_validation=True).write_scores(step, rows)

    def close(self) -> None:
        """Finish the files. Harmless when repeated."""
        if self._files is not None:
            self._files.close()
        self._files = None

    def _opened(self, step: int, is_validation: bool) -> "_Files":
        if self._files is None:
            self._files = _Files(self.out_dir, step, is_validation)
        return self._files


class _Files:
    """The three files of a run, cut to what lies before `first_step` (or before its validation) and open for appending."""

    def __init__(self, out_dir: Path, first_step: int, is_validation: bool):
        from torch.utils.tensorboard import SummaryWriter  # a second of imports, for training only

        out_dir.mkdir(parents=True, exist_ok=True)
        self._rows = _cut(out_dir / "metrics.jsonl", first_step, is_validation)
        self._loads = _cut(out_dir / "expert_load.jsonl", first_step, is_validation)
        self._board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=first_step + is_validation)

    def write_row(self, row: dict[str, Any]) -> None:
        self._rows.write({key: _finite(value) for key, value in row.items()})
        self._draw({tag(key): value for key, value in scalars(row)}, row["step"])

    def write_scores(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows.write({"step": step, "scores": [_finite(row) for row in rows]})
        self._draw({f"score/{row['task']}": row["mean"] for row in rows}, step)

    def write_load(self, row: dict[str, Any]) -> None:
        self._loads.write(row)

    def close(self) -> None:
        for file in (self._rows, self._loads):
            file.close()
        with suppress(OSError):
            self._board.close()

    def _draw(self, values: Mapping[str, float], step: int) -> None:
        """TensorBoard's copy; what a full disk does not take is left out."""
        with suppress(OSError):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


class Lines:
    """Rows appended to a file. Those that a full disk does not take are written, whole and in order, once there is room."""

    def __init__(self, path: Path):
        self._path, self._file, self._left = path, path.open("ab", buffering=0), b""

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. Never raises: training goes on without its log."""
        had_room = not self._left
        self._left += json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) :]
        except OSError as error:
            if had_room:
                log.error("cannot write %s: %s; rows wait until there is room", self._path, error.strerror)

    def close(self) -> None:
        self._file.close()


def read_rows(file: str | Path) -> list[dict[str, Any]]:
    """The objects of a log's lines, in order; [] without the file. A torn line (a crash while writing) is left out."""
    path = Path(file)
    return [row for line in path.read_text("utf-8").splitlines() if (row := parse_row(line))] if path.is_file() else []


def parse_row(line: str) -> dict[str, Any] | None:
    """A row of a log, or None for a torn line."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _cut(path: Path, first_step: int, is_validation: bool = False) -> Lines:
    """Keep the rows before `first_step` (or before its validation), replacing the file in one move; open it for appending."""
    first = first_step, is_validation
    kept = [row for row in read_rows(path) if (row["step"], bool(row.keys() & AFTER)) < first]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    os.replace(scratch, path)
    return Lines(path)


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row but its step: those of {"retries": {"deadline": 1}} are called retries/deadline."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{name}", number) for name, number in value.items())
        elif key != "step":
            yield key, value


def tag(name: str) -> str:
    """A number's name in TensorBoard."""
    if name.startswith("val_loss"):
        return f"val/loss{name.removeprefix('val_loss').removeprefix('es')}"
    return f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"


def _finite(value: Any) -> Any:
    """The value with null for each number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
