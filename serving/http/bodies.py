"""Bodies of HTTP requests: small ones are parsed at once, large ones elsewhere (serving/bodies.py).

Decision: what comes back from there is as short as what it says: a body without what is ignored, its messages flat and its
prompts no longer than the model takes: JSON in a line, then ids to be read, 4 bytes each.
"""

import json
from array import array
from typing import TypeVar

from serving.bodies import INLINE_BYTES, read_elsewhere
from serving.http import schema
from serving.http.strict import Strict
from trinity.engine.request import check_length

KINDS = (schema.CompletionRequest, schema.ChatRequest, schema.TokenizeRequest, schema.DetokenizeRequest)
M = TypeVar("M", bound=Strict)


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
    tree = value.compact().model_dump(mode="json", exclude_defaults=True)
    tree.pop("sampling", None)
    if isinstance(value, schema.Generation):  # a default that is written out is no default
        tree |= value.sampling.model_dump(mode="json", exclude_unset=True)
    return json.dumps(tree, ensure_ascii=False).encode() + b"\n" + packed


def unpack(kind: type[M], reply: bytes) -> M:
    line, _, packed = reply.partition(b"\n")
    value = schema.parse(kind, line)
    return value.model_copy(update={"tokens": array("i", packed)}) if packed else value
