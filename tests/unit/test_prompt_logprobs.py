"""Log-probabilities of prompts: what a dense pass of the whole prompt gives, however it was cut, thrown out or repeated.

Legend: T tokens of the prompt, V vocabulary.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import VOCAB, DenseAttend, FakeAfmoe, FakeSource, fake_config, fake_engine, run_all
from trinity.engine import repeats, scoring
from trinity.engine.request import SamplingParams
from trinity.errors import InvalidRequest

ASKED = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=2)
PROMPT = tuple((7 * i + 3) % VOCAB for i in range(23))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(repeats, "PAUSE_S", 0.0)


@torch.inference_mode()
def dense(prompt, seed=0):
    """logprobs_TV of the prompt, all positions at once, without a cache."""
    config = fake_config()
    model = FakeAfmoe(config, seed)
    hidden_TD = model(torch.tensor(prompt), torch.arange(len(prompt)), DenseAttend(config)).hidden_TD
    return model.logits(hidden_TD).log_softmax(-1)


def check(scores, prompt, num_top, seeds=None):
    """Against the dense pass; row p by the version `seeds[p]` where versions differ."""
    positions = scores.positions()
    assert len(positions) == len(prompt)
    assert positions[0] is None
    for p, found in enumerate(positions[1:]):
        logprobs_V = dense(prompt, seeds[p] if seeds else 0)[p]
        assert found.token_id == prompt[p + 1]
        assert found.logprob == pytest.approx(float(logprobs_V[found.token_id]), abs=1e-4)
        assert found.rank == 1 + int((logprobs_V > logprobs_V[found.token_id] + 1e-4).sum())
        best = logprobs_V.topk(num_top)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        own = [value for token, value in found.top if token == found.token_id]
        assert own in ([], [found.logprob]), "one computation: the same float"


def scores_of(engine, prompt=PROMPT, params=ASKED):
    engine.add("a", prompt, params)
    deltas = run_all(engine)["a"]
    engine.check()
    assert all(delta.prompt_logprobs is None for delta in deltas[1:]), "once is enough"
    return deltas[0].prompt_logprobs


@pytest.mark.parametrize("budget", [1, 2, 5, 22, 23, 64])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_parts_and_slices_are_joined(monkeypatch, budget, rows):
    monkeypatch.setattr(scoring, "SLICE_BYTES", 4 * VOCAB * rows)
    scores = scores_of(fake_engine(max_num_batched_tokens=budget, max_num_seqs=1))
    check(scores, PROMPT, 2)


@pytest.mark.parametrize("num_top", [0, 1, 20])
@pytest.mark.parametrize("prompt", [PROMPT[:1], PROMPT[:2], PROMPT])
def test_any_number_of_alternatives_and_short_prompts(prompt, num_top):
    scores = scores_of(fake_engine(), prompt, ASKED.model_copy(update={"prompt_logprobs": num_top}))
    check(scores, prompt, num_top)


def test_logits_are_made_a_slice_at_a_time(monkeypatch):
    """Never more rows than SLICE_BYTES has, but for those that sample."""
    model = FakeAfmoe(fake_config())
    rows, made = [], model.logits
    monkeypatch.setattr(scoring, "SLICE_BYTES", 4 * VOCAB * 3)
    model.logits = lambda hidden_TD: (rows.append(len(hidden_TD)), made(hidden_TD))[1]
    scores_of(fake_engine(model=model))
    assert sum(rows) == len(PROMPT) - 1 + ASKED.max_tokens
    assert max(rows) == 3


def test_who_does_not_ask_pays_nothing(monkeypatch):
    monkeypatch.setattr("trinity.engine.runner.score", None)
    assert scores_of(fake_engine(), params=ASKED.model_copy(update={"prompt_logprobs": None})) is None


def test_nothing_is_generated_where_nothing_is_asked_for():
    engine = fake_engine()
    for params in (ASKED, SamplingParams()):
        engine.add("a", PROMPT, params.model_copy(update={"max_tokens": 0}))
        (delta,) = run_all(engine)["a"]
        assert (delta.finish_reason, delta.text, delta.token_ids) == ("length", "", ())
        assert (delta.num_prompt_tokens, delta.num_generated_tokens) == (len(PROMPT), 0)
        assert (delta.prompt_logprobs is None) == (params is not ASKED)
    assert engine.stats().num_free_blocks == engine.stats().num_total_blocks


@pytest.mark.parametrize("value", [-1, 21, 1.5, "1", True])
def test_bounds(value):
    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        SamplingParams.parse(prompt_logprobs=value)


def crowded(num_bytes, budget):
    """An engine whose memory holds little more than one sequence, and what its scheduler has thrown out of it so far."""
    engine = fake_engine(max_model_len=24, block_size=2, kv_cache_bytes=num_bytes, max_num_batched_tokens=budget)
    thrown, preempt = [], engine._scheduler._preempt
    engine._scheduler._preempt = lambda s: (thrown.append((s.num_generated, s.prompt_logprobs)), preempt(s))
    return engine, thrown


def test_what_is_thrown_out_half_scored_is_scored_again_and_told_once():
    engine, thrown = crowded(3600, budget=4)
    prompts = {str(i): PROMPT[i : i + (2 if i < 2 else 16)] for i in range(6)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, ASKED.model_copy(update={"max_tokens": 20 if len(prompt) == 2 else 4}))
    deltas = run_all(engine)
    assert any(not generated and scores for generated, scores in thrown), "in the middle of its prompt"
    assert any(generated and not scores for generated, scores in thrown), "in the middle of its answer"
    for name, prompt in prompts.items():
        check(deltas[name][0].prompt_logprobs, prompt, 2)
        assert all(delta.prompt_logprobs is None for delta in deltas[name][1:])


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=6),
    budget=st.integers(3, 24),
    num_bytes=st.integers(2000, 6000),
)
def test_scores_do_not_depend_on_company_or_preemption(prompts, budget, num_bytes):
    engine, _ = crowded(num_bytes, budget)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, ASKED)
    deltas = run_all(engine)
    for i, prompt in enumerate(prompts):
        check(deltas[str(i)][0].prompt_logprobs, prompt, 2)


def test_scores_are_of_the_weights_that_the_answer_is_of():
    """New weights between two parts of a prompt, whose first part is computed again with them."""
    source = FakeSource(fake_config(), 1)
    engine = fake_engine(source.config, source=source, max_num_batched_tokens=10, kv_max_age=0, max_num_seqs=2)
    engine.add("a", PROMPT, ASKED)
    engine.step()
    source.commit()
    scores = run_all(engine)["a"][0].prompt_logprobs
    check(scores, PROMPT, 2, seeds=[2] * len(PROMPT))


def test_damaged_weights_are_left_and_the_prompt_is_scored_again():
    source = FakeSource(fake_config(), 1)
    engine = fake_engine(source.config, source=source, max_num_batched_tokens=10, max_num_seqs=2)
    engine.add("a", PROMPT, ASKED)
    engine.step()
    source.commit(poisoned=True)
    deltas = run_all(engine)["a"]
    assert source.quarantined == {2}
    assert deltas[-1].finish_reason == "length"
    check(deltas[0].prompt_logprobs, PROMPT, 2, seeds=[1] * len(PROMPT))


def test_scores_that_are_no_numbers_are_an_error():
    """A model that is broken for one position of the prompt alone, and no other weights to turn to."""
    model = FakeAfmoe(fake_config())
    made = model.logits
    model.logits = lambda hidden_TD: made(hidden_TD) * (float("nan") if len(hidden_TD) > 1 else 1)
    engine = fake_engine(model=model)
    engine.add("a", PROMPT, ASKED)
    (delta,) = run_all(engine)["a"]
    assert delta.finish_reason == "error"
    assert "not finite" in delta.error
