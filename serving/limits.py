"""Admission: how many sequences the edges hold at once, and the way out.

One object for HTTP and gRPC together. Draining refuses newcomers with 503/UNAVAILABLE and waits for those inside.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from trinity.errors import InvalidRequest, Overloaded, Unavailable


class Admission:
    """Counts what is inside; a slot is given back however its holder ends."""

    def __init__(self, limit: int):
        self.limit = limit
        self.active = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def share(self) -> int:
        """The most that one request may hold: a quarter."""
        return max(1, self.limit // 4)

    def check(self, num: int) -> None:
        """Raise InvalidRequest for a request that would hold so many slots that others find none."""
        if num > self.share:
            raise InvalidRequest(
                f"{num} sequences (prompts x n) in one request; {self.share} are taken, a quarter of "
                "serve.max_concurrent_requests. Send several requests."
            )

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Raises Unavailable while draining and Overloaded when full."""
        if self.draining:
            raise Unavailable("the server is shutting down; send the request to another one, or again later")
        if self.active >= self.limit:
            raise Overloaded(f"{self.active} requests are running, as many as serve.max_concurrent_requests allows")
        self.active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= 1
            if not self.active:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse newcomers and wait for the rest; False if some were still inside after `timeout_s`. Repeatable."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
