"""Bodies of HTTP requests: small ones are parsed at once, large ones elsewhere (serving/bodies.py).

Decision: what comes back from there is as short as what it says: a body without what is ignored, its messages flat and its
prompts no longer than the model takes: JSON in a line, then ids to be read, 4 bytes each.
"""

import json
from array import array
from typing import TypeVar

from starlette.requests import Request

from serving.bodies import INLINE_BYTES, read_elsewhere
from serving.errors import RouteError
from serving.frontend import Frontend
from serving.http import schema
from serving.http.messages.request import CountRequest, MessagesRequest
from serving.http.responses.request import ResponsesRequest
from serving.http.strict import Strict
from trinity.engine.request import check_length

KINDS = (
    *(schema.CompletionRequest, schema.ChatRequest, schema.TokenizeRequest, schema.DetokenizeRequest),
    *(ResponsesRequest, MessagesRequest, CountRequest, schema.LoadAdapterRequest, schema.UnloadAdapterRequest),
)
M = TypeVar("M", bound=Strict)


async def parse(front: Frontend, kind: type[M], request: Request) -> M:
    """The typed body. Raises RouteError for another content type and InvalidRequest for what is wrong in it."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RouteError(f"the body's content type is {content_type[:100]!r}; send application/json", 415)
    value = await parsed(kind, await request.body(), front.info.max_model_len)
    front.metrics.ignored(value.ignored)
    return value


async def parsed(kind: type[M], body: bytes, max_model_len: int) -> M:
    """The typed body. Raises InvalidRequest for what is wrong in it."""
    if len(body) <= INLINE_BYTES:
        return schema.parse(kind, body)
    return unpack(kind, await read_elsewhere(kind.__name__, body, max_model_len))


def pack(kind: type[Strict], body: bytes, max_model_len: int) -> bytes:
    """A large body, checked, for `unpack`."""
    value = schema.parse(kind, body)
    if isinstance(value, schema.CompletionRequest):
        for prompt in value.prompts():
            if not isinstance(prompt, str):
                check_length(prompt, max_model_len)
    packed = b""
    if isinstance(value, schema.DetokenizeRequest):
        value, packed = value.model_copy(update={"tokens": []}), array("i", value.tokens).tobytes()
    tree = value.compact().model_dump(mode="json", exclude_defaults=True, by_alias=True)
    tree.pop("sampling", None)
    tree |= tree.pop("carried", {}) | dict.fromkeys(value.ignored, True)
    if isinstance(value, schema.Generation):  # a default that is written out is no default
        tree |= value.sampling.model_dump(mode="json", exclude_unset=True)
    return json.dumps(tree, ensure_ascii=False).encode() + b"\n" + packed


def unpack(kind: type[M], reply: bytes) -> M:
    line, _, packed = reply.partition(b"\n")
    value = schema.parse(kind, line)
    return value.model_copy(update={"tokens": array("i", packed)}) if packed else value
