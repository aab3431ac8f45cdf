"""Families other than AFMoE through everything: training in actors, deaths, moves, replicas, serving, live weights.

The same machinery as AFMoE's, of which other files test every corner: here one run of each kind must come out right.
"""

import asyncio
import os
import random
import signal
import threading
import uuid

import httpx
import pytest
import torch

from tests.ray.runs import train_here, weights_of
from trinity.checkpoint import CheckpointWriter, open_checkpoint, write_tensors
from trinity.config import Config
from trinity.data.prepare import prepare
from trinity.models.common.family import Nobody
from trinity.models.registry import build
from trinity.models.rules.init import named_generator
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.text.tokenizer import Tokenizer
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer

NUM_STEPS, NUM_TOKENS = 5, 16
FORMS = ("float32", "int8")  # of experts, by shard
SHAPE = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
    eos_token_id=3, bos_token_id=0, pad_token_id=12, dtype="float32",
)  # fmt: skip
MODELS = {
    "qwen3_moe": dict(**SHAPE, model_type="qwen3_moe", norm_topk_prob=True, mlp_only_layers=[1]),
    "glm4_moe": dict(
        **SHAPE, model_type="glm4_moe", num_dense_layers=1, num_shared_experts=1, route_scale=2.0, n_group=2,
        topk_group=1, use_qk_norm=True, attention_bias=True,
    ),
}  # fmt: skip
PROMPTS = [f"word {n} and then some more of it {n * n}" for n in range(16)]
FIRST, *OTHERS = (
    MODELS  # one by default; what differs between families is before the experts, and under tests of its own
)
each = pytest.mark.parametrize("family", [FIRST, *(pytest.param(name, marks=pytest.mark.chaos) for name in OTHERS)])


def config_of(family, tmp_path, **sections):
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text(" ".join(f"word{(n * i) % 37} is {i * n}" for i in range(300)))
    tree = {
        "model": MODELS[family],
        "data": {"train": [str(tmp_path / "*.txt")], "val_fraction": 0.2},
        "train": dict(
            steps=NUM_STEPS, seq_len=32, global_batch_size=4, micro_batch_size=1, eval_every=0, eval_sequences=4
        )
        | {"num_threads_per_worker": 1, "out_dir": str(tmp_path / "ray")},
        "placement": {"pool": f"f-{uuid.uuid4().hex[:8]}", "num_shards": 2, "call_timeout_s": 60}
        | {"watch_every_s": 0.3, "balance_every_s": 0},
        "optim": {"warmup_steps": 2},
        "serve": {"http_port": 0, "grpc_port": 0},
        "engine": {"max_model_len": 128, "max_num_batched_tokens": 32, "kv_cache_bytes": 4 << 20},
    }
    return Config.from_tree(tree).replace(**sections)


def kill(ray, pool, shard):
    os.kill(ray.get(pool.shards[shard].where.remote())[1], signal.SIGKILL)


@each
def test_training_in_actors_is_training_here_though_a_shard_dies(ray_session, family, tmp_path):
    """The two-phase step: same bits after a SIGKILL between two of them, whatever forms inference has beside the weights; and
    inference has a monolith's, on shards of either form."""
    from actors import pool as pools

    config = config_of(family, tmp_path, placement={"expert_dtype": FORMS})
    pool = pools.create(config.placement, "trinity", config.model, config.optim, str(tmp_path / "placement"))
    try:
        trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, config.train.out_dir), Alone())
        trainer.start()
        losses = []
        for step in range(NUM_STEPS):
            if step == 2:
                kill(ray_session, pool, "shard-1")
            losses.append(trainer.step().loss)
        saved = open_checkpoint(trainer.save())
        forms = {status.shard: status.expert_dtype for status in pool.status()}
        answers = routed(pool.dispatcher(NUM_STEPS), config.model)
    finally:
        pools.destroy(config.placement.pool, "trinity")
    want, reference = train_here(config, tmp_path / "here")
    assert losses == list(want.values())
    mine, theirs = weights_of(saved), weights_of(reference)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert forms == {"shard-0": "float32", "shard-1": "int8"}
    each_alone, load = (("float32",), ("int8",), FORMS), Load(str(saved.path), training=False)
    alone = [local_pool(config.model, load, num_shards=2, expert_dtype=dtypes) for dtypes in each_alone]
    plain, int8, both = (routed(each.dispatcher(NUM_STEPS), config.model) for each in alone)
    assert torch.equal(answers, both)
    assert not torch.equal(answers, plain)
    assert not torch.equal(answers, int8)


