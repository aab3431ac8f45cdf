"""Guards around every rpc: the key before it, typed statuses and a count after it.

Decisions: the interceptor checks before any method, reflection included and unknown ones too; health is open, for load
balancers. A service that is not listed needs the key.
"""

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeAlias

import grpc
from grpc_health.v1 import health

from protos.trinity.v1 import placement_pb2
from serving.access import ASKS, Access, check_access, only
from serving.errors import grpc_status, grpc_trailers, to_typed
from serving.frontend import Frontend, new_request_id
from trinity.config import Client, ServeConfig
from trinity.errors import InvalidRequest, Overloaded, TrinityError, Unauthenticated

Context: TypeAlias = grpc.aio.ServicerContext
PLACEMENT = placement_pb2.DESCRIPTOR.services_by_name["Placement"].full_name
MOST_OPEN_CALLS = 1024  # that nobody needs a key for: health's, some of which last
ACCESS: dict[str, Access] = {health.SERVICE_NAME: "open", PLACEMENT: "admin"}


class Calls:
    """Calls under way, by whose they are: a stranger's flood takes so much memory and none of a client's calls."""

    def __init__(self, most: Callable[[Client], int]):
        self._most, self._num = most, Counter[str]()

    def enter(self, access: Access, client: Client) -> None:
        """Count the present task, which is a call, until its end. Raises Overloaded where there are too many. A client may
        have twice as many as it may have slots, so that its newest are told of a full server."""
        whose = "open" if access == "open" else f"client {client.name!r}"
        if self._num[whose] >= (most := MOST_OPEN_CALLS if access == "open" else 2 * self._most(client)):
            raise Overloaded(f"{most} calls are under way as {whose}, the most there may be; end some")
        task = asyncio.current_task()
        assert task is not None, "grpc.aio makes a task for each call"
        self._num[whose] += 1
        task.add_done_callback(lambda _: self._num.subtract((whose,)))


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """UNAUTHENTICATED for every method, known or not, whose service needs a key that the call does not bring."""

    def __init__(self, config: ServeConfig, most: Callable[[Client], int]):
        """`most`: slots that a client may hold."""
        self.config, self.calls = config, Calls(most)

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        service = details.method.lstrip("/").rpartition("/")[0]
        sent = [str(value) for key, value in details.invocation_metadata or () if key == "authorization"]
        access = ACCESS.get(service, "key")
        try:
            client = check_access(access, only("authorization", sent), self.config)
            self.calls.enter(access, client)
            ASKS.set(client)
        except (InvalidRequest, Overloaded, Unauthenticated) as error:
            return _refusal(error)
        return await continuation(details)


def _refusal(error: TrinityError) -> Any:
    async def refuse(requests: Any, context: Context) -> None:
        await context.abort(grpc_status(error), error.message)

    # Stream-stream, so that it answers without waiting for a message of the client's.
    return grpc.stream_stream_rpc_method_handler(refuse)


class Servicer(Protocol):
    """Needs of `guarded` from the class whose methods it surrounds."""

    front: Frontend
    service: str


def guarded(method: Callable[[Any, Any, Context], Awaitable[Any]]) -> Callable[[Any, Any, Context], Awaitable[Any]]:
    """An rpc method whose exceptions become statuses: the process edge of gRPC."""

    @functools.wraps(method)
    async def call(self: Servicer, request: Any, context: Context) -> Any:
        started, status = time.perf_counter(), grpc.StatusCode.CANCELLED
        try:
            answer = await method(self, request, context)
            status = grpc.StatusCode.OK
            return answer
        except Exception as error:
            typed = to_typed(error, new_request_id())
            status = grpc_status(typed)
            await context.abort(status, typed.message, grpc_trailers(typed))
        finally:
            seconds = time.perf_counter() - started
            self.front.metrics.answered(f"/{self.service}/{method.__name__}", status.name, seconds)

    return call
