"""Guards around every rpc: the key before it, typed statuses and a count after it.

Decisions: the interceptor checks before any method, reflection included and unknown ones too; health is open, for load
balancers. A service that is not listed needs the key.
"""

import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeAlias

import grpc
from grpc_health.v1 import health

from protos.trinity.v1 import placement_pb2
from serving.access import ASKS, Access, check_access, only
from serving.errors import grpc_status, grpc_trailers, to_typed
from serving.frontend import Frontend, new_request_id
from trinity.config import ServeConfig
from trinity.errors import InvalidRequest, TrinityError, Unauthenticated

Context: TypeAlias = grpc.aio.ServicerContext
PLACEMENT = placement_pb2.DESCRIPTOR.services_by_name["Placement"].full_name
ACCESS: dict[str, Access] = {health.SERVICE_NAME: "open", PLACEMENT: "admin"}


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """UNAUTHENTICATED for every method, known or not, whose service needs a key that the call does not bring."""

    def __init__(self, config: ServeConfig):
        self.config = config

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        service = details.method.lstrip("/").rpartition("/")[0]
        sent = [str(value) for key, value in details.invocation_metadata or () if key == "authorization"]
        try:
            ASKS.set(check_access(ACCESS.get(service, "key"), only("authorization", sent), self.config))
        except (InvalidRequest, Unauthenticated) as error:
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
