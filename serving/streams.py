"""Several asynchronous streams as one, which owns them: however it is left (end, error, cancellation, `aclose`), every source
has been closed when it is left.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

T = TypeVar("T")
Item = tuple[int, T | None, BaseException | None]


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(index of its stream, item) as items arrive; the first failure of any stream ends all."""
    if len(streams) == 1:  # which needs no tasks
        async with aclosing(streams[0]) as items:
            async for one in items:
                yield 0, one
        return
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
