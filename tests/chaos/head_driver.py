"""The driver of test_head.py, in a process of its own: Ray's head (GCS) dies and comes back while rows flow.

python head_driver.py STATE_DIR
"""

# ruff: noqa: E402
import sys
import time
from pathlib import Path

from trinity.config import setup_environment

setup_environment("disabled", is_local=False)

import torch
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "ray"))
import ray
from test_moves import MODEL, SOURCE, Caller, by_table, held, settled, until

from actors import pool as pools
from actors.control.admin import operator
from trinity.config import PlacementConfig

torch.set_num_threads(1)
SETTINGS = PlacementConfig(
    pool="head", num_shards=2, redundancy=1, watch_every_s=0.5, drain_s=0.1, balance_every_s=0, call_timeout_s=60
)


def main(state_dir: str) -> None:
    node = dict(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20)
    cluster = Cluster(initialize_head=True, head_node_args=node)
    ray.init(address=cluster.address, namespace="trinity", log_to_driver=False, logging_level="ERROR")
    pool = pools.create(SETTINGS, "trinity", MODEL, None, state_dir)
    pool.load(SOURCE)
    seen = operator(SETTINGS, "trinity")
    until(lambda: seen.snapshot().table.num_replicas_LE.min() == 2)
    caller = Caller(pool)
    caller.thread.start()
    until(lambda: caller.num_calls > 50)
    epoch = seen.snapshot().table.epoch

    cluster.head_node.kill_gcs_server()
    num_calls = caller.num_calls
    until(lambda: caller.num_calls > num_calls + 200)
    time.sleep(2)
    cluster.head_node.start_gcs_server()
    print(
        f"rows flowed without a head: {caller.num_calls - num_calls} calls, longest {caller.longest_s:.3f} s",
        flush=True,
    )

    until(lambda: seen.snapshot().table.epoch >= epoch)
    grown = settled(seen, seen.scale(3, "more"))
    until(lambda: held(pool) == by_table(grown.table))
    caller.stop.set()
    caller.thread.join(30)
    assert caller.errors == [], caller.errors
    print(f"and the pool grew afterwards: epoch {epoch} -> {grown.table.epoch}", flush=True)
    pools.destroy("head", "trinity")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
