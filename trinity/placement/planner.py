"""Plan a placement: balanced shards, replicas of hot experts, nothing lost with a shard or a host, and few moves.

Legend: L layers, S shards, E experts of a layer, X = L * E, R replicas of all experts.
`plan` keeps what `previous` has, and changes first what must change, then what pays:
  1. copies on shards that are gone or draining are lost; what exceeds slots, ceilings or the budget is taken away;
  2. experts below their floor (one replica, more with redundancy) are placed, the largest first, where time is shortest;
  3. replicas of one expert that share a host are separated where another host can take one;
  4. layers below the goal are refined step by step (local_search.py).
Without `previous` the hottest experts get the spare slots, and all is placed by step 2.
Balance is mean over max of the rows that shards get, rows / capacity where capacities differ; over several layers it is the
sum of the means over the sum of the maxima, as in vLLM. All here is pure and deterministic.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

import numpy as np

from trinity.errors import ConfigError
from trinity.placement.anti_affinity import anti_affinity
from trinity.placement.layout import Bounds, Layout
from trinity.placement.local_search import local_search
from trinity.placement.table import Expert, PlacementTable
from trinity.placement.topology import Shard, Topology

FRESH_GOAL = 0.995  # without a previous plan every slot is filled anyway
GRAIN = 0.2  # of the mean shard: a fresh plan does not split experts into smaller replicas
SPLIT = 0.9  # of the mean shard: no balance is to be had around a replica that is larger
KEEP = 1.5  # where redundancy is scarce, an expert keeps its own unless another one is so many times hotter


@dataclass(frozen=True)
class PlanGoal:
    """Aim of a plan: what it is to reach, and what a move may cost.

    goal: a layer is left alone once its balance is so high.
    move_cost: a slot is filled for balance only where it takes so much off the time that shards exceed the goal by, in
        units of the mean shard's time. 0: whatever helps. Higher: fewer moves, less balance.
    redundancy: so many shards may be lost at once and no expert with them; hottest experts first where slots are too few.
    num_spare: replicas of a layer beyond one of each expert, at most; None: as many as there are slots.
    """

    goal: float = 0.985
    move_cost: float = 0.0
    redundancy: int = 0
    num_spare: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.goal <= 1:
            raise ConfigError(f"goal {self.goal} is no balance; use more than 0 and at most 1, such as 0.985")
        if not (isfinite(self.move_cost) and self.move_cost >= 0):
            raise ConfigError(f"move_cost {self.move_cost} is no share of a shard's time; use 0 or more, such as 0.01")
        for what in ("redundancy", "num_spare"):
            if (value := getattr(self, what)) is not None and value < 0:
                raise ConfigError(f"{what} {value} is below 0; use 0 or more")


def plan(
    load_LE: np.ndarray,
    topology: Topology,
    previous: PlacementTable | None = None,
    aim: PlanGoal = PlanGoal(),
    *,
    layers: Iterable[int] | None = None,
    replicas_LE: np.ndarray | None = None,
) -> PlacementTable:
    """The next epoch for this load (rows of each expert, in any unit); `previous` itself where nothing is to change.

    layers: what the rows of `load_LE` are called; default: as in `previous`, or 0 to L - 1.
    replicas_LE: so many replicas of each expert, as far as slots and shards allow; default: the planner chooses.
    Raises ConfigError for arguments that do not fit together, and where there is no slot for some expert.
    """
    load_LE = _checked(load_LE)
    num_layers, num_experts = load_LE.shape
    names = tuple(range(num_layers)) if previous is None else previous.layers
    names = names if layers is None else tuple(layers)
    _check_fit(load_LE, names, previous, replicas_LE)
    shards = topology.ordered(previous.shards if previous else ())
    held = _kept(previous, shards, num_experts)
    layout = Layout(load_LE, topology.slots_LS(shards, num_layers, num_experts), *_shard_arrays(shards))
    layout.fill(*held[:3])
    bounds = _bounds(layout, aim, replicas_LE)
    fresh = not held[0].size
    layout.evict(_excess_L(layout, bounds), bounds)
    layout.place(_wanted_LE(layout, bounds, fresh))
    anti_affinity(layout)
    if fresh:
        local_search(layout, bounds, max(aim.goal, FRESH_GOAL), move_cost=0.0)
    local_search(layout, bounds, aim.goal, aim.move_cost)
    while anti_affinity(layout):  # no step of `local_search` brings replicas together, so this ends
        local_search(layout, bounds, aim.goal, aim.move_cost)
    return _table(layout, tuple(shard.name for shard in shards), names, previous, held)


def with_floor(load_LE: np.ndarray, share: float = 0.1) -> np.ndarray:
    """A measured load to plan for: no expert below that share of its layer's mean, and even where nothing was measured.

    An expert that had no rows in a window will have some; with zeros, any place is as good as any other.
    """
    mean_L1 = load_LE.mean(axis=1, keepdims=True)
    return np.where(mean_L1 > 0, np.maximum(load_LE, share * mean_L1), 1.0)


# -- what a table is worth, and what it costs


@dataclass(frozen=True)
class Balance:
    """`overall` of all layers, `worst` of one layer; 1.0 is even. `layer_L` is each layer's own."""

    overall: float
    worst: float
    layer_L: np.ndarray


