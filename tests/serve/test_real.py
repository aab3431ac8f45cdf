"""Nothing faked: a checkpoint, its experts in shard actors, an engine under Ray Serve, plain clients, transformers' answers."""

import asyncio
import os
import random
import signal
import uuid
from types import SimpleNamespace

import grpc
import httpx
import openai
import pytest
import torch

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc
from tests.unit.adapter_folders import write_adapter
from trinity.checkpoint import CheckpointWriter, open_checkpoint, write_tensors
from trinity.config import Config, preset
from trinity.experts.stacked import named_matrices
from trinity.models.afmoe.model import Afmoe
from trinity.models.rules.init import named_generator
from trinity.pool.local import local_pool
from trinity.rpc.messages import WEIGHT, Load
from trinity.text.tokenizer import Tokenizer

MODEL = preset("tiny").model_copy(
    update=dict(
        vocab_size=400, hidden_size=48, intermediate_size=64, moe_intermediate_size=32, head_dim=16, num_experts=4
    )
    | dict(sliding_window=8, eos_token_id=3)
)
PROMPTS = [f"word {n} and then some more of it {n * n}" for n in range(16)]
NUM_TOKENS = 24


def write_checkpoint(folder, config=MODEL):
    """Random weights large enough that greedy text is no repetition of one token."""
    pool = local_pool(config, Load(), backend="torch")
    model = Afmoe(config, pool.dispatcher())
    shard = pool.transport.shards["shard-0"]
    tensors = {**model.tensors(), **dict(named_matrices(shard.store.current, config, shard.experts, (WEIGHT,)))}
    with torch.no_grad():
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=named_generator(0, name))
            tensors[name] = 1 + 0.1 * noise if "norm" in name else 0.1 * noise
    tokenizer = Tokenizer.train(iter([" ".join(PROMPTS) * 5]), config.vocab_size)
    writer = CheckpointWriter(folder, 9)
    return writer.finish(write_tensors(writer.folder, "model", tensors.items()), config, tokenizer, None)


def wanted(checkpoint):
    """Greedy continuations by transformers, as token ids without the end."""
    from transformers import AfmoeForCausalLM

    theirs = AfmoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = open_checkpoint(checkpoint).tokenizer
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt, add_special=True)])
        out = theirs.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=12)[
            0, ids.shape[1] :
        ].tolist()
        texts.append(tokenizer.decode([t for t in out if t != 3], skip_special=True))
    return texts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def want(checkpoint):
    return wanted(checkpoint)


@pytest.fixture(scope="module")
def served(ray_session, checkpoint, want):
    from serving import app
    from serving.launch import provide_pool

    config = Config.from_tree(
        {
            "model": MODEL.model_dump(),
            "placement": {"pool": f"s-{uuid.uuid4().hex[:8]}", "num_shards": 2, "call_timeout_s": 60},
            "serve": {"http_port": 0, "grpc_port": 0},
            "engine": {"max_model_len": 128, "max_num_batched_tokens": 32, "kv_cache_bytes": 4 << 20},
        }
    )
    provide_pool(config, str(checkpoint))
    server = app.start(config, str(checkpoint))
    yield SimpleNamespace(server=server, config=config, checkpoint=checkpoint, want=want, ray=ray_session)
    server.stop()
    from actors import pool as pools

    pools.destroy(config.placement.pool, config.cluster.namespace)


def ask_grpc(address, prompt):
    with grpc.insecure_channel(address) as channel:
        sampling = pb.SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
        stream = inference_pb2_grpc.InferenceStub(channel).Generate(
            pb.GenerateRequest(text=prompt, sampling=sampling), timeout=60
        )
        responses = list(stream)
    assert responses[-1].WhichOneof("event") == "final"
    assert {r.delta.version for r in responses[:-1]} == {9}
    return "".join(r.delta.text for r in responses)


async def ask_http_all(url, prompts):
    """Each at a random time within a second."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        model = (await client.models.list()).data[0].id

        async def one(prompt, delay_s):
            await asyncio.sleep(delay_s)
            stream = await client.completions.create(
                model=model, prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

        rng = random.Random(len(prompts))
        return await asyncio.gather(*(one(prompt, rng.random()) for prompt in prompts))


def test_offline_gives_the_same(checkpoint, want):
    from trinity import LLM
    from trinity.engine.request import SamplingParams

    completions = LLM(checkpoint).generate(PROMPTS, SamplingParams(max_tokens=NUM_TOKENS, temperature=0))
    assert [c.text for c in completions] == want


def test_http_clients_at_random_times_get_what_transformers_says(served):
    assert asyncio.run(ask_http_all(served.server.http_url, PROMPTS)) == served.want
    assert len(set(served.want)) == len(PROMPTS)


def test_a_grpc_client_gets_the_same(served):
    assert [ask_grpc(served.server.grpc_address, prompt) for prompt in PROMPTS[:3]] == served.want[:3]


def test_adapters_are_served_beside_the_base(served, tmp_path):
    """Loaded while requests run; each says what its merged checkpoint does, in company with the others, and after a shard has
    started again, which is told of them by who asks."""
    from actors import pool as pools
    from trinity import LLM
    from trinity.engine.request import SamplingParams

    url, paths = served.server.http_url, {}
    for seed, name in enumerate(("poet", "clerk")):
        paths[name] = str(write_adapter(tmp_path / name, served.checkpoint, seed))
        loaded = httpx.post(
            f"{url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": paths[name]}, timeout=60
        )
        assert loaded.status_code == 200, loaded.text
    bad = httpx.post(
        f"{url}/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": str(served.checkpoint)}, timeout=60
    )
    assert (bad.status_code, "adapter_config.json is missing" in bad.text) == (400, True)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
    texts = {name: [c.text for c in LLM(path).generate(PROMPTS[:4], params)] for name, path in paths.items()}
    mixed = [(name, at) for at in range(4) for name in ("", "poet", "clerk")]
    want = [served.want[at] if not name else texts[name][at] for name, at in mixed]
    asked = [(name and f":{name}", PROMPTS[at]) for name, at in mixed]
    assert asyncio.run(ask_models(url, asked)) == want
    pool = pools.connect(served.config.placement, served.config.cluster.namespace)
    os.kill(served.ray.get(pool.shards["shard-0"].where.remote())[1], signal.SIGKILL)
    assert asyncio.run(ask_models(url, asked)) == want
    assert len({*texts["poet"], *texts["clerk"], *served.want[:4]}) == 12


async def ask_models(url, asked):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        base = (await client.models.list()).data[0].id

        async def one(name, prompt):
            answer = await client.completions.create(
                model=base + name, prompt=prompt, max_tokens=NUM_TOKENS, temperature=0
            )
            assert answer.model == base + name
            return answer.choices[0].text

        return await asyncio.gather(*(one(*each) for each in asked))


def test_a_killed_shard_delays_answers_and_changes_none(served):
    from actors import pool as pools

    pool = pools.connect(served.config.placement, served.config.cluster.namespace)
    _, pid = served.ray.get(pool.shards["shard-1"].where.remote())
    os.kill(pid, signal.SIGKILL)
    assert asyncio.run(ask_http_all(served.server.http_url, PROMPTS)) == served.want
    assert httpx.get(f"{served.server.http_url}/health").status_code == 200
    assert set(pool.versions().values()) == {9}
