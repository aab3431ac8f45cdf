"""A training run as its server's page shows it: curves of all its stages, short enough to send every other second.

Decisions: it is read from the run's own log, which lies where the command of this server runs, by a thread and when somebody
looks: a training that is gone, or another that takes its place, needs no word. Of many steps so many points are kept, each the
mean of as many steps. A log that is cut, as by a run that goes back, is read anew from the stage's beginning.
"""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trinity.config import RUN_SETTINGS
from trinity.observability.run_history import Event, Place, RunHistory, StageSpan, stages_after

CURVES = ("loss", "tokens_per_s", "mfu", "max_vio", "batch_het", "grad_norm")
MOST_POINTS, MOST_ROWS = 400, 200  # of a curve in one stage; of its validations, and of its scores
FRESH_S = 1.0


class Curves:
    """Means of equally many steps each, of every curve at the same steps."""

    def __init__(self) -> None:
        self.stride, self._points = 1, list[tuple[int, dict[str, float]]]()
        self._open: list[tuple[int, dict[str, float]]] = []

    def add(self, step: int, values: dict[str, float]) -> None:
        self._open.append((step, values))
        if len(self._open) >= self.stride:
            self._points.append(_mean(self._open))
            self._open = []
        if len(self._points) >= 2 * MOST_POINTS:
            self._points = [_mean(self._points[at : at + 2]) for at in range(0, len(self._points), 2)]
            self.stride *= 2

    def tree(self) -> dict[str, list[float | None]]:
        """Steps, and of each curve the values at them, with null where there is none."""
        points = [*self._points, *([_mean(self._open)] if self._open else [])]
        columns = {name: [_short(values.get(name)) for _, values in points] for name in CURVES}
        there = {name: column for name, column in columns.items() if any(value is not None for value in column)}
        return {"step": [step for step, _ in points], **there}


class StageView:
    """All that is shown of one stage."""

    def __init__(self, span: StageSpan) -> None:
        self.span, self.curves, self.last = span, Curves(), span.first
        self.validations, self.scores = list[tuple[int, float]](), list[dict[str, Any]]()
        self.retries, self.skipped = Counter[str](), 0

    def see(self, event: Event) -> None:
        row = event.row
        if event.kind == "step":
            self.last, self.skipped = event.step, int(row.get("skipped") or 0)
            self.retries.update(row.get("retries") or {})
            rate = row["tokens"] / row["seconds"] if row.get("seconds") else None
            values = {name: row.get(name) for name in CURVES} | {"tokens_per_s": rate}
            self.curves.add(event.step, {name: float(value) for name, value in values.items() if value is not None})
        elif event.kind == "validation" and row["val_loss"] is not None:
            self.validations = _thinned([*self.validations, (event.step, row["val_loss"])])
        elif isinstance(scores := row.get("scores"), list):
            self.scores = [*self.scores, *({**score, "step": event.step} for score in scores)][-MOST_ROWS:]

    def tree(self) -> dict[str, Any]:
        return {
            "name": self.span.name,
            "first": self.span.first,
            "steps": self.span.steps,
            "last": self.last,
            "curves": self.curves.tree(),
            "validations": [(step, _short(loss)) for step, loss in self.validations],
            "scores": self.scores,
            "retries": dict(self.retries),
            "skipped": self.skipped,
        }


class TrainingRun:
    """The run whose weights are served from `source`, where that is a run's folder."""

    def __init__(self, source: str | Path | None):
        folder = Path(source) if source is not None else None
        is_there = folder is not None and (folder / RUN_SETTINGS).is_file()
        self.folder = folder if is_there else None
        self._history: RunHistory | None = None
        self._stages, self._exports = dict[int, StageView](), list[tuple[int, str]]()
        self._seen: Place = (0, 0, 0)
        self._read_s, self._lock = -math.inf, asyncio.Lock()

    async def tree(self) -> dict[str, Any] | None:
        """Plain values of what the log says by now; None where no run is served. Reads at most once in FRESH_S."""
        if self.folder is None:
            return None
        async with self._lock:
            if time.monotonic() - self._read_s >= FRESH_S:
                await asyncio.to_thread(self.read)
        stages = [view.tree() for _, view in sorted(self._stages.items())]
        return {"stages": stages, "exports": self._exports}

    def read(self) -> None:
        """Take up what is new."""
        assert self.folder is not None
        if self._history is None:
            stage, _ = stages_after(self.folder.resolve())
            root = stage.folder.parent if stage.is_one_of_many else self.folder
            self._history = RunHistory(root, goes_on=True)
        for event in self._history.new():
            self._see(event)
        self._read_s = time.monotonic()

    def _see(self, event: Event) -> None:
        number = event.stage.number
        if event.kind == "export":
            self._exports = sorted({*self._exports, (event.step, str(event.row["export"]))})
            return
        if event.place <= self._seen and self._seen[0] == number and number in self._stages:
            del self._stages[number]  # its log was cut: all that is left of it comes again
        self._seen = event.place
        if number not in self._stages:
            self._stages[number] = StageView(event.stage)
        self._stages[number].see(event)


def _mean(points: list[tuple[int, dict[str, float]]]) -> tuple[int, dict[str, float]]:
    """The mean of each curve, at the last step."""
    names = dict.fromkeys(name for _, values in points for name in values)
    found = {name: [values[name] for _, values in points if name in values] for name in names}
    return points[-1][0], {name: sum(values) / len(values) for name, values in found.items()}


def _thinned(rows: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Every other one where there are too many, the last among them."""
    return rows if len(rows) <= MOST_ROWS else rows[::-1][::2][::-1]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def encode(run: Mapping[str, Any] | None, version: int, num_quarantined: int) -> bytes:
    """JSON for the page: the run, and the version of its weights that is served."""
    tree = {"run": run, "version": version, "quarantined": num_quarantined}
    return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