@dataclass(frozen=True)
class Copy:
    """`shard` is to get `expert`; `sources` held it under the table before, the primary first (none: no shard did)."""

    expert: Expert
    shard: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Moves:
    """Moves that make one table follow another: its copies by layer and expert, of so many replicas in all."""

    copies: tuple[Copy, ...]
    num_replicas: int
    expert_bytes: int

    @property
    def num_bytes(self) -> int:
        return len(self.copies) * self.expert_bytes

    @property
    def share(self) -> float:
        """Share of the slots in use that must be filled."""
        return len(self.copies) / max(1, self.num_replicas)


def balance(load_LE: np.ndarray, table: PlacementTable, topology: Topology | None = None) -> Balance:
    """Balance of a table under a load. Shards that `topology` does not know count with capacity 1.0, as all do without."""
    capacity = {shard.name: shard.capacity for shard in topology.shards} if topology else {}
    capacity_S = np.array([capacity.get(name, 1.0) for name in table.shards])
    return balance_of(rows_LS(load_LE, table), capacity_S)


def balance_of(rows_LS: np.ndarray, capacity_S: np.ndarray) -> Balance:
    """Balance from the rows that each shard gets."""
    mean_L, max_L = rows_LS.sum(1) / capacity_S.sum(), (rows_LS / capacity_S).max(1)
    layer_L = np.divide(mean_L, max_L, out=np.ones_like(mean_L), where=max_L > 0)
    overall = mean_L.sum() / max_L.sum() if max_L.sum() > 0 else 1.0
    return Balance(float(overall), float(layer_L.min(initial=1.0)), layer_L)


