"""The ASGI edge in front of every route: key, size, time, disconnects and errors, each in exactly one place.

Decisions: the key is checked before a byte of the body is read, and for unknown paths too. The whole body is read here,
under a limit in bytes and in seconds, so that routes see complete bytes. A client that goes away cancels its route,
which closes its streams and frees its KV blocks. Prompts and keys are
never logged: a line says id, method, path, status and milliseconds.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from serving.access import ASKS, Access, check_access, check_host, only, sent_key
from serving.errors import RouteError, anthropic_body, http_headers, http_status, openai_body, to_typed
from serving.frontend import Frontend, new_request_id
from serving.http.cors import answer_headers, preflight
from serving.tracing import TRACEPARENT
from trinity.errors import DeadlineExceeded, InvalidRequest, RequestTooLarge

log = logging.getLogger("trinity.serving")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
REQUEST_ID = "trinity.request_id"
CLIENT_GONE = 499
ANTHROPIC = "/v1/messages"  # and what is below it
WHEN_GONE = "trinity.when_gone"  # in a scope: what its listener calls when the connection is lost
MAX_HEAD_BYTES = 32 << 10
BODY_TIMEOUT_S = 30.0
DISCARD_S, DISCARD_BYTES = 1.0, 16 << 20  # of a body too large, read so that its sender gets to see the answer
SLOW_READER_S = 30.0  # beyond request_timeout_s, for a client that does not read what it asked for


class ClientGone(Exception):
    """Error when nobody is left to answer."""


class Edge:
    """Wraps an ASGI app. `access` says what paths need; those that it does not know need the key."""

    def __init__(self, app: App, front: Frontend, access: Mapping[str, Access]):
        self.app, self.front, self.config, self.access = app, front, front.config, access

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await HttpExchange(self, scope, receive, send).run()
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})


class Leaving:
    """Cancels an exchange when its client is gone: no task has to wait for that."""

    __slots__ = ("_task", "is_gone")

    def __init__(self, task: asyncio.Task[Any]):
        self._task, self.is_gone = task, False

    def __call__(self) -> None:
        self.is_gone = True
        self._task.cancel()


class HttpExchange:
    """One HTTP request and its answer."""

    def __init__(self, edge: Edge, scope: Message, receive: Receive, send: Send):
        self.edge, self.scope, self._receive, self._send = edge, scope, receive, send
        self.id = scope[REQUEST_ID] = new_request_id()
        self.status: int | None = None
        self.complete = self.has_body = False
        self.headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in scope["headers"]]

    async def run(self) -> None:
        started = time.perf_counter()
        try:
            await self._answer()
        except ClientGone as gone:
            log.info("request %s: %s", self.id, gone)
        except Exception as error:
            await self._fail(error)
        finally:
            self._record(time.perf_counter() - started)

    def _record(self, elapsed_s: float) -> None:
        status = self.status or CLIENT_GONE
        route = getattr(self.scope.get("route"), "path", "other")
        self.edge.front.metrics.answered(route, str(status), elapsed_s)
        path = self.scope["path"][:100]
        log.info("request %s %s %r -> %d in %.0f ms", self.id, self.scope["method"], path, status, elapsed_s * 1e3)

    async def _answer(self) -> None:
        head_bytes = len(self.scope["raw_path"] or b"") + sum(len(k) + len(v) for k, v in self.scope["headers"])
        if head_bytes > MAX_HEAD_BYTES:  # the parser bounds only heads that arrive in pieces
            raise RouteError(f"the request's head has {head_bytes} bytes; {MAX_HEAD_BYTES} are taken", 431)
        if self._header("content-length") is not None and self._header("transfer-encoding") is not None:
            raise InvalidRequest("the request has both content-length and transfer-encoding; send one of them")
        check_host(self._header("host"), self.edge.config)
        if (asked := preflight(self.scope["method"], self._header, self.edge.config)) is not None:
            return await asked(self.scope, self._receive, self.send)
        self._authenticate()
        receive = _replay(await self._body())
        self.has_body = True
        try:
            async with asyncio.timeout(self.edge.config.request_timeout_s + SLOW_READER_S):
                await self._unless_disconnected(receive)
        except TimeoutError:
            raise ClientGone("the client did not read its answer in time") from None

    def _authenticate(self) -> None:
        access = self.edge.access.get(self.scope["path"], "key")
        sent = sent_key(self._header("authorization"), self._header("x-api-key"))
        ASKS.set(check_access(access, sent, self.edge.config))
        TRACEPARENT.set(next((value for key, value in self.headers if key == "traceparent"), None))

    def _header(self, name: str) -> str | None:
        return only(name, [value for key, value in self.headers if key == name])

    async def _body(self) -> bytes:
        """The whole body; RequestTooLarge or DeadlineExceeded where it exceeds its limits."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                fits = await self._read(body, self.edge.config.max_body_bytes)
        except TimeoutError:
            raise DeadlineExceeded(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
        if not fits:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DISCARD_S):
                    await self._read(bytearray(), DISCARD_BYTES)
            raise RequestTooLarge(f"the body exceeds serve.max_body_bytes, {self.edge.config.max_body_bytes}")
        return bytes(body)

    async def _read(self, body: bytearray, limit: int) -> bool:
        """Append the body's chunks; False as soon as they, or the length that the client declared, exceed `limit`."""
        declared = self._header("content-length") or ""
        if declared.isdigit() and int(declared[:20]) > limit:
            return False
        while len(body) <= limit:
            if not await self._more(body):
                return len(body) <= limit
        return False

    async def _more(self, body: bytearray) -> bool:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left before its body was complete")
        body += message.get("body", b"")
        return message.get("more_body", False)

    async def _unless_disconnected(self, receive: Receive) -> None:
        """Run the route; cancel it as soon as the client is gone."""
        task = asyncio.current_task()
        assert task is not None
        self.scope[WHEN_GONE] = leave = Leaving(task)
        try:
            await self.edge.app(self.scope, receive, self.send)
        except asyncio.CancelledError:
            if leave.is_gone and task.uncancel() == 0:
                raise ClientGone("the client left before its answer was complete") from None
            raise
        finally:
            del self.scope[WHEN_GONE]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            origin = next((value for key, value in self.headers if key == "origin"), None)
            own = [(b"x-request-id", self.id.encode()), *answer_headers(origin, self.edge.config)]
            message["headers"] = [*message["headers"], *own]
        else:
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def _fail(self, error: Exception) -> None:
        """Answer with the error, unless the app has done so; an answer cut in its middle is left to the server to cut."""
        if self.status is None:
            response = error_response(error, self.scope)
            if isinstance(error, RequestTooLarge | DeadlineExceeded) and not self.has_body:
                response.headers["connection"] = "close"  # the rest of the body is still on its way
            await response(self.scope, self._receive, self.send)
        elif not self.complete:
            raise error


def error_response(error: Exception, scope: Message) -> JSONResponse:
    """A body for any exception: of OpenAI's shape, or of Anthropic's where the path is theirs."""
    request_id = scope[REQUEST_ID]
    typed = to_typed(error, request_id)
    is_anthropic = scope["path"].startswith(ANTHROPIC)
    body = anthropic_body(typed, request_id) if is_anthropic else openai_body(typed)
    return JSONResponse(body, status_code=http_status(typed), headers=http_headers(typed))


def _replay(body: bytes) -> Receive:
    """The `receive` that routes see: the body once; the disconnect is watched outside, so then nothing, for ever."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.get_running_loop().create_future()

    return receive
