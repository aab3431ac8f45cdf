"""Timing of expert layers: one way to time, two clocks (the host's and a GPU's), caches kept cold.

Legend: R rows, A assignments (row, expert), E experts, D model.

Decisions:
- Successive calls take the next of several equal layers, `COLD_BYTES` together: weights come from memory, not a cache.
- Every measured call starts on an idle device, as one that answers a request does; launching is part of its time. On
  CUDA, decode-sized passes without host synchronisation are timed once more as a replayed graph.
- Inputs are fixed before timing; backends take turns within each round; a figure is the median of the rounds.
"""

import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trinity.bench.expert_backends import (
    Case,
    Shape,
    Skipped,
    Verdict,
    attempt,
    balanced,
    checked,
    layer_of,
    no_room,
    tolerance,
)
from trinity.bench.report import alternated
from trinity.experts.base import ExpertBackend, LayerWeights

COLD_BYTES = 256 << 20  # several times the caches of our machines: 50 MiB on H100 and H200
MAX_LAYERS = 64
DECODE_ROWS = 16  # per expert, at most: bound by reading the weights
GRAPHED = ("megablocks-grouped", "torch-grouped")  # on Hopper and later; the other paths wait for row counts
STATED_PEAK = {r"\bH200\b": 4.3e12, r"\bH100 80GB HBM3": 0.9 * 3.35e12}  # bytes per second that a copy reaches


