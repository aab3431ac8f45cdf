"""`trinity bench experts`: the expert layer forward and backward, backends side by side; right first, then fast.

Every backend is compared with the reference at every shape before it is timed. One that is wrong is reported and not
timed, and the command fails once the report is written. What runs is in expert_backends.py, how it is timed in
expert_timing.py; what is asked and shown is here, where nothing heavy is imported before `measure`.

Decisions:
- The floor of a size is the time to read the layer's weights once at the memory's bandwidth; its share is floor / forward.
- 2 x 3 x A x D x F FLOPs forward for A assignments (row, expert), twice as many backward: three products, each with two
  gradients.
- The targets for GPUs are held against the best backend of a size, and only where the bandwidth is a stated one.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity.bench.report import Curve, Report, Table, ratio

if TYPE_CHECKING:
    from trinity.bench.expert_backends import Shape
    from trinity.bench.expert_timing import Bandwidth, Growth, Point, Survey

BACKENDS = {
    "megablocks-sparse": "MegaBlocks: block-sparse products over rows padded to 128 per expert",
    "megablocks-gmm": "MegaBlocks: grouped products of the grouped_gemm package",
    "megablocks-grouped": "MegaBlocks routing and copies, torch's grouped_mm",
    "torch-grouped": "torch only: grouped_mm",
    "torch-loop": "torch only: an expert at a time",
    "auto": "what a shard uses unless told: chosen by device, rows and type",
    "reference": "the obvious loop, all in fp32: the truth",
}
COLUMNS = (
    "rows / expert",
    "backend",
    "forward ms",
    "fwd + bwd ms",
    "fwd TFLOP/s",
    "bwd TFLOP/s",
    "floor share",
    "graph ms",
)


class Ranges(NamedTuple):
    """Measurements unless told otherwise. `check_rows`: rows per expert, on average, of the comparison with the truth.

    `dim`, `assignments`, `counts`: of the layers with D = F whose experts grow in number.
    """

    shapes: tuple[str, ...]
    rows: tuple[int, ...]
    check_rows: int
    dim: int
    assignments: int
    counts: tuple[int, ...]


PLANS = {  # by (device, --quick); 192 rows: some experts fill more than a tile of 128
    ("cuda", False): Ranges(
        ("nano", "mini", "large"), (1, 4, 16, 64, 256, 1024, 4096), 192, 1024, 4096, (16, 32, 64, 128, 256)
    ),
    ("cuda", True): Ranges(("nano",), (1, 128), 192, 256, 256, (16, 64)),
    ("cpu", False): Ranges(("bench",), (1, 4, 16, 64, 256), 24, 256, 1024, (16, 32, 64, 128, 256)),
    ("cpu", True): Ranges(("tiny",), (1, 4), 4, 64, 256, (16, 64)),
}


def flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    shapes = ["nano", "mini", "large", "bench", "tiny"]
    add(
        "--shape",
        action="append",
        choices=shapes,
        help="a preset; repeat for several (default: nano mini large; CPU: bench)",
    )
    add("--rows", type=_positive, nargs="+", metavar="N", help="rows for each expert (default: 1 to 4096; CPU: to 256)")
    add("--experts", type=_positive, metavar="N", help="of a layer that the shard holds (default: as many as fit well)")
    add("--backend", action="append", choices=list(BACKENDS), help="repeat for several (default: all)")
    add(
        "--formats",
        action="store_true",
        help="on a CPU: formats of weights instead, for inference",
    )
    add("--dtype", choices=["float32", "bfloat16"], help="of rows and weights (default: the preset's)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def measure(arguments: argparse.Namespace) -> Report:
    """Raises ConfigError for a device or a number of experts that there is not."""
    from trinity.bench import expert_backends as what
    from trinity.bench import expert_timing as timing

    device, quick = what.device_of(arguments.device), arguments.quick
    plan, rig = PLANS[device.type, quick], timing.rig_of(device, quick)
    shapes = [
        what.shape_of(name, device, arguments.experts, arguments.dtype) for name in arguments.shape or plan.shapes
    ]
    if arguments.formats:
        return _formats(shapes, arguments.rows or (1, 4, 16, 64), 3 if quick else 15)
    growing = [what.growing(count, plan.dim, shapes[0].dtype) for count in plan.counts]
    backends, missing = what.ready(arguments.backend or list(BACKENDS), device, asked=bool(arguments.backend))
    peak = timing.bandwidth(device, rig.clock, num_bytes=(32 if quick else 512) << 20)
    surveys = [timing.survey(backends, shape, arguments.rows or plan.rows, plan.check_rows, rig) for shape in shapes]
    auto = what.build("auto", device)
    first = timing.survey({"auto": auto}, growing[0], (), plan.check_rows, rig)
    report = Report("experts", [_backends(backends, missing), _verdicts([*surveys, first])])
    for survey in surveys:
        _show(report, survey, peak)
    if first.right:
        _show_growth(report, timing.growth(auto, growing, plan.assignments, rig), peak)
    report.failure = _failure([*surveys, first])
    return report


def _formats(shapes: Sequence["Shape"], rows: Sequence[int], rounds: int) -> Report:
    from trinity.bench.expert_formats import formats

    return Report("experts", [formats(shape, rows, rounds) for shape in shapes])


def _backends(backends: Mapping[str, Any], missing: Mapping[str, str]) -> Table:
    rows = tuple((n, what, missing.get(n, "ready")) for n, what in BACKENDS.items() if n in missing or n in backends)
    return Table("Backends", ("backend", "what it is", "state"), rows)


def _verdicts(surveys: Sequence["Survey"]) -> Table:
    """Distances of output and gradients from the truth, relative to their size."""
    rows: list[tuple[Any, ...]] = []
    for survey in surveys:
        if survey.obstacle:
            rows.append((survey.shape.name, "all", "not tried", "-", "-", survey.obstacle))
        for name, verdict in survey.verdicts.items():
            error = "-" if verdict.error is None else f"{verdict.error:.1e}"
            rows.append((survey.shape.name, name, verdict.state, error, f"{survey.bound:.1e}", verdict.detail))
    columns = ("shape", "backend", "verdict", "largest error", "tolerance", "note")
    return Table(
        "Correctness: output and five gradients against the reference, few rows and many, one expert without",
        columns,
        tuple(rows),
    )


def _show(report: Report, survey: "Survey", peak: "Bandwidth") -> None:
    """Add one shape's table, curve, raw seconds and targets."""
    if not survey.points:
        return
    floor_s = survey.shape.weight_bytes / peak.bytes_per_s
    rows = [row for n, points in survey.points.items() for row in _cells(survey, n, points, floor_s)]
    graphed = any(row[-2] != "-" for row in rows)  # without CUDA graphs, no column for them
    columns, cells = (
        ((*COLUMNS, "note"), rows) if graphed else ((*COLUMNS[:-1], "note"), [(*r[:-2], r[-1]) for r in rows])
    )
    floor = f"reading the weights ({survey.shape.weight_bytes / 2**20:.3g} MiB) takes {1e3 * floor_s:.3g} ms at {peak.source}"
    report.tables.append(Table(f"{survey.shape}; {floor}", columns, tuple(cells)))
    report.curves.append(_curve(survey, floor_s))
    report.results += [
        {"shape": str(survey.shape), "rows": n, "backend": name, **dataclasses.asdict(point)}
        for n, name, point in survey.timed()
    ]
    if peak.stated:
        _hold_to_targets(report, survey, floor_s)


