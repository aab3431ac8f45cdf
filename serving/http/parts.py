"""Answers as parts that follow each other, one open at a time: text, reasoning, and each call by itself.

The shape of newer APIs: their streams announce a part, add to it and end it. Whole answers are made of the same parts, so
both say the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from trinity.text.tool_calls.events import CallArguments, CallBegan, CallEnded, Event, Reasoning, Text

Kind = Literal["text", "reasoning", "call"]
Message = dict[str, Any]  # an event of the stream, as JSON has it


@dataclass
class Part:
    """`call` is what began a call. `ended` is None while the part is open, and False where its answer was cut in it."""

    kind: Kind
    index: int
    call: CallBegan | None = None
    pieces: list[str] = field(default_factory=list)
    ended: bool | None = None

    @property
    def text(self) -> str:
        """Text, reasoning, or the JSON text of a call's arguments."""
        return "".join(self.pieces)

    def shown(self) -> dict[str, Any]:
        """Its content as a whole: nothing yet when it has begun, and all when it has ended."""
        raise NotImplementedError

    def begin(self) -> list[Message]:
        raise NotImplementedError

    def delta(self, piece: str) -> Message:
        raise NotImplementedError

    def end(self) -> list[Message]:
        raise NotImplementedError


class Parts:
    """The parts of one answer, as its events come."""

    def __init__(self, make: Callable[[Kind, int, CallBegan | None], Part]):
        self.all: list[Part] = []
        self.num_chars = 0
        self._make = make

    def add(self, event: Event) -> list[Message]:
        """Add an event; -> what a stream says of it."""
        match event:
            case Text(text):
                return self._into("text", text)
            case Reasoning(text):
                return self._into("reasoning", text)
            case CallBegan():
                return self._begin("call", event)
            case CallArguments(_, piece):
                return [self._piece(piece)]
            case CallEnded():
                return self.end()

    def end(self, is_whole: bool = True) -> list[Message]:
        """End the open part, if there is one."""
        if not self.all or self.all[-1].ended is not None:
            return []
        self.all[-1].ended = is_whole
        return self.all[-1].end()

    def _into(self, kind: Kind, text: str) -> list[Message]:
        is_open = self.all and self.all[-1].ended is None and self.all[-1].kind == kind
        begun = [] if is_open else self._begin(kind)
        return [*begun, self._piece(text)]

    def _begin(self, kind: Kind, call: CallBegan | None = None) -> list[Message]:
        ended = self.end()
        self.all.append(self._make(kind, len(self.all), call))
        return [*ended, *self.all[-1].begin()]

    def _piece(self, piece: str) -> Message:
        self.all[-1].pieces.append(piece)
        self.num_chars += len(piece)
        return self.all[-1].delta(piece)
