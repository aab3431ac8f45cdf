"""A stand-in for `actors.control.admin.PlacementOperator`: a pool that is only told of, and that tests change as they like.

`snapshot_of` makes pools of any size with loads as skewed as real ones; `down` makes every call fail as a lost service does.
"""

import itertools
import threading
from dataclasses import replace

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import WAIT_S
from trinity.config import AdapterRef, AdapterSet
from trinity.errors import CheckpointError, InvalidRequest, ModelNotFound, Unavailable
from trinity.placement.snapshot import ChangeView, ShardView, Snapshot
from trinity.placement.table import PlacementTable

NOW_S = 1_790_000_000.0
MIB_25 = 25 << 20
COMPUTES = ("avx512_bf16: float32 int8", "python: float32 int8", "avx2: float32")


def snapshot_of(num_layers=6, num_experts=16, num_shards=3, epoch=4, pool="default", seed=0):
    """The hottest twentieth of the experts have two replicas; the hottest of a layer has 5 to 15 times its mean."""
    load_LE = np.random.default_rng(seed).lognormal(3.0, 1.0, (num_layers, num_experts))
    names = tuple(f"shard-{i}" for i in range(num_shards))
    table = PlacementTable.spread(range(2, 2 + num_layers), num_experts, names)
    rows = [list(row) for row in table.replicas]
    for at, expert in np.argwhere(load_LE > np.quantile(load_LE, 0.95)) if num_shards > 1 else ():
        (first,) = rows[at][expert]
        rows[at][expert] = (first, (first + 1) % num_shards)
    table = replace(table, epoch=epoch, replicas=tuple(map(tuple, rows)))
    rows_S, held_S = np.zeros(num_shards), [0] * num_shards
    for at, row in enumerate(table.replicas):
        for expert, held in enumerate(row):
            for shard in held:
                rows_S[shard] += load_LE[at, expert] / len(held)
                held_S[shard] += 1
    shards = tuple(
        ShardView(name, f"{i:02x}" * 28, "ready", 120, held_S[i], held_S[i] * MIB_25, float(rows_S[i]), "int8", by)
        for i, (name, by) in enumerate(zip(names, itertools.cycle(COMPUTES), strict=False))
    )
    changes = (
        ChangeView(epoch, NOW_S - 42, 0.31, "balance", "done", 6, 4, 6 * MIB_25),
        ChangeView(epoch - 1, NOW_S - 300, 1.9, "recovery", "rolled back", 2, 0, MIB_25),
    )
    imbalance = float(rows_S.max() / rows_S.mean())
    return Snapshot(pool, NOW_S, table, shards, tuple(map(tuple, load_LE.tolist())), imbalance, changes, 1)


def moved(snapshot, layer_at=0, expert=0):
    """The next epoch: an expert has a further replica, and the change that made it is over."""
    key, shards = (snapshot.table.layers[layer_at], expert), snapshot.table.shards
    next_one = (snapshot.table.holders(key)[-1] + 1) % len(shards)
    table = snapshot.table.with_replica(key, shards[next_one])
    change = ChangeView(table.epoch, snapshot.time_s, 0.25, "scale", "done", 1, 0, MIB_25)
    return replace(snapshot, table=table, changes=(change, *snapshot.changes))


class FakeOperator:
    """Thread-safe: the gateway calls it from several."""

    def __init__(self, snapshot=None):
        self._snapshot = snapshot or snapshot_of()
        self._news = threading.Condition()
        self.asked, self.down, self.num_waits = [], False, 0

    def show(self, snapshot):
        with self._news:
            self._snapshot = snapshot
            self._news.notify_all()

    def snapshot(self):
        if self.down:
            raise Unavailable("the placement service is restarting")
        return self._snapshot

    def wait(self, epoch, timeout_s):
        self.num_waits += 1
        with self._news:
            self._news.wait_for(lambda: self.down or self._snapshot.table.epoch > epoch, timeout_s)
        return self.snapshot()

    def scale(self, num_shards, reason):
        return self._ask("scale", num_shards, reason)

    def replicate(self, layer, expert, num_replicas):
        if layer not in self._snapshot.table.layers:
            raise InvalidRequest(f"layer {layer} has no routed experts", param="layer")
        return self._ask("replicate", layer, expert, num_replicas)

    def drain(self, shard):
        return self._ask("drain", shard)

    def rebalance(self):
        return self._ask("rebalance")

    def load_adapter(self, name, source, timeout_s):
        if "missing" in source:
            raise CheckpointError(f"checkpoint folder {source} does not exist")
        ref = AdapterRef(name, len(name), source)
        return self._with_adapters(*(each for each in self._snapshot.adapters.refs if each.name != name), ref)

    def unload_adapter(self, name):
        left = [ref for ref in self._snapshot.adapters.refs if ref.name != name]
        if len(left) == len(self._snapshot.adapters.refs):
            raise ModelNotFound(f"no adapter is called {name!r}", param="lora_name")
        return self._with_adapters(*left)

    def _with_adapters(self, *refs):
        found = AdapterSet(self._snapshot.adapters.number + 1, refs)
        self.show(replace(self._snapshot, adapters=found))
        return found

    def _ask(self, *what):
        self.snapshot()
        self.asked.append(what)
        return self._snapshot.table.epoch


def bearer(key):
    return {"authorization": f"Bearer {key}"} if key else {}


async def metrics_of(server, key=None):
    """{(sample name, *label values): value}"""
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        return samples_of((await http.get("/metrics", headers=bearer(key))).text)


def samples_of(text):
    """{(sample name, *label values): value} of what a server exports."""
    families = text_string_to_metric_families(text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
