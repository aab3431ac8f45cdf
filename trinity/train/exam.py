"""Exams of a run's weights, and whether they may be served: what a trainer knows of evaluation.

Decisions: who asks and how is somebody else's (trinity/evaluate/exam.py). Where a task has a gate, a version is served once it
has passed: those of steps at which an exam is due wait for it, and where one fails nothing newer is served until one passes.
What the run began with is served until then.
"""

from collections.abc import Sequence
from typing import Any, Protocol

Row = dict[str, Any]  # of a score: task, mean, low, high, num, and `passes` where it has a gate


class Exam(Protocol):
    """Tasks for the weights of a run. Asked on worker 0."""

    has_gates: bool

    def is_due(self, position: int) -> bool:
        """Say whether it is after so many steps."""
        ...

    def ask(self) -> list[Row]:
        """Ask the weights as they are. Raises what an engine does."""
        ...


class NoExam:
    """Nothing is asked, nothing is held back."""

    has_gates = False

    def is_due(self, position: int) -> bool:
        """Never."""
        return False

    def ask(self) -> list[Row]:
        return []


class Gate:
    """Admission of a run's versions to being served."""

    def __init__(self, exam: Exam):
        self._exam, self.failed = exam, list[str]()  # tasks below their bounds when they were asked last

    def is_open(self, position: int) -> bool:
        """Say whether what the step at this position makes is served as soon as it is committed."""
        return not self.failed and not (self._exam.has_gates and self._exam.is_due(position))

    def heed(self, rows: Sequence[Row]) -> bool:
        """Take note of an exam's scores; -> whether it is open now."""
        self.failed = [row["task"] for row in rows if row.get("passes") is False]
        return not self.failed
