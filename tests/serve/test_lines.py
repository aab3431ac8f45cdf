"""A line between a gateway and an engine: all requests by one stream, each as if it had the engine for itself."""

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
from fake import FakeEngine, HeldEngine

from serving import line_end, lines, slices
from serving.line_end import LineEnd
from serving.lines import Line
from tests.waiting import eventually
from trinity.engine.prompt_logprobs import PromptLogprobs
from trinity.engine.request import Delta, SamplingParams
from trinity.errors import EngineLost, Overloaded, Unavailable

TEN = SamplingParams(max_tokens=10)


class Wire:
    """Way to an engine of this process. Each message and each call of orders takes a turn of the loop."""

    def __init__(self, engine, is_slow=False):
        self.engine, self.is_slow = engine, is_slow
        self.messages, self.orders, self.is_closed, self.is_silent = [], [], False, False
        self.error, self.may_open = None, asyncio.Event()
        self.may_open.set()

    async def opened(self, orders):
        self.orders.append(orders)
        await self.may_open.wait()
        self.end = LineEnd(self.engine)
        self.end.follow(orders)
        yield []
        try:
            async with aclosing(self.end.messages()) as messages:
                async for message in messages:
                    while self.is_silent:
                        await asyncio.sleep(0.01)
                    if self.error:
                        raise self.error
                    self.messages.append(message)
                    yield message
        finally:
            self.is_closed = True

    async def tell(self, orders):
        self.orders.append(orders)
        await asyncio.sleep(0.01 if self.is_slow else 0)
        self.end.tell(orders)


def ask(line, name, params=TEN, prompt=(3, 4, 5), **more):
    return line.call("generate", name, list(prompt), params, 60.0, **more)


async def answer(line, name, params=TEN, **more):
    return [delta async for delta in ask(line, name, params, **more)]


def tokens(deltas):
    return [token for delta in deltas for token in delta.token_ids]


async def test_many_requests_take_one_stream_and_each_gets_its_own():
    engine, rng = FakeEngine(delay_s=0.001), random.Random(0)
    line, prompts = Line(wire := Wire(engine)), [[rng.randrange(200) for _ in range(4)] for _ in range(50)]
    found = await asyncio.gather(*(answer(line, f"{n}", prompt=prompt) for n, prompt in enumerate(prompts)))
    assert [tokens(deltas) for deltas in found] == [[prompt[at % 4] for at in range(10)] for prompt in prompts]
    assert all(deltas[-1].finish_reason == "length" for deltas in found)
    assert len(wire.messages) < 100, "one message has what all of them have got"
    assert len(wire.orders) <= 3, "one call has what all of them ask for"
    assert not line._calls
    assert not wire.end._begun


async def test_whoever_leaves_gives_up_its_own_request_alone():
    engine = HeldEngine(num_free=1)
    line = Line(Wire(engine))
    streams = [ask(line, f"{n}") for n in range(4)]
    for stream in streams:
        assert (await anext(stream)).num_generated_tokens == 1
    for stream in streams[:2]:
        await stream.aclose()
    await eventually(lambda: engine.held == {"2", "3"})
    reading = asyncio.create_task(anext(streams[2]))
    await asyncio.sleep(0)
    reading.cancel()
    await eventually(lambda: engine.held == {"3"})
    engine.go.set()
    assert len([delta async for delta in streams[3]]) >= 1


@pytest.mark.parametrize("error", [Overloaded("full", retry_after_s=2.5), RuntimeError("a fault")])
async def test_an_error_is_its_requests_own(error):
    line = Line(Wire(engine := FakeEngine(fail_after=3, error=error)))
    bad = ask(line, "bad")
    assert [(await anext(bad)).token_ids for _ in range(1)]
    with pytest.raises(type(error)):
        async for _ in bad:
            pass
    engine.fail_after = None
    assert len(tokens(await answer(line, "good"))) == 10


class Twice(FakeEngine):
    """One whose weights change before the last token."""

    def _delta(self, *asked):
        delta = super()._delta(*asked)
        return replace(delta, version=9 if delta.finish_reason else 7)


@pytest.mark.parametrize(("most", "is_joined"), [(16, True), (1000, False)])
async def test_many_that_nobody_takes_become_one_for_each_version(monkeypatch, most, is_joined):
    """A slow client's answer lies there in few Deltas, and holds up nobody; of a few each stays the chunk that it is."""
    monkeypatch.setattr(lines, "MANY", most)
    line = Line(wire := Wire(Twice()))
    slow = ask(line, "slow", SamplingParams(max_tokens=100))
    first = await anext(slow)
    await eventually(lambda: not wire.end._begun)
    quick = await answer(line, "quick", SamplingParams(max_tokens=100))
    rest = [delta async for delta in slow]
    assert len(rest) <= most if is_joined else len(rest) == 99
    assert [rest[0].version, rest[-1].version] == [7, 9]
    assert tokens([first, *rest]) == tokens(quick)
    assert "".join(delta.text for delta in [first, *rest]) == "".join(delta.text for delta in quick)


