"""The prefix cache under exact arithmetic: answers, log-probabilities and versions are, bit for bit, those without it.

A small model with attention of both kinds, at several versions; every answer is compared with what an engine without a cache
computes for that request alone, in one chunk.
"""

from collections import Counter
from functools import lru_cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import FakeTokenizer, Nobody, run_all
from trinity.config import EngineConfig, preset
from trinity.engine.engine import Engine
from trinity.engine.request import SamplingParams
from trinity.engine.weights import FixedWeights
from trinity.models.afmoe.model import Afmoe

VOCAB, MOST = 40, 60
TINY = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "sliding_window": 9}
CONFIG = type(preset("tiny")).model_validate({**preset("tiny").model_dump(), **TINY, "num_dense_layers": 4})


@lru_cache
def model_of(version):
    torch.manual_seed(version)
    model = Afmoe(CONFIG, Nobody()).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return model


class Run:
    """Weights of a run that goes on."""

    def __init__(self):
        self.version, self.held = 1, Counter()

    def newest(self):
        return self.version

    def model(self, version):
        assert version == self.version or self.held[version], "an old version is used and not held"
        return model_of(version)

    def hold(self, version):
        self.held[version] += 1

    def release(self, version):
        self.held[version] -= 1
        assert self.held[version] >= 0


def engine_of(source, **fields):
    base = {"max_model_len": MOST, "kv_cache_bytes": 1 << 20, "max_num_seqs": 8, "block_size": 4}
    return Engine(source, CONFIG, EngineConfig(**base | fields), FakeTokenizer())


@lru_cache(maxsize=4096)
def alone(version, prompt, dumped, dtype):
    """(token ids, log-probabilities) of the request by itself."""
    engine = engine_of(FixedWeights(model_of(version), version), prefix_cache=False, kv_cache_dtype=dtype)
    engine.add("one", prompt, SamplingParams.model_validate_json(dumped))
    return answer(run_all(engine)["one"])


def answer(deltas):
    tokens = tuple(token for delta in deltas for token in delta.token_ids)
    return tokens, tuple(each for delta in deltas for each in delta.logprobs or ())


base = tuple(range(3, 36))
prompts = st.builds(
    lambda n, tail: (*base[:n], *tail), st.integers(0, 33), st.lists(st.integers(0, 39), min_size=1, max_size=4)
)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 1),
    max_tokens=st.integers(1, 10),
    logprobs=st.just(2),
    ignore_eos=st.just(True),
    version_policy=st.sampled_from(["live", "pinned"]),
)
actions = st.one_of(
    st.tuples(st.just("add"), prompts, params, st.integers(1, 3)),
    st.tuples(st.just("add"), prompts, params, st.integers(1, 3)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("commit")),
)


@settings(max_examples=10, deadline=None)
@given(
    trace=st.lists(actions, min_size=3, max_size=12),
    is_on=st.sampled_from([True, True, False]),
    budget=st.sampled_from([3, 11, 40]),
    blocks=st.integers(0, 20),
    seqs=st.integers(2, 6),
    dtype=st.sampled_from(["auto", "int8"]),
)
def test_any_trace(trace, is_on, budget, blocks, seqs, dtype):
    """Requests that begin alike, n of each, aborts, short memory, versions: live ones at `kv_max_age` 0, and pinned ones."""
    source = Run()
    per_block = 2 * 2 * (8 * 4 if dtype == "auto" else 8 + 4) * 4  # keys and values, heads, dim and bytes, tokens
    memory = per_block * (3 * 4 + 15 + blocks * 4)
    room = {"max_num_seqs": seqs, "kv_cache_bytes": memory, "max_num_kept": seqs, "kv_cache_dtype": dtype}
    engine = engine_of(source, prefix_cache=is_on, max_num_batched_tokens=budget, **room)
    assert engine._runner._is_exact
    asked, got = {}, {}

    def step():
        for delta in engine.step():
            got[delta.request_id].append(delta)
        engine.check()

    for name, *rest in trace:
        if name == "add":
            prompt, own, n = rest
            for sample in range(n):
                request = str(len(asked))
                asked[request], got[request] = (prompt, own.model_copy(update={"seed": own.seed + sample})), []
                engine.add(request, *asked[request])
        elif name == "abort":
            engine.abort(str(rest[0]))
        elif name == "commit":
            source.version += 1
        else:
            for _ in range(rest[0]):
                step()
    while engine.has_work:
        step()
    stats = engine.stats()
    assert (stats.num_free_blocks, stats.num_versions_held) == (stats.num_total_blocks, 0)
    for request, (prompt, own) in asked.items():
        check(prompt, own, got[request], dtype)


def check(prompt, own, deltas, dtype):
    """A pinned answer is one of its version; a live one is, token by token, what that version gives for the text so far."""
    if not deltas:
        return
    versions = [delta.version for delta in deltas]
    assert deltas[-1].first_version == versions[0]
    if len(set(versions)) == 1:
        tokens, logprobs = alone(versions[0], prompt, own.model_dump_json(), dtype)
        assert answer(deltas) == (tokens[: len(deltas)], logprobs[: len(deltas)])
        return
    assert own.version_policy == "live"
    ids = prompt
    for delta in deltas:
        greedy = own.model_copy(update={"temperature": 0.0, "max_tokens": 1})
        [expected] = alone(delta.version, ids, greedy.model_dump_json(), dtype)[1]
        [found] = delta.logprobs
        assert found.top == expected.top
        assert own.temperature or found == expected
        ids = (*ids, *delta.token_ids)
