"""A small model with attention of both kinds, at several versions, in engines with exact arithmetic; and what each request is
to get, bit for bit: what an engine without a cache computes for it alone, in one chunk.
"""

from collections import Counter
from functools import lru_cache

import torch
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


def engine_of(source, tier=None, **fields):
    base = {"max_model_len": MOST, "kv_cache_bytes": 1 << 20, "max_num_seqs": 8, "block_size": 4}
    return Engine(source, CONFIG, EngineConfig(**{"max_draft_tokens": 0} | base | fields), FakeTokenizer(), tier=tier)


@lru_cache(maxsize=4096)
def alone(version, prompt, dumped, dtype="auto"):
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


def check(prompt, own, deltas, dtype="auto"):
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
