"""One machine for an answer: token ids in, events out (text, reasoning, calls of tools), any number of tokens at a time.

Decisions: the machine takes one token after the other, so how many come at once changes nothing. Nothing that a model writes
is an error, and nothing of it is lost: what is no call comes out as the text (or the reasoning) that it stands in. White
space beside a marker belongs to the marker; formats put line breaks there. <tool_call> within reasoning ends it, if it is
a call.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from trinity.text.detokenizer import IncrementalDecoder
from trinity.text.markers import Piece, TextMarkers, TokenPieces
from trinity.text.reasoning import END_THINK, THINK
from trinity.text.tokenizer import Tokenizer
from trinity.text.tool_calls.events import CallBegan, Calls, Event, Reasoning, Text, new_call_id
from trinity.text.tool_calls.formats import ToolFormat
from trinity.text.tool_calls.reader import CallReader, Schemas


@dataclass(frozen=True)
class Markup:
    """Things that an answer may hold, calls in a format and reasoning, and the markers around them: tokens, or else texts."""

    tools: ToolFormat | None
    reasons: bool
    marker_by_id: Mapping[int, str]
    text_markers: tuple[str, ...]


class AnswerParser:
    """The machine for one answer. `num_calls` have begun; `num_reasoning_tokens` were thought so far."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        markup: Markup,
        schemas: Schemas,
        starts_inside: bool = False,
        most_calls: int | None = None,
        new_id: Callable[[], str] = new_call_id,
        skip_special: bool = True,
    ):
        self._markup, self._schemas = markup, schemas
        self._tokens = TokenPieces(IncrementalDecoder(tokenizer, skip_special), markup.marker_by_id)
        self._finder = TextMarkers(markup.text_markers)
        self._calls = Calls(most_calls, new_id)
        self._thinks = self._has_thought = starts_inside
        self._space, self._trims = "", starts_inside  # white space that may belong to a marker; text follows one
        self._reader: CallReader | None = None
        self._opening, self._has_call, self._skips_close = "", False, False  # of the block
        self.num_calls = self.num_reasoning_tokens = 0

    def push(self, token_ids: Sequence[int], text: str) -> list[Event]:
        """Events of these tokens. `text` is what the engine shows: it may lag behind them and catches up later."""
        return self._counted(chain.from_iterable(map(self._token, self._tokens.push(token_ids, text))))

    def finish(self) -> list[Event]:
        """Events of all that was held back. Call once, at the end."""
        rest = Piece(self._tokens.finish())
        return self._counted(chain(self._token(rest), self._piece(self._finder.flush()), self._finish()))

    def _counted(self, events: Iterator[Event]) -> list[Event]:
        found = [event for event in events if not isinstance(event, Text | Reasoning) or event.text]
        self.num_calls += sum(isinstance(event, CallBegan) for event in found)
        return found

    def _token(self, piece: Piece) -> Iterator[Event]:
        thought = self._thinks
        if piece.marker:
            yield from self._piece(self._finder.flush())
            yield from self._piece(piece)
        else:
            for part in self._finder.split(piece.text):
                yield from self._piece(part)
        self.num_reasoning_tokens += thought and self._thinks and piece.ends_token

    def _piece(self, piece: Piece) -> Iterator[Event]:
        tools = self._markup.tools
        if tools and piece.marker == tools.open:
            yield from self._open(piece.text)
        elif self._reader is not None and tools:
            yield from self._close(piece.text) if piece.marker == tools.close else self._read(*piece[:2])
        elif piece.marker == THINK and self._markup.reasons:
            yield from self._think()
        elif piece.marker == END_THINK and self._has_thought:
            self._thinks, self._space, self._trims = False, "", True
        elif tools and piece.marker == tools.close and self._skips_close:
            self._skips_close = False
        else:
            yield from self._show(piece.text)

    def _think(self) -> Iterator[Event]:
        """A second <think> is none."""
        if not self._thinks:
            self._thinks, self._has_thought, self._space, self._trims = True, True, "", True
        yield from ()

    def _show(self, text: str) -> Iterator[Event]:
        text = self._space + text
        text = text.lstrip() if self._trims else text
        body = text.rstrip()
        self._space, self._trims = text[len(body) :], self._trims and not body
        yield Reasoning(body) if self._thinks else Text(body)

    def _open(self, shown: str) -> Iterator[Event]:
        if self._reader is not None:
            yield from self._close("")
        self._opening, self._has_call = shown, False
        self._reader = self._new_reader()

    def _new_reader(self, raw: str = "") -> CallReader:
        assert self._markup.tools is not None
        reader = self._markup.tools.reader(self._calls, self._schemas)
        reader.raw = raw
        return reader

    def _read(self, text: str, marker: str) -> Iterator[Event]:
        """A block may hold several calls."""
        while self._reader is not None and (text or marker):
            reader = self._reader
            yield from reader.push(text, marker)
            text, marker = reader.rest, ""
            if reader.began:
                self._enter_call()
            if reader.ended:
                self._reader = self._new_reader()
            elif reader.hopeless:
                self._skips_close = self._has_call
                yield from self._give_up("")

    def _enter_call(self) -> None:
        """Now it is certain: reasoning has ended, and so has the text before."""
        self._has_call, self._thinks, self._space, self._trims = True, False, "", True

    def _close(self, closing: str, is_whole: bool = True) -> Iterator[Event]:
        """The end of a block; what is left of it may hold further calls."""
        while (reader := self._reader) is not None:
            yield from reader.close(is_whole)
            if reader.began:
                self._enter_call()
                self._reader = self._new_reader(reader.rest)
            else:
                yield from self._give_up(closing)

    def _give_up(self, closing: str) -> Iterator[Event]:
        """The block, or what is left of it after a call, is none."""
        assert self._reader is not None
        raw, self._reader = self._reader.raw, None
        yield from self._show(raw if self._has_call else self._opening + raw + closing)

    def _finish(self) -> Iterator[Event]:
        if self._reader is not None:
            yield from self._close("", is_whole=False)
        yield Reasoning(self._space) if self._thinks else Text(self._space)
