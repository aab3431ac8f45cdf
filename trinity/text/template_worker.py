"""The process in which chat templates run: `python -I template_worker.py SECONDS`, one request after the other over its pipes.

Decisions: a template is a program of whoever made the checkpoint. jinja's sandbox keeps it from this process's objects; memory
and processor time are the kernel's to bound, because no list of the ways to waste them would be complete. A process that is
out of time is ended by a signal, and its parent starts another. Without imports of ours: it starts in a tenth of a second, and
nothing is in it that a template could want.

Frames (trinity/utils/boxes.py) are JSON: {"template": ..., "values": {...}} there, {"text": ...} or {"error": ...} back.
"""

import datetime
import json
import resource
import signal
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH = struct.Struct("<I")
MEMORY_BYTES = 512 << 20
MAX_CHARS = 4 << 20


class Sandbox(ImmutableSandboxedEnvironment):
    """Sandbox without writes, without attributes of Python's, and without `*` and `**` of anything but small numbers, whose
    one step could outlast all bounds."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(side, int | float) for side in (left, right)):
            raise TemplateError(f"{operator} is only allowed to multiply numbers")
        return left * right


class Generation(Extension):
    """{% generation %} marks what an assistant says for training masks; a prompt shows what is inside."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own class says that it is an instance's)

    def parse(self, parser: Parser) -> nodes.Node:
        tag = next(parser.stream)
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=tag.lineno)


@lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    return environment.from_string(template)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, with transformers' arguments: jinja's own filter escapes for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> None:
    raise TemplateError(message)


def now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def render(template: str, values: dict[str, Any]) -> str:
    done, size = [], 0
    for piece in compiled(template).generate(**values):
        done.append(piece)
        size += len(piece)
        if size > MAX_CHARS:
            raise TemplateError(f"the rendered chat exceeds {MAX_CHARS:,} characters; shorten it")
    return "".join(done)


def answer(request: bytes) -> bytes:
    """A text, or why there is none."""
    asked = json.loads(request)
    try:
        reply = {"text": render(asked["template"], asked["values"])}
    except MemoryError:
        reply = {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # a foreign program can raise anything
        reply = {"error": str(error)[:1000]}
    return json.dumps(reply).encode()


def serve(answer: Callable[[bytes], bytes], memory_bytes: int, cpu_s: float) -> None:
    """Answer within these bounds until the parent has gone; SIGPROF ends this process where a request's time is up."""
    for limit, most in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (most, most))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(LENGTH.size)) == LENGTH.size:
        request = source.read(*LENGTH.unpack(head))
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        reply = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        target.write(LENGTH.pack(len(reply)) + reply)
        target.flush()


if __name__ == "__main__":
    serve(answer, MEMORY_BYTES, float(sys.argv[1]))
