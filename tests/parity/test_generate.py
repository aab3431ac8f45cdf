"""The engine against transformers' greedy `generate`, token by token: alone, in company, in pieces, under pressure.

The weights are random and all non-zero (tests/parity/test_model.py), CPU fp32, and the windows shorter than the texts.
"""

import itertools
import random
from functools import cache

import pytest
import torch

from tests.parity.test_model import twin
from trinity.config import EngineConfig, ModelConfig
from trinity.engine.engine import Engine
from trinity.engine.request import SamplingParams
from trinity.engine.weights import FixedWeights
from trinity.errors import StepConflict
from trinity.models.afmoe.config import AfmoeConfig
from trinity.text.tokenizer import Tokenizer

NUM_NEW = 16
WINDOW = 8
SHORT = [[20 + (i * 7 + j) % 270 for j in range(i + 1)] for i in range(8)]


def config_of(seed: int) -> ModelConfig:
    return AfmoeConfig(
        vocab_size=299,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=5,
        num_dense_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=16,
        num_experts_per_tok=2,
        num_shared_experts=1,
        route_scale=2.448,
        sliding_window=WINDOW,
        global_attn_every_n_layers=4 if seed % 2 else 2,
        max_position_embeddings=128,
        mup_enabled=bool(seed % 2),
        dtype="float32",
    )


@cache
def models(seed: int):
    return twin(config_of(seed), seed)[:2]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["def f(x): return x + 1\n" * 20]), 299)


def prompts(seed: int, num: int) -> list[list[int]]:
    """Lengths from 1 to far beyond the window."""
    rng = random.Random(seed)
    lengths = [1, WINDOW - 1, WINDOW, WINDOW + 1, 60] + [rng.randint(1, 60) for _ in range(num)]
    return [[rng.randrange(20, 299) for _ in range(length)] for length in lengths[:num]]


@cache
def expected(seed: int, num: int) -> list[tuple[int, ...]]:
    return [theirs(seed, prompt, NUM_NEW) for prompt in prompts(seed, num)]


def theirs(seed: int, prompt: list[int], num_new: int, eos: int | list[int] | None = None) -> tuple[int, ...]:
    hf = models(seed)[0]
    ids = torch.tensor([prompt])
    full = hf.generate(ids, do_sample=False, max_new_tokens=num_new, eos_token_id=eos, pad_token_id=12)
    return tuple(full[0, len(prompt) :].tolist())


def engine_of(seed: int, **settings) -> Engine:
    ours = models(seed)[1]
    base = {"block_size": 4, "kv_cache_bytes": 4 << 20, "max_num_seqs": 16, "max_model_len": 96}
    return Engine(FixedWeights(ours, 0), ours.config, EngineConfig(**base | settings), tokenizer())


def drive(
    engine: Engine, requests: list[list[int]], arrivals: list[int], num_new: int = NUM_NEW
) -> list[tuple[int, ...]]:
    """Tokens of each request when request i is added before step arrivals[i]; checks the engine after every step."""
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
    got: dict[str, tuple[int, ...]] = {str(i): () for i in range(len(requests))}
    finished, step = set(), 0
    while len(finished) < len(requests):
        for i, arrival in enumerate(arrivals):
            if arrival == step:
                engine.add(str(i), requests[i], params)
        for delta in engine.step():
            assert delta.request_id not in finished
            got[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                assert delta.finish_reason == "length"
                finished.add(delta.request_id)
        engine.check()
        step += 1
        assert step < 5000
    return [got[str(i)] for i in range(len(requests))]


each_seed = pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.chaos)])


@each_seed
def test_alone(seed):
    requests = prompts(seed, 16)[:6]
    got = [drive(engine_of(seed), [request], [0])[0] for request in requests]
    assert got == expected(seed, 16)[:6]


@each_seed
@pytest.mark.parametrize(("budget", "block_size"), [(5, 4), (17, 1), (17, 16), (1024, 4)])
def test_sixteen_at_random_times(seed, budget, block_size):
    """A budget of 5 tokens runs at most 5 sequences and cuts every longer prompt; 1024 prefills them whole."""
    requests, rng = prompts(seed, 16), random.Random(budget)
    engine = engine_of(seed, max_num_batched_tokens=budget, block_size=block_size)
    assert drive(engine, requests, [rng.randrange(60) for _ in requests]) == expected(seed, 16)
    assert engine.stats().num_free_blocks == engine.stats().num_total_blocks


