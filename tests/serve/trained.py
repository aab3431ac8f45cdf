"""Tiny models that learn a few texts by heart, and a server of one."""

import json
from contextlib import asynccontextmanager

from serving.engine import LocalClient
from serving.frontend import Frontend
from serving.gateway import Gateway
from trinity import LLM
from trinity.config import Config, EngineConfig, ServeConfig
from trinity.data.prepare import prepare
from trinity.engine.async_engine import AsyncEngine
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer

MODEL = {"preset": "tiny", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32}
MODEL |= {"head_dim": 16, "num_experts": 4, "eos_token_id": 3, "bos_token_id": 0}


def trained(folder, texts, steps=80, seq_len=160):
    """-> an LLM of a model that was trained on these texts, each many times, by an ordinary run. Data put bos before each."""
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts] * 16))
    train = {"steps": steps, "seq_len": seq_len, "global_batch_size": 8, "micro_batch_size": 8, "eval_sequences": 0}
    tree = {
        "model": MODEL,
        "data": {"train": [str(folder / "texts.jsonl")], "val_fraction": 0.0},
        "train": {**train, "out_dir": str(folder / "run")},
        "optim": {"warmup_steps": 10, "adamw_lr": 5e-3},
    }
    config = Config.from_tree(tree)
    pool = local_pool(config.model, Load(), optim=config.optim, backend="torch")
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, config.train.out_dir), Alone())
    trainer.start()
    for _ in range(steps):
        trainer.step()
    settings = EngineConfig(max_model_len=1024, kv_cache_bytes=16 << 20)
    return LLM(trainer.save(), engine=settings, backend="torch", device="cpu")


@asynccontextmanager
async def serving(llm, name="tiny"):
    """-> the address of a server of it."""
    engine = AsyncEngine(llm.engine)
    client = LocalClient(engine, llm.tokenizer, name)
    gateway = Gateway(Frontend(client, llm.tokenizer, await client.info(), ServeConfig(http_port=0, grpc_port=0)))
    await gateway.start()
    try:
        yield gateway.addresses[0]
    finally:
        await gateway.stop()
        engine.close()
