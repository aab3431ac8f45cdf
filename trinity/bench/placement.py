"""`trinity bench placement`: the planner against EPLB, over windows of load that drift: balance, slots moved, milliseconds.

Legend: W windows, L layers, E experts, S shards.
Every planner plans for each window in turn, from its own plan for the window before. Balance is measured on the window that
was planned for, and on the next one, which is the one that the plan meets in service. A slot is moved where its shard did
not hold that expert before. The drift is stated in expert_loads.py; `--load` takes counts of a real model instead.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trinity.bench import eplb
from trinity.bench.expert_loads import HOTTEST, drifting, read
from trinity.bench.report import Curve, Report, Table
from trinity.errors import ConfigError
from trinity.placement.planner import Balance, PlanGoal, balance_of, plan
from trinity.placement.table import PlacementTable
from trinity.placement.topology import Shard, Topology

OURS, FRESH, GLOBAL, HIERARCHICAL, STALE = "ours", "ours, from scratch", "EPLB", "EPLB, by groups", "first plan kept"
HEADLINE = 0.95  # the drift that the targets are for


@dataclass(frozen=True)
class Size:
    """Scenario that is planned for."""

    num_layers: int
    num_experts: int
    rhos: tuple[float, ...]
    costs: tuple[float, ...]  # of a move, and goals: for the trade-off
    goals: tuple[float, ...]


FULL = Size(58, 256, (0.999, 0.99, HEADLINE, 0.9), (0.0, 0.002, 0.01), (0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995))
QUICK = Size(4, 64, (HEADLINE,), (0.0,), (0.95, 0.98))


@dataclass(frozen=True)
class Cluster:
    """Equal shards, as EPLB needs them; `num_slots` of all in a layer."""

    num_shards: int
    num_hosts: int
    num_groups: int
    num_slots: int

    @property
    def topology(self) -> Topology:
        slots, per_host = self.num_slots // self.num_shards, -(-self.num_shards // self.num_hosts)
        return Topology(tuple(Shard(f"shard-{i}", f"host-{i // per_host}", slots) for i in range(self.num_shards)))


@dataclass(frozen=True)
class Planned:
    """One plan: replicas of each expert on each shard, the table where there is one, and the time it took."""

    copies_LSE: np.ndarray
    table: PlacementTable | None
    seconds: float


@dataclass(frozen=True)
class Step:
    """One window: balance on it and on the next, the share of slots moved to get there, milliseconds."""

    now: Balance
    met: Balance | None
    moved: float | None
    milliseconds: float


Planner = Callable[[np.ndarray, Planned | None], Planned]


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", metavar="FILE", help=".npy or .json counts, [L, E] or [W, L, E]; default: synthetic")
    parser.add_argument("--shards", type=int, default=32, help="equal shards (default: %(default)s)")
    parser.add_argument("--hosts", type=int, default=4, help="hosts, and nodes of EPLB (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=8, help="groups of experts, for EPLB only (default: %(default)s)")
    parser.add_argument(
        "--spare", type=int, default=32, help="slots of a layer beyond its experts (default: %(default)s)"
    )
    parser.add_argument("--windows", type=int, default=8, help="of synthetic load (default: %(default)s)")
    parser.add_argument("--goal", type=float, default=PlanGoal.goal, help="balance to plan for (default: %(default)s)")
    parser.add_argument(
        "--move-cost", type=float, default=PlanGoal.move_cost, help="see PlanGoal (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)


def measure(arguments: argparse.Namespace) -> Report:
    report, size = Report("placement"), QUICK if arguments.quick else FULL
    aim = PlanGoal(arguments.goal, arguments.move_cost)
    for name, load_WLE in _loads(arguments, size).items():
        cluster = _cluster(arguments, load_WLE.shape[2])
        found = follow(load_WLE, planners(cluster, aim, load_WLE.shape[2]))
        report.tables.append(_table(name, load_WLE, cluster, found))
        report.results.append(
            {"load": name, "steps": {planner: list(map(_plain, steps)) for planner, steps in found.items()}}
        )
        if name in (arguments.load, _synthetic(HEADLINE)):
            _targets(report, found)
            report.curves += [*_curves(found), *_trade_off(report, load_WLE, cluster, size)]
    return report


def _loads(arguments: argparse.Namespace, size: Size) -> dict[str, np.ndarray]:
    if arguments.load:
        return {arguments.load: read(arguments.load)}
    if arguments.windows < 2:
        raise ConfigError(f"--windows {arguments.windows}: nothing moves in fewer than 2; use 2 or more")
    shape = arguments.windows, size.num_layers, size.num_experts
    return {_synthetic(rho): drifting(*shape, rho, arguments.seed) for rho in size.rhos}


def _synthetic(rho: float) -> str:
    return f"synthetic, hottest {HOTTEST[0]:.0f} to {HOTTEST[1]:.0f} x the mean, rho {rho}"


def _cluster(arguments: argparse.Namespace, num_experts: int) -> Cluster:
    for flag in ("shards", "hosts", "groups"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)} is below 1; use 1 or more")
    per_shard = -(-(num_experts + arguments.spare) // arguments.shards)  # rounded up, because EPLB must divide
    return Cluster(arguments.shards, arguments.hosts, arguments.groups, per_shard * arguments.shards)


# -- planners, all with the same face


def planners(cluster: Cluster, aim: PlanGoal, num_experts: int) -> dict[str, Planner]:
    found = {
        OURS: _ours(cluster, aim, keeps=True),
        FRESH: _ours(cluster, aim, keeps=False),
        GLOBAL: _eplb(cluster, 1, 1),
        STALE: _stale(cluster, aim),
    }
    wholes = (
        (num_experts, cluster.num_groups),
        (cluster.num_groups, cluster.num_hosts),
        (cluster.num_shards, cluster.num_hosts),
    )
    if not any(whole % part for whole, part in wholes):
        found[HIERARCHICAL] = _eplb(cluster, cluster.num_groups, cluster.num_hosts)
    return found


def _ours(cluster: Cluster, aim: PlanGoal, keeps: bool) -> Planner:
    topology = cluster.topology

    def run(load_LE: np.ndarray, before: Planned | None) -> Planned:
        started = time.perf_counter()
        table = plan(load_LE, topology, before.table if before and keeps else None, aim)
        return Planned(_copies(table), table, time.perf_counter() - started)

    return run


def _eplb(cluster: Cluster, num_groups: int, num_nodes: int) -> Planner:
    def run(load_LE: np.ndarray, before: Planned | None) -> Planned:
        started = time.perf_counter()
        slot_LSK = eplb.plan(load_LE, cluster.num_shards, cluster.num_slots, num_groups, num_nodes)
        seconds = time.perf_counter() - started
        copies_LSE = np.zeros((len(load_LE), cluster.num_shards, load_LE.shape[1]), dtype=np.int64)
        layer_LSK, shard_LSK, _ = np.indices(slot_LSK.shape)
        np.add.at(copies_LSE, (layer_LSK, shard_LSK, slot_LSK), 1)
        return Planned(copies_LSE, None, seconds)

    return run


def _stale(cluster: Cluster, aim: PlanGoal) -> Planner:
    first = _ours(cluster, aim, keeps=False)
    return lambda load_LE, before: before or first(load_LE, None)


def _copies(table: PlacementTable) -> np.ndarray:
    """int64 [L, S, E]: 1 where a shard has an expert."""
    counts_X, shard_R = table.flat()
    layer_R, expert_R = np.divmod(np.repeat(np.arange(len(counts_X)), counts_X), table.num_experts)
    copies_LSE = np.zeros((len(table.layers), len(table.shards), table.num_experts), dtype=np.int64)
    copies_LSE[layer_R, shard_R, expert_R] = 1
    return copies_LSE


# -- what is measured


def follow(load_WLE: np.ndarray, planners: dict[str, Planner]) -> dict[str, list[Step]]:
    """All planners over all windows, in turns."""
    found: dict[str, list[Step]] = {name: [] for name in planners}
    last: dict[str, Planned] = {}
    for w, load_LE in enumerate(load_WLE):
        for name, planner in planners.items():
            planned, before = planner(load_LE, last.get(name)), last.get(name)
            met = _balance(load_WLE[w + 1], planned) if w + 1 < len(load_WLE) else None
            milliseconds = 0.0 if planned is before else 1e3 * planned.seconds
            found[name].append(Step(_balance(load_LE, planned), met, _moved(before, planned), milliseconds))
            last[name] = planned
    return found


def _balance(load_LE: np.ndarray, planned: Planned) -> Balance:
    each_LE = load_LE / planned.copies_LSE.sum(1)
    return balance_of(np.einsum("lse,le->ls", planned.copies_LSE, each_LE), np.ones(planned.copies_LSE.shape[1]))


def _moved(before: Planned | None, planned: Planned) -> float | None:
    """The share of slots in use whose shard did not hold their expert; None: there was nothing before."""
    if before is None:
        return None
    return float(((planned.copies_LSE > 0) & (before.copies_LSE == 0)).sum() / planned.copies_LSE.sum())


def _table(name: str, load_WLE: np.ndarray, cluster: Cluster, found: dict[str, list[Step]]) -> Table:
    """Means over windows but the first; the worst layer is the worst of all of them."""
    rows = tuple((planner, *_row(steps)) for planner, steps in found.items())
    num_windows, num_layers, num_experts = load_WLE.shape
    title = (
        f"{name}: {num_windows} windows of {num_layers} layers x {num_experts} experts, "
        f"{cluster.num_shards} shards, {cluster.num_slots} slots a layer"
    )
    columns = ("planner", "balance", "worst layer", "in the next window", "worst layer then", "slots moved", "ms")
    return Table(title, columns, rows)


def _row(steps: Sequence[Step]) -> tuple[Any, ...]:
    late = steps[1:] or steps
    met = [step.met for step in late if step.met]
    moved = [step.moved for step in late if step.moved is not None]
    return (
        _digits(statistics.fmean(step.now.overall for step in late)),
        _digits(min(step.now.worst for step in late)),
        _digits(statistics.fmean(m.overall for m in met)) if met else "",
        _digits(min(m.worst for m in met)) if met else "",
        statistics.fmean(moved) if moved else "",
        statistics.median(step.milliseconds for step in late) or "",
    )


def _digits(value: float) -> str:
    return f"{value:.4f}"


def _plain(step: Step) -> dict[str, float | None]:
    met = (step.met.overall, step.met.worst) if step.met else (None, None)
    names = ("balance", "worst", "balance_next", "worst_next", "moved", "ms")
    return dict(zip(names, (step.now.overall, step.now.worst, *met, step.moved, step.milliseconds), strict=True))


def _targets(report: Report, found: dict[str, list[Step]]) -> None:
    late, fresh = found[OURS][1:], found[FRESH]
    report.target("balance from scratch, lowest window", min(step.now.overall for step in fresh), at_least=0.99)
    if late:
        report.target("balance, lowest window", min(step.now.overall for step in late), at_least=0.98)
        report.target("worst layer of all windows", min(step.now.worst for step in late), at_least=0.95)
        report.target("slots moved, most in a window", max(step.moved or 0.0 for step in late), at_most=0.15)
        report.target("ms, median", statistics.median(step.milliseconds for step in late), at_most=100.0)


def _curves(found: dict[str, list[Step]]) -> list[Curve]:
    num_windows = len(found[OURS])
    if num_windows < 2:
        return []
    x = tuple(float(w) for w in range(1, num_windows))
    uneven = {name: tuple(1 - step.now.overall for step in steps[1:]) for name, steps in found.items()}
    moved = {name: tuple(step.moved or None for step in steps[1:]) for name, steps in found.items() if name != STALE}
    return [
        Curve("Imbalance after each plan", "window", "1 - balance", x, uneven),
        Curve("What each plan moves", "window", "share of slots", x, moved),
    ]


def _trade_off(report: Report, load_WLE: np.ndarray, cluster: Cluster, size: Size) -> list[Curve]:
    """The same windows with several goals and prices of a move."""
    if len(load_WLE) < 2:
        return []
    knobs = [(cost, goal) for cost in size.costs for goal in size.goals]
    rows = {
        (cost, goal): _row(follow(load_WLE, {OURS: _ours(cluster, PlanGoal(goal, cost), keeps=True)})[OURS])
        for cost, goal in knobs
    }
    columns = (
        "move_cost",
        "goal",
        "balance",
        "worst layer",
        "in the next window",
        "worst layer then",
        "slots moved",
        "ms",
    )
    title = "What a goal and a price of moves make of it"
    report.tables.append(Table(title, columns, tuple((*knob, *row) for knob, row in rows.items())))
    x = tuple(1 - goal for goal in size.goals)
    lines = {f"move_cost {cost}": tuple(rows[cost, goal][4] or None for goal in size.goals) for cost in size.costs}
    return [Curve(title, "1 - goal", "share of slots", x, lines)]
