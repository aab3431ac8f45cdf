"""Calls as tags: `<function=f>`, then `<parameter=k>`, a value and `</parameter>` for each, then `</function>` (Qwen3-Coder;
Trinity Large-Thinking).

Decision: a value ends at `</parameter>` or with its block, at nothing else: it may be a program that holds the other tags.
"""

from collections.abc import Iterator
from typing import Literal

from trinity.text.tool_calls.arguments import ArgumentsWriter
from trinity.text.tool_calls.events import Event
from trinity.text.tool_calls.reader import MAX_NAME_CHARS, CallReader

FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER = "<function=", "</function>", "<parameter=", "</parameter>"


class Qwen3CoderReader(CallReader):
    markers = (FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER)
    _state: Literal["start", "name", "between", "key", "value"] = "start"
    _buffer = ""
    _stray = ""
    _arguments: ArgumentsWriter

    def push(self, text: str, marker: str = "") -> Iterator[Event]:
        if not self.began:
            self.raw += text
        yield from getattr(self, f"_in_{self._state}")(text, marker)

    def _in_start(self, text: str, marker: str) -> Iterator[Event]:
        self._state = "name" if marker == FUNCTION else "start"
        self.hopeless = marker != FUNCTION and text.strip() != ""
        yield from ()

    def _in_name(self, text: str, marker: str) -> Iterator[Event]:
        name, is_whole, rest = self._tag(text)
        self.hopeless = "\n" in name or len(name) > MAX_NAME_CHARS or (is_whole and not name.strip())
        if is_whole and not self.hopeless:
            self._state, name = "between", name.strip()
            self._arguments = ArgumentsWriter(self._schemas.get(name, {}), trims=True)
            yield from self._begin(name)
            yield from self._in_between(rest, "")

    def _in_between(self, text: str, marker: str) -> Iterator[Event]:
        if marker == PARAMETER:
            self._state = "key"
        elif marker == END_FUNCTION:
            yield from self._calls.wrote(self._arguments.close())
            yield from self._end(self._stray)
        elif text.strip():
            self._stray += text
        yield from ()

    def _in_key(self, text: str, marker: str) -> Iterator[Event]:
        name, is_whole, rest = self._tag(text)
        if is_whole:
            self._state = "value"
            yield from self._calls.wrote(self._arguments.key(name.strip()))
            yield from self._in_value(rest, "")

    def _in_value(self, text: str, marker: str) -> Iterator[Event]:
        if marker == END_PARAMETER:
            self._state = "between"
            yield from self._calls.wrote(self._arguments.end_value())
        else:
            yield from self._calls.wrote(self._arguments.value(text))

    def _tag(self, text: str) -> tuple[str, bool, str]:
        """Read what stands before the `>`, whether it is there, and what follows."""
        name, bracket, rest = (self._buffer + text).partition(">")
        self._buffer = "" if bracket else name
        return name, bool(bracket), rest

    def close(self, is_whole: bool) -> Iterator[Event]:
        """A call whose answer was cut stays unfinished JSON, so that nobody runs half of a command."""
        if self.began and not self.ended:
            if is_whole:
                yield from self._calls.wrote(self._arguments.close())
            yield from self._end(self._stray + self._buffer)
