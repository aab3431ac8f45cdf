"""An answer that one engine has begun and another goes on with: the rest is as if the first had gone on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import VOCAB, FakeSource, fake_config, fake_engine, run_all
from trinity.engine.begun import Begun
from trinity.engine.request import SamplingParams
from trinity.errors import Code, InvalidRequest, Overloaded, Unavailable

PROMPT = (1, 2, 7)
ASKED = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 5, "top_p": 0.9, "top_k": 30, "min_p": 0.01},
    "penalties": {"seed": 6, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "bias": {"seed": 7, "logit_bias": {5: 3.0, 9: 2.0}, "allowed_token_ids": list(range(4, 20))},
    "rules": {"seed": 8, "min_tokens": 12, "bad_words": ["FG", "K"], "ignore_eos": False},
    "stop strings": {"seed": 9, "stop": ["NO", "HELLO", "QRST"], "logit_bias": dict.fromkeys((7, 4, 11, 13, 16), 6.0)},
    "a stop token": {"seed": 10, "stop_token_ids": [11], "include_stop_str_in_output": True},
    "log-probabilities": {"seed": 11, "logprobs": 3, "prompt_logprobs": 2, "trace": True},
    "a grammar": {"seed": 12, "structured_outputs": {"regex": "(ABC|BCE|CE){1,5}F?"}, "ignore_eos": False},
}


class Words:
    """Bad words of a tokenizer whose tokens are characters."""

    def encode_batch(self, texts, add_special=False):
        return [[ord(character) - 65 for character in text.strip()] for text in texts]


def engine(**more):
    made = fake_engine(**more)
    made.tokenizer.encode_batch = Words().encode_batch
    return made


def asked(name):
    return SamplingParams(**{"max_tokens": 20, "ignore_eos": True, **ASKED[name]})


def said(deltas):
    """All that its caller is told of a part of an answer."""
    return [
        (d.text, d.token_ids, d.finish_reason, d.stop_reason, d.num_prompt_tokens, d.num_generated_tokens)
        for d in deltas
    ]


def logprobs(deltas):
    return [[(one.token_id, one.logprob, one.drawn), *one.top] for d in deltas for one in d.logprobs or ()]


def close(found, wanted):
    """Batches of another size round differently."""
    return [[pytest.approx(numbers, abs=1e-4) for numbers in one] for one in wanted] == found


def whole(params, **more):
    made = engine(**more)
    made.add("a", PROMPT, params)
    return run_all(made)["a"]


def begun(deltas):
    ids = tuple(token for delta in deltas for token in delta.token_ids)
    return Begun(ids, deltas[-1].first_version, deltas[-1].version) if deltas else Begun()


@pytest.mark.parametrize("name", ASKED)
def test_wherever_it_is_cut_the_rest_is_the_same(name):
    """Beside others, in an engine that has done other things."""
    params = asked(name)
    undisturbed = whole(params)
    assert len(undisturbed) > 3
    second = engine(max_num_batched_tokens=8, max_num_seqs=4)
    for cut in {*range(0, len(undisturbed), 3), len(undisturbed) - 1}:
        second.add("other", (3, 4), SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
        second.add("a", PROMPT, params, begun=begun(undisturbed[:cut]))
        deltas = run_all(second)["a"]
        assert said(deltas) == said(undisturbed[cut:])
        assert close(logprobs(deltas), logprobs(undisturbed[cut:]))
        assert bool(deltas[0].prompt_logprobs) == bool(params.prompt_logprobs and not cut), "they are told once"
        second.check()


@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1 << 20), temperature=st.sampled_from([0.0, 0.7, 1.5]))
def test_it_may_be_lost_again_and_again(data, seed, temperature):
    params = SamplingParams(max_tokens=20, seed=seed, temperature=temperature, stop=["AB", "CAD", "XYZ"])
    undisturbed, had = whole(params), []
    while len(had) < len(undisturbed):
        made = engine(max_num_batched_tokens=data.draw(st.integers(2, 16)), max_num_seqs=2)
        made.add("a", PROMPT, params, begun=begun(had))
        had += run_all(made)["a"][: data.draw(st.integers(1, 8))]
    assert said(had) == said(undisturbed)


def test_it_runs_before_those_that_have_not_begun():
    made = engine(max_num_seqs=1)
    for name in "xy":
        made.add(name, PROMPT, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    made.add("a", PROMPT, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True), begun=Begun((5,)))
    order = []
    while made.has_work:
        order += [delta.request_id for delta in made.step()]
    assert list(dict.fromkeys(order)) == ["a", "x", "y"]


def test_a_pinned_one_goes_on_at_its_version_and_a_live_one_at_the_newest():
    """Versions 1 to 4 are there; the answers were begun with 2."""
    source = FakeSource(fake_config())
    for _ in range(3):
        source.commit()
    found = {}
    for policy in ("live", "pinned"):
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, version_policy=policy)
        made = engine(source=source)
        made.add(policy, PROMPT, params, begun=Begun((9, 8), 1, 2))
        found[policy] = run_all(made)[policy]
        made.check()
    assert {(d.first_version, d.version) for d in found["live"]} == {(1, 4)}
    assert {(d.first_version, d.version) for d in found["pinned"]} == {(1, 2)}
    assert source.held[2] == 0


def test_one_that_goes_on_over_older_keys_says_so():
    """It was begun by version 2 alone; the engine that goes on has its prompt of version 1, and may use that."""
    source, prompt = FakeSource(fake_config()), (1, 2, 7, 4, 9)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    made = engine(source=source, kv_max_age=1)
    made.add("before", prompt, params)
    run_all(made)
    source.commit()
    made.add("a", prompt, params, begun=Begun((9, 8), 2, 2))
    assert {(d.first_version, d.version) for d in run_all(made)["a"]} == {(1, 2)}


def test_a_version_that_is_gone_is_named():
    source = FakeSource(fake_config())
    source.commit()
    source.lose(1)
    made = engine(source=source)
    made.add("a", PROMPT, SamplingParams(max_tokens=6, version_policy="pinned"), begun=Begun((9,), 1, 1))
    [last] = run_all(made)["a"]
    assert last.cause.code is Code.UNAVAILABLE
    assert "version 1 has gone" in last.cause.message


def test_a_version_too_many_waits_and_what_does_not_fit_is_refused():
    made = engine(source=FakeSource(fake_config()), max_versions=1, max_model_len=16)
    pinned = SamplingParams(max_tokens=9, version_policy="pinned", ignore_eos=True)
    made.add("a", PROMPT, pinned, begun=Begun((9,), 1, 1))
    with pytest.raises(Overloaded, match=r"hold versions \[1\].*version 2 has to wait"):
        made.add("b", PROMPT, pinned, begun=Begun((9,), 2, 2))
    with pytest.raises(Unavailable, match="16 tokens so far; this engine takes 16"):
        made.add("b", PROMPT, pinned, begun=Begun((9,) * 13, 1, 1))
    with pytest.raises(InvalidRequest, match="begun has token id"):
        made.add("b", PROMPT, pinned, begun=Begun((VOCAB,), 1, 1))
    assert [delta.finish_reason for delta in run_all(made)["a"]][-1] == "length"
    assert made.stats().num_versions_held == 0
