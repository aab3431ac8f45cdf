"""Lines: one stream between a gateway and an engine, for all requests of the one that the other has.

Decisions. A request is an entry in a table at either end; it has no task, call or stream of its own between them. What is asked
of the engine goes with the opening, and then one call at a time, each with all that has come up meanwhile. An engine that says
nothing for SILENT_S is lost, with all that it had from here: a machine that vanishes, or a process that is stopped, closes
no connection. Many Deltas that nobody has taken yet become one: what a slow client leaves lying is what its answer has, and
nobody else waits for it. A line that has nothing to carry for LINGER_S is closed: an engine that is to end waits for its lines.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from itertools import count, groupby
from typing import Any, Protocol

from serving.line_end import Begin, End, Message, Order, is_last
from serving.slices import Slice, whole
from trinity.engine.deltas import joined
from trinity.engine.request import Delta
from trinity.errors import EngineLost

SILENT_S, LINGER_S = 20.0, 1.0
SHORT = 1 << 16  # tokens of a prompt
MANY = 256  # items that nobody has taken: below, each stays the chunk that it would be


class Wire(Protocol):
    """Way to an engine that a line is to have. Raises EngineLost, and what ends all that is on its way."""

    def opened(self, orders: list[Order]) -> AsyncGenerator[Message, None]:
        """Messages of the engine, once there is one. Closing the generator ends the engine's end."""
        ...

    async def tell(self, orders: list[Order]) -> None: ...


class Call:
    """A request under way: what it has got and nobody has taken."""

    __slots__ = ("_items", "_slices", "_waiter")

    def __init__(self) -> None:
        self._items, self._slices = list[Any](), list[Slice]()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        if isinstance(item, Slice):
            self._slices.append(item)
            return
        if self._slices and isinstance(item, Delta):
            item, self._slices = whole(self._slices, item), []
        self._items.append(item)
        if len(self._items) % MANY == 0:
            self._items = together(self._items)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Any]:
        """All that it has got, once that is something."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return items


def together(items: list[Any]) -> list[Any]:
    """The same, with one Delta for those that follow each other with one version of the weights."""
    runs = [(kind, list(run)) for kind, run in groupby(items, _kind)]
    return [each for kind, run in runs for each in (run if kind is None else [joined(run)])]


def _kind(item: Any) -> int | None:
    return item.weights if isinstance(item, Delta) else None


def _is_short(order: Order) -> bool:
    """Say whether it may go with the opening, whose size is bounded."""
    return isinstance(order, End) or ("begun" not in order.more and len(order.asked[1]) <= SHORT)


class Line:
    """The gateway's end. Opened when it is made; over, with all that it carries, when its engine is lost, or after LINGER_S
    without anything to carry."""

    def __init__(self, wire: Wire):
        self._wire, self._orders = wire, list[Order]()
        self._calls, self._numbers = dict[int, Call](), count()
        self.is_over = self._is_open = False
        self._error: Exception = EngineLost("the engine ended the stream early")
        self._telling: asyncio.Task[None] | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self._reading = asyncio.create_task(self._read())

    async def call(self, method: str, *asked: Any, **more: Any) -> AsyncGenerator[Any, None]:
        """Items of one request: Deltas of `generate`, a Prefilled of `prefill`. Leaving it gives the request up."""
        if self.is_over:
            raise EngineLost("the line to it is closed")
        number, is_ended = next(self._numbers), False
        self._calls[number] = call = Call()
        self._order(Begin(number, method, asked, more))
        try:
            while not is_ended:
                for item in await call.take():
                    if isinstance(item, Exception):
                        is_ended = True
                        raise item.with_traceback(None)  # it may be several requests' own
                    is_ended = is_last(item)
                    yield item
        finally:
            self._leave(number, is_ended)

    def close(self, error: Exception | None = None) -> None:
        """End it and all that it carries. Repeatable."""
        self._error = error or self._error
        self.is_over = True
        self._reading.cancel()

    async def _read(self) -> None:
        with suppress(asyncio.CancelledError):
            self._error = await self._failure()
        self.is_over = True
        for pending in (self._telling, self._lingering):
            if pending is not None:
                pending.cancel()
        for call in self._calls.values():
            call.put(self._error)

    async def _failure(self) -> Exception:
        """Hand out what the engine says; -> why it says no more."""
        try:
            num = 1 if self._orders and _is_short(self._orders[0]) else 0
            first, self._orders = self._orders[:num], self._orders[num:]
            async with aclosing(self._wire.opened(first)) as messages:
                message = await anext(messages, None)  # an engine may have to be waited for
                self._is_open = True
                self._tell()
                while message is not None:
                    for number, item in message:
                        if (call := self._calls.get(number)) is not None:
                            call.put(item)
                    async with asyncio.timeout(SILENT_S):
                        message = await anext(messages, None)
        except TimeoutError:
            return EngineLost(f"it has said nothing for {SILENT_S:.0f} s")
        except Exception as error:  # all that wait hear of it
            return error
        return self._error

    def _order(self, order: Order) -> None:
        self._orders.append(order)
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        self._tell()

    def _tell(self) -> None:
        if self._is_open and self._orders and (self._telling is None or self._telling.done()):
            self._telling = asyncio.create_task(self._told())

    async def _told(self) -> None:
        try:
            while self._orders:
                orders, self._orders = self._orders, []
                await self._wire.tell(orders)
        except Exception as error:  # all that wait hear of it
            self.close(error)

    def _leave(self, number: int, is_ended: bool) -> None:
        del self._calls[number]
        if self.is_over:
            return
        if not is_ended:
            self._order(End(number))
        if not self._calls:
            self._lingering = asyncio.get_running_loop().call_later(LINGER_S, self.close)