def routed(experts, model):
    """What the experts of all layers make of some rows, each of which goes to several."""
    rng = torch.Generator().manual_seed(3)
    x_TD, ids_TK = torch.randn(16, model.hidden_size, generator=rng), torch.arange(32).view(16, 2) % model.num_experts
    with torch.inference_mode():
        return torch.stack([experts(layer, x_TD, ids_TK, torch.full((16, 2), 0.5)) for layer in model.moe_layers])


def write_checkpoint(config, folder):
    """Random weights large enough that greedy text is no repetition of one token."""
    shapes = {key: tensor.shape for key, tensor in build(config.model, Nobody(), device="meta").tensors().items()}
    d, f = config.model.hidden_size, config.model.moe_intermediate_size
    for layer in config.model.moe_layers:
        for expert in range(config.model.num_experts):
            for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
                shapes[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = shape
    noise = {key: torch.randn(shape, generator=named_generator(0, key)) for key, shape in shapes.items()}
    tensors = {key: 1 + 0.1 * value if "norm" in key else 0.15 * value for key, value in noise.items()}
    tokenizer = Tokenizer.train(iter([" ".join(PROMPTS) * 5]), config.model.vocab_size)
    writer = CheckpointWriter(folder, 9)
    return writer.finish(write_tensors(writer.folder, "model", tensors.items()), config.model, tokenizer, None)


def wanted(checkpoint):
    """Greedy continuations by transformers, without the end."""
    from transformers import AutoModelForCausalLM

    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        open_checkpoint(checkpoint).tokenizer,
    )
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt, add_special=True)])
        out = theirs.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=12)[0, ids.shape[1] :]
        texts.append(tokenizer.decode([t for t in out.tolist() if t != 3], skip_special=True))
    return texts


async def ask_all(url, seed):
    """Each prompt at a random time within a second."""
    rng = random.Random(seed)

    async with httpx.AsyncClient(base_url=url, timeout=90) as http:

        async def one(prompt, delay_s):
            await asyncio.sleep(delay_s)
            body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
            return (await http.post("/v1/completions", json=body)).raise_for_status().json()["choices"][0]["text"]

        return await asyncio.gather(*(one(prompt, rng.random()) for prompt in PROMPTS))


@each
def test_served_text_is_transformers_while_experts_move_and_die(ray_session, family, tmp_path):
    """Alone; sixteen at random times; while the pool grows to three shards; and with one of the replicas killed."""
    from actors import pool as pools
    from actors.control.admin import operator
    from serving import app
    from serving.launch import provide_pool

    config = config_of(family, tmp_path, placement={"redundancy": 1})
    checkpoint = write_checkpoint(config, tmp_path / "model")
    want = wanted(checkpoint)
    assert len(set(want)) == len(PROMPTS)
    provide_pool(config, str(checkpoint))
    server = app.start(config, str(checkpoint))
    try:
        with httpx.Client(base_url=server.http_url, timeout=60) as http:
            body = {"prompt": PROMPTS[0], "max_tokens": NUM_TOKENS, "temperature": 0}
            assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == want[0]
        assert asyncio.run(ask_all(server.http_url, 1)) == want
        pool = pools.connect(config.placement, "trinity")
        epoch = pool.table.epoch
        operator(config.placement, "trinity").scale(3, "a test")
        assert asyncio.run(ask_all(server.http_url, 2)) == want
        kill(ray_session, pool, "shard-0")
        assert asyncio.run(ask_all(server.http_url, 3)) == want
        found = operator(config.placement, "trinity").wait(epoch, 30)
        assert found.table.epoch > epoch
    finally:
        server.stop()
        pools.destroy(config.placement.pool, "trinity")


@pytest.mark.chaos
@each
def test_live_weights_are_served_while_they_train(ray_session, family, tmp_path):
    """Answers come from versions that the trainer commits, and the run ends as it does without anybody asking."""
    from actors import pool as pools
    from trinity.launch import train

    config = config_of(family, tmp_path, train={"steps": 60}, serve={"weights": "live"})
    versions, done = [], threading.Event()

    def ask(http_url, grpc_address):
        with httpx.Client(base_url=http_url, timeout=60) as http:
            while not done.is_set():
                answer = http.post("/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0})
                if answer.status_code != 200:
                    return
                versions.append(answer.json()["choices"][0]["weights_versions"]["last"])

    try:
        result = train(config, ask)
    finally:
        done.set()
        pools.destroy(config.placement.pool, "trinity")
    assert result["version"] == 60
    assert versions == sorted(versions)
    assert len(set(versions)) > 1
    want, _ = train_here(config.replace(serve={"weights": "checkpoint"}), tmp_path / "here")
    assert abs(result["loss"] - want[60]) < 1e-5
