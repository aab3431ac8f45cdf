"""A small TCP balancer, as HAProxy or a cloud's is one: new connections go to those gateways whose /ready says that they are.

Connections are handed out in turn; one that is under way ends with its gateway, as it does behind a real one.
"""

import asyncio
import itertools
from contextlib import suppress
from urllib.parse import urlsplit

import httpx

INTERVAL_S = 0.2


class Balancer:
    """`async with Balancer(urls) as balancer`; clients ask `balancer.url`."""

    def __init__(self, urls):
        self.ready = dict.fromkeys(urls, True)
        self.num_by_url = dict.fromkeys(urls, 0)
        self._turns, self._pipes, self._news = itertools.count(), set(), asyncio.Event()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._asking = asyncio.create_task(self._ask())
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *error):
        self._server.close()
        for task in (self._asking, *self._pipes):
            task.cancel()
        await asyncio.gather(self._asking, *self._pipes, return_exceptions=True)

    async def notices(self, url, ready):
        """Wait until it has seen the gateway in that state."""
        while self.ready[url] is not ready:
            await self._news.wait()

    async def _ask(self):
        async with httpx.AsyncClient(timeout=5, limits=httpx.Limits(max_keepalive_connections=0)) as http:
            while True:
                for url in self.ready:
                    self.ready[url] = await is_ready(http, url)
                self._news.set()
                self._news = asyncio.Event()
                await asyncio.sleep(INTERVAL_S)

    async def _serve(self, reader, writer):
        for url in self._in_turn():
            with suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection(*urlsplit(url).netloc.split(":"))
                self.num_by_url[url] += 1
                self._pipe(reader, far_writer)
                self._pipe(far_reader, writer)
                return
        writer.transport.abort()

    def _in_turn(self):
        """Those that are ready, the next one first; the others are tried when it does not let us in."""
        found = [url for url, ready in self.ready.items() if ready]
        first = next(self._turns) % max(1, len(found))
        return found[first:] + found[:first]

    def _pipe(self, reader, writer):
        self._pipes.add(task := asyncio.create_task(copy(reader, writer)))
        task.add_done_callback(self._pipes.discard)


async def is_ready(http, url):
    try:
        return (await http.get(f"{url}/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def copy(reader, writer):
    """Pass on what comes, and its end as it was: one that breaks off breaks the other side off."""
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()
    except OSError:
        writer.transport.abort()
