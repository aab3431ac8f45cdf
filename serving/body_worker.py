"""The process in which large requests are read: `python -m serving.body_worker SECONDS`. It takes what others leave of a core.

Frames (trinity/utils/boxes.py): the kind of the request and max_model_len in a line, then the body; back come `+` and what the
edge that asks makes the request of, or `-` and why there is none.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial

from serving.grpc import messages
from serving.http import bodies
from trinity.errors import InvalidRequest, PromptTooLong
from trinity.text.template_worker import serve

MEMORY_BYTES = 2 << 30
READERS: dict[str, Callable[[bytes, int], bytes]] = {
    **{kind.__name__: partial(bodies.pack, kind) for kind in bodies.KINDS},
    **{path: partial(messages.pack, path) for path in messages.KINDS},
}


def answer(request: bytes) -> bytes:
    """A request that was checked, or what is wrong with it."""
    order, _, body = request.partition(b"\n")
    kind, max_model_len = order.decode().split()
    try:
        return b"+" + READERS[kind](body, int(max_model_len))
    except MemoryError:
        refused = InvalidRequest(f"the body needs more than {MEMORY_BYTES >> 20} MiB of memory to be read")
    except InvalidRequest as error:
        refused = error
    said = {"message": refused.message, "param": refused.param, "too_long": isinstance(refused, PromptTooLong)}
    return b"-" + json.dumps(said).encode()


if __name__ == "__main__":
    os.nice(10)
    serve(answer, MEMORY_BYTES, float(sys.argv[1]))
