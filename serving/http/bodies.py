"""Bodies of requests: small ones are read at once, large ones in processes of their own.

Decision: reading JSON and checking it holds the interpreter, in whatever thread, for as long as a client's two megabytes
take, up to a fifth of a second; every stream of the gateway would stand still, and its heap grow by what it refuses.
"""

import asyncio
import json
import os
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

from serving.http import schema
from trinity.errors import InvalidRequest, PromptTooLong
from trinity.utils.boxes import Boxes

INLINE_BYTES = 64 << 10  # some milliseconds of reading
NUM_WORKERS, CPU_S = 2, 10.0
ROOT = Path(__file__).parents[2]  # where the packages lie
M = TypeVar("M", bound=schema.Strict)


async def parsed(kind: type[M], body: bytes, max_model_len: int) -> M:
    """The typed body. Raises InvalidRequest for what is wrong in it."""
    if len(body) <= INLINE_BYTES:
        return schema.parse(kind, body)
    return await asyncio.wrap_future(_threads().submit(read_elsewhere, kind, body, max_model_len))


def read_elsewhere(kind: type[M], body: bytes, max_model_len: int) -> M:
    """`schema.parse` in another process, for bodies that are not small. Blocks; safe from any thread."""
    reply = _boxes().ask(f"{kind.__name__} {max_model_len}\n".encode() + body)
    if reply is None:
        raise InvalidRequest(f"the body takes longer than {CPU_S:g} s to read; send less of it")
    if reply.startswith(b"+"):
        line, _, packed = reply[1:].partition(b"\n")
        value = schema.parse(kind, line)
        return value.model_copy(update={"tokens": array("i", packed)}) if packed else value
    said = json.loads(reply[1:])
    refusal = PromptTooLong if said.pop("too_long") else InvalidRequest
    raise refusal(**said)


@cache
def _boxes() -> Boxes:
    env = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return Boxes(NUM_WORKERS, [sys.executable, "-P", "-m", "serving.http.body_worker", str(CPU_S)], env)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_WORKERS, "trinity-body")  # they only wait for the processes


for cached in (_boxes, _threads):  # threads stay behind, and two processes would read from one pipe
    os.register_at_fork(after_in_child=cached.cache_clear)
