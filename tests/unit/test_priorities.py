"""Priorities: what is urgent waits for the pass under way and for nothing else, and changes nobody's answer."""

import sys
import threading
import time

import pytest
import torch

from actors.dataplane import frames
from actors.dataplane.server import Combiner, RequestQueue
from tests.unit.engine_fakes import fake_engine, run_all, solo
from trinity.engine.pace import FIRST_TOKENS, Pace
from trinity.engine.request import SamplingParams
from trinity.errors import DeadlineExceeded, Overloaded
from trinity.rpc.messages import Fetch, Forward, Rows
from trinity.utils.niceness import IDLE, PATIENT, LowPriorityExecutor, of_this_thread

LATER, URGENT = (SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, priority=p) for p in (3, -2))


def seen(engine):
    """Chunks of each pass to come, by request."""
    passes, run = [], engine._runner.run

    def watched(plan):
        passes.extend({c.sequence.request_id: c.count for c in each.chunks} for each in plan)
        return run(plan)

    engine._runner.run = watched
    return passes


def tokens_of(deltas):
    return tuple(token for delta in deltas for token in delta.token_ids)


def answers(engine, asked):
    """Deltas of all, after each was found to be what the request would have got alone."""
    deltas = run_all(engine)
    for name, (prompt, params) in asked.items():
        assert tokens_of(deltas[name]) == solo(engine.config, prompt, params), name
    return deltas


def test_it_is_in_the_next_pass_alone_while_its_prompt_is_computed():
    engine = fake_engine(max_num_seqs=4, max_num_batched_tokens=8)
    asked = {str(i): ((i + 1,) * 12, LATER) for i in range(6)}
    for name, request in asked.items():
        engine.add(name, *request)
    for _ in range(4):
        engine.step()
    passes = seen(engine)
    asked["urgent"] = ((9,) * 20, URGENT)
    engine.add("urgent", *asked["urgent"])
    deltas = {}
    for name in ("urgent",) * 3:
        deltas[name] = engine.step()
    assert passes == [{"urgent": 8}, {"urgent": 8}, {"urgent": 4}]
    assert [d.request_id for d in deltas["urgent"]] == ["urgent"]
    first = tokens_of(deltas["urgent"])
    engine.step()
    assert len(passes[-1]) > 1, "with its tokens, the others go on"
    rest = run_all(engine)
    assert solo(engine.config, *asked["urgent"])[: len(first)] == first
    assert list(rest)[-1] != "urgent"


@pytest.mark.parametrize("slots", [2, 64])
def test_others_give_way_for_it_where_rows_or_memory_are_short(slots):
    room = (
        {"max_num_seqs": slots} if slots == 2 else {"kv_cache_bytes": 64 * 2 * 24, "max_model_len": 24, "block_size": 2}
    )
    engine = fake_engine(**room)
    asked = {str(i): ((i + 1,) * 12, LATER) for i in range(4)}
    for name, request in asked.items():
        engine.add(name, *request)
    engine.step()
    before = engine.stats().num_preemptions
    asked["urgent"] = ((7,) * 14, URGENT)
    engine.add("urgent", *asked["urgent"])
    assert [d.request_id for d in engine.step()] == ["urgent"]
    engine.check()
    assert engine.stats().num_preemptions > before
    name, request = "urgent", asked.pop("urgent")
    got = tokens_of(answers(engine, {k: v for k, v in asked.items() if k not in ("0", "1")})[name])
    assert solo(engine.config, *request)[1:] == got


def test_in_a_full_queue_it_takes_the_place_of_the_last():
    engine = fake_engine(max_num_waiting=3)
    for name in "abc":
        engine.add(name, [1], LATER)
    engine.add("urgent", [1], URGENT)
    for name in ("urgent too", "urgent as well"):
        engine.add(name, [1], URGENT)
    with pytest.raises(Overloaded):
        engine.add("one more", [1], URGENT)
    ended = run_all(engine)
    assert set(ended) == {*"abc", "urgent", "urgent too", "urgent as well"}
    assert all(isinstance(ended[name][-1].cause, Overloaded) for name in "abc")
    assert ended["c"][-1].cause.retry_after_s > 0
    assert tokens_of(ended["urgent"]) == solo(engine.config, (1,), URGENT)


def test_a_pass_that_failed_says_nothing_about_what_passes_take(monkeypatch):
    engine, took = fake_engine(), []
    monkeypatch.setattr(engine._pace, "took", lambda *what: took.append(what))
    for forward_all, num in ((lambda passes: 1 / 0, 0), (engine._versions.model(0).forward_all, 1)):
        monkeypatch.setattr(engine._versions.model(0), "forward_all", forward_all)
        engine.add("a", (1, 2), SamplingParams(max_tokens=1))
        engine.step()
        assert len(took) == num


def test_who_cannot_make_it_costs_no_pass():
    engine = fake_engine(max_num_seqs=1)
    engine._pace.took(1024, 100.0)  # 0.1 s a token at the least
    engine._pace.took(1, 0.1)
    passes, now_s = seen(engine), time.monotonic()
    engine.add("late", (1,) * 12, LATER, until_s=now_s + 0.5)
    engine.add("short", (1,), LATER, until_s=now_s + 3600)
    deltas = run_all(engine)
    assert isinstance(deltas["late"][-1].cause, DeadlineExceeded)
    assert not tokens_of(deltas["late"])
    assert all("late" not in each for each in passes)
    assert tokens_of(deltas["short"]) == solo(engine.config, (1,), LATER)