def rows_LS(load_LE: np.ndarray, table: PlacementTable) -> np.ndarray:
    """float64 [L, S]: the rows that each shard of the table gets, where those of an expert split evenly over its replicas."""
    counts_X, shard_R = table.flat()
    num_shards = len(table.shards)
    load_X = np.asarray(load_LE, dtype=np.float64).ravel()
    key_R = np.repeat(np.arange(len(counts_X)) // table.num_experts * num_shards, counts_X) + shard_R
    rows_X = np.bincount(key_R, np.repeat(load_X / counts_X, counts_X), len(table.layers) * num_shards)
    return rows_X.reshape(len(table.layers), num_shards)


def moves(previous: PlacementTable | None, table: PlacementTable, expert_bytes: int = 1) -> Moves:
    """Each replica that its shard did not hold under `previous`. Dropping a replica costs nothing."""
    found: list[Copy] = []
    for i, layer in enumerate(table.layers):
        for e, held in enumerate(table.replicas[i]):
            sources = tuple(previous.shards[s] for s in previous.replicas[i][e]) if previous else ()
            names = (table.shards[s] for s in held)
            found += [Copy((layer, e), name, sources) for name in names if name not in sources]
    return Moves(tuple(found), int(table.num_replicas_LE.sum()), expert_bytes)


def hottest_first(
    load_LE: np.ndarray, floor_LE: np.ndarray, ceiling_LE: np.ndarray, budget_L: np.ndarray, held_LE: np.ndarray
) -> np.ndarray:
    """int64 [L, E]: the floor, and then again and again one more replica for the expert whose replicas are the largest.

    Until the budget of the layer is spent or all are at their ceiling. One that `held_LE` has already counts KEEP times.
    """
    num_LE, layer_A = floor_LE.astype(np.int64), np.flatnonzero(floor_LE.sum(1) < budget_L)
    while layer_A.size:
        num_AE = num_LE[layer_A]
        each_AE = load_LE[layer_A] / num_AE * np.where(num_AE < held_LE[layer_A], KEEP, 1.0)
        each_AE[num_AE >= ceiling_LE[layer_A]] = -1.0
        expert_A = each_AE.argmax(1)
        more_A = each_AE[np.arange(len(layer_A)), expert_A] >= 0
        num_LE[layer_A[more_A], expert_A[more_A]] += 1
        layer_A = layer_A[more_A & (num_LE[layer_A].sum(1) < budget_L[layer_A])]
    return num_LE


# -- the parts of a plan

Held = tuple[
    np.ndarray, np.ndarray, np.ndarray, np.ndarray
]  # [R] layer, expert, shard position now, turn among replicas


def _checked(load_LE: np.ndarray) -> np.ndarray:
    load_LE = np.asarray(load_LE, dtype=np.float64)
    if load_LE.ndim != 2 or not load_LE.size:
        raise ConfigError(f"load has shape {load_LE.shape}; use [layers, experts], at least one of each")
    wrong = ~(np.isfinite(load_LE) & (load_LE >= 0))
    if wrong.any():
        layer, expert = (int(i[0]) for i in np.nonzero(wrong))
        raise ConfigError(
            f"load of expert {expert} in row {layer} is {load_LE[layer, expert]}; use finite numbers, 0 or more"
        )
    return load_LE


def _check_fit(
    load_LE: np.ndarray, layers: tuple[int, ...], previous: PlacementTable | None, replicas_LE: np.ndarray | None
) -> None:
    if len(layers) != len(load_LE):
        raise ConfigError(f"load has {len(load_LE)} rows for {len(layers)} layers; give one row for each")
    if previous is not None and (previous.layers, previous.num_experts) != (layers, load_LE.shape[1]):
        raise ConfigError(
            f"load is of {load_LE.shape[1]} experts in {len(layers)} layers, placement epoch {previous.epoch} "
            f"of {previous.num_experts} in {len(previous.layers)}; plan for one and the same model"
        )
    if replicas_LE is not None and replicas_LE.shape != load_LE.shape:
        raise ConfigError(f"replica counts have shape {replicas_LE.shape}, load {load_LE.shape}; use the same")


def _shard_arrays(shards: tuple[Shard, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Capacity and host number of each shard."""
    hosts = list(dict.fromkeys(shard.host for shard in shards))
    return np.array([shard.capacity for shard in shards]), np.array([hosts.index(shard.host) for shard in shards])


def _kept(previous: PlacementTable | None, shards: tuple[Shard, ...], num_experts: int) -> Held:
    """The replicas of `previous` whose shard is still to be used."""
    if previous is None:
        return tuple(np.zeros(0, dtype=np.int64) for _ in range(4))  # type: ignore[return-value]
    counts_X, shard_R = previous.flat()
    now = {shard.name: position for position, shard in enumerate(shards)}
    now_R = np.array([now.get(name, -1) for name in previous.shards])[shard_R]
    owner_R = np.repeat(np.arange(len(counts_X)), counts_X)
    turn_R = np.arange(len(shard_R)) - np.repeat(np.cumsum(counts_X) - counts_X, counts_X)
    here_R = now_R >= 0
    layer_R, expert_R = np.divmod(owner_R[here_R], num_experts)
    return layer_R, expert_R, now_R[here_R], turn_R[here_R]


def _bounds(layout: Layout, aim: PlanGoal, replicas_LE: np.ndarray | None) -> Bounds:
    """Floors level by level: nobody gets a third replica before everybody has two."""
    num_experts, load_LE = layout.empty, layout.load_LE[:, : layout.empty]
    room_L, is_given = layout.slots_LS.sum(1), replicas_LE is not None
    budget_L = room_L if aim.num_spare is None else np.minimum(room_L, num_experts + aim.num_spare)
    most_L1 = (layout.slots_LS > 0).sum(1, keepdims=True)
    if replicas_LE is None:
        replicas_LE = np.maximum(1 + aim.redundancy, np.ceil(load_LE / (SPLIT * layout.capacity_S.max())))
    wanted_LE = np.clip(replicas_LE, 1, most_L1)
    floor_LE, left_L = np.ones(load_LE.shape, dtype=np.int64), budget_L - num_experts
    for level in range(2, int(wanted_LE.max()) + 1):
        keep_LE = np.where(layout.num_LE[:, :num_experts] >= level, KEEP, 1.0)
        order_LE = np.argsort(np.where(wanted_LE >= level, -load_LE * keep_LE, 1.0), 1, kind="stable")
        granted_L = np.minimum(left_L, (wanted_LE >= level).sum(1))
        more_LE = np.zeros(load_LE.shape, dtype=np.int64)
        np.put_along_axis(more_LE, order_LE, (np.arange(num_experts) < granted_L[:, None]).astype(np.int64), 1)
        floor_LE, left_L = floor_LE + more_LE, left_L - granted_L
    ceiling_LE = floor_LE if is_given else np.broadcast_to(most_L1, load_LE.shape)
    return Bounds.of(floor_LE, ceiling_LE, budget_L)


def _wanted_LE(layout: Layout, bounds: Bounds, fresh: bool) -> np.ndarray:
    """int64 [L, E]: the floor, and in a fresh plan what spare slots hold beyond it."""
    load_LE, floor_LE, ceiling_LE, held_LE = (
        of[:, : layout.empty] for of in (layout.load_LE, bounds.floor_LE, bounds.ceiling_LE, layout.num_LE)
    )
    fine_LE = np.ceil(load_LE / (GRAIN * layout.capacity_S.mean()))
    ceiling_LE = np.maximum(floor_LE, np.minimum(ceiling_LE, fine_LE))
    return hottest_first(load_LE, floor_LE, ceiling_LE, bounds.budget_L, held_LE) if fresh else floor_LE


def _excess_L(layout: Layout, bounds: Bounds) -> np.ndarray:
    """The number of replicas of each layer that must go."""
    above_L = np.maximum(layout.num_LE - bounds.ceiling_LE, 0)[:, : layout.empty].sum(1)
    coming_L = np.maximum(layout.num_LE, bounds.floor_LE)[:, : layout.empty].sum(1)
    excess_L: np.ndarray = np.maximum(above_L, coming_L - bounds.budget_L)
    return excess_L


def _table(
    layout: Layout, shards: tuple[str, ...], layers: tuple[int, ...], previous: PlacementTable | None, held: Held
) -> PlacementTable:
    """Replicas in the order they had, new ones after them; the first of quite new experts are dealt out over the shards."""
    num_experts, num_shards, last = layout.empty, len(shards), 1 + int(held[3].max(initial=0))
    held_LES = layout.held_LSE[:, :, :num_experts].transpose(0, 2, 1)
    turn_ES = last + np.add.outer(np.arange(num_experts), np.arange(num_shards)) % num_shards
    turn_LES = np.tile(turn_ES, (len(layers), 1, 1))
    turn_LES[held[:3]] = held[3]
    layer_R, expert_R, shard_R = np.nonzero(held_LES)
    owner_R = layer_R * num_experts + expert_R
    order_R = np.argsort(owner_R * (last + num_shards) + turn_LES[layer_R, expert_R, shard_R])
    flat, ends = shard_R[order_R].tolist(), np.cumsum(np.bincount(owner_R)).tolist()
    held_X = [tuple(flat[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    replicas = tuple(tuple(held_X[i : i + num_experts]) for i in range(0, len(held_X), num_experts))
    if previous and (previous.shards, previous.replicas) == (shards, replicas):
        return previous
    return PlacementTable(previous.epoch + 1 if previous else 1, shards, layers, replicas)
