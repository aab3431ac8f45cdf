"""Calls as one JSON object: `{"name": "f", "arguments": {...}}` (Hermes, Qwen; Trinity Nano, Mini, Large-Preview).

Decision: written in that order, arguments flow as they come, as the model wrote them. In any other order (arguments first, as a
text, under another key) the object is read when it is complete.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from trinity.text.tool_calls.events import Event
from trinity.text.tool_calls.reader import MAX_NAME_CHARS, CallReader

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]{1,256})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
MAX_HEAD_CHARS = MAX_NAME_CHARS + 256  # a longer one is read when it is complete
DECODER = json.JSONDecoder()


class JsonSpan:
    """Finds where a JSON object or list ends that comes in pieces; `depth` brackets are open already."""

    def __init__(self, depth: int = 0):
        self._depth, self._in_text, self._escaped = depth, False, False

    def end(self, text: str) -> int | None:
        """Position after its last bracket, if that is in `text`."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._in_text, self._escaped = char != '"', char == "\\"
            elif char == '"':
                self._in_text = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


class HermesReader(CallReader):
    """`tail` is what came after the arguments: the bracket that closes the call, and fields that nobody asked for."""

    _arguments: JsonSpan | None = None
    _outer: JsonSpan | None = None
    _tail = ""
    _is_object = False

    def push(self, text: str, marker: str = "") -> Iterator[Event]:
        if self._outer is not None:
            yield from self._push_tail(text)
        elif self._arguments is not None:
            yield from self._push_arguments(text)
        else:
            yield from self._push_head(text)

    def _push_head(self, text: str) -> Iterator[Event]:
        self.raw += text
        if not self._is_object:
            head = self.raw.lstrip()[:1]
            self._is_object, self.hopeless = head == "{", head not in ("", "{")
        if len(self.raw) - len(text) <= MAX_HEAD_CHARS and (found := HEAD.match(self.raw)):
            self._arguments = JsonSpan()
            yield from self._begin(found[1])
            yield from self._push_arguments(self.raw[found.end() :])

    def _push_arguments(self, text: str) -> Iterator[Event]:
        assert self._arguments is not None
        end = self._arguments.end(text)
        yield from self._calls.wrote(text[:end])
        if end is not None:
            self._outer = JsonSpan(depth=1)
            yield from self._push_tail(text[end:])

    def _push_tail(self, text: str) -> Iterator[Event]:
        assert self._outer is not None
        end = self._outer.end(text)
        self._tail += text
        if end is not None:
            yield from self._end(text[end:])

    def close(self, is_whole: bool) -> Iterator[Event]:
        if self.began and not self.ended:
            yield from self._end(self._tail.strip())
        elif not self.began and (call := read_call(self.raw)):
            name, arguments, end = call
            yield from self._begin(name)
            yield from self._calls.wrote(arguments)
            yield from self._end(self.raw[end:])


def read_call(text: str) -> tuple[str, str, int] | None:
    """Name, JSON text of the arguments, and where the object ends, if `text` begins with a call."""
    start = len(text) - len(text.lstrip())
    try:
        call, end = DECODER.raw_decode(text, start)
        name = call.get("name") if isinstance(call, dict) else None
        if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS):
            return None
        return name, _as_text(call.get("arguments", call.get("parameters"))), end
    except (ValueError, RecursionError):  # what a model wrote may be anything
        return None


def _as_text(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    return "{}" if arguments is None else json.dumps(arguments, ensure_ascii=False)
