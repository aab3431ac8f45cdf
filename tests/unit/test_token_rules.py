"""Rules about the next token: against transformers' own processors, and in whole engines under memory pressure."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinNewTokensLengthLogitsProcessor, NoBadWordsLogitsProcessor

from tests.unit.engine_fakes import VOCAB, FakeTokenizer, fake_engine, run_all
from trinity.engine.request import SamplingParams, truncated
from trinity.engine.token_rules import BadWords, TokenRules, read_words, rules_of
from trinity.errors import InvalidRequest
from trinity.text.tokenizer import Tokenizer

EOS = 3
NO_WORDS = BadWords(())
words_ids = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(words=words_ids, generated=st.lists(st.integers(0, 7), max_size=6))
def test_bad_words_are_those_that_transformers_bans(words, generated):
    """Theirs is told of the whole text, ours of what was generated; here they are the same, but for an empty one."""
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=VOCAB - 1)
    scores = processor(torch.tensor([[VOCAB - 2, *generated]]), torch.zeros(1, VOCAB))
    assert BadWords(words).banned(generated) == set(scores[0].isinf().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("generated", [[], [5], [5, 6], [5, 6, 7]])
def test_ends_wait_for_min_tokens_as_in_transformers(generated):
    params = SamplingParams(min_tokens=2, stop_token_ids=[9])
    rules = rules_of(params, [EOS], NO_WORDS, VOCAB)
    processor = MinNewTokensLengthLogitsProcessor(1, 2, [EOS, 9], device="cpu")
    scores = processor(torch.tensor([[1, *generated]]), torch.zeros(1, VOCAB))
    assert rules.banned(generated) == set(scores[0].isinf().nonzero()[:, 0].tolist())
    ignoring = rules_of(params.model_copy(update={"ignore_eos": True}), [EOS], NO_WORDS, VOCAB)
    assert ignoring.banned([]) == {9}


def test_a_request_without_rules_has_none():
    assert rules_of(SamplingParams(), [EOS], NO_WORDS, VOCAB) is None


def test_words_are_read_with_and_without_a_space_before_them():
    tokenizer = Tokenizer.train(iter(["a lazy dog and a lazy fox; lazydog\n" * 50]), 320)
    for word in ("lazy", " lazy"):
        words = read_words([word], tokenizer)
        for text in ("lazy", " lazy"):
            *before, last = tokenizer.encode(text)
            assert last in words.banned(before)
    assert read_words(["   "], tokenizer).banned([]) or len(tokenizer.encode("   ")) > 1


@settings(max_examples=200, deadline=None)
@given(
    words=words_ids,
    ends=st.sets(st.integers(0, 7)),
    allowed=st.none() | st.sets(st.integers(0, 7), min_size=1).map(list),
    generated=st.lists(st.integers(0, 7), max_size=4),
)
def test_something_is_always_left(words, ends, allowed, generated):
    """Words give way before ends do: a row without a token is what damaged weights look like."""
    rules = TokenRules(SamplingParams(min_tokens=4, allowed_token_ids=allowed), ends, BadWords(words), 8)
    choice, banned = set(range(8)) if allowed is None else set(allowed), rules.banned(generated)
    assert choice - banned
    early = ends if len(generated) < 4 else set()
    if choice - early:
        assert not (choice - banned) & early


def answers(engine, asked):
    """Tokens of each of the requests, which run together."""
    for name, request in asked.items():
        engine.add(name, *request)
    return {name: [i for delta in deltas for i in delta.token_ids] for name, deltas in run_all(engine).items()}


def drawn(engine, **params):
    return answers(engine, {"r": ([1, 2, 3], SamplingParams(**{"max_tokens": 12, "seed": 1, **params}))})["r"]


def test_allowed_tokens_are_all_that_comes():
    for temperature in (0, 1.0):
        found = drawn(fake_engine(), allowed_token_ids=[5, 9, 30], temperature=temperature, ignore_eos=True)
        assert set(found) <= {5, 9, 30}
        assert len(found) == 12
    assert set(drawn(fake_engine(), allowed_token_ids=[5], logit_bias={7: 100.0})) == {5}


def test_the_end_of_text_waits():
    bias = {EOS: 100.0}
    assert drawn(fake_engine(), logit_bias=bias) == [EOS]
    found = drawn(fake_engine(), logit_bias=bias, min_tokens=4)
    assert (len(found), found.index(EOS)) == (5, 4)
    assert len(drawn(fake_engine(), allowed_token_ids=[EOS], min_tokens=4)) == 1, "no other token is left"


class Reading(FakeTokenizer):
    """Characters as tokens; a space is none."""

    def encode_batch(self, texts, add_special=False):
        return [[ord(char) - 65 for char in text if char != " "] for text in texts]


def test_a_bad_word_is_never_completed():
    """`solo` finds a word of three tokens in the free answer; forbidden, its prefix goes on otherwise."""
    engine = fake_engine()
    engine.tokenizer = Reading()
    free = drawn(engine, temperature=0, ignore_eos=True)
    word = "".join(chr(65 + i) for i in free[4:7])
    held = drawn(engine, temperature=0, ignore_eos=True, bad_words=[word])
    first = next(i for i in range(12) if free[i : i + 3] == free[4:7])
    assert held[: first + 2] == free[: first + 2]
    assert held[first + 2] != free[first + 2]
    assert not any(held[i : i + 3] == free[4:7] for i in range(12))


class Thinking(Reading):
    def id_of(self, token):
        return {"<think>": 30, "</think>": 31}[token]


def reasoning(prompt, generated):
    """Tokens between the markers, and whether it is open at the end."""
    is_open, num = prompt[-1] == 30, 0
    for token_id in generated:
        num += is_open and token_id not in (30, 31)
        is_open = token_id == 30 or (is_open and token_id != 31)
    return num, is_open


@pytest.mark.parametrize("prompt", [[1, 30], [1, 2], [30, 1, 31]])
@pytest.mark.parametrize("budget", [0, 3, 7])
def test_reasoning_ends_with_its_budget(prompt, budget):
    engine = fake_engine()
    engine.tokenizer = Thinking()
    common = {"logit_bias": {30: 4.0}, "max_tokens": 40, "ignore_eos": True}
    asked = {
        f"r{seed}": (prompt, SamplingParams(seed=seed, **common, thinking_token_budget=budget, bad_words=["]"]))
        for seed in range(12)
    }
    found = {name: reasoning(prompt, generated) for name, generated in answers(engine, asked).items()}
    assert max(num for num, _ in found.values()) == budget, found
    free = {name: (prompt, SamplingParams(seed=seed, **common)) for seed, name in enumerate(asked)}
    assert max(reasoning(prompt, generated)[0] for generated in answers(engine, free).values()) > budget


def test_a_budget_changes_nothing_before_it_is_spent():
    engine = fake_engine()
    engine.tokenizer = Thinking()
    ids = {name: ([1, 30], SamplingParams(seed=3, max_tokens=12, bad_words=["_"], thinking_token_budget=budget))
           for name, budget in (("free", None), ("bound", 5), ("roomy", 12))}  # fmt: skip
    found = answers(engine, ids)
    assert found["roomy"] == found["free"]
    assert found["bound"][:5] == found["free"][:5]
    assert found["bound"][5] == 31


def test_a_model_that_does_not_think_needs_no_budget():
    assert drawn(fake_engine(), thinking_token_budget=0) == drawn(fake_engine())


def test_preemption_and_company_do_not_change_what_rules_leave():
    rng = random.Random(0)
    asked = {
        f"r{i}": (
            tuple(rng.randrange(VOCAB) for _ in range(4)) + (30,),
            SamplingParams(
                seed=i, max_tokens=18, min_tokens=9 * (i % 2), bad_words=["AB", "C", "DEA"], stop_token_ids=[4, 5, 6],
                allowed_token_ids=list(range(i % 3, 30)), thinking_token_budget=i,
            ),
        )
        for i in range(8)
    }  # fmt: skip
    tight = fake_engine(max_model_len=24, block_size=2, kv_cache_bytes=64 * 2 * 20, max_num_seqs=6)
    tight.tokenizer = Thinking()
    together = answers(tight, asked)
    assert tight.stats().num_preemptions >= 3
    for name, request in asked.items():
        roomy = fake_engine(max_model_len=24)
        roomy.tokenizer = Thinking()
        assert answers(roomy, {name: request})[name] == together[name]


def test_what_cannot_be_is_refused_by_name():
    engine = fake_engine()
    for params, param in (
        (SamplingParams(min_tokens=17), "min_tokens"),
        (SamplingParams(allowed_token_ids=[VOCAB]), "allowed_token_ids"),
        (SamplingParams(n=2), None),
    ):
        with pytest.raises(InvalidRequest) as refused:
            engine.add("r", [1], params)
        assert refused.value.param == param
    assert not engine.has_work


@pytest.mark.parametrize(
    ("keep", "max_tokens", "wanted"),
    [(None, 5, 30), (4, 5, 4), (50, 5, 30), (-1, 5, 19), (-1, 24, 23), (-1, 1 << 31, 23)],
)
def test_a_prompt_keeps_its_end(keep, max_tokens, wanted):
    assert truncated(list(range(30)), keep, max_tokens, 24) == list(range(30))[-wanted:]
