"""The process in which large bodies are read: `python -m serving.http.body_worker SECONDS`.

Decisions: what comes back is as short as what it says: a refusal, or a body without what is ignored, its messages flat and its
prompts no longer than the model takes. This process takes what others leave of a core.

Frames (trinity/utils/boxes.py): the name of the wanted kind and max_model_len in a line, then the body; back come `+` and such
a body in a line, then ids to be read, 4 bytes each, or `-` and why there is none.
"""

import json
import os
import sys
from array import array

from serving.http import schema
from trinity.engine.request import check_length
from trinity.errors import InvalidRequest, PromptTooLong
from trinity.text.template_worker import serve

MEMORY_BYTES = 2 << 30
KINDS = {
    kind.__name__: kind
    for kind in (schema.CompletionRequest, schema.ChatRequest, schema.TokenizeRequest, schema.DetokenizeRequest)
}


def answer(request: bytes) -> bytes:
    """A request that was checked, or what is wrong with it."""
    order, _, body = request.partition(b"\n")
    name, max_model_len = order.decode().split()
    try:
        value = schema.parse(KINDS[name], body)
        if isinstance(value, schema.CompletionRequest):
            for prompt in value.prompts():
                if not isinstance(prompt, str):
                    check_length(prompt, int(max_model_len))
        packed = b""
        if isinstance(value, schema.DetokenizeRequest):
            value, packed = value.model_copy(update={"tokens": []}), array("i", value.tokens).tobytes()
        tree = value.compact().model_dump(mode="json", exclude_defaults=True)
        tree |= tree.pop("sampling", {})
        return b"+" + json.dumps(tree, ensure_ascii=False).encode() + b"\n" + packed
    except MemoryError:
        refused = InvalidRequest(f"the body needs more than {MEMORY_BYTES >> 20} MiB of memory to be read")
    except InvalidRequest as error:
        refused = error
    said = {"message": refused.message, "param": refused.param, "too_long": isinstance(refused, PromptTooLong)}
    return b"-" + json.dumps(said).encode()


if __name__ == "__main__":
    os.nice(10)
    serve(answer, MEMORY_BYTES, float(sys.argv[1]))
