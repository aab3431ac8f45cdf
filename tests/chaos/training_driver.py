"""The driver of a test in test_training.py, in a process of its own: Ray's head (GCS) dies and comes back while a model trains.

python training_driver.py FOLDER
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

from actors import pool as pools
from tests.ray.runs import config_for, train_here, weights_of
from trinity.checkpoint import open_checkpoint
from trinity.data.prepare import prepare
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer

NUM_STEPS, AWAY_S = 40, 5.0
torch.set_num_threads(1)


def main(folder: Path) -> None:
    node = dict(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20)
    cluster = Cluster(initialize_head=True, head_node_args=node)
    ray.init(address=cluster.address, namespace="trinity", log_to_driver=False, logging_level="ERROR")
    config = config_for(folder, NUM_STEPS, num_shards=2)
    pool = pools.create(config.placement, "trinity", config.model, config.optim, str(folder / "placement"))
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, folder / "run"), Alone())
    trainer.start()
    losses, spent_s = [], []

    def train() -> None:
        while len(losses) < NUM_STEPS:
            started_s = time.monotonic()
            losses.append(trainer.step().loss)
            spent_s.append(time.monotonic() - started_s)

    thread = threading.Thread(target=train)
    thread.start()
    while len(losses) < 5:
        time.sleep(0.05)
    cluster.head_node.kill_gcs_server()  # Ray's own processes are started and ended by the main thread only
    before = len(losses)
    time.sleep(AWAY_S)
    num_away = len(losses) - before
    cluster.head_node.start_gcs_server()
    thread.join()
    print(
        f"{num_away} steps in {AWAY_S:.0f} s without a head, longest step {max(spent_s):.1f} s, {trainer.num_replays} replays"
    )
    want, reference = train_here(config, folder / "here")
    assert losses == list(want.values())
    mine, theirs = weights_of(open_checkpoint(trainer.save())), weights_of(reference)
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []
    print("bitwise the undisturbed run", flush=True)
    pools.destroy(config.placement.pool, "trinity")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
