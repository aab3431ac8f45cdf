"""Train a small model in this process: no Ray, the experts in two local shards. Takes seconds.

    .venv/bin/python examples/train_in_one_process.py docs --steps 20 --out runs/example

The trainer and the shards are those of `trinity train`. Only the pool is another one: `local_pool` keeps the shards here,
where `actors.pool.create` makes Ray actors of them.
"""

import argparse
from pathlib import Path

from trinity.config import Config
from trinity.data.prepare import prepare
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer

SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 16}


def settings(texts: list[str], steps: int, out: str) -> Config:
    """What a YAML file for `trinity train` would say."""
    return Config.from_tree(
        {
            "model": {"preset": "tiny", **SMALL},
            "data": {"train": texts},
            "train": {"steps": steps, "seq_len": 64, "global_batch_size": 8, "micro_batch_size": 4, "out_dir": out},
            "optim": {"warmup_steps": 2},
        }
    )


def train(config: Config, num_shards: int = 2) -> tuple[list[float], Path]:
    """-> the loss of each step, and the checkpoint's folder."""
    pool = local_pool(config.model, Load(seed=config.train.seed), num_shards=num_shards, optim=config.optim)
    data = prepare(config.data, config.train, config.model, config.train.out_dir)
    trainer = Trainer(config, pool, data, Alone())
    trainer.start()
    losses = []
    for step in range(1, config.train.steps + 1):
        losses.append(trainer.step().loss)
        print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
    return losses, trainer.save()


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="files, folders or globs of text")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/example")
    given = parser.parse_args(arguments)
    _, checkpoint = train(settings(given.texts, given.steps, given.out))
    print(f"checkpoint {checkpoint}")
    return checkpoint


if __name__ == "__main__":
    main()
