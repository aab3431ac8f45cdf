"""A training run of the preset `tiny` on made-up text, short enough for a check."""

from pathlib import Path
from typing import Any

from trinity.config import Config
from trinity.data.prepare import prepare
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.state.versioned_store import Store
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer

WINDOW = 64  # of tiny's layers with a sliding window


def trainer_in(folder: Path, device: str, dtype: str = "float32", steps: int = 3, **placement: Any) -> Trainer:
    """Ready to step, everything on `device`; the backbone's versions are kept in a folder."""
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for n in range(12):
        (texts / f"{n}.txt").write_text(" ".join(f"word{(n * i) % 37} is {i * n}" for i in range(300)))
    out = folder / f"run-{device}-{dtype}"
    config = Config.from_tree(
        {
            "model": {"preset": "tiny", "vocab_size": 320, "dtype": dtype},
            "data": {"train": [str(texts)], "val_fraction": 0.2},
            "train": dict(steps=steps, seq_len=2 * WINDOW, global_batch_size=4, micro_batch_size=2, out_dir=str(out)),
            "optim": {"warmup_steps": 2},
        }
    )
    pool = local_pool(config.model, Load(), num_shards=2, optim=config.optim, device=device, **placement)
    data = prepare(config.data, config.train, config.model, config.train.out_dir)
    trainer = Trainer(
        config, pool, data, Alone(), device=device, store=Store(folder / f"store-{device}-{dtype}", device)
    )
    trainer.start()
    return trainer
