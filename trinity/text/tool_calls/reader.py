"""The base of what reads one call between the markers of its block. Formats: hermes.py, qwen3_coder.py, glm.py.

Decision: a call begins when its name is known, and from then on its arguments flow. Before that it may turn out to be no call:
then it is text, and the parser shows `raw`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from trinity.text.tool_calls.events import Calls, Event

Schemas = Mapping[str, Mapping[str, Any]]  # the parameters of each tool, by its name
MAX_NAME_CHARS = 256


class CallReader:
    """One call. `rest` is text after its end, which is none of it; `hopeless` means that it will never be a call."""

    markers: tuple[str, ...] = ()

    def __init__(self, calls: Calls, schemas: Schemas):
        self._calls, self._schemas = calls, schemas
        self.raw, self.rest = "", ""
        self.began = self.ended = self.hopeless = False

    def push(self, text: str, marker: str = "") -> Iterator[Event]:
        """Read on. `marker`, of this format's own, is the name of that token, and `text` what is shown of it."""
        raise NotImplementedError

    def close(self, is_whole: bool) -> Iterator[Event]:
        """The end of the block, or (not `is_whole`) of the answer. Where nothing `began`, it was no call."""
        raise NotImplementedError

    def _begin(self, name: str) -> Iterator[Event]:
        self.began = True
        return self._calls.began(name)

    def _end(self, rest: str = "") -> Iterator[Event]:
        self.ended, self.rest = True, rest
        return self._calls.ended()
