"""Calls as a name, then `<arg_key>k</arg_key><arg_value>v</arg_value>` for each argument (GLM-4.5 and later).

Decision: nothing but a name says that a block is a call, so it has to be the name of a tool that the request offers.
"""

from collections.abc import Iterator
from typing import Literal

from trinity.text.tool_calls.arguments import ArgumentsWriter
from trinity.text.tool_calls.events import Event
from trinity.text.tool_calls.reader import MAX_NAME_CHARS, CallReader

KEY, END_KEY, VALUE, END_VALUE = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


class GlmReader(CallReader):
    markers = (KEY, END_KEY, VALUE, END_VALUE)
    _state: Literal["name", "between", "key", "value"] = "name"
    _key = ""
    _stray = ""
    _arguments: ArgumentsWriter

    def push(self, text: str, marker: str = "") -> Iterator[Event]:
        if self._state == "name":
            yield from self._in_name(text, marker)
        elif self._state == "value":
            yield from self._in_value(text, marker)
        elif self._state == "key":
            self._state = "between" if marker == END_KEY else "key"
            self._key += "" if marker == END_KEY else text
        else:
            yield from self._in_between(text, marker)

    def _in_name(self, text: str, marker: str) -> Iterator[Event]:
        name = self.raw.strip()
        self.raw += text
        if marker == KEY and name in self._schemas:
            self._state = "key"
            yield from self._start(name)
        else:
            self.hopeless = marker != "" or "\n" in self.raw.strip() or len(self.raw) > MAX_NAME_CHARS

    def _start(self, name: str) -> Iterator[Event]:
        self._arguments = ArgumentsWriter(self._schemas[name], trims=False)
        return self._begin(name)

    def _in_between(self, text: str, marker: str) -> Iterator[Event]:
        if marker == KEY:
            self._state, self._key = "key", ""
        elif marker == VALUE:
            self._state = "value"
            yield from self._calls.wrote(self._arguments.key(self._key.strip()))
        elif text.strip():
            self._stray += text

    def _in_value(self, text: str, marker: str) -> Iterator[Event]:
        if marker == END_VALUE:
            self._state = "between"
            yield from self._calls.wrote(self._arguments.end_value())
        else:
            yield from self._calls.wrote(self._arguments.value(text))

    def close(self, is_whole: bool) -> Iterator[Event]:
        """A call whose answer was cut stays unfinished JSON, so that nobody runs half of a command."""
        if not self.began and is_whole and (name := self.raw.strip()) in self._schemas:
            yield from self._start(name)
        if self.began:
            if is_whole:
                yield from self._calls.wrote(self._arguments.close())
            yield from self._end(self._stray)
