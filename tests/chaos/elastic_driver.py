"""The driver of test_elastic.py, in a process of its own: a node for another worker comes while training, and leaves.

python elastic_driver.py FOLDER
"""

# ruff: noqa: E402
import sys
import threading
import time
from pathlib import Path

from trinity.config import setup_environment

setup_environment("disabled", is_local=False)

import ray
import torch
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[2]))
from actors import pool as pools
from actors.train import STOP, fit
from tests.ray.runs import config_for, losses_of
from trinity.checkpoint import latest_checkpoint, open_checkpoint
from trinity.data.prepare import prepare
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer

torch.set_num_threads(1)
NODE = dict(include_dashboard=False, object_store_memory=200 << 20, resources={"train_slot": 1})
PATIENCE_S = 150.0


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=6, **NODE))
    ray.init(address=cluster.address, namespace="trinity", log_to_driver=False, logging_level="ERROR")
    config = config_for(folder, steps=100_000).replace(
        train={"num_workers": 2, "min_workers": 1, "max_failures": -1}, optim={"decay": "none"}
    )
    pool = pools.create(config.placement, "trinity", config.model, config.optim, str(folder / "placement"))
    result: list[dict] = []
    job = threading.Thread(target=lambda: result.append(fit(config)), daemon=True)
    job.start()
    sizes = [settled(pool, 1)]
    node = cluster.add_node(num_cpus=2, **NODE)
    sizes.append(settled(pool, 2))
    cluster.remove_node(node, allow_graceful=False)
    sizes.append(settled(pool, 1))
    (folder / "ray" / STOP).touch()
    job.join(PATIENCE_S)
    print(f"workers by version: {sizes}, {result[0]['version']} steps", flush=True)

    losses = losses_of(folder / "ray")
    assert list(losses) == list(range(1, result[0]["version"] + 1)), "each step once, in order"
    assert open_checkpoint(latest_checkpoint(folder / "ray")).version == result[0]["version"]
    want = undisturbed(config, folder / "here", len(losses))
    worst = max(abs(mine - theirs) for mine, theirs in zip(losses.values(), want, strict=True))
    print(f"largest difference of a loss from one worker's: {worst:.1e}")
    assert worst < 1e-3, "sums are in another order, nothing else"


def settled(pool, num_nodes: int) -> tuple[int, int]:
    """Once workers on so many nodes have decided some steps -> their number, and the version."""
    until_s, first = time.monotonic() + PATIENCE_S, None
    while time.monotonic() < until_s:
        decision = pool.decided()
        if decision is None or len(decision.notes["backbone"]) != num_nodes:
            first = None
        elif decision.version >= (first := first or decision.version) + 20:
            return num_nodes, decision.version
        time.sleep(0.1)
    raise AssertionError(f"no 20 steps on {num_nodes} nodes within {PATIENCE_S} s: {pool.decided()}")


def undisturbed(config, out_dir: Path, num_steps: int) -> list[float]:
    config = config.replace(train={"out_dir": str(out_dir), "num_workers": 1, "min_workers": None})
    experts = local_pool(
        config.model, Load(), num_shards=config.placement.num_shards, optim=config.optim, backend="torch"
    )
    trainer = Trainer(config, experts, prepare(config.data, config.train, config.model, out_dir), Alone())
    trainer.start()
    return [trainer.step().loss for _ in range(num_steps)]


main(Path(sys.argv[1]))
