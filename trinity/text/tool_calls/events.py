"""Events of an answer, piece by piece: text, reasoning, and calls of tools."""

import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallBegan:
    """`index` counts the calls of one answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The pieces of one call, joined, are the JSON text of its arguments, if the model wrote JSON."""

    index: int
    piece: str


@dataclass(frozen=True)
class CallEnded:
    index: int


Event: TypeAlias = Text | Reasoning | CallBegan | CallArguments | CallEnded


@dataclass(frozen=True)
class Call:
    """A whole call. `arguments` is what the model wrote: JSON text, unless it erred or was cut."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """Sum of all events of an answer."""

    text: str
    reasoning: str
    calls: tuple[Call, ...]


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events, with neighbouring pieces of one thing in one."""
    out = list[Event]()
    for event in events:
        match out[-1] if out else None, event:
            case (Text(before), Text(text)):
                out[-1] = Text(before + text)
            case (Reasoning(before), Reasoning(text)):
                out[-1] = Reasoning(before + text)
            case (CallArguments(index, before), CallArguments(same, piece)) if same == index:
                out[-1] = CallArguments(index, before + piece)
            case _:
                out.append(event)
    return out


def answer_of(events: Sequence[Event]) -> Answer:
    arguments = defaultdict[int, list[str]](list)
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.index].append(event.piece)
    return Answer(
        "".join(event.text for event in events if isinstance(event, Text)),
        "".join(event.text for event in events if isinstance(event, Reasoning)),
        tuple(
            Call(event.id, event.name, "".join(arguments[event.index]))
            for event in events
            if isinstance(event, CallBegan)
        ),
    )


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class Calls:
    """Numbers and names the calls of one answer. Those after the first `most` are left out."""

    def __init__(self, most: int | None = None, new_id: Callable[[], str] = new_call_id):
        self._most, self._new_id, self._num = most, new_id, 0

    def began(self, name: str) -> Iterator[Event]:
        self._num += 1
        if self._counts:
            yield CallBegan(self._num - 1, self._new_id(), name)

    def wrote(self, piece: str) -> Iterator[Event]:
        if self._counts and piece:
            yield CallArguments(self._num - 1, piece)

    def ended(self) -> Iterator[Event]:
        if self._counts:
            yield CallEnded(self._num - 1)

    @property
    def _counts(self) -> bool:
        return self._most is None or self._num <= self._most