async def test_a_lost_engine_is_told_to_all_that_wait():
    line = Line(wire := Wire(engine := HeldEngine()))
    found = [asyncio.create_task(answer(line, f"{n}")) for n in range(5)]
    await eventually(lambda: len(engine.held) == 5)
    wire.error = EngineLost("its process is gone")
    engine.go.set()
    for task in found:
        with pytest.raises(EngineLost):
            await task
    assert line.is_over
    await eventually(lambda: not engine.held)
    with pytest.raises(EngineLost):
        await answer(line, "late")


async def test_an_engine_that_falls_silent_is_lost_and_one_that_is_waited_for_is_not(monkeypatch):
    monkeypatch.setattr(lines, "SILENT_S", 0.2)
    monkeypatch.setattr(line_end, "BEAT_S", 0.05)
    wire = Wire(HeldEngine(num_free=1))
    wire.may_open.clear()
    line = Line(wire)
    stream = ask(line, "a")
    asyncio.get_running_loop().call_later(0.4, wire.may_open.set)
    assert (await anext(stream)).num_generated_tokens == 1
    await eventually(lambda: len(wire.messages) > 8)  # beats, over more than SILENT_S
    wire.is_silent = True
    with pytest.raises(EngineLost, match="it has said nothing for"):
        await anext(stream)
    assert wire.is_closed


async def test_an_engine_that_cannot_be_told_is_lost():
    line = Line(wire := Wire(HeldEngine()))
    first = asyncio.create_task(answer(line, "a"))
    await eventually(lambda: line._is_open)

    async def tell(orders):
        raise Unavailable("no")

    wire.tell = tell
    second = asyncio.create_task(answer(line, "b"))
    for task in (first, second):
        with pytest.raises(Unavailable):
            await task


async def test_a_line_without_requests_is_closed(monkeypatch):
    monkeypatch.setattr(lines, "LINGER_S", 0.05)
    line = Line(wire := Wire(FakeEngine()))
    await answer(line, "a")
    assert not line.is_over
    await answer(line, "b")
    await eventually(lambda: wire.is_closed)
    assert line.is_over


async def test_orders_that_come_up_meanwhile_go_together():
    wire = Wire(FakeEngine(), is_slow=True)
    wire.may_open.clear()
    line = Line(wire)
    found = [
        asyncio.create_task(answer(line, "first")),
        *(asyncio.create_task(answer(line, f"{n}")) for n in range(30)),
    ]
    await eventually(lambda: len(line._calls) == 31)
    wire.may_open.set()
    await asyncio.gather(*found)
    assert [len(orders) for orders in wire.orders] == [0, 31]


async def test_a_prompt_is_computed_by_the_same_line():
    line = Line(Wire(FakeEngine()))
    async with aclosing(line.call("prefill", "p", [1, 2])) as found:
        assert [item async for item in found] == ["blocks of p"]


def scored(num, num_top=20):
    scores = PromptLogprobs.empty(list(range(num)), num_top)
    scores.top_ids_SN[:] = np.arange(num - 1)[:, None] + np.arange(num_top)
    return scores


@pytest.mark.parametrize("num", [1, 9, 5000])
async def test_what_is_large_goes_in_slices(monkeypatch, num):
    """By a line whose messages are small: none is over the most, and nothing is lost."""
    monkeypatch.setattr(slices, "MOST_BYTES", 4096)
    monkeypatch.setattr(line_end, "MOST_BYTES", 4096)
    experts_TLK = np.arange(num * 6, dtype=np.int16).reshape(num, 3, 2)
    delta = Delta("x", "text", (1,), finish_reason="stop", experts_TLK=experts_TLK, prompt_logprobs=scored(num))

    class Told(FakeEngine):
        async def generate(self, *asked):
            yield replace(delta, finish_reason=None, version=1)
            yield delta

    line = Line(wire := Wire(Told()))
    first, last = [item async for item in line.call("generate", "x", [1])]
    for found in (first, last):
        assert np.array_equal(found.experts_TLK, experts_TLK)
        for name in slices.SCORES:
            np.testing.assert_array_equal(getattr(found.prompt_logprobs, name), getattr(delta.prompt_logprobs, name))
    assert max(sum(slices.weight(item) for _, item in message) for message in wire.messages) <= 2 * 4096
