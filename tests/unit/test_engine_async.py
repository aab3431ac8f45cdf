"""The engine behind async streams: cancellation, deadlines, failures, draining; nothing hangs, nothing leaks."""

import asyncio
import sys
import threading
import time

import pytest
import torch

from tests.unit.engine_fakes import FakeAfmoe, FakeSource, fake_config, fake_engine, solo
from tests.waiting import sooner_than
from trinity.engine import async_engine
from trinity.engine.async_engine import AsyncEngine
from trinity.engine.request import SamplingParams
from trinity.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    TrinityError,
    Unavailable,
)
from trinity.utils.niceness import of_this_thread

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)


class Gate(FakeAfmoe):
    """Passes wait for the gate, and fail when told to."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def forward(self, ids_T, positions_T, attend):
        self.priority = of_this_thread()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return super().forward(ids_T, positions_T, attend)


@pytest.fixture
def model():
    return Gate(fake_config())


@pytest.fixture
def engine(model):
    made = AsyncEngine(fake_engine(model=model, max_num_seqs=8, max_num_waiting=40))
    yield made
    model.gate.set()
    made.close()


async def read(stream) -> tuple[int, ...]:
    return tuple([t async for delta in stream for t in delta.token_ids])


async def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.005)


def all_free(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return stats.num_free_blocks == stats.num_total_blocks and not (stats.num_running or stats.num_waiting)


async def test_many_streams_at_once(engine):
    prompts = [(1 + i % 30, 5, i % 7) for i in range(40)]
    got = await asyncio.gather(*(read(engine.generate(str(i), p, GREEDY)) for i, p in enumerate(prompts)))
    assert got == [solo(fake_config(), p, GREEDY) for p in prompts]
    assert all_free(engine)
    assert engine.num_open == 0


async def test_two_event_loops(engine):
    other: list = []
    thread = threading.Thread(target=lambda: other.append(asyncio.run(read(engine.generate("b", (4, 5), GREEDY)))))
    thread.start()
    assert await read(engine.generate("a", (1, 2), GREEDY)) == solo(fake_config(), (1, 2), GREEDY)
    await until(lambda: bool(other))
    thread.join()
    assert other == [solo(fake_config(), (4, 5), GREEDY)]


@pytest.mark.parametrize(("prompt", "error"), [([], InvalidRequest), ([-1], InvalidRequest), ([1] * 64, PromptTooLong)])
async def test_bad_requests_raise_at_once(engine, prompt, error):
    with pytest.raises(error):
        await read(engine.generate("a", prompt, GREEDY))
    assert await read(engine.generate("a", (1,), GREEDY)) == solo(fake_config(), (1,), GREEDY)


async def test_a_full_queue_raises_and_the_others_finish(engine, model):
    model.gate.clear()
    first = asyncio.create_task(read(engine.generate("first", (1,), GREEDY)))
    await until(lambda: engine.stats().num_running == 1)
    tasks = [asyncio.create_task(read(engine.generate(str(i), (1,), GREEDY))) for i in range(50)]
    await asyncio.sleep(0.05)
    model.gate.set()
    results = await asyncio.gather(first, *tasks, return_exceptions=True)
    refused = [r for r in results if isinstance(r, Overloaded)]
    assert len(refused) == 10
    assert all(r.retry_after_s for r in refused)
    assert [r for r in results if not isinstance(r, Overloaded)] == [solo(fake_config(), (1,), GREEDY)] * 41


async def test_leaving_frees_the_cache(engine):
    """200 clients leave after two tokens: by cancellation, by closing the iterator, by breaking out."""

    async def leave(i: int) -> None:
        stream = engine.generate(str(i), (1, 2, 3), LONG)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 2 and i % 3 == 0:
                break
            if seen == 2 and i % 3 == 1:
                await stream.aclose()
            if seen == 2 and i % 3 == 2:
                raise asyncio.CancelledError
        await stream.aclose()

    for start in range(0, 200, 40):
        await asyncio.gather(*(leave(i) for i in range(start, start + 40)), return_exceptions=True)
    await until(lambda: all_free(engine))
    assert engine.num_open == 0
    assert not engine._routes
    engine._engine.check()


async def test_cancelled_while_waiting_for_the_first_token(engine, model):
    model.gate.clear()
    tasks = [asyncio.create_task(read(engine.generate(str(i), (1,), LONG))) for i in range(30)]
    await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True))
    model.gate.set()
    await until(lambda: all_free(engine))
    assert not engine._routes


async def test_an_id_can_be_used_again_after_leaving(engine, model):
    """The deltas of the first must not reach the second, however quickly it follows."""
    for _ in range(20):
        first = engine.generate("same", (1, 2, 3), LONG)
        await anext(first)
        await first.aclose()
        assert await read(engine.generate("same", (4, 5), GREEDY)) == solo(fake_config(), (4, 5), GREEDY)
    assert all_free(engine)


async def test_an_id_in_use_is_refused_and_the_first_goes_on(engine, model):
    model.gate.clear()
    first = asyncio.create_task(read(engine.generate("same", (1, 2), GREEDY)))
    await until(lambda: not all_free(engine))
    second = asyncio.create_task(read(engine.generate("same", (4, 5), GREEDY)))
    await asyncio.sleep(0.05)
    model.gate.set()
    with pytest.raises(InvalidRequest, match="in use"):
        await second
    assert await first == solo(fake_config(), (1, 2), GREEDY)


async def test_deadline_while_the_model_hangs(engine, model):
    model.gate.clear()
    with sooner_than(30), pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
        await read(engine.generate("a", (1,), LONG, deadline_s=0.1))
    model.gate.set()
    await until(lambda: all_free(engine))


@pytest.mark.parametrize("deadline_s", [0.0, -1.0])
async def test_a_deadline_that_has_passed(engine, model, deadline_s):
    model.gate.clear()
    with pytest.raises(DeadlineExceeded):
        await read(engine.generate("a", (1,), LONG, deadline_s=deadline_s))
    model.gate.set()
    await until(lambda: all_free(engine))


async def test_a_deadline_that_is_met_leaves_no_timer(engine):
    assert len(await read(engine.generate("a", (1,), GREEDY, deadline_s=30.0))) == 8


async def test_a_failed_pass_raises_its_error_and_the_engine_lives_on(engine, model):
    model.error = Unavailable("shard-0 is away", retry_after_s=2.0)
    with pytest.raises(Unavailable, match="shard-0 is away") as caught:
        await read(engine.generate("a", (1,), GREEDY))
    assert caught.value.retry_after_s == 2.0
    model.error = ZeroDivisionError("a bug with /a/path")
    with pytest.raises(TrinityError, match="internal error") as caught:
        await read(engine.generate("b", (1,), GREEDY))
    assert "/a/path" not in str(caught.value)
    model.error = None
    assert await read(engine.generate("c", (1,), GREEDY)) == solo(fake_config(), (1,), GREEDY)
    assert engine.healthy


async def test_drain_lets_the_open_ones_finish_and_refuses_new_ones(engine, model):
    model.gate.clear()
    tasks = [asyncio.create_task(read(engine.generate(str(i), (1,), GREEDY))) for i in range(20)]
    await until(lambda: engine.num_open == 20)
    assert not await engine.drain(0.05)
    assert not engine.healthy
    with pytest.raises(Unavailable, match="draining"):
        await read(engine.generate("new", (1,), GREEDY))
    model.gate.set()
    assert await engine.drain(10)
    assert await asyncio.gather(*tasks) == [solo(fake_config(), (1,), GREEDY)] * 20


async def test_close_ends_open_streams_and_is_final(engine, model):
    stream = engine.generate("a", (1,), LONG)
    await anext(stream)
    engine.close()
    engine.close()
    with pytest.raises(Unavailable):
        await read(stream)
    with pytest.raises(Unavailable, match="stopped"):
        await read(engine.generate("b", (1,), GREEDY))
    assert not engine.healthy


async def test_a_bug_in_the_engine_leaves_nobody_waiting(engine, monkeypatch):
    """Not in a forward pass, which is expected, but in the loop itself."""

    def broken():
        raise ZeroDivisionError

    stream = engine.generate("a", (1,), LONG)
    await anext(stream)
    monkeypatch.setattr(engine._engine, "step", broken)
    with pytest.raises(Unavailable, match="stopped"):
        await read(stream)
    assert not engine.healthy


async def test_idle_costs_nothing(engine):
    """The thread sleeps on its condition: no pass, no command, no processor time."""
    await read(engine.generate("a", (1,), GREEDY))
    threads = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - threads < 0.1


async def test_the_loop_thread_is_never_blocked_by_a_pass(engine, model):
    """While a pass hangs, requests are taken and given up without waiting for it."""
    model.gate.clear()
    task = asyncio.create_task(read(engine.generate("a", (1,), GREEDY)))
    await until(lambda: engine.stats().num_running == 1)
    with pytest.raises(DeadlineExceeded):
        await read(engine.generate("b", (1,), GREEDY, deadline_s=0.02))
    model.gate.set()
    assert await task == solo(fake_config(), (1,), GREEDY)


async def test_thousand_streams_leave(engine):
    """F15 in small: nothing of a thousand short-lived clients remains."""
    wide = AsyncEngine(fake_engine(max_num_seqs=8, max_num_waiting=2000))
    before = threading.active_count()

    async def client(i: int) -> None:
        stream = wide.generate(str(i), (1 + i % 30,), LONG)
        if i % 2:
            await anext(stream)
        await stream.aclose()

    await asyncio.gather(*(client(i) for i in range(500)))
    tasks = [asyncio.create_task(read(wide.generate(str(i), (1 + i % 30,), LONG))) for i in range(500)]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: all_free(wide))
    assert wide.num_open == 0
    assert not wide._routes
    assert threading.active_count() == before
    wide.close()


async def test_the_newest_version_is_known_without_requests_and_a_stream_may_span_several(monkeypatch):
    monkeypatch.setattr(async_engine, "IDLE_S", 0.01)
    source = FakeSource(fake_config())
    engine = AsyncEngine(fake_engine(source=source))
    source.commit()
    await until(lambda: engine.version == 2)
    versions = []
    newest = source.newest
    source.newest = lambda: source.commit() and newest()
    async for delta in engine.generate("a", (1, 2, 3), GREEDY):
        versions.append(delta.version)
        first = delta.first_version
    engine.close()
    assert versions == list(range(first, first + 8))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness belongs to processes")
async def test_whoever_gives_way_computes_on_threads_that_do_and_takes_it_back(engine, model):
    seen = {}
    for gives_way in (False, True, False):
        engine.give_way(gives_way)
        assert await read(engine.generate("a", (1, 5, 9), GREEDY)) == solo(model.config, (1, 5, 9), GREEDY)
        seen.setdefault(gives_way, set()).add(model.priority)
    assert seen[False] == {of_this_thread()}
    assert seen[True].isdisjoint(seen[False])


def test_inference_mode_does_not_leak(engine):
    asyncio.run(read(engine.generate("a", (1,), GREEDY)))
    assert not torch.is_inference_mode_enabled()
