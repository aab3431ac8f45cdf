"""Limits: how many sequences and connections the edges hold at once, and the way out.

One object for HTTP and gRPC together. Draining refuses newcomers with 503/UNAVAILABLE and waits for those inside.
"""

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from trinity.config import Client, ServeConfig
from trinity.errors import InvalidRequest, Overloaded, Unavailable

log = logging.getLogger("trinity.serving")
MOST_DESCRIPTORS, OTHER_DESCRIPTORS = 65_536, 256  # Ray's, files, and connections of one's own


def within_descriptors(config: ServeConfig) -> ServeConfig:
    """The settings with as many connections as this process has descriptors for, after it took all that it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        soft = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, max(soft, MOST_DESCRIPTORS))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = max(1, (soft - OTHER_DESCRIPTORS) // 2)  # two listeners share them
    if room < config.max_connections:
        log.warning("%d descriptors leave room for %d connections of each listener", soft, room)
    return config.model_copy(update={"max_connections": min(room, config.max_connections)})


class Admission:
    """Counts what is inside; a slot is given back however its holder ends. Each client has a share of the slots by weight;
    whoever comes with the admin key, or without one, may have all."""

    def __init__(self, config: ServeConfig):
        self.limit = config.max_concurrent_requests
        self.held: Counter[str] = Counter()
        self.draining = False
        clients = config.client_by_key.values()
        total = sum(client.weight for client in clients)
        self._shares = {client.name: client.weight / total for client in clients}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        return self.held.total()

    def most(self, client: Client) -> int:
        """Slots that the client may hold."""
        return max(1, int(self.limit * self._shares.get(client.name, 1.0)))

    def check(self, num: int, client: Client) -> None:
        """Raise InvalidRequest for a request that would hold so many slots that others find none."""
        most = max(1, min(self.limit // 4, self.most(client)))
        if num > most:
            raise InvalidRequest(
                f"{num} sequences (prompts x n) in one request; {most} are taken, at most a quarter of "
                "serve.max_concurrent_requests. Send several requests."
            )

    @contextmanager
    def slot(self, client: Client) -> Iterator[None]:
        """Raises Unavailable while draining, and Overloaded when all slots are taken or all of the client's."""
        if self.draining:
            raise Unavailable("the server is shutting down; send the request to another one, or again later")
        if self.active >= self.limit:
            raise Overloaded(f"{self.active} requests are running, as many as serve.max_concurrent_requests allows")
        if self.held[client.name] >= self.most(client):
            raise Overloaded(
                f"{self.held[client.name]} requests of client {client.name!r} are running, all its share of "
                "serve.max_concurrent_requests; wait for some, or ask for a larger weight"
            )
        self.held[client.name] += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.held[client.name] -= 1
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
