"""Speculation: the text is that of single steps, with fewer passes where it repeats itself and nothing spent where not."""

import asyncio
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import FakeSource, fake_config, fake_engine, run_all
from tests.unit.test_begun import ASKED, Words, asked, close, logprobs
from trinity.engine.async_engine import AsyncEngine
from trinity.engine.deltas import by_request, joined
from trinity.engine.drafts import BOUNDARY, LENGTHS, MAX_UNTOLD, Clients, Drafter, Memory, Text, Trust
from trinity.engine.request import Delta, SamplingParams
from trinity.engine.speculation import UNKNOWN_SHARE, PassCost

AGAIN = (5, 9, 7, 5, 9, 7, 5, 9, 7, 5, 9)


class Eager(PassCost):
    """Says that drafts cost nothing, so that all there are are tried."""

    def share(self, num_tokens):
        return 0.0


def engine(drafts, eager=True, **more):
    made = fake_engine(max_draft_tokens=drafts, **more)
    made.tokenizer.encode_batch = Words().encode_batch
    made._drafts._cost = Eager() if eager else made._drafts._cost
    return made


def told(deltas):
    """All that a caller is told."""
    counts = itertools.accumulate(len(d.token_ids) for d in deltas)
    assert all(d.num_generated_tokens == count for d, count in zip(deltas, counts, strict=True))
    whole = joined(deltas)
    return whole.text, whole.token_ids, whole.finish_reason, whole.stop_reason


def guided(drafts, params, wanted):
    """An engine whose drafts are right up to a point of each: what is wanted, with every third token another one."""
    made = engine(drafts)
    made.add("a", AGAIN, params)

    def draft(sequence, room):
        at = sequence.num_generated
        right = wanted[at : at + min(room, drafts)]
        return tuple(token if (at + i) % 3 else (token + 1) % 40 for i, token in enumerate(right, start=1))

    made._drafts.draft = draft
    return made


