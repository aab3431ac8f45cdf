"""The driver of test_spread.py, in a process of its own: two shards that hold the same experts, on two nodes, of which one is
lost and comes back. Prints JSON: nodes that may be lost, at first, then, and in the end."""

# ruff: noqa: E402
import json
import sys
import tempfile
from pathlib import Path

from trinity.config import setup_environment

setup_environment("disabled", is_local=False)

import ray
import torch
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "ray"))
from test_moves import MODEL, SOURCE, Caller, until

from actors import pool as pools
from actors.control.admin import operator
from trinity.config import PlacementConfig

torch.set_num_threads(1)
SETTINGS = PlacementConfig(
    pool="spread",
    num_shards=2,
    redundancy=1,
    resources={"expert_shard": 1},
    data_host="node",
    watch_every_s=0.5,
    drain_s=0.1,
    balance_every_s=0,
)
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    nodes = [cluster.add_node(**NODE, resources={"expert_shard": 2}) for _ in range(2)]
    ray.init(address=cluster.address, namespace="trinity", log_to_driver=False, logging_level="ERROR")
    pool = pools.create(SETTINGS, "trinity", MODEL, None, tempfile.mkdtemp())
    pool.load(SOURCE)
    seen, found = operator(SETTINGS, "trinity"), []

    def settles(num_nodes: int) -> None:
        until(lambda: all(shard.state == "ready" for shard in seen.snapshot().shards), within_s=120)
        until(lambda: seen.snapshot().survives == (1, num_nodes), within_s=120)
        found.append(seen.snapshot().survives[1])

    settles(1)
    caller = Caller(pool)
    caller.thread.start()
    cluster.remove_node(nodes[0], allow_graceful=False)
    settles(0)
    cluster.add_node(**NODE, resources={"expert_shard": 2})
    settles(1)
    caller.stop.set()
    caller.thread.join()
    told = {"nodes": found, "errors": [str(error) for error in caller.errors], "num_calls": caller.num_calls}
    reasons = [change.reason for change in seen.snapshot().changes]
    print(json.dumps({**told, "longest_s": round(caller.longest_s, 3), "changes": reasons}), flush=True)
    pools.destroy(SETTINGS.pool, "trinity")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
