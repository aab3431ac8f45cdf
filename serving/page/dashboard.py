"""The page at /dashboard and the data it asks for.

Legend: L layers with routed experts, E experts of a layer.

Decision: a snapshot is encoded once, however many pages look at it.
"""

import functools
import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from serving.page.assembly import assembled
from trinity.placement.snapshot import Snapshot

PAGE = assembled("dashboard.html", ["base.css", "dashboard.css"], ["base.js", "heat.js", "dashboard.js", "training.js"])


def encode(snapshot: Snapshot, age_s: float) -> bytes:
    """JSON: {"age_s": seconds since the placement service said it, "snapshot": what it said}."""
    return b'{"age_s":%.3f,"snapshot":%b}' % (age_s, _encode(_Same(snapshot)))


class _Same:
    """A key for the cache: the very snapshot, since comparing two would cost as much as encoding one."""

    def __init__(self, snapshot: Snapshot):
        self.snapshot = snapshot

    def __hash__(self) -> int:
        return id(self.snapshot)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.snapshot is self.snapshot


@functools.lru_cache(maxsize=1)
def _encode(same: _Same) -> bytes:
    return json.dumps(to_tree(same.snapshot), separators=(",", ":"), allow_nan=False).encode()


def to_tree(snapshot: Snapshot) -> dict[str, Any]:
    """`replicas[l][e]` are positions in `placed`; loads in tenths of a row, numbers that are not finite as 0."""
    table = snapshot.table
    load_LE = np.nan_to_num(np.array(snapshot.load_LE, dtype=np.float64), posinf=0.0, neginf=0.0)
    return {
        "pool": snapshot.pool,
        "time_s": snapshot.time_s,
        "epoch": table.epoch,
        "layers": table.layers,
        "placed": table.shards,
        "replicas": table.replicas,
        "load": load_LE.round(1).tolist(),
        "shards": [_finite(asdict(shard)) | {"kernels": shard.kernels} for shard in snapshot.shards],
        "changes": [_finite(asdict(change)) for change in snapshot.changes],
        "num_recoveries": snapshot.num_recoveries,
        "survives": snapshot.survives,
        **_finite({"imbalance": snapshot.imbalance}),
    }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: 0 if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
