"""The history of a run over all of its stages: steps that keep counting, with the stage that each belongs to.

Decisions: it is read from what lies in the run's folder, so that whoever asks may be another process, and may be killed: the
log of each stage (metrics.jsonl), the list of stages (stages.json) and what was exported (exports.jsonl), both written by the
command that goes through them. A run without stages is one that has a single stage without a name.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trinity.errors import DataError
from trinity.observability.follow import Follower
from trinity.observability.train_log import read_rows

STAGES, EXPORTS, METRICS = "stages.json", "exports.jsonl", "metrics.jsonl"
Kind = Literal["stage", "step", "validation", "other", "export"]
Place = tuple[int, int, int]
ORDER: tuple[Kind, ...] = ("stage", "step", "validation", "other", "export")  # of what belongs to the same step


class StageSpan(NamedTuple):
    """Steps `first` + 1 to `first` + `steps` of a run: its stage `number` of `num_stages`, with a log in `folder`."""

    name: str
    folder: Path
    steps: int | None  # None: of a run without stages, whose folder does not say
    tokens_per_step: float  # the mean
    first: int = 0
    number: int = 1
    num_stages: int = 1

    @property
    def is_one_of_many(self) -> bool:
        return bool(self.name)

    @property
    def words(self) -> str:
        """Say which stage it is, as in `stage 2 of 4, anneal`; nothing for a run without stages."""
        return f"stage {self.number} of {self.num_stages}, {self.name}" if self.is_one_of_many else ""


class Event(NamedTuple):
    """Something that a run did. `step` counts over all stages; `row` is what the log says, {"export": NAME} or {}."""

    step: int
    kind: Kind
    stage: StageSpan
    row: Mapping[str, Any]

    @property
    def place(self) -> Place:
        """Its place in the order of the run, in which they come: stage, step of the stage, what it is."""
        here = -1 if self.kind == "stage" else self.step - self.stage.first
        return self.stage.number, here, ORDER.index(self.kind)


def write_stages(root: Path, stages: Sequence[tuple[str, Path, int, float]]) -> None:
    """Note the stages that a run in `root` goes through: name, folder, steps, tokens in a step on average."""
    keys = ("name", "folder", "steps", "tokens_per_step")
    rows = [dict(zip(keys, (name, folder.name, steps, tokens), strict=True)) for name, folder, steps, tokens in stages]
    root.mkdir(parents=True, exist_ok=True)
    scratch = root / f"{STAGES}.tmp"
    scratch.write_text(json.dumps(rows), "utf-8")
    os.replace(scratch, root / STAGES)


def read_stages(root: Path) -> tuple[StageSpan, ...]:
    """The stages of the run in that folder, in their order. Raises DataError where the list of them is damaged."""
    path, found = root / STAGES, list[StageSpan]()
    if not path.is_file():
        return (StageSpan("", root, None, 0),)
    try:
        rows = json.loads(path.read_text("utf-8"))
        for number, row in enumerate(rows, 1):
            first = sum(each.steps or 0 for each in found)
            folder = root / Path(row["folder"]).name
            steps, tokens = int(row["steps"]), float(row["tokens_per_step"])
            found.append(StageSpan(str(row["name"]), folder, steps, tokens, first, number, len(rows)))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no list of stages ({error}); start the run again with --resume") from None
    return tuple(found)


def stages_after(folder: Path) -> tuple[StageSpan, tuple[StageSpan, ...]]:
    """The stage whose log is in `folder`, and those that come after it."""
    spans = read_stages(folder.parent)
    at = next((n for n, span in enumerate(spans) if span.name and span.folder.name == folder.name), None)
    return (StageSpan("", folder, None, 0), ()) if at is None else (spans[at], spans[at + 1 :])


def note_export(root: Path, step: int, name: str, is_first: bool = False) -> None:
    """Note that the weights after `step` were exported under that name; `is_first` of a run begun anew. Harmless when
    repeated."""
    path, row = root / EXPORTS, {"step": step, "export": name}
    if is_first:
        path.unlink(missing_ok=True)  # what lies there is of a run before
    if row not in read_rows(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class RunHistory:
    """Events of a run as they come, each at least once, in the order of `Event.place` but for those that come again."""

    def __init__(self, root: Path, goes_on: bool):
        """`goes_on`: what lies there already is of the run, too; else it was another's that this one replaces."""
        self.spans = read_stages(root)
        self._logs = [Follower(span.folder / METRICS, from_start=goes_on) for span in self.spans]
        self._exports = Follower(root / EXPORTS, from_start=goes_on)
        self._at, self._is_begun = 0, False

    def new(self) -> Iterator[Event]:
        """Events since the last call. Those of a stage come when all of the one before have come."""
        exports = list(self._exports.new_rows())  # before the rows, which are all there when their stage is exported
        yield from self._rows()
        while self._at + 1 < len(self.spans) and self._logs[self._at + 1].has_news:
            yield from self._rows()  # what came before the next stage had any
            exports, ready = self._split(exports)
            yield from ready
            self._at, self._is_begun = self._at + 1, False
            yield from self._rows()
        yield from map(self._export, exports)

    def _rows(self) -> Iterator[Event]:
        span = self.spans[self._at]
        for row in self._logs[self._at].new_rows():
            if not self._is_begun and span.is_one_of_many:
                yield Event(span.first, "stage", span, {})
            self._is_begun = True
            yield Event(span.first + row["step"], _kind(row), span, row)

    def _split(self, exports: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Event]]:
        """-> those that are of a later stage, and events of the others."""
        end = self.spans[self._at + 1].first
        ready = [self._export(row) for row in exports if row["step"] <= end]
        return [row for row in exports if row["step"] > end], ready

    def _export(self, row: Mapping[str, Any]) -> Event:
        return Event(row["step"], "export", self.spans[self._at], row)


def _kind(row: Mapping[str, Any]) -> Kind:
    return "step" if "loss" in row else "validation" if "val_loss" in row else "other"
