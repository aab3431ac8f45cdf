"""Long contexts through the engine: a small model with Nano's pattern of layers, three windows of 2,048 tokens to a layer that
sees all. 16K tokens in every run of the tests; 128K with `pytest -m perf -s tests/parity/test_long_context.py`.
"""

import random
import time
from pathlib import Path

import pytest
import torch

from tests.parity.test_invariance import tokenizer
from trinity import LLM
from trinity.config import EngineConfig, preset
from trinity.engine.engine import Engine
from trinity.engine.kv_layout import BlockSizes
from trinity.engine.request import SamplingParams
from trinity.engine.weights import FixedWeights
from trinity.models.afmoe.model import Afmoe
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.train.loss import token_logprobs

WINDOW, NUM_NEW = 2048, 4
SMALL = {"vocab_size": 307, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_experts": 4}
SMALL |= {"sliding_window": WINDOW, "max_position_embeddings": 1 << 20}


def model_of(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> Afmoe:
    """Weights are far from even, so that what a token sees matters."""
    shape = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
    }
    tiny = preset("tiny")
    config = type(tiny).model_validate({**tiny.model_dump(), **SMALL, **shape})
    assert [cache.window for cache in config.layer_caches] == [WINDOW, WINDOW, WINDOW, None]
    model, rng = Afmoe(config, local_pool(config, Load(seed=3)).dispatcher()).eval(), torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=rng)
        scale = (3 if "lm_head" in name else 1) * weight.shape[-1] ** -0.5
        weight.data.copy_(1 + 0.2 * noise if weight.ndim == 1 else noise * scale)
    return model


def served(model: Afmoe, prompt: list[int], **settings):
    """-> an LLM of this model, with room for the prompt and its greedy answer, and the answer."""
    weights, length = FixedWeights(model, 0), len(prompt) + NUM_NEW
    wanted = EngineConfig(max_model_len=length, max_num_seqs=1, max_num_kept=0, num_threads=2, **settings)
    llm = LLM.over(Engine(weights, model.config, wanted, tokenizer()), weights)
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True, logprobs=0)
    return llm, llm.generate([prompt], params)[0]


def ids_of(num: int) -> list[int]:
    rng = random.Random(1)
    return [rng.randrange(20, 300) for _ in range(num)]


def test_16k_tokens_served_are_16k_tokens_trained():
    """Chunk by chunk over a paged cache, and as one sequence: the same log-probabilities, bit for bit."""
    model, prompt = model_of(2, 1, 16, "float32"), ids_of(16 << 10)
    _, answer = served(model, prompt)
    with torch.no_grad():
        whole = token_logprobs(model, torch.tensor([[*prompt, *answer.token_ids]]))[0, len(prompt) - 1 :]
    assert [each.logprob for each in answer.logprobs] == whole.tolist()
    assert len(answer.token_ids) == NUM_NEW


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.perf
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_128k_tokens(dtype):
    """Time, and the cache's bytes beside what the shape says: a key and a value of each head, with their scales in 8 bits."""
    heads, dim, tokens = 2, 64, 128 << 10
    model, prompt = model_of(4, heads, dim, "bfloat16"), ids_of(tokens)
    served(model, prompt[:4096])  # what is compiled and allocated once
    before, wall_s, cpu_s = resident(), time.perf_counter(), time.process_time()
    llm, answer = served(model, prompt, kv_cache_dtype=dtype)
    wall_s, cpu_s, grown = time.perf_counter() - wall_s, time.process_time() - cpu_s, resident() - before
    num_bytes = BlockSizes.of(model.config, llm.engine.settings, 2).bytes_per_seq(tokens)
    derived = (tokens + 3 * WINDOW) * 2 * heads * (2 * dim if dtype == "auto" else dim + 4)
    print(
        f"\n{dtype}: {tokens} tokens in {cpu_s:.0f} s of a core ({wall_s:.0f} s), {tokens / cpu_s:,.0f} tokens/s of a core"
    )
    print(f"KV {num_bytes / 2**20:.1f} MiB, derived {derived / 2**20:.1f}; the process grew by {grown / 2**20:.0f} MiB")
    assert len(answer.token_ids) == NUM_NEW
    assert num_bytes == pytest.approx(derived, rel=0.01)
