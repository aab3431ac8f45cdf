"""The page at /dashboard and the data it asks for.

Legend: L layers with routed experts, E experts of a layer.

Decisions: one HTML response made of the files in serving/page/, with nothing from elsewhere. Its policy names its own
style and script by hash and lets it talk to this server only; the script may not turn text into markup at all, because
shard names and reasons are text of others. A snapshot is encoded once, however many pages look at it.
"""

import base64
import functools
import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trinity.placement.snapshot import Snapshot

FOLDER = Path(__file__).parent
STYLE, SCRIPT, FRAME = (
    "\n".join((FOLDER / name).read_text("utf-8") for name in names)
    for names in (["page.css"], ["heat.js", "page.js"], ["page.html"])
)
PAGE = FRAME.replace("/*style*/", STYLE).replace("/*script*/", SCRIPT)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = {
    "default-src": "'none'",
    "script-src": _hash(SCRIPT),
    "style-src": _hash(STYLE),
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


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
        "shards": [_finite(asdict(shard)) for shard in snapshot.shards],
        "changes": [_finite(asdict(change)) for change in snapshot.changes],
        "num_recoveries": snapshot.num_recoveries,
        "survives": snapshot.survives,
        **_finite({"imbalance": snapshot.imbalance}),
    }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: 0 if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