@pytest.mark.parametrize(("parts", "least"), [(2, 1), (3, 4), (16, 1)])
def test_parts_side_by_side_change_nothing(parts, least):
    requests, rng = prompts(0, 16), random.Random(parts)
    engine = engine_of(0, max_num_batched_tokens=64, num_overlapped_microbatches=parts, min_part_tokens=least)
    assert drive(engine, requests, [rng.randrange(60) for _ in requests]) == expected(0, 16)


@each_seed
@pytest.mark.parametrize("budget", [9, 64])
def test_preemption_changes_nothing(seed, budget):
    """Short prompts with long answers, all admitted, and memory for two whole ones: most are thrown out on the way."""
    engine = engine_of(seed, max_num_batched_tokens=budget, max_model_len=50, kv_cache_bytes=40_000)
    assert drive(engine, SHORT, [0] * len(SHORT), 40) == expected_of_short(seed)
    assert engine.stats().num_preemptions >= 5
    assert engine.stats().num_free_blocks == engine.stats().num_total_blocks


@cache
def expected_of_short(seed: int) -> list[tuple[int, ...]]:
    return [theirs(seed, prompt, 40) for prompt in SHORT]


@each_seed
def test_passes_that_shards_of_another_version_refuse_change_nothing(seed):
    """They fail in their last layer: by then a chunk has gone round the rings of the layers before."""
    requests, engine = prompts(seed, 16), engine_of(seed, max_num_batched_tokens=40)
    forward, calls = engine._runner.forward, itertools.count()

    def failing(model, batch):
        out = forward(model, batch)
        if next(calls) in (1, 4, 8, 13, 20):
            raise StepConflict("shard-0 holds another version")
        return out

    engine._runner.forward = failing
    assert drive(engine, requests, [0] * len(requests)) == expected(seed, 16)
    assert engine.stats().num_repeats > 20


@pytest.mark.parametrize("others", [(), (7, 11)], ids=["one", "several"])
def test_eos_ends_a_request_as_in_transformers(others):
    """Whichever of several comes first, as GLM-4.5 and Qwen3 have them."""
    ours = models(1)[1]
    prompt = prompts(1, 16)[8]
    plain = expected(1, 16)[8]
    eos = next(t for i, t in enumerate(plain) if i >= 3 and t not in plain[:i])
    ids = (*others, eos) if others else eos
    wanted = theirs(1, prompt, NUM_NEW, list(ids) if others else eos)
    config = ours.config.model_copy(update={"eos_token_id": ids})
    settings = EngineConfig(kv_cache_bytes=4 << 20, max_model_len=96)
    engine = Engine(FixedWeights(ours, 0), config, settings, tokenizer())
    engine.add("a", prompt, SamplingParams(temperature=0, max_tokens=NUM_NEW))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert tuple(t for d in deltas for t in d.token_ids) == wanted
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)
    assert len(deltas) < NUM_NEW


def test_logprobs_are_those_of_the_raw_distribution():
    """Asked for at a temperature, with penalties and filters: still log_softmax of transformers' logits."""
    hf, _ = models(0)
    prompt, engine = prompts(0, 16)[4], engine_of(0)
    params = SamplingParams(
        temperature=0.7, seed=3, top_k=20, repetition_penalty=1.3, frequency_penalty=1.0, logprobs=5, max_tokens=12
    )
    engine.add("a", prompt, params)
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    ids = prompt + [t for d in deltas for t in d.token_ids]
    with torch.no_grad():
        logprobs_SV = hf(torch.tensor([ids])).logits[0].log_softmax(-1)
    entries = [lp for d in deltas for lp in d.logprobs]
    assert len(entries) == 12
    for at, entry in enumerate(entries, start=len(prompt) - 1):
        assert entry.logprob == pytest.approx(logprobs_SV[at, entry.token_id].item(), abs=1e-4)
        best = logprobs_SV[at].topk(5)
        assert [i for i, _ in entry.top] == best.indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
