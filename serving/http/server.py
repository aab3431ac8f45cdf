"""The HTTP listener: uvicorn inside somebody else's event loop, with bounds that uvicorn leaves open.

Decisions: a connection that has not sent a complete request head within HEAD_TIMEOUT_S is closed (slowloris); heads beyond
MAX_HEAD_BYTES (431) and malformed ones (400) are answered in OpenAI's shape; for a connection over serve.max_connections, or
over an address's share of them, the oldest that asks nothing is closed, so that others find descriptors. The pure-Python h11
parser, because it bounds the head; the time per request is spent elsewhere. It takes 20 microseconds for each piece of a body,
however small: it gets FED_BYTES at a time, between which others have their turn, and a body of crumbs is refused. No signal
handlers: the process belongs to Ray.
"""

import asyncio
import json
import socket
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.addresses import bracketed
from serving.errors import openai_body
from serving.http.edge import MAX_HEAD_BYTES, WHEN_GONE
from trinity.config import ServeConfig
from trinity.errors import ConfigError, InvalidRequest
from trinity.utils.origins import origin_of

HEAD_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 15
FED_BYTES = 4 << 10
FEWEST_CRUMBS, CRUMB_BYTES = 256, 16  # a body in more pieces than that, of fewer bytes on average, is refused
MOST_HEAD_LINES = 256
TICK_S, LOOK_S = 1.0, 0.005


class Connections:
    """A listener's connections, by address, in the order in which they came or were last answered."""

    def __init__(self, most: int, most_per_peer: int):
        self.most, self.most_per_peer, self.num = most, most_per_peer, 0
        self.by_peer: dict[str, dict[BoundedProtocol, None]] = {}

    def enter(self, peer: str, connection: "BoundedProtocol") -> bool:
        """Say whether there is room for one more; of the address itself, or of those that most come from, whoever has asked
        nothing for longest makes some."""
        own, crowds = self.by_peer.get(peer, {}), list[dict[BoundedProtocol, None]]()
        if len(own) >= self.most_per_peer:
            crowds = [own]
        elif self.num >= self.most:
            crowds = sorted(self.by_peer.values(), key=len, reverse=True)
        if crowds:
            idle = next((one for crowd in crowds for one in crowd if one.is_idle), None)
            if idle is None:
                return False
            idle.end()
        self.by_peer.setdefault(peer, {})[connection] = None
        self.num += 1
        return True

    def answered(self, peer: str, connection: "BoundedProtocol") -> None:
        if connection in (crowd := self.by_peer.get(peer, {})):
            del crowd[connection]
            crowd[connection] = None

    def leave(self, peer: str, connection: "BoundedProtocol") -> None:
        """Harmless when repeated."""
        crowd = self.by_peer.get(peer, {})
        if connection in crowd:
            del crowd[connection]
            self.num -= 1
            if not crowd:
                del self.by_peer[peer]


class Wholesome(h11.Connection):
    """A connection without heads of thousands of lines, and without bodies in crumbs: 12 MB of chunks of a byte each would be
    parsed for seconds."""

    status = 400  # of what is refused
    _num_lines = _num_pieces = _num_bytes = 0

    def receive_data(self, data: bytes) -> None:
        super().receive_data(data)
        if self.their_state is h11.IDLE:
            heads = data.split(b"\r\n\r\n")
            self._num_lines = max(self._num_lines + heads[0].count(b"\n"), *(head.count(b"\n") for head in heads))
        else:
            self._num_lines = 0

    def next_event(self) -> Any:
        try:
            if self._num_lines > MOST_HEAD_LINES:
                raise h11.RemoteProtocolError("the head has too many lines", error_status_hint=431)
            event = super().next_event()
            self._count(event)
        except h11.RemoteProtocolError as error:
            self.status = error.error_status_hint
            raise
        return event

    def _count(self, event: Any) -> None:
        if isinstance(event, h11.Request):
            self._num_lines = self._num_pieces = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_pieces, self._num_bytes = self._num_pieces + 1, self._num_bytes + len(event.data)
            if self._num_pieces > FEWEST_CRUMBS and self._num_bytes < CRUMB_BYTES * self._num_pieces:
                raise h11.RemoteProtocolError("the body comes in crumbs")


