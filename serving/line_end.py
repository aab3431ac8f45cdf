"""The engine's end of a line (serving/lines.py): the requests that one gateway has here, and what they have got.

Decisions: a request is an entry in a table. What all have got since the last message is the next one: there is one for a pass,
not for a token. While there is nothing, an empty one says every BEAT_S that the engine is there. A Delta that would be
larger than a message may be goes in slices.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from serving.slices import MOST_BYTES, sliced, weight
from trinity.engine.request import Delta

BEAT_S = 5.0


class Begin(NamedTuple):
    """Order to begin a request, under a number that the gateway has chosen."""

    number: int
    method: str  # generate or prefill
    asked: tuple[Any, ...]
    more: dict[str, Any]


class End(NamedTuple):
    """Order to give a request up."""

    number: int


Order = Begin | End
Message = list[tuple[int, Any]]  # what requests have got, by their numbers


class Begun(Protocol):
    """A request of the engine's, to whoever began it."""

    def close(self) -> None: ...


class Engine(Protocol):
    """Part of AsyncEngine that a line needs."""

    def submit(self, put: Callable[[Any], None], *asked: Any, **more: Any) -> Begun: ...

    async def prefill(self, *asked: Any) -> Any: ...


class LineEnd:
    """Owned by the event loop in which it is made; only `tell` may be called from elsewhere."""

    def __init__(self, engine: Engine):
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._begun = dict[int, Begun]()
        self._waiting: deque[tuple[int, Any]] = deque()
        self._has_some = asyncio.Event()

    def tell(self, orders: Sequence[Order]) -> None:
        self._loop.call_soon_threadsafe(self.follow, orders)

    def follow(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if isinstance(order, Begin):
                self._begin(order)
            elif (begun := self._begun.pop(order.number, None)) is not None:
                begun.close()

    async def messages(self) -> AsyncGenerator[Message, None]:
        """Messages for ever; when they are left, the requests end."""
        try:
            while True:
                yield await self._next()
        finally:
            self.follow([End(number) for number in self._begun])

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(BEAT_S):
                await self._has_some.wait()
        except TimeoutError:
            return []
        message, size = Message(), 0
        while self._waiting and (not message or size + weight(self._waiting[0][1]) <= MOST_BYTES):
            message.append(self._waiting.popleft())
            size += weight(message[-1][1])
        if not self._waiting:
            self._has_some.clear()
        return message

    def _begin(self, order: Begin) -> None:
        put = partial(self._put, order.number)
        try:
            if order.method == "prefill":
                self._begun[order.number] = Prefilling(self._engine.prefill(*order.asked), put)
            else:
                self._begun[order.number] = self._engine.submit(put, *order.asked, **order.more)
        except Exception as error:  # which is the gateway's to hear of
            put(error)

    def _put(self, number: int, item: Any) -> None:
        self._waiting += ((number, part) for part in sliced(item))
        self._has_some.set()
        if is_last(item):
            self._begun.pop(number, None)


class Prefilling:
    """A prompt that is being computed."""

    def __init__(self, work: Coroutine[Any, Any, Any], put: Callable[[Any], None]):
        self._task = asyncio.create_task(self._run(work, put))

    def close(self) -> None:
        self._task.cancel()

    async def _run(self, work: Coroutine[Any, Any, Any], put: Callable[[Any], None]) -> None:
        try:
            put(await work)
        except Exception as error:  # which is the gateway's to hear of
            put(error)


def is_last(item: Any) -> bool:
    """Say whether a request gets nothing after it."""
    return not isinstance(item, Delta) or item.finish_reason is not None
