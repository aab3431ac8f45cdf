"""Feeders: a thread for each tracker, that tells it what a run did.

Decisions.
- The run's own log on the disk is the queue: a tracker that hangs or is away falls behind, takes no memory and no step's
  time, and catches up. Training knows nothing of it.
- What a tracker was told is noted after each call (NAME.json), so that a run that goes on tells the rest, under the same
  id, and steps that are replayed after a kill are not told again.
- What a tracker raises is said once and counted, and the call is made again, after pauses that grow. At the end of the run
  it has CLOSE_S to catch up.
- Nothing begins before the first step is in the log: a run that is refused leaves no trace at a tracker.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from trinity.observability.run_history import Event, Place, RunHistory
from trinity.observability.tracking.base import TrackedRun, Tracker
from trinity.observability.train_log import scalars
from trinity.utils.terminal import say

POLL_S, CLOSE_S = 0.5, 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
T = TypeVar("T")


class Told(NamedTuple):
    """Knowledge of a tracker: the run's name there, and the place of the last event."""

    known_as: str | None = None
    place: Place = (0, 0, 0)
    step: int = 0
    failures: int = 0


class _GivenUp(Exception):
    """The run has ended, and the tracker had its time."""


class Feeder:
    """Tells one tracker of a run, on a thread of its own, from `start` to `close`."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, history: RunHistory, goes_on: bool):
        self.name, self.tracker, self.run, self.history = name, tracker, run, history
        self._file = run.folder / f"{name}.json"
        self.told = _read(self._file) if goes_on else Told()
        self._failed_before = self.told.failures
        self._is_begun, self._ended, self._given_up = False, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._feed, name=f"trinity-track-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """End: no more comes; it finishes with what is there. Harmless when repeated."""
        self._ended.set()

    def join(self, timeout_s: float) -> None:
        """Wait for it; when the time is up the tracker is left with what it has, which is said."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._given_up.set()
            say(f"{self.name} was told up to step {self.told.step}; the command with --resume tells it the rest")
        elif num := self.told.failures - self._failed_before:
            say(f"{self.name} was told everything; {num} calls failed and were made again")

    # -- on the thread

    def _feed(self) -> None:
        with suppress(_GivenUp):
            is_last = False
            while not is_last:
                is_last = self._ended.wait(POLL_S)
                for event in self.history.new():
                    if event.place > self.told.place:
                        self._tell(event)
            if self._is_begun:
                self._until_done(self.tracker.finish)

    def _tell(self, event: Event) -> None:
        if not self._is_begun:
            known_as = self._until_done(lambda: self.tracker.begin(self.run, self.told.known_as))
            self._is_begun = True
            self._note(self.told._replace(known_as=known_as))
        self._until_done(lambda: _told(self.tracker, event))
        self._note(self.told._replace(place=event.place, step=event.step))

    def _note(self, told: Told) -> None:
        self.told = told
        self._until_done(lambda: _write(self._file, self.told))

    def _until_done(self, call: Callable[[], T]) -> T:
        pause_s = FIRST_PAUSE_S
        while not self._given_up.is_set():
            try:
                return call()
            except Exception as error:  # the edge to other people's programs
                self._count(error)
            if self._ended.wait(pause_s):  # there is little time left
                self._given_up.wait(FIRST_PAUSE_S)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise _GivenUp

    def _count(self, error: Exception) -> None:
        if self.told.failures == self._failed_before:
            say(
                f"{self.name} was not told ({type(error).__name__}: {error}); training goes on, and it is told again later"
            )
        self.told = self.told._replace(failures=self.told.failures + 1)


def close(feeders: Sequence[Feeder], within_s: float = CLOSE_S) -> None:
    """End all of them together."""
    until_s = time.monotonic() + within_s
    for feeder in feeders:
        feeder.end()
    for feeder in feeders:
        feeder.join(max(0.0, until_s - time.monotonic()))


def values_of(event: Event) -> dict[str, float]:
    """Numbers of a step, a validation or scores, by the names that they have in TensorBoard."""
    if isinstance(scores := event.row.get("scores"), list):
        gates = {f"gate/{each['task']}": float(each["passes"]) for each in scores if "passes" in each}
        return {f"score/{each['task']}": each["mean"] for each in scores if each["mean"] is not None} | gates
    found = {name: value for name, value in scalars(event.row) if isinstance(value, int | float)}
    if (loss := found.pop("val_loss", None)) is not None:
        return {"val/loss": loss}
    values = {f"train/{name}": value for name, value in found.items()}
    if found.get("seconds"):
        values["train/tokens_per_s"] = found["tokens"] / found["seconds"]
    if event.kind == "step" and event.stage.is_one_of_many:
        values["stage"] = event.stage.number
    return values


def _told(tracker: Tracker, event: Event) -> None:
    if event.kind == "stage":
        tracker.mark(f"stage/{event.stage.name}", event.step)
    elif event.kind == "export":
        tracker.mark(f"export/{event.row['export']}", event.step)
    elif values := values_of(event):
        tracker.log(values, event.step)


def _read(file: Path) -> Told:
    """Read what was noted; nothing where the file is not there or torn, so that all is told again."""
    try:
        row = json.loads(file.read_text("utf-8"))
        stage, step, order = map(int, row["place"])
        return Told(str(row["known_as"]), (stage, step, order), int(row["step"]), int(row["failures"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Told()


def _write(file: Path, told: Told) -> None:
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(told._asdict()), "utf-8")
    os.replace(scratch, file)