@pytest.mark.parametrize(("fixed_s", "token_s"), [(0.0, 0.01), (0.05, 0.001), (0.3, 0.001), (0.0, 1e-5)])
def test_a_bounded_pass_grows_to_what_fits_and_not_beyond(fixed_s, token_s):
    pace, most_s, longest_s = Pace(1000, 0.2), 0.2, 0.0
    for step in range(60):
        size = pace.size(4)
        seconds = fixed_s + token_s * size
        longest_s = max(longest_s, seconds) if step > 20 else longest_s
        pace.took(size, seconds)
    wanted = max(4, min(1000, (most_s - fixed_s) / token_s))
    assert 0.9 * wanted - 1 <= pace.size(4) <= wanted + 1
    assert longest_s <= max(most_s, fixed_s + 4 * token_s) * 1.01


def test_a_bounded_pass_begins_small_and_a_slow_one_makes_the_next_smaller():
    pace = Pace(1000, 0.1)
    assert pace.size(2) == FIRST_TOKENS
    pace.took(32, 0.01)
    assert pace.size(2) == 64
    pace.took(64, 0.4)
    assert pace.size(2) == 16
    pace.took(3, 0.01)
    assert pace.size(2) == 16, "a pass that was not full says nothing about how long a full one is"
    assert pace.size(40) == 40, "each running sequence has its token"
    assert Pace(1000).size(2) == 1000


def test_the_least_that_a_prompt_takes_is_known_from_full_passes_and_from_the_shortest():
    pace = Pace(100)
    assert pace.least_s(1000) == 0.0
    pace.took(1, 0.05)
    assert pace.least_s(1000) == 0.05
    for _ in range(20):
        pace.took(100, 1.0)
    assert 10.0 <= pace.least_s(1000) < 10.3
    assert 0.05 <= pace.least_s(1) < 0.06


def test_a_pass_is_as_urgent_as_its_most_urgent_request_all_the_way():
    engine, found = fake_engine(), []
    model = engine._versions.model(0)
    forward_all, model.forward_all = (
        model.forward_all,
        lambda p: [found.append(model.experts.priority), forward_all(p)][1],
    )
    engine.add("later", (1,), LATER)
    engine.step()
    engine.add("urgent", (1,), URGENT)
    engine.step()
    engine.step()
    assert found == [3, -2, -2]
    header, rows = frames.request(7, forward(-2))
    limits = frames.FrameLimits(4, 1, torch.float32)
    assert frames.call_of(frames.Header.unpack(header), rows, limits, time.monotonic()).priority == -2


class Slow:
    """A shard whose first call waits until it may go on."""

    def __init__(self):
        self.order, self.entered, self.go_on = [], threading.Event(), threading.Event()

    def infer(self, call):
        self.order.append((call.priority, len(call.rows.x_RD)))
        self.entered.set()
        assert self.go_on.wait(60)
        return call.rows.x_RD

    def fetch(self, call):
        self.order.append("fetch")
        return torch.zeros(1)


def forward(priority, rows=1):
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    return Forward("a:1", 0, 1, 0, time.monotonic() + 60, Rows(torch.ones(rows, 4), ids, ids.float()), False, priority)


def test_a_shard_computes_urgent_rows_first_and_merges_equals_only():
    queue, shard = RequestQueue(Slow()), None
    shard = queue.shard
    calls = [
        forward(0),
        Fetch(0, 0, 0, time.monotonic() + 60),
        forward(9, 5),
        forward(2, 2),
        forward(-4),
        forward(2, 3),
    ]
    threads = [threading.Thread(target=queue.run, args=(call,)) for call in calls]
    threads[0].start()
    assert shard.entered.wait(60)
    for number, thread in enumerate(threads[1:], start=1):
        thread.start()
        while len(queue._waiting) < number:
            time.sleep(0.001)
    shard.go_on.set()
    for thread in threads:
        thread.join(60)
    assert shard.order == [(0, 1), (-4, 1), (2, 5), (9, 5), "fetch"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness belongs to processes")
def test_a_shard_computes_prompts_beside_answers_with_what_these_leave_of_the_cores():
    """While the one is held up, the other gets its answer; what comes back is the same."""
    seen, combiner = [], Combiner(Slow(), None, LowPriorityExecutor(IDLE))
    infer = combiner.prompts.shard.infer

    def watched(call):
        seen.append((call.priority, of_this_thread()))
        return infer(call) if call.priority == PATIENT else call.rows.x_RD

    combiner.prompts.shard.infer = watched
    prompt = threading.Thread(target=combiner.run, args=(forward(PATIENT),))
    prompt.start()
    assert combiner.prompts.shard.entered.wait(60)
    assert torch.equal(combiner.run(forward(0)), forward(0).rows.x_RD)
    combiner.prompts.shard.go_on.set()
    prompt.join(60)
    assert [priority for priority, _ in seen] == [PATIENT, 0]
    assert seen[1][1] == of_this_thread() != seen[0][1]


def test_passes_of_an_engine_that_gives_way_are_patient():
    engine, priorities = fake_engine(), []
    run = engine._runner.forward
    engine._runner.forward = lambda model, chunks: priorities.append(model.experts.priority) or run(model, chunks)
    for gives_way in (False, True):
        engine.give_way(gives_way)
        engine.add("a", (1, 2, 3), URGENT)
        run_all(engine)
    assert set(priorities[:8]) == {URGENT.priority}
    assert set(priorities[8:]) == {PATIENT}
