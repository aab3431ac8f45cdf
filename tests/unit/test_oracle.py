"""The oracle: whatever an engine does to be quick, urgent or still there, an answer is the monolith's, bit for bit.

A trace is drawn: requests of all kinds, of adapters too, n of each, that begin alike; aborts; new weights, weights that are
gone, and a run that goes back and comes to the same steps with others; experts that move or are copied; engines that are lost
in the middle of answers; prompts that one engine computes for another, and roles that change. So are the engines: prefix cache,
a tier that they share, drafts, chunks, blocks, memory too short for all. Every answer (tokens, text, log-probabilities,
experts) is what one engine alone says to that request at its version, without cache and drafts, with all experts in one place;
where live requests may use what older weights have computed, that much of it which says that they did not. In the end nothing
holds a block, a row or a version, and shared memory is gone.

`TRINITY_ORACLE=20000 pytest tests/unit/test_oracle.py` draws so many traces, other ones each time.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.unit.oracle_weights import CONFIG, NUM_ADAPTERS, NUM_SHARDS, settle, weights
from tests.unit.oracle_world import LONGEST, Fleet, World, adapters, engine_of, run_all
from tests.unit.test_begun import ASKED
from trinity.config import Client, EngineConfig
from trinity.engine.kv_layout import BlockSizes
from trinity.engine.request import SamplingParams
from trinity.engine.weights import FixedWeights

LONG = int(os.environ.get("TRINITY_ORACLE", "0"))
pytestmark = [pytest.mark.timeout(0)] if LONG else []
base = tuple(range(3, 36))
prompts = st.one_of(
    st.builds(
        lambda n, tail: (*base[:n], *tail), st.integers(0, 33), st.lists(st.integers(0, 2), min_size=1, max_size=3)
    ),
    st.sampled_from([(5, 9, 7) * 3, (5, 9, 7) * 9 + (5,), (1,), (4, 4, 4, 4)]),
)
clients = st.sampled_from([Client("ann"), Client("bob", 2.0)])
EXTRA = {
    "a thought": {"seed": 13, "bad_words": ["F"], "min_p": 0.1},
    "nothing": {"max_tokens": 0, "prompt_logprobs": 1},
}


@st.composite
def params(draw):
    asked = (ASKED | EXTRA)[draw(st.sampled_from(sorted(ASKED | EXTRA)))]
    own = {
        "seed": draw(st.integers(0, 1)),
        "max_tokens": draw(st.sampled_from([1, 4, 12, 18])),
        "logprobs": draw(st.sampled_from([None, 2])),
        "version_policy": draw(st.sampled_from(["live", "pinned"])),
        "priority": draw(st.sampled_from([0, 0, 3, -1])),
        "trace": draw(st.sampled_from([False, False, True])),
        "ignore_eos": draw(st.booleans()),
        "cache_salt": draw(st.sampled_from([None, None, None, "salt"])),
    }
    own["min_tokens"] = min(asked.get("min_tokens", 0), asked.get("max_tokens", own["max_tokens"]))
    return SamplingParams(**own | {name: value for name, value in asked.items() if name != "min_tokens"})


experts = st.tuples(st.sampled_from(CONFIG.moe_layers), st.integers(0, CONFIG.num_experts - 1))
of_adapters = st.sampled_from([None] * 5 + list(range(NUM_ADAPTERS)))
ways = st.tuples(st.booleans(), st.sampled_from([0, 0, 1, 3]))  # long enough to be handed over, and how long that takes
adds = st.tuples(st.just("ask"), st.integers(0, 1), prompts, params(), st.integers(1, 3), clients, of_adapters, ways)
roles = st.sampled_from([("both",), ("prefill", "decode"), ("decode", "prefill"), ("prefill", "both")])
few = st.integers(0, 2)
steps = st.tuples(st.just("step"), st.integers(1, 4))
actions = st.one_of(
    adds,
    adds,
    steps,
    steps,
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("commit")),
    st.one_of(st.tuples(st.sampled_from(["commit", "lose"])), st.tuples(st.just("go_back"), few, few)),
    st.tuples(st.just("set_roles"), roles),
    st.tuples(st.just("move"), experts, st.integers(0, NUM_SHARDS - 1), st.booleans()),
    st.tuples(st.just("drop"), st.integers(0, 1)),
)


@st.composite
def engines(draw, size, same):
    """Settings of an engine, and whether its drafts are told what comes."""
    drafts = draw(st.sampled_from([0, 1, 3, 8]))
    sizes = sizes_of(block_size=size, max_draft_tokens=drafts, **same)
    room = draw(st.sampled_from([0, 0, 1, 4]))
    seqs = draw(st.integers(1, 5))
    return {
        "block_size": size,
        "max_draft_tokens": drafts,
        "prefix_cache": draw(st.sampled_from([True, True, False])),
        "max_num_batched_tokens": draw(st.sampled_from([2, 11, 64])),
        "max_num_seqs": seqs,
        "max_num_kept": draw(st.sampled_from([0, seqs])),
        "max_num_waiting": draw(st.sampled_from([2, 50, 50])),
        "num_overlapped_microbatches": draw(st.sampled_from([1, 2])),
        "min_part_tokens": 2,
        "kv_cache_bytes": int(sizes.bytes_per_seq(LONGEST) * (1 + room / 2)),
    }, draw(st.booleans())


@st.composite
def fleets(draw):
    """A tier has room for nothing, for little or for much."""
    size, same = (
        draw(st.sampled_from([1, 3, 4, 16])),
        {"kv_cache_dtype": draw(st.sampled_from(["auto", "auto", "int8"]))},
    )
    block = sum(sizes_of(block_size=size, **same).block_bytes.values())
    own = draw(st.lists(engines(size, same), min_size=1, max_size=2))
    tier_bytes = draw(st.sampled_from([0, 16384 + 12 * block, 1 << 20]))
    return Fleet(own, same, tier_bytes, draw(st.sampled_from([0, 0, 0, 1, 2, "unbounded"])), draw(roles))


def sizes_of(**settings):
    return BlockSizes.of(CONFIG, EngineConfig(**settings), 4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two wait long for each other on a busy machine; bits are the same with any number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    adapters().close()
    adapters.cache_clear()


@settings(
    max_examples=LONG or 20,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    derandomize=not LONG,
    suppress_health_check=list(HealthCheck) if LONG else (),
)
@given(st.lists(actions, min_size=4, max_size=14), fleets())
def test_every_answer_is_the_monoliths(trace, fleet):
    settle()
    world = World(fleet)
    for name, *rest in trace:
        if name == "ask":
            at, prompt, own, num, client, adapter, way = rest
            for sample in range(num):
                world.ask(at, prompt, own.model_copy(update={"seed": own.seed + sample}), client, adapter, *way)
        elif name == "step":
            for _ in range(rest[0]):
                world.step()
        elif name == "abort":
            world.abort(str(rest[0]))
        else:
            getattr(world, name)(*rest)
    world.finish()
    for name in world.asked:
        world.compare(name)


def test_a_pinned_answer_ends_where_its_step_comes_again_with_other_weights():
    """It went on with them, under the same number."""
    settle()
    settings = {"block_size": 4, "max_num_seqs": 2}
    world = World(Fleet([(settings, False)] * 2, {}, 0, 0, ("both",)))
    world.commit()
    world.ask(0, base, SamplingParams(seed=1, max_tokens=18, ignore_eos=True, version_policy="pinned"))
    while sum(len(delta.token_ids) for delta, _ in world.asked["0"].said) < 3:
        world.step()
    world.go_back(1, 1)
    world.ask(1, base, SamplingParams(seed=1, max_tokens=18, ignore_eos=True, version_policy="pinned"))
    world.finish()
    for name, num in (("0", 3), ("1", 18)):
        world.compare(name)
        assert sum(len(delta.token_ids) for delta, _ in world.asked[name].said) == num
    (old, _), (new, _) = (world.asked[name].said[0] for name in "01")
    assert old.version == new.version == 2
    assert old.weights < new.weights


def test_a_traced_prompt_of_one_token_has_nothing_to_tell_of_experts():
    """It ended the engine."""
    engine = engine_of(FixedWeights(weights(0, 1).model, 0))
    engine.add("one", (1,), SamplingParams(max_tokens=0, trace=True))
    [delta] = run_all(engine)["one"]
    assert delta.experts_TLK.shape == (0, len(CONFIG.moe_layers), CONFIG.num_experts_per_tok)