def _cells(survey: "Survey", rows: int, points: Mapping[str, Any], floor_s: float) -> Iterator[tuple[Any, ...]]:
    tera = survey.shape.flops(rows) / 1e12
    timed = {name: point for n, name, point in survey.timed() if n == rows}
    for name, point in points.items():
        if name not in timed:
            yield (rows, name, *["-"] * 6, point.why)
            continue
        times = 1e3 * point.forward_s, 1e3 * point.both_s
        rates = tera / point.forward_s, 2 * tera / point.backward_s
        graph = "-" if point.replay_s is None else 1e3 * point.replay_s
        yield (
            rows,
            name,
            *times,
            *rates,
            floor_s / point.forward_s,
            graph,
            point.unreplayed.why if point.unreplayed else "",
        )


def _curve(survey: "Survey", floor_s: float) -> Curve:
    rows = tuple(survey.points)
    timed = {(n, name): 1e3 * point.forward_s for n, name, point in survey.timed()}
    names = dict.fromkeys(name for _, name in timed)
    lines = {name: tuple(timed.get((n, name)) for n in rows) for name in names}
    title = f"{survey.shape.name}, {survey.shape.experts} experts: forward"
    return Curve(title, "rows per expert", "ms", rows, {**lines, "reading the weights": (1e3 * floor_s,) * len(rows)})


