"""The prefix cache in an engine: what is computed and what is not, for whom, and that nobody's answer shows it.

Computed tokens are counted, never timed. Blocks have 4 tokens; the window of `fake_config()` has 4, too.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import VOCAB, FakeAfmoe, FakeSource, fake_config, fake_engine, run_all, solo
from trinity.config import Client
from trinity.engine.request import SamplingParams, Sequence
from trinity.errors import InvalidRequest
from trinity.models.common.decoder import Output
from trinity.text.detokenizer import TextStream

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ALICE, BOB = Client("a"), Client("b", 3.0)
PROMPT = tuple(range(5, 27))  # 22 tokens: five full blocks and two tokens


class Counted:
    """An engine, and what it computes for each request."""

    def __init__(self, config=None, **settings):
        self.engine = fake_engine(config, **settings)

    def ask(self, prompt=PROMPT, params=GREEDY, client=ALICE, name="r"):
        """-> tokens of the answer, tokens computed for it, and tokens that it was told were cached."""
        before = self.engine.stats().num_computed_tokens
        self.engine.add(name, prompt, params, client)
        deltas = run_all(self.engine)[name]
        self.engine.check()
        tokens = tuple(token for delta in deltas for token in delta.token_ids)
        return tokens, self.engine.stats().num_computed_tokens - before, deltas[-1].num_cached_tokens


@pytest.mark.parametrize("window", [1, 4, 9, 100])
def test_a_prompt_is_computed_once_but_for_its_last_tokens(window):
    config = fake_config(window)
    counted = Counted(config)
    first, again, longer = counted.ask(), counted.ask(), counted.ask((*PROMPT, 1, 2))
    assert first == (solo(config, PROMPT, GREEDY), 22 + 5, 0)
    assert again == (first[0], 2 + 5, 20)
    assert longer == (solo(config, (*PROMPT, 1, 2), GREEDY), 4 + 5, 20)
    stats = counted.engine.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (22 + 22 + 24, 40)


def test_the_last_token_is_always_computed():
    counted = Counted()
    assert [counted.ask(PROMPT[:20])[1:] for _ in range(2)] == [(20 + 5, 0), (4 + 5, 16)]
    assert [counted.ask((7,))[1:] for _ in range(2)] == [(1 + 5, 0)] * 2


def test_a_conversation_goes_on_where_its_answer_ended():
    counted = Counted(max_model_len=200)
    text = PROMPT
    for turn in range(4):
        answer, computed, cached = counted.ask(text)
        assert cached == (0 if not turn else (len(text) - 4) // 4 * 4), (
            "all but the last answer's last token, in blocks"
        )
        assert computed == len(text) - cached + 5
        text = (*text, *answer, 9, 8, 7)


def test_it_can_be_turned_off():
    counted = Counted(prefix_cache=False)
    assert [counted.ask()[1:] for _ in range(2)] == [(27, 0)] * 2
    assert counted.engine.stats().num_idle_blocks == 0
    assert counted.engine.stats().num_prefix_queries == 0


def test_what_it_knows_can_be_forgotten():
    counted = Counted()
    counted.ask()
    assert counted.engine.stats().num_idle_blocks
    counted.engine.reset_prefix_cache()
    assert counted.engine.stats().num_idle_blocks == 0
    assert counted.ask()[2] == 0


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("budget", [5, 64])
def test_continuations_of_a_prompt_share_it_whoever_comes_first(n, budget):
    engine = fake_engine(max_num_batched_tokens=budget)
    params = [GREEDY.model_copy(update={"temperature": 0.8, "seed": seed}) for seed in range(n)]
    for i in range(n):
        engine.add(str(i), PROMPT, params[i])
    deltas = run_all(engine)
    assert engine.stats().num_computed_tokens == 22 + (n - 1) * 2 + n * 5
    assert [deltas[str(i)][-1].num_cached_tokens for i in range(n)] == [0] + [20] * (n - 1)
    for i in range(n):
        assert tuple(t for d in deltas[str(i)] for t in d.token_ids) == solo(engine.config, PROMPT, params[i])


def test_who_waits_for_another_goes_on_when_that_one_leaves_and_keeps_nobody_up():
    engine = fake_engine(max_num_batched_tokens=4)
    engine.add("first", PROMPT, GREEDY)
    engine.step()
    for name in ("second", "third"):
        engine.add(name, PROMPT, GREEDY)
    engine.add("other", (1, 2), GREEDY)
    engine.step()
    engine.check()
    assert engine.stats().num_waiting == 3, "there was no room for other"
    engine.abort("second")
    engine.abort("first")
    engine.check()
    deltas = run_all(engine)
    assert deltas["third"][-1].num_cached_tokens == 8, "what the first one had computed"
    for name, prompt in (("third", PROMPT), ("other", (1, 2))):
        assert tuple(t for d in deltas[name] for t in d.token_ids) == solo(engine.config, prompt, GREEDY)


def test_others_pass_those_that_wait():
    engine = fake_engine(max_num_batched_tokens=6)
    engine.add("first", PROMPT, GREEDY)
    engine.step()
    engine.add("second", PROMPT, GREEDY)
    engine.add("other", (1, 2), GREEDY)
    order = []
    while engine.has_work:
        order += [(delta.request_id, delta.num_generated_tokens) for delta in engine.step()]
        engine.check()
    assert order.index(("other", 1)) <= order.index(("second", 1))


def test_keys_and_salts_see_nothing_of_each_other():
    """Computed tokens tell it, as the time to the first token would."""
    counted = Counted()
    salted = GREEDY.model_copy(update={"cache_salt": "x" * 1024})
    asks = [(GREEDY, ALICE), (GREEDY, BOB), (salted, ALICE), (salted, BOB)]
    alone = [counted.ask(PROMPT, *each)[1:] for each in asks]
    again = [counted.ask(PROMPT, *each)[1:] for each in asks]
    assert alone == [(27, 0)] * 4, "somebody saw another one's"
    assert again == [(7, 20)] * 4
    other = GREEDY.model_copy(update={"cache_salt": "x" * 1023})
    assert counted.ask(PROMPT, other)[2] == 0


def test_adapters_see_nothing_of_each_other_and_nothing_of_the_base():
    prefixes = fake_engine().prefixes
    adapters = [None, *(SimpleNamespace(ref=SimpleNamespace(name="same", content=content)) for content in (1, 2))]
    sequences = [Sequence("r", PROMPT, GREEDY, TextStream(None), ALICE, adapter=adapter) for adapter in adapters]
    keys = [prefixes._keys(sequence) for sequence in sequences]
    assert len({key for each in keys for key in each}) == 3 * 5


@pytest.mark.parametrize("salt", ["", "x" * 1025, 7])
def test_salts_out_of_bounds(salt):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams.parse(cache_salt=salt)
    assert caught.value.param == "cache_salt"


def test_scores_of_a_prompt_are_computed_and_leave_it_for_others():
    counted = Counted()
    scored = GREEDY.model_copy(update={"prompt_logprobs": 1})
    assert [counted.ask(PROMPT, each)[1:] for each in (scored, scored, GREEDY)] == [(27, 0), (27, 0), (7, 20)]


class Routed(FakeAfmoe):
    """Sends a token to experts by its id and its position."""

    def forward(self, ids_T, positions_T, attend):
        out = super().forward(ids_T, positions_T, attend)
        routing = [SimpleNamespace(ids_TK=torch.stack([ids_T, positions_T + layer], 1)) for layer in range(3)]
        return Output(out.hidden_TD, tuple(routing))


def test_routes_of_cached_tokens_come_with_them():
    traced = GREEDY.model_copy(update={"trace": True})
    counted = Counted(model=Routed(fake_config()), max_num_batched_tokens=7)
    seen = []
    delta = counted.engine._delta
    counted.engine._delta = lambda *args, **fields: seen.append(fields.get("experts_TLK")) or delta(*args, **fields)
    assert counted.ask(PROMPT)[2] == 0
    answers = [counted.ask(PROMPT, traced) for _ in range(2)]
    assert [cached for _, _, cached in answers] == [0, 20], "an untraced request has none to share"
    tokens = np.array([*PROMPT, *answers[0][0][:-1]])
    want = [[[token, at + layer] for layer in range(3)] for at, token in enumerate(tokens)]
    for experts_TLK in [each for each in seen if each is not None]:
        np.testing.assert_array_equal(experts_TLK, want)


def test_what_was_thrown_out_for_want_of_memory_finds_most_of_itself():
    """Room for one of two whole sequences: the later one goes, and comes back."""
    engine = fake_engine(fake_config(4, ("full_attention",)), max_model_len=40, kv_cache_bytes=256 * 14, max_num_kept=0)
    for i in range(2):
        engine.add(str(i), (i, *PROMPT[1:]), GREEDY.model_copy(update={"max_tokens": 17}))
    run_all(engine)
    stats = engine.stats()
    assert stats.num_preemptions >= 1
    assert stats.num_computed_tokens < 2 * (22 + 16) + 22


def test_aborted_and_failed_requests_leave_what_they_computed():
    counted = Counted(max_num_batched_tokens=8)
    counted.engine.add("left", PROMPT, GREEDY, ALICE)
    counted.engine.step()
    counted.engine.step()
    counted.engine.abort("left")
    assert counted.ask()[1:] == (22 - 16 + 5, 16)


def test_damaged_content_is_forgotten():
    model = FakeAfmoe(fake_config())
    head = model.head.data.clone()
    counted = Counted(model=model)
    model.head.data.fill_(float("nan"))
    counted.engine.add("bad", PROMPT, GREEDY)
    assert run_all(counted.engine)["bad"][-1].finish_reason == "error"
    model.head.data.copy_(head)
    assert counted.ask()[1:] == (27, 0)
    assert counted.ask()[1:] == (7, 20), "and what is computed after that is cached"


def test_a_shared_beginning_that_windows_have_left_behind_is_kept_from_the_second_request_on():
    """12 blocks of a windowed layer, prompts of ten windows: of what lies in between only what others have asked for stays."""
    config = fake_config(8)
    counted = Counted(config, max_model_len=200, max_num_seqs=1, kv_cache_bytes=256 * 62 * 2, max_num_kept=3)
    system = tuple(1 + i % 30 for i in range(80))
    hits = []
    for user in range(5):
        answer, _, cached = counted.ask((*system, *[31 + user] * 41))
        assert answer == solo(config, (*system, *[31 + user] * 41), GREEDY)
        hits.append(cached)
    assert hits[2:] == [80] * 3
    assert counted.engine.stats().num_preemptions == 0


def parting(text, place):
    return (*text[:place], *((token + 1) % VOCAB for token in text[place:]))


@pytest.mark.parametrize(("place", "cached"), [(55, 52), (48, 48), (44, 40), (28, 24)])
@pytest.mark.parametrize("num_known", [0, 8])
def test_the_second_text_that_begins_like_a_new_one_finds_a_window_near_to_where_they_part(place, cached, num_known):
    """An instruction's end is not known before: at most as much again is computed as comes after it. Of a text of which a
    little was known before, too."""
    counted, text = Counted(), tuple(i % VOCAB for i in range(58))
    if num_known:
        counted.ask(text[:num_known])
    counted.ask(text)
    assert counted.ask(parting(text, place))[2] == cached


@pytest.mark.parametrize("budget", [16, 1000])
def test_windows_are_kept_by_the_passes_that_a_prompt_takes_anyway(budget):
    engine = fake_engine(max_num_batched_tokens=budget, max_model_len=200)
    engine.add("r", tuple(i % VOCAB for i in range(150)), GREEDY)
    assert [len(engine.step()) for _ in range(-(-150 // budget))][:-1] == [0] * (149 // budget)
    assert engine.stats().num_generated_tokens == 1


@pytest.mark.parametrize("budget", [130, 1000])
def test_who_parts_from_one_that_is_being_computed_goes_on_just_there(budget):
    engine, text = fake_engine(max_num_batched_tokens=budget, max_model_len=200), tuple(i % VOCAB for i in range(122))
    for name, prompt in (("first", text), ("second", parting(text, 80)), ("third", parting(text, 44))):
        engine.add(name, prompt, GREEDY)
    deltas = run_all(engine)
    assert [deltas[name][-1].num_cached_tokens for name in ("first", "second", "third")] == [0, 80, 44]
    engine.check()


def test_a_full_cache_makes_room_and_fails_nobody():
    counted = Counted(max_num_seqs=2, max_num_kept=0)
    for i in range(30):
        assert counted.ask((i, *PROMPT))[0] == solo(counted.engine.config, (i, *PROMPT), GREEDY)
    assert counted.ask((29, *PROMPT))[2] == 20, "the latest is still there"
    assert counted.ask((0, *PROMPT))[2] == 0


def test_a_number_that_is_used_again_is_another_version():
    """Training went back while a pinned request held version 2, and came to another version 2."""
    source = FakeSource(fake_config())
    counted = Counted(source.config, source=source, max_model_len=64)
    pinned = GREEDY.model_copy(update={"version_policy": "pinned", "max_tokens": 30})
    source.commit()
    counted.engine.add("old", PROMPT, pinned)
    counted.engine.step()
    source.roll_back()
    counted.engine.step()
    source.known.add(2)
    for _ in range(9):
        counted.engine.step()
    counted.engine.add("new", PROMPT, GREEDY)
    deltas = run_all(counted.engine)
    assert (deltas["new"][-1].version, deltas["new"][-1].num_cached_tokens) == (2, 0)
    assert counted.ask()[2] == 0, "nothing of that number was noted while the old one was there"
    assert counted.ask()[2] == 20


clients = st.sampled_from([ALICE, BOB])
base = tuple(range(2, 20))
prompts = st.builds(
    lambda n, tail: (*base[:n], *tail), st.integers(0, 18), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5)
)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 2),
    max_tokens=st.integers(1, 12),
    ignore_eos=st.just(True),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
    cache_salt=st.sampled_from([None, None, "salt"]),
)
actions = st.one_of(
    st.tuples(st.just("add"), prompts, params, st.integers(1, 4), clients),
    st.tuples(st.just("add"), prompts, params, st.integers(1, 4), clients),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("reset")),
)


@settings(max_examples=60, deadline=None)
@given(
    trace=st.lists(actions, max_size=20),
    window=st.integers(1, 12),
    block_size=st.integers(1, 5),
    budget=st.integers(1, 30),
    seqs=st.integers(1, 6),
    kept=st.integers(0, 3),
    slack=st.integers(0, 30),
)
def test_any_trace(trace, window, block_size, budget, seqs, kept, slack):
    """Prompts that begin alike, in groups, of two clients: each answer is that of the request alone, and all is given back."""
    config, most = fake_config(window), 36
    per_seq = -(-most // block_size)
    engine = fake_engine(
        config,
        max_model_len=most,
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_kept=kept,
        max_num_batched_tokens=budget,
        kv_cache_bytes=(2 * per_seq + slack) * 64 * block_size,
    )
    asked, got = {}, {}

    def step():
        for delta in engine.step():
            got[delta.request_id] += delta.token_ids
            assert delta.num_cached_tokens < delta.num_prompt_tokens
            if delta.finish_reason not in (None, "abort"):
                assert delta.finish_reason == "length"
                asked[delta.request_id][2] = True
        engine.check()

    for name, *rest in trace:
        if name == "add":
            prompt, asks, group, client = rest
            for sample in range(group):
                own, request = asks.model_copy(update={"seed": asks.seed + sample}), str(len(asked))
                engine.add(request, prompt, own, client)
                asked[request], got[request] = [prompt, own, False], ()
        elif name == "abort":
            engine.abort(str(rest[0]))
        elif name == "reset":
            engine.reset_prefix_cache()
        else:
            for _ in range(rest[0]):
                step()
        engine.check()
    for _ in range(3000):
        if not engine.has_work:
            break
        step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_total_blocks)
    for request, (prompt, own, is_done) in asked.items():
        plain = own.model_copy(update={"prompt_logprobs": None, "cache_salt": None})
        want = solo(config, prompt, plain)
        assert got[request] == (want if is_done else want[: len(got[request])])
