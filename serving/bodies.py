"""Large requests are read in processes of their own, whichever edge they came to.

Decision: parsing and checking them holds the interpreter, in whatever thread, for as long as a client's two megabytes take, up
to a third of a second; every stream of the gateway would stand still, and its heap grow by what it refuses.
"""

import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from trinity.errors import InvalidRequest, PromptTooLong
from trinity.utils.boxes import Boxes

INLINE_BYTES = 64 << 10  # some milliseconds of reading
NUM_WORKERS, CPU_S = 2, 10.0
ROOT = Path(__file__).parents[1]  # where the packages lie


async def read_elsewhere(kind: str, body: bytes, max_model_len: int) -> bytes:
    """A body of a kind that body_worker knows, checked, and as short as what it says. Raises InvalidRequest, PromptTooLong."""
    return await asyncio.wrap_future(_threads().submit(read, kind, body, max_model_len))


def read(kind: str, body: bytes, max_model_len: int) -> bytes:
    """The same. Blocks; safe from any thread."""
    reply = _boxes().ask(f"{kind} {max_model_len}\n".encode() + body)
    if reply is None:
        raise InvalidRequest(f"the body takes longer than {CPU_S:g} s to read; send less of it")
    if reply.startswith(b"+"):
        return reply[1:]
    said = json.loads(reply[1:])
    refusal = PromptTooLong if said.pop("too_long") else InvalidRequest
    raise refusal(**said)


@cache
def _boxes() -> Boxes:
    env = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return Boxes(NUM_WORKERS, [sys.executable, "-P", "-m", "serving.body_worker", str(CPU_S)], env)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_WORKERS, "trinity-body")  # they only wait for the processes


for cached in (_boxes, _threads):  # threads stay behind, and two processes would read from one pipe
    os.register_at_fork(after_in_child=cached.cache_clear)
