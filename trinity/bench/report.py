"""Findings of a bench: tables and curves, with the machine, versions and commit that they hold for.

Decisions: a figure is the median of rounds; alternatives are measured in turns within one run and compared as ratios.
"""

import dataclasses
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trinity.config import num_cpus
from trinity.errors import TrinityError
from trinity.utils.machine import commit, meminfo, versions

VERSIONS = ("trinity-moe", "ray", "torch", "triton", "megablocks", "transformers", "numpy")
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Table:
    """Rows of cells: text, or numbers, which are rounded to three digits when printed and kept whole in JSON."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def text(self) -> str:
        """The report as Markdown."""
        cells = [self.columns, *[tuple(map(_cell, row)) for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
        rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
        return "\n".join([f"### {self.title}", "", lines[0], rule, *lines[1:], ""])


@dataclass(frozen=True)
class Curve:
    """Lines over one axis: `lines[label]` are y values at `x`, None where there is none. Both axes are logarithmic."""

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    lines: Mapping[str, tuple[float | None, ...]]


@dataclass
class Report:
    """`targets` are (what, measured, bound, met); `results` are for programs; `failure` says why nothing was measured."""

    name: str
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    targets: list[tuple[str, float, str, bool]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""

    def target(self, what: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
        """Note a measured figure with the bound that it is held to."""
        low, high = -float("inf") if at_least is None else at_least, float("inf") if at_most is None else at_most
        bound = f">= {at_least}" if at_least is not None else f"<= {at_most}"
        self.targets.append((what, value, bound, low <= value <= high))

    def write(self, folder: str | Path) -> None:
        """Print all tables; write NAME.json and, when there are curves, NAME.png. Raises `failure` after that."""
        tables = [*self.tables]
        if self.targets:
            rows = tuple((what, value, bound, "yes" if met else "no") for what, value, bound, met in self.targets)
            tables.append(Table("Targets", ("measure", "value", "bound", "met"), rows))
        print("\n".join(table.text() for table in tables))
        facts: dict[str, Any] = {
            "command": " ".join(["trinity", *sys.argv[1:]]),
            "machine": machine(),
            "versions": {"python": platform.python_version(), **versions(VERSIONS)},
        }
        tree = {"name": self.name, "commit": commit(), **facts, "tables": tables, "curves": self.curves}
        tree |= {"results": self.results} if self.results else {}
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{self.name}.json").write_text(json.dumps(tree, indent=1, default=dataclasses.asdict) + "\n")
        (target / f"{self.name}.png").unlink(missing_ok=True)
        if self.curves:
            draw(self.curves, target / f"{self.name}.png")
        print(f"{facts['machine']}; {commit()}; torch {facts['versions']['torch']}\nwritten to {target}/{self.name}.*")
        if self.failure:
            raise TrinityError(self.failure)


def alternated(runs: Mapping[K, Callable[[], V]], rounds: int, warmup: int = 1) -> dict[K, list[V]]:
    """Call every function in turn, `rounds` times after `warmup`; -> what they returned, by name."""
    found: dict[K, list[V]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, run in runs.items():
            value = run()
            if i >= warmup:
                found[name].append(value)
    return found


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def draw(curves: Sequence[Curve], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(6 * len(curves), 4.2), dpi=130, layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        for label, values in curve.lines.items():
            axes.plot(curve.x, values, "o-", markersize=4, label=label)
        axes.set(title=curve.title, xlabel=curve.x_label, ylabel=curve.y_label, xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):  # 60, not 6 x 10^1
            axis.set_major_formatter(LogFormatter())
            axis.set_minor_formatter(LogFormatter())
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def machine() -> str:
    """Processor, cores, memory and GPU, in words."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    memory = f"{meminfo().get('MemTotal', 0) / 2**30:.0f} GiB"
    gpu = [f"{torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return ", ".join([f"{num_cpus()} cores of {cpu}", memory, *(gpu or ["no GPU"])])


def _cell(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
