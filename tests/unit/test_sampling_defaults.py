"""generation_config.json as defaults, and several continuations of a prompt."""

import json

import pytest

from trinity.engine import samples
from trinity.engine.defaults import SamplingDefaults, read_defaults
from trinity.engine.request import SamplingParams, TokenLogprobs
from trinity.errors import CheckpointError

MINI = {"do_sample": True, "temperature": 0.15, "top_p": 0.75, "top_k": 50, "min_p": 0.06, "eos_token_id": [3, 5]}


def test_request_before_checkpoint_before_openai():
    defaults = read_defaults(MINI, "here")
    assert defaults.values == {"temperature": 0.15, "top_p": 0.75, "top_k": 50, "min_p": 0.06}
    filled = defaults.fill(SamplingParams(temperature=1.0, top_k=0))
    assert (filled.temperature, filled.top_k) == (1.0, 0), "set to what OpenAI's default is, and set all the same"
    assert (filled.top_p, filled.min_p, filled.repetition_penalty) == (0.75, 0.06, 1.0)
    assert defaults.fill(filled) == filled
    assert SamplingDefaults().fill(filled) is filled


def test_max_new_tokens_is_the_default_of_max_tokens():
    defaults = read_defaults({"max_new_tokens": 2048, "repetition_penalty": 1.2}, "here")
    assert defaults.fill(SamplingParams()).max_tokens == defaults.max_tokens == 2048
    assert defaults.fill(SamplingParams(max_tokens=3)).max_tokens == 3
    assert read_defaults(None, "here").max_tokens is None


def test_the_log_says_what_is_followed_and_what_is_not():
    assert read_defaults({"eos_token_id": 3, "temperature": None}, "here").sentences() == []
    fresh = {"_from_model_config": True, "output_attentions": False, "output_hidden_states": False, "use_cache": True}
    assert read_defaults(fresh, "here").sentences() == [], "as transformers writes it for any model"
    first, second = read_defaults({**MINI, "num_beams": 4, "penalty_alpha": 0.6}, "here").sentences()
    assert "temperature 0.15, top_k 50, top_p 0.75, min_p 0.06" in first
    assert "num_beams, penalty_alpha" in second


@pytest.mark.parametrize("value", [-1, 101, 1e308, "0.7", True, [0.7], {}, float("nan"), float("inf")])
def test_a_value_out_of_bounds_is_said_with_the_remedy(value):
    tree = json.loads(json.dumps({"temperature": value}))
    with pytest.raises(CheckpointError, match=r"here/generation_config.json: temperature: .*--generation-config none"):
        read_defaults(tree, "here")


def test_switched_off_as_others_write_it():
    assert read_defaults({"top_k": -1}, "here").values == {"top_k": 0}
    with pytest.raises(CheckpointError, match="max_new_tokens: "):
        read_defaults({"max_new_tokens": 0}, "here")


def test_continuations_have_seeds_of_their_own_that_wrap():
    assert [one.seed for one in samples.each(SamplingParams(n=3, seed=5))] == [5, 6, 7]
    assert [one.seed for one in samples.each(SamplingParams(n=2, seed=2**63 - 1))] == [2**63 - 1, -(2**63)]
    assert {(one.n, one.best_of, one.seed) for one in samples.each(SamplingParams(n=2, best_of=4))} == {(1, None, None)}


def position(logprob):
    return TokenLogprobs(0, logprob, ())


def test_the_best_are_the_likeliest_by_token():
    """Of OpenAI's definition: a long text of likely tokens is better than a short one of unlikely ones."""
    drawn = [[position(-1.0)], [position(-0.5)] * 10, [position(-3.0), position(-0.1)], [position(-0.5)]]
    params = SamplingParams(n=2, best_of=4)
    assert samples.best(params, drawn) == [1, 3]
    assert samples.best(SamplingParams(n=4), drawn) == [0, 1, 2, 3]
    assert [one.logprobs for one in samples.each(params)] == [0] * 4
    assert [one.logprobs for one in samples.each(params.model_copy(update={"logprobs": 5}))] == [5] * 4
    assert [one.logprobs for one in samples.each(SamplingParams(n=4, best_of=4))] == [None] * 4
