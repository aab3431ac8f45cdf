"""Snapshot of a pool for operators: one frozen value of plain numbers, made by the placement service, shown by everybody else.

Legend: L layers with routed experts, E experts of a layer.
"""

from dataclasses import dataclass

from trinity.config import AdapterSet
from trinity.placement.table import PlacementTable

NO_ADAPTERS = AdapterSet()


@dataclass(frozen=True)
class ShardView:
    """A shard as the service last saw it."""

    name: str
    host: str  # node id; empty while it is starting
    state: str  # starting, ready, draining, away
    version: int
    num_replicas: int
    weight_bytes: int
    rows_per_s: float
    expert_dtype: str = ""  # of inference; empty while it is starting
    computes: str = ""  # kernels and the formats that they know, in words: "avx512_bf16: float32 bfloat16 int8"

    @property
    def kernels(self) -> str:
        """Kernels of its experts: instructions of the part in C++, or python, as for formats that these lack; on
        a GPU the backend."""
        name, _, formats = self.computes.partition(": ")
        return name if not formats or self.expert_dtype in formats.split() else "python"


@dataclass(frozen=True)
class ChangeView:
    """A change of the table, or an attempt at one."""

    epoch: int
    started_s: float  # time.time()
    seconds: float  # so far, while it runs
    reason: str  # why: "scale", "drain", "balance", "recovery", ...
    phase: str  # start, prepare, drain, retire, done, rolled back
    num_copies: int
    num_drops: int
    copied_bytes: int


@dataclass(frozen=True)
class Snapshot:
    """`load_LE[l][e]`: rows per second of expert (table.layers[l], e), an exponential window."""

    pool: str
    time_s: float
    table: PlacementTable
    shards: tuple[ShardView, ...]
    load_LE: tuple[tuple[float, ...], ...]
    imbalance: float  # max / mean of the shards' rows in the same window; 1 is even, 0 without rows
    changes: tuple[ChangeView, ...]  # latest first, at most 50
    num_recoveries: int
    adapters: AdapterSet = NO_ADAPTERS  # that are served beside the pool's weights

    @property
    def survives(self) -> tuple[int, int]:
        """Shards, and nodes, of which so many may be lost at once and no expert with them. Shards that are away count as lost;
        -1: an expert is nowhere now."""
        node_of = {shard.name: shard.host for shard in self.shards if shard.state in ("ready", "draining")}
        counts = [self.table.num_hosts_LE(of, only=node_of) for of in ({}, node_of)]
        shards, nodes = (int(num_LE.min(initial=len(self.shards))) - 1 for num_LE in counts)
        return shards, nodes
