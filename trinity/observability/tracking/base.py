"""The contract of a tracker, and what one is told of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """Names by which a tracker knows a run, and its settings, without keys. `folder` is for files of the tracker's own."""

    folder: Path
    project: str
    name: str
    tags: tuple[str, ...]
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """One run at a tracker. All calls come from one thread; each may raise, block or take as long as it likes."""

    def begin(self, run: TrackedRun, known_as: str | None) -> str:
        """Begin the run, or go on with the one that was `known_as` before; -> what to call it by the next time."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step, which never goes back."""

    def mark(self, what: str, step: int) -> None:
        """Something happened after that step: `stage/NAME` began, `export/NAME` was made."""

    def finish(self) -> None:
        """Nothing more comes for now. Never called before `begin`."""
