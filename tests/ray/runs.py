"""Small training runs, and the same run undisturbed in this process: the oracle."""

import json
import uuid

from trinity.checkpoint import open_checkpoint
from trinity.config import Config
from trinity.data.prepare import prepare
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer

SMALL = dict(vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, head_dim=8, num_experts=4)


def any_name():
    return f"p-{uuid.uuid4().hex[:8]}"


def config_for(tmp_path, steps, num_shards=2, pool=None):
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text(" ".join(f"word{(n * i) % 37} is {i * n}" for i in range(300)))
    return Config.from_tree(
        {
            "model": {"preset": "tiny", **SMALL},
            "data": {"train": [str(tmp_path / "*.txt")], "val_fraction": 0.2},
            "train": dict(steps=steps, seq_len=32, global_batch_size=4, micro_batch_size=1, eval_every=0, eval_sequences=4)
            | {"num_threads_per_worker": 1, "out_dir": str(tmp_path / "ray")},
            "placement": {"pool": pool or any_name(), "num_shards": num_shards, "call_timeout_s": 60}
            | {"watch_every_s": 0.3, "balance_every_s": 0},  # moved experts add up in another order
            "optim": {"warmup_steps": 2},
        }
    )  # fmt: skip


def losses_of(out_dir):
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def decisions(out_dir):
    return list(losses_of(out_dir))


def train_here(config, out_dir):
    """The oracle: the same run in this process."""
    config = config.replace(train={"out_dir": str(out_dir), "num_workers": 1, "micro_batch_size": 1})
    num_shards = config.placement.num_shards
    pool = local_pool(config.model, Load(), num_shards=num_shards, optim=config.optim, backend="torch")
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, out_dir), Alone())
    trainer.start()
    losses = {step + 1: trainer.step().loss for step in range(config.train.steps)}
    return losses, open_checkpoint(trainer.save())


def weights_of(checkpoint):
    return {key: checkpoint.tensor(key) for key in checkpoint.weight_map}