def _hold_to_targets(report: Report, survey: "Survey", floor_s: float) -> None:
    """Issue 3: 400 TFLOP/s at D = F = 3072 from 1,024 rows per expert on; decode rows within 1.5 x of the floor."""
    from trinity.bench.expert_timing import DECODE_ROWS

    shape = survey.shape

    def best(rows: int, seconds: Callable[["Point"], float]) -> tuple[float, str]:
        return min((seconds(point), name) for n, name, point in survey.timed() if n == rows)

    for rows in sorted({n for n, _, _ in survey.timed()}):
        size, tera = f"{shape.name}, {rows} rows per expert", shape.flops(rows) / 1e12
        if rows <= DECODE_ROWS:
            time_s, name = best(rows, lambda point: min(point.forward_s, point.replay_s or point.forward_s))
            report.target(f"forward / reading the weights, {size} ({name})", time_s / floor_s, at_most=1.5)
        if rows >= 1024 and shape.dim == shape.ffn == 3072:
            time_s, name = best(rows, lambda point: point.forward_s)
            report.target(f"forward TFLOP/s, {size} ({name})", tera / time_s, at_least=400)
            time_s, name = best(rows, lambda point: point.backward_s)
            report.target(f"backward TFLOP/s, {size} ({name})", 2 * tera / time_s, at_least=400)


def _show_growth(report: Report, growth: "Growth", peak: "Bandwidth") -> None:
    """The time of a layer as its experts grow in number and the rows stay; targets: no faster than the weights used."""
    import statistics

    few, many = growth.counts[0], growth.counts[-1]
    labels = {
        "spread": "forward, rows over all experts",
        "few": f"forward, rows on {few} experts",
        "trained": "forward + backward, rows over all experts",
    }
    medians = {kind: [1e3 * statistics.median(laps[n]) for n in growth.counts] for kind, laps in growth.laps.items()}
    added_bytes = [shape.weight_bytes - growth.shapes[0].weight_bytes for shape in growth.shapes]
    work = tuple(medians["spread"][0] + 1e3 * added / peak.bytes_per_s for added in added_bytes)
    lines = {labels[kind]: tuple(values) for kind, values in medians.items()}
    lines |= {f"forward of {few}, + reading the others' weights": work}
    title = f"Milliseconds per layer, always {growth.assignments} assignments, D = F = {growth.shapes[0].dim}"
    cells = zip(growth.counts, *lines.values(), strict=True)
    report.tables.append(Table(title, ("experts", *lines), tuple(cells)))
    report.curves.append(Curve("Experts at constant rows", "experts of the layer", "ms", growth.counts, lines))
    for kind, label in labels.items():
        grown = ratio(growth.laps[kind][many], growth.laps[kind][few])
        more, bound = (1.0, 1.25) if kind == "few" else (many / few, 1.0)
        report.target(
            f"growth of time / of weights used, {few} -> {many} experts: {label}", grown / more, at_most=bound
        )


def _failure(surveys: Sequence["Survey"]) -> str:
    faults = [fault for survey in surveys for fault in survey.faults()]
    if not faults:
        return ""
    remedy = "use another backend (--placement.backend) and report this with `trinity doctor`"
    return f"wrong results, not timed: {'; '.join(faults)}; {remedy}"