class Clock(Protocol):
    """Time what a device does."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        ...

    def mark(self) -> Any: ...

    def laps(self, *marks: Any) -> list[float]:
        """Seconds from each mark to the next."""
        ...

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any] | None:
        """`run` as one launch, after it has run once; None where there is no such thing."""
        ...


class HostClock:
    def synchronize(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def laps(self, *marks: float) -> list[float]:
        return [after - before for before, after in itertools.pairwise(marks)]

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any] | None:
        return None


class CudaClock:
    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def laps(self, *marks: torch.cuda.Event) -> list[float]:
        marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any] | None:
        if torch.cuda.get_device_capability()[0] < 9:
            return None
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

        def replay() -> Any:
            graph.replay()
            return result

        return replay


class Bandwidth(NamedTuple):
    bytes_per_s: float
    source: str
    stated: bool


def bandwidth(device: torch.device, clock: Clock, num_bytes: int = 512 << 20) -> Bandwidth:
    """Bandwidth of the device's memory: stated for the GPUs of STATED_PEAK, else the best of large copies and sums."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if peak := stated_peak(name):
        return Bandwidth(peak, f"{peak / 1e12:.2f} TB/s, stated for {name}", True)
    source, target = (torch.ones(num_bytes // 4, device=device) for _ in range(2))
    copies = [2 * num_bytes / _timed(clock, lambda: target.copy_(source)) for _ in range(5)]
    sums = [num_bytes / _timed(clock, source.sum) for _ in range(5)]
    best, threads = max(copies + sums), f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Bandwidth(best, f"{best / 1e9:.1f} GB/s, measured with large copies and sums{threads}", False)


def stated_peak(name: str) -> float | None:
    """Peak of a GPU by its name; None for others, the slower H100s and GH200 among them."""
    return next((peak for pattern, peak in STATED_PEAK.items() if re.search(pattern, name)), None)


def _timed(clock: Clock, run: Callable[[], Any]) -> float:
    clock.synchronize()
    start = clock.mark()
    run()
    return clock.laps(start, clock.mark())[0]


def rig_of(device: torch.device, quick: bool) -> "Rig":
    clock: Clock = CudaClock() if device.type == "cuda" else HostClock()
    rounds = 2 if quick else 30 if device.type == "cuda" else 7
    return Rig(device, clock, rounds, budget_s=2.0)


class Rig(NamedTuple):
    """Place and thoroughness: `rounds` rounds per size, fewer (3) where they would take longer than `budget_s`."""

    device: torch.device
    clock: Clock
    rounds: int
    budget_s: float

    def rounds_of(self, round_s: float) -> int:
        return min(self.rounds, max(3, int(self.budget_s / max(round_s, 1e-9))))


Lap = tuple[float, float]  # seconds forward and backward


@dataclass(frozen=True)
class Point:
    """Seconds of one backend at one size. `replay_s`: the forward pass as a CUDA graph; `unreplayed`: why not."""

    forward_s: float
    both_s: float
    backward_s: float
    replay_s: float | None = None
    unreplayed: Skipped | None = None


@dataclass(frozen=True)
class Passes:
    """One backend on fixed rows; every pass takes the next layer and returns its lap."""

    backend: ExpertBackend
    case: Case
    layers: Iterator[LayerWeights]
    clock: Clock

    def forward(self) -> Lap:
        """Time it without autograd, as in serving."""
        run = self._inference(next(self.layers))
        return _timed(self.clock, run), 0.0

    def both(self) -> Lap:
        weights, (x_RD, assigned, _, dy_RD) = next(self.layers), self.case
        self.clock.synchronize()
        marks = [self.clock.mark()]
        y_RD = self.backend(x_RD, assigned, weights)
        marks.append(self.clock.mark())
        torch.autograd.grad(y_RD, [x_RD, assigned.weight_A, *weights], dy_RD)
        forward_s, backward_s = self.clock.laps(*marks, self.clock.mark())
        return forward_s, backward_s

    def replay_of(self, layers: Sequence[LayerWeights]) -> Callable[[], Lap] | Skipped | None:
        """The forward pass as graphs, one for each layer; None where there are no graphs."""
        replays = []
        for run in map(self._inference, layers):
            want_RD, replay = run(), self.clock.captured(run)
            if replay is None:
                return None
            if not torch.equal(replay(), want_RD):
                return Skipped("the captured graph computes something else", wrong=True)
            replays.append(replay)
        turns = itertools.cycle(replays)
        return lambda: (_timed(self.clock, next(turns)), 0.0)

    def _inference(self, weights: LayerWeights) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return self.backend(self.case.x_RD, self.case.assigned, weights)

        return run


def cold_layers(shape: Shape, first: LayerWeights) -> list[LayerWeights]:
    """`first` and its copies, more bytes of weights than a cache holds."""
    copies = min(MAX_LAYERS, 1 + -(-COLD_BYTES // shape.weight_bytes))
    return [first, *(LayerWeights(*(w.detach().clone().requires_grad_() for w in first)) for _ in range(copies - 1))]


@dataclass(frozen=True)
class Survey:
    """Findings at one shape. `obstacle`: why nothing was tried."""

    shape: Shape
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    points: Mapping[int, Mapping[str, Point | Skipped]] = field(default_factory=dict)
    obstacle: str | None = None
    bound: float = 0.0

    @property
    def right(self) -> list[str]:
        return [name for name, verdict in self.verdicts.items() if verdict.state == "right"]

    def timed(self) -> Iterator[tuple[int, str, Point]]:
        """(rows, backend, times) of everything that has times."""
        for rows, points in self.points.items():
            yield from ((rows, name, point) for name, point in points.items() if isinstance(point, Point))

    def faults(self) -> list[str]:
        """Faults by backend; empty if there are none."""
        wrong = [f"{name} ({v.detail})" for name, v in self.verdicts.items() if v.state == "wrong"]
        for rows, points in self.points.items():
            for name, point in points.items():
                skipped = point.unreplayed if isinstance(point, Point) else point
                wrong += [f"{name} with {rows} rows ({skipped.why})"] if skipped and skipped.wrong else []
        return [f"{self.shape.name}: {text}" for text in wrong]


def survey(
    backends: Mapping[str, ExpertBackend], shape: Shape, rows: Sequence[int], check_rows: int, rig: Rig
) -> Survey:
    """Check every backend with about `check_rows` rows per expert, then time the right ones with each of `rows`."""
    if obstacle := no_room(shape.check_bytes() + COLD_BYTES, rig.device):
        return Survey(shape, obstacle=obstacle)
    first = layer_of(shape, rig.device, backends=backends.values())
    verdicts = checked(backends, shape, check_rows, first)
    bound = tolerance(shape.dtype, rig.device)
    right = {name: backends[name] for name in Survey(shape, verdicts).right}
    layers = cold_layers(shape, first) if rows and right else []
    points = {n: at_rows(right, shape, n, layers, rig) for n in rows} if right else {}
    return Survey(shape, verdicts, points, bound=bound)


def at_rows(
    backends: Mapping[str, ExpertBackend], shape: Shape, rows: int, layers: Sequence[LayerWeights], rig: Rig
) -> dict[str, Point | Skipped]:
    """Every backend with `rows` rows for each expert. -> its times, or why it has none."""
    if obstacle := no_room(shape.pass_bytes(rows), rig.device):
        return dict.fromkeys(backends, Skipped(obstacle, wrong=False))
    case, turns = balanced(shape, rows, layers[0]), itertools.cycle(layers)
    passes = {name: Passes(backend, case, turns, rig.clock) for name, backend in backends.items()}
    tried = {name: attempt(lambda p=p: (p.both(), p.forward())) for name, p in passes.items()}  # type: ignore[misc]
    works = {name: passes[name] for name, laps in tried.items() if not isinstance(laps, Skipped)}
    graphs = {name: _graph(name, p, rows, layers) for name, p in works.items()}
    runs = {(name, stage): getattr(p, stage) for name, p in works.items() for stage in ("both", "forward")}
    runs |= {(name, "replay"): graph for name, graph in graphs.items() if callable(graph)}
    laps = alternated(runs, rig.rounds_of(_timed(HostClock(), lambda: alternated(runs, 1, warmup=0))), warmup=0)
    return {n: skip if isinstance(skip, Skipped) else _point(n, laps, graphs[n]) for n, skip in tried.items()}


def _graph(name: str, passes: Passes, rows: int, layers: Sequence[LayerWeights]) -> Callable[[], Lap] | Skipped | None:
    return attempt(lambda: passes.replay_of(layers)) if name in GRAPHED and rows <= DECODE_ROWS else None


def _point(name: str, laps: Mapping[tuple[str, str], Sequence[Lap]], graph: Any) -> Point:
    median = {stage: statistics.median(map(sum, found)) for (owner, stage), found in laps.items() if owner == name}
    backward_s = statistics.median(backward_s for _, backward_s in laps[name, "both"])
    skipped = graph if isinstance(graph, Skipped) else None
    return Point(median["forward"], median["both"], backward_s, median.get("replay"), skipped)


class Growth(NamedTuple):
    """Seconds of each round over a layer of E experts, by kind of pass, then E; the assignments stay as many."""

    shapes: tuple[Shape, ...]
    assignments: int
    laps: dict[str, dict[int, list[float]]]

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(shape.experts for shape in self.shapes)


def growth(backend: ExpertBackend, shapes: Sequence[Shape], assignments: int, rig: Rig) -> Growth:
    """Layers of more and more experts take turns on as many assignments.

    Either all experts share them, or only as many as the smallest layer has: then the others must cost nothing.
    """
    runs: dict[tuple[str, int], Callable[[], Lap]] = {}
    for shape in shapes:
        layer = layer_of(shape, rig.device, backends=[backend])
        spread = Passes(
            backend, balanced(shape, assignments // shape.experts, layer), itertools.repeat(layer), rig.clock
        )
        few = replace(spread, case=balanced(shapes[0], assignments // shapes[0].experts, layer))
        runs |= {("spread", shape.experts): spread.forward, ("few", shape.experts): few.forward}
        runs |= {("trained", shape.experts): spread.both}
    found = alternated(runs, rig.rounds)
    laps = {kind: {s.experts: [sum(lap) for lap in found[kind, s.experts]] for s in shapes} for kind, _ in runs}
    return Growth(tuple(shapes), assignments, laps)