class BoundedProtocol(H11Protocol):
    """One connection. A timer runs whenever no request is being answered."""

    others: Connections  # of the same listener
    peer: str | None = None
    _head_timer: asyncio.TimerHandle | None = None
    _unfed, _is_feeding = b"", False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conn: Wholesome = Wholesome(h11.SERVER, MAX_HEAD_BYTES)
        self.access_log = False  # uvicorn turns it on where the root logger has handlers, and logs query strings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = origin_of(str((transport.get_extra_info("peername") or ("",))[0]))
        if not self.others.enter(peer, self):
            transport.abort()
            return
        self.peer = peer
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._unfed += data
        if not self._is_feeding:
            self._feed()

    def _feed(self) -> None:
        """Have a part of what has come parsed, and the next one after everybody else's turn."""
        part, self._unfed = self._unfed[:FED_BYTES], self._unfed[FED_BYTES:]
        super().data_received(part)
        self._is_feeding = bool(self._unfed) and not self.transport.is_closing()
        if self._is_feeding:
            self.transport.pause_reading()
            self.loop.call_soon(self._feed)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        assert self.peer is not None
        self.others.answered(self.peer, self)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.peer is None:  # it was never let in
            return
        self.others.leave(self.peer, self)
        self._disarm()
        super().connection_lost(exc)
        leave: Any = (self.scope or {}).get(WHEN_GONE)
        if leave is not None:
            leave()

    def send_400_response(self, msg: str) -> None:
        """Malformed or oversized head: answer in the API's own shape and close."""
        body = json.dumps(
            openai_body(
                InvalidRequest(
                    f"malformed HTTP, a head over {MAX_HEAD_BYTES} bytes or {MOST_HEAD_LINES} lines, or a body in crumbs"
                )
            )
        ).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=self.conn.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _arm(self) -> None:
        self._disarm()
        wait_s = max(HEAD_TIMEOUT_S, self.config.timeout_keep_alive)
        self._head_timer = self.loop.call_later(wait_s, self._close_if_idle)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()

    @property
    def is_idle(self) -> bool:
        """True before a request has come, and when the last one is answered."""
        return (self.cycle is None or self.cycle.response_complete) and not self._unfed

    def end(self) -> None:
        """Make room at once: to close it properly would wait for a peer that may not read."""
        assert self.peer is not None
        self.others.leave(self.peer, self)
        self.transport.abort()

    def _close_if_idle(self) -> None:
        if self.is_idle:
            self.transport.close()


class Listener(uvicorn.Server):
    """uvicorn's own looks ten times a second whether it shall end, and waits tenths of a second for what ends at once."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.is_to_end = asyncio.Event()

    async def main_loop(self) -> None:
        while not self.is_to_end.is_set():
            await self.on_tick(0)  # the date in answers
            with suppress(TimeoutError):
                await asyncio.wait_for(self.is_to_end.wait(), TICK_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(LOOK_S)  # for whom the listener has just let in
        while (self.server_state.connections or self.server_state.tasks) and not self.force_exit:
            await asyncio.sleep(LOOK_S)


class HttpServer:
    """`bind` takes a port, `start` serves in the background; `stop` closes the listener and lets running requests end."""

    def __init__(self, app: object, config: ServeConfig):
        self._config = config
        others = Connections(config.max_connections, config.max_connections_per_peer)
        self.server = Listener(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                http=type("Protocol", (BoundedProtocol,), {"others": others}),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nothing here asks where a request came from
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_keep_alive=KEEP_ALIVE_S,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
            )
        )
        self.port = 0
        self._listening: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        assert self._listening is not None, "bind comes first"
        self._task = asyncio.create_task(self.server._serve([self._listening]))  # `serve` would take over the signals
        while not self.server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0)

    def bind(self, port: int) -> None:
        """Take the port; 0: any. Raises ConfigError where it is taken."""
        host = self._config.host
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            made = socket.create_server(address[:2], family=family, backlog=2048)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # plain asyncio leaves it to us: 40 ms an answer
            self._listening, self.port = made, made.getsockname()[1]
        except OSError as error:
            where = f"{bracketed(host)}:{port}"
            raise ConfigError(
                f"HTTP cannot listen on {where}: {error.strerror}; choose another serve.http_port"
            ) from None

    def unbind(self) -> None:
        """Give a port back that was taken and not served on."""
        if self._listening is not None:
            self._listening.close()

    async def stop(self, grace_s: float) -> None:
        """Idle connections close at once; requests still running after `grace_s` are cut."""
        if self._task is None:
            return
        self.server.is_to_end.set()
        done, _ = await asyncio.wait((self._task,), timeout=grace_s)
        if not done:
            self.server.force_exit = True
            await asyncio.wait((self._task,), timeout=1)
