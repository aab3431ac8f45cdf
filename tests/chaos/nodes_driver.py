"""The driver of test_nodes.py, in a process of its own: a pool on a cluster of fake nodes, load up and load down.

python nodes_driver.py GCS_ADDRESS STATE_DIR
"""

# ruff: noqa: E402
import json
import sys
import time
from pathlib import Path

from trinity.config import setup_environment

setup_environment("disabled", is_local=False)

import ray
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ray"))
from test_moves import MODEL, SOURCE, Caller, until

from actors import pool as pools
from actors.control.admin import operator
from trinity.config import PlacementConfig

torch.set_num_threads(1)
SCALE = dict(
    enabled=True, min_shards=1, max_shards=3, rows_per_s=200, every_s=0.5, cooldown_s=2, settle_s=3, max_spare=2
)
SETTINGS = PlacementConfig(
    pool="nodes",
    num_shards=1,
    resources={"expert_shard": 1},
    data_host="node",
    watch_every_s=0.5,
    window_s=2,
    drain_s=0.1,
    balance_every_s=0,
    call_timeout_s=60,
    autoscale=SCALE,
)


def shard_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and "expert_shard" in node["Resources"]}


def tell(what: str, **found: object) -> None:
    print(
        json.dumps({"what": what, "at_s": round(time.monotonic() - STARTED, 1), "nodes": len(shard_nodes()), **found}),
        flush=True,
    )


def leave(seen, pool, address: str) -> None:
    """A node gets notice: what it holds is elsewhere before it goes."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    view = seen.snapshot().shards[-1]
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(1000 * (time.time() + 60))
    accepted, why = GcsClient(address).drain_node(view.host, reason, "spot", deadline_ms)
    assert accepted, why
    until(lambda: view.name not in seen.snapshot().table.shards, within_s=60)
    until(lambda: len(seen.snapshot().table.shards) == 3, within_s=60)
    tell("left a node", shards=seen.snapshot().table.shards, reason=seen.snapshot().changes[0].reason)


def main(address: str, state_dir: str) -> None:
    ray.init(address=address, namespace="trinity", log_to_driver=False, logging_level="ERROR")
    assert not shard_nodes()
    pool = pools.create(SETTINGS, "trinity", MODEL, None, state_dir)
    pool.load(SOURCE)
    seen = operator(SETTINGS, "trinity")
    tell("ready", shards=seen.snapshot().table.shards)
    assert len(shard_nodes()) == 1
    caller = Caller(pool)
    caller.thread.start()
    until(lambda: len(seen.snapshot().table.shards) == 3, within_s=120)
    assert len(shard_nodes()) == 3
    assert len({shard.host for shard in seen.snapshot().shards}) >= 1
    until(lambda: seen.snapshot().table.num_replicas_LE.max() > 1)
    tell("load up", shards=seen.snapshot().table.shards, replicas=int(seen.snapshot().table.num_replicas_LE.sum()))
    leave(seen, pool, address)
    caller.stop.set()
    caller.thread.join(30)
    assert caller.errors == [], caller.errors
    until(lambda: len(seen.snapshot().table.shards) == 1, within_s=120)
    tell("load down", shards=seen.snapshot().table.shards)
    until(lambda: len(shard_nodes()) == 1, within_s=120)
    tell("nodes left")
    pools.destroy("nodes", "trinity")
    until(lambda: not shard_nodes(), within_s=120)
    tell("gone", calls=caller.num_calls)


STARTED = time.monotonic()
if __name__ == "__main__":
    main(*sys.argv[1:])
