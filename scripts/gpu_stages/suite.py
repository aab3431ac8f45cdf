"""Test files of this repository under pytest, without its settings: those ask for plugins that may not be there."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

PLAIN = (
    "-p",
    "no:asyncio",
    "-p",
    "no:cacheprovider",
    "-c",
    "/dev/null",
    "--rootdir",
    ".",
    "--import-mode=importlib",
    "-q",
)


class Outcomes:
    """What became of each test; a setup that fails or skips counts as its test."""

    def __init__(self) -> None:
        self.counts, self.failures = Counter[str](), list[dict[str, str]]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures.append({"failed": report.nodeid, "why": str(report.longrepr)[-1500:]})


def measure(run: Any) -> Iterator[dict[str, Any]]:
    """Raises RuntimeError unless all pass. Without a GPU they are skipped, and that is well."""
    outcomes = Outcomes()
    code = pytest.main([*PLAIN, *run.arguments], plugins=[outcomes])
    yield from outcomes.failures
    yield {"tests": list(run.arguments), **outcomes.counts}
    if code != pytest.ExitCode.OK or (run.device == "cuda" and not outcomes.counts["passed"]):
        raise RuntimeError(f"pytest ended with {code!r}: {dict(outcomes.counts)}")
