"""merge: nothing lost, order kept, sources closed however the result is left."""

import asyncio
import random
from contextlib import aclosing

import pytest

from serving.streams import merge
from tests.waiting import eventually


class Source:
    def __init__(self, items, delays=(0,), error=None):
        self.items, self.delays, self.error, self.open = items, delays, error, False

    async def stream(self):
        self.open = True
        try:
            for at, item in enumerate(self.items):
                await asyncio.sleep(self.delays[at % len(self.delays)])
                yield item
            if self.error:
                raise self.error
        finally:
            self.open = False


async def test_merge_keeps_the_order_of_each_stream():
    rng = random.Random(3)
    sources = [Source(range(20), [rng.random() * 2e-3 for _ in range(7)]) for _ in range(10)]
    found = [[] for _ in sources]
    async for index, item in merge([source.stream() for source in sources]):
        found[index].append(item)
    assert found == [list(range(20))] * 10


async def test_an_error_comes_after_the_items_before_it():
    source, seen = Source([1, 2, 3], error=KeyError("gone")), []

    async def read():
        async for _, item in merge([source.stream()]):
            seen.append(item)

    with pytest.raises(KeyError):
        await read()
    assert (seen, source.open) == ([1, 2, 3], False)


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_sources_are_closed_when_the_reader_leaves(how):
    sources = [Source(range(1000), [1e-3]) for _ in range(5)]
    stream = merge([source.stream() for source in sources])

    async def read():
        async with aclosing(stream):
            async for _ in stream:
                if how == "close":
                    return

    task = asyncio.create_task(read())
    await eventually(lambda: task.done() or all(source.open for source in sources))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not any(source.open for source in sources)
    assert len(asyncio.all_tasks()) == 1
