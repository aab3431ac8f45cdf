"""The guard around every rpc: key, number and size before it, typed statuses and a count after it.

Decisions: the interceptor checks before any method, reflection included and unknown ones too; health is open, for load
balancers. A service that is not listed needs the key.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from logging import DEBUG, INFO
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health

from protos.trinity.v1 import placement_pb2
from serving.access import ASKS, Access, check_access, only
from serving.errors import grpc_status, grpc_trailers, to_typed
from serving.frontend import Frontend, new_request_id
from serving.grpc.messages import KINDS, parsed
from serving.tracing import TRACEPARENT
from trinity.config import Client
from trinity.errors import InvalidRequest, Overloaded, TrinityError, Unauthenticated

log = logging.getLogger("trinity.serving")
Context: TypeAlias = grpc.aio.ServicerContext
PLACEMENT = placement_pb2.DESCRIPTOR.services_by_name["Placement"].full_name
MOST_OPEN_CALLS, MOST_OPEN_BYTES = 1024, 1024  # that nobody needs a key for: health's, some of which last
ACCESS: dict[str, Access] = {health.SERVICE_NAME: "open", PLACEMENT: "admin"}


class Calls:
    """Calls under way, by whose they are: a stranger's flood takes so much memory and none of a client's calls."""

    def __init__(self, most: Callable[[Client], int]):
        self._most, self._num = most, Counter[str]()
        self.last_s = 0.0  # when the newest one began, by time.monotonic

    def enter(self, access: Access, client: Client) -> None:
        """Count the present task, which is a call, until its end. Raises Overloaded where there are too many. A client may
        have twice as many as it may have slots, so that its newest are told of a full server."""
        whose = "open" if access == "open" else f"client {client.name!r}"
        if self._num[whose] >= (most := MOST_OPEN_CALLS if access == "open" else 2 * self._most(client)):
            raise Overloaded(f"{most} calls are under way as {whose}, the most there may be; end some")
        task = asyncio.current_task()
        assert task is not None, "grpc.aio makes a task for each call"
        self._num[whose] += 1
        self.last_s = time.monotonic()
        task.add_done_callback(lambda _: self._num.subtract((whose,)))


class Guard(grpc.aio.ServerInterceptor):
    """UNAUTHENTICATED for every method, known or not, whose service needs a key that the call does not bring. Around the
    others it is the process edge: bytes become requests, exceptions statuses, and each call is counted."""

    def __init__(self, front: Frontend):
        self.front, self.calls = front, Calls(front.admission.most)

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        service = details.method.lstrip("/").rpartition("/")[0]
        metadata = [(key, str(value)) for key, value in details.invocation_metadata or ()]
        sent = [value for key, value in metadata if key == "authorization"]
        access = ACCESS.get(service, "key")
        try:
            client = check_access(access, only("authorization", sent), self.front.config)
            self.calls.enter(access, client)
            ASKS.set(client)
            TRACEPARENT.set(dict(metadata).get("traceparent"))
        except (InvalidRequest, Overloaded, Unauthenticated) as error:
            return _refusal(error)
        handler = await continuation(details)
        return self._guarded(handler, details.method, access) if details.method in KINDS and handler else handler

    def _guarded(self, handler: Any, path: str, access: Access) -> Any:
        method, is_stream = handler.unary_stream or handler.unary_unary, handler.response_streaming

        async def call(raw: bytes, context: Context) -> Any:
            started, status = time.perf_counter(), grpc.StatusCode.CANCELLED
            try:
                answer = await method(await self._request(path, raw, access), context)
                status = grpc.StatusCode.OK
                return answer
            except grpc.aio.AbortError:  # health's own
                status = grpc.StatusCode.NOT_FOUND
                raise
            except Exception as error:
                typed = to_typed(error, new_request_id())
                status = grpc_status(typed)
                await context.abort(status, typed.message, grpc_trailers(typed))
            finally:
                elapsed_s = time.perf_counter() - started
                self.front.metrics.answered(path, status.name, elapsed_s)
                log.log(INFO if access != "open" else DEBUG, "%s -> %s in %.0f ms", path, status.name, elapsed_s * 1e3)

        make = grpc.unary_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
        return make(call, None, handler.response_serializer)

    async def _request(self, path: str, raw: bytes, access: Access) -> Any:
        if access == "open" and len(raw) > MOST_OPEN_BYTES:
            raise InvalidRequest(f"the message has {len(raw)} bytes; without a key {MOST_OPEN_BYTES} are taken")
        return await parsed(path, raw, self.front.info.max_model_len)


def _refusal(error: TrinityError) -> Any:
    async def refuse(requests: Any, context: Context) -> None:
        await context.abort(grpc_status(error), error.message)

    # Stream-stream, so that it answers without waiting for a message of the client's.
    return grpc.stream_stream_rpc_method_handler(refuse)
