"""Errors as clients are told of them: one table from `Code` to HTTP and gRPC.

Decisions: messages of typed errors are written for users and go out as they are; anything else is logged here and
goes out as one opaque sentence, so that no stack trace, path, pid or address leaves the server. A deadline is 408, as
Ray Serve answers it and OpenAI clients retry it.
"""

import logging
import math
from typing import Any, NamedTuple

import grpc

from trinity.errors import Code, TrinityError

log = logging.getLogger("trinity.serving")


class Mapping(NamedTuple):
    """`kind` is the `type` of an OpenAI error body."""

    http: int
    grpc: grpc.StatusCode
    kind: str


TABLE: dict[Code, Mapping] = {
    Code.INVALID: Mapping(400, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error"),
    Code.UNAUTHENTICATED: Mapping(401, grpc.StatusCode.UNAUTHENTICATED, "authentication_error"),
    Code.NOT_FOUND: Mapping(404, grpc.StatusCode.NOT_FOUND, "not_found_error"),
    Code.TOO_LARGE: Mapping(413, grpc.StatusCode.RESOURCE_EXHAUSTED, "invalid_request_error"),
    Code.OVERLOADED: Mapping(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error"),
    Code.UNAVAILABLE: Mapping(503, grpc.StatusCode.UNAVAILABLE, "service_unavailable_error"),
    Code.DEADLINE: Mapping(408, grpc.StatusCode.DEADLINE_EXCEEDED, "timeout_error"),
    Code.CANCELLED: Mapping(499, grpc.StatusCode.CANCELLED, "cancelled_error"),
    Code.INTERNAL: Mapping(500, grpc.StatusCode.INTERNAL, "server_error"),
}
ANTHROPIC_KINDS = {  # the `type` of an error of Anthropic's, where it is not the same
    Code.TOO_LARGE: "request_too_large",
    Code.UNAVAILABLE: "overloaded_error",
    Code.CANCELLED: "api_error",
    Code.INTERNAL: "api_error",
}
RETRY_AFTER_S = {Code.OVERLOADED: 1.0, Code.UNAVAILABLE: 1.0}


class RouteError(TrinityError):
    """HTTP only: no such path (404), a method that the path does not take (405), a body of another type (415)."""

    def __init__(self, message: str, http_status: int):
        super().__init__(message)
        self.http_status = http_status
        self.code = Code.NOT_FOUND if http_status == 404 else Code.INVALID


class NoPool(TrinityError):
    """This server has no pool of expert shards, so there is no placement to show or to change."""

    code = Code.NOT_FOUND
    grpc_status = grpc.StatusCode.UNIMPLEMENTED


def to_typed(error: BaseException, request_id: str) -> TrinityError:
    """The error to show. Untyped and internal ones are logged with their trace and become opaque."""
    if isinstance(error, TrinityError) and error.code is not Code.INTERNAL:
        return error
    log.error("request %s failed", request_id, exc_info=error)
    return TrinityError(f"internal error; the server's log has it under request id {request_id}")


def http_status(error: TrinityError) -> int:
    return getattr(error, "http_status", TABLE[error.code].http)


def grpc_status(error: TrinityError) -> grpc.StatusCode:
    return getattr(error, "grpc_status", TABLE[error.code].grpc)


def http_headers(error: TrinityError) -> dict[str, str]:
    """Retry-After in whole seconds for what may pass, WWW-Authenticate for a missing key."""
    if error.code is Code.UNAUTHENTICATED:
        return {"www-authenticate": "Bearer"}
    delay_s = retry_after_s(error)
    return {} if delay_s is None else {"retry-after": str(max(1, math.ceil(delay_s)))}


def openai_body(error: TrinityError) -> dict[str, Any]:
    kind = TABLE[error.code].kind
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code.value}}


def anthropic_body(error: TrinityError, request_id: str) -> dict[str, Any]:
    kind = ANTHROPIC_KINDS.get(error.code, TABLE[error.code].kind)
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def grpc_trailers(error: TrinityError) -> tuple[tuple[str, str], ...]:
    delay_s = retry_after_s(error)
    return () if delay_s is None else (("grpc-retry-pushback-ms", str(math.ceil(delay_s * 1000))),)


def retry_after_s(error: TrinityError) -> float | None:
    return error.retry_after_s if error.retry_after_s is not None else RETRY_AFTER_S.get(error.code)