@pytest.mark.parametrize("name", ASKED)
def test_the_answer_is_that_of_single_steps(name):
    params = asked(name)
    plain = engine(0)
    plain.add("a", AGAIN, params)
    wanted = run_all(plain)["a"]
    made = guided(4, params, [token for delta in wanted for token in delta.token_ids])
    steps = 0
    found = []
    while made.has_work:
        found += (deltas := made.step())
        assert len(deltas) == 1, "a step gives a request one Delta"
        made.check()
        steps += 1
    assert told(found) == told(wanted)
    assert close(logprobs(found), logprobs(wanted))
    assert (found[-1].experts_TLK is None) == (wanted[-1].experts_TLK is None)
    assert made._drafts.num_drafted > made._drafts.num_accepted > 0 or len(wanted) < 4
    assert steps < len(wanted) or len(wanted) < 4
    stats = made.stats()
    assert stats.num_free_blocks == stats.num_total_blocks


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    window=st.integers(1, 9),
    size=st.integers(1, 5),
    drafts=st.integers(1, 8),
    few=st.booleans(),
)
def test_any_batch_with_any_window_and_little_memory(seed, window, size, drafts, few):
    rng = random.Random(seed)
    requests = {
        str(i): (
            tuple(rng.choices((1, 2, 5), k=rng.randint(1, 14))),
            SamplingParams(temperature=rng.choice([0, 0.7]), seed=i, max_tokens=rng.randint(1, 20), ignore_eos=True),
        )
        for i in range(5)
    }
    memory = {"kv_cache_bytes": 64 * size * 2 * (40 // size + 12)} if few else {}
    answers = []
    for num in (0, drafts):
        made = engine(num, config=fake_config(window), block_size=size, max_model_len=40, max_num_seqs=3, **memory)
        for name, request in requests.items():
            made.add(name, *request)
        deltas = run_all(made)
        made.check()
        answers.append({name: told(found) for name, found in deltas.items()})
    assert answers[0] == answers[1]


def test_a_stream_has_every_token_of_its_passes():
    """One Delta a pass, which an event loop reads; an error comes behind the tokens that were there before it."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    plain = engine(0)
    plain.add("a", AGAIN, params)
    wanted = told(run_all(plain)["a"])
    made = AsyncEngine(engine(8))

    async def read():
        return [delta async for delta in made.generate("a", AGAIN, params)]

    try:
        found = asyncio.run(read())
    finally:
        made.close()
    assert told(found) == wanted
    assert len(found) < 20
    broken = [Delta("a", token_ids=(1,)), Delta("b"), Delta("a", token_ids=(2,)), Delta("a", finish_reason="error")]
    assert [(d.request_id, d.token_ids, d.finish_reason) for d in by_request(broken)] == [
        ("a", (1, 2), None),
        ("b", (), None),
        ("a", (), "error"),
    ]


def test_versions_of_the_weights_are_those_of_the_passes():
    source = FakeSource(fake_config())
    made = engine(4, config=source.config, source=source, kv_max_age="unbounded")
    made.add("live", AGAIN, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    made.add("pinned", AGAIN, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, version_policy="pinned"))
    versions = {"live": [], "pinned": []}
    while made.has_work:
        for delta in made.step():
            versions[delta.request_id].append(delta.version)
        made.check()
        source.commit()
    assert versions["live"] == sorted(versions["live"])
    assert len(set(versions["live"])) > 3
    assert len(set(versions["pinned"])) == 1
    assert made._drafts.num_accepted > 0


def test_earlier_answers_of_the_same_client_alone_are_drafts():
    clients, text = Clients(), [3, 1, 4, 1, 5, 9, 2, 6]
    clients.remember("ann", text)
    clients.work(float("inf"))
    for name, wanted in (("ann", (5, 9, 2, 6)), ("bob", ())):
        drafter = Drafter(clients.memory(name), Trust())
        for token in (3, 1, 4, 1):
            drafter.push(token, is_answer=False)
        assert drafter.draft(8, 0.0)[:4] == wanted if wanted else 5 not in drafter.draft(8, 0.0)


def test_an_engine_that_has_no_time_for_answers_does_not_keep_them_for_ever():
    clients, text = Clients(), list(range(1000))
    for _ in range(MAX_UNTOLD // 100):
        clients.remember("ann", text)
    assert len(clients._untold) <= MAX_UNTOLD + 1 + len(text)
    clients.work(float("inf"))
    assert len(clients.memory("ann")) >= len(text), "the last one is taken up whole"


def test_answers_with_another_salt_are_none():
    made = engine(8)
    made.add("a", AGAIN, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, cache_salt="mine"))
    run_all(made)
    clients = made._drafts._clients
    clients.work(float("inf"))
    assert [len(clients.memory(("anybody", salt))) for salt in ("mine", "yours", None)] == [1 + 9, 0, 0]


def test_a_match_never_crosses_from_one_answer_into_another():
    memory = Memory()
    for token in (BOUNDARY, 1, 2, 3, BOUNDARY, 7, 8):
        memory.push(token)
    drafter = Drafter(memory, Trust())
    for token in (1, 2, 3):
        drafter.push(token)
    assert drafter.draft(8, 0.0) == ()


def test_old_answers_are_forgotten():
    memory = Memory(most=40)
    for answer in range(30):
        for token in (BOUNDARY, *range(10 * answer, 10 * answer + 9)):
            memory.push(token)
    assert sum(map(len, memory.halves)) <= 60
    assert 0 not in memory.halves[0].tokens


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40))
def test_the_place_where_the_last_two_tokens_were_or_else_the_last_one(tokens):
    text, other = Text(), Text()
    for num, token in enumerate(tokens, start=1):
        found = text.push(token)
        earlier = [[e for e in range(n, num) if tokens[e - n : e] == tokens[num - n : num]] for n in (2, 1)]
        assert found == next((ends[-1] for ends in earlier if ends), 0)
        assert (other.find(text.tokens) > 0) == (token in other.tokens)
        if found:
            same = [n for n in range(found + 1) if tokens[found - n : found] == tokens[num - n : num]]
            assert text.agrees(found, tokens[:num]) == min(max(same), LENGTHS[-1])
        other.push(token)


def test_what_came_true_is_trusted_and_what_did_not_is_not():
    rng, trust = random.Random(0), Trust()
    drafter = Drafter(Memory(), trust)
    for _ in range(400):
        drafter.push(rng.randrange(6))
    assert drafter.draft(4, 0.6) == (), "noise repeats itself only by chance"
    for token in [1, 2, 3, 4, 5] * 60:
        drafter.push(token)
    assert drafter.draft(4, 0.6) == (1, 2, 3, 4)


def test_what_pays_follows_from_what_passes_take():
    cost = PassCost()
    assert cost.share(4) == UNKNOWN_SHARE
    for num in [1, 2, 4, 8] * 20:
        cost.took(num, 0.010 + 0.002 * num)
    assert cost.share(1) == pytest.approx(2 / 12, abs=0.05)
    assert cost.share(32) == pytest.approx(64 / 74, abs=0.05)
    flat = PassCost()
    for num in [1, 2, 4, 8] * 20:
        flat.took(num, 0.002 * num)
    assert flat.share(1) > 0.8


def test_a_pass_that_was_held_up_does_not_switch_drafts_off():
    cost = PassCost()
    for num in [32] * 40 + [34] + [32] * 9:
        cost.took(num, 0.5 if num == 34 else 0.010)
    assert 0.4 < cost.share(32) < 0.75
