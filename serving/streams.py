"""Two ways to handle asynchronous streams: several into one, and what already waits into one message.

Both own the streams they are given: however the result is left (end, error, cancellation, `aclose`), every source has
been closed when it is left.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

T = TypeVar("T")
Item = tuple[int, T | None, BaseException | None]


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(index of its stream, item) as items arrive; the first failure of any stream ends all."""
    live = len(streams)
    async with _pumping(streams) as queue:
        while live:
            index, item, error = await queue.get()
            if error is None:
                yield index, item  # type: ignore[misc]
            elif isinstance(error, StopAsyncIteration):
                live -= 1
            else:
                raise error


async def batched(stream: AsyncGenerator[T, None], beat_s: float | None = None) -> AsyncGenerator[list[T], None]:
    """Lists of one or more items: the next one, and those that were waiting behind it. An empty one after `beat_s` without."""
    async with _pumping([stream]) as queue:
        error = None
        while error is None:
            entries = await _waiting(queue, beat_s)
            items = [item for _, item, failed in entries if failed is None]
            error = entries[-1][2] if entries else None
            if items or not entries:
                yield items  # type: ignore[misc]
        if not isinstance(error, StopAsyncIteration):
            raise error


async def _waiting(queue: asyncio.Queue[Item[T]], most_s: float | None) -> list[Item[T]]:
    """Entries that wait, once one does; none, if that takes longer."""
    try:
        async with asyncio.timeout(most_s):
            entries = [await queue.get()]
    except TimeoutError:
        return []
    while not queue.empty():
        entries.append(queue.get_nowait())
    return entries


@asynccontextmanager
async def _pumping(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncIterator[asyncio.Queue[Item[T]]]:
    queue: asyncio.Queue[Item[T]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    try:
        yield queue
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(index: int, stream: AsyncGenerator[T, None], queue: asyncio.Queue[Item[T]]) -> None:
    """Ends every stream with one entry that holds an exception: StopAsyncIteration for the good end."""
    try:
        async with aclosing(stream) as items:
            async for item in items:
                queue.put_nowait((index, item, None))
    except Exception as error:
        queue.put_nowait((index, None, error))
    else:
        queue.put_nowait((index, None, StopAsyncIteration()))
